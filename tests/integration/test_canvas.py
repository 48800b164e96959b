"""Chains, groups and chords of predictions and a user's own tasks give what stock Celery gives.

Each canvas runs twice: on a fleet whose predictions run in the batch pool, and on stock Celery workers, where
``nograd.predict`` is a plain task that does the same. The outcomes, and what the tasks saw, must be equal. The user's
tasks run in the predicting worker itself, or in a stock worker of their own on the same Redis.
"""

import contextlib
import gc
import re
import uuid
from pathlib import Path

import pytest
import redis
from celery import Celery, chain, chord, group
from celery.result import GroupResult

import own_tasks
import stock_app
from nograd.tasks import create_app
from nograd.tasks.settings import Settings
from waiting import PATIENCE_S as TIMEOUT
from waiting import until

#: a ChordError names the task that failed
UUID = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
FLEET = Path(own_tasks.__file__).parent


class Fleet:
    """Workers behind one Redis, and how to write a canvas for them."""

    def __init__(self, app: Celery, url: str, queue: str):
        self.app, self.queue = app, queue
        self.redis = redis.Redis.from_url(url, decode_responses=True)

    def own(self, name, *args, **kwargs):
        return self.app.signature(f"own.{name}", args, kwargs, queue=self.queue)

    def predict(self, *args, **options):
        """Of an input, or without one of what a chain hands on."""
        kwargs = {} if args else {"model": "triple"}
        args = ("triple", *args) if args else ()
        return self.app.signature("nograd.predict", args, kwargs, queue="nograd.triple", **options)

    def run(self, canvas):
        """Run a canvas to its end; what looks at the outcomes of its tasks and at what they noted."""
        run = uuid.uuid4().hex
        notes, result = canvas(self, run)
        result.get(timeout=TIMEOUT, propagate=False)
        key = own_tasks.LOG.format(run)
        until(lambda: self.redis.llen(key) >= notes)
        return lambda: (
            [outcome(each) for each in parents(result)],
            sorted(UUID.sub("…", note) for note in self.redis.lrange(key, 0, -1)),
        )


def parents(result):
    """A result and those before it in its chain, the last one first."""
    while result is not None:
        yield result
        result = result.parent


def outcome(result):
    if isinstance(result, GroupResult):
        return [outcome(each) for each in result.results]
    value = result.result
    return (result.state, [type(value).__name__, UUID.sub("…", str(value))] if isinstance(value, Exception) else value)


@pytest.fixture(scope="module", params=["same worker", "own worker"])
def fleets(request, start_worker, tmp_path_factory):
    """Ours and the stock one; the user's tasks in the worker that predicts, or in a stock worker of their own."""
    together = request.param == "same worker"
    models = tmp_path_factory.mktemp("canvas") / "models.toml"
    models.write_text('[triple]\nloader = "python"\nclass = "own_tasks:Triple"\nbatch = { max_items = 16 }\n')
    stock = {"app": "stock_app", "cwd": FLEET, "lasts": True}
    with start_worker.redis() as mine, start_worker.redis() as other, contextlib.ExitStack() as stack:
        start_worker(models, *(["-I", "own_tasks"] if together else []), redis_url=mine.url, cwd=FLEET, lasts=True)
        tasks, queues = (
            ("own_tasks,plain_predict", "own,nograd.triple") if together else ("plain_predict", "nograd.triple")
        )
        start_worker(None, "-I", tasks, "-Q", queues, "-c", "2", redis_url=other.url, **stock)
        if not together:
            for server in (mine, other):
                start_worker(None, "-I", "own_tasks", "-Q", "own", "-c", "2", redis_url=server.url, **stock)
        ours = stack.enter_context(contextlib.closing(create_app(Settings(mine.url))))
        plain = stack.enter_context(contextlib.closing(stock_app.make_app(other.url)))
        yield Fleet(ours, mine.url, "nograd.triple" if together else "own"), Fleet(plain, other.url, "own")
        for app in (ours, plain):
            app.backend._pending_results.concrete.clear()  # where Celery keeps the members of groups for good
        gc.collect()  # results unsubscribe while their server is still there


# Each canvas sends itself and returns how many notes it leaves in Redis, and its result.


def chain_of_both(fleet, run):
    return 1, chain(fleet.predict(2), fleet.own("add", 5), fleet.own("seen", run=run))()


def own_task_first(fleet, run):
    return 0, chain(fleet.own("add", 1, 2), fleet.predict())()


def predictions_in_a_row(fleet, run):
    return 0, chain(fleet.predict(1), fleet.predict(), fleet.predict(), fleet.own("add", 1))()


def group_of_both(fleet, run):
    return 1, group(fleet.predict(1), fleet.own("add", 1, 1), fleet.predict(3), fleet.own("seen", 4, run=run))()


def group_at_the_end_of_a_chain(fleet, run):
    return 0, chain(fleet.predict(1), group(fleet.own("add", 1), fleet.predict(), fleet.own("add", 2)))()


def chord_of_both(fleet, run):
    return 0, chord([fleet.predict(1), fleet.own("add", 1, 1), fleet.predict(2)], fleet.own("total"))()


def chord_of_fifty(fleet, run):
    return 1, chain(group(fleet.predict(n) for n in range(50)), fleet.own("seen", run=run), fleet.own("total"))()


