"""A backfill and the retries of it, in order: each is a plan with chunks, hints and a state of its own.

Law: at most one of them, the last, is under way; a retry is planned only when all before it is finished.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nograd.tasks.backfill import layout
from nograd.tasks.backfill.plan import Job
from nograd.tasks.backfill.progress import Observer, Progress, together
from nograd.tasks.backfill.retry import retries
from nograd.tasks.backfill.task import hints_of
from nograd.tasks.backfill.window import Window


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """The backfill itself, or one retry.

    Attributes:
        job: its plan.
        window: its hints.
        observer: reads its commit records.
    """

    job: Job
    window: Window
    observer: Observer

    @property
    def closed(self) -> bool:
        """Whether it has come to its end."""
        return self.job.store.size(layout.SUCCESS) is not None


@dataclass(slots=True, eq=False)
class Stages:
    """Finds the retries others begin, too; reads each plan and each commit record once.

    Attributes:
        job: the backfill itself.
        connection: to Redis, for hints.
    """

    job: Job
    connection: Any
    _found: list[Stage] = field(default_factory=list)

    def look(self) -> list[Stage]:
        """All there are now; the last one is, or was last, under way."""
        if not self._found:
            self._add(self.job)
        for job in retries(self.job.store, len(self._found) - 1):
            self._add(job)
        return self._found

    def last(self) -> Stage:
        """The one that is, or was last, under way."""
        return self.look()[-1]

    def progress(self, since: float) -> Progress:
        """Of all together, as of the last `look`; ``since`` the last one was resumed."""
        whole, *again = [stage.observer.look(since) for stage in self._found]
        return together(whole, again)

    def _add(self, job: Job) -> None:
        self._found.append(Stage(job, Window(self.connection, hints_of(job)), Observer(job)))
