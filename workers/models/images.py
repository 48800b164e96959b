"""Images: decoded strictly, and turned into what a model takes by the transform that belongs to the model."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from nograd.tasks.errors import InvalidInput, ModelFailed

from .classes import import_object
from .without_compiler import without_compiler

if TYPE_CHECKING:
    from nograd.tasks.modelfile import ImageTransform

    from .base import HostedModel

#: An upright image in the model's colour mode → the tensor the model takes.
Transform: TypeAlias = Callable[[Image.Image], torch.Tensor]

#: Every other format that Pillow knows is one more parser of bytes from strangers.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

#: pixels; 200 MB once decoded to RGB with its copy. Checked on the header, before pixels are decoded.
MAX_PIXELS = 50_000_000


def decode_image(value: Any, mode: str = "RGB") -> Image.Image:
    """Decode one image: upright as its EXIF says, in the colour mode asked for.

    Args:
        value: the bytes of a file, or pixels as a uint8 array, height x width x 3 or height x width.
        mode: Pillow's name of a colour mode.

    Raises:
        InvalidInput: if it is no image, is damaged, or has more than `MAX_PIXELS`.
    """
    if isinstance(value, np.ndarray):
        image = _from_array(value)
    elif isinstance(value, bytes | bytearray):
        image = _from_bytes(bytes(value))
    else:
        raise InvalidInput(
            f"an image comes as the bytes of a file ({{'base64': …}} in JSON) or a uint8 array, not as {_kind(value)}"
        )
    return image if image.mode == mode else image.convert(mode)


def _kind(value: Any) -> str:
    return f"text ({value[:40]!r})" if isinstance(value, str) else f"a {type(value).__name__}"


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        shape = " x ".join(map(str, array.shape))
        raise InvalidInput(
            f"an image as an array is uint8, height x width x 3 or height x width; this is {array.dtype}, {shape}"
        )
    _check_size(array.shape[1], array.shape[0])
    return Image.fromarray(np.ascontiguousarray(array))


def _from_bytes(data: bytes) -> Image.Image:
    if not data:
        raise InvalidInput("not an image: 0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise InvalidInput(
            f"not an image: {len(data)} bytes starting with {data[:8]!r}; expected one of {', '.join(FORMATS)}"
        ) from None
    except Exception as err:
        raise InvalidInput(f"the image cannot be opened: {err}") from err
    _check_size(*image.size)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except Exception as err:
        raise InvalidInput(f"the {image.format} image is damaged: {err or type(err).__name__}") from err
    return _to_eight_bits(upright)


def _check_size(width: int, height: int) -> None:
    if not width or not height:
        raise InvalidInput(f"the image is empty: {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise InvalidInput(f"the image has {width} x {height} pixels; the limit is {MAX_PIXELS // 10**6} million")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits of grey; Pillow's own conversion cuts everything above 255 off, so such images come out white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):  # 32 bits, in a range that only its author knows
        raise InvalidInput(f"the image has 32 bits per value (mode {image.mode}); send 8 or 16")
    return image


def colour_mode(spec_transform: ImageTransform | str | None) -> str:
    """The colour mode a model takes; RGB unless its transform is a table that says otherwise."""
    return "RGB" if spec_transform is None or isinstance(spec_transform, str) else spec_transform.mode


def configured_transform(model: HostedModel) -> Transform | None:
    """The transform the model file names, if it names one.

    Raises:
        ModelFileError: if the callable cannot be imported.
    """
    spec = model.spec.transform
    if spec is None:
        return None
    return _from_callable(model, spec) if isinstance(spec, str) else _from_table(spec)


def _from_table(spec: ImageTransform) -> Transform:
    """The steps of torchvision's own classification preset, so that a table can say what the weights' transforms do."""
    with without_compiler():
        from torchvision.transforms import functional as F  # noqa: N812 - its usual name

    def transform(image: Image.Image) -> torch.Tensor:
        if spec.resize is not None:
            image = F.resize(image, spec.resize)
        if spec.center_crop is not None:
            image = F.center_crop(image, spec.center_crop)
        tensor: torch.Tensor = F.convert_image_dtype(F.pil_to_tensor(image), torch.float32)
        if spec.mean is not None:
            tensor = F.normalize(tensor, spec.mean, spec.std)
        return tensor

    return transform


def _from_callable(model: HostedModel, target: str) -> Transform:
    function = import_object(model, "transform", target)
    if not callable(function):
        raise model.error("transform", target, f"a {type(function).__name__} cannot be called")

    def transform(image: Image.Image) -> torch.Tensor:
        try:
            tensor = function(image)
        except (ValueError, TypeError) as err:
            raise InvalidInput(f"{target} refused the image: {err}") from err
        if not isinstance(tensor, torch.Tensor):
            raise ModelFailed(f"{target} returned a {type(tensor).__name__}, not a tensor")
        return tensor

    return transform
