"""Why a worker does not start on this transport."""

from __future__ import annotations

from nograd.tasks.errors import ConfigError


class TransportError(ConfigError):
    """Redis, its settings or the installed kombu are not what the transport can keep its promises on.

    Not one of kombu's connection errors, on purpose: Celery retries those for ever, and this one does not go away.
    """

    code = "transport"


class Malformed(ValueError):  # noqa: N818 - a state, as the one who buries the message sees it
    """A message that no consumer could read. Its text is the reason that stands in the dead list."""
