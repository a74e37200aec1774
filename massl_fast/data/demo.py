"""The image set of ``make demo``: small pictures of twelve forms and textures, generated on first use.

What tells the classes apart is form alone. Colour, place, size, tilt, light, clutter and noise are drawn independently of the class,
so that nearest neighbours in pixels are nearly at chance and a network has to learn what stays the same between crops.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

VERSION = 1  # of the pictures: raise it with any change to them
SIZE = 48  # pixels
FINE = 2 * SIZE  # drawn at twice the size, then reduced
TRAIN_A_CLASS, TEST_A_CLASS = 500, 84
MARK = "massl_fast_demo.json"


def ensure_demo_images(folder: str | os.PathLike) -> tuple[Path, Path]:
    """The folders of training and test images in ``folder``, each with a folder per class; makes them where they are missing.

    6,000 and 1,008 JPEG files of 48 × 48 pixels, the same on every machine up to the JPEG encoder. ``folder`` is complete or absent:
    it is written under another name and renamed. Raises ValueError where ``folder`` holds something else or cannot be written.
    """
    folder = Path(folder)
    wanted = {"version": VERSION, "train_a_class": TRAIN_A_CLASS, "test_a_class": TEST_A_CLASS}
    if folder.exists():
        mark = folder / MARK
        if not mark.is_file():
            raise ValueError(f"{folder} exists, but does not hold the demonstration images. Move it away, or name another folder for them.")
        if json.loads(mark.read_text(encoding="utf-8")) == wanted:
            return folder / "train", folder / "test"
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for split, first, count in (("train", 0, TRAIN_A_CLASS), ("test", TRAIN_A_CLASS, TEST_A_CLASS)):
            for number, name in enumerate(FORMS):
                into = partial / split / name
                into.mkdir(parents=True)
                for n in range(first, first + count):
                    draw_picture(name, number * 1_000_000 + n).save(into / f"{n:04d}.jpg", quality=90)
        (partial / MARK).write_text(json.dumps(wanted), encoding="utf-8")
        if folder.exists():  # of another version, and ours by its mark
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (folder / MARK).is_file():  # another process was faster
            return folder / "train", folder / "test"
        raise ValueError(f"The demonstration images cannot be written to {folder}: {error.strerror}.") from None
    return folder / "train", folder / "test"


def draw_picture(form: str, number: int) -> Image.Image:
    """Picture ``number`` of a class, RGB of ``SIZE`` × ``SIZE`` pixels; the number decides everything about it."""
    random = np.random.Generator(np.random.Philox(key=[VERSION, number]))
    mask = Image.new("L", (FINE, FINE))
    radius = FINE * random.uniform(0.28, 0.46)
    centre = FINE / 2 + random.uniform(-1, 1, 2) * (FINE * 0.54 - radius)
    FORMS[form](ImageDraw.Draw(mask), Frame(centre, radius, random.uniform(-0.4, 0.4)), random)
    cover = np.asarray(mask.reduce(2), np.float32)[..., None] / 255
    paper, ink = _colours(random)
    picture = _background(random, paper)
    picture += cover * (_shading(random, ink) - picture)
    picture += random.normal(0, random.uniform(2, 10), picture.shape)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


class Frame:
    """Coordinates of a form: its centre is the origin, its radius 1, tilted."""

    def __init__(self, centre: np.ndarray, radius: float, tilt: float) -> None:
        self.centre, self.radius = centre, radius
        cos, sin = math.cos(tilt), math.sin(tilt)
        self.axes = radius * np.array([[cos, sin], [-sin, cos]])

    def place(self, points) -> list[tuple[float, float]]:
        return list(map(tuple, (np.asarray(points, float) @ self.axes + self.centre).tolist()))

    def circle(self, x: float, y: float, radius: float) -> list[float]:
        ((x, y),) = self.place([(x, y)])
        radius *= self.radius
        return [x - radius, y - radius, x + radius, y + radius]


def _colours(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours of paper and ink, 0 … 255, far enough apart to see one on the other."""
    while True:
        paper, ink = random.uniform(20, 235, (2, 3))
        if np.abs(paper - ink).sum() > 150:
            return paper, ink


