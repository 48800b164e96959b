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
    PayloadMissing,
    ResultTimeout,
    UnknownModel,
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
    "PayloadMissing",
    "ResultTimeout",
    "Settings",
    "UnknownModel",
    "app",
    "create_app",
    "predict",
]
