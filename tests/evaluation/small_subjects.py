"""Small benchmarks in their official layouts, with colours that tell what belongs together, and a small network to evaluate on them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from massl_fast.evaluation.layouts.masks import write_mask
from massl_fast.evaluation.subject import Subject
from massl_fast.models.backbone import build_backbone

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 80, 230), (230, 210, 40))


def subject_of(**changes) -> Subject:
    """One untrained transformer of 8-px patches at 32 px, and raw pixels."""
    torch.manual_seed(0)
    network = build_backbone("vit_tiny_patch16_224", image_size=32, model_args=dict(patch_size=8, embed_dim=24, depth=1, num_heads=2))
    settings = dict(image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, device=torch.device("cpu"), batch_size=64, size_is_chosen=True)
    return Subject({"teacher": network}, **{**settings, **changes})


def photo(path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 36)) -> np.ndarray:
    """A noisy picture of a colour; returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.array(colour) + np.random.default_rng(seed).normal(0, 12, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    return pixels


def write_landmarks(root: Path) -> Path:
    """Three colours of four images; one query of each; the third has a broken positive."""
    names = [f"c{colour}_{i}" for colour in range(3) for i in range(4)]
    for number, name in enumerate(names):
        photo(root / "jpg" / f"{name}.jpg", COLOURS[number // 4], number)
    (root / "jpg/c2_3.jpg").write_bytes(b"broken")
    for colour in range(3):
        photo(root / "jpg" / f"query {colour}.jpg", COLOURS[colour], 50 + colour)
    gnd = [
        {"bbx": [2, 3, 30, 30], "easy": [4 * c, 4 * c + 1], "hard": np.array([4 * c + 2, 4 * c + 3][c % 2 :]), "junk": []} for c in range(3)
    ]
    content = {"imlist": names, "qimlist": [f"query {colour}" for colour in range(3)], "gnd": gnd}
    (root / f"gnd_{root.name}.pkl").write_bytes(pickle.dumps(content, 2))
    return root


def write_copydays(root: Path) -> Path:
    for number, colour in enumerate(COLOURS):
        photo(root / f"original/20{number}000.jpg", colour, number)
        if number:
            photo(root / f"strong/20{number}001.jpg", colour, 90 + number)
        photo(root / f"jpegqual/5/20{number}000.jpg", colour, number)
    return root


def write_classes(root: Path, names: tuple[str, ...] = ("red", "green", "blue"), count: int = 8, seed: int = 0) -> Path:
    for number, name in enumerate(names):
        for i in range(count):
            photo(root / name / f"{i}.jpg", COLOURS[number], seed + 100 * number + i)
    return root


def write_voc2007(root: Path) -> Path:
    """Two classes that are seen and one without positives; image 1 shows its class in the difficult."""
    names = [f"{i:06d}" for i in range(24)]
    for i, name in enumerate(names):
        photo(root / f"JPEGImages/{name}.jpg", COLOURS[i % 2], i)
    (root / "ImageSets/Main").mkdir(parents=True)
    for split, part in (("trainval", range(0, 12)), ("test", range(12, 24))):
        for kind, label in (("cat", lambda i: 1 - 2 * (i % 2)), ("dog", lambda i: 0 if i == 1 else 2 * (i % 2) - 1), ("cow", lambda i: -1)):
            lines = "".join(f"{names[i]} {label(i):2d}\n" for i in part)
            (root / f"ImageSets/Main/{kind}_{split}.txt").write_text(lines)
    return root


def write_voc2012(root: Path, count: int = 4) -> Path:
    """A coloured square on noise in each image: classes 1 and 2, void around; masks half the size of the last image."""
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    names = [f"image {i}" for i in range(2 * count)]
    for number, name in enumerate(names):
        pixels = photo(root / f"JPEGImages/{name}.jpg", (120, 120, 120), number, (64, 64))
        labels = np.zeros((64, 64), np.uint8)
        labels[14:50, 14:50] = 255
        labels[16:48, 16:48] = 1 + number % 2
        pixels[labels == 1 + number % 2] = COLOURS[number % 2]
        Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg", quality=95)
        step = 2 if number == len(names) - 1 else 1
        write_mask(root / f"SegmentationClass/{name}.png", labels[::step, ::step])
        write_mask(root / f"SegmentationObject/{name}.png", np.where(labels == 255, 255, labels > 0)[::step, ::step].astype(np.uint8))
    for split, part in (("train", names[:count]), ("val", names[count:])):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(part) + "\n")
    return root


def write_coco(root: Path) -> Path:
    """Two overlapping instances and a crowd per image, as run lengths."""
    images, annotations = [], []
    for number in range(3):
        photo(root / f"val2017/{number}.jpg", COLOURS[number], number, (64, 48))
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 48, "width": 64})
        for kind, (left, right) in enumerate(((0, 30), (20, 44), (48, 64))):
            runs = [48 * left, 48 * (right - left), 48 * (64 - right)]
            entry = {"id": 10 * number + kind, "image_id": number, "category_id": 1 + kind, "iscrowd": int(kind == 2)}
            annotations.append(entry | {"segmentation": {"counts": runs, "size": [48, 64]}})
    (root / "annotations").mkdir()
    (root / "annotations/instances_val2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root


def write_backgrounds(root: Path) -> Path:
    for variant in ("original", "mixed_same", "mixed_rand"):
        for number, folder in ((0, "00_dog"), (2, "02_wheeled vehicle")):
            for i in range(3):
                photo(root / variant / "val" / folder / f"{i}.JPEG", COLOURS[number], 10 * number + i)
    return root
