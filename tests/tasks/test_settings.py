"""The environment is read once and a bad value names itself, never a password."""

from pathlib import Path

import pytest

from nograd.tasks import create_app
from nograd.tasks.errors import ConfigError
from nograd.tasks.settings import Settings, check_redis_url


def test_defaults():
    assert Settings.from_env({}) == Settings("redis://localhost:6379/0", None, 24 * 3600, 30)


def test_values():
    env = {
        "NOGRAD_REDIS_URL": "redis://u:p@h:1/2",
        "NOGRAD_MODELS": "m.toml",
        "NOGRAD_RESULT_TTL_S": "60",
        "NOGRAD_LEASE_S": "5",
    }
    assert Settings.from_env(env) == Settings("redis://u:p@h:1/2", Path("m.toml"), 60, 5)


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://h",
        "redis://[::1]:6379/15",
        "rediss://:p@h/0?ssl_cert_reqs=required",
        "redis+socket:///run/redis.sock",
        "redis+socket://:p@/run/redis.sock?virtual_host=2",
    ],
)
def test_a_url_celery_can_use_is_taken_as_it_is(url):
    assert check_redis_url(url) == url
    app = create_app(Settings(redis_url=url))
    assert app.backend.connparams["db"] in {0, 2, 15}
    assert app.connection_for_write().transport_cls in {"redis", "rediss"}


@pytest.mark.parametrize(
    "url", ["http://h/0", "localhost:6379", "amqp://guest@h//", "sentinel://h:26379/0", "redis+socket://"]
)
def test_a_url_celery_cannot_use_here_is_refused(url):
    with pytest.raises(ConfigError, match="NOGRAD_REDIS_URL"):
        Settings.from_env({"NOGRAD_REDIS_URL": url})


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://:secret@host:abc/0", "the port is not a number from 1 to 65535 in 'host:abc/0'"),
        ("redis://:secret@host:99999/0", "the port is not a number"),
        ("redis://:secret@host:0/0", "the port is not a number"),
        ("redis://localhost:abc/0", "the port is not a number"),
        ("redis://:secret@host/notadb", "the database is not a number in 'host/notadb'"),
        ("redis://:secret@host/1/2", "the database is not a number"),
        ("redis://:secret@host/-1", "the database is not a number"),
        ("redis://:secret@host/0;redis://:secret@host2/0", "the database is not a number"),
        ("redis+socket://:secret@/run/redis.sock?virtual_host=x", "the database is not a number"),
        ("redis://:secret@[::1", "not a URL"),
        ("rediss://:secret@host/0", r"must end in \?ssl_cert_reqs=required"),
        ("rediss://:secret@host/0?ssl_cert_reqs=maybe", r"must end in \?ssl_cert_reqs=required"),
        ("http://user:secret@host/0", "http scheme"),
        ("redis://:sec/ret@host/0", "the port is not a number"),  # a slash that should be %2F
        ("redis://:secret", "the port is not a number"),  # the host was forgotten
    ],
)
def test_a_wrong_url_says_what_is_wrong_and_never_repeats_the_password(url, says):
    with pytest.raises(ConfigError, match=f"^NOGRAD_REDIS_URL: .*{says}") as caught:
        Settings.from_env({"NOGRAD_REDIS_URL": url})
    assert "sec" not in str(caught.value)


@pytest.mark.parametrize("value", ["soon", "0", "-5", "1.5"])
def test_a_lifetime_is_a_positive_whole_number(value):
    with pytest.raises(ConfigError, match=f"NOGRAD_RESULT_TTL_S has value '{value}'"):
        Settings.from_env({"NOGRAD_RESULT_TTL_S": value})
