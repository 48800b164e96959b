"""Exit codes of a worker, and what they mean: for the launcher's log, and for whatever restarts containers."""

from __future__ import annotations

import signal
from typing import Final

#: the worker refuses its configuration; starting it again cannot help
EXIT_CONFIG: Final = 2
#: the device answers no more (a device-side assert, an illegal access); a new process has a new context
EXIT_DEVICE: Final = 70
#: a model's code took longer than ``hard_timeout_s``, or its load at the start than ``load_timeout_s``. Code that holds
#: the GIL as well ends the worker with 1: the timer of the interpreter that finds it knows no other
EXIT_HUNG: Final = 71

_MEANINGS: Final = {EXIT_DEVICE: "its device is lost", EXIT_HUNG: "a model hung"}


def explain(code: int) -> str:
    """How a process ended, in words, for ``worker on gpu0 …``."""
    if code in _MEANINGS:
        return f"ended with {code} ({_MEANINGS[code]})"
    if code < 0:  # as `subprocess` counts: the number of a signal
        return f"was killed by {_signal(-code)}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"ended with {code}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a realtime signal
        return f"signal {number}"
