"""The commit: how the rows of one chunk become part of the output, once.

Four steps, each durable before the next begins::

    stage    _staging/<uuid>            the part, and the error rows if there are any
    record   _commits/000123.json       created, never replaced: **this decides**
    settle   parts/…, errors/…          what the record names gets its final name
    sweep    _staging/<uuid>            a loser removes what it staged

Laws:

* A chunk is done if and only if its record exists. The first record wins; a later attempt, and one that slept through
  its own replacement, loses and harms nothing.
* Under ``parts/`` and ``errors/`` stands only what a record names, and part and errors are always of one attempt.
* A crash between any two steps leaves either nothing anybody reads, or a record whose files the next who looks
  (`commit` of the same chunk, `settle_all`) puts in place.

The record comes before the final names because it is *one* decision over two files. With the part in place first, the
next attempt would have to guess whether its owner still lives, and could pair one attempt's part with another's errors.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from nograd.tasks.errors import BackfillError, OutputFull
from nograd.tasks.structs import decodable

from . import layout
from .plan import Plan, encode
from .store import Store


class FileRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file a commit made.

    Attributes:
        name: where it stands.
        staged: where it stood before; the redo of a crash needs it.
        bytes: its size.
        sha256: of its content.
    """

    name: str
    staged: str
    bytes: int
    sha256: str


@decodable
class CommitRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """That a chunk is done, and by whom.

    Attributes:
        plan: sha256 of the plan.
        chunk: which chunk.
        attempt: names the attempt; no two have the same.
        rows_ok: rows in the part.
        rows_err: rows in the errors file.
        part: the predictions.
        errors: the failed rows, None if there are none.
        started_at: when the attempt began, seconds since the epoch.
        ended_at: when it was committed.
        worker: who ran it.
        deviations: in what the attempt was not run as planned: a split batch, another version of a library.
    """

    plan: str
    chunk: int
    attempt: str
    rows_ok: int
    rows_err: int
    part: FileRef
    errors: FileRef | None = None
    started_at: float
    ended_at: float
    worker: str
    deviations: list[str] = []


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk came to, not yet committed. `output.PartWriter` makes it.

    Attributes:
        data: the bytes of the part.
        errors: the bytes of the errors file, empty if there is no failed row.
        rows_ok: rows in the one.
        rows_err: rows in the other.
    """

    data: bytes | memoryview
    errors: bytes
    rows_ok: int
    rows_err: int


class Committed(NamedTuple):
    """The outcome of an attempt.

    Attributes:
        won: whether it is this attempt's rows that stand there now.
        record: the record of the chunk, whoever wrote it.
    """

    won: bool
    record: CommitRecord


def commit(
    store: Store,
    plan: Plan,
    chunk: int,
    part: Part,
    *,
    started_at: float,
    ended_at: float,
    worker: str,
    deviations: Sequence[str] = (),
) -> Committed:
    """Make a chunk part of the output, unless it already is.

    Raises:
        OutputFull: if there is no room. Nothing is committed, unless the record was already written: then the chunk is
            done, and its files get their names when somebody looks again.
        OutputError: if the store refuses otherwise.
    """
    done = settled(store, plan, chunk)
    if done is not None:
        return Committed(won=False, record=done)
    staged: list[str] = []
    try:
        files = [_stage(store, layout.part_name(chunk, plan.output.extension), part.data, staged)]
        if part.errors:
            files.append(_stage(store, layout.errors_name(chunk), part.errors, staged))
    except BaseException:
        _remove(store, staged)
        raise
    record = CommitRecord(
        plan=plan.sha256,
        chunk=chunk,
        attempt=uuid.uuid4().hex,
        rows_ok=part.rows_ok,
        rows_err=part.rows_err,
        part=files[0],
        errors=files[1] if part.errors else None,
        started_at=started_at,
        ended_at=ended_at,
        worker=worker,
        deviations=list(deviations),
    )
    try:
        won = store.create(layout.commit_name(chunk), encode(record))
    except OutputFull:
        if find_record(store, plan, chunk) is None:
            _remove(store, staged)
        raise
    # Any other failure leaves open whether the record stands: what it may name must stay. `sweep` comes at the end.
    if not won:
        _remove(store, staged)
        record = _existing(store, plan, chunk)
    settle(store, record)
    return Committed(won=won, record=record)


def find_record(store: Store, plan: Plan, chunk: int) -> CommitRecord | None:
    """The record of a chunk, None while it is not done.

    Raises:
        BackfillError: if it belongs to another plan or cannot be read.
    """
    name = layout.commit_name(chunk)
    try:
        raw = store.read(name)
    except FileNotFoundError:
        return None
    try:
        record = msgspec.json.decode(raw, type=CommitRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise BackfillError(f"{store.url}/{name} is not a commit record: {err}") from err
    if record.plan != plan.sha256 or record.chunk != chunk:
        raise BackfillError(f"{store.url}/{name} belongs to plan {record.plan[:12]}, not to {plan.job}")
    return record


def settled(store: Store, plan: Plan, chunk: int) -> CommitRecord | None:
    """The record of a chunk, its files in place; None while it is not done. Ask before running a chunk."""
    record = find_record(store, plan, chunk)
    if record is not None:
        settle(store, record)
    return record


def settle(store: Store, record: CommitRecord) -> None:
    """Put the files of a record in place, where a crash has kept its writer from doing so."""
    for file in (record.part, record.errors):
        if file is not None and (store.size(file.name) != file.bytes or store.size(file.staged) is not None):
            store.settle(file.staged, file.name, file.bytes)


def settle_all(store: Store, plan: Plan) -> int:
    """Put the files of all records in place; of how many that had not been done. For a resume and for the end."""
    staged = {f"{layout.STAGING}/{name}" for name in store.names(layout.STAGING)}
    open_ones = 0
    for record in records(store, plan) if staged else ():
        if staged & {record.part.staged, record.errors.staged if record.errors else ""}:
            settle(store, record)
            open_ones += 1
    return open_ones


def records(store: Store, plan: Plan, known: frozenset[int] | set[int] = frozenset()) -> Iterator[CommitRecord]:
    """The records that exist, in the order of the chunks, without those of known chunks."""
    for chunk in committed_chunks(store):
        if chunk not in known:
            record = find_record(store, plan, chunk)
            if record is not None:
                yield record


def committed_chunks(store: Store) -> list[int]:
    """Which chunks are done: one listing, no record is read."""
    chunks = (layout.chunk_of(name) for name in store.names(layout.COMMITS) if name.endswith(".json"))
    return sorted(chunk for chunk in chunks if chunk is not None)


def sweep(store: Store) -> int:
    """Remove what lost, and what was left by those who died; how many files.

    Only when every chunk is done and settled: whoever still runs one loses, and what it staged is nobody's.
    """
    names = store.names(layout.STAGING)
    for name in names:
        store.remove(f"{layout.STAGING}/{name}")
    return len(names)


def _stage(store: Store, name: str, data: bytes | memoryview, staged: list[str]) -> FileRef:
    staged.append(store.stage(data))
    return FileRef(name=name, staged=staged[-1], bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _remove(store: Store, names: Sequence[str]) -> None:
    for name in names:
        store.remove(name)


def _existing(store: Store, plan: Plan, chunk: int) -> CommitRecord:
    record = find_record(store, plan, chunk)
    if record is None:
        raise BackfillError(f"{store.url}/{layout.commit_name(chunk)} was there, and is gone")
    return record
