"""How long each stage of a message takes, at the price of a few readings of the clock."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: digits behind the point of what is stored: microseconds
_DIGITS = 6
#: seconds of the epoch that are a time; NaN, infinity and JSON's endless integers are none
_LAST_TIMESTAMP = 1e12


@dataclass(frozen=True, slots=True)
class Forward:
    """One batch's time on the device.

    Attributes:
        ended: monotonic time.
        device_s: seconds it took, splitting after an error included.
        size: inputs in it.
    """

    ended: float
    device_s: float
    size: int


class Stopwatch:
    """The stages of one message.

    Law: the stages follow each other without a gap, so that they add up to the message's time in this worker.

    No lock: each stage is written by the thread that has the message then.

    Attributes:
        received: monotonic time at which the pool took the message.
        prepared: monotonic time at which its inputs were handed to the device thread; None before.
    """

    __slots__ = ("_batches", "_device_s", "_last", "_size", "prepared", "received")

    def __init__(self, received: float) -> None:
        self.received = received
        self.prepared: float | None = None
        self._last: Forward | None = None
        self._device_s = 0.0
        self._size = 0
        self._batches = 0

    def ran(self, forward: Forward) -> None:
        """Count a forward some of its inputs were in; once, however many those are."""
        if forward is self._last:
            return
        self._last = forward
        self._device_s += forward.device_s
        self._batches += 1
        self._size = max(self._size, forward.size)

    def read(
        self, request: Mapping[str, Any], *, model_version: str | None, worker: str | None, deaths: int
    ) -> dict[str, Any]:
        """The stages up to now as `nograd.tasks.timings.Timings` says, as they are stored.

        Args:
            request: Celery's headers of the task.
            model_version: of the model that answered.
            worker: node name.
            deaths: workers that died over the message before.
        """
        now = time.monotonic()
        prepared = now if self.prepared is None else self.prepared
        ended = max(prepared, now if self._last is None else self._last.ended)
        queue_s = _queue_s(request, now - self.received)
        retries = request.get("retries")
        stages = {  # not a `Timings`: making one and turning it into this takes twice as long
            "prepare_s": round(prepared - self.received, _DIGITS),
            "batch_wait_s": round(max(0.0, ended - prepared - self._device_s), _DIGITS),
            "device_s": round(self._device_s, _DIGITS),
            "settle_s": round(now - ended, _DIGITS),
            "batch_size": self._size,
            "batches": self._batches,
            "model_version": model_version,
            "worker": worker,
            "retries": retries if isinstance(retries, int) else 0,
            "deaths": deaths,
        }
        stored = {name: value for name, value in stages.items() if value}
        if queue_s is not None:
            stored["queue_s"] = queue_s  # 0 says more than None
        return stored


def _queue_s(request: Mapping[str, Any], here_s: float) -> float | None:
    """Seconds from sending to reception; whoever sends writes what it likes."""
    properties = request.get("properties")
    sent = properties.get("timestamp") if isinstance(properties, dict) else None
    if isinstance(sent, bool) or not isinstance(sent, int | float) or not abs(sent) < _LAST_TIMESTAMP:
        return None
    return round(max(0.0, time.time() - here_s - sent), _DIGITS)
