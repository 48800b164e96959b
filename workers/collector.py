"""Python's garbage collector of cycles, kept away from what stays in a worker that is warm.

torch, Celery and the models are some hundred thousand objects that stay as long as the process. A full collection walks
every one of them, on whichever thread happens to allocate: at thousands of jobs a second that was a fifth of the
interpreter's time. So what is there when a worker is ready is set aside (`gc.freeze`). How often the collector looks at
what is young stays as it is: a model's code may leave cycles with whole images in them.

Laws:

* Cycles that came after are collected as ever.
* A model that has gone leaves nothing: before it goes, what was set aside is taken back, and nothing is set aside while
  one is on its way out.
"""

from __future__ import annotations

import gc


def set_aside() -> None:
    """What is there now is not looked at again: after `memory.free`, or garbage would be kept as well."""
    gc.freeze()


def take_back() -> None:
    """Let the collector look at everything again."""
    gc.unfreeze()
