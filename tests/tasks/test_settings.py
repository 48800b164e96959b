"""The environment is read once and a bad value names itself, never a password."""

from pathlib import Path

import pytest

from nograd.tasks.errors import ConfigError
from nograd.tasks.settings import Settings, check_redis_url


def test_defaults():
    assert Settings.from_env({}) == Settings("redis://localhost:6379/0", None, 24 * 3600)


def test_values():
    env = {"NOGRAD_REDIS_URL": "rediss://u:p@h:1/2", "NOGRAD_MODELS": "m.toml", "NOGRAD_RESULT_TTL_S": "60"}
    assert Settings.from_env(env) == Settings("rediss://u:p@h:1/2", Path("m.toml"), 60)


@pytest.mark.parametrize("url", ["http://h/0", "localhost:6379", "amqp://guest@h//"])
def test_a_url_celery_cannot_use_here_is_refused(url):
    with pytest.raises(ConfigError, match="NOGRAD_REDIS_URL"):
        Settings.from_env({"NOGRAD_REDIS_URL": url})


def test_a_password_is_never_repeated():
    with pytest.raises(ConfigError) as caught:
        check_redis_url("http://user:secret@host/0")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", ["soon", "0", "-5", "1.5"])
def test_a_lifetime_is_a_positive_whole_number(value):
    with pytest.raises(ConfigError, match=f"NOGRAD_RESULT_TTL_S has value '{value}'"):
        Settings.from_env({"NOGRAD_RESULT_TTL_S": value})
