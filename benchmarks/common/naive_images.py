"""Celery with one task per image (``celery -A common.naive_images``); as a program it sends all images of a folder."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from celery import Celery, group

from common.peak import peak_mb
from common.raw import ResNet

URL = os.environ["NOGRAD_REDIS_URL"]
app = Celery("naive", broker=URL, backend=URL, set_as_current=False)
app.conf.update(task_acks_late=True, task_default_queue="naive-images", broker_connection_retry_on_startup=True)


@cache
def _net() -> ResNet:
    return ResNet(Path(os.environ["NAIVE_WEIGHTS"]))


@app.task(name="naive.image")
def image(path: str) -> Any:
    """One file, one forward."""
    return _net().answers([_net().prepare(Path(path).read_bytes())])[0]


def main() -> int:
    files = sorted(map(str, Path(sys.argv[1]).iterdir()))
    image.delay(files[0]).get()
    began = time.perf_counter()
    found = group(image.s(path) for path in files)().get()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "rows": len(found), "MB": peak_mb()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
