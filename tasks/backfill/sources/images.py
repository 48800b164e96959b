"""Image files: one row each. Planning lists them; opening them is the worker's threads' work.

What stands in a slice is where each file is, never its bytes: a thousand photographs are read as they are scored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nograd.tasks.backfill.plan import Extent, InputFile, SourceSpec, TableSchema
from nograd.tasks.errors import InvalidInput, SourceError

from .base import Files, Piece, Reader, Request, Survey, number_files
from .listing import Found, is_remote, readable

if TYPE_CHECKING:
    import fsspec
    import numpy as np
    import pyarrow as pa
else:
    from nograd.tasks.backfill.extra import fsspec, np, pa

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

#: the id of an image
PATH = "path"


def survey(found: Sequence[Found], hashes: Sequence[str], request: Request, skipped: int) -> Survey:
    """Every file is a row.

    Raises:
        SourceError: for an id or columns of the user's, which images do not have.
    """
    if request.id not in {None, PATH} or request.columns or request.join:
        raise SourceError(f"images have no columns: their id is {PATH!r}, the model is given their content")
    spec = SourceSpec(
        kind="images",
        urls=request.urls,
        id=PATH,
        columns=["url", "size"],
        join=[],
        schema=TableSchema.of(pa.schema({PATH: pa.string(), "url": pa.string(), "size": pa.int64()})),
        content=request.content,
    )
    return Survey(spec, number_files(found, [1] * len(found), hashes), np.array([], np.int64), {}, skipped)


class ImageReader(Reader):
    """Hands out names, URLs and sizes."""

    def __init__(self, spec: SourceSpec, files: Files) -> None:
        super().__init__(spec, files)
        self._names = self.schema.names

    def read(self, file: InputFile, extent: Extent) -> Iterator[Piece]:
        """Look up the files of the extent."""
        del file  # the first one; the table has the others
        files = self._files(extent.file, extent.count)
        values = {
            PATH: [entry.name for entry in files],
            "url": [entry.url for entry in files],
            "size": [entry.size for entry in files],
        }
        yield Piece(pa.RecordBatch.from_pydict({name: values[name] for name in self._names}, schema=self.schema), {})


def read_image(url: str, size: int) -> bytes:
    """The bytes of one image of a plan.

    Raises:
        InvalidInput: if the file is gone, empty or of another size than planned: an error of its row.
        SourceError: if its folder is gone or the storage does not answer: an error of the run, no row is to blame.
    """
    with readable(url):
        try:
            if is_remote(url):
                with fsspec.open(url, "rb") as file:
                    data: bytes = file.read()
            else:
                with open(url, "rb") as file:  # noqa: PTH123 - a million of them
                    data = file.read()
        except (FileNotFoundError, PermissionError, IsADirectoryError) as err:
            if not is_remote(url) and not os.path.isdir(os.path.dirname(url)):  # noqa: PTH112, PTH120
                raise SourceError(f"{os.path.dirname(url)} is gone since the plan was made") from err  # noqa: PTH120
            raise InvalidInput(f"cannot read the file: {getattr(err, 'strerror', None) or err}") from err
    if len(data) != size:
        raise InvalidInput(f"the file had {size} bytes when the plan was made, has {len(data)}")
    if not data:
        raise InvalidInput("the file is empty")
    return data
