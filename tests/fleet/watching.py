"""Processes that tests start: when a test fails, what they logged is in its report; and one that must last ends the
test by its end, at once and with its log, instead of leaving it to wait for what never comes.
"""

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

#: characters of a log that a report shows
SHOWN = 20_000

_watched: list["Watched"] = []
#: whether a test, or what it needs, is being run just now
_on_guard = False


class Watched:
    """A process and its log.

    Args:
        name: what the report calls it.
        process: the process.
        text: gives its log.
        lasts: it may not end before `let_go`.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], text: Callable[[], str], lasts: bool) -> None:
        self._name, self.process, self._text = name, process, text
        self._lasts = lasts

    def let_go(self) -> None:
        """It may end from now on."""
        self._lasts = False

    @property
    def missing(self) -> bool:
        """Whether it has ended and should not have."""
        return self._lasts and self.process.poll() is not None

    def wait_for_its_end(self) -> None:
        """Interrupt the test if it ends."""
        while self._lasts and not self.missing:
            time.sleep(0.2)
        if self.missing:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def report(self) -> tuple[str, str]:
        """A title, and the end of the log."""
        code = self.process.poll()
        title = f"log of {self._name}, {'which runs' if code is None else f'which ended with {code}'}"
        try:
            return title, self._text()[-SHOWN:]
        except (OSError, ValueError) as err:  # its folder or file is gone
            return title, f"{type(err).__name__}: {err}"


def watch(name: str, process: subprocess.Popen[bytes], text: Callable[[], str], *, lasts: bool = False) -> Watched:
    """Have a process in the reports of failed tests; arguments as of `Watched`."""
    made = Watched(name, process, text, lasts)
    _watched.append(made)
    if lasts:
        threading.Thread(target=made.wait_for_its_end, daemon=True).start()
    return made


def forget_those_that_ended() -> None:
    """What comes now is another test."""
    _watched[:] = [each for each in _watched if each.missing or each.process.poll() is None]


def reports() -> list[tuple[str, str]]:
    """Of all processes the test has started, or found."""
    return [each.report() for each in _watched]


@contextlib.contextmanager
def on_guard() -> Iterator[None]:
    """Fail as soon as a process that must last has ended; for the main thread."""
    global _on_guard  # noqa: PLW0603 - there is one main thread
    _on_guard = True
    try:
        _fail_if_one_is_missing()
        yield
    finally:
        _on_guard = False


def _fail_if_one_is_missing(*_: object) -> None:
    for each in _watched:
        if _on_guard and each.missing:
            pytest.fail(each.report()[0])  # and the report shows it


signal.signal(signal.SIGUSR1, _fail_if_one_is_missing)
