"""One connection to Redis that never repeats a command by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final

from redis import ConnectionPool
from redis.exceptions import NoScriptError, RedisError, ResponseError

from .scripts import ALL

Command = tuple[Any, ...]

#: replies `Wire.send` leaves unread at most; only a Redis that has stopped answering lets so many gather
MOST_UNREAD: Final = 1000


class Wire:
    """Sends commands in one write and reads their replies, on one connection, from any thread.

    Nothing is retried below this class: who calls it must know that the connection broke, because then the clock of the
    leases may have run on without a beat. Scripts that Redis lost in a restart are the exception; a NOSCRIPT reply says
    that nothing was done.
    """

    def __init__(self, pool: Callable[[], ConnectionPool]) -> None:
        self._make_pool = pool
        self._pool: ConnectionPool | None = None
        self._connection: Any = None
        self._lock = threading.RLock()
        self._unread = 0

    def call(self, commands: Iterable[Command]) -> list[Any]:
        """The replies, in order; a refusal by Redis stands in the list as its exception.

        Raises:
            ConnectionError, TimeoutError: of redis; what was sent may or may not have been done.
        """
        commands = list(commands)
        with self._lock:
            try:
                return self._exchange(commands)
            except BaseException:
                self.close()
                raise

    def send(self, commands: Iterable[Command]) -> None:
        """Write the commands and read their replies some other time: waits for no reply while few are missing.

        What has been written arrives even if this process dies on its next instruction.
        """
        commands = list(commands)
        with self._lock:
            try:
                connection = self._connected()
                while self._unread and (self._unread > MOST_UNREAD or connection.can_read(timeout=0)):
                    self._unread -= 1
                    self._read()
                connection.send_packed_command(connection.pack_commands(commands), check_health=False)
                self._unread += len(commands)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Drop the connection; the next call opens another."""
        with self._lock:
            self._unread = 0
            connection, self._connection = self._connection, None
            pool, self._pool = self._pool, None
            for resource in (connection, pool):
                if resource is not None:
                    with suppress(RedisError, OSError):  # it is gone either way
                        resource.disconnect()

    def _connected(self) -> Any:
        if self._connection is None:
            self._pool = self._make_pool()
            self._connection = self._pool.get_connection()
            self._connection.connect()
        return self._connection

    def _read_back(self) -> None:
        while self._unread:
            self._unread -= 1
            self._read()

    def _read(self) -> Any:
        try:
            return self._connection.read_response()
        except ResponseError as err:
            return err

    def _exchange(self, commands: list[Command]) -> list[Any]:
        self._read_back()
        connection = self._connected()
        connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        replies = [self._read() for _ in commands]
        missed = [k for k, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missed:
            loads: list[Command] = [("SCRIPT", "LOAD", script.source) for script in ALL]
            again = [commands[k] for k in missed]
            connection.send_packed_command(connection.pack_commands([*loads, *again]), check_health=False)
            for _ in loads:
                self._read()
            for k in missed:
                replies[k] = self._read()
        return replies
