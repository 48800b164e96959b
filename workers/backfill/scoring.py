"""From the rows of a chunk to predictions, in order, with the device never waiting for them.

Laws:

* Every row that was read gets a prediction or a failure of its own, in its place. One bad row costs nobody else.
* The batches of a chunk follow from its rows alone, and from the rows left out because they kill workers: whoever runs
  it again, after whatever crash, runs the same batches.
* What is held at a time is a few batches: reading and preparing go no further ahead.
* Rows whose errors may pass (no memory left) are tried again by themselves at the end of the chunk.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from nograd.tasks.backfill.plan import SourceSpec
from nograd.tasks.backfill.rows import RowFailure, Slice, Stage
from nograd.tasks.errors import InvalidInput, NogradError, SourceError, UnknownModel, WorkerDied
from nograd.workers.engine import as_invalid
from nograd.workers.memory import OFTEN_S, trim
from nograd.workers.models import HostedModel
from nograd.workers.models.tensor_model import TensorModel
from nograd.workers.outputs import finish

from .block import Block
from .columns import input_of, numeric, to_array

#: batches on their way over the device at a time: one there, one that waits for it, one whose outputs are written
BLOCKS = 3


@dataclass(frozen=True, slots=True)
class Lead:
    """How far preparing rows goes ahead of the device.

    Attributes:
        slices: that are prepared before the last ones are on their way.
        blocks: batches on their way over the device.
    """

    slices: int
    blocks: int


#: for what must not wait while the CPU is at something else: a GPU, or whatever else a forward waits for
FAR = Lead(3, BLOCKS)
#: for a CPU, which can prepare or run, and gains nothing by more: a worker holds up to two chunks' rows
NEAR = Lead(0, 2)

#: prepared rows that wait for company, in batches: of images that all have a size of their own, most would wait
GROUPED = 16
#: seconds before rows whose errors may pass are tried again, in turn
AGAIN_S = (1.0, 4.0)
#: pieces of a slice that threads prepare by turns
_SHARES = 8

Failures: TypeAlias = dict[int, RowFailure]


def lead_for(model: HostedModel) -> Lead:
    """How far to go ahead of a loaded model: `NEAR` if its weights, all of them, are on the CPU.

    A model without weights of torch's may run anywhere (another library on a GPU, a service elsewhere), and while it
    waits for that the CPU is free.
    """
    places = {weight.device.type for module in model.modules() for weight in module.parameters()}
    return NEAR if places == {"cpu"} else FAR


@dataclass(frozen=True, slots=True)
class Scored:
    """A slice with its predictions, as `PartWriter.add` takes it."""

    piece: Slice
    predictions: Sequence[Any] | np.ndarray[Any, Any]
    failures: Failures


@dataclass(frozen=True, slots=True)
class Device:
    """What scoring needs of the worker.

    Attributes:
        submit: sends a block to the device.
        check: called often; raises to give the chunk up.
        block: makes a block of prepared rows.
        note: called before rows of the chunk are prepared or run: the first one's position, and how many are under way
            from there on.
        guard: the time limit of the model for one row's preparation or ``finish``, given the word for it.
        lead: how far ahead of it rows are prepared one by one.
    """

    submit: Callable[[Block], None]
    check: Callable[[], None]
    block: Callable[[Sequence[Any]], Block]
    note: Callable[[int, int], None]
    guard: Callable[[str], AbstractContextManager[None]]
    lead: Lead = FAR

    def wait(self, block: Block) -> Block:
        """Wait for a block, checking meanwhile.

        Raises:
            UnknownModel: if its model was unloaded.
        """
        while not block.wait(0.25):
            self.check()
        if block.dropped:
            raise UnknownModel("the model was unloaded")
        return block


class Scorer(Protocol):
    """Turns slices into scored slices, in order."""

    def score(self, slices: Iterable[Slice]) -> Iterator[Scored]:
        """Score the rows of a chunk.

        Raises:
            SourceError: if inputs cannot be read for a reason no row is to blame for.
        """


def scorer_for(
    model: HostedModel,
    source: SourceSpec,
    params: Mapping[str, Any],
    device: Device,
    threads: ThreadPoolExecutor,
    *,
    batch_rows: int,
    killers: Collection[int] = (),
) -> Scorer:
    """The scorer for a model and a source.

    Args:
        model: a loaded model.
        source: what is read.
        params: of the run, over the model's own.
        device: of this worker.
        threads: where rows are prepared.
        batch_rows: rows of a batch at most.
        killers: positions in the chunk of rows that are left out because workers died over them.
    """
    setup = _Setup(model, source, model.settings(params), device, threads, batch_rows, frozenset(killers))
    # With a limit of cost, or rows to be left out, each row counts by itself.
    whole = model.spec.batch.max_cost is None and not killers
    if whole and isinstance(model, TensorModel) and model.takes_rows and numeric(source):
        return _Columns(model, setup)
    return _Objects(setup)


@dataclass(frozen=True, slots=True)
class _Setup:
    """See `scorer_for`."""

    model: HostedModel
    source: SourceSpec
    params: Mapping[str, Any]
    device: Device
    threads: ThreadPoolExecutor
    batch_rows: int
    killers: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Blame:
    """Makes the failure of a row.

    Attributes:
        id: the column that names rows.
    """

    id: str

    def __call__(self, piece: Slice, good: int, stage: Stage, error: NogradError) -> RowFailure:
        """Why the ``good``-th good row of a slice failed."""
        at = int(piece.good_indices[good]) if piece.failures else good
        return RowFailure(
            row=piece.rows[at].as_py(),
            id=piece.batch.column(self.id)[at].as_py(),
            stage=stage,
            type=error.code,
            message=error.message,
        )


class _Columns:
    """Numbers: each slice is one array, one block, one array of predictions."""

    def __init__(self, model: TensorModel, setup: _Setup) -> None:
        self._model = model
        self._columns = setup.source.columns
        self._scalars = model.spec.kind == "tensor"
        self._blame = _Blame(setup.source.id)
        self._params = setup.params
        self._device = setup.device
        # The columns' own notes cover these rows.
        self._others = _Objects(replace(setup, device=replace(setup.device, note=lambda *_: None)))

    def score(self, slices: Iterable[Slice]) -> Iterator[Scored]:
        under_way: deque[tuple[Slice, Block | None, dict[int, InvalidInput], np.ndarray[Any, Any]]] = deque()
        for piece in slices:
            self._device.check()
            first = under_way[0][0].position if under_way else piece.position
            self._device.note(first, piece.position + len(piece) - first)
            under_way.append((piece, *self._send(piece)))
            if len(under_way) >= BLOCKS:
                yield self._collect(*under_way.popleft())
        while under_way:
            yield self._collect(*under_way.popleft())

    def _send(self, piece: Slice) -> tuple[Block | None, dict[int, InvalidInput], np.ndarray[Any, Any]]:
        good = piece.good
        nobody: np.ndarray[Any, Any] = np.arange(0)
        if not good.num_rows:
            return None, {}, nobody
        array = to_array(good, self._columns, scalars=self._scalars)
        try:
            if array is None:
                raise InvalidInput("the lists of a batch are of different lengths")
            tensor, wrong = self._model.prepare_rows(array)
        except InvalidInput:
            # Not all alike: each row by itself knows what is wrong with it.
            return None, {-1: InvalidInput("")}, nobody
        kept = np.delete(np.arange(len(tensor)), list(wrong)) if wrong else np.arange(len(tensor))
        if not len(kept):
            return None, wrong, kept
        block = self._device.block(tensor[torch.from_numpy(kept)] if wrong else tensor)  # type: ignore[arg-type]
        self._device.submit(block)
        return block, wrong, kept

    def _collect(
        self, piece: Slice, block: Block | None, wrong: dict[int, InvalidInput], kept: np.ndarray[Any, Any]
    ) -> Scored:
        if -1 in wrong:
            return next(iter(self._others.score([piece])))
        rows = len(kept) + len(wrong)
        failures = {i: self._blame(piece, i, "prepare", err) for i, err in wrong.items()}
        if block is None:
            return Scored(piece, [None] * rows, failures)
        self._device.wait(block)
        together = self._together(block)
        if together is not None and not wrong:
            return Scored(piece, together, failures)
        if together is not None:
            scattered = np.zeros((rows, *together.shape[1:]), together.dtype)
            scattered[kept] = together
            return Scored(piece, scattered, failures)
        values: list[Any] = [None] * rows
        for index, outcome in enumerate(_each(self._model, block, self._params, self._device)):
            if isinstance(outcome, NogradError):
                failures[int(kept[index])] = self._blame(piece, int(kept[index]), "predict", outcome)
            else:
                values[kept[index]] = outcome
        return Scored(piece, values, failures)

    def _together(self, block: Block) -> np.ndarray[Any, Any] | None:
        """The predictions as one array, if they are numbers and all is well."""
        if len(block.segments) != 1 or not isinstance(block.segments[0][2], torch.Tensor):
            return None
        return self._model.finish_rows(block.segments[0][2])


def _each(model: HostedModel, block: Block, params: Mapping[str, Any], device: Device) -> Iterator[Any]:
    """For each row of a block its prediction, or its error."""
    for start, stop, outputs in block.segments:
        if isinstance(outputs, NogradError):
            yield from [outputs] * (stop - start)
            continue
        for output in outputs:
            with device.guard("finish"):
                outcome = finish(model, output, params)
            yield outcome.value if outcome.error is None else outcome.error


@dataclass(slots=True, eq=False)
class _Pending:
    """A slice whose rows are under way."""

    piece: Slice
    left: int
    predictions: list[Any]
    failures: Failures = field(default_factory=dict)
    prepared: list[Future[list[tuple[int, Any]]]] = field(default_factory=list)

    def fail(self, index: int, why: RowFailure) -> None:
        """A row has its end."""
        self.failures[index] = why
        self.left -= 1


@dataclass(frozen=True, slots=True)
class _Row:
    """A prepared row on its way."""

    pending: _Pending
    index: int
    prepared: Any


@dataclass(slots=True)
class _Group:
    """Rows that will share a batch."""

    rows: list[_Row] = field(default_factory=list)
    dearest: int = 0

    def cost_with(self, cost: int) -> int:
        """Padded cost, with one more row."""
        return (len(self.rows) + 1) * max(self.dearest, cost)


class _Objects:
    """Anything else: each row is prepared by itself, and batched with rows of its bucket as they come.

    What has not filled a batch by the end of the chunk runs then; so padding is bounded by the buckets, and memory by
    a batch of each.
    """

    def __init__(self, setup: _Setup) -> None:
        self._model = setup.model
        self._input = input_of(setup.source, setup.model.spec.kind)
        self._blame = _Blame(setup.source.id)
        self._params = setup.params
        self._device = setup.device
        self._threads = setup.threads
        self._batch_rows = setup.batch_rows
        self._max_cost = setup.model.spec.batch.max_cost
        self._killers = setup.killers
        self._order: deque[_Pending] = deque()
        self._ahead: deque[_Pending] = deque()
        self._groups: dict[Hashable, _Group] = {}
        self._grouped = 0  # rows in them
        self._blocks: deque[tuple[Block, list[_Row]]] = deque()
        self._again: list[_Row] = []
        self._tries = 0

    def score(self, slices: Iterable[Slice]) -> Iterator[Scored]:
        for piece in slices:
            self._device.check()
            self._begin(piece)
            while len(self._ahead) > self._device.lead.slices:
                self._batch(self._ahead.popleft())
            yield from self._finished()
        while self._ahead:
            self._batch(self._ahead.popleft())
        for bucket in list(self._groups):
            self._send_group(bucket)
        self._settle(0)
        self._try_again()
        yield from self._finished()

    def _begin(self, piece: Slice) -> None:
        """Have a slice prepared."""
        good = piece.good_indices.tolist()
        pending = _Pending(piece, len(good), [None] * len(good))
        for index, at in enumerate(good):
            if piece.position + at in self._killers:
                pending.fail(index, self._blame(piece, index, "crash", WorkerDied("workers died over this row")))
        self._order.append(pending)
        self._ahead.append(pending)
        first = self._order[0].piece.position
        self._device.note(first, piece.position + len(piece) - first)
        indices = [index for index in range(len(good)) if index not in pending.failures]
        step = max(1, -(-len(indices) // _SHARES))
        for start in range(0, len(indices), step):
            pending.prepared.append(self._threads.submit(self._prepare, piece, good, indices[start : start + step]))

    def _prepare(self, piece: Slice, good: Sequence[int], indices: Sequence[int]) -> list[tuple[int, Any]]:
        """The prepared rows with bucket and cost, or the errors of those that cannot be; on a thread."""
        found: list[tuple[int, Any]] = []
        for index in indices:
            try:
                with self._device.guard("the preparation"):
                    prepared = self._model.prepare(self._input(piece.batch, good[index]), self._params)
                    found.append((index, (prepared, self._model.bucket(prepared), self._model.cost(prepared))))
            except SourceError:
                raise
            except BaseException as err:  # noqa: BLE001 - a model's own code; its row fails
                found.append((index, as_invalid(err)))
        return found

    def _batch(self, pending: _Pending) -> None:
        """Put the prepared rows of a slice into their groups; send what is full."""
        for future in pending.prepared:
            for index, found in self._result(future):
                if isinstance(found, NogradError):
                    pending.fail(index, self._blame(pending.piece, index, "prepare", found))
                    continue
                prepared, bucket, cost = found
                group = self._groups.setdefault(bucket, _Group())
                if self._max_cost and group.rows and group.cost_with(cost) > self._max_cost:
                    self._send_group(bucket)
                    group = self._groups[bucket] = _Group()
                group.rows.append(_Row(pending, index, prepared))
                group.dearest = max(group.dearest, cost)
                self._grouped += 1
                if len(group.rows) >= self._batch_rows:
                    self._send_group(bucket)
                while self._grouped > GROUPED * self._batch_rows:
                    self._send_group(next(iter(self._groups)))  # the oldest, whatever it has
        pending.prepared.clear()

    def _result(self, future: Future[list[tuple[int, Any]]]) -> list[tuple[int, Any]]:
        while True:
            try:
                return future.result(0.25)
            except TimeoutError:
                self._device.check()

    def _send_group(self, bucket: Hashable) -> None:
        rows = self._groups.pop(bucket).rows
        self._grouped -= len(rows)
        self._send(rows)

    def _send(self, rows: list[_Row]) -> None:
        block = self._device.block([row.prepared for row in rows])
        self._blocks.append((block, rows))
        self._device.submit(block)
        self._settle(self._device.lead.blocks - 1)

    def _settle(self, most: int) -> None:
        """Wait until so few blocks are under way."""
        while len(self._blocks) > most:
            block, rows = self._blocks.popleft()
            self._device.wait(block)
            for row, outcome in zip(rows, _each(self._model, block, self._params, self._device), strict=True):
                self._take(row, outcome)
            del block, rows
            trim(OFTEN_S)

    def _take(self, row: _Row, outcome: Any) -> None:
        pending = row.pending
        if not isinstance(outcome, NogradError):
            pending.predictions[row.index] = outcome
            pending.left -= 1
        elif outcome.retryable and self._tries < len(AGAIN_S):
            self._again.append(row)
        else:
            pending.fail(row.index, self._blame(pending.piece, row.index, "predict", outcome))

    def _try_again(self) -> None:
        for pause_s in AGAIN_S:
            rows, self._again = self._again, []
            if not rows:
                break
            self._tries += 1
            self._pause(pause_s)
            for row in rows:
                self._send([row])
            self._settle(0)
        self._tries = 0

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._device.check()
            time.sleep(min(0.25, left))

    def _finished(self) -> Iterator[Scored]:
        """The slices that are complete, in order."""
        while self._order and not self._order[0].left:
            pending = self._order.popleft()
            yield Scored(pending.piece, pending.predictions, pending.failures)
