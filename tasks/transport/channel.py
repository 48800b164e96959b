"""The Redis channel of kombu, except that a message is leased in the step that takes it.

A channel only reads: it fetches, delivers, and leaves to the keeper of its process what has been delivered.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections import deque
from queue import Empty
from typing import Any, Final

import redis
from kombu.log import get_logger
from kombu.transport import redis as kombu_redis
from kombu.utils.json import dumps
from redis.exceptions import AuthenticationError, NoPermissionError, NoScriptError, RedisError, ResponseError

from . import names
from .checks import check_kombu, check_server, refused
from .doorbell import WAIT_UNRUNG_S, Fetch, Waiting, bell
from .errors import Malformed
from .keeper import Keeper, Keys, Terms, keeper_of
from .lease import Lease
from .message import Message, read
from .qos import QoS
from .scripts import FETCH, PUSH, RING

logger = get_logger(__name__)

#: seconds messages are delivered in a row before the event loop gets its turn (the solo pool runs them meanwhile)
SLICE_S: Final = 0.02
#: a fetch passes its messages to Redis as arguments of one command, which Lua bounds
MOST_PER_FETCH: Final = 1000
#: seconds a closing consumer waits for the answer that is on its way
FINISH_S: Final = 3.0
#: seconds before a Redis that refuses (READONLY, LOADING, …) is asked again
REFUSED_S: Final = 0.5

OPTIONS: Final = (
    "lease_seconds", "beat_seconds", "max_hold_seconds", "fetch_limit", "fetch_bytes", "max_message_bytes", "budgets",
    "allow_eviction",
)  # fmt: skip

_numbers = itertools.count(1)
#: Redis servers that have let this process in before
_welcomed: set[tuple[Any, ...]] = set()


def _tail(queue: str) -> str:
    """What stands behind a message of the queue in ``unacked``: kombu's exchange and routing key."""
    return f',"",{json.dumps(queue)}]'


def stopping() -> bool:
    """Whether Celery, or the interpreter, is on its way out.

    Celery says so in its state when a signal has come; the remote command ``shutdown`` shows only as the SystemExit
    that is being handled.
    """
    state = sys.modules.get("celery.worker.state")
    for flag in ("should_stop", "should_terminate"):
        value = getattr(state, flag, None)
        if value is not None and value is not False:  # 0 is an exit status here, and means stop
            return True
    err = sys.exc_info()[1]
    while err is not None:
        if isinstance(err, SystemExit | KeyboardInterrupt):
            return True
        err = err.__context__
    return False


