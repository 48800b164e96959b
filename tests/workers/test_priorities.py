"""Interactive and bulk jobs in real worker processes: who goes first, and who holds how much."""

import itertools
import shutil
import time
from collections import Counter

import pytest

import fleet_of_tests
from nograd.producer import Client
from nograd.producer.broker import Message
from nograd.tasks.keys import BULK, CHUNKS, INTERACTIVE, PRIORITY_SUFFIXES
from waiting import PATIENCE_S as TIMEOUT
from waiting import until

BATCH = 8
BULK_LIST = PRIORITY_SUFFIXES[-2]


@pytest.fixture
def fleet(start_worker, redis_url, tmp_path):
    """Workers of a model of its own, `start()`, which run nothing until `gate` is touched; a client."""
    shutil.copy(fleet_of_tests.__file__, tmp_path)
    name, gate = f"gated{next(_numbers)}", tmp_path / "gate"
    models = tmp_path / "models.toml"
    models.write_text(f"""
[{name}]
loader = "python"
class = "fleet_of_tests:Gated"
init = {{ gate = "{gate}" }}
batch = {{ max_items = {BATCH} }}
""")
    with Client(redis_url, models=models) as client:
        started = []

        def start():
            started.append(start_worker(models))
            return started[-1]

        yield Fleet(name, gate, client, start)
        gate.touch()
        for worker in started:
            worker.stop()


_numbers = itertools.count()


class Fleet:
    def __init__(self, model, gate, client, start):
        self.model, self.gate, self.client, self.start = model, gate, client, start
        self.redis = client.app.backend.client

    def queued(self, suffix=BULK_LIST):
        return self.redis.llen(f"nograd.{self.model}{suffix}")

    def pool(self, worker):
        """What the pool of a worker tells."""
        return self.client.broker.workers(TIMEOUT, [worker.name])[worker.name]

    def settled(self, count):
        """Wait until this stays so for a while: what a worker fetches, it fetches in milliseconds."""
        last, since = None, time.monotonic()
        while time.monotonic() - since < 1.5:
            now = count()
            if now != last:
                last, since = now, time.monotonic()
            time.sleep(0.05)
        return last


def test_a_worker_that_joins_late_gets_its_part_of_the_bulk_and_an_interactive_job_overtakes(fleet):
    one = fleet.start()
    jobs = fleet.client.submit_many(fleet.model, list(range(1000)), priority="bulk")
    # One batch is on the device; of what waits a worker takes no more than the next two.
    until(lambda: fleet.queued() < 1000)
    left = fleet.settled(fleet.queued)
    assert 1000 - 5 * BATCH <= left < 1000
    other = fleet.start()
    until(lambda: fleet.queued() < left)
    assert fleet.settled(fleet.queued) >= 1000 - 10 * BATCH
    urgent = fleet.client.submit(fleet.model, "now")
    until(
        lambda: sum(pool["waiting_items"] - pool["waiting_bulk_items"] for pool in map(fleet.pool, (one, other))) == 1
    )
    fleet.gate.touch()
    urgent = urgent.result(TIMEOUT)
    done = [job.result(TIMEOUT) for job in jobs]
    parts = Counter(one["pid"] for one in done)
    assert len(parts) == 2
    assert min(parts.values()) > 5 * BATCH  # more than it held before the gate was opened
    # On the worker that took it, it comes right after the batch on the device; the other one goes on meanwhile.
    before = [one for one in done if one["pid"] == urgent["pid"] and one["at"] < urgent["at"]]
    assert len(before) <= 2 * BATCH
    # The free places of its batch were filled.
    assert urgent["batch"] == BATCH


@pytest.mark.parametrize("priority", [INTERACTIVE, BULK, CHUNKS])
def test_messages_of_many_items_stay_in_redis_until_the_device_needs_them(fleet, priority):
    worker = fleet.start()
    rows, packs = 64, 20
    messages = [Message(fleet.model, list(range(rows)), "rows", many=True, priority=priority) for _ in range(packs)]
    fleet.client.broker.publish_many(messages)
    suffix = {INTERACTIVE: "", BULK: BULK_LIST, CHUNKS: PRIORITY_SUFFIXES[-1]}[priority]
    until(lambda: fleet.pool(worker)["waiting_items"] >= rows - BATCH)
    assert fleet.settled(lambda: fleet.queued(suffix)) >= packs - 3
    pool = fleet.pool(worker)
    assert rows - BATCH <= pool["waiting_items"] <= 3 * rows
    assert pool["waiting_bulk_items"] == (0 if priority == INTERACTIVE else pool["waiting_items"])
    fleet.gate.touch()
    answers = [one for message in messages for one in fleet.client.result(message.id, TIMEOUT)]
    assert len(answers) == rows * packs
    # It never ran dry: hardly a batch was not full.
    assert sum(one["prediction"]["batch"] == BATCH for one in answers) > 0.95 * len(answers)
