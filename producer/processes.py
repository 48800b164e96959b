"""Child processes of a command that runs a small fleet on one machine: they never outlive it.

Three ways a parent ends, three answers: it returns (``with``), it exits or raises (the same ``with``), it is killed
(on Linux the kernel then sends each child a SIGTERM; elsewhere nobody can).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import IO, TYPE_CHECKING, Any, Self

from nograd.tasks.lifeline import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: seconds a child has to end by itself after SIGTERM
STOP_TIMEOUT_S = 30.0


class Child:
    """One child process, its own process group, so that a Ctrl-C reaches the parent alone and it stops them in order.

    Attributes:
        name: what it is called in messages.
        log: the file its output goes to, or None if it shares ours.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        stdin: bytes | None = None,
    ) -> None:
        self.name = name
        self.log = log
        with contextlib.ExitStack() as stack:
            out: IO[bytes] | None = stack.enter_context(log.open("ab")) if log else None
            self._process = subprocess.Popen(  # noqa: S603 - our own programs, no shell
                list(argv),
                env=None if env is None else dict(env),
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=out or 2,  # our stderr: stdout is for results alone
                stderr=subprocess.STDOUT if out else None,
                start_new_session=True,
                preexec_fn=end_with_parent(),  # noqa: PLW1509 - one system call, bound before the fork
            )
        if stdin is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:  # it ended; `running` says so
                pipe.write(stdin)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return self.exit_code is None

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        if self.log is None or not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End it: SIGTERM, and SIGKILL to its group when it takes longer than ``timeout_s`` seconds."""
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def stopping_on_sigterm() -> Any:
    """Turn SIGTERM into KeyboardInterrupt inside, so that both end a command by the same road."""

    def interrupt(_signum: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
