"""Errors survive the trip through Celery's backend, and their codes never change by accident."""

import pytest
from celery.backends.base import Backend

from nograd.tasks import create_app, errors
from nograd.tasks.settings import Settings

CODES = {
    "NogradError": "error",
    "ConfigError": "config",
    "ModelFileError": "model_file",
    "BrokerUnavailable": "broker_unavailable",
    "ResultTimeout": "result_timeout",
    "UnknownModel": "unknown_model",
    "MissingExtra": "missing_extra",
    "BackfillError": "backfill",
    "SourceError": "source",
    "PlanChanged": "plan_changed",
    "OutputError": "output",
    "OutputFull": "output_full",
    "NotFinished": "not_finished",
    "BudgetExceeded": "budget_exceeded",
    "BackfillCancelled": "backfill_cancelled",
    "VerificationFailed": "verification_failed",
    "JobError": "job_failed",
    "InvalidInput": "invalid_input",
    "ModelFailed": "model_failed",
    "OutputMismatch": "output_mismatch",
    "NonFiniteOutput": "nonfinite_output",
    "DeadlinePassed": "deadline_passed",
    "WorkerDied": "worker_died",
    "JobCancelled": "cancelled",
    "Overloaded": "overloaded",
}


def classes():
    return {
        name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, errors.NogradError)
    }


def test_codes_are_what_programs_rely_on():
    assert {name: cls.code for name, cls in classes().items()} == CODES


@pytest.mark.parametrize("name", CODES)
def test_an_error_comes_back_from_the_backend_as_itself(name):
    backend = Backend(create_app(Settings()))
    error = classes()[name]("row has 4 values, the model takes 3")
    back = backend.exception_to_python(backend.decode(backend.encode(backend.prepare_exception(error))))
    assert type(back) is type(error)
    assert back.message == error.message


def test_only_errors_that_may_pass_are_retryable():
    assert {name for name, cls in classes().items() if cls.retryable} == {
        "BrokerUnavailable",
        "ResultTimeout",
        "Overloaded",
        "OutputFull",
        "NotFinished",
    }
