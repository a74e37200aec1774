"""Headers of plain JPEGs, read without a decoder: 8 bits, grey or YCbCr, whatever else is in doubt left to Pillow.

What is plain every build of libjpeg-turbo decodes to the same pixels, so that a faster way to it than Pillow's may be taken.
"""

import struct

BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
START_OF_SCAN, APP1, APP14 = 0xDA, 0xE1, 0xEE
RGB = (82, 71, 66)  # component identifiers, letters
ORIENTATION = 0x0112
# Larger headers are taken for decompression bombs, before any pixel is decoded: 8 bytes per pixel would be 0.7 GB here.
MOST_PIXELS = 89_478_485


def jpeg_header(data: bytes) -> tuple[int, int, int, int] | None:
    """(width, height, EXIF orientation, where the first scan begins); None where it is not plain or announces too many pixels."""
    try:
        header = _parsed(data)
    except (IndexError, struct.error):
        return None
    return header if header and 0 < header[0] * header[1] <= MOST_PIXELS else None


def _parsed(data: bytes) -> tuple[int, int, int, int] | None:
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
