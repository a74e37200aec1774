"""Weighted k-nearest-neighbour classification of frozen features.

Protocol of Wu et al. 2018 (*Unsupervised feature learning via non-parametric instance discrimination*) as used by DINO and MaSSL: cosine
similarity, the k nearest training images vote for their class with weight exp(similarity / 0.07).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from massl_fast.evaluation.base import Figure, Protocol, Result, Settings, described
from massl_fast.evaluation.features import Features, LabelledImages, fixed_subset, truth_of
from massl_fast.evaluation.subject import Subject

DEFAULT_KS = (10, 20, 100, 200)
HEADLINE_K = 20
QUERY_CHUNK = 512
KEY_CHUNK = 32768


@torch.no_grad()
def nearest_neighbours(queries: Tensor, keys: Tensor, k: int, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """The k keys of highest cosine similarity of each query, best first; equal similarities in the order of the keys.

    Holds at most 512 × 32768 similarities at once, whatever the number of queries and keys.

    Args:
        queries [q, C], keys [n, C]: floating point, any scale. A row of zeros has similarity 0 with everything.
        k: 1 … n.
        device: where to search; None: where the keys are.

    Returns:
        similarities [q, k] float32 and indices [q, k] int64, on the CPU. Products follow the process's float32 matmul precision.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"There are {len(keys)} images to compare with; {k} nearest neighbours cannot be taken from them.")
    device = torch.device(device) if device is not None else keys.device
    similarities, indices = [], []
    with torch.autocast(device.type, enabled=False):
        keys = F.normalize(keys.to(device).float(), dim=1)
        for some in queries.split(QUERY_CHUNK):
            some = F.normalize(some.to(device).float(), dim=1)
            best = torch.empty(len(some), 0, dtype=torch.int64, device=device)
            for start in range(0, len(keys), KEY_CHUNK):
                ranks = _ranks(some @ keys[start : start + KEY_CHUNK].T, start)
                best = torch.cat([best, ranks], dim=1)
                best = best.topk(min(k, best.shape[1]), dim=1).values
            similarity, index = _from_ranks(best)
            similarities.append(similarity.cpu())
            indices.append(index.cpu())
    return torch.cat(similarities), torch.cat(indices)


