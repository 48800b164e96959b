"""Where things stand in the output folder (or under the output URL).

::

    out/
      _plan.json                    the plan and its sha256; written once
      _plan/inputs-<sha>.parquet    one row per input file; named by its content, so that a plan cannot meet another's
      _plan/ranges-<sha>.parquet    one row per extent: which rows of which file are which chunk
      _staging/<uuid>               attempts under way, and what lost
      _commits/000123.json          the commit record: chunk 123 is done if and only if it exists
      parts/part-000123.parquet     the predictions (or .jsonl); only committed ones ever stand here
      errors/part-000123.jsonl      the rows of the chunk that failed, if any
      _state.json                   whether it is paused or cancelled; the error budget
      _MANIFEST.json                every part with its sha256; the same bytes whoever ran the chunks
      _RECEIPT.json                 who ran what, when
      _SUCCESS                      last of all

**The dataset is** ``out/parts``: pyarrow, pandas and DuckDB read it as one, at any moment.
"""

from __future__ import annotations

from typing import Final

PLAN: Final = "_plan.json"
PLAN_FOLDER: Final = "_plan"
STAGING: Final = "_staging"
COMMITS: Final = "_commits"
PARTS: Final = "parts"
ERRORS: Final = "errors"
STATE: Final = "_state.json"
MANIFEST: Final = "_MANIFEST.json"
RECEIPT: Final = "_RECEIPT.json"
SUCCESS: Final = "_SUCCESS"
#: ``_retry/1/…`` and ``parts/retry-1-part-…``: see `retry`
RETRY: Final = "retry"


def commit_name(chunk: int) -> str:
    """The commit record of a chunk."""
    return f"{COMMITS}/{chunk:06d}.json"


def part_name(chunk: int, extension: str) -> str:
    """The predictions of a chunk; sorting the names sorts the chunks (below a million)."""
    return f"{PARTS}/part-{chunk:06d}.{extension}"


def errors_name(chunk: int) -> str:
    """The failed rows of a chunk."""
    return f"{ERRORS}/part-{chunk:06d}.jsonl"


def chunk_of(name: str) -> int | None:
    """The chunk a commit record, part or errors file belongs to; None for a name that is none of ours."""
    digits = name.rsplit("/", 1)[-1].split(".", 1)[0].removeprefix("part-")
    return int(digits) if digits.isdecimal() and len(digits) >= 6 else None
