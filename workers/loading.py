"""A model that is loaded while others work: on a thread of its own, except for what must be on the device thread.

::

    thread of its own    read, build, move to the device ─► fingerprint ─► …
    device thread        between two batches each: ─► a size of the warm-up ─► the next ─► … ─► entered

Laws:

* Other models wait for one step of the warm-up at most (compiling, it may take a while), not for the load; but for all
  of it where loading changes what is the whole process's (`HostedModel.loads_alone`).
* A load that takes longer than ``load_timeout_s`` has failed: whoever waits is told, with the log saying where it is,
  and if it ends after all, its model is dropped. A hanging step on the device thread is the watchdog's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

import torch

from nograd.tasks.errors import ModelFileError

from .models import HostedModel
from .watchdog import stack_of

logger = logging.getLogger(__name__)


class Loading:
    """One model on its way.

    Args:
        model: the model.
        load: loads it; given what says, at the very end, whether it is still wanted.
        on_error: hears of whatever it raised.
    """

    def __init__(
        self,
        model: HostedModel,
        load: Callable[[HostedModel, Callable[[], bool]], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._what = f"{model.file}: [{model.name}]"
        self._limit_s = model.spec.load_timeout_s
        self._future: Future[None] = Future()
        arguments = (model, load, on_error)
        self._thread = threading.Thread(target=self._run, args=arguments, name=f"nograd-load-{model.name}", daemon=True)
        self._thread.start()

    def result(self, timeout_s: float | None = None) -> None:
        """Wait until it is entered.

        Args:
            timeout_s: to wait before it is given up; the model's own limit if None.

        Raises:
            ModelFileError: if it is given up, or what the loader refused.
        """
        limit_s = self._limit_s if timeout_s is None else timeout_s
        wait([self._future], None if limit_s > threading.TIMEOUT_MAX else limit_s)
        if self._future.cancel():
            logger.error("a load hangs, and is left behind. Its thread is here:\n%s", stack_of(self._thread.ident))
            raise ModelFileError(f"{self._what}: loading takes longer than load_timeout_s = {limit_s:g} s")
        if self._future.exception() is not None:
            self._thread.join()  # it refers to what was loaded
        self._future.result()

    def _run(
        self,
        model: HostedModel,
        load: Callable[[HostedModel, Callable[[], bool]], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        try:
            with torch.no_grad():
                load(model, self._future.set_running_or_notify_cancel)
        except BaseException as err:  # noqa: BLE001 - a model's own code; whoever waits for it raises it
            on_error(err)
            if self._future.running() or self._future.set_running_or_notify_cancel():
                self._future.set_exception(err)
        else:
            if not self._future.cancelled():
                self._future.set_result(None)
