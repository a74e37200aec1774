"""Which images are left to DALI's decoder: plain JPEGs, whole ones, with the size and orientation that Pillow sees."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from massl_fast.data.dali.feed import plain_jpeg_size
from massl_fast.data.decode import decode_rgb

ODD = Path(__file__).parents[2] / "../shared/data/odd_images"


def encoded(mode: str = "RGB", size: tuple[int, int] = (70, 40), format: str = "JPEG", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(exif=exif)


def xmp_orientation() -> bytes:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    return encoded(xmp=xmp)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True, "quality": 20}, {"comment": b"!"}])
def test_plain_jpegs_are_for_dali(options):
    assert plain_jpeg_size(encoded(**options)) == (70, 40)


def test_grey_is_for_dali_and_bytes_after_the_end_do_no_harm():
    assert plain_jpeg_size(encoded("L") + b"\xff\xc3 trailing") == (70, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_image(orientation):
    data = with_orientation(orientation)
    assert plain_jpeg_size(data) == decode_rgb(data, "x").size == ((40, 70) if orientation >= 5 else (70, 40))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        encoded(format="PNG"),
        encoded("CMYK"),
        encoded(keep_rgb=True),
        xmp_orientation(),
        encoded()[:-2],
        encoded()[:500],
        encoded()[:300] + b"\xff\xd9",
    ],
    ids=["empty", "start", "no frame", "png", "cmyk", "rgb", "xmp orientation", "no end", "truncated", "end within the header"],
)
def test_everything_else_is_for_pillow(data):
    assert plain_jpeg_size(data) is None


def test_damage_that_pillow_refuses_is_seen():
    data = bytearray(encoded(size=(300, 200)))
    data[5000:5002] = b"\xff\x3f"
    assert plain_jpeg_size(bytes(data)) is None


@pytest.mark.parametrize("cut", range(0, 700, 7))
def test_a_header_cut_anywhere_is_no_error(cut):
    assert plain_jpeg_size(with_orientation(6)[:cut]) is None


def test_an_exif_block_with_any_byte_changed_is_read_as_pillow_reads_it():
    whole = bytearray(with_orientation(6))
    begin = whole.index(b"Exif")
    for at in range(begin, begin + 34):
        for value in (0, 1, 2, 0x7F, 0xFF):
            data = bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            size = plain_jpeg_size(data)
            assert size is None or size == decode_rgb(data, "x").size


def test_odd_images_left_to_dali_are_readable_and_have_pillows_size():
    if not ODD.is_dir():
        pytest.skip("the folder of odd images is not here")
    left = {}
    for file in sorted(ODD.glob("*.*")):
        size = plain_jpeg_size(file.read_bytes())
        if size is not None:
            left[file.name] = size
            assert decode_rgb(file.read_bytes(), file.name).size == size, file.name
    # All that Pillow can decode but those: four components, letters for components or arithmetic coding, doubtful or two EXIF blocks.
    for_pillow = {"pillow_pil_sample_cmyk.jpg", "turbo_testimgari.jpg"}
    for_pillow |= {"pillow_jfif_unit_cm.jpg", "pillow_multiple_exif.jpg", "pillow_hopper_bad_exif.jpg"}
    broken = {"pillow_truncated_jpeg.jpg", "pillow_ultrahdr.jpg", "turbo_monkey12.jpg"}
    assert set(left) == {file.name for file in ODD.glob("*.jpg")} - for_pillow - broken
