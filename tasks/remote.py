"""Remote commands of a worker: ``celery -A nograd.tasks control nograd_load NAME``, or ``nograd models load NAME``.

They run on the worker's event loop, so they only begin what they ask for; ``inspect stats`` (``pool.hosting``) shows
how far it is. They are declared here, in the contract, so that clients know them, too.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command

from .errors import ConfigError


@control_command(args=[("model", str)], signature="<model>")  # type: ignore[untyped-decorator]
def nograd_load(state: Any, model: str, reload: bool = False) -> dict[str, Any]:
    """Tell worker(s) to load a model of their model file, which is read again."""
    return _change(state, "load_model", model, reload=bool(reload))


@control_command(args=[("model", str)], signature="<model>")  # type: ignore[untyped-decorator]
def nograd_unload(state: Any, model: str) -> dict[str, Any]:
    """Tell worker(s) to unload a model; its jobs go back to their queue."""
    return _change(state, "unload_model", model)


def _change(state: Any, method: str, model: str, **options: Any) -> dict[str, Any]:
    change = getattr(state.consumer.pool, method, None)
    if change is None:
        return {"error": "this worker does not run nograd's batch pool"}
    try:
        return {"ok": change(model, state.consumer, **options)}
    except ConfigError as err:  # nothing has begun
        return {"error": err.message, "code": err.code}
