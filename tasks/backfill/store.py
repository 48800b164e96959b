"""Where a backfill writes: one small set of operations, and what each kind of storage makes of them.

Laws every store keeps:

* `Store.create` makes a whole, durable object appear under a name in one step, and never over another one: of any
  number of racing processes exactly one is told True.
* `Store.stage` is durable when it returns; nobody reads what is staged but by a commit record that names it.
* `Store.settle` makes a staged object stand under its final name; it may be run by any number of processes, again and
  again, also after a crash in the middle of another one, and always ends in the same state.
* No space left is `OutputFull`; every other refusal is an `OutputError` that names the place and the cause. Neither
  leaves a partial object under a final name.

A local folder is `store_local.LocalStore`, everything else `store_remote.RemoteStore` through fsspec.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from nograd.tasks.errors import OutputError, OutputFull

from .layout import STAGING

#: errno of a storage that has no room for more
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Store(Protocol):
    """An output folder. Names are relative to it, with ``/`` between folders.

    Attributes:
        url: the folder, as a person writes it.
    """

    url: str

    def probe(self) -> str:
        """Try what a commit needs, for real; return the name of the protocol that works here.

        Raises:
            OutputError: if none does; the message says what was tried and what came back.
        """

    def stage(self, data: bytes | memoryview, folder: str = STAGING) -> str:
        """Write an object under a fresh name in a folder nobody reads, durably; return the name."""

    def create(self, name: str, data: bytes) -> bool:
        """Make an object appear, whole and durable, unless the name is taken; whether it is ours that stands there."""

    def settle(self, staged: str, name: str, size: int) -> None:
        """Give a staged object of so many bytes its final name; what else stands under that name is no part of ours.

        Raises:
            OutputError: if the object stands neither here nor there.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Write an object whatever stood there: only for what is derived from committed state."""

    def read(self, name: str) -> bytes:
        """The bytes of an object.

        Raises:
            FileNotFoundError: if there is none of that name.
        """

    def open(self, name: str) -> BinaryIO:
        """An object, to be read in pieces."""

    def size(self, name: str) -> int | None:
        """Bytes of an object, None if there is none."""

    def names(self, folder: str) -> list[str]:
        """The names of the objects in a folder, sorted, without the folder; empty if there is no such folder."""

    def entries(self, folder: str = "") -> list[str]:
        """As `names`, with the names of folders; of the whole store, if no folder is named."""

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""


@contextlib.contextmanager
def refusals(place: str, doing: str) -> Iterator[None]:
    """Turn what an operating system or an object store refuses into `OutputFull` or `OutputError`.

    Args:
        place: the file or URL.
        doing: what was tried, as in "cannot <doing> <place>".
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise  # each has a meaning of its own to those who call
    except OSError as err:
        kind = OutputFull if err.errno in _FULL else OutputError
        raise kind(f"cannot {doing} {place}: {err.strerror or err}") from err


def open_store(url: str | Path) -> Store:
    """The store of a local path, a ``file://`` URL or any other fsspec URL. Nothing is written.

    ``…#retry-1`` is the first retry in such a folder.

    Raises:
        OutputError: if the URL's protocol is not known, or its library is not installed.
    """
    from .store_local import LocalStore
    from .store_remote import RemoteStore
    from .store_retry import RetryStore, folder_and_number

    text = str(url)
    if (retry := folder_and_number(text)) is not None:
        folder, number = retry
        return RetryStore(open_store(folder), number)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text and "::" not in text:
        return LocalStore(Path(text).absolute())
    return RemoteStore(text)
