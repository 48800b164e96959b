"""Check an output against its plan, its records and its inputs: trusting none of them.

`verify` recomputes every hash, counts every row, and reads the inputs' ids again: each selected row must be in a part
or in an errors file, once, in input order. What it finds is a list of sentences; an empty one is the proof.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from nograd.tasks.errors import VerificationFailed

from . import commit, finalize, layout
from .failures import failures
from .plan import Job, encode
from .retry import mended, retries, rows_of
from .sources import reader_of
from .sources.base import only_id

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
else:
    from .extra import pa, pq

#: problems named; the rest is counted
_NAMED = 100


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a verification found.

    Attributes:
        chunks: looked at.
        planned: chunks there must be in the end.
        rows_ok: predictions counted in the parts.
        rows_err: lines counted in the errors files.
        problems: one sentence each; empty if all is as it should be.
        unnamed: problems beyond those.
    """

    chunks: int
    planned: int
    rows_ok: int
    rows_err: int
    problems: list[str]
    unnamed: int = 0

    def check(self) -> None:
        """Nothing if there are no problems.

        Raises:
            VerificationFailed: listing them.
        """
        if self.problems:
            more = f"; and {self.unnamed} more" if self.unnamed else ""
            raise VerificationFailed("; ".join(self.problems) + more)


def verify(job: Job, *, ids: bool = True, each: Callable[[int], None] | None = None) -> Report:
    """Check everything that is committed; and that it is everything, if the output is closed.

    Args:
        job: what to check.
        ids: read the ids of the inputs again and compare; without, only what stands in the output is looked at.
        each: called with every chunk that was checked.

    Raises:
        PlanChanged: if the inputs are no longer those of the plan (with ``ids``).
        SourceError: if they cannot be read (with ``ids``).
    """
    checker = _Checker(job, ids=ids)
    for chunk, rows in job.chunk_rows():
        checker.chunk(chunk, rows)
        if each is not None:
            each(chunk)
    checker.whole()
    problems = checker.problems
    return Report(
        chunks=len(checker.records),
        planned=job.plan.chunks,
        rows_ok=checker.rows_ok,
        rows_err=checker.rows_err,
        problems=problems[:_NAMED],
        unnamed=max(0, len(problems) - _NAMED),
    )


def verify_all(job: Job, *, ids: bool = True, each: Callable[[int], None] | None = None) -> Report:
    """`verify` a backfill and all retries of it; and that a retry has run nothing but rows that had failed.

    Returns:
        Of all together; ``rows_err`` are the rows that still have no prediction.
    """
    reports, problems = [verify(job, ids=ids, each=each)], []
    failed = {failure.row for failure in failures(job)}
    for number, again in enumerate(retries(job.store), 1):
        report = verify(again, ids=ids, each=each)
        problems += [f"{layout.RETRY} {number}: {problem}" for problem in report.problems]
        reports.append(report)
        planned = rows_of(again, range(again.plan.chunks))
        if not planned <= failed:
            problems.append(f"{layout.RETRY} {number}: row {min(planned - failed)} had not failed before")
        failed -= mended(again)
    return Report(
        chunks=sum(report.chunks for report in reports),
        planned=sum(report.planned for report in reports),
        rows_ok=sum(report.rows_ok for report in reports),
        rows_err=reports[0].rows_err - sum(report.rows_ok for report in reports[1:]),
        problems=[*reports[0].problems, *problems],
        unnamed=sum(report.unnamed for report in reports),
    )


