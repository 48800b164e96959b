"""How much memory a process took: the same figure for everybody."""

from __future__ import annotations

from pathlib import Path


def peak_mb(pid: int | str = "self") -> int:
    """The most memory a process has had resident, in MB of 1,000,000 bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6)
