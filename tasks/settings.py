"""Settings, read once from the environment; a bad value stops the start and names itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .errors import ConfigError
from .keys import RESULT_TTL_S

DEFAULT_REDIS_URL = "redis://localhost:6379/0"

_SCHEMES = ("redis", "rediss", "redis+socket", "sentinel")


@dataclass(frozen=True, slots=True)
class Settings:
    """What every process of a fleet has in common.

    Attributes:
        redis_url: broker and result store (``NOGRAD_REDIS_URL``).
        models: the model file (``NOGRAD_MODELS``), or None.
        result_ttl_s: seconds a result is kept (``NOGRAD_RESULT_TTL_S``).
    """

    redis_url: str = DEFAULT_REDIS_URL
    models: Path | None = None
    result_ttl_s: int = RESULT_TTL_S

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
        )


def check_redis_url(url: str, name: str = "Redis URL") -> str:
    """Return ``url`` if it is one Celery can use.

    Raises:
        ConfigError: naming the setting and what is wrong. The password is never repeated.
    """
    scheme = urlsplit(url.split(";", 1)[0]).scheme
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"{name}: {scheme or 'no'} scheme in {url.rsplit('@', maxsplit=1)[-1]!r}; expected one of {', '.join(_SCHEMES)}://"
        )
    return url


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