def _ranks(similarities: Tensor, first_index: int) -> Tensor:
    """Distinct int64 that sort by similarity, then by lower index.

    topk leaves open which of equal values it takes, and CUDA takes different ones; distinct integers leave no choice. The upper half holds
    the float's bits, mapped so that integers order as the floats do, the lower half the complement of the index.
    """
    bits = (similarities + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: the two zeros are equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    index = torch.arange(first_index, first_index + similarities.shape[1], device=similarities.device)
    return (ordered << 32) | (0xFFFFFFFF - index)


def _from_ranks(ranks: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (ranks >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), 0xFFFFFFFF - (ranks & 0xFFFFFFFF)


def knn_accuracy(
    train: Features,
    test: Features,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = 0.07,
    top: int = 1,
    device: torch.device | str | None = None,
) -> dict[int, float]:
    """Percentage of test images whose class wins the vote of their k nearest training images, for each k.

    One search for the largest k serves all. Classes are matched by name; of classes with equal votes the first in `train.classes` wins. A k
    above the number of training images means all of them, and a warning says so. With `top` above 1 it is enough to be among the
    first min(`top`, k) classes.

    Raises:
        ValueError: a k or temperature that is not positive, features that are not finite or of different widths, a test class that the
            training images lack.
    """
    checked_ks(ks)
    if not temperature > 0:
        raise ValueError(f"The temperature of the k-NN votes is {temperature}; it must be positive.")
    truth = truth_of(train, test, "k-NN")
    for statement in clipped_ks(ks, len(train.labels)):
        warnings.warn(statement, stacklevel=2)
    clipped = {k: min(k, len(train.labels)) for k in ks}
    similarity, index = nearest_neighbours(test.features, train.features, max(clipped.values()), device=device)
    # Votes are few, [test images, k]; they are summed on the CPU, where the order of a sum is fixed. The row's largest similarity is
    # subtracted, so that no temperature overflows.
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    voters = train.labels[index]
    correct = dict.fromkeys(clipped.values(), 0)
    for rows in torch.arange(len(truth)).split(QUERY_CHUNK):
        votes = torch.zeros(len(rows), len(train.classes), dtype=torch.float64)
        counted = 0
        for k in sorted(correct):
            votes.scatter_add_(1, voters[rows, counted:k], weights[rows, counted:k])
            counted = k
            own = votes.gather(1, truth[rows, None])
            ahead = (votes > own).sum(1) + ((votes == own) & (torch.arange(votes.shape[1]) < truth[rows, None])).sum(1)
            correct[k] += int((ahead < min(top, k)).sum())
    return {k: 100.0 * correct[clipped[k]] / len(truth) for k in ks}


def clipped_ks(ks: Sequence[int], num_train: int) -> list[str]:
    """A sentence if some k exceeds the number of training images."""
    above = [str(k) for k in ks if k > num_train]
    if not above:
        return []
    return [f"k-NN with k = {', '.join(above)} compares with all {num_train} training images: there are no more."]


def checked_ks(ks: Sequence[int]) -> tuple[int, ...]:
    """``ks``, if they are one or more positive numbers; otherwise a ValueError."""
    if not ks or min(ks) < 1:
        raise ValueError(f"k is {list(ks)}; k-NN takes one or more positive numbers of neighbours.")
    return tuple(ks)


class KnnSettings(Settings):
    train: str
    """Labelled images that vote."""
    test: str
    """Labelled images that are classified."""
    k: tuple[int, ...] = DEFAULT_KS
    """Numbers of neighbours."""
    temperature: float = Field(0.07, gt=0)
    """Votes weigh exp(similarity / temperature)."""
    max_train_images: int = Field(0, ge=0)
    """Compare with a fixed random subset of the training images; 0: all."""

    @field_validator("k")
    @classmethod
    def _positive(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        return checked_ks(ks)


class Knn(Protocol):
    """Weighted k-NN: every test image takes the class that its k nearest training images vote for, by cosine similarity of
    frozen features. Untrained network and raw pixels give the floor.
    """

    name = "knn"
    title = "k-NN accuracy, %"
    Settings = KnnSettings
    settings: KnnSettings

    def figures(self) -> list[Figure]:
        return [Figure(f"k{k}_percent", f"k = {k}") for k in self.settings.k]

    @property
    def headline(self) -> Figure:
        """k = 20, or the k that comes first where 20 is not among them."""
        return next((figure for figure in self.figures() if figure.key == f"k{HEADLINE_K}_percent"), self.figures()[0])

    def prepare(self, subject: Subject) -> list[str]:
        train, test = self._images(subject)
        return [*train.source.notes, *test.source.notes, *clipped_ks(self.settings.k, len(train.labels))]

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        images = self._images(subject)
        recipe = subject.features_name()
        train, test = (subject.features(part, recipe) for part in images)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the notes have said it
            chosen = dict(ks=settings.k, temperature=settings.temperature, device=subject.device)
            percents = {name: knn_accuracy(train[name], test[name], **chosen) for name in train}
        data = {"train": described(settings.train, images[0]), "test": described(settings.test, images[1])}
        return Result(
            results={name: {f"k{k}_percent": value for k, value in of_k.items()} for name, of_k in percents.items()},
            data=data,
            features=recipe,
            image_size=images[0].image_size,
            about=f"{data['test']['images']} test images of {settings.test}, classified by {data['train']['images']} training images of "
            f"{settings.train}.",
            notes=notes,
            unreadable=tuple(name for part in (train, test) for name in next(iter(part.values())).unreadable),
            more={
                "temperature": settings.temperature,
                **{role: {"data": of["path"], "images": of["images"]} for role, of in data.items()},
                "knn_percent": percents,
            },
        )

    def _images(self, subject: Subject) -> tuple[LabelledImages, LabelledImages]:
        settings = self.settings
        train = subject.source(settings.train, "train", "train")
        subset = fixed_subset(len(train), settings.max_train_images)
        return subject.labelled(train, positions=subset), subject.labelled(subject.source(settings.test, "test", "test"))
