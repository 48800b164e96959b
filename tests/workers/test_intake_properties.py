"""The laws of `nograd.workers.intake` for any order of events, together with the policy of the batches.

A worker of models of very different batches, whose queues in Redis never end.
"""

from collections import Counter, deque
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from nograd.tasks.keys import BULK, INTERACTIVE
from nograd.workers.batching import Backlog, Item, Limits
from nograd.workers.intake import BULK_BATCHES, INTERACTIVE_BATCHES, Intake

#: messages of one fetch at most, as the transport has it
FETCH = 64
CAPACITY = {INTERACTIVE: INTERACTIVE_BATCHES, BULK: BULK_BATCHES}


class Worker:
    """Fetches, prepares and runs when it is told to; each model has a queue of messages that are all alike.

    Args:
        models: (items in a batch, items in a message) of each.
        priority: of the messages.
        threads: that prepare.
    """

    def __init__(self, models, priority, threads):
        self.models, self.priority, self.bulk = models, priority, priority == BULK
        sizes = [size for size, _ in models]
        self.backlog = Backlog({str(model): Limits(max_items=size) for model, size in enumerate(sizes)})
        self.told = False
        self.intake = Intake(4 * max(sizes), max(sizes), self.backlog.held, self.on_room, threads=threads)
        self.unread = deque()
        self.waiting = set()
        self.rotation = 0
        self.now = 0.0

    def on_room(self):
        self.told = True

    def fetch(self):
        """Ask for messages once; from all queues alike, those of one behind the other (`fetch.lua`)."""
        self.told = False
        room = min(FETCH, self.intake.room(self.priority))
        self.rotation += 1
        while room:
            share = max(1, room // len(self.models))
            for step in range(len(self.models)):
                many = min(share, room)
                self.unread.extend([(self.rotation + step) % len(self.models)] * many)
                for _ in range(many):
                    self.intake.came(bulk=self.bulk)
                room -= many

    def prepare(self):
        """Read a message, and put its items."""
        if not self.unread:
            return
        model = self.unread.popleft()
        size, rows = self.models[model]
        self.intake.read(rows, of=size, bulk=self.bulk)
        items = [Item(str(model), None, None, None, priority=self.priority, arrived=self.now) for _ in range(rows)]
        for item in items:
            self.backlog.put(item)
        self.waiting.update(items)
        self.intake.began(sum(item.share for item in items), bulk=self.bulk)

    def take(self):
        """Run a batch; its size as a part of the largest."""
        self.told = False
        self.now += 0.01
        batch = self.backlog.next_batch(self.now)
        if batch is None:
            return None
        self.waiting.difference_update(batch.items)
        self.intake.eased()
        return len(batch.items) / self.models[int(batch.model)][0]

    def fill(self):
        """Fetch and prepare until there is no room."""
        while self.unread or self.intake.room(self.priority):
            self.fetch()
            while self.unread:
                self.prepare()

    @property
    def held(self):
        """Batches of all that it took from other workers, by the definition."""
        waiting = Counter(int(item.model) for item in self.waiting)
        unread = sum(Fraction(rows, size) for size, rows in (self.models[model] for model in self.unread))
        return unread + sum(Fraction(items, self.models[model][0]) for model, items in waiting.items())


_models = st.lists(
    st.sampled_from([(1, 1), (8, 1), (8, 8), (8, 64), (512, 1), (512, 64)]), min_size=1, max_size=3, unique=True
)
_priority = st.sampled_from([INTERACTIVE, BULK])
_steps = st.lists(st.sampled_from(["fetch", "prepare", "prepare", "take"]), max_size=60)


@given(_models, _priority, st.integers(1, 8), _steps)
@settings(max_examples=100)
def test_the_device_never_runs_dry_and_who_was_refused_is_told(models, priority, threads, steps):
    worker = Worker(models, priority, threads)
    for step in steps:
        getattr(worker, step)()
    for _ in range(30):
        worker.fill()
        assert worker.held >= CAPACITY[priority]
        assert worker.take() is not None
        assert len(worker.backlog) > 0  # while that batch runs, another one waits
        assert worker.told == (worker.held < CAPACITY[priority])


@given(_models, _priority, st.integers(1, 8), _steps)
@settings(max_examples=100)
def test_no_more_than_a_few_batches_are_taken_from_other_workers(models, priority, threads, steps):
    worker = Worker(models, priority, threads)
    heaviest = max(rows / size for size, rows in models)
    most = 0
    for step in ["fetch", "prepare"] * 20 + steps * 3:
        getattr(worker, step)()
        most = max(most, worker.held)
    assert most <= 3 * CAPACITY[priority] + threads * heaviest


@given(st.sampled_from([1, 7, 64, 512]), _priority, st.integers(1, 8), _steps)
@settings(max_examples=50)
def test_alone_a_model_gets_full_batches_and_holds_none_too_many(size, priority, threads, steps):
    worker = Worker([(size, 1)], priority, threads)
    for step in steps:
        getattr(worker, step)()
        assert worker.held <= CAPACITY[priority]
    for _ in range(10):
        worker.fill()
        assert worker.held <= CAPACITY[priority]
        assert worker.take() == 1
