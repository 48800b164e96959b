"""The model file (``models.toml``): one table per model, read strictly, without torch.

Laws:

* An unknown key, a missing one, a value of the wrong type or out of range stops whoever reads the file,
  with an error that names the key, the value and the file.
* Paths are relative to the model file. Reading never imports a class and never opens weights: a producer needs only
  names and kinds of input, and must be able to read the file of a worker whose classes it does not have.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta, inspect

from .errors import ModelFileError
from .hints import did_you_mean
from .structs import decodable

#: What a model takes. ``rows``: one flat row of numbers per item; ``tensor``: an array of any rank per item;
#: ``json``: whatever JSON holds, handed to the model's own ``prepare``.
InputKind = Literal["image", "text", "rows", "tensor", "json"]

ModelName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
_Positive = Annotated[int, Meta(ge=1)]


class BatchLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How large a batch may get and how long it may wait.

    Attributes:
        max_items: inputs in one forward.
        max_wait_ms: how long the oldest input may wait for company while the device is idle; 0 means not at all
            (under load a batch fills while the device is busy, without any waiting).
        max_cost: the number of inputs in a forward times the cost of the dearest one, at most; None for no limit. A
            text costs its tokens (with those it may generate), a tensor its elements, an input of a Python class what
            its ``cost`` says. An input that is dearer than this runs alone.
    """

    max_items: _Positive = 64
    max_wait_ms: Annotated[float, Meta(ge=0)] = 0
    max_cost: _Positive | None = None


