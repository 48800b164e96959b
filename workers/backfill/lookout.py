"""Looking after open backfills that nobody looks at: their messages are gone, or whoever was to send them is.

Laws:

* An open backfill whose model is hosted somewhere goes on by itself, whatever was lost of its messages, in a restart of
  Redis or with a sender: within some leases somebody looks, and `pump` sends what is missing. That holds as long as
  Redis still has the `watchlist`; once that is lost as well, the next who resumes or follows the backfill begins anew.
* A worker looks only at what it could run. One that cannot see the folder leaves it to another, and says so once. A
  folder that hangs (a network mount whose server is away) holds this worker's lookout for as long, and nothing else of
  the worker; other workers look after the other backfills.
* What is paused, cancelled or finished is let go of. Nothing is decided here: `pump` is what any worker does after a
  chunk.
* A fleet costs Redis one command a worker and lease, and storage one look a backfill and lease, however many look.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import redis
from kombu.exceptions import OperationalError

from nograd.tasks.backfill import plan
from nograd.tasks.backfill.pump import pump
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.task import hints_of, send_chunk, sending_s
from nograd.tasks.backfill.watchlist import Turn, Watchlist
from nograd.tasks.backfill.window import Window

logger = logging.getLogger(__name__)


class Lookout:
    """Owns the thread that looks.

    Args:
        app: sends chunks.
        client: Redis, for hints.
        models: the models that are hosted here, now.
        every_s: seconds nobody must have looked at a backfill; also about those between two questions of this worker.
    """

    def __init__(self, app: Any, client: Any, models: Callable[[], Iterable[str]], *, every_s: float) -> None:
        self._app = app
        self._client = client
        self._models = models
        self._every_s = every_s
        self._list = Watchlist(client)
        self._unseen: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nograd-lookout", daemon=True)

    def start(self) -> None:
        """Begin to look, some seconds from now."""
        self._thread.start()

    def close(self) -> None:
        """Begin no other look."""
        self._closing.set()

    def finish(self, timeout_s: float) -> None:
        """Wait for the one under way, at most so many seconds."""
        self.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def look(self) -> None:
        """Look after what nobody has looked at.

        Raises:
            redis.RedisError: if Redis fails; what was not looked at is due again after `every_s`.
            kombu.exceptions.OperationalError: likewise.
        """
        models = list(self._models())
        for turn in self._list.take(models, self._every_s) if models else ():
            if self._closing.is_set():
                self._list.give_back(turn)
                continue
            try:
                is_open = self._is_open(turn)
            except (redis.RedisError, OperationalError):
                raise
            except Exception as err:  # noqa: BLE001 - a folder of whatever kind; others may see it
                self._list.give_back(turn)
                if turn.run.out not in self._unseen:
                    self._unseen.add(turn.run.out)
                    logger.warning("the backfill in %s is left to other workers to look after: %s", turn.run.out, err)
                continue
            self._unseen.discard(turn.run.out)
            if not is_open:
                self._list.drop(turn)

    def _is_open(self, turn: Turn) -> bool:
        """Keep a backfill going; whether it needs that any more."""
        job = plan.load(open_store(turn.run.out))
        if job.plan.sha256 != turn.run.plan:
            return False  # the folder holds another one by now
        window = Window(self._client, hints_of(job))
        pumped = pump(job, window, lambda chunk: send_chunk(self._app, job, chunk), sending_s(self._app))
        if pumped.sent:
            logger.info("%d chunks of the backfill in %s are sent: nobody had", pumped.sent, turn.run.out)
        return pumped.missing > 0 and pumped.wanted

    def _run(self) -> None:
        # Workers that were started together ask at different times.
        while not self._closing.wait(self._every_s * random.uniform(0.5, 1.5)):  # noqa: S311 - no secret
            try:
                self.look()
            except Exception as err:  # noqa: BLE001 - any trouble with Redis; asked again
                logger.warning("open backfills are not looked after just now: %s", err)