class Channel(kombu_redis.Channel):  # type: ignore[misc]
    """Channel to one Redis."""

    from_transport_options = kombu_redis.Channel.from_transport_options + OPTIONS

    QoS = QoS
    Message = Message

    #: seconds after which a silent worker has lost what it held
    lease_seconds: float = 30.0
    #: seconds between renewals; a sixth of the lease if not set
    beat_seconds: float | None = None
    #: seconds after which a delivery is given up, however lively its worker
    max_hold_seconds: float = 24 * 3600.0
    #: most messages of one fetch
    fetch_limit: int = 64
    #: most bytes of one fetch; its first message may be larger
    fetch_bytes: int = 1024 * 1024
    #: a larger message goes to the dead list unread
    max_message_bytes: int = 16 * 1024 * 1024
    #: priority → most messages of it that this process holds unstarted
    budgets: dict[int | str, int] | None = None
    #: start even if Redis may delete keys when memory runs short
    allow_eviction: bool = False

    keeper: Keeper | None = None
    #: a priority without room is not listened for: the keeper nudges when there is room again
    starved = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_kombu()
        self.parked: deque[tuple[Lease | None, str, bytes]] = deque()
        self.nudge_key = ""
        self._no_ack_queues: set[str] = set()
        self._waiting = Waiting()
        self._fetch: Fetch | None = None
        self._lists: list[tuple[str, str, int, str, bool]] = []
        self._rotation = 0
        self._asked: tuple[bool, str, float] = (False, "", 0.0)
        self._hungry = False
        self._load_script = False
        self._refused_until = 0.0
        self._warned_at = 0.0
        self._direct: Any = None
        self._shared: Any = None
        self._later = False
        where = self._address((args[0] if args else kwargs["connection"]).client)
        try:
            super().__init__(*args, **kwargs)
        except AuthenticationError as err:
            if where in _welcomed:
                raise  # a password that is being changed; kombu tries again
            raise refused(err) from err
        _welcomed.add(where)

    @staticmethod
    def _address(client: Any) -> tuple[Any, ...]:
        return client.hostname, client.port, client.virtual_host, client.userid, tuple(client.alt or ())

    # -- publishing --------------------------------------------------------------------------------------------------

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        name = self._q_for_pri(queue, self._get_message_priority(message, reverse=False))
        batch = kwargs.get("_publish_batch")
        if batch is not None:
            super()._put(queue, message, **kwargs)
            batch.touched.add(name)
        elif self._expires and queue in self._expires:
            super()._put(queue, message, **kwargs)
            self.ring([name])
        else:
            keys = [self.global_keyprefix + name, bell(self.global_keyprefix, name)]
            self._call(PUSH, keys, [dumps(message), names.BELL_TTL_MS])

    def ring(self, lists: list[str]) -> None:
        """Wake whoever waits for these lists. Failing to is no failure: they look by themselves within a second."""
        try:
            self._call(RING, [bell(self.global_keyprefix, name) for name in lists], [names.BELL_TTL_MS])
        except (RedisError, OSError) as err:
            logger.debug("the bells were not rung: %s", err)

    def create_publish_batch(self, max_size: int) -> PublishBatch:
        """The batch of kombu, with bells."""
        return PublishBatch(self, max_size)

    def _call(self, script: Any, keys: list[str], args: list[Any]) -> Any:
        client: Any = self._direct
        if client is None or client.connection_pool is not self.pool:
            # Not the client kombu makes for each command: that one prefixes the first key of a script and no other.
            client = self._direct = redis.Redis(connection_pool=self.pool)
        try:
            return client.execute_command(*script.call(keys, args))
        except NoScriptError:
            return client.execute_command("EVAL", script.source, len(keys), *keys, *args)

    def _create_client(self, asynchronous: bool = False) -> Any:
        """As kombu's, which makes one for every command: that takes as long as the command. Here one for each pool."""
        if asynchronous:  # these hold the connection that is read by the loop
            return super()._create_client(asynchronous=True)
        if self._shared is None or self._shared.connection_pool is not self.pool:
            self._shared = super()._create_client()
        return self._shared

    # -- consuming ---------------------------------------------------------------------------------------------------

    @property
    def buffers(self) -> bool:
        """Whether acknowledgements may wait for each other: only where an event loop would be held up by each."""
        return self.connection is None or self.connection.hub is not None

    @property
    def serves_celery(self) -> bool:
        """Whether messages are held by Celery's requests, so that one that has been dropped cannot be acknowledged."""
        return "celery.worker.consumer" in sys.modules

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        """Consume; the first consumer that acknowledges brings the keeper."""
        if no_ack:
            self._no_ack_queues.add(queue)
        else:
            self._no_ack_queues.discard(queue)
            if queue not in self._fanout_queues:
                self._keep()
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _keep(self) -> Keeper:
        if self.keeper is None:
            self.keeper = keeper_of(self._keeper_key(), self._make_keeper)
            self.nudge_key = f"{self.global_keyprefix}{names.NUDGE}{self.keeper.holder}.{next(_numbers)}"
            self.keeper.attach(self)
        return self.keeper

    def _keeper_key(self) -> Any:
        where = self._address(self.connection.client)
        return (*where, getattr(self, "master_name", None), self.global_keyprefix, self.unacked_key, self.lease_seconds)

    def _make_keeper(self) -> Keeper:
        pool = self._pool_recipe()
        terms = Terms(self.lease_seconds, self.beat_seconds or self.lease_seconds / 6, self.max_hold_seconds)
        prefix = self.global_keyprefix
        keeper = Keeper(pool, Keys(prefix, prefix + self.unacked_key, prefix + self.unacked_index_key), terms)
        try:
            check_server(keeper.wire, allow_eviction=self.allow_eviction)
            if not keeper.beat():
                logger.warning("the first beat failed; the worker starts and tries again")
        except (AuthenticationError, NoPermissionError) as err:
            raise refused(err) from err
        for priority, most in (self.budgets or {}).items():
            keeper.budgets[self.priority(int(priority))] = int(most)
        return keeper

    def _pool_recipe(self) -> Any:
        """How to make a pool like this channel's, also when the channel and its transport are gone."""
        transport, options = self.connection, dict(self.__dict__)
        client = transport.client.clone()
        limit = max(1.0, self.lease_seconds / 3)

        def make() -> Any:
            # A bare channel of the same class: kombu derives a pool from a channel's options and its transport's URL.
            channel = object.__new__(type(self))
            channel.__dict__.update({name: options[name] for name in self.from_transport_options if name in options})
            channel.connection = _Address(client, transport.default_port)
            pool = channel._get_pool()
            timeout = self.socket_timeout
            pool.connection_kwargs.update(
                socket_timeout=min(limit, timeout) if timeout else limit,
                retry_on_timeout=False,
                health_check_interval=0,
            )
            return pool

        return make

    def _update_queue_cycle(self) -> None:
        super()._update_queue_cycle()
        self._fetch = None

    def _pack(self) -> Fetch:
        """The commands for the queues as they are now, and which list each reply will be about."""
        self._lists = [
            self._place(queue, step, leased=self._leased(queue))
            for step in self.priority_steps
            for queue in self._queue_cycle.consume(len(self.active_queues))
        ]
        packed = [(name, _tail(queue), leased) for name, queue, _, _, leased in self._lists]
        nudge = self.nudge_key or f"{self.global_keyprefix}{names.NUDGE}none"
        bells = [bell(self.global_keyprefix, name) for name, *_ in self._lists]
        self._fetch = Fetch(self._keys(self._lists), nudge, bells, packed, len(self.priority_steps))
        return self._fetch

    def _place(self, queue: str, step: int, *, leased: bool) -> tuple[str, str, int, str, bool]:
        """A list: its name, queue, priority, the end of the ids of its leases, and whether it has any."""
        name = self._q_for_pri(queue, step)
        return name, queue, step, f".{len(_tail(queue).encode())}|{name}", leased

    def _keys(self, places: list[tuple[str, str, int, str, bool]]) -> list[str]:
        """The keys of a fetch."""
        prefix = self.global_keyprefix
        keys = [prefix + key for key in (self.unacked_key, self.unacked_index_key, names.LEASES, names.DELIVERIES)]
        for name, *_ in places:
            keys += [prefix + name, bell(prefix, name)]
        return keys

    def _numbers(self, most: int, prefix: str, start: int, width: int, *, fair: bool) -> list[str | int]:
        """The first nine arguments of a fetch."""
        largest = self.max_message_bytes or 1 << 40
        lease_ms = int(self.lease_seconds * 1000)
        return [most, start, self.fetch_bytes, lease_ms, prefix, largest, width, int(fair), names.BELL_TTL_MS]

    def _leased(self, queue: str) -> bool:
        return bool(self.ack_emulation) and queue not in self._no_ack_queues

    def wants(self) -> bool:
        """Whether to ask for messages now."""
        return not self.parked and time.monotonic() >= self._refused_until and bool(self.qos.can_consume())

    def _most(self) -> int:
        """How many messages the next fetch may bring."""
        credit = self.qos.can_consume_max_estimate()
        if getattr(self.qos, "patched", False) or (credit is None and self.connection.hub is None):
            return 1  # nobody knows how many more will be asked for
        limit = min(self.fetch_limit, MOST_PER_FETCH)
        return int(limit if credit is None else min(credit, limit))

    def _rooms(self, most: int) -> list[int]:
        rooms = []
        for step in self.priority_steps:
            room = self.keeper.room(step) if self.keeper is not None else None
            rooms.append(most if room is None else min(most, room))
        return rooms

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask: at once if the last answer had messages in it, else after waiting at the bells, in one write."""
        del timeout
        if not self.active_queues:
            return
        fetch = self._fetch or self._pack()
        self.starved = True  # first, so that room made meanwhile leaves a nudge
        rooms = self._rooms(self._most())
        waits, command = not self._hungry, b""
        if waits:
            self.starved = 0 in rooms
            # Who leases nothing waits for replies: stock workers send them without a bell, and no keeper nudges it.
            timeout_s = WAIT_UNRUNG_S if self.keeper is None else self._waiting.timeout_s
            command = fetch.wait(timeout_s, [room > 0 for room in rooms])
        else:
            self.starved = False
        prefix = self.keeper.next_prefix() if self.keeper is not None else "."
        connection = self.client.connection
        self._asked = (waits, prefix, time.monotonic())
        self._in_poll = connection
        self._brpop_sent_at = time.monotonic()
        connection.send_packed_command([command + self._take_command(fetch, prefix, self._most(), rooms)])

    def _take_command(self, fetch: Fetch, prefix: str, most: int, rooms: list[int]) -> bytes:
        script = ("EVAL", FETCH.source) if self._load_script else ("EVALSHA", FETCH.sha)
        fair = self.queue_order_strategy == "round_robin"
        self._rotation += 1
        start = self._rotation % fetch.width if fair else 0
        return fetch.take(script, [*self._numbers(most, prefix, start, fetch.width, fair=fair), *rooms])

    def _brpop_read(self, **options: Any) -> bool:
        """Read the answer, lease what it brings, deliver.

        Raises:
            Empty: if there was nothing to deliver.
        """
        del options
        connection = self.client.connection
        waits, prefix, sent = self._asked
        rung = None
        try:
            rung = connection.read_response() if waits else None
            reply = connection.read_response()
        except ResponseError as err:
            self._on_refusal(err, connection)
            raise Empty from None
        except self.connection_errors:
            connection.disconnect()
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        self._load_script = False
        self._accept(reply, prefix, sent)
        if waits:
            self._waiting.found(rung=rung is not None, messages=len(reply))
        self._hungry = bool(reply)
        if not self.deliver(most=None if self.connection.hub is not None else 1):
            raise Empty
        return True

    def _on_refusal(self, err: ResponseError, connection: Any) -> None:
        """Redis said no. A worker does not end over it: it asks again, elsewhere if Sentinel says so."""
        if isinstance(err, NoScriptError):
            self._load_script = True
            return
        connection.disconnect()  # also because a second reply may be on its way
        self._refused_until = time.monotonic() + REFUSED_S
        if time.monotonic() - self._warned_at > 10:
            self._warned_at = time.monotonic()
            logger.error("Redis does not hand out messages, asking again every %s s: %s", REFUSED_S, err)

    def _accept(self, reply: list[Any], prefix: str, sent: float) -> None:
        """Everything in the answer is ours from here on."""
        leases: list[Lease] = []
        for k in range(0, len(reply), 3):
            number, raw, deliveries = reply[k : k + 3]
            _, queue, _, _, leased = self._lists[number - 1]
            lease = (
                self._lease(self._lists[number - 1], f"{prefix}{k // 3 + 1}", raw, deliveries, sent) if leased else None
            )
            if lease is not None:
                leases.append(lease)
            self.parked.append((lease, queue, raw))
        if leases and self.keeper is not None:
            self.keeper.hold(leases)

    def _lease(
        self, place: tuple[str, str, int, str, bool], begin: str, raw: bytes | None, deliveries: int, sent: float
    ) -> Lease:
        """The lease that the script has made for a message; its id is put together here as it is there."""
        name, queue, step, ending, _ = place
        sha = hashlib.sha1(raw, usedforsecurity=False).hexdigest() if raw and deliveries >= 0 else ""
        return Lease(
            begin + ending, name, queue, step=step, deliveries=deliveries, sha=sha, since=time.monotonic(),
            deadline=sent + self.lease_seconds,
        )  # fmt: skip

    def deliver(self, most: int | None = None) -> bool:
        """Hand out what has been fetched; False if that was nothing.

        In slices: the solo pool runs each task inside this loop, and signals, remote commands and acknowledgements must
        not wait for all of them.
        """
        self._later = False
        delivered, until = 0, time.monotonic() + SLICE_S
        try:
            while self.parked and not self.closed:
                lease, queue, raw = self.parked.popleft()
                if lease is not None and lease.lost:
                    continue
                if stopping() or queue not in self._active_queues or not self.qos.can_consume():
                    self.parked.appendleft((lease, queue, raw))
                    self._return_parked()
                    break
                delivered += 1
                self._deliver(lease, queue, raw)
                if delivered == most or time.monotonic() > until:
                    break
        finally:
            if self.parked and not self.closed and self.connection.hub is not None and not self._later:
                self._later = True
                self.connection.hub.call_later(0.001, self._deliver_later)
        return delivered > 0

    def _deliver_later(self) -> None:
        if not self.closed:
            self.deliver()

    def _deliver(self, lease: Lease | None, queue: str, raw: bytes | None) -> None:
        try:
            self.connection._deliver(self._read(raw, lease), queue)  # noqa: SLF001 - kombu's own
        except Malformed as err:
            self._bury(lease, queue, err)

    def _read(self, raw: bytes | None, lease: Lease | None) -> Any:
        if raw is None:
            raise Malformed(f"larger than {self.max_message_bytes} bytes")
        return read(raw, lease)

    def _bury(self, lease: Lease | None, queue: str, err: Malformed) -> None:
        logger.error("message of queue %r cannot be read and goes to the dead list: %s", queue, err)
        if lease is not None and self.keeper is not None:
            self.qos.forget(lease.id)
            self.keeper.bury(lease, str(err), now=not self.buffers)

    def _return_parked(self) -> None:
        """Nobody has seen these: back to the head of their queues, in order."""
        parked, leases = list(self.parked), []
        self.parked.clear()
        for lease, _, _ in parked:
            if lease is not None:
                leases.append(lease)
        if leases and self.keeper is not None:
            self.keeper.give_back(leases, remember=False)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """One message, now."""
        del kwargs
        leased = bool(self.ack_emulation) and not no_ack
        prefix, sent = self._keep().next_prefix() if leased else ".", time.monotonic()
        places = [self._place(queue, step, leased=leased) for step in self.priority_steps]
        reply = self._call(FETCH, self._keys(places), [*self._numbers(1, prefix, 0, 1, fair=True), *([1] * len(places)),
                           *(part for name, *_ in places for part in (name, _tail(queue), int(leased)))])  # fmt: skip
        if self._expires:
            with self.conn_or_acquire() as client:
                self._maybe_update_queues_expire(client, queue)
        if not reply:
            return None
        number, raw, deliveries = reply
        lease = self._lease(places[number - 1], f"{prefix}1", raw, deliveries, sent) if leased else None
        if lease is not None:
            self._keep().hold([lease])
        try:
            message = self.Message(self._read(raw, lease), channel=self)
        except Malformed as err:
            self._bury(lease, queue, err)
            return None
        if lease is not None:
            self.qos.append(message, message.delivery_tag)
        return message

    # -- closing -----------------------------------------------------------------------------------------------------

    def _basic_cancel(self, consumer_tag: str) -> Any:
        ret = super()._basic_cancel(consumer_tag)
        if not self.active_queues:
            self._finish_poll()
            self._return_parked()
        return ret

    def _finish_poll(self) -> None:
        """Read the answer that is on its way, and give back what is in it."""
        if not self._in_poll:
            return
        connection = self._in_poll
        waits, prefix, sent = self._asked
        try:
            if waits and self.keeper is not None and not self.keeper.nudge(self):
                raise redis.ConnectionError("Redis is away")  # as if the read had found it out
            connection._sock.settimeout(FINISH_S)  # noqa: SLF001 - as Celery bounds the reads of its own shutdown
            if waits:
                connection.read_response()
            self._accept(connection.read_response(), prefix, sent)
            connection._sock.settimeout(self.socket_timeout)  # noqa: SLF001
        except (RedisError, OSError, AttributeError):
            connection.disconnect()
        finally:
            self._in_poll = None
            self._hungry = False

    def close(self) -> None:
        """Close, and leave to their leases what is being worked on.

        Only a process that is about to end gives back what it has delivered: a connection may have to be closed because
        it was lost, and then everything goes on.
        """
        if self.closed:
            return
        self._finish_poll()
        self._return_parked()
        keeper, qos = self.keeper, self._qos
        if keeper is not None:
            if isinstance(qos, QoS):
                if stopping():
                    qos.restore_unacked()
                else:
                    keeper.adopt(qos.leases)
            keeper.flush()
            keeper.detach(self)
        super().close()

    def abandon(self) -> None:
        """Close without a word to Redis: the connection is lost."""
        if self.closed:
            return
        self._in_poll = None
        self.auto_delete_queues.clear()  # deleting them would mean connecting again
        self._return_parked()
        if self.keeper is not None:
            if isinstance(self._qos, QoS):
                self.keeper.adopt(self._qos.leases)
            self.keeper.detach(self)
        super().close()


class _Address:
    """As much of a transport as kombu needs to make a connection pool."""

    def __init__(self, client: Any, default_port: int) -> None:
        self.client = client
        self.default_port = default_port
        self.cycle = None


class PublishBatch(kombu_redis.PublishBatch):  # type: ignore[misc]
    """Rings once per list and flush."""

    def __init__(self, channel: Any, max_size: int) -> None:
        self.touched: set[str] = set()
        super().__init__(channel, max_size)

    def flush(self) -> None:
        """Publish what is buffered, then ring."""
        super().flush()
        touched, self.touched = self.touched, set()
        if touched:
            self.channel.ring(sorted(touched))


class SentinelChannel(Channel, kombu_redis.SentinelChannel):  # type: ignore[misc]
    """Channel to the master that Sentinel names."""

    from_transport_options = kombu_redis.SentinelChannel.from_transport_options + OPTIONS
