"""Copy detection: altered images find their original (Copydays, Douze et al. 2009), as DINO, iBOT and MaSSL run it (table 5).

Features are [CLS] and the generalised mean of the patch tokens, compared by cosine; average precision is over the 20 nearest. A folder of
the user's own pairs takes the place of Copydays.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from massl_fast.data.decode import decode_rgb
from massl_fast.evaluation.base import Figure, Protocol, Result, Settings
from massl_fast.evaluation.images import SizedImages, Square, files_below
from massl_fast.evaluation.knn import nearest_neighbours
from massl_fast.evaluation.layouts.copydays import PAIRS, Block, CopySet, read_copies
from massl_fast.evaluation.metrics.ranking import micro_average_precision, positions_in_ranking, truncated_average_precisions
from massl_fast.evaluation.pictures import Picture, column_of, framed, row_of, spread
from massl_fast.evaluation.subject import Subject
from massl_fast.evaluation.tokens import vectors_of
from massl_fast.models.recipes import default_recipe

IMAGE_SIZE = 224
NEAREST = 20
SHOWN = 8
EIGENVALUE_FLOOR = 1e-5
BENCHMARK = (157, 229)
PUBLISHED = {
    "DINO ViT-S/16": 85.7, "iBOT ViT-S/16": 83.7, "MaSSL ViT-S/16": 85.5,
    "DINO ViT-B/16": 86.8, "iBOT ViT-B/16": 84.2, "MaSSL ViT-B/16": 87.6,
}  # fmt: skip


class CopiesSettings(Settings):
    data: str
    """Folder of Copydays (original/, strong/, jpegqual/Q/, crops/C/), or one with pairs.csv: two columns, copy and original."""
    distractors: str = ""
    """Images that stand among the originals: a folder or tars; empty: none."""
    whiten: str = ""
    """Images that the whitening of the features is learned from: a folder or tars; empty: no whitening."""


class Copies(Protocol):
    """Copy detection: altered images find their original among others by cosine similarity of frozen features.

    mAP counts the 20 nearest only, as published; micro-AP is what one threshold for all images gives; recall is that of the nearest image.
    """

    name = "copies"
    title = "Copy detection, %"
    Settings = CopiesSettings
    settings: CopiesSettings
    recipes = ("cls+gem4",)

    def figures(self) -> list[Figure]:
        figures = [
            Figure("strong_map_percent", "mAP strong"),
            Figure("map_percent", "mAP all copies"),
            Figure("micro_ap_percent", "micro-AP"),
            Figure("recall_at_1_percent", "recall at 1"),
        ]
        return figures[1:] if (Path(self.settings.data) / PAIRS).is_file() else figures

    @property
    def headline(self) -> Figure:
        return next(figure for figure in self.figures() if figure.key == "map_percent")

    def prepare(self, subject: Subject) -> list[str]:
        subject.features_name(copy_recipe)
        found = read_copies(Path(self.settings.data))
        for name in ("distractors", "whiten"):
            if getattr(self.settings, name):
                subject.source(getattr(self.settings, name), name, "train")
        copied = {original for block in found.blocks if block.name != "original" for original in block.originals}
        lonely = len(found.originals) - len(copied)
        return [f"{lonely} of {len(found.originals)} originals have no copy and are there to be confused with."] if lonely else []

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        found = read_copies(Path(settings.data))
        recipe, side = subject.features_name(copy_recipe), subject.size_or(IMAGE_SIZE)
        unreadable: list[str] = []

        def vectors(source) -> tuple[dict[str, Tensor], list[int]]:
            images = SizedImages(source, Square(side), shard=subject.shard)
            rows, positions = vectors_of(subject, images, recipe)
            unreadable.extend(images.names_of_unreadable())
            return {name: F.normalize(values, dim=1) for name, values in rows.items()}, positions

        files = list(dict.fromkeys([*found.originals, *(file for block in found.blocks for file in block.files)]))
        rows, positions = vectors(files_below(found.root, files))
        place = {files[position]: row for row, position in enumerate(positions)}
        others = vectors(subject.source(settings.distractors, "distractors", "train"))[0] if settings.distractors else {}
        learned = vectors(subject.source(settings.whiten, "whiten", "train"))[0] if settings.whiten else {}
        results, averages = {}, {}
        for name, values in rows.items():
            gallery = torch.cat([values[[place[file] for file in found.originals if file in place]], *([others[name]] if others else [])])
            values = {file: values[row] for file, row in place.items()}
            if learned:
                mean, matrix = whitening(learned[name])
                gallery = whitened(gallery, mean, matrix)
                values = {file: whitened(row[None], mean, matrix)[0] for file, row in values.items()}
            results[name], averages[name] = _scores(found, values, gallery, subject.device)
        strong = next((block for block in found.blocks if block.name == "strong"), None)
        departures = self._departures(found, strong, side, recipe)
        network = next(iter(subject.networks))
        copies = {block.name: len(block.files) for block in found.blocks if block.name != "original"}
        own = (len(found.originals), len(strong.files) if strong else 0) == BENCHMARK and not departures
        return Result(
            results=results,
            data={
                "test": {"path": settings.data, "originals": len(found.originals), "copies": {b.name: len(b.files) for b in found.blocks}}
            },
            features=recipe,
            image_size=side,
            about=f"{sum(copies.values())} copies of {len(found.originals)} originals of {settings.data}"
            + (f" among {len(next(iter(others.values())))} distractors." if others else "."),
            departures=departures,
            notes=notes,
            unreadable=tuple(unreadable),
            published=[dict(who=who, value=value, source="MaSSL, table 5, strong") for who, value in PUBLISHED.items()] if own else [],
            pictures=_pictures(found, rows[network], place, averages[network]) if subject.pictures else [],
        )

    def _departures(self, found: CopySet, strong: Block | None, side: int, recipe: str) -> list[str]:
        departures = []
        if found.own_pairs:
            return ["The images are pairs of the user's own, not Copydays."]
        if (len(found.originals), len(strong.files) if strong else 0) != BENCHMARK:
            theirs = "Copydays has {} and {}".format(*BENCHMARK)
            departures.append(
                f"There are {len(found.originals)} originals and {len(strong.files) if strong else 0} strong copies; {theirs}."
            )
        if side != IMAGE_SIZE:
            departures.append(
                f"Images are {side} px; iBOT's code has {IMAGE_SIZE} as its default, DINO and CARP take 320, MaSSL does not say."
            )
        if recipe not in ("cls+gem4", "pooled"):
            departures.append(f"Features are {recipe} instead of cls+gem4.")
        if self.settings.distractors or self.settings.whiten:
            departures.append("Distractors or whitening take part, as in DINO's README; MaSSL and iBOT use neither.")
        return departures


def copy_recipe(backbone: nn.Module) -> str:
    """[CLS] and the generalised mean of the patches where there are such, else what the network pools."""
    return "cls+gem4" if default_recipe(backbone) == "cls" else "pooled"


def whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [D], matrix [D, D]) of DINO's whitening, learned from unit rows [n, D].

    The second moment stands for the covariance, uncentred though the mean is subtracted afterwards; eigenvalues are floored at 1e-5 of the
    largest, and their power is -1/2.
    """
    rows = features.double()
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values = values.clamp_min(EIGENVALUE_FLOOR * values.max())
    return rows.mean(0), vectors * values.rsqrt()


