"""The client: submits jobs and hands out their results. Needs neither torch nor numpy."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias

import msgspec

from nograd.tasks import Settings, app, create_app
from nograd.tasks.errors import BackfillError, BrokerUnavailable, ConfigError, InvalidInput, NogradError, UnknownModel
from nograd.tasks.hints import did_you_mean
from nograd.tasks.keys import BULK, INTERACTIVE
from nograd.tasks.modelfile import load_model_file
from nograd.tasks.payloads import encode_input
from nograd.tasks.registry import ModelCard
from nograd.tasks.settings import check_redis_url

from .broker import Broker, Message
from .job import Job
from .packing import PACK_ITEMS, Pack, Window, pack
from .watcher import Watcher

if TYPE_CHECKING:
    from celery import Celery

    from nograd.tasks.modelfile import InputKind

    from .backfill.backfill import Backfill
    from .backfill.planning import Request, Source

#: seconds the models found in Redis are believed; a name that is not among them is always looked up again
REGISTRY_CACHE_S = 5.0
#: inputs of an iterator that `Client.submit_many` encodes, checks and sends at a time
SUBMIT_CHUNK = 1000
#: packs in flight in `Client.map` unless the caller says otherwise: what a few workers hold, so that none runs dry
PACKS_IN_FLIGHT = 16
#: what `nograd.tasks.backfill.task.hints_of` makes
_BACKFILL_ID = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}")


#: what callers may say of a job, and Celery's priority for it
PRIORITIES: Final = {"interactive": INTERACTIVE, "bulk": BULK}
Priority: TypeAlias = Literal["interactive", "bulk"]


class Client:
    """Submits jobs to the workers behind one Redis.

    Thread-safe, and usable with ``with``. It holds connections only while it is used, and one thread while somebody
    waits for results.

    Args:
        redis_url: the Redis; that of the environment (``NOGRAD_REDIS_URL``) if None.
        models: a model file whose models are known even before a worker has registered them; ``NOGRAD_MODELS`` if None.

    Raises:
        ConfigError: if the URL or the model file is wrong.
    """

    def __init__(self, redis_url: str | None = None, *, models: str | Path | None = None) -> None:
        settings = Settings.from_env()
        self._owns_app = redis_url is not None
        self.app: Celery = app
        if redis_url is not None:
            self.app = create_app(dataclasses.replace(settings, redis_url=check_redis_url(redis_url, "redis_url")))
        self.broker = Broker(self.app)
        path = models or settings.models
        self._file_cards = _cards_of_file(Path(path)) if path else {}
        self._registry_cards: dict[str, ModelCard] = {}
        self._registry_read_at = float("-inf")
        self._watcher = Watcher(self.broker.outcomes)

    def submit(
        self,
        model: str,
        input: Any,  # noqa: A002 - the word of the contract
        *,
        params: dict[str, Any] | None = None,
        timeout_s: float | None = None,
        expires_s: float | None = None,
        task_id: str | None = None,
        priority: Priority = "interactive",
    ) -> Job:
        """Send one job; returns at once.

        Args:
            model: a known model.
            input: image: path, bytes or Pillow image; text: str; rows, tensor: lists, NumPy arrays or tensors.
            params: override the model's default parameters for this job.
            timeout_s: seconds from its arrival at a worker until it fails with `DeadlinePassed` if it has no
                prediction; the model's own ``timeout_s`` holds as well. Waiting in the queue does not count.
            expires_s: seconds after which no worker starts it any more.
            task_id: an id of the caller's; submitting again under one id gives a second job with that id.
            priority: ``"bulk"`` lets every interactive job go before it, also those that are sent later.

        Raises:
            UnknownModel: if no such model is known.
            InvalidInput: if the input or the parameters cannot be sent.
            ConfigError: if there is no such priority.
            BrokerUnavailable: if Redis does not take it.
        """
        wire = encode_input(input, self.card(model).input)
        params = _encode_params(params)
        options: dict[str, Any] = {"params": params, "expires_s": expires_s, "timeout_s": timeout_s, "task_id": task_id}
        message = Message.of(model, input, wire, priority=_priority(priority), **options)
        self.broker.publish(message)
        return self.job(message.id, model)

    def submit_many(
        self,
        model: str,
        inputs: Iterable[Any],
        *,
        params: dict[str, Any] | None = None,
        timeout_s: float | None = None,
        expires_s: float | None = None,
        priority: Priority = "interactive",
    ) -> list[Job]:
        """Send one job for each input, pipelined.

        A list, tuple or array is encoded and checked as a whole before anything is sent: one bad input, and no job
        exists. Any other iterable is taken `SUBMIT_CHUNK` inputs at a time, so that it may be larger than memory; if an
        input in a later chunk is bad, or Redis fails, the jobs sent so far are revoked before the error is raised.

        Raises:
            UnknownModel: if no such model is known.
            InvalidInput: for the first input that cannot be sent, by its index.
            ConfigError: if there is no such priority.
            BrokerUnavailable: if Redis fails. Some jobs of the last chunk may have been accepted (a list is one chunk);
                the message says how many were before.
        """
        _check_many(inputs)
        kind = self.card(model).input
        options: dict[str, Any] = {"params": _encode_params(params), "timeout_s": timeout_s, "expires_s": expires_s}
        options["priority"] = _priority(priority)
        sized = hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")
        numbered = enumerate(inputs)
        jobs: list[Job] = []
        while chunk := list(numbered if sized else itertools.islice(numbered, SUBMIT_CHUNK)):
            try:
                messages = [Message.of(model, value, _encode(index, value, kind), **options) for index, value in chunk]
            except InvalidInput:
                self._revoke([job.id for job in jobs])
                raise
            try:
                self.broker.publish_many(messages)
            except BrokerUnavailable as err:
                # Of this chunk nobody knows which were accepted; to revoke one that was not does no harm.
                revoked = self._revoke([job.id for job in jobs] + [message.id for message in messages])
                raise BrokerUnavailable(_accepted(err, len(jobs), revoked=revoked)) from err.__cause__
            jobs += [self.job(message.id, model) for message in messages]
        return jobs

    def map(
        self,
        model: str,
        inputs: Iterable[Any],
        *,
        params: dict[str, Any] | None = None,
        batch: int | None = None,
        max_in_flight: int | None = None,
        return_exceptions: bool = False,
        timeout: float | None = None,
        timeout_s: float | None = None,
        priority: Priority = "interactive",
    ) -> Iterator[Any]:
        """Predict any number of inputs; predictions come in the order of the inputs, as they are ready.

        Inputs travel packed, many in one message, and are read only as fast as predictions are taken. Close the
        iterator (or drop it) to stop: what is still waiting is revoked.

        Args:
            model: a known model.
            inputs: as in `submit`; may be endless.
            params: override the model's default parameters.
            batch: inputs in one message at most; by default as many as the model batches, 64 at most.
            max_in_flight: inputs sent and not answered yet, at most; by default 16 messages full.
            return_exceptions: give the error of a failed input in its place instead of raising it.
            timeout: seconds to wait for one message's answer; None for ever.
            timeout_s: of each message, as in `submit`.
            priority: as in `submit`.

        Raises:
            UnknownModel: at once, if no such model is known.
            ConfigError: at once, if there is no such priority.
            JobError: in the place of an input that failed, naming its index, unless ``return_exceptions``.
            ResultTimeout: if an answer takes longer than ``timeout``.
            BrokerUnavailable: if Redis fails.
        """
        _check_many(inputs)
        card = self.card(model)
        items = batch or min(card.max_items, PACK_ITEMS)
        limit = max_in_flight or PACKS_IN_FLIGHT * items
        params, rank = _encode_params(params), _priority(priority)
        packs = pack(inputs, card.input, min(items, limit))
        options: dict[str, Any] = {"timeout_s": timeout_s, "priority": rank}
        window = Window(packs, lambda full: self._send(full.message(model, params, **options)), limit)
        return self._map(window, timeout, return_exceptions=return_exceptions)

    def result(self, job_id: str, timeout: float | None = None) -> Any:
        """Wait for the prediction of a job, at most ``timeout`` seconds.

        Raises:
            JobError: the error of the job, by its type.
            ResultTimeout: if it has no outcome yet.
            BrokerUnavailable: if Redis does not answer.
        """
        return self.job(job_id).result(timeout)

    def job(self, job_id: str, model: str | None = None) -> Job:
        """The job with an id, sent by whomever. Asks nobody: an unknown id is a job that stays PENDING."""
        return Job(job_id, model, self.broker, self._watcher)

    def models(self) -> dict[str, ModelCard]:
        """All known models: those of the model file, and those workers have registered in Redis.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        registered = dict(self._registered(max_age_s=0))
        named = {
            name: card if (seen := registered.get(name)) is None else _seen(card, seen)
            for name, card in self._file_cards.items()
        }
        return {**registered, **named}

    def card(self, model: str) -> ModelCard:
        """What is known of a model. The model file is believed before Redis.

        Raises:
            UnknownModel: if nothing is, listing the known ones.
            BrokerUnavailable: if the model file does not name it and Redis does not answer.
        """
        card = self._file_cards.get(model) or self._registered(REGISTRY_CACHE_S).get(model)
        if card is None:
            card = self._registered(max_age_s=0).get(model)
        if card is None:
            raise UnknownModel(_unknown(model, sorted({*self._file_cards, *self._registry_cards})))
        return card

    def backfill(
        self,
        model: str,
        source: Source,
        out: str | Path,
        *,
        error_budget: str | float | None = None,
        **options: Any,
    ) -> Backfill:
        """A backfill of a folder; nothing happens before `Backfill.run`, `Backfill.start` or `Backfill.plan`.

        Args:
            model: a known model.
            source: a file, folder, glob or URL, ``@file`` for a list of those, or several of them.
            out: the output folder, a path or URL; workers write there, so it must be theirs, too.
            error_budget: failed rows at which it stops: ``"1%"``, ``0.01`` or ``100``; None for never, or, on a resume,
                as before.
            **options: as of `backfill_request`.

        Raises:
            ConfigError: for an unknown option or a wrong budget.
            InvalidInput: if the parameters cannot be sent.
            OutputError: if the output's protocol is not known.
        """
        from .backfill.backfill import Backfill

        return Backfill(self, out, self.backfill_request(model, source, **options), error_budget=error_budget)

    def backfill_request(
        self,
        model: str,
        source: Source,
        *,
        limit: int | None = None,
        sample: int | None = None,
        seed: int = 0,
        params: dict[str, Any] | None = None,
        **options: Any,
    ) -> Request:
        """What is to be scored, without saying whereto.

        Args:
            model: a known model.
            source: as of `backfill`.
            limit: only the first so many rows.
            sample: only so many rows at random out of those.
            seed: of the sample.
            params: override the model's default parameters.
            **options: ``id``, ``columns``, ``join``, ``kind``, ``options``, ``content``, ``allow_null``, ``output``,
                ``duplicates`` and ``rows_per_chunk``; see `nograd.producer.backfill.planning.Request`.

        Raises:
            ConfigError: for an unknown option.
            InvalidInput: if the parameters cannot be sent.
        """
        from nograd.tasks.backfill.plan import Selection

        from .backfill.planning import Request

        unknown = sorted(set(options) - {field.name for field in dataclasses.fields(Request)})
        if unknown:
            raise ConfigError(f"a backfill has no option {unknown[0]!r}")
        selection = Selection(limit=limit, sample=sample, seed=seed)
        return Request(model=model, source=source, selection=selection, params=_encode_params(params) or {}, **options)

    def backfill_at(self, out: str | Path, *, error_budget: str | float | None = None) -> Backfill:
        """The backfill of an output folder, whoever started it; or that with an id, while Redis remembers its folder.

        Raises:
            BackfillError: if it looks like an id, and Redis knows no such backfill.
            BrokerUnavailable: if it looks like an id, and Redis does not answer.
        """
        from nograd.tasks.backfill.window import Window

        from .backfill.backfill import Backfill

        if _BACKFILL_ID.fullmatch(str(out)) and not Path(out).exists():
            with self.broker.errors():
                found = Window(self.app.backend.client, str(out)).out
            if found is None:
                raise BackfillError(f"Redis knows no backfill {out}; name its output folder")
            out = found
        return Backfill(self, out, error_budget=error_budget)

    def close(self) -> None:
        """End the waiting thread and, if the client was made for a URL of its own, its connections."""
        self._watcher.close()
        if self._owns_app:
            self.app.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _registered(self, max_age_s: float) -> dict[str, ModelCard]:
        # Two threads may both read; each leaves a whole dict.
        if time.monotonic() - self._registry_read_at >= max_age_s:
            self._registry_cards = self.broker.cards()
            self._registry_read_at = time.monotonic()
        return self._registry_cards

    def _send(self, message: Message) -> Job:
        self.broker.publish(message)
        return self.job(message.id, message.model)

    def _map(self, window: Window, timeout: float | None, *, return_exceptions: bool) -> Iterator[Any]:
        index = 0
        try:
            window.fill()
            while (oldest := window.oldest()) is not None:
                outcomes = self._collect(oldest, timeout)
                window.drop_oldest()
                # Before anything is handed out: workers go on while the caller thinks.
                trouble = _trouble_of(window.fill)
                for outcome in outcomes:
                    if not isinstance(outcome, NogradError):
                        yield outcome
                    elif return_exceptions:
                        yield _at(index, outcome)
                    else:
                        raise _at(index, outcome)
                    index += 1
                if trouble is not None:
                    raise trouble
        finally:
            self._abandon(window.jobs())

    def _collect(self, sent: Pack, timeout: float | None) -> list[Any]:
        if sent.job is None:
            return list(sent.outcomes(None))
        outcome = sent.job.wait(timeout)
        with contextlib.suppress(BrokerUnavailable):  # what has been received is not lost with it; the result expires
            sent.job.forget()  # read once, by us; millions of inputs must not fill Redis
        return list(sent.outcomes(outcome))

    def _revoke(self, job_ids: Sequence[str]) -> bool:
        """Revoke jobs on the way out of an error; whether that was possible."""
        try:
            self.broker.revoke(job_ids)
        except BrokerUnavailable:
            return False
        return True

    def _abandon(self, jobs: Sequence[Job]) -> None:
        ids = [job.id for job in jobs]
        with contextlib.suppress(BrokerUnavailable):  # the reason for ending is already on its way to the caller
            self.broker.revoke(ids)
            self.broker.forget(ids)


