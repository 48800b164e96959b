"""A local folder, or a network file system that is mounted.

A name is taken by ``link`` (POSIX: fails if the name exists) or, where the file system has no hard links, by
``renameat2(RENAME_NOREPLACE)`` (Linux: vfat, exfat and many FUSE mounts). Both are atomic and never replace, so that
processes that use one and processes that use the other can share a folder. Where neither works, nothing is committed.

``os.rename`` replaces, and an exclusive ``open`` shows a file before its content is there: neither would do.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import uuid
from functools import cache
from pathlib import Path
from typing import BinaryIO

from nograd.tasks.errors import OutputError

from .layout import STAGING
from .store import refusals

#: errno of a file system that has no hard links, or none from there to here
_NO_LINK = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.EACCES})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
#: times a staged file may be swept away under its writer
_SWEPT = 5


class LocalStore:
    """A folder on this machine.

    Attributes:
        url: its absolute path.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        self._made: set[Path] = set()

    def probe(self) -> str:
        """Create a name, be refused it the second time, and read it back."""
        name = f"{STAGING}/probe-{uuid.uuid4().hex}"
        try:
            if not self.create(name, b"first") or self.create(name, b"second") or self.read(name) != b"first":
                raise OutputError(f"{self.url}: creating a file a second time did not fail as it must")
            staged = self.root / self.stage(b"third")
            try:
                return self._take(staged, self.root / f"{name}-3")
            finally:
                staged.unlink(missing_ok=True)
        finally:
            self.remove(name)
            self.remove(f"{name}-3")

    def stage(self, data: bytes | memoryview, folder: str = STAGING) -> str:
        """Write and sync a file under a name nobody else has."""
        name = f"{folder}/{uuid.uuid4().hex}"
        path = self.root / name
        with refusals(self.url, "write to"):
            self._make(path.parent)
            try:
                _write(path, data)
                _sync(path.parent)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return name

    def create(self, name: str, data: bytes) -> bool:
        """Stage, then take the name; the staged name is gone in the end, whoever won."""
        path = self.root / name
        with refusals(str(path), "create"):
            self._make(path.parent)
            if path.exists():
                return False
            won = self._create(path, data)
            _sync(path.parent)
        return won

    def settle(self, staged: str, name: str, size: int) -> None:
        """Take the name for a staged file; somebody else may be doing the same."""
        source, path = self.root / staged, self.root / name
        with refusals(str(path), "create"):
            self._make(path.parent)
            try:
                self._take(source, path)
            except FileExistsError:
                if path.stat().st_size != size and source.exists():  # not ours: committed files come from here alone
                    source.replace(path)
            except FileNotFoundError:
                if self.size(name) != size:
                    raise OutputError(f"{path} is gone, and what it was made from ({staged}) as well") from None
            _sync(path.parent)
            source.unlink(missing_ok=True)

    def replace(self, name: str, data: bytes) -> None:
        """Stage, then rename over what stood there."""
        path = self.root / name
        with refusals(str(path), "write"):
            self._make(path.parent)
            while True:
                try:
                    (self.root / self.stage(data)).replace(path)
                    break
                except FileNotFoundError:  # whoever closes the output at the same moment has swept it away
                    if not self.root.exists():
                        raise
            _sync(path.parent)

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        with refusals(f"{self.url}/{name}", "read"):
            return (self.root / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """A file, opened for reading."""
        with refusals(f"{self.url}/{name}", "read"):
            return (self.root / name).open("rb")

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none."""
        with contextlib.suppress(FileNotFoundError), refusals(f"{self.url}/{name}", "look at"):
            return (self.root / name).stat().st_size
        return None

    def names(self, folder: str) -> list[str]:
        """The files in a folder, sorted."""
        with contextlib.suppress(FileNotFoundError), refusals(f"{self.url}/{folder}", "list"):
            return sorted(os.listdir(self.root / folder))  # noqa: PTH208 - a million names, no Path for each
        return []

    def entries(self, folder: str = "") -> list[str]:
        """The files and folders in a folder, sorted."""
        return self.names(folder)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with refusals(f"{self.url}/{name}", "remove"):
            (self.root / name).unlink(missing_ok=True)

    def _create(self, path: Path, data: bytes) -> bool:
        for _ in range(_SWEPT):
            staged = self.root / self.stage(data)
            try:
                self._take(staged, path)
            except FileExistsError:
                return False
            except FileNotFoundError:  # swept away by somebody who closed the output, or a part of it
                continue
            finally:
                staged.unlink(missing_ok=True)
            return True
        raise OutputError(f"{path} cannot be created: what is staged for it is removed again and again")

    def _make(self, folder: Path) -> None:
        """Make a folder, once; a name in it is durable only if the folder's own is."""
        if folder in self._made and folder.exists():
            return
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            _sync(path.parent)
        self._made.add(folder)

    def _take(self, staged: Path, path: Path) -> str:
        """Give a staged file a name nobody has; which way it went.

        Raises:
            FileExistsError: if somebody has it.
            FileNotFoundError: if the staged file is gone.
            OutputError: if this file system has no way of doing so.
        """
        try:
            os.link(staged, path)
        except FileExistsError:
            # A server may have done it and lost the answer, and its client then asked again.
            if not _same(staged, path):
                raise
        except FileNotFoundError:
            raise
        except OSError as err:
            if _same(staged, path):
                return "link"
            if err.errno not in _NO_LINK:
                raise
            refused = _rename_noreplace(staged, path)
            if refused:
                raise OutputError(
                    f"{self.url} cannot hold a backfill: it has neither hard links ({err.strerror}) nor renames "
                    f"that never replace ({os.strerror(refused)}); choose a folder on another file system"
                ) from err
            return "rename"
        return "link"


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _write(path: Path, data: bytes | memoryview) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as err:
        if err.errno not in {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EROFS}:
            raise
    finally:
        os.close(descriptor)


@cache
def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    return libc if hasattr(libc, "renameat2") else None


def _rename_noreplace(staged: Path, path: Path) -> int:
    """Rename unless the name is taken; 0, or the errno of a system that cannot.

    Raises:
        FileExistsError: if the name is taken.
        FileNotFoundError: if the staged file is gone.
    """
    libc = _libc()
    if libc is None:
        return errno.ENOSYS
    if libc.renameat2(_AT_FDCWD, os.fsencode(staged), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
        return 0
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}:
        return code
    raise OSError(code, os.strerror(code), str(path))
