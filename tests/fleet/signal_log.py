"""Notes every task signal a worker fires (``-I signal_log``), as a user's own receivers would get it."""

from celery import signals

import own_tasks


def _receiver(name):
    def receiver(sender=None, task_id=None, request=None, **_):
        request = request or getattr(sender, "request", None)
        own_tasks.note("signals", [task_id or request.id, name])

    return receiver


RECEIVERS = {
    name: _receiver(name)
    for name in ("task_prerun", "task_postrun", "task_success", "task_failure", "task_retry", "task_revoked")
}
for _name, _made in RECEIVERS.items():
    getattr(signals, _name).connect(_made, weak=False)
