"""Progress of a backfill for people: a bar on a terminal, a plain line every few seconds elsewhere; both on stderr.

Law: nothing is guessed. Only committed rows count, the time left is a range and missing until three chunks are done,
and a run that is paused, stalled or without a worker says so instead of counting down.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from nograd.producer.backfill.status import Status

#: seconds between two plain lines
LINE_S = 5.0


class Display:
    """Shows each status it is given. Used with ``with``.

    Args:
        terminal: whether to draw a bar; found out if None.
    """

    def __init__(self, terminal: bool | None = None) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._terminal = self._console.is_terminal if terminal is None else terminal
        self._bar = Progress(
            TextColumn("{task.percentage:>3.0f} %"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=self._console,
            auto_refresh=False,
            disable=not self._terminal,
        )
        self._task: Any = None
        self._last: tuple[str, bool] | None = None
        self._last_at = float("-inf")

    def __call__(self, now: Status) -> None:
        """Show a status."""
        rows = now.progress.rows_ok + now.progress.rows_err
        if self._terminal:
            if self._task is None:
                self._task = self._bar.add_task("", total=now.progress.rows)
            text = f"{describe(now)} · {now.trouble}" if now.trouble else describe(now)
            self._bar.update(self._task, completed=rows, total=now.progress.rows, description=text)
            self._bar.refresh()
            return
        state, at = (now.state, now.trouble is None), time.monotonic()
        if state != self._last or at - self._last_at >= LINE_S:
            self._last, self._last_at = state, at
            self._console.print(f"{percent(now)} · {describe(now)}", markup=False)
            if now.trouble:
                self._console.print(now.trouble, markup=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def describe(now: Status) -> str:
    """A status on one line, but for trouble with Redis, which is none of the backfill's."""
    progress = now.progress
    rows = progress.rows_ok + progress.rows_err
    said = [f"{rows:,} of {progress.rows:,} rows"]
    if now.state == "running" and progress.rows_per_s:
        said.append(f"{progress.rows_per_s:,.0f} rows/s")
    if now.state == "running":
        said.append(left(progress.eta_low_s, progress.eta_high_s))
    else:
        said.append(now.state)
    if progress.rows_err:
        said.append(f"{progress.rows_err:,} failed")
    if now.running:
        said.append(f"{now.running} chunk{'s' * (now.running != 1)} running")
    if now.state == "waiting":
        said.append("no worker has a chunk")
    if now.why:
        said.append(now.why)
    return " · ".join(said)


def percent(now: Status) -> str:
    """Of the rows; 100 % only if all are done."""
    progress = now.progress
    share = 100.0 if progress.done else min(99.9, 100 * (progress.rows_ok + progress.rows_err) / max(1, progress.rows))
    return f"{share:.1f} %"


def left(low_s: float | None, high_s: float | None) -> str:
    """A range of seconds left."""
    if low_s is None or high_s is None:
        return "time left not known yet"
    return f"{span(low_s, high_s)} left"


def span(low_s: float, high_s: float) -> str:
    """A range of seconds for people."""
    low, high = duration(low_s), duration(high_s)
    return low if low == high else f"{low} to {high}"


def duration(seconds: float) -> str:
    """Seconds for people, two units at most."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{round(seconds / 60)} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
