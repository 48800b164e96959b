"""The task ``nograd.predict``: what crosses the wire, in one place.

========== ====================================================================================
args       ``[model, input]``; or ``[input]`` with ``model`` by name, which is what a chain
           needs: Celery puts the result before it in front, as in
           ``chain(predict.s("resnet18", photo), predict.s(model="captions"))``
kwargs     ``params``: overrides the model's default parameters for this job;
           ``many``: true if ``input`` is a list of inputs, each its own item of the batch;
           ``timeout_s``: seconds from the job's arrival at a worker until it fails with
           `DeadlinePassed` if it has no prediction, waiting or on the device; the model's
           own ``timeout_s`` holds as well. Waiting in the queue does not count (that is what
           Celery's ``expires`` is for), and a retry counts anew
result     the prediction; with ``many`` a list, in order, of ``{"prediction": …}`` or
           ``{"error": {"type", "code", "message"}}`` (no item is retried by itself)
========== ====================================================================================

The batch pool (`nograd.workers.pool`) runs the forward first and Celery's own tracer afterwards: inside the tracer this
task's body only hands out the outcome that is already there. So whatever Celery does around a task (results, acks,
events, retries, chains, groups, chords, signals) happens to predictions as well, by Celery's own code.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
from celery import shared_task

from .errors import ConfigError, JobError, UnknownModel
from .keys import PREDICT_TASK

#: seconds before a retryable error's first retry; doubles with each
RETRY_BACKOFF_S: Final = 1
#: seconds between retries, at most
RETRY_BACKOFF_MAX_S: Final = 60
MAX_RETRIES: Final = 5


#: what ``timeout_s`` may be: also no infinity, which JSON does not know
TimeoutS = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one message ended: a value, or an error; and its timings, as they are stored."""

    value: Any = None
    error: Exception | None = None
    timings: dict[str, Any] | None = None


#: The outcome of the message that is being traced on this thread; set by the batch pool around the tracer.
traced_outcome: ContextVar[Outcome | None] = ContextVar("traced_outcome", default=None)


@shared_task(  # type: ignore[untyped-decorator]
    name=PREDICT_TASK,
    bind=True,
    max_retries=MAX_RETRIES,
    acks_late=True,
    # Outcomes of jobs, not troubles of the worker: its log holds no traceback of them.
    throws=(JobError, UnknownModel),
    typing=False,
    Request="nograd.tasks.request:Request",
)
def predict(  # noqa: PLR0917 - the first four may come by their place
    self: Any,
    model: str,  # noqa: ARG001
    input: Any,  # noqa: A002, ARG001
    params: dict[str, Any] | None = None,  # noqa: ARG001
    many: bool = False,  # noqa: ARG001
    timeout_s: float | None = None,  # noqa: ARG001
) -> Any:
    """Predict ``input`` with ``model``.

    Raises:
        JobError: the outcome of this job, computed before by the pool.
        ConfigError: if the worker runs another pool than ours.
    """
    outcome = traced_outcome.get()
    if outcome is None:
        raise ConfigError(
            f"{PREDICT_TASK} runs in nograd's batch pool only: "
            "start the worker with worker_pool='nograd.workers.pool:TaskPool'"
        )
    self.request.timings = outcome.timings  # the backend finds them there (`nograd.tasks.backend`)
    if outcome.error is None:
        return outcome.value
    if getattr(outcome.error, "retryable", False):
        backoff = min(RETRY_BACKOFF_S * 2**self.request.retries, RETRY_BACKOFF_MAX_S)
        raise self.retry(exc=outcome.error, countdown=backoff)
    raise outcome.error
