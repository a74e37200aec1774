"""How far similarities of patches within a category overlap those between categories (MMC's "overlap area")."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from massl_fast.evaluation.base import Figure, Result
from massl_fast.evaluation.images import in_order
from massl_fast.evaluation.metrics.prompt import MORE_THAN_HALF, NUM_BINS, SimilarityHistograms, cosines, label_patches
from massl_fast.evaluation.objects import ObjectProtocol, ObjectSettings
from massl_fast.evaluation.subject import Subject
from massl_fast.evaluation.tokens import tokens_of

# MMC: overlap, mean similarity within and between categories; ViT-B/16 on COCO.
PUBLISHED = {
    "DINO": (0.66, 0.20, 0.12), "iBOT": (0.56, 0.19, 0.05), "SiT": (0.63, 0.50, 0.46), "MAE": (0.76, 0.29, 0.17),
    "MC-SSL": (0.58, 0.47, 0.35), "MMC": (0.55, 0.48, 0.38),
}  # fmt: skip


class SimilaritySettings(ObjectSettings):
    bins: int = Field(NUM_BINS, ge=2)
    """Bins of the histograms over cosines from -1 to 1; the overlap depends on them."""
    background: bool = False
    """Background takes part as one more category."""


class Similarity(ObjectProtocol):
    """Similarity overlap: cosines of patch pairs of one category and of different ones within an image, and how far the two lie over each
    other.

    An overlap of 0 would tell every pair apart by one threshold, 1 none. Patches more than half covered by one category take part.
    """

    name = "similarity"
    title = "Similarities of patches within and between categories"
    Settings = SimilaritySettings
    settings: SimilaritySettings

    def figures(self) -> list[Figure]:
        return [
            Figure("overlap", "overlap", unit="", higher_is_better=False),
            Figure("intra_mean", "mean within", unit=""),
            Figure("inter_mean", "mean between", unit="", higher_is_better=False),
        ]

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        scan = self.scan(subject)
        rows = []
        for position, tokens in tokens_of(subject, scan.images):
            grid = tuple(next(iter(tokens.values())).shape[:2])
            labels, cover = label_patches(scan.items[position].read().category_map(), grid)
            used = np.flatnonzero((cover > MORE_THAN_HALF) & ((labels > 0) | ((labels == 0) & settings.background)))
            rows.append(
                (
                    position,
                    {name: self._histogram(values.flatten(0, 1).cpu().numpy()[used], labels[used]) for name, values in tokens.items()},
                )
            )
        ordered = in_order(rows, subject.shard)
        if not ordered:
            raise ValueError(f"No image of {settings.data} can be read.")
        merged = {name: SimilarityHistograms(settings.bins) for name in ordered[0][1]}
        for _, row in ordered:
            for name, histogram in row.items():
                merged[name] += histogram
        results = {name: {"overlap": of.overlap, "intra_mean": of.means[0], "inter_mean": of.means[1]} for name, of in merged.items()}
        if any(np.isnan(value) for row in results.values() for value in row.values()):
            notes.append("There are no pairs of one category, or none of different ones: their figures are not numbers.")
        results = {name: {key: None if np.isnan(value) else value for key, value in row.items()} for name, row in results.items()}
        departures = scan.departures
        own = not departures and settings.bins == NUM_BINS and not settings.background
        departures.append(
            f"What MMC leaves open: {settings.bins} bins, pairs within an image, background {'in' if settings.background else 'out'}."
        )
        network = next(iter(subject.networks))
        return Result(
            results=results,
            data={"test": {"path": settings.data, "images": len(ordered)}},
            features="patches",
            image_size=scan.side,
            about=f"{int(merged[network].intra.sum()):,} pairs of one category and {int(merged[network].inter.sum()):,} of different "
            f"ones in "
            f"{len(ordered)} images of {settings.data}.",
            departures=departures,
            notes=notes,
            unreadable=scan.images.names_of_unreadable(),
            published=[dict(who=f"{who} ViT-B/16", value=" ".join(map(str, values)), source="MMC") for who, values in PUBLISHED.items()]
            if own
            else [],
            more={"histograms": {name: {"intra": of.intra.tolist(), "inter": of.inter.tolist()} for name, of in merged.items()}},
        )

    def _histogram(self, features: np.ndarray, labels: np.ndarray) -> SimilarityHistograms:
        histogram = SimilarityHistograms(self.settings.bins)
        histogram.add(cosines(features), labels)
        return histogram
