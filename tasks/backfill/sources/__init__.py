"""What a backfill reads: Parquet, CSV, JSON lines, OpenAI's batch lines and image files, local or by any fsspec URL.

`survey` looks at the inputs once, at plan time; `open_reader` reads the rows of a chunk, and only those, on a worker.
A format is one module with a ``survey`` and a `base.Reader`; this one knows which.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast, get_args

from nograd.tasks.backfill.plan import Job, SourceKind, SourceSpec
from nograd.tasks.errors import SourceError

from . import csv as csv_
from . import images, jsonl, listing, parquet
from .base import Files, Reader, Request, Survey
from .images import read_image
from .listing import Found, is_remote, readable

if TYPE_CHECKING:
    import fsspec
else:
    from nograd.tasks.backfill.extra import fsspec

__all__ = ["Reader", "Survey", "open_reader", "read_image", "reader_of", "survey"]

_SUFFIXES: Mapping[SourceKind, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl", ".ndjson"),
    "images": images.SUFFIXES,
}
_SURVEYS = {
    "parquet": parquet.survey,
    "csv": csv_.survey,
    "jsonl": jsonl.survey,
    "openai": jsonl.survey_openai,
    "images": images.survey,
}
_READERS: Mapping[str, type[Reader]] = {
    "parquet": parquet.ParquetReader,
    "csv": csv_.CsvReader,
    "jsonl": jsonl.JsonlReader,
    "openai": jsonl.OpenAIReader,
    "images": images.ImageReader,
}


def survey(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    kind: SourceKind | None = None,
    id: str | None = None,  # noqa: A002 - the word of the command line
    columns: Sequence[str] | None = None,
    join: Sequence[str] = (),
    options: Mapping[str, str | bool] | None = None,
    content: bool = False,
    allow_null: bool = False,
) -> Survey:
    """Look at the inputs: which files, how many rows, which columns of which types.

    Text is read once from end to end, of Parquet only the footers, of images nothing.

    Args:
        source: a file, folder, glob or URL, ``@file`` for a list of those, or several of them.
        kind: the format; found by the files' names if None.
        id: the column that names a row; if None, the row's position (``row``), ``path`` or ``custom_id``.
        columns: what the model is given; all but the id if None.
        join: columns copied into the output.
        options: of the format, see its module.
        content: whether to hash the files, so that a copy with a new date passes for the same.
        allow_null: whether rows with empty values reach the model; else they are error rows.

    Raises:
        SourceError: naming the file and what is wrong with it.
        MissingExtra: if pyarrow, numpy or fsspec is not installed.
    """
    if kind is not None and kind not in get_args(SourceKind):
        raise SourceError(f"unknown format {kind!r}; known: {', '.join(get_args(SourceKind))}")
    urls = listing.absolute([source] if isinstance(source, str | os.PathLike) else source)
    request = Request(
        urls, id, None if columns is None else list(columns), list(join), dict(options or {}), content, allow_null
    )
    found, chosen, skipped = find(urls, kind)
    if kind is None and chosen == "jsonl" and id in {None, jsonl.CUSTOM_ID} and jsonl.is_openai(found):
        chosen = "openai"
    hashes = [sha256_of(file.url) if content else "" for file in found]
    return _SURVEYS[chosen](found, hashes, request, skipped)


def find(urls: Sequence[str], kind: SourceKind | None) -> tuple[list[Found], SourceKind, int]:
    """The files of a source, their format, and how many files in its folders are of another.

    Raises:
        SourceError: if there are none, or of several formats.
    """
    every = [file for url in urls for file in listing.sort(listing.list_files([url]))]
    kinds = {name for file in every if (name := _kind_of(file.name)) is not None}
    if kind is None:
        if len(kinds) != 1:
            what = f"of several formats ({', '.join(sorted(kinds))})" if kinds else "of no known format"
            raise SourceError(f"{', '.join(urls)}: the files are {what}; say which is meant, or name the files")
        kind = kinds.pop()
    base: SourceKind = "jsonl" if kind == "openai" else kind
    found = [file for file in every if file.named or _kind_of(file.name) == base]
    if not found:
        raise SourceError(f"{', '.join(urls)}: no files that look like {base} ({' '.join(_SUFFIXES[base])})")
    return found, kind, len(every) - len(found)


def _kind_of(name: str) -> SourceKind | None:
    low = name.lower()
    for ending in (".gz", ".bz2", ".xz", ".zst"):  # named as what they hold, and refused as what they are
        low = low.removesuffix(ending)
    return next((kind for kind, suffixes in _SUFFIXES.items() if low.endswith(suffixes)), None)


def sha256_of(url: str) -> str:
    """Of a file's content.

    Raises:
        SourceError: if it cannot be read.
    """
    sha = hashlib.sha256()
    with (
        readable(url),
        open(url, "rb") if not is_remote(url) else fsspec.open(url, "rb").open() as file,  # noqa: PTH123
    ):
        while block := file.read(1 << 20):
            sha.update(cast("bytes", block))
    return sha.hexdigest()


def reader_of(spec: SourceSpec, files: Files) -> Reader:
    """A reader of a source whose files are known otherwise than by a plan."""
    return _READERS[spec.kind](spec, files)


def open_reader(job: Job) -> Reader:
    """Reads the chunks of a plan: ``reader.slices(job.extents(chunk), rows=…)``. Keep it for the next chunk."""
    return reader_of(job.plan.source, job.files)
