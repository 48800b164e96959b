"""The fast path's half in Redis: the results of many plain messages stored by one script.

Laws:

* A message is *plain* if its success has no consequence but its result: no link, chain or chord, no receiver of
  Celery's task signals, a JSON result in Celery's Redis backend. Any other goes the complete way
  (`nograd.workers.trace`).
* What is stored is what Celery's backend would have stored, made by the backend itself.
* The first terminal state wins (`store.lua`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from celery import signals
from celery.app.task import Context
from celery.app.trace import get_actual_ignore_result
from celery.backends.redis import RedisBackend

from nograd.tasks.backend import STORE
from nograd.tasks.backend import RedisBackend as OwnRedisBackend

#: results in one call of the script, and bytes: Redis runs nothing else meanwhile
MOST_RESULTS = 256
MOST_BYTES = 4 * 1024 * 1024

_EVENTFUL = ("callbacks", "chain", "chord")


class ResultStore:
    """Celery's result backend, for many results at once. Any thread may use it."""

    def __init__(self, app: Any, task: Any, hostname: str) -> None:
        self._app = app
        self._task = task
        self.hostname = hostname
        # Exactly these classes: another (Sentinel's, a user's) may store in another way.
        self.usable = type(app.backend) in (RedisBackend, OwnRedisBackend) and not app.conf.task_track_started
        self._script = app.backend.client.register_script(STORE) if self.usable else None

    def plain(self, request: Mapping[str, Any], embed: Mapping[str, Any] | None) -> bool:
        """Whether a message may be settled here."""
        if not self.usable or _signal_receivers() or self._app.conf.worker_deduplicate_successful_tasks:
            return False
        return not any((embed or {}).get(key) or request.get(key) for key in _EVENTFUL)

    def encode(
        self, request: dict[str, Any], args: Any, kwargs: Any, value: Any, timings: dict[str, Any]
    ) -> tuple[str, str] | None:
        """Key and encoded metadata of a success; None if nothing is to be stored (``ignore_result``).

        Args:
            request: Celery's headers of the task.
            args: of the task, for ``result_extended``.
            kwargs: of the task.
            value: the prediction.
            timings: for a backend that stores them (`nograd.tasks.backend`).

        Raises:
            Exception: whatever the serializer says of a value it cannot hold; the complete path then stores a failure.
        """
        backend = self._app.backend
        context = Context(
            request,
            args=args,
            kwargs=kwargs,
            hostname=self.hostname,
            called_directly=False,
            timings=timings,
            headers={},  # those of the sender's own: nothing of them is stored, and to find them out costs most of this
        )
        if get_actual_ignore_result(self._task, context):
            return None
        meta = backend._get_result_meta(result=value, state="SUCCESS", traceback=None, request=context)  # noqa: SLF001
        meta["task_id"] = request["id"]
        return backend.get_key_for_task(request["id"]), backend.encode(meta)

    def put(self, results: Sequence[tuple[str, str]]) -> None:
        """Store results; each stays as it is if its job has ended before.

        Raises:
            redis.RedisError: if Redis does not take them; some may be stored, and may be stored again.
        """
        expires = int(self._app.backend.expires or 0)
        for chunk in _chunks(results):
            keys, values = zip(*chunk, strict=True)
            assert self._script is not None
            self._script(keys=[_text(key) for key in keys], args=[expires, *values])


def _chunks(results: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    chunks: list[list[tuple[str, str]]] = [[]]
    size = 0
    for result in results:
        size += len(result[1])
        if chunks[-1] and (len(chunks[-1]) >= MOST_RESULTS or size > MOST_BYTES):
            chunks.append([])
            size = len(result[1])
        chunks[-1].append(result)
    return [chunk for chunk in chunks if chunk]


def _signal_receivers() -> bool:
    return bool(signals.task_prerun.receivers or signals.task_postrun.receivers or signals.task_success.receivers)


def _text(key: str | bytes) -> str:
    return key.decode() if isinstance(key, bytes) else key
