"""Replay a golden case of the evaluation protocols through the project's own code: ``python tests/replay_metric.py FILE.npz``.

Prints JSON: the largest error of each output of the case and of all (``max_error``), absolute, in the unit that it is stored in.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from massl_fast.evaluation.features import Features
from massl_fast.evaluation.heads import Sweep, correct_of_heads, fit_logistic, train_heads
from massl_fast.evaluation.kmeans import assign, spherical_kmeans
from massl_fast.evaluation.knn import knn_accuracy, nearest_neighbours
from massl_fast.evaluation.layouts.imagenet9 import imagenet_to_nine
from massl_fast.evaluation.metrics import (
    attention,
    backgrounds,
    clustering,
    correspondence,
    multilabel,
    prompt,
    ranking,
    segmentation,
    video,
)
from massl_fast.evaluation.patch_knn import patch_knn
from massl_fast.evaluation.propagation import PropagationSettings, hard_labels, propagate
from massl_fast.evaluation.svm import svm_decisions, unit_rows

Case = dict[str, np.ndarray]


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def error(found, expected) -> float:
    """Largest absolute difference; nan agrees with nan alone."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or (np.isnan(found) != np.isnan(expected)).any():
        return float("inf")
    return float(np.abs(found - expected)[~np.isnan(expected)].max(initial=0.0))


def listed(row: np.ndarray) -> np.ndarray:
    return row[row >= 0]


def retrieval(case: Case) -> dict[str, float]:
    judgements = [ranking.Judgement(*(listed(case[name][q]) for name in ("easy", "hard", "junk"))) for q in range(len(case["queries"]))]
    queries, database = tensor(case["queries"]), tensor(case["database"])
    positions = ranking.positions_in_ranking(queries, database, [judgement.listed for judgement in judgements], chunk=64)
    expected = [np.array([np.flatnonzero(case["ranks"][:, q] == i)[0] for i in j.listed]) for q, j in enumerate(judgements)]
    errors = {"positions": max(error(*pair) for pair in zip(positions, expected))}
    for setting, scores in ranking.revisited_scores(positions, judgements, case["kappas"].tolist()).items():
        errors |= {
            f"map_{setting}": error(scores["map"], case[f"map_{setting}"]),
            f"aps_{setting}": error(scores["average_precisions"], case[f"aps_{setting}"]),
            f"mp_at_k_{setting}": error(scores["mean_precision_at"], case[f"mp_at_k_{setting}"]),
            f"precision_at_k_{setting}": error(scores["precision_at"], case[f"precision_at_k_{setting}"]),
        }
    return errors


def copies(case: Case) -> dict[str, float]:
    sources = [np.array([row]) for row in case["source_of_query"]]
    positions = ranking.positions_in_ranking(tensor(case["queries"]), tensor(case["database"]), sources, chunk=50)
    ends = np.cumsum(case["block_sizes"])[:-1]
    best, whole = (ranking.truncated_average_precisions(positions, most) for most in (20, None))
    expected = [np.flatnonzero(row == source) for row, source in zip(case["top20"], case["source_of_query"])]
    misplaced = sum(not np.array_equal(found[found < 20], place) for found, place in zip(positions, expected))
    return {
        "misplaced": float(misplaced),
        "ap": error(best, case["ap"]),
        "map": error([part.mean() for part in np.split(best, ends)], case["map"]),
        "map_untruncated": error([part.mean() for part in np.split(whole, ends)], case["map_untruncated"]),
    }


def davis_metrics(case: Case) -> dict[str, float]:
    region, edge = video.region_and_boundary(case["gt"], case["prediction"])
    errors = {
        "j": error(region, case["j"]),
        "f": error(edge, case["f"]),
        "j_mean_recall_decay": error([video.mean_recall_decay(row) for row in region], case["j_mean_recall_decay"]),
        "f_mean_recall_decay": error([video.mean_recall_decay(row) for row in edge], case["f_mean_recall_decay"]),
        "global_row": error(list(video.davis_scores([region], [edge]).values()), case["global_row"]),
    }
    for number in range(5):
        truth, prediction, void = (case[f"pair{number}_{name}"] for name in ("gt", "pred", "void"))
        errors[f"pair{number}"] = max(
            error(segmentation.jaccard(prediction, truth), case[f"pair{number}_j"]),
            error(segmentation.jaccard(prediction, truth, void), case[f"pair{number}_j_void"]),
            error(video.boundary_f(prediction, truth), case[f"pair{number}_f"]),
            error(video.boundary_f(prediction, truth, void), case[f"pair{number}_f_void"]),
            error(video.boundary_radius(truth.shape), case[f"pair{number}_radius"]),
        )
    return errors


