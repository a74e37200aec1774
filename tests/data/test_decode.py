"""Every kind of image comes out as upright RGB, every broken one as a reason."""

import csv
import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from massl_fast.data.decode import EncodedImage, UnreadableImage, decode_rgb

pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL.*")  # pytest sets aside the filter that decode.py sets
ODD = Path(__file__).parents[2] / "../shared/data/odd_images"
# Pillow 13 reads it, 12.3, the last one for Python 3.10, does not.
READ_BY_SOME = "pillow_crash-0da013a13571cc8eb457a39fee8db18f8a3c7127.tif"


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], -1).astype(np.uint8))


def pixels(data: bytes) -> np.ndarray:
    image = decode_rgb(data, "it")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_plain_rgb_is_untouched():
    assert (pixels(encoded(gradient())) == np.asarray(gradient())).all()
    jpeg = encoded(gradient(), "JPEG", quality=90)
    assert (pixels(jpeg) == np.asarray(Image.open(io.BytesIO(jpeg)))).all()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
def test_grey(format):
    options = {"lossless": True} if format == "WEBP" else {}
    got = pixels(encoded(gradient().convert("L"), format, **options))
    assert np.abs(got - np.asarray(gradient().convert("L"))[..., None]).max() <= 3


def test_one_bit():
    assert (pixels(encoded(Image.fromarray(np.eye(9) > 0))) == np.eye(9)[..., None] * 255).all()


def test_palette():
    palette = gradient().quantize(64)
    assert (pixels(encoded(palette)) == np.asarray(palette.convert("RGB"))).all()


def test_cmyk():
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(pixels(cmyk) - [255, 0, 0]).max() <= 4


def test_lab():
    red = Image.new("LAB", (4, 4), (123, 69 + 128, 52 + 128))
    assert np.abs(pixels(encoded(red, "TIFF")) - [220, 30, 30]).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode):
    image = Image.new("RGB", (3, 1), (100, 100, 100)).convert(mode)
    image.putalpha(Image.fromarray(np.array([[0, 128, 255]], np.uint8)))
    assert np.abs(pixels(encoded(image))[0, :, 0] - [255, 177, 100]).max() <= 1


def test_a_transparent_palette_colour_is_white():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert pixels(encoded(image, transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_alpha_of_zero_everywhere_hides_nothing():
    image = gradient().convert("RGBA")
    image.putalpha(0)
    assert (pixels(encoded(image)) == np.asarray(gradient())).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(format):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    got = pixels(encoded(Image.fromarray(values), format))[..., 0]
    assert np.abs(got - values / 257).max() <= 0.51


def test_sixteen_bit_colour():
    # Pillow writes none: a PNG by hand, one row of two pixels.
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(">6H", 0, 32896, 65535, 257, 514, 65280)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert pixels(data).tolist() == [[[0, 128, 255], [1, 2, 255]]]


def test_floating_point_and_wide_integers():
    ramp = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    assert np.abs(pixels(encoded(Image.fromarray(ramp), "TIFF"))[..., 0] - ramp * 255).max() <= 0.51
    own = ramp * 7000 - 3000
    own[0, 0] = np.nan
    got = pixels(encoded(Image.fromarray(own), "TIFF"))[..., 0]
    assert got.max() == 255 and (np.diff(got.ravel()[1:]) >= 0).all()
    wide = (ramp * 2**31 * 0.9).astype(np.int32)
    assert np.abs(pixels(encoded(Image.fromarray(wide), "TIFF"))[..., 0] - ramp * 255).max() <= 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(format, orientation):
    upright = gradient(32, 16)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, format, exif=exif, quality=95)
    image = EncodedImage(data, "it")
    assert (image.width, image.height) == (32, 16)
    got = np.asarray(image.decode()).astype(int)
    assert np.abs(got - np.asarray(upright)).mean() < 4


def test_broken_exif_is_no_reason_to_refuse():
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01\x12garbage")
    assert pixels(data).shape == (30, 40, 3)
    exif = Image.Exif()
    exif[0x0112] = 99
    assert pixels(encoded(gradient(), "JPEG", exif=exif)).shape == (30, 40, 3)


def bomb(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("L", (1, 1)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "no known image format"),
        (encoded(gradient(), "JPEG")[:-9], "truncated"),
        (encoded(gradient(), "JPEG")[:400], "Truncated"),
        (encoded(gradient(400, 400), "PNG")[:-600], "truncated"),
        (encoded(gradient(), "TIFF")[:200], "."),
        (encoded(gradient(), "WEBP")[:100], "."),
        (bomb(30_000, 30_000), "more than 89,478,485"),
        (bomb(10_000, 9_000), "10000 × 9000"),
    ],
    ids=["empty", "text", "jpeg_end", "jpeg_header", "png", "tiff", "webp", "bomb", "smaller_bomb"],
)
def test_unreadable(data, reason):
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode_rgb(data, "folder/it.jpg")
    assert caught.value.name == "folder/it.jpg" and caught.value.reason and "0x" not in caught.value.reason
    again = pickle.loads(pickle.dumps(caught.value))  # it travels between processes
    assert (again.name, again.reason, str(again)) == (caught.value.name, caught.value.reason, str(caught.value))


def test_a_wrong_extension_is_no_matter():
    assert decode_rgb(encoded(gradient(), "PNG"), "it.jpg").size == (40, 30)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=6))
def test_damage_never_raises_anything_else(format, at, garbage):
    data = bytearray(encoded(gradient(16, 12), format))
    at %= len(data)
    data[at : at + len(garbage)] = garbage
    try:
        assert decode_rgb(bytes(data), "it").mode == "RGB"
    except UnreadableImage as error:
        assert error.reason


def test_odd_images():
    """The same files are readable as Pillow says, and come out with the sizes it says."""
    if not ODD.is_dir():
        pytest.skip("the folder of odd images is not here")
    with open(ODD / "pillow_says.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["file"] != READ_BY_SOME]
    for row in rows:
        name, data = row["file"], (ODD / row["file"]).read_bytes()
        try:
            image = decode_rgb(data, name)
        except UnreadableImage:
            # "bomb" opens with a warning: 151 million pixels, over the limit here.
            assert row["pillow"] in ("fail", "bomb"), name
            continue
        assert row["pillow"] == "ok", name
        assert image.mode == "RGB" and sorted(image.size) == sorted((int(row["width"]), int(row["height"]))), name
        if "Landscape" in name or "Portrait" in name:
            assert (image.width > image.height) == ("Landscape" in name)


def test_libtiff_and_pillow_say_nothing_of_their_own(capfd):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "TIFF", compression="tiff_lzw")
    data = bytearray(buffer.getvalue())
    data[16:4000] = bytes(len(data[16:4000]))
    with pytest.raises(UnreadableImage):
        decode_rgb(bytes(data), "broken.tif")
    assert capfd.readouterr().err == ""
