"""The result backend: what is no end of a job never hides its end."""

import pytest
from celery import states

from nograd.tasks import create_app
from nograd.tasks.settings import Settings


@pytest.fixture
def late(app, redis_url, monkeypatch):
    """The backend of a worker beside which another ends the job, right after it has looked that nobody has."""
    other = create_app(Settings(redis_url=redis_url))
    look = app.backend._get_task_meta_for

    def look_and_wait(task_id):
        found = look(task_id)
        assert found["status"] not in states.READY_STATES
        end(task_id)
        return found

    def backend(how):
        nonlocal end
        end = lambda task_id: how(other.backend, task_id)  # noqa: E731
        return app.backend

    end = None
    monkeypatch.setattr(app.backend, "_get_task_meta_for", look_and_wait)
    yield backend
    other.close()


@pytest.mark.parametrize("state", [states.RETRY, states.STARTED, "HALFWAY"])
@pytest.mark.parametrize(
    ("end", "is_then"),
    [
        (lambda backend, task_id: backend.mark_as_done(task_id, 7), states.SUCCESS),
        (lambda backend, task_id: backend.mark_as_failure(task_id, ValueError("no")), states.FAILURE),
        (lambda backend, task_id: backend.mark_as_revoked(task_id), states.REVOKED),
    ],
)
def test_what_is_no_end_does_not_take_the_place_of_one(late, connection, state, end, is_then):
    backend = late(end)
    backend.store_result("job", None, state)
    assert backend.decode_result(connection.get(backend.get_key_for_task("job")))["status"] == is_then


def test_a_state_on_the_way_is_stored_told_and_has_an_end(app, connection):
    key = app.backend.get_key_for_task("job")
    with connection.pubsub() as heard:
        heard.subscribe(key)
        heard.get_message(timeout=60)  # that it listens
        for state in (states.STARTED, states.RETRY, states.STARTED):
            app.backend.store_result("job", None, state)
            assert app.AsyncResult("job").state == state
            assert heard.get_message(timeout=60)["data"] == connection.get(key)
    assert 0 < connection.ttl(key) <= app.conf.result_expires
    app.backend.mark_as_done("job", 7)
    assert app.AsyncResult("job").get(timeout=60) == 7
