"""Python's garbage collector of cycles, kept out of the way of a worker that is warm.

torch, Celery and the models are some hundred thousand objects that stay as long as the process. A full collection walks
every one of them, on whichever thread happens to allocate: at thousands of jobs a second that was a fifth of the
interpreter's time. So what is there when a worker is ready is set aside (`gc.freeze`), and the collector looks less
often at what jobs make: a job leaves no cycles behind, and ends by its reference counts.

Laws:

* Cycles that came after are collected as ever, if a little later.
* A model that has gone leaves nothing: before it goes, what was set aside is taken back.
"""

from __future__ import annotations

import gc
from typing import Final

#: objects made and not yet freed after which the collector looks for cycles among the youngest. Python's own 700 are
#: those of some twenty jobs in flight; none of them is garbage
YOUNGEST: Final = 10_000


def set_aside() -> None:
    """Free the cycles there are; whatever else is there now is not looked at again. Takes tenths of a second."""
    gc.set_threshold(YOUNGEST, *gc.get_threshold()[1:])
    gc.collect()
    gc.freeze()


def take_back() -> None:
    """Let the collector look at everything again."""
    gc.unfreeze()
