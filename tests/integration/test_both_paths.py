"""The fast path of settling and the complete one leave the same state in the backend and the same events.

Two workers, each on a Redis of its own, differ in one thing: in the second somebody listens to ``task_success``, so
that every message goes through Celery's tracer. Both get the same jobs under the same ids.
"""

import contextlib
import json
import shutil
import threading
import uuid

import pytest
import redis as redis_py
from celery import signature

import fleet_of_tests
from nograd.tasks import PREDICT_TASK, create_app
from nograd.tasks.settings import Settings
from waiting import PATIENCE_S as TIMEOUT
from waiting import until

APP = """
from celery.signals import task_success
from nograd.tasks import app

app.conf.result_extended = {extended}
app.conf.worker_send_task_events = {events}
if {complete}:
    @task_success.connect
    def listen(**_):
        pass
"""

MODELS = """
[picky]
loader = "python"
class = "fleet_of_tests:Picky"
batch = { max_items = 4 }

[echo]
loader = "python"
class = "fleet_of_tests:Echo"
"""

GROUP = "00000000-0000-0000-0000-000000000001"
#: what is sent: name → (args, kwargs, options)
JOBS = {
    "a success": (["picky", "hello"], {}, {}),
    "nothing": (["picky", None], {}, {}),
    "text beyond ASCII": (["picky", "größer ✓ " * 50], {}, {}),
    "many inputs, two of which fail": (
        ["picky", [1, "bad forward", {"a": [2.5, None]}, "bad prepare", 5, 6, 7]],
        {"many": True},
        {},
    ),
    "many inputs, none at all": (["picky", []], {"many": True}, {}),
    "parameters": (["echo", 1], {"params": {"x": 1, "y": "ü"}}, {}),
    "by name": ([], {"model": "picky", "input": 3}, {}),
    "a failure": (["picky", "bad forward"], {}, {}),
    "an unknown model": (["nobody", 1], {}, {}),
    "an ignored success": (["picky", 2], {}, {"ignore_result": True}),
    "an ignored failure": (["picky", "bad forward"], {}, {"ignore_result": True}),
    "a member of a group, a child": (["picky", 8], {}, {"group_id": GROUP, "parent_id": GROUP, "root_id": GROUP}),
    "headers of the sender's own": (["picky", 9], {}, {"headers": {"mine": {"a": 1}}}),
    "shown under another name": (["picky", 10], {}, {"shadow": "another"}),
    "with a link": (["picky", 11], {}, {"link": signature(PREDICT_TASK, ["picky", 12], immutable=True)}),
}
IGNORED = {name for name, (_, _, options) in JOBS.items() if options.get("ignore_result")}
#: of an event: what no two runs have in common
OF_THE_MOMENT = {"timestamp", "local_received", "clock", "pid", "runtime", "utcoffset"}


def task_id(name):
    return str(uuid.uuid5(uuid.NAMESPACE_OID, name))


NAMES = {task_id(name): name for name in JOBS}


def without_times(timings):
    """Timings with what must not differ, and of the rest whether it is there."""
    varies = ("queue_s", "prepare_s", "batch_wait_s", "device_s", "settle_s", "batch_size", "batches")
    return {key: "some" if key in varies else value for key, value in timings.items()}


def run_jobs(start_worker, folder, *, complete, extended, events):
    """What a worker leaves of `JOBS`: raw results by job, their lifetimes, and events by job; and how it settled."""
    name = f"paths_{'complete' if complete else 'fast'}_{extended}_{events}"
    (folder / f"{name}.py").write_text(APP.format(complete=complete, extended=extended, events=events))
    with start_worker.redis() as server, redis_py.Redis.from_url(server.url) as redis:
        worker = start_worker(folder / "models.toml", "-n", "both@here", app=name, cwd=folder, redis_url=server.url)
        app = create_app(Settings(server.url))
        with listening(app) as seen:
            for job, (args, kwargs, options) in JOBS.items():
                app.send_task(
                    PREDICT_TASK, args, kwargs, queue="nograd.picky", task_id=task_id(job), argsrepr=job, **options
                )
            for job in NAMES.keys() - map(task_id, IGNORED):
                app.AsyncResult(job).get(timeout=TIMEOUT, propagate=False)
            until(lambda: not redis.exists("unacked"))  # an ignored job is over when it is acknowledged
            app.send_task(PREDICT_TASK, ["picky", "last"], queue="nograd.picky", task_id="last").get(timeout=TIMEOUT)
            if events:
                until(lambda: any(event["uuid"] == "last" and is_end(event) for event in seen))
        (stats,) = app.control.inspect(timeout=TIMEOUT, limit=1).stats().values()
        keys = {job: f"celery-task-meta-{id_}" for id_, job in NAMES.items()}
        results = {job: json.loads(raw) for job, key in keys.items() if (raw := redis.get(key)) is not None}
        lifetimes = {job: redis.ttl(key) > 3600 for job, key in keys.items()}
        app.close()
        assert worker.stop() == 0
    return results, lifetimes, by_job(seen), stats["pool"]["settled"]


