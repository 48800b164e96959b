"""Texts on the way in."""

from __future__ import annotations

from typing import Any

from nograd.tasks.errors import InvalidInput


def check_text(value: Any) -> str:
    """The text, if it is one.

    Raises:
        InvalidInput: for another type, an empty text, or one with halves of surrogate pairs, which no tokenizer takes.
    """
    if not isinstance(value, str):
        raise InvalidInput(f"the model takes text, not a {type(value).__name__}")
    if not value:
        raise InvalidInput("the text is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as err:
        raise InvalidInput(f"the text is not valid Unicode: {err.reason} at character {err.start}") from err
    return value
