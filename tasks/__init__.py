"""The contract between producers and workers: Celery app, task, wire format, errors. Never imports torch."""

from . import remote as _remote  # noqa: F401 - declares the remote commands
from .celery import app, create_app
from .errors import (
    BrokerUnavailable,
    ConfigError,
    DeadlinePassed,
    InvalidInput,
    JobCancelled,
    JobError,
    ModelFailed,
    ModelFileError,
    NogradError,
    NonFiniteOutput,
    OutputMismatch,
    Overloaded,
    ResultTimeout,
    UnknownModel,
    WorkerDied,
)
from .keys import PREDICT_TASK
from .predict import predict as _  # noqa: F401 - declares the task for every app
from .settings import Settings

#: the task of our own app (`app`); another app finds its own under the same name
predict = app.tasks[PREDICT_TASK]

__all__ = [
    "BrokerUnavailable",
    "ConfigError",
    "DeadlinePassed",
    "InvalidInput",
    "JobCancelled",
    "JobError",
    "ModelFailed",
    "ModelFileError",
    "NogradError",
    "NonFiniteOutput",
    "OutputMismatch",
    "Overloaded",
    "ResultTimeout",
    "Settings",
    "UnknownModel",
    "WorkerDied",
    "app",
    "create_app",
    "predict",
]
