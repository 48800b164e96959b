"""The end of a backfill: a manifest of what stands there, a receipt of who made it, and the sign that it is whole.

Laws: nothing is closed while a chunk is missing; closing twice, or by two at once, leaves the same manifest; the
manifest holds no time and no worker, so that two runs of one plan can be compared by its sha256; ``_SUCCESS`` is
written last, and holds that sha256.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from nograd.tasks.errors import NotFinished

from . import commit, layout
from .plan import Job, encode


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a finished backfill consists of.

    Attributes:
        job: name of the plan.
        plan: its sha256.
        model: name of the model.
        model_sha256: of its identity.
        rows: selected.
        rows_ok: in the parts.
        rows_err: in the errors files.
        schema: of the parts, ``[[name, type], …]``.
        parts: ``{chunk, name, bytes, sha256, rows}``, in the order of the chunks.
        errors: the same of the errors files.
    """

    job: str
    plan: str
    model: str
    model_sha256: str
    rows: int
    rows_ok: int
    rows_err: int
    schema: list[tuple[str, str]]
    parts: list[dict[str, Any]]
    errors: list[dict[str, Any]]


def finalize(job: Job) -> Manifest:
    """Close the output.

    Raises:
        NotFinished: if chunks are missing, with their number.
        OutputError: if a committed file is gone.
    """
    store, plan = job.store, job.plan
    records = list(commit.records(store, plan))
    if len(records) < plan.chunks:
        raise NotFinished(
            f"{plan.job}: {plan.chunks - len(records)} of {plan.chunks} chunks are not committed yet; resume it"
        )
    for record in records:
        commit.settle(store, record)
    manifest = manifest_of(job, records)
    body = msgspec.json.format(encode(manifest))
    sha = hashlib.sha256(body).hexdigest()
    store.replace(layout.MANIFEST, body)
    store.replace(layout.RECEIPT, msgspec.json.format(encode(_receipt(job, records, sha))))
    store.replace(layout.SUCCESS, f"{sha}\n".encode())
    commit.sweep(store)
    return manifest


def manifest_of(job: Job, records: list[commit.CommitRecord]) -> Manifest:
    """The manifest of these records."""
    plan = job.plan
    return Manifest(
        job=plan.job,
        plan=plan.sha256,
        model=plan.model.name,
        model_sha256=plan.model.sha256,
        rows=plan.rows,
        rows_ok=sum(record.rows_ok for record in records),
        rows_err=sum(record.rows_err for record in records),
        schema=plan.output.schema.fields,
        parts=[_entry(record.chunk, record.part, record.rows_ok) for record in records],
        errors=[_entry(record.chunk, record.errors, record.rows_err) for record in records if record.errors],
    )


def _entry(chunk: int, file: commit.FileRef, rows: int) -> dict[str, Any]:
    return {"chunk": chunk, "name": file.name, "bytes": file.bytes, "sha256": file.sha256, "rows": rows}


def _receipt(job: Job, records: list[commit.CommitRecord], manifest_sha: str) -> dict[str, Any]:
    """Who ran what and when; everything that may differ between two runs of one plan."""
    workers: dict[str, int] = {}
    for record in records:
        workers[record.worker] = workers.get(record.worker, 0) + 1
    return {
        "job": job.plan.job,
        "plan_sha256": job.plan.sha256,
        "manifest_sha256": manifest_sha,
        "model": msgspec.to_builtins(job.plan.model),
        "inputs": msgspec.to_builtins(job.plan.inputs),
        "versions": job.plan.versions,
        "started_at": min((record.started_at for record in records), default=None),
        "ended_at": max((record.ended_at for record in records), default=None),
        "busy_s": sum(record.ended_at - record.started_at for record in records),
        "workers": workers,
        "deviations": {str(record.chunk): record.deviations for record in records if record.deviations},
    }
