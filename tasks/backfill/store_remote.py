"""Object stores and whatever else fsspec reaches.

A name is taken by a conditional put, ``pipe_file(mode="create")``, which S3 answers by ``If-None-Match: *``. fsspec's
default for it looks first and writes then, which two racing workers pass together; and an exclusive ``open`` of a
file server shows a file before its content is there. So a file system without a ``pipe_file`` of its own is refused,
and so is one that ignores the mode: `RemoteStore.probe` finds out.

There is no rename: a staged object gets its final name by a copy on the server. Copying the same object twice is
harmless, which is all `RemoteStore.settle` needs.

What a store refuses has as many kinds of exceptions as there are libraries behind fsspec; here it is `OutputError`.
"""

from __future__ import annotations

import contextlib
import errno
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from nograd.tasks.errors import OutputError

from .extra import is_foreign
from .layout import STAGING
from .store import refusals

if not TYPE_CHECKING:
    from .extra import fsspec
else:
    import fsspec

#: what to do about a store that cannot hold a backfill
_WAY_OUT: Final = (
    "without conditional puts (If-None-Match) two workers could commit one chunk: "
    "name a store that has them, as AWS S3, or a local or mounted folder, and copy that to the bucket"
)
#: seconds between two tries of a put while another one of the same name is under way
_CONFLICTS_S: Final = (0.05, 0.2, 0.8, 3.2)
#: HTTP statuses of conditional puts
_CONFLICT, _TAKEN = 409, 412


class RemoteStore:
    """A prefix on an fsspec file system.

    Attributes:
        url: the prefix, as given.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as err:
            raise OutputError(f"cannot write to {url}: {err}") from err

    def probe(self) -> str:
        """Create a name, be refused it the second time, read it back, and copy it."""
        name = f"{STAGING}/probe-{uuid.uuid4().hex}"
        self._check_exclusive()
        try:
            taken = self.create(name, b"first")
        except NotImplementedError as err:
            raise self._unfit(str(err) or "no exclusive creation") from err
        except OutputError as err:
            if isinstance(err.__cause__, OSError) and err.__cause__.errno == errno.ENOSYS:
                raise self._unfit(str(err.__cause__.strerror)) from err
            raise
        try:
            if not taken or self.create(name, b"second") or self.read(name) != b"first":
                raise self._unfit("creating an object a second time did not fail as it must")
            self.settle(self.stage(b"third"), f"{name}-3", 5)
        finally:
            with contextlib.suppress(OutputError):
                self.remove(name)
                self.remove(f"{name}-3")
        return "put"

    def stage(self, data: bytes | memoryview, folder: str = STAGING) -> str:
        """Put an object under a name nobody else has."""
        name = f"{folder}/{uuid.uuid4().hex}"
        with _refusals(self.url, "write to"):
            self._put(name, bytes(data))
        return name

    def create(self, name: str, data: bytes) -> bool:
        """Put an object on the condition that there is none of that name."""
        with _refusals(f"{self.url}/{name}", "create"):
            try:
                self._put(name, data)
            except FileExistsError:
                # The store may have done it and the answer was lost, and the client then asked again.
                return self.read(name) == data
        return True

    def settle(self, staged: str, name: str, size: int) -> None:
        """Copy a staged object to its final name, unless somebody has."""
        with _refusals(f"{self.url}/{name}", "create"):
            try:
                if self.size(name) != size:
                    self._fs.cp_file(self._path(staged), self._path(name))
            except FileNotFoundError:
                if self.size(name) != size:
                    raise OutputError(
                        f"{self.url}/{name} is gone, and what it was made from ({staged}) as well"
                    ) from None
            self.remove(staged)

    def replace(self, name: str, data: bytes) -> None:
        """Put an object whatever stood there."""
        with _refusals(f"{self.url}/{name}", "write"):
            self._fs.pipe_file(self._path(name), data)

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        with _refusals(f"{self.url}/{name}", "read"):
            return cast("bytes", self._fs.cat_file(self._path(name)))

    def open(self, name: str) -> BinaryIO:
        """An object, read in pieces."""
        with _refusals(f"{self.url}/{name}", "read"):
            return cast("BinaryIO", self._fs.open(self._path(name), "rb"))

    def size(self, name: str) -> int | None:
        """Bytes of an object, None if there is none."""
        with contextlib.suppress(FileNotFoundError), _refusals(f"{self.url}/{name}", "look at"):
            return int(self._fs.info(self._path(name))["size"])
        return None

    def names(self, folder: str) -> list[str]:
        """The objects under a prefix, sorted."""
        with contextlib.suppress(FileNotFoundError), _refusals(f"{self.url}/{folder}", "list"):
            self._fs.invalidate_cache(self._path(folder))
            found: list[dict[str, Any]] = self._fs.ls(self._path(folder), detail=True)
            return sorted(entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")
        return []

    def entries(self, folder: str = "") -> list[str]:
        """The first parts of the names under a prefix, sorted."""
        root = self._path(folder).rstrip("/")
        with contextlib.suppress(FileNotFoundError), _refusals(self.url, "list"):
            self._fs.invalidate_cache(root)
            paths = [entry["name"].rstrip("/") for entry in self._fs.ls(root, detail=True)]
            # Some stores list the prefix itself, where somebody has made an object to stand for a folder.
            return sorted(path.rsplit("/", 1)[-1] for path in paths if path.strip("/") != root.strip("/"))
        return []

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(FileNotFoundError), _refusals(f"{self.url}/{name}", "remove"):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _check_exclusive(self) -> None:
        """Refuse a file system that has only fsspec's default.

        Raises:
            OutputError: naming its class.
        """
        from fsspec.asyn import AsyncFileSystem

        asynchronous = isinstance(self._fs, AsyncFileSystem)
        base, put = (AsyncFileSystem, "_pipe_file") if asynchronous else (fsspec.spec.AbstractFileSystem, "pipe_file")
        kind = type(self._fs)
        if getattr(kind, put) is getattr(base, put):
            raise self._unfit(f"{kind.__name__} has no conditional put")

    def _unfit(self, why: str) -> OutputError:
        return OutputError(f"{self.url} cannot hold a backfill ({why}): {_WAY_OUT}")

    def _put(self, name: str, data: bytes) -> None:
        """Put an object on the condition that there is none of that name.

        Raises:
            FileExistsError: if there is.
            OutputError: if there is no such bucket.
        """
        for pause in (*_CONFLICTS_S, None):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileNotFoundError as err:
                raise OutputError(f"cannot write to {self.url}: {err}; make it first") from err
            except OSError as err:
                status = _status(err)
                if status == _TAKEN:  # s3fs knows it by what not all stores say
                    raise FileExistsError(*err.args) from err
                if status != _CONFLICT or pause is None:
                    raise
                time.sleep(pause)
            else:
                return


@contextlib.contextmanager
def _refusals(place: str, doing: str) -> Iterator[None]:
    """As `refusals`, also of what only the library behind fsspec has a name for."""
    with refusals(place, doing):
        try:
            yield
        except Exception as err:
            if is_foreign(err):
                raise OutputError(f"cannot {doing} {place}: {err}") from err
            raise


def _status(err: OSError) -> int | None:
    """The HTTP status that s3fs has made an error of; None if it is none."""
    response = getattr(err.__cause__, "response", None)
    return response["ResponseMetadata"].get("HTTPStatusCode") if isinstance(response, dict) else None
