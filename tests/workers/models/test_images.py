import contextlib
import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from nograd.tasks.errors import InvalidInput
from nograd.workers.models import images
from nograd.workers.models.images import FORMATS, decode_image


def save(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_every_common_format_is_decoded(picture, form):
    image = decode_image(picture(form))
    assert (image.mode, image.size) == ("RGB", (80, 60))


@pytest.mark.parametrize(
    ("form", "mode"), [("PNG", "RGBA"), ("PNG", "L"), ("PNG", "P"), ("PNG", "1"), ("JPEG", "CMYK")]
)
def test_any_mode_becomes_the_model_s(picture, form, mode):
    data = picture(form, mode=mode)
    assert decode_image(data).mode == "RGB"
    assert decode_image(data, "L").mode == "L"


def test_an_image_stands_upright_as_its_exif_says(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    assert decode_image(picture("JPEG", exif=exif)).size == (60, 80)


def test_sixteen_bits_of_grey_are_scaled_not_cut_off():
    levels = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    decoded = np.asarray(decode_image(save(Image.fromarray(levels), "PNG"), "L"))
    assert np.abs(decoded.astype(int) - levels // 257).max() <= 1


def test_thirty_two_bits_are_refused_since_nobody_knows_their_range():
    data = save(Image.fromarray(np.random.default_rng(0).random((8, 8), dtype=np.float32)), "TIFF")
    with pytest.raises(InvalidInput, match="32 bits per value"):
        decode_image(data)


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0))[0] > 200


@pytest.mark.parametrize("shape", [(6, 8, 3), (6, 8)])
def test_pixels_may_come_as_an_array(shape):
    array = np.full(shape, 200, dtype=np.uint8)
    array.flags.writeable = False  # as from the wire
    image = decode_image(array)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (8, 6), (200, 200, 200))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((6, 8, 3), dtype=np.float32),
        np.zeros((3, 6, 8), dtype=np.uint8),
        np.zeros((6, 8, 4), dtype=np.uint8),
        np.zeros(8, dtype=np.uint8),
    ],
)
def test_other_arrays_are_refused_with_what_they_are(array):
    with pytest.raises(InvalidInput, match=rf"uint8, height x width x 3.*{array.dtype}, {array.shape[0]}"):
        decode_image(array)


@pytest.mark.parametrize("value", ["cat.jpg", ["cat.jpg"], None, 3, {"url": "x"}])
def test_what_is_no_image_at_all_is_refused(value):
    with pytest.raises(InvalidInput, match="an image comes as the bytes of a file"):
        decode_image(value)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"<svg></svg>", b"%PDF-1.7", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", bytes(512)],
    ids=["empty", "text", "svg", "pdf", "png signature", "jpeg signature", "zeros"],
)
def test_bytes_that_are_no_image_are_refused_with_how_they_begin(data):
    with pytest.raises(InvalidInput, match=f"not an image: {len(data)} bytes" + (" starting with" if data else "")):
        decode_image(data)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("part", [0.2, 0.6, 0.9])
def test_a_truncated_image_is_the_caller_s_fault(picture, form, part):
    whole = picture(form, size=(200, 150))
    cut = whole[: int(len(whole) * part)]
    try:
        decode_image(cut)
    except InvalidInput as err:
        assert "image" in err.message  # noqa: PT017 - some formats keep their pixels in front, and a cut costs nothing
    else:
        assert form in ("GIF", "TIFF")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", FORMATS)
def test_damage_anywhere_never_raises_anything_but_invalid_input(picture, form):
    whole = bytearray(picture(form))
    rng = np.random.default_rng(3)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 8):
            damaged[place] = rng.integers(0, 256)
        with contextlib.suppress(InvalidInput):
            decode_image(bytes(damaged))


def test_too_many_pixels_are_refused_before_they_are_decoded(picture, monkeypatch):
    bomb = save(Image.new("1", (8000, 8000)), "PNG")  # 64 million pixels in a few KB
    assert len(bomb) < 20_000

    def load(self):
        pytest.fail("its pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(InvalidInput, match="8000 x 8000 pixels; the limit is 50 million"):
        decode_image(bomb)
    monkeypatch.undo()
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(InvalidInput, match="80 x 60 pixels"):
        decode_image(picture())


def test_pillow_s_own_bomb_limit_is_the_caller_s_fault_too():
    bomb = save(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(InvalidInput, match=r"cannot be opened|pixels"):
        decode_image(bomb)
