"""Settings, read once from the environment; a bad value stops the start and names itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from .errors import ConfigError
from .keys import LEASE_S, RESULT_TTL_S

DEFAULT_REDIS_URL = "redis://localhost:6379/0"

_SCHEMES = ("redis", "rediss", "redis+socket")
#: what Celery takes as ``ssl_cert_reqs``; without one its result backend refuses a ``rediss://`` URL
_CERT_REQS = ("required", "optional", "none", "CERT_REQUIRED", "CERT_OPTIONAL", "CERT_NONE")


@dataclass(frozen=True, slots=True)
class Settings:
    """What every process of a fleet has in common.

    Attributes:
        redis_url: broker and result store (``NOGRAD_REDIS_URL``).
        models: the model file (``NOGRAD_MODELS``), or None.
        result_ttl_s: seconds a result is kept (``NOGRAD_RESULT_TTL_S``).
        lease_s: seconds after which the jobs of a worker that fell silent are given to others (``NOGRAD_LEASE_S``).
    """

    redis_url: str = DEFAULT_REDIS_URL
    models: Path | None = None
    result_ttl_s: int = RESULT_TTL_S
    lease_s: int = LEASE_S

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the environment.

        Raises:
            ConfigError: naming the variable and its value.
        """
        env = os.environ if env is None else env
        models = env.get("NOGRAD_MODELS")
        return cls(
            redis_url=check_redis_url(env.get("NOGRAD_REDIS_URL") or DEFAULT_REDIS_URL, "NOGRAD_REDIS_URL"),
            models=Path(models) if models else None,
            result_ttl_s=_positive_int(env, "NOGRAD_RESULT_TTL_S", RESULT_TTL_S),
            lease_s=_positive_int(env, "NOGRAD_LEASE_S", LEASE_S),
        )


def check_redis_url(url: str, name: str = "Redis URL") -> str:
    """Return ``url`` if it is one Celery can use.

    Raises:
        ConfigError: naming the setting and what is wrong. The password is never repeated.
    """
    problem = _url_problem(url)
    if problem is not None:
        # What stands behind the last @ holds no password; without one, a part of it may be a password out of place.
        shown = f" in {url.rsplit('@', maxsplit=1)[-1].split('?', maxsplit=1)[0]!r}" if "@" in url else ""
        raise ConfigError(f"{name}: {problem}{shown}")
    return url


def _url_problem(url: str) -> str | None:  # noqa: PLR0911 - one line for each problem
    """Why Celery cannot use a URL, without repeating any of it but the scheme; None if it can."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "not a URL"
    if parts.scheme not in _SCHEMES:
        return f"{parts.scheme or 'no'} scheme; expected {', '.join(f'{scheme}://' for scheme in _SCHEMES)}"
    query = parse_qs(parts.query)
    if parts.scheme == "redis+socket":
        if not parts.path.strip("/"):
            return "no path of a socket"
        return _database_problem(query.get("virtual_host", ["0"])[-1])
    try:
        if parts.port == 0:
            raise ValueError
    except ValueError:
        return "the port is not a number from 1 to 65535"
    if parts.scheme == "rediss" and query.get("ssl_cert_reqs", [""])[-1] not in _CERT_REQS:
        return "a rediss:// URL must end in ?ssl_cert_reqs=required (or optional, or none)"
    return _database_problem(parts.path.strip("/") or "0")


def _database_problem(database: str) -> str | None:
    return None if database.isascii() and database.isdigit() else "the database is not a number"


def _positive_int(env: Mapping[str, str], name: str, default: int) -> int:
    raw = env.get(name)
    if not raw:
        return default
    try:
        value = int(raw)
    except ValueError:
        value = 0
    if value <= 0:
        raise ConfigError(f"{name} has value {raw!r}; expected a positive whole number of seconds")
    return value
