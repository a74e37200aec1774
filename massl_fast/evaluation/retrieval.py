"""Retrieval of landmarks: revisited Oxford and Paris (Radenović et al. 2018), features as in DINO, iBOT and MaSSL (table 4).

Similarities are cosines of one vector per image, averaged over scales before normalisation. No ranking is sorted (`metrics.ranking`), so
that a million distractors only cost their features and one product.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from massl_fast.data.decode import decode_rgb
from massl_fast.evaluation.base import Figure, Protocol, Result, Settings
from massl_fast.evaluation.images import LongerSide, SizedImages, files_below
from massl_fast.evaluation.knn import nearest_neighbours
from massl_fast.evaluation.layouts.revisited import Landmarks, read_distractors, read_landmarks
from massl_fast.evaluation.metrics.ranking import SETTINGS, Judgement, positions_in_ranking, revisited_scores
from massl_fast.evaluation.pictures import Picture, column_of, framed, row_of, spread
from massl_fast.evaluation.subject import Subject
from massl_fast.evaluation.tokens import vectors_of

IMAGE_SIZE = 512
SCALES = (1.0, 0.7071, 0.5)
KS = (1, 5, 10)
SHOWN = 10
BENCHMARKS = {"roxford5k": (70, 4993), "rparis6k": (70, 6322)}
# MaSSL, table 4: medium and hard mAP, 512 px, three scales, queries not cut to their boxes.
PUBLISHED = {
    "roxford5k": {
        "DINO ViT-S/16": (37.2, 13.9), "iBOT ViT-S/16": (36.6, 13.0), "MaSSL ViT-S/16": (38.5, 15.9),
        "DINO ViT-B/16": (37.4, 13.7), "iBOT ViT-B/16": (36.8, 14.3), "MaSSL ViT-B/16": (39.3, 14.1),
    },
    "rparis6k": {
        "DINO ViT-S/16": (63.1, 34.4), "iBOT ViT-S/16": (61.5, 34.1), "MaSSL ViT-S/16": (63.4, 34.8),
        "DINO ViT-B/16": (63.5, 35.6), "iBOT ViT-B/16": (64.1, 36.6), "MaSSL ViT-B/16": (65.8, 38.1),
    },
}  # fmt: skip


class RetrievalSettings(Settings):
    data: str
    """Folder of one set, such as roxford5k, with gnd_roxford5k.pkl and jpg/."""
    scales: tuple[float, ...] = SCALES
    """Factors by which each image is resized; its features are the mean over them."""
    crop_queries: bool = False
    """Cut queries to the box of their landmark, as the benchmark asks and DINO, iBOT and MaSSL do not."""
    distractors: str = ""
    """Folder NAME with NAME.txt and jpg/, such as revisitop1m; empty: none."""


class Retrieval(Protocol):
    """Retrieval of images of the same landmark (revisited Oxford and Paris): mean average precision and precision at k.

    Easy, medium and hard count other images as positives and ignore others; queries without a positive are left out.
    """

    name = "retrieval"
    title = "Retrieval, %"
    Settings = RetrievalSettings
    settings: RetrievalSettings

    def figures(self) -> list[Figure]:
        maps = [Figure(f"{setting}_map_percent", f"mAP {setting}") for setting in ("medium", "hard", "easy")]
        return maps + [Figure(f"{setting}_mp{k}_percent", f"mP@{k} {setting}") for setting in ("medium", "hard") for k in KS]

    def prepare(self, subject: Subject) -> list[str]:
        if not self.settings.scales or min(self.settings.scales) <= 0:
            raise ValueError(f"--scales are {list(self.settings.scales)}; they must be one or more positive factors.")
        subject.features_name()
        found = read_landmarks(Path(self.settings.data))
        if self.settings.distractors:
            read_distractors(Path(self.settings.distractors))
        notes = []
        for setting in SETTINGS:
            without = sum(len(judgement.split(setting)[0]) == 0 for judgement in found.judgements)
            if without:
                notes.append(f"{without} of {len(found.queries)} queries have no {setting} positive and are left out of its means.")
        return notes

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        found = read_landmarks(Path(settings.data))
        recipe, side = subject.features_name(), subject.size_or(IMAGE_SIZE)
        unreadable: list[str] = []

        def vectors(root: Path, names: tuple[str, ...] | list[str], boxes: tuple | None = None) -> tuple[dict[str, Tensor], list[int]]:
            images = SizedImages(files_below(root, names), LongerSide(side, boxes), shard=subject.shard)
            result = vectors_of(subject, images, recipe, scales=settings.scales)
            unreadable.extend(images.names_of_unreadable())
            return result

        database, kept = vectors(found.root, found.database)
        queries, asked = vectors(found.root, found.queries, found.boxes if settings.crop_queries else None)
        judgements = [readable(found.judgements[i], kept, len(found.database)) for i in asked]
        others: dict[str, Tensor] = {}
        if settings.distractors:
            others, _ = vectors(*read_distractors(Path(settings.distractors)))
        results, precisions = {}, {}
        for name, rows in queries.items():
            gallery = torch.cat([database[name], others[name]]) if others else database[name]
            places = positions_in_ranking(rows.to(subject.device), gallery.to(subject.device), [one.listed for one in judgements])
            scores = revisited_scores(places, judgements, KS)
            results[name] = {}
            for setting, of in scores.items():
                results[name][f"{setting}_map_percent"] = _percent(of["map"])
                results[name] |= {f"{setting}_mp{k}_percent": _percent(value) for k, value in zip(KS, of["mean_precision_at"])}
            precisions[name] = dict(zip(asked, scores["medium"]["average_precisions"].tolist()))
        network = next(iter(subject.networks))
        name = Path(settings.data).resolve().name
        departures = self._departures(side)
        own = BENCHMARKS.get(name) == (len(found.queries), len(found.database)) and not departures and not unreadable
        return Result(
            results=results,
            data={
                "test": {"path": settings.data, "queries": len(found.queries), "images": len(found.database)},
                **({"distractors": {"path": settings.distractors, "images": len(next(iter(others.values())))}} if others else {}),
            },
            features=recipe,
            image_size=side,
            about=f"{len(asked)} queries among {len(next(iter(database.values())))} images of {settings.data}"
            + (f" and {len(next(iter(others.values())))} distractors." if others else "."),
            departures=departures,
            notes=notes,
            unreadable=tuple(unreadable),
            published=[
                dict(who=who, value=f"{medium} medium, {hard} hard", source="MaSSL, table 4")
                for who, (medium, hard) in PUBLISHED[name].items()
            ]
            if own
            else [],
            pictures=_pictures(found, kept, asked, database[network], queries[network], precisions[network]) if subject.pictures else [],
        )

    def _departures(self, side: int) -> list[str]:
        settings, departures = self.settings, []
        if side != IMAGE_SIZE:
            departures.append(f"The longer side is at most {side} px instead of {IMAGE_SIZE}.")
        if settings.scales != SCALES:
            departures.append(f"Scales are {', '.join(map(str, settings.scales))} instead of 1, 0.7071, 0.5.")
        if settings.crop_queries:
            departures.append("Queries are cut to their boxes: the benchmark's own protocol, but not that of DINO, iBOT and MaSSL.")
        if settings.distractors:
            departures.append("Distractors take part; DINO, iBOT and MaSSL use none.")
        return departures


def readable(judgement: Judgement, kept: list[int], total: int) -> Judgement:
    """The judgement by positions among the images that could be read; others are as if they were not listed."""
    place = np.full(total, -1)
    place[kept] = np.arange(len(kept))
    rows = [place[part] for part in (judgement.easy, judgement.hard, judgement.junk)]
    return Judgement(*(part[part >= 0] for part in rows))


def _percent(share: float) -> float | None:
    return None if math.isnan(share) else 100 * float(share)


def _pictures(
    found: Landmarks, kept: list[int], asked: list[int], database: Tensor, queries: Tensor, precision: dict[int, float]
) -> list[Picture]:
    """Queries, cut to their box for the eye, with their first ten; green: easy or hard, red: neither, white: ignored."""
    pictures = []
    for rank, query in spread(precision):
        _, nearest = nearest_neighbours(queries[asked.index(query)][None], database, min(SHOWN, len(database)))
        judgement = found.judgements[query]
        row = [framed(_opened(found, found.queries[query]).crop(tuple(round(edge) for edge in found.boxes[query])), None)]
        for place in (kept[i] for i in nearest[0].tolist()):
            right = None if place in judgement.junk else place in judgement.easy or place in judgement.hard
            row.append(framed(_opened(found, found.database[place]), right))
        caption = f"{rank} query, {found.queries[query]}: AP {100 * precision[query]:.1f} % (medium), its nearest images; green is right"
        pictures.append(Picture(f"retrieval_{rank}", caption, column_of([row_of(row, row[0].height)])))
    return pictures


def _opened(found: Landmarks, name: str) -> Image.Image:
    return decode_rgb((found.root / name).read_bytes(), name)