def whitened(features: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """Unit rows, float32."""
    return F.normalize((features.double() - mean) @ matrix, dim=1).float()


def _scores(found: CopySet, values: dict[str, Tensor], gallery: Tensor, device: torch.device) -> tuple[dict, dict[str, float]]:
    """(figures, {copy's file: average precision}); the gallery holds the readable originals first, in order."""
    readable = [file for file in found.originals if file in values]
    place = {file: row for row, file in enumerate(readable)}
    figures: dict[str, float] = {}
    queries, sources, files, by_block = [], [], [], {}
    for block in found.blocks:
        pairs = [(file, found.originals[o]) for file, o in zip(block.files, block.originals)]
        pairs = [(file, place[original]) for file, original in pairs if file in values and original in place]
        by_block[block.name] = range(len(files), len(files) + len(pairs))
        files += [file for file, _ in pairs]
        queries += [values[file] for file, _ in pairs]
        sources += [source for _, source in pairs]
    rows, gallery = torch.stack(queries).to(device), gallery.to(device)
    positions = positions_in_ranking(rows, gallery, [np.array([source]) for source in sources])
    averages = truncated_average_precisions(positions, NEAREST)
    for name, members in by_block.items():
        if len(members):
            figures[f"{name.replace('/', '_')}_map_percent"] = 100 * float(averages[list(members)].mean())
    copies = [i for name, members in by_block.items() if name != "original" for i in members]
    if copies:
        similarity, index = nearest_neighbours(rows[copies], gallery, min(NEAREST, len(gallery)))
        correct = index.numpy() == np.array(sources)[copies][:, None]
        figures["map_percent"] = 100 * float(averages[copies].mean())
        figures["micro_ap_percent"] = 100 * micro_average_precision(similarity.numpy().ravel(), correct.ravel(), len(copies))
        figures["recall_at_1_percent"] = 100 * float(np.mean([positions[i][0] == 0 for i in copies]))
    return figures, {files[i]: float(averages[i]) for i in copies}


def _pictures(found: CopySet, rows: Tensor, place: dict[str, int], averages: dict[str, float]) -> list[Picture]:
    """Copies with their nearest originals; green is right."""
    originals = [file for file in found.originals if file in place]
    original_of = {
        file: found.originals[o] for block in found.blocks if block.name != "original" for file, o in zip(block.files, block.originals)
    }
    gallery = rows[[place[file] for file in originals]]
    pictures = []
    for rank, copy in spread(averages):
        _, nearest = nearest_neighbours(rows[place[copy]][None], gallery, min(SHOWN, len(gallery)))

        def opened(name: str):
            return decode_rgb((found.root / name).read_bytes(), name)

        shown = [framed(opened(copy), None)]
        shown += [framed(opened(originals[i]), originals[i] == original_of[copy]) for i in nearest[0].tolist()]
        caption = f"{rank} copy, {copy}: AP {100 * averages[copy]:.1f} %, its nearest originals; green is right"
        pictures.append(Picture(f"copies_{rank}", caption, column_of([row_of(shown, shown[0].height)])))
    return pictures
