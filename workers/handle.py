"""What the pool hands back to Celery for each message, whatever its task."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import Any

from celery.worker.state import revoked as revoked_tasks

from nograd.tasks.keys import BULK_FROM, INTERACTIVE

from .trace import Callbacks, TraceArgs


class Handle:
    """One message in this process, from fetch to acknowledgement.

    Celery holds it by weak reference and calls `terminate` on it. A message has one end: whoever claims it first.

    Attributes:
        celery: Celery's callbacks.
        raw: the tracer's arguments: task name, id, headers, body, content type, content encoding.
        received: monotonic time at which it came.
        started: monotonic time at which work on it began.
        priority: Celery's: 0, the highest, for a message without one, 9 the lowest.
        bulk: whether interactive messages go before it.
    """

    def __init__(self, celery: Callbacks, args: TraceArgs) -> None:
        self.celery = celery
        self.raw = args
        self.received = self.started = time.monotonic()
        priority = (self.request_dict.get("delivery_info") or {}).get("priority")
        self.priority: int = priority if isinstance(priority, int) else INTERACTIVE
        self.bulk = self.priority >= BULK_FROM
        self._terminated = False
        self._claimed = False
        self._lock = threading.Lock()

    @property
    def id(self) -> str:
        """The Celery task id."""
        return str(self.raw[1])

    @property
    def request_dict(self) -> dict[str, Any]:
        """Celery's headers of the task."""
        headers: dict[str, Any] = self.raw[2]
        return headers

    @property
    def delivery(self) -> Any:
        """Kombu's message, for the transport; None outside a worker."""
        return getattr(self.celery.request, "message", None)

    def begin(self) -> bool:
        """Tell Celery that work begins; False if nobody wants the outcome any more, which Celery then has stored."""
        self.started = time.monotonic()
        self.celery.accept()
        if not self.abandoned():
            return True
        self.withdraw()
        return False

    def abandoned(self) -> bool:
        """Whether the message was terminated, revoked or has expired. Only looks; `withdraw` answers."""
        request = self.celery.request
        if self._terminated or request is None:
            return self._terminated
        return request.id in revoked_tasks or _expired(request)

    def withdraw(self) -> None:
        """Let Celery answer an abandoned message: REVOKED is stored, the message acknowledged. Waits for Redis."""
        if self.claim() and self.celery.request is not None:
            self.celery.request.revoked()

    def terminate(self, signal: Any = None) -> None:  # noqa: ARG002 - Celery's signature
        """Give the message up: Celery has revoked it, stored that and acknowledged."""
        self._terminated = True

    def claim(self) -> bool:
        """True for the one caller that may end the message; for nobody once it was terminated."""
        with self._lock:
            if self._claimed:
                return False
            self._claimed = True
            return not self._terminated


def _expired(request: Any) -> bool:
    # Not Request.maybe_expire(): it writes to Celery's set of revoked ids, which belongs to the event loop.
    expires = request.expires
    return bool(expires and datetime.now(UTC if expires.tzinfo else None) > expires)