class _Checker:
    """Goes through the chunks in order; one part is in memory at a time."""

    def __init__(self, job: Job, *, ids: bool) -> None:
        self._job = job
        self.records: list[commit.CommitRecord] = []
        self.problems: list[str] = []
        self.rows_ok = 0
        self.rows_err = 0
        self._reader = reader_of(only_id(job.plan.source), job.files) if ids else None
        self._closed = job.store.size(layout.SUCCESS) is not None

    def chunk(self, chunk: int, rows: int) -> None:
        """A record, its files, their rows."""
        job = self._job
        record = commit.find_record(job.store, job.plan, chunk)
        if record is None:
            if self._closed:
                self._say(chunk, "is not committed, but the output is closed")
            return
        self.records.append(record)
        if record.rows_ok + record.rows_err != rows:
            self._say(chunk, f"has {record.rows_ok} + {record.rows_err} rows, the plan {rows}")
        part, errors = self._bytes(chunk, record.part), self._bytes(chunk, record.errors)
        if part is None or (record.errors is not None and errors is None):
            return
        try:
            good, bad = self._ids(part), [msgspec.json.decode(line) for line in (errors or b"").splitlines()]
        except (pa.ArrowInvalid, msgspec.DecodeError, OSError, KeyError) as err:
            self._say(chunk, f"cannot be read: {err}")
            return
        self.rows_ok += len(good)
        self.rows_err += len(bad)
        if (len(good), len(bad)) != (record.rows_ok, record.rows_err):
            self._say(
                chunk, f"holds {len(good)} + {len(bad)} rows, its record says {record.rows_ok} + {record.rows_err}"
            )
        if self._reader is not None:
            self._compare(chunk, good, {line["row"] for line in bad})

    def whole(self) -> None:
        """Files that no record names; and the manifest."""
        store, plan = self._job.store, self._job.plan
        named = {file.name for record in self.records for file in (record.part, record.errors) if file is not None}
        for folder in (layout.PARTS, layout.ERRORS):
            for name in store.names(folder):
                if f"{folder}/{name}" not in named and not name.startswith(f"{layout.RETRY}-"):  # checked as a retry
                    self.problems.append(f"{folder}/{name} belongs to no commit")
        for chunk in commit.committed_chunks(store):
            if chunk >= plan.chunks:
                self.problems.append(f"{layout.commit_name(chunk)} belongs to no chunk of the plan")
        if self._closed:
            self._manifest()

    def _manifest(self) -> None:
        store = self._job.store
        expected = msgspec.json.format(encode(finalize.manifest_of(self._job, self.records)))
        try:
            if store.read(layout.MANIFEST) != expected:
                self.problems.append(f"{layout.MANIFEST} is not the manifest of the commit records")
        except FileNotFoundError:
            self.problems.append(f"{layout.MANIFEST} is gone")
        if store.read(layout.SUCCESS).decode(errors="replace").strip() != hashlib.sha256(expected).hexdigest():
            self.problems.append(f"{layout.SUCCESS} does not name that manifest")

    def _bytes(self, chunk: int, file: commit.FileRef | None) -> bytes | None:
        if file is None:
            return None
        try:
            data = self._job.store.read(file.name)
        except FileNotFoundError:
            staged = self._job.store.size(file.staged) is not None
            self._say(chunk, f"{file.name} is " + ("not in place yet; resume or finalize" if staged else "gone"))
            return None
        if hashlib.sha256(data).hexdigest() != file.sha256:
            self._say(chunk, f"{file.name} is not what was committed (sha256)")
            return None
        return data

    def _ids(self, part: bytes) -> list[Any]:
        plan = self._job.plan
        if plan.output.format != "parquet":
            return [msgspec.json.decode(line)[plan.source.id] for line in part.splitlines()]
        file = pq.ParquetFile(io.BytesIO(part))
        metadata = file.schema_arrow.metadata or {}
        if metadata.get(b"nograd.plan") != plan.sha256.encode():
            self.problems.append("a part names another plan in its metadata")
        return list(file.read(columns=[plan.source.id])[plan.source.id].to_pylist())

    def _compare(self, chunk: int, good: list[Any], bad: set[int]) -> None:
        """Ids of the part against those of the inputs without the failed rows, in order."""
        expected, planned = [], set()
        for row, value in self._rows(chunk):
            planned.add(row)
            if row not in bad:
                expected.append(value)
        if not bad <= planned:
            self._say(chunk, f"names failed rows that are not its own ({min(bad - planned)})")
        if self._job.plan.output.format != "parquet":  # JSON has fewer types than Arrow
            expected = msgspec.json.decode(msgspec.json.encode(expected))
        if good != expected:
            place = next((i for i, pair in enumerate(zip(good, expected, strict=False)) if pair[0] != pair[1]), None)
            what = (
                "rows are missing or too many" if place is None else f"{good[place]!r} instead of {expected[place]!r}"
            )
            self._say(chunk, f"ids are not those of the inputs: {what}")

    def _rows(self, chunk: int) -> Iterator[tuple[int, Any]]:
        assert self._reader is not None
        for piece in self._reader.slices(self._job.extents(chunk)):
            column = piece.batch.column(self._job.plan.source.id)
            yield from zip(piece.rows.to_pylist(), column.to_pylist(), strict=True)

    def _say(self, chunk: int, what: str) -> None:
        self.problems.append(f"chunk {chunk}: {what}")
