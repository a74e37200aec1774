"""What a trained network sees: attention of the [CLS] token, and the nearest training images of held-out ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from massl_fast.data.loaders import open_data
from massl_fast.data.sources import Source
from massl_fast.evaluation.features import SMALL_IMAGE, Features, LabelledImages, eval_mode, extract, fixed_subset
from massl_fast.evaluation.knn import nearest_neighbours
from massl_fast.models.attention import class_token_attention, similarity_to_mean
from massl_fast.models.published import load_backbone
from massl_fast.run.checkpoint import CheckpointFolder
from massl_fast.run.reading import RunFolder

NUM_QUERIES = 12
NUM_NEIGHBOURS = 8
NUM_ATTENTION_IMAGES = 6
MAX_TRAIN_IMAGES = {"cpu": 4_000, "cuda": 20_000}
MAX_WORKERS = 8


@dataclass(frozen=True)
class NeighbourSheet:
    """Q held-out images, each with its M nearest training images, nearest first."""

    queries: Tensor
    """[Q, 3, S, S], uint8."""
    query_classes: Sequence[str]
    neighbours: Tensor
    """[Q, M, 3, S, S], uint8."""
    neighbour_classes: Sequence[Sequence[str]]
    similarities: Tensor
    """[Q, M], cosine."""
    gallery: str
    """Which training images were searched, in words."""


@dataclass(frozen=True)
class Pictures:
    """Either part may be missing; its note then says why."""

    images: Tensor | None = None
    """[N, 3, S, S], uint8: the images that `attention` belongs to."""
    attention: Tensor | None = None
    """[N, maps, h, w]: attention of each head, or one map of similarities."""
    similarity: bool = False
    """Whether the maps are similarities to the mean of the image, for networks without a [CLS] token."""
    attention_note: str = ""
    neighbours: NeighbourSheet | None = None
    neighbours_note: str = ""


def pictures_of_run(
    run: RunFolder,
    *,
    backbone: nn.Module | None = None,
    train_source: Source | None = None,
    test_source: Source | None = None,
    max_train_images: int | None = None,
    device: torch.device | str | None = None,
) -> Pictures:
    """Pictures of a run's teacher on its labelled images; what is not given is taken from its last checkpoint and its settings.

    Where something is missing, the notes say what.
    """
    image_size = run.setting("evaluation", "image_size") or run.setting("crops", "global_size")
    mean, std = run.setting("crops", "mean"), run.setting("crops", "std")
    try:
        if train_source is None or test_source is None:
            train_source, test_source = (_evaluation_source(run, role) for role in ("train", "test"))
        if backbone is None:
            checkpoint = CheckpointFolder(run.path / "checkpoints").last_intact()
            if checkpoint is None:
                raise ValueError("The run has no complete checkpoint to draw pictures from.")
            backbone, _ = load_backbone(checkpoint, which="teacher")
            backbone.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if not (image_size and mean and std):
            raise ValueError("config.yaml does not say how large the images are and how they are normalised.")
        return collect_pictures(
            backbone, train_source, test_source, image_size=image_size, mean=mean, std=std, max_train_images=max_train_images
        )
    except (ValueError, OSError, torch.OutOfMemoryError) as reason:
        return Pictures(attention_note=str(reason), neighbours_note=str(reason))


def _evaluation_source(run: RunFolder, role: str) -> Source:
    return open_data(run.setting("evaluation", role) or "", f"evaluation.{role}", role)


def collect_pictures(
    network: nn.Module,
    train_source: Source,
    test_source: Source,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    max_train_images: int | None = None,
) -> Pictures:
    """Pictures of a timm network on labelled sources, computed in float32 where the network is.

    The held-out images are drawn at random, one per class in turn, the same every time. Their neighbours are searched among a fixed random
    subset of `max_train_images` training images (0: all; None: 20,000 on a GPU, 4,000 on a CPU), so that the report of a large run does not
    take long.
    """
    device = next(network.parameters()).device
    queries = LabelledImages(test_source, image_size, positions=one_of_each_class(test_source, NUM_QUERIES))
    if max_train_images is None:
        max_train_images = MAX_TRAIN_IMAGES.get(device.type, MAX_TRAIN_IMAGES["cpu"])
    subset = fixed_subset(len(train_source), max_train_images)
    # Small images are decoded faster than processes start.
    num_workers = 0 if image_size <= SMALL_IMAGE else min(MAX_WORKERS, os.cpu_count() or 1)
    settings = dict(device=device, mean=mean, std=std, num_workers=num_workers)
    query = extract({"network": network}, queries, **settings, keep_images=True)["network"]
    key = extract({"network": network}, LabelledImages(train_source, image_size, positions=subset), **settings)["network"]
    pixels, readable = queries.kept
    pixels = pixels[readable]
    sheet = _neighbour_sheet(pixels, query, key, train_source, image_size)
    images = pixels[:NUM_ATTENTION_IMAGES]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    inputs = ((images / 255 - mean) / std).to(device)
    with eval_mode([network]):
        try:
            return Pictures(images=images, attention=class_token_attention(network, inputs), neighbours=sheet)
        except ValueError as no_attention:
            try:
                return Pictures(images=images, attention=similarity_to_mean(network, inputs), similarity=True, neighbours=sheet)
            except ValueError as no_map:
                return Pictures(attention_note=f"{no_attention} {no_map}", neighbours=sheet)


def _neighbour_sheet(pixels: Tensor, query: Features, key: Features, train_source: Source, image_size: int) -> NeighbourSheet:
    similarities, nearest = nearest_neighbours(query.features, key.features, min(NUM_NEIGHBOURS, len(key.labels)))
    shown = LabelledImages(train_source, image_size, positions=key.indices[nearest.flatten()].numpy())
    number, total = len(key.labels), len(train_source)
    return NeighbourSheet(
        queries=pixels,
        query_classes=[query.classes[label] for label in query.labels.tolist()],
        neighbours=torch.stack([shown[i][0] for i in range(len(shown))]).unflatten(0, nearest.shape),
        neighbour_classes=[[key.classes[label] for label in row] for row in key.labels[nearest].tolist()],
        similarities=similarities,
        gallery=f"all {number} training images" if number == total else f"{number} of the {total} training images",
    )


def one_of_each_class(source: Source, count: int) -> np.ndarray:
    """Positions of `count` images, the same every time: a random image of each class, then a second of each, and so on."""
    order = np.random.default_rng(0).permutation(len(source))
    seen: dict[int | None, int] = {}
    turns = []
    for position in order:
        label = source.label(int(position))
        seen[label] = turn = seen.get(label, -1) + 1
        turns.append((turn, -1 if label is None else label, position))
    return np.array([position for _, _, position in sorted(turns)[:count]], dtype=np.int64)
