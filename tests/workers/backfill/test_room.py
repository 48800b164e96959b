"""Chunks wait in a worker one at a time; the next is asked for when that one begins, not when somebody looks again."""

import threading

from nograd.tasks import transport
from nograd.tasks.keys import CHUNKS
from nograd.workers.pool import CHUNK_THREADS, TaskPool
from waiting import PATIENCE_S, until


class Chunk:
    def __init__(self):
        self.begun, self.gate = threading.Event(), threading.Event()

    def run(self):
        self.begun.set()
        assert self.gate.wait(PATIENCE_S)


def test_who_was_refused_a_chunk_is_told_as_soon_as_the_one_that_waits_begins(monkeypatch):
    told = threading.Event()
    monkeypatch.setattr(transport, "resume", told.set)
    pool = TaskPool(limit=16)
    crew = pool._backfill
    crew.start()
    running, waiting = [Chunk() for _ in range(CHUNK_THREADS)], Chunk()
    for chunk in running:
        crew.submit(chunk)
    until(lambda: all(chunk.begun.is_set() for chunk in running))
    assert pool._room(CHUNKS) == 1
    crew.submit(waiting)
    assert pool._room(CHUNKS) == 0
    told.clear()
    running[0].gate.set()
    assert told.wait(PATIENCE_S)
    assert pool._room(CHUNKS) == 1
    for chunk in (*running, waiting):
        chunk.gate.set()
    assert crew.finish(PATIENCE_S)
