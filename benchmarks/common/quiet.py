"""Our app without task events and without timings (``celery -A common.quiet``): what both cost is the difference."""

from __future__ import annotations

from typing import Any

from nograd.tasks import app
from nograd.workers.message import Message

app.conf.update(worker_send_task_events=False, task_send_sent_event=False)


def _none(_message: Message, _node: str) -> Any:
    return None


# There is no setting for it: jobs always carry their timings.
Message.timings = _none  # type: ignore[method-assign]
