"""Every queue and Redis key nograd itself writes, with its lifetime.

Celery's own keys (results, ``unacked``, ``_kombu.binding.*``) are Celery's; a result's TTL is ``result_expires``.
"""

from __future__ import annotations

from typing import Final

#: the name of the task whose messages the batch pool batches
PREDICT_TASK: Final = "nograd.predict"

#: hash, model name → JSON of `registry.ModelCard`; renewed by every worker that serves a model
MODELS_KEY: Final = "nograd:models"
#: seconds a model stays known after the last worker that served it renewed its card
MODELS_TTL_S: Final = 7 * 24 * 3600
#: seconds between two renewals by a worker: after a FLUSHALL its models are unknown for so long
MODELS_RENEW_S: Final = 30

#: hash per kind of device (behind this), model and group of a batch → how many inputs fit into its memory, as JSON
SAFE_SIZES: Final = "nograd:safe-sizes:"
#: seconds a size is believed after it was learnt, and the hash is kept after the last one was
SAFE_SIZE_TTL_S: Final = 3600

#: zset, id of a cancelled job → when it was cancelled, seconds since the epoch
CANCELLED: Final = "nograd:cancelled"
#: seconds a cancelled id is remembered for workers that start later
CANCELLED_TTL_S: Final = 24 * 3600
#: ids remembered, the latest: as many as Celery's workers keep
CANCELLED_MOST: Final = 50_000

#: string, behind this a task id → why the last worker that ran the job ended
LAST_WORDS: Final = "nograd:last-words:"
#: seconds it is kept; the job is given up within minutes, or runs
LAST_WORDS_TTL_S: Final = 24 * 3600

#: seconds a result is kept if nobody says otherwise (``NOGRAD_RESULT_TTL_S``)
RESULT_TTL_S: Final = 24 * 3600

#: environment variable; ``0`` keeps Celery's two lines for each job out of a worker's log, as ``nograd worker`` does
LOG_JOBS: Final = "NOGRAD_LOG_JOBS"

#: seconds a worker may be silent before its jobs are given to others (``NOGRAD_LEASE_S``)
LEASE_S: Final = 30

#: Celery's priorities on Redis go from 0, the highest, to 9, in steps of 3: interactive jobs (also those without one),
#: bulk, and below them the chunks of backfills, of which a worker takes one at a time
INTERACTIVE: Final = 0
BULK: Final = 6
CHUNKS: Final = 9
#: from this priority on a job is bulk: it never keeps an interactive one waiting longer than one batch
BULK_FROM: Final = 5


#: kombu keeps one list per priority step; 0, the highest, has the queue's plain name
PRIORITY_SEPARATOR: Final = "\x06\x16"
PRIORITY_SUFFIXES: Final = ("", *(f"{PRIORITY_SEPARATOR}{step}" for step in (3, 6, 9)))


def queue_name(model: str) -> str:
    """The Celery queue of a model."""
    return f"nograd.{model}"
