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
from kombu import Connection as KombuConnection

from .transport import SentinelTransport, Transport

_OURS = {"redis": Transport, "rediss": Transport, "sentinel": SentinelTransport}


class Connection(KombuConnection):  # type: ignore[misc]
    """A kombu connection to Redis through this transport."""

    def get_transport_cls(self) -> Any:
        """Our class for a Redis scheme, kombu's for any other."""
        scheme = self.transport_cls
        return _OURS.get(scheme) if isinstance(scheme, str) and scheme in _OURS else super().get_transport_cls()


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
