"""Celery's Redis backends, except that the result of a job is stored with its timings.

Law: what is stored differs from what Celery stores by the key ``timings`` alone, so every Celery client reads it.

`nograd.tasks.create_app` chooses them by the scheme of the URL; any other app can with
``result_backend="nograd.tasks.backend:RedisBackend+redis://…"``.
"""

from __future__ import annotations

from typing import Any

from celery.backends import redis


class _WithTimings:
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


class RedisBackend(_WithTimings, redis.RedisBackend):  # type: ignore[misc]
    """For ``redis://``, ``rediss://`` and unix sockets."""


class SentinelBackend(_WithTimings, redis.SentinelBackend):  # type: ignore[misc]
    """For ``sentinel://``."""