def _trouble_of(call: Callable[[], None]) -> Exception | None:
    """What a call raises, for later."""
    try:
        call()
    except Exception as err:  # noqa: BLE001 - raised by the caller, in its turn
        return err
    return None


def _accepted(err: BrokerUnavailable, jobs: int, *, revoked: bool) -> str:
    if not jobs:
        return err.message
    return f"{err.message}; {jobs} jobs had been accepted before, and " + (
        "the workers were told to skip them" if revoked else "could not be revoked"
    )


def _encode(index: int, value: Any, kind: InputKind | None) -> Any:
    try:
        return encode_input(value, kind)
    except InvalidInput as err:
        raise _at(index, err) from err


def _encode_params(params: dict[str, Any] | None) -> dict[str, Any] | None:
    try:
        encoded: dict[str, Any] | None = encode_input(params, "json")
    except InvalidInput as err:
        raise InvalidInput(f"params: {err.message}") from err
    return encoded


def _priority(name: str) -> int:
    if not isinstance(name, str) or name not in PRIORITIES:
        raise ConfigError(f"priority = {name!r}: expected {' or '.join(map(repr, PRIORITIES))}")
    return PRIORITIES[name]


def _at(index: int, error: NogradError) -> NogradError:
    return type(error)(f"input {index}: {error.message}")


def _seen(card: ModelCard, registered: ModelCard) -> ModelCard:
    """A card of the model file with what only workers know of the model."""
    return msgspec.structs.replace(card, version=registered.version, seen_at=registered.seen_at)


def _cards_of_file(path: Path) -> dict[str, ModelCard]:
    return {name: ModelCard.of(name, spec) for name, spec in load_model_file(path).specs.items()}


def _unknown(model: str, known: list[str]) -> str:
    if not known:
        return f"unknown model {model!r}: no model file is given (NOGRAD_MODELS), and no worker has registered a model"
    return f"unknown model {model!r}.{did_you_mean(model, known)} Known models: {', '.join(known)}"


def _check_many(inputs: Any) -> None:
    if isinstance(inputs, str | bytes | bytearray | Path):
        raise InvalidInput(f"inputs is one {type(inputs).__name__}; give a list or an iterable of inputs")
