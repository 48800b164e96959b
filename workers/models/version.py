"""Which model made a prediction: all that decides it, part by part, and in one short fingerprint.

The parts are

* the model's table in the model file, without what only decides when it runs (`OPERATIONAL`); a key left at its default
  counts as absent, so that a new key of a later nograd changes nothing;
* the bytes of every file the table names (weights, labels, what ``init`` points to), and of all files in the folder of
  a transformers model;
* the source of the module of each class or function it names, though not of what that imports;
* the commit of a model from a hub, where the loader learned it.

Laws: equal fingerprints mean equal table, weights and code of that module, wherever the files lie; any of them changed
means another fingerprint. To rename the model or to move its files changes nothing.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from nograd.tasks.modelfile import AnySpec

    from .base import HostedModel

#: keys that decide when and how often a model runs, and not what it answers
OPERATIONAL = frozenset({"batch", "timeout_s", "hard_timeout_s", "load_timeout_s", "example"})
#: keys that name a class or function as ``module:name``
_CODE = frozenset({"class", "transform"})
#: hexadecimal digits of a fingerprint
LENGTH = 12


def identify(model: HostedModel) -> dict[str, str]:
    """The parts of a model that is loaded: its classes are imported, its files there.

    Reads all its files once more, which takes about a second for each gigabyte.

    Returns:
        The key of the table → its value as JSON, or the digest of what it names.

    Raises:
        ModelFileError: if one of them cannot be read.
    """
    parts = {key: _text(_contents(model, key, value)) for key, value in _table(model.spec).items()}
    revision = {"revision": model.revision} if model.revision else {}
    return {"loader": model.spec.loader, **parts, **revision}


def fingerprint(parts: Mapping[str, str]) -> str:
    """The parts of a model in short."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:LENGTH]


def _text(value: Any) -> str:
    return msgspec.json.encode(value, order="deterministic").decode()


def _table(spec: AnySpec) -> dict[str, Any]:
    """What the model file says and is not the default, as in the file."""
    return {
        field.encode_name: msgspec.to_builtins(value)
        for field in msgspec.structs.fields(spec)
        if field.encode_name not in OPERATIONAL and (value := getattr(spec, field.name)) != _default(field)
    }


def _default(field: Any) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def _contents(model: HostedModel, key: str, value: Any) -> Any:
    """A value of the table, with the contents of files in the place of their names."""
    if isinstance(value, dict):
        return {name: _contents(model, key, one) for name, one in value.items()}
    if isinstance(value, list):
        return [_contents(model, key, one) for one in value]
    if isinstance(value, str) and key in _CODE:
        return [value, _source(value)]
    if not isinstance(value, str) or key == "params" or _is_no_path(value):
        return value
    path = model.file.parent / value
    try:
        if path.is_file():
            return [_digest(path)]
        whole_folder = key == "model" and model.spec.loader == "transformers" and path.is_dir()
        return _digests(path) if whole_folder else value
    except OSError as err:
        raise model.error(key, value, f"cannot be read: {err}") from err


def _is_no_path(value: str) -> bool:
    """Whether a text is longer than names of files may be, or holds what none can."""
    encoded = value.encode()
    return b"\0" in encoded or len(encoded) > 4095 or max(map(len, encoded.split(b"/"))) > 255


def _digests(folder: Path) -> dict[str, str]:
    """Relative path → digest of each file of a folder, hidden ones aside (``.git``, ``.cache``)."""
    files = (path for path in folder.rglob("*") if path.is_file())
    relative = {path.relative_to(folder): path for path in files}
    return {
        name.as_posix(): _digest(path)
        for name, path in relative.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source(target: str) -> str | None:
    """Digest of the source of the module of ``module:name``; None if it has none (a built-in, a compiled one)."""
    module = sys.modules.get(target.partition(":")[0])
    file = getattr(module, "__file__", None)
    return _digest(Path(file)) if file is not None and Path(file).is_file() else None
