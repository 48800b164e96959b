"""Looking after open backfills that nobody looks at: their messages are gone, or whoever was to send them is.

Laws:

* An open backfill whose model is hosted somewhere goes on by itself, whatever was lost of its messages, in a restart of
  Redis or with a sender: within some leases somebody looks, and `pump` sends what is missing. That holds as long as
  Redis still has the `watchlist`; once that is lost as well, the next who resumes or follows the backfill begins anew.
* A worker looks only at what it could run. One that cannot see the folder leaves it to another, and says so once.
* A folder that hangs (a network mount whose server is away) keeps nobody from the others: the look at it goes on by
  itself after `PATIENCE_S`, and there is never more than one of a worker's at one folder.
* What is paused, cancelled or finished is let go of. Nothing is decided here: `pump` is what any worker does after a
  chunk.
* A fleet costs Redis one command a worker and lease, and storage one look a backfill and lease, however many look.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

import redis
from kombu.exceptions import OperationalError

from nograd.tasks.backfill import plan
from nograd.tasks.backfill.pump import pump
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.task import hints_of, send_chunk, sending_s
from nograd.tasks.backfill.watchlist import Turn, Watchlist
from nograd.tasks.backfill.window import Window

logger = logging.getLogger(__name__)

#: seconds to wait for a folder before the next is looked at
PATIENCE_S: Final = 10.0


class Lookout:
    """Owns the thread that looks.

    Args:
        app: sends chunks.
        client: Redis, for hints.
        models: the models that are hosted here, now.
        every_s: seconds nobody must have looked at a backfill; also about those between two questions of this worker.
        patience_s: seconds to wait for one folder.
    """

    def __init__(
        self,
        app: Any,
        client: Any,
        models: Callable[[], Iterable[str]],
        *,
        every_s: float,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._app = app
        self._client = client
        self._models = models
        self._every_s = every_s
        self._list = Watchlist(client)
        self._patience_s = patience_s
        self._unseen: set[str] = set()
        self._looks: dict[str, threading.Thread] = {}
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
            redis.RedisError: if Redis does not say what that is.
        """
        models = list(self._models())
        for turn in self._list.take(models, self._every_s) if models else ():
            if self._closing.is_set():
                self._list.give_back(turn)
                continue
            out = turn.run.out
            if (last := self._looks.get(out)) is not None and last.is_alive():
                self._list.give_back(turn)  # it hangs here, perhaps not for others
                continue
            look = threading.Thread(target=self._look_at, args=(turn,), name="nograd-look", daemon=True)
            self._looks[out] = look
            look.start()
            look.join(self._patience_s)
            if look.is_alive():
                logger.warning("the folder %s does not answer; other backfills are looked after meanwhile", out)
            else:
                del self._looks[out]

    def _look_at(self, turn: Turn) -> None:
        """Look after one; if Redis fails over it, it is due again after `every_s`."""
        try:
            if not self._is_open(turn):
                self._list.drop(turn)
            self._unseen.discard(turn.run.out)
        except (redis.RedisError, OperationalError) as err:
            logger.warning("the backfill in %s is not looked after just now: %s", turn.run.out, err)
        except Exception as err:  # noqa: BLE001 - a folder of whatever kind; others may see it
            with contextlib.suppress(redis.RedisError):
                self._list.give_back(turn)
            if turn.run.out not in self._unseen:
                self._unseen.add(turn.run.out)
                logger.warning("the backfill in %s is left to other workers to look after: %s", turn.run.out, err)

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
