"""A retry within an output folder, as a store of its own: see `retry`."""

from __future__ import annotations

import re
from typing import BinaryIO, Final

from . import layout
from .store import Store

_URL: Final = re.compile(rf"(.+)#{layout.RETRY}-([1-9]\d*)")


def folder_and_number(url: str) -> tuple[str, int] | None:
    """The output folder and the number of the retry that a URL names; None if it names no retry."""
    found = _URL.fullmatch(url)
    return (found[1], int(found[2])) if found else None


class RetryStore:
    """The n-th retry in an output folder, seen as an output folder of its own.

    Attributes:
        url: of the folder, with the retry's number: ``…#retry-1``; `open_store` understands it.
    """

    def __init__(self, store: Store, number: int) -> None:
        self._store = store
        self._prefix = f"{layout.RETRY}-{number}-"
        self._folder = f"_{layout.RETRY}/{number}"
        self.url = f"{store.url}#{layout.RETRY}-{number}"

    def probe(self) -> str:
        """Of the folder."""
        return self._store.probe()

    def stage(self, data: bytes | memoryview, folder: str = layout.STAGING) -> str:
        """Apart from what the backfill itself has staged: closing that one sweeps its own."""
        return self._store.stage(data, self._name(folder)).removeprefix(f"{self._folder}/")

    def create(self, name: str, data: bytes) -> bool:
        """Of the retry."""
        return self._store.create(self._name(name), data)

    def settle(self, staged: str, name: str, size: int) -> None:
        """Of the retry."""
        self._store.settle(self._name(staged), self._name(name), size)

    def replace(self, name: str, data: bytes) -> None:
        """Of the retry."""
        self._store.replace(self._name(name), data)

    def read(self, name: str) -> bytes:
        """Of the retry."""
        return self._store.read(self._name(name))

    def open(self, name: str) -> BinaryIO:
        """Of the retry."""
        return self._store.open(self._name(name))

    def size(self, name: str) -> int | None:
        """Of the retry."""
        return self._store.size(self._name(name))

    def names(self, folder: str) -> list[str]:
        """Of the retry."""
        if folder not in {layout.PARTS, layout.ERRORS}:
            return self._store.names(self._name(folder))
        return [name.removeprefix(self._prefix) for name in self._store.names(folder) if name.startswith(self._prefix)]

    def entries(self, folder: str = "") -> list[str]:
        """Of the retry's own folder: parts and errors are not in it."""
        return self._store.entries(self._name(folder).rstrip("/"))

    def remove(self, name: str) -> None:
        """Of the retry."""
        self._store.remove(self._name(name))

    def _name(self, name: str) -> str:
        folder, _, rest = name.partition("/")
        if folder in {layout.PARTS, layout.ERRORS}:
            return f"{folder}/{self._prefix}{rest}"
        return f"{self._folder}/{name}"
