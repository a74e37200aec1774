"""From (epoch, image numbers) to what DALI's graph takes: bytes that it can decode and what was drawn for them.

DALI decodes plain JPEGs. Everything else (other formats, CMYK, damaged files) goes through ``decode.decode_rgb`` here, the judge of what
is readable for both loaders, and is fed as pixels. A micro-batch is prepared by one thread, several micro-batches at a time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from massl_fast.data.crops import View, sample_generator
from massl_fast.data.dali.draws import Draws, ViewTable, draw_batch, random_numbers
from massl_fast.data.decode import UnreadableImage, decode_rgb
from massl_fast.data.jpeg import jpeg_header
from massl_fast.data.loader import REPLACEMENTS
from massl_fast.data.sources import Source

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
    header = jpeg_header(data)
    if header is None:
        return None
    width, height, orientation, scan = header
    stop = STOP.search(data, scan)
    if stop is None or stop[0] != b"\xff\xd9":
        return None
    return (height, width) if orientation >= 5 else (width, height)
