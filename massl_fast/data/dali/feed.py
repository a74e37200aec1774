"""From (epoch, image numbers) to what DALI's graph takes: bytes that it can decode and what was drawn for them.

DALI decodes plain JPEGs. Everything else (other formats, CMYK, damaged files) goes through ``decode.decode_rgb`` here, the judge of what
is readable for both loaders, and is fed as pixels. A micro-batch is prepared by one thread, several micro-batches at a time.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from massl_fast.data.crops import View, sample_generator
from massl_fast.data.dali.draws import Draws, ViewTable, draw_batch, random_numbers
from massl_fast.data.decode import MOST_PIXELS, ORIENTATION, UnreadableImage, decode_rgb
from massl_fast.data.loader import REPLACEMENTS
from massl_fast.data.sources import Source

BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
START_OF_SCAN, APP1, APP14 = 0xDA, 0xE1, 0xEE
RGB = (82, 71, 66)  # component identifiers, letters
# After the first scan has begun, a byte 255 is followed by 0 (escaped), by a restart, by fill or by a segment between the scans of a
# progressive image. What is not must be the end marker; anything else a decoder takes for damage.
STOP = re.compile(rb"\xff[^\x00\xff\xc4\xd0-\xd7\xda\xdb\xdd\xe0-\xef\xfe]")


@dataclass(frozen=True)
class Prepared:
    """One micro-batch on its way into the graph."""

    epoch: int
    wanted: np.ndarray  # int64 [N], image numbers as the order has them
    indices: np.ndarray  # int64 [N], those of the images that take their places
    encoded: list[np.ndarray]  # N × uint8 [bytes]
    draws: Draws | None
    on_host: int  # images that were decoded here
    bad: list[tuple[str, str]]  # name and reason of each unreadable image met
    failure: str | None  # a sentence, if no readable image was found


class Feed:
    """Prepares micro-batches of ``views`` of images in ``source``; may be called from several threads."""

    def __init__(self, source: Source, views: Sequence[View], seed: int) -> None:
        self.source, self.seed = source, seed
        self._views = ViewTable(views)
        self._unreadable: dict[int, str] = {}
        self.not_for_dali: set[int] = set()  # JPEGs that DALI refused although they looked plain

    def prepare(self, epoch: int, wanted: np.ndarray) -> Prepared:
        indices, encoded, sizes, bad, on_host = wanted.copy(), [], [], [], 0
        for n, index in enumerate(wanted.tolist()):
            found = self._readable(epoch, index, bad)
            if found is None:
                failure = (
                    f"{REPLACEMENTS} images of {self.source.path} that were tried one after another cannot be read; "
                    f"the last was {bad[-1][0]}: {bad[-1][1]}. Look at the data with massl-fast data check."
                )
                return Prepared(epoch, wanted, indices, [], None, on_host, bad, failure)
            indices[n], data, size, by_dali = found
            encoded.append(data)
            sizes.append(size)
            on_host += not by_dali
        widths, heights = np.array(sizes).T
        numbers = random_numbers(self.seed, epoch, wanted.tolist(), self._views.count)
        return Prepared(epoch, wanted, indices, encoded, draw_batch(self._views, numbers, widths, heights), on_host, bad, None)

    def _readable(self, epoch: int, index: int, bad: list[tuple[str, str]]) -> tuple[int, np.ndarray, tuple[int, int], bool] | None:
        """(number, bytes, (width, height), whether DALI decodes it) of the image or of its first readable replacement.

        Replacements are those of ``torchvision_loader``: decided by the wanted image's number and the epoch.
        """
        generator = None
        for _ in range(1 + REPLACEMENTS):
            reason = self._unreadable.get(index)
            if reason is None:
                try:
                    return (index, *self._load(index))
                except UnreadableImage as error:
                    reason = error.reason
                except OSError as error:
                    reason = error.strerror or str(error)
                self._unreadable[index] = reason
            bad.append((self.source.name(index), reason))
            generator = generator or sample_generator(self.seed, epoch, index, stream=1)
            index = int(generator.integers(len(self.source)))
        return None

    def _load(self, index: int) -> tuple[np.ndarray, tuple[int, int], bool]:
        data = self.source.read(index)
        size = None if index in self.not_for_dali else plain_jpeg_size(data)
        if size is not None:
            return np.frombuffer(data, np.uint8), size, True
        image = decode_rgb(data, self.source.name(index))
        # A portable pixmap is a header and the pixels: DALI's decoder passes them through.
        header = b"P6 %d %d 255\n" % image.size
        return np.frombuffer(header + image.tobytes(), np.uint8), image.size, False


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height, upright, of a JPEG that DALI decodes to the pixels that Pillow does; None for anything else or in doubt.

    Only the header is parsed; the compressed data must reach an end marker and hold no marker that a decoder would stumble on.
    """
    try:
        header = _jpeg_header(data)
    except (IndexError, struct.error):
        return None
    if header is None:
        return None
    width, height, orientation, scan = header
    if not 0 < width * height <= MOST_PIXELS:
        return None
    stop = STOP.search(data, scan)
    if stop is None or stop[0] != b"\xff\xd9":
        return None
    return (height, width) if orientation >= 5 else (width, height)


def _jpeg_header(data: bytes) -> tuple[int, int, int, int] | None:
    """(width, height, EXIF orientation, where the first scan begins); None where it is not plain."""
    if data[:2] != b"\xff\xd8":
        return None
    at, size, orientation = 2, None, None
    while True:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if length < 2:
            return None
        body = at + 4
        at += 2 + length
        if marker in (BASELINE, EXTENDED, PROGRESSIVE):
            precision, height, width, components = struct.unpack_from(">BHHB", data, body)
            identifiers = tuple(data[body + 6 : body + 6 + 3 * components : 3])
            if size or precision != 8 or components not in (1, 3) or identifiers == RGB:
                return None
            size = width, height
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # lossless, hierarchical or arithmetic coding
        elif marker == APP14 and data.startswith(b"Adobe", body):
            # Its colour transform: 1 is YCbCr, 0 would be RGB or grey.
            if data[body + 11] != 1:
                return None
        elif marker == APP1:
            if data.startswith(b"Exif\0\0", body):
                if orientation is not None:
                    return None
                orientation = _exif_orientation(data[body + 6 : at])
            elif data.find(b"Orientation", body, at) >= 0:
                return None  # XMP, which Pillow looks at and DALI does not
        elif marker == START_OF_SCAN:
            return None if size is None else (*size, orientation or 1, at)
        elif marker < 0xC0:
            return None


def _exif_orientation(tiff: bytes) -> int:
    """1 to 8; 1 where the first directory has none. Raises IndexError or struct.error where the block is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        raise IndexError("no TIFF header")
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, first)
    if first + 2 + 12 * count > len(tiff):
        raise IndexError("a directory longer than the block")
    for entry in range(first + 2, first + 2 + 12 * count, 12):
        tag, kind, values, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == ORIENTATION:
            if kind != 3 or values != 1:
                raise IndexError("an orientation that is not one short integer")
            return value if 1 <= value <= 8 else 1
    return 1
