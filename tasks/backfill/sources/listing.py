"""From what a user names (files, folders, globs, URLs, lists of files) to a list of files.

Laws: the order is the user's, and within a folder or glob that of the paths; the same tree gives the same list on any
file system. Hidden files, and those whose name or folder begins with ``_``, are not data.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nograd.tasks.backfill.extra import is_foreign
from nograd.tasks.errors import SourceError

if TYPE_CHECKING:
    import fsspec
else:
    from nograd.tasks.backfill.extra import fsspec

#: what stores call the thing that changes with an object's content, the most telling first
_STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "modified",
    "created",
)


class Found(NamedTuple):
    """A file as it is listed.

    Attributes:
        url: absolute path, or URL.
        name: for people and ids: relative to the folder it was found in, else as the user wrote it.
        size: in bytes.
        stamp: changes with the content.
        named: whether the user named this very file, or a glob that matches it.
    """

    url: str
    name: str
    size: int
    stamp: str
    named: bool


def absolute(urls: Sequence[str | os.PathLike[str]]) -> list[str]:
    """What the user named, whatever the working directory will be. ``@file`` is a list of files, one a line.

    Raises:
        SourceError: if a list cannot be read.
    """
    found: list[str] = []
    for item in urls:
        url = os.fspath(item)
        if url.startswith("@"):
            try:
                lines = Path(url[1:]).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as err:
                raise SourceError(f"{url[1:]}: cannot read the list of files: {err}") from err
            found.extend(absolute([line.strip() for line in lines if line.strip()]))
        else:
            url = url.removeprefix("file://")
            found.append(url if is_remote(url) else os.path.abspath(os.path.expanduser(url)))  # noqa: PTH100, PTH111
    return found


def is_remote(url: str) -> bool:
    """Whether a path is fsspec's to open."""
    return "://" in url or "::" in url


def list_files(urls: Sequence[str]) -> list[Found]:
    """The files behind absolute paths, globs and URLs.

    Raises:
        SourceError: if nothing is there, or it cannot be listed.
    """
    found: list[Found] = []
    for url in urls:
        with readable(url, "listed"):
            try:
                files = list(_remote(url) if is_remote(url) else _local(url))
            except FileNotFoundError as err:
                raise SourceError(f"{url}: no such file or folder") from err
            except (ImportError, ValueError) as err:
                raise SourceError(f"{url}: {err}") from err
        if not files:
            raise SourceError(f"{url}: no files there")
        found.extend(files)
    return found


def stat(url: str) -> Found | None:
    """One file as it is now; None if it is gone."""
    try:
        if not is_remote(url):
            return _stat_local(url, url)
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return _of_info(url, url, fs.info(path), named=True)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def readable(name: str, done: str = "read") -> Iterator[None]:
    """Turn what keeps a file from being read (or from what else is ``done``) into `SourceError`, whoever says so."""
    try:
        yield
    except Exception as err:
        if isinstance(err, OSError) or is_foreign(err):
            raise SourceError(f"{name}: cannot be {done}: {getattr(err, 'strerror', None) or err}") from err
        raise


def _local(url: str) -> Iterator[Found]:
    if os.path.isdir(url):  # noqa: PTH112
        for folder, folders, names in os.walk(url):
            folders[:] = [name for name in folders if not name.startswith((".", "_"))]
            for name in names:
                if not name.startswith((".", "_")):
                    path = os.path.join(folder, name)  # noqa: PTH118 - a million of them
                    yield _stat_local(path, os.path.relpath(path, url), named=False)
    elif os.path.exists(url) or not glob.has_magic(url):  # noqa: PTH110
        yield _stat_local(url, _as_written(url))
    else:
        for path in glob.iglob(url, recursive=True):  # noqa: PTH207
            if os.path.isfile(path):  # noqa: PTH113
                yield _stat_local(path, _as_written(path))


def _stat_local(path: str, name: str, *, named: bool = True) -> Found:
    info = os.stat(path)  # noqa: PTH116
    return Found(path, name, info.st_size, str(info.st_mtime_ns), named)


def _as_written(path: str) -> str:
    """Relative to the working directory, if the file is below it."""
    name = os.path.relpath(path)
    return path if name.startswith("..") else name


def _remote(url: str) -> Iterator[Found]:
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    if glob.has_magic(path) and not fs.exists(path):
        found: dict[str, Any] = fs.glob(path, detail=True)
        for name, info in found.items():
            if info["type"] == "file":
                yield _of_info(fs.unstrip_protocol(name), fs.unstrip_protocol(name), info, named=True)
    elif fs.isdir(path):
        for name, info in fs.find(path, detail=True).items():
            relative = name.removeprefix(path.rstrip("/")).lstrip("/")
            if not any(part.startswith((".", "_")) for part in relative.split("/")):
                yield _of_info(fs.unstrip_protocol(name), relative, info, named=False)
    else:
        yield _of_info(url, url, fs.info(path), named=True)


def _of_info(url: str, name: str, info: dict[str, Any], *, named: bool) -> Found:
    stamp = next((info[key] for key in _STAMPS if info.get(key)), "")
    if isinstance(stamp, dt.datetime):  # some say a date when asked for one file, and seconds when they list
        stamp = stamp.timestamp()
    return Found(url, name, int(info["size"] or 0), str(stamp), named)


def sort(files: Iterable[Found]) -> list[Found]:
    """By path, as UTF-8 bytes compare: the same on every system and in every locale."""
    return sorted(files, key=lambda file: file.url.encode("utf-8", "surrogateescape"))
