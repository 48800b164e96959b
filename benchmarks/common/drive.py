"""Runs one backfill and prints what it took; imports nothing a driver does not need, for its memory is measured."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any

from common.peak import peak_mb
from nograd.producer import Client


def drive(url: str, model: str, source: str, out: str, options: dict[str, Any]) -> int:
    """Plan, run, and close once more what the last worker has closed."""
    from nograd.tasks.backfill.finalize import finalize

    with Client(url) as client:
        backfill = client.backfill(model, source, out, **options)
        times = [time.perf_counter()]
        backfill.plan()
        times.append(time.perf_counter())
        backfill.run(interval_s=0.1)
        times.append(time.perf_counter())
        finalize(backfill.job)
        times.append(time.perf_counter())
        plan_s, run_s, close_s = (after - before for before, after in pairwise(times))
        progress = backfill.status().progress
    told = {"seconds": run_s, "plan s": plan_s, "close s": close_s, "rows": progress.rows_ok, "chunks": progress.chunks}
    print(json.dumps({**told, "MB": peak_mb()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(drive(*json.loads(sys.argv[1])))
