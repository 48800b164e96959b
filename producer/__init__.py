"""The light client: ``from nograd.producer import Client``. Never imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Client
    from .job import Job

__all__ = ["Client", "Job"]


def __getattr__(name: str) -> Any:
    # On demand, so that the command line can report a wrong environment variable instead of failing to import.
    if name == "Client":
        from .client import Client

        return Client
    if name == "Job":
        from .job import Job

        return Job
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
