"""What transformers loads: a local folder or a hub name, whole, without remote code, with errors of one line."""

from __future__ import annotations

import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nograd.tasks.errors import ModelFileError

from .inference import dtype_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nograd.tasks.modelfile import TransformersSpec

    from .base import HostedModel


def source(model: HostedModel, spec: TransformersSpec) -> str:
    """The folder ``model`` stands for, if there is one beside the model file; else its value, a name on the hub.

    Raises:
        ModelFileError: if it can only be a folder, and there is none.
    """
    folder = model.file.parent / spec.model
    if folder.is_dir():
        return str(folder.resolve())
    if spec.model.startswith((".", "/", "~")) or spec.model.count("/") > 1 or "\\" in spec.model:
        raise model.error("model", spec.model, f"no such folder: {folder.resolve()}")
    return spec.model


def open_component(model: HostedModel, spec: TransformersSpec, auto: Any) -> Any:
    """The model's tokenizer or image processor, by its auto class.

    Raises:
        ModelFileError: if the folder or the hub does not have it.
    """
    with _one_line(model, spec):
        return auto.from_pretrained(source(model, spec), revision=spec.revision, trust_remote_code=False)


def open_network(model: HostedModel, spec: TransformersSpec, autos: Sequence[Any]) -> Any:
    """The network with its weights in the model file's dtype, by the first auto class that knows its architecture.

    Raises:
        ModelFileError: if it cannot be loaded, or weights it needs for the task are not there: transformers would fill
            them with random numbers and log a warning, and every prediction would be noise.
    """
    where = source(model, spec)
    options = {"revision": spec.revision, "trust_remote_code": False}
    with _one_line(model, spec):
        from transformers import AutoConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a worker's log is no terminal
        config = AutoConfig.from_pretrained(where, **options)
        known = [auto for auto in autos if type(config) in auto._model_mapping]  # noqa: SLF001 - there is no other way to ask
        if not known:
            raise model.error("task", spec.task, f"a {config.model_type} model ({spec.model}) has no head for it")
        network, report = known[0].from_pretrained(where, dtype=dtype_of(model), output_loading_info=True, **options)
    model.revision = getattr(config, "_commit_hash", None)
    # Feature extraction reads the last hidden state; the pooler behind it is not used, and often not saved.
    unused = "pooler" if spec.task.endswith("feature-extraction") else None
    if missing := sorted(name for name in report["missing_keys"] if unused is None or unused not in name):
        raise model.error(
            "model",
            spec.model,
            f"has no weights for {', '.join(missing[:3])}{' …' * (len(missing) > 3)}, which {spec.task} needs; "
            f"it was saved as {', '.join(config.architectures or ['something else'])}",
        )
    return network


def check_vocabulary(model: HostedModel, spec: TransformersSpec, tokenizer: Any, network: Any) -> None:
    """Check that every token has an embedding: on a GPU one that has none kills the whole process's context.

    Raises:
        ModelFileError: if the tokenizer knows more tokens than the network.
    """
    try:
        rows = getattr(network.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # networks with two of them: text and images
        return
    if rows is not None and len(tokenizer) > rows:
        raise model.error("model", spec.model, f"its tokenizer has {len(tokenizer)} tokens, its network only {rows}")


def position_limit(network: Any) -> int | None:
    """How many tokens the network has positions for; None if it does not count them."""
    for name, part in network.named_modules():
        # RoBERTa and its kin count positions from behind the padding index
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return int(part.num_embeddings - part.padding_idx - 1)
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def length_class(length: int) -> int:
    """What texts of like length share: padding never more than doubles a text of over 32 tokens."""
    return max(length - 1, 31).bit_length()


@contextmanager
def _one_line(model: HostedModel, spec: TransformersSpec) -> Iterator[None]:
    """Turn what transformers raises, often a page of it, into one line that names key, value and file."""
    try:
        yield
    except ModelFileError:
        raise
    except Exception as err:
        # Missing files, no network, a damaged config: OSError, ValueError, KeyError, RuntimeError and more
        line = textwrap.shorten(str(err), 300, placeholder=" …")
        folder = model.file.parent / spec.model
        absent = "" if folder.is_dir() else f"there is no folder {folder}; as a hub name: "
        raise model.error("model", spec.model, f"{absent}{type(err).__name__}: {line}") from err
