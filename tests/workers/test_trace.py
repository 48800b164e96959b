"""What a worker's log says of a message that Celery's tracer does not end."""

import logging

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from celery.exceptions import Reject

from nograd.workers.trace import Returned


@pytest.fixture
def trace(caplog):
    """Run a task that raises something; the lines its worker logs."""
    app = Celery("traced", broker="memory://", backend="cache+memory://", set_as_current=False)

    def run(err):
        @app.task(name=f"traced.{type(err).__name__}")
        def task():
            raise err

        with caplog.at_level(logging.INFO, "celery.app.trace"):
            build_tracer(task.name, task, app=app)("an-id", (), {}, {})
        return caplog.records

    return run


def test_a_message_that_goes_back_since_the_worker_stops_is_one_line_of_the_log(trace):
    (record,) = trace(Returned("the worker stops"))
    assert "reject requeue=True: the worker stops" in record.getMessage()
    assert record.exc_info is None


def test_a_task_that_rejects_its_message_is_logged_as_celery_does(trace):
    (record,) = trace(Reject("I do not like it", requeue=True))
    assert record.exc_info is not None
