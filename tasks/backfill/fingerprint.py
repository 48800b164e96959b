"""Whether inputs and model still are what the plan was made for; and if not, what changed, in words.

A resume that scored the rest of the rows with other weights, or rows that moved in their file, would make an output
nobody can explain. So it is refused, and says what to put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nograd.tasks.errors import PlanChanged

from .plan import Job, ModelIdentity, encode
from .sources import find, sha256_of
from .sources.base import file_change

#: changes named one by one; the rest is counted
_NAMED = 20


def model_changes(planned: ModelIdentity, now: ModelIdentity) -> list[str]:
    """In what two models differ, one sentence each."""
    found = [] if planned.name == now.name else [f"the model was {planned.name}, is {now.name}"]
    for part in sorted({*planned.parts, *now.parts}):
        old, new = planned.parts.get(part), now.parts.get(part)
        if old is None:
            found.append(f"model {now.name}: {part} is new ({_short(new)})")
        elif new is None:
            found.append(f"model {now.name}: {part} is gone (was {_short(old)})")
        elif old != new:
            found.append(f"model {now.name}: {part} was {_short(old)}, is {_short(new)}")
    return found


def version_changes(planned: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Libraries in other versions than planned: deviations, to be recorded with the commit."""
    return [
        f"{name} {now[name]} instead of {planned[name]}"
        for name in sorted({*planned} & {*now})
        if planned[name] != now[name]
    ]


def parameter_changes(planned: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what the parameters of two runs differ, one sentence each."""
    return [
        f"parameter {name} was {encode(planned.get(name)).decode()}, is {encode(now.get(name)).decode()}"
        for name in sorted({*planned, *now})
        if planned.get(name) != now.get(name)
    ]


def input_changes(job: Job) -> list[str]:
    """List the inputs again; in what they differ from the plan, one sentence each.

    Nothing is read, but for plans that hold contents, whose files are hashed where size or time differ.

    Raises:
        SourceError: if they cannot be listed at all.
    """
    spec = job.plan.source
    now = {file.url: file for file in find(spec.urls, spec.kind)[0]}
    found: list[str] = []
    for file in job.all_files():
        listed = now.pop(file.url, None)
        change = file_change(file, listed)
        if not change and listed is not None and file.sha256 and listed.stamp != file.stamp:
            same = sha256_of(file.url) == file.sha256
            change = "" if same else f"{file.name} has another content than when the plan was made"
        if change:
            found.append(change)
    found.extend(f"{file.name} is new since the plan was made" for file in now.values())
    return found


def check(job: Job, *, model: ModelIdentity | None = None, parameters: Mapping[str, Any] | None = None) -> None:
    """Refuse to go on with a plan whose inputs, model or parameters are not those it was made for.

    Args:
        job: the plan.
        model: as it is now; not looked at if None.
        parameters: as they are now; not looked at if None.

    Raises:
        PlanChanged: listing what changed.
        SourceError: if the inputs cannot be listed.
    """
    found = input_changes(job)
    way_out = f"; {_way_out(job)}" if found else ""
    if model is not None:
        found.extend(model_changes(job.plan.model, model))
    if parameters is not None:
        found.extend(parameter_changes(job.plan.parameters, parameters))
    if found:
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise PlanChanged(f"{job.store.url} cannot be resumed: {'; '.join(found[:_NAMED])}{more}{way_out}")


def _way_out(job: Job) -> str:
    """What to do when inputs have changed."""
    if job.plan.source.content:
        put_back = "restore the inputs"
    else:
        put_back = (
            "restore the inputs with their dates (cp -p), or plan with --content, which tells files by their bytes"
        )
    return f"{put_back}; inputs that were mended need a new run, into another folder"


def _short(text: str | None) -> str:
    return text if text is not None and len(text) <= 16 else f"{(text or '')[:12]}…"
