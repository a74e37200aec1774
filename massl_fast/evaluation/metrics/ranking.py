"""Ranking metrics of instance retrieval and copy detection, from positions in a ranking rather than from the ranking itself.

A position counts the database images that come before an image, so that no ranking is sorted: a million distractors cost one product.
The average precision is that of the revisited Oxford and Paris benchmark (Radenović et al. 2018, *Revisiting Oxford and Paris*, whose code
follows the devkit of Oxford5k): a trapezoid over recall, not scikit-learn's sum of precisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DATABASE_CHUNK = 65536
SETTINGS = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Judgement:
    """Database images that a query's annotation lists, as positions in the database; all others are negatives."""

    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray

    def split(self, setting: str) -> tuple[np.ndarray, np.ndarray]:
        """(positives, ignored) of a setting: easy, medium or hard."""
        if setting == "easy":
            return self.easy, np.concatenate([self.junk, self.hard])
        if setting == "medium":
            return np.concatenate([self.easy, self.hard]), self.junk
        if setting == "hard":
            return self.hard, np.concatenate([self.junk, self.easy])
        raise ValueError(f"There is no setting {setting!r}; it can be {', '.join(SETTINGS)}.")

    @property
    def listed(self) -> np.ndarray:
        return np.unique(np.concatenate([self.easy, self.hard, self.junk]))


@torch.no_grad()
def positions_in_ranking(
    queries: Tensor, database: Tensor, listed: Sequence[np.ndarray], *, chunk: int = DATABASE_CHUNK
) -> list[np.ndarray]:
    """How many database images come before each listed one, by falling cosine similarity, equal ones in the order of the database.

    Exact, without sorting: similarities are compared with those of the listed images, `chunk` database images at a time.

    Args:
        queries [q, D], database [n, D]: floating point, on one device, any scale.
        listed: for each query, positions of database images [m].

    Returns:
        For each query, int64 [m]: 0-based positions in its ranking of the whole database.
    """
    queries = F.normalize(queries.float(), dim=1)
    wanted = [torch.as_tensor(np.asarray(rows), dtype=torch.int64, device=queries.device) for rows in listed]
    scores = [torch.zeros(len(rows), device=queries.device) for rows in wanted]
    before = [torch.zeros(len(rows), dtype=torch.int64, device=queries.device) for rows in wanted]
    highest = max((int(rows.max()) for rows in wanted if len(rows)), default=-1)

    def similarities(start: int) -> Tensor:
        # Both passes take the same product: another shape could round an image's score to either side of its own.
        return queries @ F.normalize(database[start : start + chunk].float(), dim=1).T

    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, highest + 1, chunk):
            block = similarities(start)
            for query, rows in enumerate(wanted):
                inside = (rows >= start) & (rows < start + block.shape[1])
                scores[query][inside] = block[query, rows[inside] - start]
        for start in range(0, len(database), chunk):
            block = similarities(start)
            for query, rows in enumerate(wanted):
                if len(rows) == 0:
                    continue
                ascending, order = scores[query].sort()
                line = block[query].contiguous()
                # An image with i listed scores strictly below its own comes before those i: one search per image, not one test per pair.
                num_below = torch.searchsorted(ascending, line)
                images_with = torch.bincount(num_below, minlength=len(rows) + 1)
                before[query][order] += images_with.flip(0).cumsum(0).flip(0)[1:]
                for place, end in enumerate((rows - start).clamp(0, len(line)).tolist()):
                    before[query][place] += (line[:end] == scores[query][place]).sum()
    return [positions.cpu().numpy() for positions in before]


def without_ignored(positives: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Positions of the positives, ascending, in the ranking from which the ignored images are taken out."""
    positives, ignored = np.sort(positives), np.sort(ignored)
    return positives - np.searchsorted(ignored, positives)


def trapezoid_average_precision(positions: np.ndarray, num_positives: int) -> float:
    """Σ_j (p_j + p'_j) / 2P with p_j = j / r_j (1 where r_j is 0) and p'_j = (j + 1) / (r_j + 1).

    Args:
        positions [m]: 0-based positions r_j of the positives that were found, ascending.
        num_positives: P, of which the ranking may hold fewer.
    """
    positions = np.asarray(positions, dtype=np.float64)
    found = np.arange(len(positions))
    left = np.where(positions == 0, 1.0, found / np.maximum(positions, 1))
    right = (found + 1) / (positions + 1)
    return float((left + right).sum() / (2 * num_positives))


def precision_at(positions: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """[len(ks)]: share of positives among the first k, where k ends at the last positive (as revisitop's code does)."""
    last = positions.max() + 1
    return np.array([(positions < min(k, last)).sum() / min(k, last) for k in ks], dtype=np.float64)


def revisited_scores(
    positions: Sequence[np.ndarray], judgements: Sequence[Judgement], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[str, np.ndarray | float]]:
    """Mean average precision and precision at k of the three settings.

    Args:
        positions: for each query, the positions of `judgement.listed` in its ranking (`positions_in_ranking`).

    Returns:
        {setting: {"map", "average_precisions" [q], "mean_precision_at" [k], "precision_at" [q, k]}}, as shares of one. Queries without a
        positive are nan in the rows and left out of the means.
    """
    results = {}
    for setting in SETTINGS:
        precisions = np.full((len(judgements), len(ks)), np.nan)
        averages = np.full(len(judgements), np.nan)
        for query, (places, judgement) in enumerate(zip(positions, judgements)):
            place_of = dict(zip(judgement.listed.tolist(), places.tolist()))
            positives, ignored = (np.array([place_of[i] for i in rows.tolist()], np.int64) for rows in judgement.split(setting))
            if len(positives) == 0:
                continue
            cleaned = without_ignored(positives, ignored)
            averages[query] = trapezoid_average_precision(cleaned, len(positives))
            precisions[query] = precision_at(cleaned, ks)
        judged = ~np.isnan(averages)
        results[setting] = {
            "map": float(averages[judged].mean()) if judged.any() else float("nan"),
            "average_precisions": averages,
            "mean_precision_at": precisions[judged].mean(0) if judged.any() else np.full(len(ks), np.nan),
            "precision_at": precisions,
        }
    return results


def truncated_average_precisions(positions: Sequence[np.ndarray], most: int | None) -> np.ndarray:
    """Trapezoid average precision of each query over the `most` best (None: all), as copy detection reports it.

    Args:
        positions: for each query, the 0-based positions of its positives. A query without any is nan.
    """
    averages = np.full(len(positions), np.nan)
    for query, places in enumerate(positions):
        places = np.sort(np.asarray(places))
        if len(places):
            seen = places if most is None else places[places < most]
            averages[query] = trapezoid_average_precision(seen, len(places))
    return averages


def micro_average_precision(scores: np.ndarray, correct: np.ndarray, num_positives: int) -> float:
    """Area under precision over recall of all candidate pairs of all queries in one ranking (Douze et al. 2021, *The 2021 image similarity
    dataset and challenge*, section 5): what one threshold for all queries gives.

    Args:
        scores [p]: similarity of each candidate pair. Equal scores count as one step.
        correct [p]: whether the pair is a true copy.
        num_positives: true pairs in all, among the candidates or not.
    """
    if num_positives == 0:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(correct[order])
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1) if len(scores) else np.empty(0, np.int64)
    precision = hits[ends] / (ends + 1)
    gained = np.diff(hits[ends], prepend=0)
    return float((precision * gained).sum() / num_positives)
