"""The contract between producers and workers: Celery app, task, wire format, errors. Never imports torch."""

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
    OutputMismatch,
    Overloaded,
    ResultTimeout,
    UnknownModel,
    WorkerDied,
)
from .predict import predict
from .settings import Settings

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