class ImageTransform(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resize (shorter side), centre crop, scale to [0, 1], normalise: what torchvision's classifiers do.

    Attributes:
        resize: length of the shorter side in pixels after resizing, or None to keep the size.
        center_crop: side of the square cut from the middle, or None.
        mode: Pillow's name of the colour mode the model takes.
        mean: subtracted per channel, or None for no normalisation; comes with ``std``.
        std: divided by per channel.
    """

    resize: _Positive | None = None
    center_crop: _Positive | None = None
    mode: Literal["RGB", "L"] = "RGB"
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        channels = 3 if self.mode == "RGB" else 1
        for key, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and len(value) != channels:
                raise ValueError(f"`{key}` has {len(value)} values for {channels} channels")
        if (self.mean is None) != (self.std is None):
            raise ValueError("`mean` and `std` come together")
        if self.std and min(self.std) <= 0:
            raise ValueError(f"`std` must be positive, not {self.std}")


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="loader"):
    """The keys every loader knows.

    Attributes:
        input: what one input is; the loader's own default where None.
        transform: image preprocessing where the model does not bring it: a table, or ``module:callable``
            taking a Pillow image and returning a tensor.
        labels: class names where the model does not bring them: a list, or a text file with one name per line.
            With labels, a vector of logits per input becomes ``{"label", "score", "top"}``.
        top: how many classes ``top`` lists.
        shape: shape of one input tensor, -1 for a free dimension. Inputs of another shape are refused.
        example: one input, as a producer would send it; run at warm-up.
        allow_nonfinite: accept NaN and infinity in rows and tensors.
        nonfinite_output: what becomes of a prediction with NaN or infinity in it, which JSON cannot hold: its input
            fails with `NonFiniteOutput` (``fail``), it gets null in their place (``null``), or it goes out as it is
            (``allow``: Python reads it, most others do not).
        dtype: the model's floating type; inputs are cast to it.
        input_dtype: ``int64`` for a model that takes indices (its first layer is an embedding).
        compile: run through ``torch.compile``: inputs of one known shape in batches padded to 1, 2, 4, … ``max_items``,
            each compiled before the first job; free dimensions once for all sizes.
        channels_last: memory format of images.
        batch: limits of a batch.
        timeout_s: seconds from a job's arrival at a worker until it fails with `DeadlinePassed` if it has no
            prediction, whether it waits or is on the device. A job may bring a shorter one. Waiting in the queue
            does not count.
        hard_timeout_s: seconds one forward may take, or one preparation or ``finish``. A worker in which a model takes
            longer ends and is started again; the jobs of that forward run alone from then on. ``inf`` for no limit.
        load_timeout_s: seconds a load may take, warm-up included. While the worker is up (``nograd models load``) it
            has failed then, and the worker goes on without the model; a worker that starts ends then, and is started
            again. ``inf`` for no limit.
        params: default parameters of a prediction (generation settings and the like); a job may override them.
    """

    input: InputKind | None = None
    transform: ImageTransform | str | None = None
    labels: list[str] | str | None = None
    top: _Positive = 5
    shape: list[Annotated[int, Meta(ge=-1)]] | None = None
    example: Any = None
    allow_nonfinite: bool = False
    nonfinite_output: Literal["fail", "null", "allow"] = "fail"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    input_dtype: Literal["float", "int64"] = "float"
    compile: bool = False
    channels_last: bool = False
    batch: BatchLimits = BatchLimits()
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    hard_timeout_s: Annotated[float, Meta(gt=0)] = 600
    load_timeout_s: Annotated[float, Meta(gt=0)] = 1800
    params: dict[str, Any] = {}

    @property
    def loader(self) -> str:
        """The name of the loader, as in the file."""
        return str(self.__struct_config__.tag)

    @property
    def kind(self) -> InputKind:
        """What one input is, the loader's default resolved."""
        return self.input or self.default_input()

    def default_input(self) -> InputKind:
        """What an input is if the file does not say."""
        return "tensor"


class TorchvisionSpec(ModelSpec, frozen=True, kw_only=True, tag="torchvision"):
    """A torchvision classifier.

    Attributes:
        model: its name in ``torchvision.models``.
        weights: a member of the architecture's weights enum (``IMAGENET1K_V1``, downloaded once by torchvision) or a
            local state dict. With a local one, the transforms are those of the default weights, and so are the
            categories if there are as many outputs; else set ``labels``, or classes are named by their index.
        init: keyword arguments of the builder (``{ num_classes = 3 }``), for local weights.
    """

    model: str
    weights: str
    init: dict[str, Any] = {}

    def default_input(self) -> InputKind:
        """Torchvision's classifiers take images."""
        return "image"


class TransformersSpec(ModelSpec, frozen=True, kw_only=True, tag="transformers"):
    """A transformers pipeline.

    Attributes:
        task: the pipeline task.
        model: a local folder (relative to the model file) or a hub name.
        revision: branch, tag or commit of a hub model.
    """

    task: str
    model: str
    revision: str | None = None

    def default_input(self) -> InputKind:
        """By the name of the task."""
        images = ("image-", "object-", "zero-shot-image", "zero-shot-object", "depth-")
        return "image" if self.task.startswith(images) else "text"


class ModuleSpec(ModelSpec, frozen=True, kw_only=True, tag="module"):
    """Any ``nn.Module``: its class and a state dict.

    Attributes:
        class_: ``package.module:Class`` (``class`` in the file).
        init: keyword arguments of the class.
        weights: state dict, ``.pth``/``.pt`` (loaded with ``weights_only``) or ``.safetensors``.
    """

    class_: str = msgspec.field(name="class")
    init: dict[str, Any] = {}
    weights: str


class LightningSpec(ModelSpec, frozen=True, kw_only=True, tag="lightning"):
    """A ``LightningModule`` from its checkpoint, run by its own ``predict_step`` without a Trainer.

    Attributes:
        class_: ``package.module:Class`` (``class`` in the file).
        init: keyword arguments the checkpoint's hyperparameters do not hold.
        checkpoint: the ``.ckpt`` file (loaded with ``weights_only``).
        batch_style: what ``predict_step`` receives as ``batch``: the stacked inputs (``inputs``), or a pair
            ``(inputs, None)`` (``inputs_and_targets``) for steps that begin with ``x, _ = batch``.
    """

    class_: str = msgspec.field(name="class")
    init: dict[str, Any] = {}
    checkpoint: str
    batch_style: Literal["inputs", "inputs_and_targets"] = "inputs"


class ExportSpec(ModelSpec, frozen=True, kw_only=True, tag="export"):
    """A ``torch.export`` program.

    Attributes:
        program: the ``.pt2`` file. Its batch dimension must be dynamic unless ``batch.max_items`` is 1.
    """

    program: str


class PythonSpec(ModelSpec, frozen=True, kw_only=True, tag="python"):
    """A class of yours with ``load(device)``, ``prepare(input)``, ``forward(list)``, ``finish(output)``.

    Attributes:
        class_: ``package.module:Class`` (``class`` in the file).
        init: keyword arguments of the class.
    """

    class_: str = msgspec.field(name="class")
    init: dict[str, Any] = {}

    def default_input(self) -> InputKind:
        """The class decides for itself."""
        return "json"


AnySpec: TypeAlias = TorchvisionSpec | TransformersSpec | ModuleSpec | LightningSpec | ExportSpec | PythonSpec

_LOADERS: dict[str, type[ModelSpec]] = {str(spec.__struct_config__.tag): decodable(spec) for spec in get_args(AnySpec)}


class ModelFile(msgspec.Struct, frozen=True):
    """A model file, read and checked.

    Attributes:
        path: the file, absolute.
        specs: model name → what the file says of it, in the order of the file.
    """

    path: Path
    specs: dict[str, AnySpec]

    @property
    def folder(self) -> Path:
        """What relative paths in the file are relative to."""
        return self.path.parent


def load_model_file(path: str | Path) -> ModelFile:
    """Read and check a model file.

    Raises:
        ModelFileError: naming the key, the value and the file.
    """
    path = Path(path).expanduser().absolute()
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ModelFileError(f"{path}: cannot read the model file: {err.strerror or err}") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ModelFileError(f"{path}: not valid TOML: {err}") from err
    if not tables:
        raise ModelFileError(f"{path}: the file names no model; a table like [my_model] is one")
    return ModelFile(path=path, specs={name: _read_spec(path, name, table) for name, table in tables.items()})


def _read_spec(path: Path, name: str, table: Any) -> AnySpec:
    try:
        msgspec.convert(name, ModelName)
    except msgspec.ValidationError:
        raise ModelFileError(
            f"{path}: [{name}]: a model's name has letters, digits, '.', '_' and '-' only, and names its queue"
        ) from None
    if not isinstance(table, dict):
        raise ModelFileError(f"{path}: {name} = {table!r}: a model is a table, [{name}], with a `loader`")
    try:
        spec: AnySpec = msgspec.convert(table, AnySpec)
    except msgspec.ValidationError as err:
        raise ModelFileError(f"{path}: [{name}] {_explain(table, str(err))}") from err
    return spec


def _explain(table: dict[str, Any], message: str) -> str:
    """Put key and value before msgspec's message, which ends in the place: ``… - at `$.batch.max_items```."""
    what, _, where = message.partition(" - at `$")
    keys = [key for key in where.rstrip("`").replace("[", ".[").split(".") if key]
    if "missing required field" in what:
        keys.append(what.rpartition("field `")[2].rstrip("`"))
        if keys == ["loader"]:
            return f"loader: missing; expected one of {', '.join(_LOADERS)}"
        return f"{'.'.join(keys)}: missing; loader {table.get('loader', '')!r} needs it"
    if "unknown field" in what:
        known = [field.encode_name for kind in _kinds(table, keys) for field in getattr(kind, "fields", ())]
        keys.append(what.rpartition("unknown field `")[2].rstrip("`"))
        what = f"unknown key.{did_you_mean(keys[-1], known)}".rstrip(".")
    value: Any = table
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else value
    if what.startswith("Invalid"):  # a value that is none of those there are
        kinds = _kinds(table, keys)
        choices = _LOADERS if keys == ["loader"] else [one for kind in kinds for one in getattr(kind, "values", ())]
        what = f"expected one of {', '.join(choices)}.{did_you_mean(str(value), choices)}".rstrip(".")
    return f"{'.'.join(keys) or 'table'} = {value!r}: {what}"


def _kinds(table: dict[str, Any], keys: list[str]) -> list[inspect.Type]:
    """What may stand at this place of a table: the members of its type."""
    spec = next((spec for name, spec in _LOADERS.items() if name == table.get("loader")), None)
    kinds: list[inspect.Type] = [] if spec is None else [inspect.type_info(spec)]
    for key in keys:
        fields = [field for kind in kinds if isinstance(kind, inspect.StructType) for field in kind.fields]
        types = [field.type for field in fields if field.encode_name == key]
        kinds = [one for kind in types for one in (kind.types if isinstance(kind, inspect.UnionType) else (kind,))]
    return kinds
