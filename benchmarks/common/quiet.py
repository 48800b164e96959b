"""Our app without task events (``celery -A common.quiet``)."""

from __future__ import annotations

from nograd.tasks import app

app.conf.update(worker_send_task_events=False, task_send_sent_event=False)
