"""Encoded bytes to an upright RGB image, or a sentence on why not.

What is not plainly RGB becomes what a viewer would show: grey, palette, CMYK and Lab are converted, 16-bit and floating-point
values are scaled to 8 bits rather than clipped, EXIF orientation is applied, transparency is laid over white (an alpha channel
that is 0 everywhere hides nothing but a writer's mistake and is dropped). Of an animation, the first frame is taken.
"""

import ctypes
import io
import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from massl_fast.data.jpeg import MOST_PIXELS, ORIENTATION

BITS_PER_SAMPLE = 0x0102
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

HEADER_FIRST = ("JPEG", "MPO")  # all is known of these from their headers; the others are decoded at once

# Pillow warns about large headers, odd EXIF and surplus bytes; here an image is either used or reported unreadable.
warnings.filterwarnings("ignore", module=r"PIL\.")


def _quiet_libtiff() -> None:
    """Have the libtiff that Pillow has loaded keep its remarks to itself: it writes them to stderr, a line per odd tag."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return
    for path in {line.split(maxsplit=5)[-1] for line in mapped if "/libtiff" in line}:
        library = ctypes.CDLL(path)
        for name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
            getattr(library, name)(None)


_quiet_libtiff()
logging.getLogger("PIL").addHandler(logging.NullHandler())  # or else errors that are raised, too, go to stderr


class UnreadableImage(ValueError):
    """The image cannot be used; the message says why, without its name, which is in ``name``."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return UnreadableImage, (self.name, self.reason)


class EncodedImage:
    """An image whose header has been read: ``width`` and ``height`` are those of the upright image, ``mode`` and ``format`` are
    Pillow's, ``orientation`` is EXIF's, 1 to 8. Raises UnreadableImage."""

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        if not data:
            raise UnreadableImage(name, "the file is empty")
        try:
            self._image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError:
            raise UnreadableImage(name, f"its header announces more than {MOST_PIXELS:,} pixels") from None
        except Image.UnidentifiedImageError:
            raise UnreadableImage(name, "no known image format") from None
        except Exception as error:  # Decoders of strangers' bytes raise anything at all.
            raise UnreadableImage(name, _reason(error)) from None
        width, height = self._image.size
        if width * height > MOST_PIXELS:
            raise UnreadableImage(name, f"its header announces {width} × {height} pixels, more than {MOST_PIXELS:,}")
        self.mode, self.format = self._image.mode, self._image.format
        if self.format not in HEADER_FIRST:
            # Pillow itself decodes some of the others to look for EXIF, and a failure there must not pass for "no EXIF".
            self._load()
        self.orientation = _orientation(self._image)
        width, height = self._image.size
        self.width, self.height = (height, width) if self.orientation >= 5 else (width, height)

    def decode(self, reduction: int = 1) -> Image.Image:
        """The upright RGB image. Raises UnreadableImage.

        Of a JPEG each side may be divided by a ``reduction`` of 2, 4 or 8, rounded up: then blocks of coefficients become as many times
        fewer pixels, which is faster than to decode all and resize.
        """
        if reduction > 1 and self.format == "JPEG":
            width, height = self._image.size
            self._image.draft(None, (width // reduction, height // reduction))
        self._load()
        try:
            image = _to_rgb(self._image)
            return image if self.orientation == 1 else image.transpose(UPRIGHT[self.orientation])
        except Exception as error:
            raise UnreadableImage(self.name, _reason(error)) from None

    def _load(self) -> None:
        try:
            self._image.load()
        except Exception as error:  # As above.
            raise UnreadableImage(self.name, _reason(error)) from None


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """The upright RGB image in ``data``. Raises UnreadableImage, which carries ``name``."""
    return EncodedImage(data, name).decode()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # A broken EXIF block says nothing about the pixels.
        return 1
    return value if value in UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode.startswith("I;16"):
        return _from_wide(np.asarray(image).astype(np.float32), 2 ** _bits(image) - 1)
    if mode in ("I", "F"):
        return _from_wide(np.asarray(image).astype(np.float32), None)
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # not in place
        return converted
    if mode == "La":
        image = image.convert("LA")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema() == (0, 0) or alpha.getextrema() == (255, 255):
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _bits(image: Image.Image) -> int:
    """Bits of a 16-bit image that are in use: TIFF may store 12 of them and says so."""
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
    return bits[0] if isinstance(bits, tuple) and 8 < bits[0] <= 16 else 16


def _from_wide(values: np.ndarray, most: float | None) -> Image.Image:
    """Grey values to 8 bits. Without a known range: 0 … 1, 0 … 255 or 0 … 65535 if they fit it, else their own."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    least, own_most = float(values.min()), float(values.max())
    if most is None:
        fitting = (limit for limit in (1.0, 255.0, 65535.0) if own_most <= limit)
        most = next(fitting, None) if least >= 0 else None
        if most is None:
            values, most = values - least, max(own_most - least, 1e-12)
    return Image.fromarray((np.clip(values / most, 0, 1) * 255 + 0.5).astype(np.uint8)).convert("RGB")