def label_propagation(case: Case) -> dict[str, float]:
    height, width = int(case["height"]), int(case["width"])
    settings = PropagationSettings(
        context=int(case["n_last_frames"]),
        radius=int(case["size_mask_neighborhood"]),
        neighbours=int(case["topk"]),
        temperature=float(case["temperature"]),
    )
    soft = propagate(tensor(case["features"]).unflatten(1, (height, width)), tensor(case["first_seg"]), settings)
    labels = hard_labels(soft, int(case["patch_size"]))
    return {"soft": error(soft, case["soft"]), "labels": float((labels.numpy() != case["labels"]).sum())}


def segments(case: Case) -> dict[str, float]:
    confusion = segmentation.confusion_matrix(case["gt"], case["prediction"], int(case["num_classes"]))
    scores = segmentation.scores_of_confusion(confusion)
    errors = {"confusion": error(confusion, case["confusion"]), "miou_sklearn": error(scores["miou"], case["miou_sklearn"])}
    return errors | {
        name: error(scores[name], case[name]) for name in ("iou", "miou", "miou_present", "pixel_accuracy", "mean_class_accuracy")
    }


def clusters(case: Case) -> dict[str, float]:
    """Metrics, and k-means of ours beside faiss's: what it lacks of 99 % of faiss's objective is an error."""
    train, test = (tensor(((case[name] - case["scaler_mean"]) / case["scaler_scale"]).astype(np.float32)) for name in ("train", "test"))
    found = spherical_kmeans(train, len(case["centroids"]), restarts=10, iterations=100)
    ratio = float(found.objectives.max()) / float(case["objective"])
    assignment, _ = assign(test, tensor(case["centroids"])[None])
    scores = clustering.clustering_scores(case["test_labels"], case["assignment"])
    over = clustering.clustering_scores(case["test_labels"], case["over_assignment"])
    errors = {
        "assignment": float((assignment[0].numpy() != case["assignment"]).sum()),
        "objective_below_0.99_of_faiss": max(0.0, 0.99 - ratio),
    }
    errors |= {name: error(value, case[name]) for name, value in scores.items()}
    return errors | {f"over_{name}": error(value, case[f"over_{name}"]) for name, value in over.items()}


def voc07(case: Case) -> dict[str, float]:
    train, test = unit_rows(case["train_features"]), unit_rows(case["test_features"])
    settings = dict(cost=float(case["cost"]), tolerance=1e-10, iterations=1_000_000)
    columns = range(case["train_labels"].shape[1])
    decision = np.stack([svm_decisions(train, case["train_labels"][:, c], test, **settings) for c in columns], 1)
    pairs = [(case["decision"][:, c], case["test_labels"][:, c]) for c in columns]
    found = {
        "carp": [multilabel.average_precision_area(*pair, difficult="negative") for pair in pairs],
        "area": [multilabel.average_precision_area(*pair) for pair in pairs],
        "11point": [multilabel.average_precision_11_points(*pair) for pair in pairs],
        "sklearn": [multilabel.average_precision_steps(*pair, difficult="negative") for pair in pairs],
    }
    errors = {"decision": error(decision, case["decision"])}
    errors |= {f"ap_{name}": error(values, case[f"ap_{name}"]) for name, values in found.items()}
    return errors | {f"map_{name}": error(np.mean(values), case[f"map_{name}"]) for name, values in found.items()}


def patches(case: Case) -> dict[str, float]:
    train, test, ks = tensor(case["train"]), tensor(case["test"]), case["ks"].tolist()
    errors = {}
    for metric in ("cosine", "L2"):
        found = patch_knn(train, case["train_pixels"], test, ks, metric=metric, ignore=int(case["ignore"]))
        errors |= {f"{metric}_k{k}": float((found[k] != case[f"{metric}_k{k}"]).sum()) for k in ks}
    return errors


