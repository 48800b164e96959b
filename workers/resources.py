"""What one worker process may take of its machine: cores, memory, precision. Read from the environment, without torch.

========================= ==========================================================================================
``NOGRAD_THREADS``        CPU threads for the forward and, as many again, for preparation. Default: all cores this
                          process may use; the launcher gives each of its workers an equal share.
``OMP_NUM_THREADS``       as everywhere: threads of torch's operators, where it shall differ from the above.
``OMP_WAIT_POLICY``       as everywhere: what those threads do between two operators. Default here: ``PASSIVE`` (sleep).
                          Spinning, OpenMP's own default, halves the rate of a small model on few cores.
``NOGRAD_MEMORY_BUDGET``  memory the models of a worker may hold together (``10GB``, ``512MiB``). Default: on a GPU nine
                          tenths of its memory; on a CPU no limit.
``NOGRAD_TF32``           ``1`` lets float32 products on a GPU run in TF32 (faster, 10 bits of mantissa), ``0`` keeps
                          them in float32. Default: torch's own (convolutions in TF32, matrix products in float32).
========================= ==========================================================================================

N workers that each use every core are slower than one: they spend the time on taking the cores from each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from nograd.tasks.errors import ConfigError

THREADS, OMP_THREADS, MEMORY_BUDGET, TF32 = (
    "NOGRAD_THREADS", "OMP_NUM_THREADS", "NOGRAD_MEMORY_BUDGET", "NOGRAD_TF32",
)  # fmt: skip

#: what `nograd worker --gpus` was given, if it names devices: set by the launcher for its workers
GPUS = "NOGRAD_GPUS"

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True, slots=True)
class Resources:
    """The limits of one worker process.

    Attributes:
        threads: CPU threads for preparation.
        torch_threads: CPU threads of torch's operators.
        memory_budget: bytes its models may hold together; None for the device's default.
        tf32: whether float32 products on a GPU may run in TF32; None for torch's own choice.
    """

    threads: int
    torch_threads: int
    memory_budget: int | None = None
    tf32: bool | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Resources:
        """Read the environment.

        Raises:
            ConfigError: naming the variable and its value.
        """
        env = os.environ if env is None else env
        threads, budget, tf32 = env.get(THREADS), env.get(MEMORY_BUDGET), env.get(TF32)
        if threads and not (threads.isascii() and threads.isdigit() and int(threads)):
            raise ConfigError(f"{THREADS} has value {threads!r}; expected a positive whole number")
        if tf32 not in (None, "", "0", "1"):
            raise ConfigError(f"{TF32} has value {tf32!r}; expected 0 or 1")
        cores = int(threads) if threads else usable_cores()
        outer = (env.get(OMP_THREADS) or "").partition(",")[0]  # a list is about nested regions
        return cls(
            threads=cores,
            torch_threads=int(outer) if outer.isascii() and outer.isdigit() and int(outer) else cores,
            memory_budget=read_size(budget, MEMORY_BUDGET) if budget else None,
            tf32=tf32 == "1" if tf32 else None,
        )


def usable_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(workers: int, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment that gives each of ``workers`` processes its share of the cores; what the user has set stays."""
    env = os.environ if env is None else env
    threads = env.get(THREADS) or str(max(1, usable_cores() // workers))
    return {THREADS: threads, OMP_THREADS: env.get(OMP_THREADS) or threads}


def read_size(text: str, name: str) -> int:
    """Bytes of a size like ``10GB``, ``1.5 GiB`` or ``4096``.

    Raises:
        ConfigError: naming the setting and its value.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if not size:
        raise ConfigError(f"{name} has value {text!r}; expected a size like 10GB or 512MiB")
    return size


def show_size(size: float) -> str:
    """A size for people: ``1.2 GB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
