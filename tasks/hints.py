"""Help for whoever mistyped a name, or lacks a library."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def install(extra: str) -> str:
    """How to install the libraries that only some uses need."""
    return f"pip install '.[{extra}]' in a checkout of nograd"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the known name that is most like ``word``, a blank before it; empty if none is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