def prompts(case: Case) -> dict[str, float]:
    grid, thresholds = (int(case["height"]), int(case["width"])), case["thresholds"]
    rows, iou, labels, covers = [], [], [], []
    histograms = {"": prompt.SimilarityHistograms(), "_with_background": prompt.SimilarityHistograms()}
    for image, (features, mask) in enumerate(zip(case["features"], case["masks"])):
        similarity = prompt.cosines(features.astype(np.float64))
        patch_labels, cover = prompt.label_patches(mask, grid)
        labels.append(patch_labels)
        covers.append(cover)
        for suffix, histogram in histograms.items():
            used = np.flatnonzero((cover > prompt.MORE_THAN_HALF) & ((patch_labels > 0) | (suffix != "")))
            histogram.add(similarity[np.ix_(used, used)], patch_labels[used])
        numbers = [number for number in np.unique(mask) if number]
        inside, total = prompt.pixels_by_patch(mask[None] == np.array(numbers)[:, None, None], grid)
        for number, pixels in zip(numbers, inside):
            chosen = np.flatnonzero(pixels / total > prompt.MORE_THAN_HALF)
            rows += [(image, number, patch) for patch in chosen]
            iou.append(prompt.prompt_iou(similarity, pixels, total, chosen, thresholds))
    order = np.lexsort(np.array(rows).T[::-1])
    given = np.lexsort(case["prompts"].T[::-1])
    objects = {tuple(key): part.mean(0) for key, part in zip(dict.fromkeys(row[:2] for row in rows), [p for p in iou if len(p)])}
    object_iou = np.array([objects[tuple(key)] for key in case["objects"].tolist()])
    errors = {
        "patch_labels": error(labels, case["patch_labels"]),
        "patch_cover": error(covers, case["patch_cover"]),
        "prompts": error(np.array(rows)[order], case["prompts"][given]),
        "prompt_iou": error(np.concatenate(iou)[order], case["prompt_iou"][given]),
        "object_iou": error(object_iou, case["object_iou"]),
        "miou": error(np.mean(list(objects.values()), 0), case["miou"]),
        "bin_edges": error(histograms[""].edges, case["bin_edges"]),
        "intra_histogram": error(histograms[""].intra, case["intra_histogram"]),
        "inter_histogram": error(histograms[""].inter, case["inter_histogram"]),
    }
    for suffix, histogram in histograms.items():
        found = {"overlap": histogram.overlap, "intra_mean": histogram.means[0], "inter_mean": histogram.means[1]}
        errors |= {name + suffix: error(value, case[name + suffix]) for name, value in found.items()}
    return errors


