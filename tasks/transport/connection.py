"""The transport for one app alone, with every URL as it is written.

kombu chooses a transport by the scheme of the URL or by the setting ``broker_transport``. The setting loses what
the scheme says: ``rediss://`` without parameters connects without TLS, ``redis+socket://`` gets the stock transport,
and the URI that Flower goes by begins with a class path. Here the URL is read by kombu, and only the class that the
scheme stands for is another one; no other app in the process notices.
"""

from __future__ import annotations

import time
from typing import Any

from celery.app import amqp
from kombu import connection as kombu_connection
from kombu.utils.collections import HashedSeq

from .transport import SentinelTransport, Transport

_OURS = {"redis": Transport, "rediss": Transport, "sentinel": SentinelTransport}


class Connection(kombu_connection.Connection):  # type: ignore[misc]
    """A kombu connection to Redis through this transport, and so is every connection of its pool."""

    def get_transport_cls(self) -> Any:
        """Our class for a Redis scheme, kombu's for any other."""
        scheme = self.transport_cls
        return _OURS.get(scheme) if isinstance(scheme, str) and scheme in _OURS else super().get_transport_cls()

    def __eqhash__(self) -> HashedSeq:
        """What kombu's pools go by: one of ours and a stock one of the same URL do not share a pool."""
        return HashedSeq(Connection, super().__eqhash__())

    def Pool(self, limit: int | None = None, **kwargs: Any) -> ConnectionPool:  # noqa: N802  (kombu's name)
        """A pool of such connections; kombu's own would publish through kombu's transport: no bells."""
        return ConnectionPool(self, limit, **kwargs)


class PooledConnection(Connection, kombu_connection.PooledConnection):  # type: ignore[misc]
    """A connection that goes back to its pool."""

    def clone(self, **kwargs: Any) -> Connection:
        """One like it that belongs to no pool."""
        return Connection(**dict(self._info(resolve=False), **kwargs))


class ConnectionPool(kombu_connection.ConnectionPool):  # type: ignore[misc]
    """kombu's pool, of our connections."""

    def new(self) -> PooledConnection:
        """One more."""
        return PooledConnection(self, **dict(self.connection._info(resolve=False)))  # noqa: SLF001 - kombu's own


class AMQP(amqp.AMQP):  # type: ignore[misc]
    """``Celery(amqp="nograd.tasks.transport:AMQP")``."""

    Connection = Connection
    BrokerConnection = Connection

    def as_task_v2(self, *args: Any, **kwargs: Any) -> amqp.task_message:
        """Celery's message of a task, with the time it was made: AMQP's property ``timestamp``, seconds of the epoch.

        A property and not a header: Celery copies unknown headers into the message of a retry, the old time with them.
        """
        message = super().as_task_v2(*args, **kwargs)
        message.properties.setdefault("timestamp", time.time())
        return message
