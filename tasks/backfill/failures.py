"""The failed rows of a backfill: read from its errors files, and sorted into what went wrong.

Two rows belong to one cluster if they failed in the same stage with the same type of error and the same message but
for numbers, quoted words and paths: a thousand corrupt images are one line, not a thousand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from . import commit
from .plan import Job
from .rows import RowFailure

#: failed rows kept of each cluster, as examples
SAMPLES = 3
#: clusters told apart; what comes after so many counts as one of its stage and type
MOST = 1000
#: characters of a message that are looked at
CHARS = 300

_VARIABLE = re.compile(
    r"""'[^']*'|"[^"]*"|`[^`]*`  # quoted
    |\b0x[0-9a-fA-F]+\b|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?  # numbers
    |(?:[\w.~-]*/)+[\w.-]+  # paths
    """,
    re.VERBOSE,
)


class Cluster(msgspec.Struct, kw_only=True):
    """Rows that failed for the same reason.

    Attributes:
        stage: where.
        type: of the error.
        message: what they have in common, ``…`` for what differs.
        rows: how many.
        samples: some of them.
    """

    stage: str
    type: str
    message: str
    rows: int = 0
    samples: list[RowFailure] = []


def failures(job: Job) -> Iterator[RowFailure]:
    """The committed failures of a backfill, or of one retry of it, in input order; one errors file is in memory.

    Raises:
        BackfillError: if a record cannot be read.
    """
    for record in commit.records(job.store, job.plan):
        if record.errors is None:
            continue
        try:
            data = job.store.read(record.errors.name)
        except FileNotFoundError:  # committed, and not yet in its place
            data = job.store.read(record.errors.staged)
        for line in data.splitlines():
            yield _failure(msgspec.json.decode(line))


def clusters(found: Iterable[RowFailure]) -> list[Cluster]:
    """Failed rows by what went wrong, the most frequent first."""
    sorts: dict[tuple[str, str, str], Cluster] = {}
    for failure in found:
        key = (failure.stage, failure.type, normalised(failure.message))
        if key not in sorts and len(sorts) >= MOST:
            key = (failure.stage, failure.type, "…")
        cluster = sorts.setdefault(key, Cluster(stage=key[0], type=key[1], message=key[2]))
        cluster.rows += 1
        if len(cluster.samples) < SAMPLES:
            cluster.samples.append(failure)
    return sorted(sorts.values(), key=lambda cluster: -cluster.rows)


def normalised(message: str) -> str:
    """A message without what differs from row to row."""
    return _VARIABLE.sub("…", message[:CHARS])


def _failure(line: dict[str, Any]) -> RowFailure:
    if "custom_id" in line:  # OpenAI's shape
        error = line["error"]
        line = {"row": line["row"], "id": line["custom_id"], "stage": line["stage"], **error}
        line["type"] = line.pop("code")
    return msgspec.convert(line, RowFailure)