def heads(case: Case) -> dict[str, float]:
    mask, patch = case["mask"], int(case["patch_size"])
    grid = (mask.shape[0] // patch, mask.shape[1] // patch)
    kept = attention.blown_up(attention.heaviest_patches(case["attention"], float(case["keep"])), grid, mask.shape)
    plain, void = (attention.object_jaccard(kept, mask, void=number) for number in (None, 255))
    return {
        "thresholded": float((kept != case["thresholded"]).sum()),
        "jaccard": error(plain, case["jaccard"]),
        "jaccard_image": error(attention.image_jaccard(plain), case["jaccard_image"]),
        "jaccard_void": error(void, case["jaccard_void"]),
        "jaccard_image_void": error(attention.image_jaccard(void), case["jaccard_image_void"]),
    }


def views(case: Case) -> dict[str, float]:
    side = int(case["image_size"]) // int(case["patch_size"])
    centres = [correspondence.patch_centres(case[name], side) for name in ("corners1", "corners2")]
    overlap = correspondence.overlapping(*centres, margin=int(case["patch_size"]) / 2 / int(case["image_size"]))
    match = correspondence.matches(case["features1"], case["features2"])
    accuracy = {
        f"accuracy_radius{radius}": correspondence.correspondence_accuracy(correspondence.correct_matches(match, *centres, radius), overlap)
        for radius in (0, 1)
    }
    errors = {"overlap": float((overlap != case["overlap"]).sum()), "match": float((match != case["match"]).sum())}
    return errors | {name: error(value, case[name]) for name, value in accuracy.items()}


def in9(case: Case) -> dict[str, float]:
    mapping = imagenet_to_nine()
    chance = np.bincount(mapping[mapping >= 0], minlength=9) / len(mapping)
    return {
        "in_to_in9": error(mapping, case["in_to_in9"]),
        "accuracy": error(backgrounds.mapped_accuracy(case["prediction"], case["target"], mapping), case["accuracy"]),
        "chance": error(chance, case["chance"]),
    }


def knn(case: Case) -> dict[str, float]:
    """Top 1 by `knn_accuracy`; top 5 from the neighbours that it votes with."""
    classes = int(case["train_labels"].max()) + 1
    train, test = (
        Features(tensor(case[name]), tensor(case[f"{name}_labels"]), torch.arange(len(case[name])), tuple(map(str, range(classes))))
        for name in ("train", "test")
    )
    ks, temperature = case["ks"].tolist(), float(case["temperature"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the largest k exceeds the bank
        top1 = knn_accuracy(train, test, ks=ks, temperature=temperature)
    top5 = []
    for k in ks:
        similarity, index = nearest_neighbours(test.features, train.features, min(k, len(train.labels)))
        votes = torch.zeros(len(test.labels), classes).scatter_add_(1, train.labels[index], (similarity / temperature).exp())
        best = votes.argsort(dim=1, descending=True, stable=True)[:, : min(5, k)]
        top5.append(100 * (best == test.labels[:, None]).any(1).double().mean())
    return {"top1": error(list(top1.values()), case["top1"]), "top5": error(top5, case["top5"])}


def linear_sweep(case: Case) -> dict[str, float]:
    features, labels = tensor(case["features"]), tensor(case["labels"])
    rates = tuple((case["learning_rates"] * int(case["batch_size"]) / 256).tolist())
    found, losses = train_heads(
        lambda epoch: features,
        labels,
        Sweep(rates),
        classes=int(labels.max()) + 1,
        epochs=int(case["epochs"]),
        batch_size=int(case["batch_size"]),
        momentum=float(case["momentum"]),
        order=lambda epoch: tensor(case["order"][epoch]),
        start=tensor(case["init_weight"]),
    )
    width = features.shape[1]
    accuracy = 100 * correct_of_heads(found, features, labels).double() / len(labels)
    return {
        "weight": error(found.weight[:, :, :width], case["weight"]),
        "bias": error(found.logits(found.padded(torch.zeros(1, width, dtype=features.dtype)))[:, :, 0], case["bias"]),
        "losses": error(losses, case["losses"]),
        "train_accuracy": error(accuracy, case["train_accuracy"]),
    }


def logistic(case: Case) -> dict[str, float]:
    train, labels, test = (tensor(case[name]) for name in ("train", "train_labels", "test"))
    errors = {}
    for loss in ("multinomial", "one_vs_rest"):
        fit = fit_logistic([train], [labels], case["lambdas"].tolist(), classes=6, loss=loss, tolerance=1e-10, most_iterations=20_000)
        guesses = torch.einsum("nd,lcd->lnc", test, fit.weight[0]).argmax(-1).numpy()
        accuracy = 100 * (guesses == case["test_labels"]).mean(1)
        scale = case["lambdas"][:, None, None]
        # Weights of the flattest optimum are known to a few digits only: a gradient of 1e-10 over a curvature of 2e-6.
        errors |= {
            f"{loss}_weight": error(fit.weight[0].numpy() * scale, case[f"{loss}_weight"] * scale),
            f"{loss}_objective": error(fit.objective[0], case[f"{loss}_objective"]),
            f"{loss}_accuracy": error(accuracy, case[f"{loss}_accuracy"]),
        }
    return errors


CASES: dict[str, Callable[[Case], dict[str, float]]] = {
    "attention": heads,
    "backgrounds": in9,
    "clustering": clusters,
    "copies": copies,
    "correspondence": views,
    "davis_metrics": davis_metrics,
    "knn": knn,
    "linear_sweep": linear_sweep,
    "logistic": logistic,
    "label_propagation": label_propagation,
    "patch_knn": patches,
    "prompt": prompts,
    "retrieval": retrieval,
    "segmentation": segments,
    "voc07": voc07,
}


def replay_metric(path: str | Path) -> dict[str, float | dict[str, float]]:
    """Errors of the case that the file's name tells."""
    name = Path(path).stem
    if name not in CASES:
        raise ValueError(f"There is no replay of {name!r}; the cases are {', '.join(sorted(CASES))}.")
    with np.load(path, allow_pickle=False) as file:
        case = {key: file[key] for key in file.files}
    errors = CASES[name](case)
    return {"case": name, "max_error": max(errors.values()), "errors": errors}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/replay_metric.py FILE.npz")
    print(json.dumps(replay_metric(sys.argv[1]), indent=1))
