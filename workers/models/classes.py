"""Classes of the user's own, imported by the name the model file gives them."""

from __future__ import annotations

import sys
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .base import HostedModel


def import_object(model: HostedModel, key: str, target: str) -> Any:
    """What ``package.module:Name`` stands for, with the model file's folder and the working directory on the path.

    Raises:
        ModelFileError: naming key, value and file, and why it cannot be imported.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        dotted = "" if colon or "." not in target else f". Did you mean {':'.join(target.rsplit('.', 1))!r}?"
        raise model.error(key, target, f"expected package.module:Name{dotted}")
    _put_on_path(model.file.parent, Path.cwd())
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as err:
        # Whatever the user's module raises while it is imported; a sys.exit() in it would end the worker without a word
        raise model.error(key, target, f"cannot import {module_name}: {type(err).__name__}: {err}") from err
    try:
        return attrgetter(name)(module)
    except AttributeError:
        raise model.error(key, target, f"{module_name} ({module.__file__}) has no {name}") from None


def build(model: HostedModel, target: str, init: Mapping[str, Any]) -> Any:
    """An instance of the class the model file names.

    Raises:
        ModelFileError: if there is no such class, or it does not take ``init``.
    """
    cls = import_class(model, target)
    try:
        return cls(**init)
    except (Exception, SystemExit) as err:
        raise model.error("init", dict(init), f"{target} raised {type(err).__name__}: {err}") from err


def import_class(model: HostedModel, target: str) -> type[Any]:
    """The class ``package.module:Class`` of the key ``class``.

    Raises:
        ModelFileError: if it cannot be imported, or is no class.
    """
    cls = import_object(model, "class", target)
    if not isinstance(cls, type):
        raise model.error("class", target, f"a {type(cls).__name__}, not a class")
    return cls


def _put_on_path(*folders: Path) -> None:
    """Put folders first on the path, as Python does with a script's own, and leave them: models import late, too."""
    for folder in reversed([str(folder.resolve()) for folder in folders]):
        if folder not in sys.path:
            sys.path.insert(0, folder)
