"""Sparse correspondence: which patches of two views of an image, or of two images of a class, find each other (iBOT; MaSSL, figure 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance
from pydantic import Field

from massl_fast.data.decode import decode_rgb
from massl_fast.evaluation.base import Figure, Protocol, Result, Settings
from massl_fast.evaluation.images import SizedImages, Square, in_order
from massl_fast.evaluation.metrics.correspondence import correct_matches, correspondence_accuracy, matches, overlapping, patch_centres
from massl_fast.evaluation.pictures import Picture, linked, spread
from massl_fast.evaluation.subject import Subject, backbone_of
from massl_fast.evaluation.tokens import evaluated, normalised, patch_side, tokens_of
from massl_fast.models.attention import class_token_attention

IMAGE_SIZE = 224
AREA, RATIO = (0.4, 1.0), (3 / 4, 4 / 3)
JITTER = 0.4
SHOWN = 12


class CorrespondSettings(Settings):
    data: str
    """Images: a folder or tars; for --pairs class a folder of class folders."""
    pairs: Literal["views", "class"] = "views"
    """Two views of an image, which have an accuracy, or two images of a class, which only have pictures (--out)."""
    images: int = Field(200, ge=1)
    """Images or pairs, drawn at random by --seed."""


@dataclass(frozen=True)
class View:
    """A view of an image, the same every time for (seed, position, number): a crop, mirrored or not, in other colours."""

    side: int
    seed: int
    number: int

    def drawn(self, width: int, height: int, position: int) -> tuple[tuple[float, float, float, float], bool, list[float]]:
        """(left, top, right, bottom in pixels, whether it is mirrored, factors of brightness, contrast and saturation)."""
        generator = np.random.default_rng((self.seed, position, self.number))
        area = generator.uniform(*AREA) * width * height
        ratio = np.exp(generator.uniform(*np.log(RATIO)))
        box = min(width, np.sqrt(area * ratio)), min(height, np.sqrt(area / ratio))
        left, top = generator.uniform(0, width - box[0]), generator.uniform(0, height - box[1])
        factors = generator.uniform(1 - JITTER, 1 + JITTER, 3).tolist()
        return (left, top, left + box[0], top + box[1]), bool(generator.random() < 0.5), factors

    def __call__(self, image: Image.Image, position: int) -> Image.Image:
        box, mirrored, factors = self.drawn(*image.size, position)
        image = image.resize((self.side, self.side), Image.Resampling.BICUBIC, box=box)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
            image = enhance(image).enhance(factor)
        return image

    def corners(self, width: int, height: int, position: int) -> tuple[float, float, float, float]:
        """Top, left, bottom, right as shares of the image; left and right swapped where mirrored."""
        (left, top, right, bottom), mirrored, _ = self.drawn(width, height, position)
        left, right = (right, left) if mirrored else (left, right)
        return top / height, left / width, bottom / height, right / width


class Correspond(Protocol):
    """Sparse correspondence: every patch of one view is matched with the patch of the other of largest inner product.

    Right is the patch that is nearest by true position, or one beside it; patches that both views show count. Pictures link the 12 patches
    of highest attention, wrong links in red.
    """

    name = "correspond"
    title = "Correspondence of patches, %"
    Settings = CorrespondSettings
    settings: CorrespondSettings
    recipes = ("patches",)

    def figures(self) -> list[Figure]:
        if self.settings.pairs == "class":
            return []
        return [Figure("exact_percent", "same patch"), Figure("near_percent", "or one beside it")]

    @property
    def headline(self) -> Figure:
        return Figure("exact_percent", "same patch")

    def prepare(self, subject: Subject) -> list[str]:
        patch_side(subject)
        source = subject.source(self.settings.data, "data", "train")
        if self.settings.pairs == "class" and not source.classes:
            raise ValueError(f"{self.settings.data} has no classes; pairs of a class need a folder of class folders. Take --pairs views.")
        if self.settings.pairs == "class" and not subject.pictures:
            raise ValueError("Pairs of a class have pictures only: no truth says which patches belong together. Name a folder with --out.")
        return list(source.notes)

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        source = subject.source(settings.data, "data", "train")
        side = subject.size_or(IMAGE_SIZE) // patch_side(subject) * patch_side(subject)
        pairs = self._pairs(source, subject.seed)
        views = settings.pairs == "views"
        geometries = [View(side, subject.seed, number) for number in (0, 1)] if views else [Square(side)] * 2
        sets = [
            SizedImages(source, geometry, positions=[pair[number] for pair in pairs], shard=subject.shard)
            for number, geometry in enumerate(geometries)
        ]
        rows: dict[str, list[tuple[int, tuple[float, float]]]] = {name: [] for name in subject.networks}
        tokens = [dict(tokens_of(subject, images, colours=False)) for images in sets]
        if views:
            for position in sorted(tokens[0].keys() & tokens[1].keys()):
                size = decode_rgb(source.read(position), source.name(position)).size
                centres = [patch_centres(np.array([g.corners(*size, position)]), side // patch_side(subject)) for g in geometries]
                overlap = overlapping(*centres, margin=patch_side(subject) / 2 / side)
                for name in subject.networks:
                    match = matches(*(part[position][name].flatten(0, 1)[None].cpu().numpy() for part in tokens))
                    right = [correspondence_accuracy(correct_matches(match, *centres, radius), overlap)[0] for radius in (0, 1)]
                    rows[name].append((position, tuple(map(float, right))))
        results, by_pair = {}, {}
        for name, found in rows.items():
            ordered = in_order(found, subject.shard)
            values = np.array([value for _, value in ordered]).reshape(-1, 2)
            values = values[~np.isnan(values).any(1)]
            if views and not len(values):
                raise ValueError(f"No two views of the {len(pairs)} images of {settings.data} could be compared.")
            results[name] = dict(zip(("exact_percent", "near_percent"), (100 * values.mean(0)).tolist())) if views else {}
            by_pair[name] = {position: value[0] for position, value in ordered}
        network = next(iter(subject.networks))
        departures = [
            f"Views: {100 * AREA[0]:g} to 100 % of the area, mirrored half of the time, brightness, contrast and saturation ± 40 %."
        ]
        departures.append("The patches that are drawn are those of highest attention of the network itself, not of DINO's ViT-B/8.")
        if side != IMAGE_SIZE:
            departures.append(f"Images are {side} px instead of {IMAGE_SIZE}.")
        return Result(
            results=results,
            data={"test": {"path": settings.data, "pairs": len(pairs)}},
            features="patches",
            image_size=side,
            about=f"{len(pairs)} pairs of {settings.pairs} of {settings.data}.",
            departures=departures,
            notes=notes,
            unreadable=tuple(dict.fromkeys(name for images in sets for name in images.names_of_unreadable())),
            pictures=self._pictures(subject, source, pairs, geometries, by_pair[network]) if subject.pictures else [],
        )

    def _pairs(self, source, seed: int) -> list[tuple[int, int]]:
        """Positions of the two images of each pair; of views, the same image twice."""
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
        if self.settings.pairs == "views":
            return [(position, position) for position in order[: self.settings.images]]
        waiting: dict[int, int] = {}
        pairs = []
        for position in order:
            label = source.label(position)
            if label in waiting:
                pairs.append((waiting.pop(label), position))
            else:
                waiting[label] = position
        if not pairs:
            raise ValueError(f"No class of {self.settings.data} has two images.")
        return pairs[: self.settings.images]

    def _pictures(
        self, subject: Subject, source, pairs: list[tuple[int, int]], geometries: list, scores: dict[int, float]
    ) -> list[Picture]:
        """The median, best and worst pair of views, or the first three pairs of classes, with 12 links."""
        network, patch = next(iter(subject.networks)), patch_side(subject)
        by_first = dict(pairs)
        chosen = spread(scores) if scores else [(f"pair {number + 1}", pair[0]) for number, pair in enumerate(pairs[:3])]
        pictures = []
        for rank, position in chosen:
            ends = [SizedImages(source, geometry)[p][1] for geometry, p in zip(geometries, (position, by_first[position]))]
            if any(end is None for end in ends):
                continue
            images = [Image.fromarray(end.permute(1, 2, 0).numpy()) for end in ends]
            with evaluated(subject):
                batch = normalised(subject, torch.stack(ends))
                attention = _attention(backbone_of(subject.networks[network]), batch[:1])
            found = [
                dict(tokens_of(subject, SizedImages(source, geometry, positions=[p]), colours=False))[p][network]
                .flatten(0, 1)[None]
                .cpu()
                .numpy()
                for geometry, p in zip(geometries, (position, by_first[position]))
            ]
            match, columns = matches(*found), images[0].width // patch
            right = np.ones(match.shape, bool)
            shown = np.ones(match.shape[1], bool)
            if scores:
                size = decode_rgb(source.read(position), source.name(position)).size
                centres = [patch_centres(np.array([g.corners(*size, position)]), columns) for g in geometries]
                right, shown = correct_matches(match, *centres, 1), overlapping(*centres, margin=0.5 / columns)[0]
            strength = attention if attention is not None else (found[0][0] * found[1][0][match[0]]).sum(-1)
            first = [patch_ for patch_ in np.argsort(-strength, kind="stable") if shown[patch_]][:SHOWN]

            def middle(number: int, columns: int = columns) -> tuple[float, float]:
                return (number % columns + 0.5) * patch, (number // columns + 0.5) * patch

            links = [(middle(p), middle(int(match[0, p])), bool(right[0, p])) for p in first]
            figure = f": {100 * scores[position]:.1f} % exact" if scores else ""
            caption = (
                f"{rank} of pairs, {source.name(position)}{figure}; {network}; links of the patches of highest attention, red are wrong"
            )
            pictures.append(Picture(f"correspond_{rank.replace(' ', '_')}", caption, linked(*images, links)))
        return pictures


def _attention(backbone: torch.nn.Module, images: torch.Tensor) -> np.ndarray | None:
    """Attention of [CLS] summed over heads [P], or None for a network without such maps."""
    try:
        return class_token_attention(backbone, images)[0].sum(0).flatten().double().numpy()
    except ValueError:
        return None
