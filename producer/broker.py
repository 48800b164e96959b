"""What a client does with Redis: publish messages, read results, count queues, revoke; its failures as ours."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import msgspec
import redis
from celery import states
from kombu.exceptions import BatchPublishError, OperationalError

from nograd.tasks import cancelled, registry
from nograd.tasks.errors import BrokerUnavailable, InvalidInput, JobError
from nograd.tasks.keys import INTERACTIVE, PREDICT_TASK, PRIORITY_SEPARATOR, PRIORITY_SUFFIXES, queue_name
from nograd.tasks.payloads import describe
from nograd.tasks.predict import TimeoutS

from .outcomes import PENDING, Outcome, read_outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from celery import Celery

#: Redis commands in one pipeline of `Broker.publish_many`; two per job, its message and its sent event
PIPELINE_COMMANDS = 1000
#: bytes of input in one pipeline, about; larger ones would only occupy memory here and in Redis' buffers
PIPELINE_BYTES = 4 * 1024**2
#: keys Redis looks at for one step of `Broker.queued`: about a millisecond, in which it does nothing else
SCAN_KEYS = 5000
#: characters of ``params`` that logs and Flower show
PARAMS_CHARS = 200


class Message:
    """One message of ``nograd.predict`` that is ready to go.

    Args:
        model: the model.
        wire: its input, encoded; with ``many`` a list of inputs.
        described: one line about it for logs and Flower.
        params: as in `nograd.tasks.predict`.
        many: as there.
        timeout_s: as there.
        expires_s: seconds after which no worker starts it.
        task_id: the id of the job; a new one if None.
        priority: Celery's, 0 is the highest.

    Raises:
        InvalidInput: if ``timeout_s`` is no time.
    """

    __slots__ = ("described", "expires_s", "id", "kwargs", "model", "priority", "size", "wire")

    def __init__(
        self,
        model: str,
        wire: Any,
        described: str,
        *,
        params: dict[str, Any] | None = None,
        many: bool = False,
        timeout_s: float | None = None,
        expires_s: float | None = None,
        task_id: str | None = None,
        priority: int = INTERACTIVE,
    ) -> None:
        self.model = model
        self.wire = wire
        self.described = described
        self.kwargs: dict[str, Any] = {"params": params} if params else {}
        if many:
            self.kwargs["many"] = True
        if timeout_s is not None:
            self.kwargs["timeout_s"] = _check_timeout(timeout_s)
        self.expires_s = expires_s
        self.priority = priority
        self.id = task_id or str(uuid4())
        self.size = wire_size(wire)

    @classmethod
    def of(cls, model: str, value: Any, wire: Any, **options: Any) -> Message:
        """The message of one input."""
        return cls(model, wire, describe(model, value), **options)


def _check_timeout(timeout_s: float) -> float:
    try:
        checked: float = msgspec.convert(timeout_s, TimeoutS)
    except msgspec.ValidationError:
        raise InvalidInput(f"timeout_s = {timeout_s!r}: expected a number of seconds above 0") from None
    return checked


def wire_size(wire: Any) -> int:
    """About how many bytes an encoded input takes in a message: exact enough to bound memory, and cheap."""
    if isinstance(wire, str):
        return len(wire)
    if isinstance(wire, dict):
        return sum(len(key) + wire_size(value) for key, value in wire.items())
    if isinstance(wire, list):
        if wire and isinstance(wire[0], list | dict | str):
            return sum(map(wire_size, wire))
        return 12 * len(wire)
    return 8


class Broker:
    """The Redis of one Celery app. Thread-safe: all state is in the app's pools.

    Messages are built and sent by Celery's own code, except that no result channel is subscribed: stock ``apply_async``
    subscribes one per job, which costs a round trip, memory in Redis, and 19 s when Redis is away (measured).
    """

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.address = address_of(app.conf.broker_write_url)

    def publish(self, message: Message) -> None:
        """Send one message.

        Raises:
            BrokerUnavailable: if Redis does not take it.
        """
        with self.errors(), self.app.producer_pool.acquire(block=True) as producer:
            self._send(producer, message)

    def publish_many(self, messages: Iterable[Message]) -> None:
        """Send messages through one pipeline, flushed at every `PIPELINE_COMMANDS` or `PIPELINE_BYTES`.

        Raises:
            BrokerUnavailable: if Redis fails. What was flushed before is sent; of the last flush nobody knows.
        """
        with (
            self.errors(),
            self.app.producer_pool.acquire(block=True) as producer,
            producer.batch(max_size=PIPELINE_COMMANDS) as batch,
        ):
            waiting = 0
            for message in messages:
                # No retry inside a pipeline: kombu could not tell what of it was done.
                self._send(producer, message, retry=False)
                waiting += message.size
                if waiting >= PIPELINE_BYTES:
                    batch.flush()
                    waiting = 0

    def outcomes(self, job_ids: Sequence[str]) -> list[Outcome]:
        """How far jobs are, in one round trip.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        backend = self.app.backend
        with self.errors():
            stored = backend.client.mget([backend.get_key_for_task(job_id) for job_id in job_ids])
        return [self._decode(payload) for payload in stored]

    def forget(self, job_ids: Sequence[str]) -> None:
        """Remove results from Redis.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        if job_ids:
            with self.errors():
                self.app.backend.client.delete(*map(self.app.backend.get_key_for_task, job_ids))

    def revoke(self, job_ids: Sequence[str]) -> None:
        """Tell all workers not to run these jobs, also those that start later; those on a device end as they would.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        if job_ids:
            self._ping()
            with self.errors():
                # Written down first: a worker that is just connecting reads it, or listens already.
                with contextlib.suppress(redis.ResponseError):  # a Redis that is full; those that are up hear it
                    cancelled.remember(self.app.backend.client, job_ids)
                self.app.control.revoke(list(job_ids))

    def cards(self) -> dict[str, registry.ModelCard]:
        """The models workers have registered.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        with self.errors():
            return registry.known(self.app.backend.client)

    def waiting(self, models: Iterable[str]) -> dict[str, int]:
        """How many messages wait in the queue of each model.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        models = list(models)
        with self.errors(), self.app.backend.client.pipeline(transaction=False) as pipe:
            for model in models:
                for suffix in PRIORITY_SUFFIXES:
                    pipe.llen(queue_name(model) + suffix)
            counts = iter(pipe.execute())
        return {model: sum(next(counts) for _ in PRIORITY_SUFFIXES) for model in models}

    def queued(self) -> list[str]:
        """The models in whose queues messages wait, known or not. Looks through all keys of Redis: for people.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        with self.errors():
            lists = self.app.backend.client.scan_iter(match=queue_name("*"), count=SCAN_KEYS, _type="list")
            names = {key.decode(errors="replace").split(PRIORITY_SEPARATOR)[0] for key in lists}
        return sorted(name.removeprefix(queue_name("")) for name in names)

    def workers(self, timeout_s: float = 1.0, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """The workers that answer within ``timeout_s`` seconds, by name, with what their pools tell of themselves.

        Args:
            timeout_s: seconds they have.
            names: whom to ask, without waiting longer than for these; all if None.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        self._ping()
        with self.errors():
            limit = None if names is None else len(names)
            stats = self.app.control.inspect(names and list(names), timeout=timeout_s, limit=limit).stats() or {}
        return {name: stats[name].get("pool") or {} for name in sorted(stats)}

    def command(
        self, name: str, arguments: dict[str, Any], workers: Sequence[str] | None = None, timeout_s: float = 1.0
    ) -> dict[str, dict[str, Any]]:
        """Send workers a remote command (`nograd.tasks.remote`); the answers within ``timeout_s`` seconds, by worker.

        Args:
            name: of the command.
            arguments: of the command.
            workers: who shall do it; all if None.
            timeout_s: seconds workers have to answer.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        self._ping()
        with self.errors():
            replies = self.app.control.broadcast(
                name,
                arguments=arguments,
                destination=None if workers is None else list(workers),
                reply=True,
                timeout=timeout_s,
                limit=None if workers is None else len(workers),
            )
        return {worker: reply for each in replies or () for worker, reply in each.items()}

    def answers(self) -> bool:
        """Whether any worker consumes: one that has registered its models may still be a second from it.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        self._ping()
        with self.errors():
            return bool(self.app.control.ping(timeout=1.0, limit=1))

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what Celery, kombu and redis-py raise inside into `BrokerUnavailable`, naming the host."""
        try:
            yield
        except (OperationalError, BatchPublishError, redis.RedisError, OSError) as err:
            cause = err.__cause__ if isinstance(err.__cause__, redis.RedisError) else err
            uncertain = " (some of these jobs may have been accepted)" if isinstance(err, BatchPublishError) else ""
            if _refused(err):  # three tracebacks of three libraries would say no more
                raise BrokerUnavailable(
                    f"no Redis at {self.address} (connection refused){uncertain}: start one with "
                    "`nograd up --models FILE`, or name another with --redis URL or NOGRAD_REDIS_URL"
                ) from None
            raise BrokerUnavailable(f"Redis at {self.address}: {cause or type(cause).__name__}{uncertain}") from err

    def _ping(self) -> None:
        # A remote control message waits 6 s for a Redis that is away (measured); this asks first.
        with self.errors():
            self.app.backend.client.ping()

    def _send(self, producer: Any, message: Message, **options: Any) -> None:
        amqp, queue = self.app.amqp, queue_name(message.model)
        parent = self.app.current_worker_task  # a job sent from inside a task belongs to its family, as in Celery
        task = amqp.create_task_message(
            message.id,
            PREDICT_TASK,
            [message.model, message.wire],
            message.kwargs,
            expires=message.expires_s,
            create_sent_event=self.app.conf.task_send_sent_event,
            root_id=parent and (parent.request.root_id or parent.request.id),
            parent_id=parent and parent.request.id,
            # Without these the first kilobyte of the user's data stands in logs, events and Flower.
            argsrepr=message.described,
            kwargsrepr=_short(message.kwargs),
        )
        amqp.send_task_message(producer, PREDICT_TASK, task, queue=queue, priority=message.priority, **options)

    def _decode(self, payload: bytes | None) -> Outcome:
        if not payload:
            return PENDING
        try:
            return read_outcome(self.app.backend.decode(payload))
        except Exception as err:  # noqa: BLE001 - whatever is stored there, its waiters get an answer
            return Outcome(states.FAILURE, error=JobError(f"the stored result cannot be read: {err}"))


def _refused(err: BaseException | None) -> bool:
    """Whether nobody listens there: what lies at the bottom of an error of kombu or redis-py."""
    while err is not None and not isinstance(err, ConnectionRefusedError):
        err = err.__cause__ or err.__context__
    return err is not None


def address_of(url: str) -> str:
    """Host and port of a Redis URL (all of them for Sentinel), or its socket; never the password."""
    parts = [urlsplit(part) for part in url.split(";")]
    return ", ".join(part.path if not part.hostname else f"{part.hostname}:{part.port or 6379}" for part in parts)


def _short(kwargs: dict[str, Any]) -> str:
    shown = repr(kwargs) if kwargs else "{}"
    return shown if len(shown) <= PARAMS_CHARS else shown[: PARAMS_CHARS - 1] + "…"
