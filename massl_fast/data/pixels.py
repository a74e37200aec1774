"""The pixels that crops are cut from: size first, because the crops decide at what scale an image is decoded."""

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from massl_fast.data.decode import EncodedImage
from massl_fast.data.jpeg import jpeg_header


class Pixels:
    """An image for crops: ``width`` and ``height`` of the upright image at once, its pixels by the fastest way to the same bits.

    That way is torchvision's for plain upright JPEGs (grey or YCbCr, 8 bits; libjpeg-turbo as in Pillow, but straight into a tensor), and
    Pillow's for all others, for what torchvision refuses, and at a reduced scale, which torchvision does not offer. Raises UnreadableImage.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._name = data, name
        header = jpeg_header(data)
        self._encoded: EncodedImage | None = None
        self._plain = False
        if header is not None and header[2] == 1:
            self._plain = True
            self.width, self.height = header[:2]
        else:
            self._encoded = EncodedImage(data, name)
            self.width, self.height = self._encoded.width, self._encoded.height

    def decode(self, reduction: int = 1) -> torch.Tensor:
        """uint8 [H, W, 3]; of a JPEG each side may be divided by a ``reduction`` of 2, 4 or 8, rounded up. Raises UnreadableImage."""
        if self._plain and reduction == 1:
            try:
                return decode_jpeg(torch.frombuffer(bytearray(self._data), dtype=torch.uint8), ImageReadMode.RGB).permute(1, 2, 0)
            except RuntimeError:  # Pillow is the judge of what is readable.
                pass
        encoded = self._encoded or EncodedImage(self._data, self._name)
        return torch.from_numpy(np.array(encoded.decode(reduction)))