def chord_into_a_prediction(fleet, run):
    return 0, chord([fleet.predict(n) for n in range(5)], fleet.predict())()


def chains_inside_a_chord(fleet, run):
    members = [
        chain(fleet.predict(1), fleet.own("add", 1)),
        chain(fleet.own("add", 1, 1), fleet.predict()),
        chain(fleet.predict(1), fleet.predict()),
        fleet.predict(2),
    ]
    return 1, chord(members, chain(fleet.own("total"), fleet.own("seen", run=run), fleet.predict()))()


def chord_inside_a_chord(fleet, run):
    inner = chord([fleet.predict(1), fleet.predict(2)], fleet.own("total"))
    return 0, chord([inner, fleet.predict(3)], fleet.own("total"))()


def prediction_fails_in_the_middle(fleet, run):
    middle = chain(fleet.predict("bad"), fleet.own("seen", run=run), fleet.own("add", 1))
    return 1, middle.on_error(fleet.own("told", run=run))()


def own_task_fails_in_the_middle(fleet, run):
    middle = chain(fleet.predict(1), fleet.own("fail"), fleet.predict())
    return 1, middle.on_error(fleet.own("told", run=run))()


def own_task_fails_after_a_group(fleet, run):
    return 0, chain(group(fleet.predict(1), fleet.predict(2)), fleet.own("fail"), fleet.predict())()


def chord_with_a_bad_prediction(fleet, run):
    return 1, chord([fleet.predict(1), fleet.predict("bad")], fleet.own("total").on_error(fleet.own("told", run=run)))()


def chord_with_a_bad_own_task(fleet, run):
    return 0, chord([fleet.predict(1), fleet.own("fail")], fleet.predict())()


def link_error_of_a_prediction(fleet, run):
    return 1, fleet.predict("bad").apply_async(link_error=fleet.own("told", run=run))


def links_of_a_prediction(fleet, run):
    links = [fleet.own("seen", run=run), fleet.own("seen", 7, run=run).set(immutable=True)]
    return 2, fleet.predict(4).apply_async(link=links)


def link_that_is_a_chain(fleet, run):
    return 1, fleet.predict(4).apply_async(link=chain(fleet.own("add", 1), fleet.predict(), fleet.own("seen", run=run)))


def immutable_signatures(fleet, run):
    return 0, chain(
        fleet.own("add", 1, 2), fleet.predict(4, immutable=True), fleet.own("add", 2, 2).set(immutable=True)
    )()


def result_ignored_in_the_middle(fleet, run):
    return 1, chain(fleet.predict(4).set(ignore_result=True), fleet.own("seen", run=run), fleet.own("add", 1))()


def own_task_retries(fleet, run):
    return 0, chain(fleet.predict(1), fleet.own("flaky", run=run), fleet.predict())()


def prediction_retries(fleet, run):
    return 1, chain(fleet.predict({"busy until": 2, "run": run}), fleet.own("seen", run=run), fleet.predict())()


def prediction_retries_in_a_chord(fleet, run):
    return 0, chord([fleet.predict({"busy until": 2, "run": run}), fleet.predict(2)], fleet.own("total"))()


def own_task_replaces_itself_by_a_prediction(fleet, run):
    return 1, chain(fleet.own("add", 1, 1), fleet.own("delegate"), fleet.own("seen", run=run))()


#: canvas → what the last task of it gives
CANVASES = {
    chain_of_both: 11,
    own_task_first: 9,
    predictions_in_a_row: 28,
    group_of_both: [3, 2, 9, 4],
    group_at_the_end_of_a_chain: [4, 9, 5],
    chord_of_both: 11,
    chord_of_fifty: 3675,
    chord_into_a_prediction: 90,
    chains_inside_a_chord: 75,
    chord_inside_a_chord: 18,
    prediction_fails_in_the_middle: "ModelFailed",
    own_task_fails_in_the_middle: "ValueError",
    own_task_fails_after_a_group: "ValueError",
    chord_with_a_bad_prediction: "ChordError",
    chord_with_a_bad_own_task: "ChordError",
    link_error_of_a_prediction: "ModelFailed",
    links_of_a_prediction: 12,
    link_that_is_a_chain: 12,
    immutable_signatures: 4,
    result_ignored_in_the_middle: 13,
    own_task_retries: 15,
    prediction_retries: 18,
    prediction_retries_in_a_chord: 12,
    own_task_replaces_itself_by_a_prediction: 6,
}


@pytest.mark.parametrize("canvas", CANVASES, ids=lambda canvas: canvas.__name__)
def test_a_canvas_ends_as_on_stock_celery(fleets, canvas):
    ours, stock = (fleet.run(canvas) for fleet in fleets)
    # A chain's next task may end before the result of the one before is stored.
    until(lambda: ours() == stock(), lambda: f"ours: {ours()}\nstock: {stock()}")
    last, expected = ours()[0][0], CANVASES[canvas]
    if isinstance(expected, str):
        assert (last[0], last[1][0]) == ("FAILURE", expected)
    else:
        assert last == (
            [("SUCCESS", value) for value in expected] if isinstance(expected, list) else ("SUCCESS", expected)
        )
