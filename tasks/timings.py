"""What a job spent its time on: stored with its result, carried by its last event.

The stages follow each other without a gap: they add up to the time from sending to storing. With many inputs in one
message they are those of the whole message; only ``device_s`` counts its own batches alone, and what lay between
them is waiting.

In Redis they are one more key, ``timings``, of Celery's own metadata of the result (`nograd.tasks.backend`); in the
events ``task-succeeded``, ``task-failed``, ``task-retried`` and ``task-revoked`` one more field of that name
(`nograd.tasks.request`). Neither has them if the job never came to the pool: revoked or expired before, or unreadable
for Celery.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .structs import decodable


@decodable
class Timings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Seconds of each stage of one job, and where it ran. What is zero or None is mostly left out where it is stored.

    Attributes:
        queue_s: from sending until the worker's pool took it, a countdown and earlier deliveries included. It compares
            two machines' clocks, and is 0 where the worker's is behind. None if the sender put no ``timestamp`` (an
            AMQP property, seconds since the epoch) on the message; every app of nograd does.
        prepare_s: from there until all its inputs were decoded and preprocessed, the wait for a CPU thread included.
        batch_wait_s: from there until its last forward ended, without the time in ``device_s``.
        device_s: its forwards, the whole batch's each; the copies to and from the device included.
        settle_s: from there until the result was ready to be stored.
        batch_size: inputs in its forward, its own and others'; of several forwards the largest.
        batches: how many forwards its inputs were in; 0 if none got to the device.
        model_version: fingerprint of the model that answered (`nograd.workers.models.version`).
        worker: node name of the worker.
        retries: Celery's retries before this attempt.
        deaths: workers that died over it before.
    """

    queue_s: float | None = None
    prepare_s: float = 0.0
    batch_wait_s: float = 0.0
    device_s: float = 0.0
    settle_s: float = 0.0
    batch_size: int = 0
    batches: int = 0
    model_version: str | None = None
    worker: str | None = None
    retries: int = 0
    deaths: int = 0

    @property
    def total_s(self) -> float:
        """All stages together."""
        return (self.queue_s or 0.0) + self.prepare_s + self.batch_wait_s + self.device_s + self.settle_s


def read_timings(stored: Any) -> Timings | None:
    """The timings in a result's metadata or in an event; None if there are none, or nothing to make sense of."""
    if not isinstance(stored, dict):
        return None
    try:
        return msgspec.convert(stored, Timings)
    except msgspec.ValidationError:  # of another version of nograd
        return None