@contextlib.contextmanager
def listening(app):
    """The task events sent while the block runs."""
    seen, ready = [], threading.Event()

    def note(event):
        if event["type"].startswith("task-"):
            seen.append(event)

    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": note})

        def capture():
            for _ in receiver.itercapture(limit=None, timeout=None, wakeup=False):
                ready.set()

        thread = threading.Thread(target=capture, daemon=True)
        thread.start()
        assert ready.wait(TIMEOUT)
        yield seen
        receiver.should_stop = True
        thread.join(TIMEOUT)


def is_end(event):
    return event["type"] in {"task-succeeded", "task-failed"}


def by_job(events):
    """Job → event type → fields that must not differ; only those of workers."""
    found = {}
    for event in events:
        if event["type"] == "task-sent" or event["uuid"] not in NAMES:
            continue
        fields = {key: value for key, value in event.items() if key not in OF_THE_MOMENT}
        if "timings" in fields:
            fields["timings"] = without_times(fields["timings"])
        assert ("runtime" in event) == (event["type"] == "task-succeeded")
        found.setdefault(NAMES[event["uuid"]], {})[event["type"]] = fields
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("paths")
    shutil.copy(fleet_of_tests.__file__, made)
    (made / "models.toml").write_text(MODELS)
    return made


@pytest.fixture(scope="module", params=[(False, True), (True, False)], ids=["events", "result_extended"])
def both(request, start_worker, folder):
    """What is left on each path, for two settings of a worker."""
    extended, events = request.param
    options = {"extended": extended, "events": events}
    fast = run_jobs(start_worker, folder, complete=False, **options)
    complete = run_jobs(start_worker, folder, complete=True, **options)
    return options, fast, complete


def test_each_worker_went_the_way_it_should(both):
    _, (*_, fast), (*_, complete) = both
    failures = {"a failure", "an unknown model", "an ignored failure"}
    assert complete["fast"] == 0
    # the link is a job of its own, plain like the last one
    assert fast["complete"] == len({*failures, "with a link"})
    assert fast["fast"] == len(JOBS) - fast["complete"] + len(["its link", "last"])
    assert complete["complete"] == sum(fast.values())


def test_both_paths_leave_the_same_results(both):
    options, (fast, fast_kept, *_), (complete, complete_kept, *_) = both
    assert set(fast) == set(JOBS) - IGNORED
    for results in (fast, complete):
        for meta in results.values():
            assert meta.pop("date_done")
            meta["timings"] = without_times(meta["timings"])
            for child in meta["children"]:
                child[0][0] = "an id"
    assert fast == complete
    assert fast_kept == complete_kept
    assert all(fast_kept[job] for job in fast)
    assert ("worker" in fast["a success"]) == options["extended"]
    assert ("kwargs" in fast["parameters"]) == options["extended"]


def test_both_paths_send_the_same_events(both):
    options, (_, _, fast, _), (_, _, complete, _) = both
    assert set(fast) == (set(JOBS) if options["events"] else set())
    assert fast == complete
    for events in fast.values():
        assert set(events) in (
            {"task-received", "task-started", "task-succeeded"},
            {"task-received", "task-started", "task-failed"},
        )


def test_both_paths_give_every_end_its_timings(both):
    options, (results, _, events, _), _ = both
    given = [meta["timings"] for meta in results.values()]
    if options["events"]:
        given = [event["timings"] for ends in events.values() for event in ends.values() if is_end(event)]
        assert len(given) == len(JOBS)
    assert all(timings["worker"] == "both@here" for timings in given)
    assert all({"queue_s", "prepare_s"} <= set(timings) for timings in given)
    forward = [timings for timings in given if "batches" in timings]
    assert len(forward) >= len(JOBS) - len(["none at all", "an unknown model"]) - len(IGNORED)
    assert all({"batch_size", "batch_wait_s", "device_s", "settle_s"} <= set(timings) for timings in forward)