def _shading(random: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """[SIZE, SIZE, 3]: the colour, lighter towards one side."""
    along = np.linspace(-1, 1, SIZE)
    across, down = random.uniform(-25, 25, 2)
    return colour + (across * along + down * along[:, None])[..., None]


def _background(random: np.random.Generator, paper: np.ndarray) -> np.ndarray:
    """[SIZE, SIZE, 3]: shaded paper with faint blots and strokes."""
    clutter = Image.new("L", (FINE, FINE), 128)
    pen = ImageDraw.Draw(clutter)
    for _ in range(random.integers(2, 7)):
        x, y, width, height = random.uniform(0, FINE, 2).tolist() + random.uniform(4, FINE / 3, 2).tolist()
        grey = int(random.integers(60, 196))
        if random.random() < 0.5:
            pen.ellipse([x - width, y - height, x + width, y + height], fill=grey)
        else:
            pen.line([x, y, x + 2 * width - FINE / 3, y + 2 * height - FINE / 3], fill=grey, width=int(random.integers(2, 6)))
    tint = random.uniform(0.1, 0.5, 3)
    return _shading(random, paper) + tint * (np.asarray(clutter.reduce(2), np.float32) - 128)[..., None]


# The forms: each draws white on the mask.


def _polygon(corners) -> Callable:
    def draw(pen: ImageDraw.ImageDraw, frame: Frame, random: np.random.Generator) -> None:
        pen.polygon(frame.place(corners), fill=255)

    return draw


def _around(count: int, *radii: float) -> np.ndarray:
    """``count`` points on circles around the origin, the radii taking turns; the first one on top."""
    angles = np.arange(count) * (2 * math.pi / count) - math.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.resize(radii, count)[:, None]


def _cross_corner(a: int, b: int) -> list[tuple[float, float]]:
    """The three corners of a cross in one quadrant, counted around the origin."""
    corners = [(a, 0.3 * b), (0.3 * a, 0.3 * b), (0.3 * a, b)]
    return corners if a == b else corners[::-1]


def _disc(pen: ImageDraw.ImageDraw, frame: Frame, random: np.random.Generator) -> None:
    pen.ellipse(frame.circle(0, 0, 0.9), fill=255)


def _rings(pen: ImageDraw.ImageDraw, frame: Frame, random: np.random.Generator) -> None:
    for radius, fill in ((1.0, 255), (0.75, 0), (0.45, 255), (0.2, 0)):
        pen.ellipse(frame.circle(0, 0, radius), fill=fill)


def _crescent(pen: ImageDraw.ImageDraw, frame: Frame, random: np.random.Generator) -> None:
    pen.ellipse(frame.circle(0, 0, 1.0), fill=255)
    pen.ellipse(frame.circle(0.5, 0, 0.75), fill=0)


def _spiral(pen: ImageDraw.ImageDraw, frame: Frame, random: np.random.Generator) -> None:
    turns = np.linspace(0.3, 2.4, 40)
    angles = 2 * math.pi * turns
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * (turns / 2.4)[:, None]
    pen.line(frame.place(points), fill=255, width=max(3, round(0.17 * frame.radius)), joint="curve")


def _stripes(pen: ImageDraw.ImageDraw, frame: Frame, random: np.random.Generator) -> None:
    for y in np.arange(-0.9, 1.0, 0.5):
        pen.polygon(frame.place([(-1, y), (1, y), (1, y + 0.25), (-1, y + 0.25)]), fill=255)


def _checkerboard(pen: ImageDraw.ImageDraw, frame: Frame, random: np.random.Generator) -> None:
    steps = np.arange(-0.9, 0.8, 0.45)
    for i, x in enumerate(steps):
        for j, y in enumerate(steps):
            if (i + j) % 2:
                pen.polygon(frame.place([(x, y), (x + 0.45, y), (x + 0.45, y + 0.45), (x, y + 0.45)]), fill=255)


def _dots(pen: ImageDraw.ImageDraw, frame: Frame, random: np.random.Generator) -> None:
    for x in (-0.75, 0.0, 0.75):
        for y in (-0.75, 0.0, 0.75):
            pen.ellipse(frame.circle(x, y, 0.25), fill=255)


def _zigzag(pen: ImageDraw.ImageDraw, frame: Frame, random: np.random.Generator) -> None:
    xs = np.linspace(-1, 1, 7)
    ys = np.resize([0.0, 0.4], 7)
    for shift in (-0.9, -0.2, 0.5):
        pen.line(frame.place(np.stack([xs, ys + shift], 1)), fill=255, width=max(3, round(0.2 * frame.radius)), joint="curve")


FORMS: dict[str, Callable[[ImageDraw.ImageDraw, Frame, np.random.Generator], None]] = {
    "checkerboard": _checkerboard,
    "crescent": _crescent,
    "cross": _polygon([corner for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1)) for corner in _cross_corner(a, b)]),
    "disc": _disc,
    "dots": _dots,
    "rings": _rings,
    "spiral": _spiral,
    "square": _polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]),
    "star": _polygon(_around(10, 1.05, 0.42)),
    "stripes": _stripes,
    "triangle": _polygon(np.add(_around(3, 1.0), (0, 0.15))),
    "zigzag": _zigzag,
}
