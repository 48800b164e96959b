"""Celery's Redis backends, except that the result of a job is stored with its timings, and its end stays.

Laws:

* What is stored differs from what Celery stores by the key ``timings`` alone, so every Celery client reads it.
* A state that is no end (RETRY, STARTED) never takes the place of one that is. Stock Celery looks first and stores
  then: a retry that ends before the attempt that asked for it has stored its RETRY may lose its result to that.

`nograd.tasks.create_app` chooses them by the scheme of the URL; any other app can with
``result_backend="nograd.tasks.backend:RedisBackend+redis://…"``.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final

from celery import states
from celery.backends import redis

#: stores results of jobs that have not ended; see there
STORE: Final = files(__package__).joinpath("store.lua").read_text(encoding="utf-8")


class _OurResults:
    """For a backend of Celery's that stores metadata as one document."""

    def _get_result_meta(self, result: Any, state: Any, traceback: Any, request: Any, **options: Any) -> dict[str, Any]:
        meta: dict[str, Any] = super()._get_result_meta(  # type: ignore[misc]
            result=result, state=state, traceback=traceback, request=request, **options
        )
        # Of the request itself: those a failure passes on to (the rest of its chain) have none.
        timings = getattr(request, "timings", None)
        if timings is not None:
            meta["timings"] = timings
        return meta

    def _set_with_state(self, key: str, value: str, state: str) -> Any:
        if state in states.READY_STATES:
            return super()._set_with_state(key, value, state)  # type: ignore[misc]
        store = self.client.register_script(STORE)  # type: ignore[attr-defined]
        return self.ensure(store, ([key], [int(self.expires or 0), value]))  # type: ignore[attr-defined]


class RedisBackend(_OurResults, redis.RedisBackend):  # type: ignore[misc]
    """For ``redis://``, ``rediss://`` and unix sockets."""


class SentinelBackend(_OurResults, redis.SentinelBackend):  # type: ignore[misc]
    """For ``sentinel://``."""
