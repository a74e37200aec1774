"""The folders of the backgrounds challenge (ImageNet-9), and which of its classes each ImageNet-1k class belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from massl_fast.data.decode import decode_rgb
from massl_fast.data.sources import is_image_name
from massl_fast.evaluation.layouts.lists import inside

VARIANTS = ("original", "only_fg", "mixed_same", "mixed_rand", "mixed_next", "no_fg", "only_bg_b", "only_bg_t")
CLASSES = ("dog", "bird", "wheeled vehicle", "reptile", "carnivore", "insect", "musical instrument", "primate", "fish")

# First and last ImageNet-1k class of each run that belongs to one class, from in_to_in9.json of github.com/MadryLab/backgrounds_challenge
# (commit 46d224bb02a2). The other 630 of the 1,000 belong to none.
# fmt: off
_RUNS = {
    0: ((151, 170), (173, 268)),
    1: ((7, 24), (87, 100), (127, 146)),
    2: ((407, 408), (428, 428), (436, 436), (444, 444), (468, 468), (511, 511), (547, 547), (555, 555), (561, 561), (565, 565), (569, 569),
        (573, 573), (586, 586), (603, 603), (609, 609), (612, 612), (627, 627), (656, 656), (661, 661), (665, 665), (670, 671), (675, 675),
        (690, 690), (705, 705), (717, 717), (734, 734), (751, 751), (757, 757), (791, 791), (802, 803), (817, 817), (820, 820), (829, 829),
        (847, 847), (864, 864), (866, 867), (870, 870), (880, 880)),
    3: ((33, 68),),
    4: ((269, 280), (286, 299), (356, 362), (387, 388)),
    5: ((300, 326),),
    6: ((401, 402), (420, 420), (432, 432), (486, 486), (494, 494), (513, 513), (541, 541), (546, 546), (558, 558), (566, 566), (577, 577),
        (579, 579), (593, 594), (641, 642), (683, 684), (687, 687), (699, 699), (776, 776), (822, 822), (875, 875), (881, 881), (889, 889)),
    7: ((365, 384),),
    8: ((0, 6), (389, 397)),
}
# fmt: on


def imagenet_to_nine() -> np.ndarray:
    """int64 [1000]: the ImageNet-9 class of each ImageNet-1k class, or -1."""
    mapping = np.full(1000, -1)
    for number, runs in _RUNS.items():
        for first, last in runs:
            mapping[first : last + 1] = number
    return mapping


@dataclass(frozen=True)
class Variant:
    name: str
    root: Path
    files: tuple[str, ...]
    """Paths relative to `root`."""
    labels: tuple[int, ...]
    """The number in the name of each file's folder, 0 … 8, whatever its position among the folders present."""


def read_variants(root: Path) -> list[Variant]:
    """The variants that are there: ROOT/VARIANT/val/NN_class/*.JPEG.

    Raises:
        ValueError: none is there, or a folder of a class has no number of a class in its name.
    """
    found = []
    for name in VARIANTS:
        folder = root / name / "val"
        if not folder.is_dir():
            continue
        files, labels = [], []
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith(".") or not entry.is_dir():
                continue
            number = re.match(r"(\d{1,2})_", entry.name)
            if not number or int(number[1]) >= len(CLASSES):
                raise ValueError(f"{entry} should begin with the number of its class, 00 to 08, such as 02_wheeled vehicle.")
            for file in sorted(entry.iterdir()):
                if is_image_name(file.name) and not file.name.startswith("."):
                    files.append(inside(folder, f"{entry.name}/{file.name}", entry))
                    labels.append(int(number[1]))
        if files:
            found.append(Variant(name, folder, tuple(files), tuple(labels)))
    if not found:
        raise ValueError(
            f"{root} holds none of the folders {', '.join(VARIANTS)} with images in VARIANT/val/NN_class/. Name the folder bg_challenge."
        )
    return found


@dataclass(frozen=True)
class Foreground:
    """An object of the backgrounds challenge that is put before other backgrounds."""

    image: Path
    mask: Path
    """A NumPy file, bool [H, W], as large as the image."""
    label: int


def read_foregrounds(root: Path) -> list[Foreground]:
    """ROOT/fg_mask/val/NN_class/NAME.npy, each with its image in ROOT/original; raises ValueError where there is none."""
    found = []
    folder = root / "fg_mask" / "val"
    for mask in sorted(folder.glob("[0-9]*_*/*.npy")):
        image = root / "original" / "val" / mask.parent.name / f"{mask.stem}.JPEG"
        if not image.is_file():
            raise ValueError(f"{mask} is the mask of an image that {image.parent} lacks.")
        for file in (mask, image):
            inside(root, str(file.relative_to(root)), mask)
        found.append(Foreground(image, mask, int(mask.parent.name.partition("_")[0])))
    if not found:
        raise ValueError(f"The challenge needs masks NAME.npy in {folder}/NN_class, and there are none.")
    return found


def read_foreground(foreground: Foreground) -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 [H, W, 3], mask bool [H, W]); raises ValueError where they do not belong together."""
    pixels = np.asarray(decode_rgb(foreground.image.read_bytes(), str(foreground.image)))
    try:
        mask = np.load(foreground.mask, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{foreground.mask} cannot be read as a NumPy array ({error}).") from None
    if mask.shape != pixels.shape[:2] or mask.dtype.kind not in "bui":
        raise ValueError(
            f"{foreground.mask} holds {mask.dtype} {mask.shape}; a mask of {foreground.image.name} is bool {pixels.shape[:2]}."
        )
    return pixels, mask.astype(bool)
