"""Clustering of frozen features by spherical k-means (CARP, table 2; MaSSL, table 9)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from massl_fast.data.decode import decode_rgb
from massl_fast.evaluation.base import Figure, Protocol, Result, Settings, described
from massl_fast.evaluation.extra import needs
from massl_fast.evaluation.features import Features, LabelledImages
from massl_fast.evaluation.kmeans import Clustering, assign, spherical_kmeans
from massl_fast.evaluation.metrics.clustering import clustering_scores, size_entropy
from massl_fast.evaluation.pictures import Picture, column_of, framed, row_of, spread
from massl_fast.evaluation.subject import Subject
from massl_fast.evaluation.tokens import demand_finite

SHOWN = 10
FIGURES = {"nmi": "NMI", "ami": "AMI", "ari": "ARI", "accuracy": "accuracy", "purity": "purity"}


class ClusterSettings(Settings):
    train: str
    """Images that the clusters are found on."""
    test: str = ""
    """Images that are assigned and scored; empty: those of --train."""
    clusters: int = Field(0, ge=0)
    """Number of clusters; 0: one per class."""
    restarts: int = Field(10, ge=1)
    """Restarts, of which the one with the largest objective counts."""
    iterations: int = Field(100, ge=1)
    """Most iterations of a restart."""
    standardize: bool = True
    """Scale every feature to mean 0 and deviation 1 over the training images, as CARP does."""
    max_per_centroid: int = Field(0, ge=0)
    """Training images per cluster, drawn at random; 0: all. faiss takes 256 by default."""
    start: Literal["random", "plus"] = "random"
    """Restarts begin at random images, or by k-means++."""


class Cluster(Protocol):
    """Clustering: spherical k-means on frozen features, compared with the classes.

    Test images go to the centroid of the largest inner product. NMI favours many clusters, AMI and ARI do not; accuracy is that of the best
    one-to-one matching of clusters with classes. The entropy of the cluster sizes is 1 for equal sizes and 0 where all images share a
    cluster.
    """

    name = "cluster"
    title = "Clustering, %"
    Settings = ClusterSettings
    settings: ClusterSettings

    def figures(self) -> list[Figure]:
        figures = [Figure(f"{key}_percent", title) for key, title in FIGURES.items()]
        return [*figures, Figure("size_entropy", "entropy of sizes", unit="")]

    def prepare(self, subject: Subject) -> list[str]:
        needs("sklearn.metrics", "the agreement of clusters with classes")
        subject.features_name()
        train, test = self._images(subject)
        notes = list(dict.fromkeys([*train.source.notes, *test.source.notes]))
        if self._clusters(train) > len(train.labels):
            raise ValueError(f"{len(train.labels)} training images cannot be put into {self._clusters(train)} clusters. Set --clusters.")
        known = {train.source.classes[i] for i in train.labels.unique().tolist()}
        unknown = {test.source.classes[i] for i in test.labels.unique().tolist()} - known
        if unknown:
            notes.append(f"{len(unknown)} classes of the test images have no training images, for instance {min(unknown)}.")
        return notes

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        images = self._images(subject)
        recipe = subject.features_name()
        train = subject.features(images[0], recipe)
        test = train if images[1] is images[0] else subject.features(images[1], recipe)
        demand_finite({name: part.features for of in (train, test) for name, part in of.items()})
        clusters = self._clusters(images[0])
        results, more, assignments = {}, {}, {}
        for name in train:
            found, assignment = self._one(subject, train[name], test[name], clusters)
            scores = clustering_scores(test[name].labels.numpy(), assignment)
            results[name] = {f"{key}_percent": 100 * value for key, value in scores.items()}
            results[name]["size_entropy"] = size_entropy(assignment, clusters)
            objectives = found.objectives / len(train[name].labels)
            more[name] = {
                "objectives": [round(value, 6) for value in objectives.tolist()],
                "objective_deviation": float(objectives.std(unbiased=False)),
                "iterations": found.iterations,
                "cluster_sizes": np.bincount(assignment, minlength=clusters).tolist(),
            }
            assignments[name] = assignment
        network = next(iter(subject.networks))
        return Result(
            results=results,
            data={"train": described(settings.train, images[0]), "test": described(settings.test or settings.train, images[1])},
            features=recipe,
            image_size=images[0].image_size,
            about=f"{clusters} clusters of {len(images[0].labels)} images of {settings.train}; {len(images[1].labels)} images of "
            f"{settings.test or settings.train} are scored. Best of {settings.restarts} restarts.",
            departures=self._departures(images),
            notes=notes,
            unreadable=tuple(dict.fromkeys(name for of in (train, test) for name in next(iter(of.values())).unreadable)),
            more={"clusters": more},
            pictures=_pictures(images[1], test[network], assignments[network]) if subject.pictures else [],
        )

    def _one(self, subject: Subject, train: Features, test: Features, clusters: int) -> tuple[Clustering, np.ndarray]:
        settings = self.settings
        mean, scale = scaling(train.features) if settings.standardize else (0.0, 1.0)
        fitted = train.features
        if settings.max_per_centroid and len(fitted) > settings.max_per_centroid * clusters:
            generator = torch.Generator().manual_seed(subject.seed)
            fitted = fitted[torch.randperm(len(fitted), generator=generator)[: settings.max_per_centroid * clusters]]
        fitted, scored = (((rows.double() - mean) / scale).float().to(subject.device) for rows in (fitted, test.features))
        found = spherical_kmeans(
            fitted, clusters, restarts=settings.restarts, iterations=settings.iterations, seed=subject.seed, start=settings.start
        )
        return found, assign(scored, found.centroids[None])[0][0].cpu().numpy()

    def _images(self, subject: Subject) -> tuple[LabelledImages, LabelledImages]:
        train = subject.labelled(subject.source(self.settings.train, "train", "train"))
        if not self.settings.test or self.settings.test == self.settings.train:
            return train, train
        return train, subject.labelled(subject.source(self.settings.test, "test", "test"))

    def _clusters(self, train: LabelledImages) -> int:
        return self.settings.clusters or len(train.labels.unique())

    def _departures(self, images: tuple[LabelledImages, LabelledImages]) -> list[str]:
        settings, departures = self.settings, []
        if settings.clusters and settings.clusters != len(images[0].labels.unique()):
            departures.append(f"There are {settings.clusters} clusters for {len(images[0].labels.unique())} classes.")
        if images[0] is images[1]:
            departures.append("The images that are scored are those that the clusters were found on.")
        if (settings.restarts, settings.iterations) != (10, 100):
            departures.append(
                f"{settings.restarts} restarts of {settings.iterations} iterations instead of 10 of 100 (CARP's code; its text: 20)."
            )
        if not settings.standardize:
            departures.append("Features are not standardised; CARP's are.")
        if not settings.max_per_centroid:
            departures.append("All training images take part; CARP's call of faiss takes at most 256 per cluster.")
        return departures


def scaling(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation) of every feature, float64; a deviation of 0 counts as 1, as in scikit-learn's StandardScaler."""
    wide = features.double()
    deviation = wide.std(0, unbiased=False)
    return wide.mean(0), torch.where(deviation > 10 * torch.finfo(torch.float64).eps * wide.abs().amax(0), deviation, 1.0)


def _pictures(images: LabelledImages, test: Features, assignment: np.ndarray) -> list[Picture]:
    """Images of the purest, the median and the most mixed cluster, those of the majority framed green."""
    labels = test.labels.numpy()
    majority = {int(c): int(np.bincount(labels[assignment == c]).argmax()) for c in np.unique(assignment)}
    purity = {c: float((labels[assignment == c] == label).mean()) for c, label in majority.items()}
    pictures = []
    for rank, cluster in spread(purity):
        members = np.flatnonzero(assignment == cluster)
        chosen = members[np.random.default_rng(0).permutation(len(members))[:SHOWN]]
        shown: list[Image.Image] = []
        for member in chosen:
            position = int(test.indices[member])
            image = decode_rgb(images.source.read(position), images.source.name(position))
            shown.append(framed(image, bool(labels[member] == majority[cluster])))
        caption = f"{rank} cluster by purity, {100 * purity[cluster]:.0f} % {test.classes[majority[cluster]]} of {len(members)} images; "
        "drawn at random"
        pictures.append(Picture(f"cluster_{rank}", caption, column_of([row_of(shown, shown[0].height)])))
    return pictures
