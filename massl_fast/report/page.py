"""report.html of a run: one self-contained page, readable from a disk, without a network, and while the run is still under way."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

from massl_fast.data.sources import Source
from massl_fast.report.answers import answers_of
from massl_fast.report.evaluations import FOLDER, blocks_of, results_in
from massl_fast.report.figures import Curve, Level, curve_figure
from massl_fast.report.html import Drawing, flat, render
from massl_fast.report.pictures import Pictures, pictures_of_run
from massl_fast.run.reading import HEADLINE_K, Declared, RunFolder, is_number, read_run

NETWORKS = {"teacher": "--blue", "student": "--orange"}
COLOURS = ("--blue", "--orange", "--green", "--violet", "--muted")
# Key, title, note, logarithmic: settings of the step, drawn apart from what the step found.
SCHEDULES = (
    ("learning_rate", "Learning rate", "", False),
    ("weight_decay", "Weight decay", "", False),
    ("teacher_momentum", "Teacher momentum", "", False),
    ("teacher_temperature", "Teacher temperature", "", False),
    ("loss_scale", "Loss scale", "fp16: halved when gradients overflow.", True),
)
LOSS = Declared("loss", "Loss")
GRADIENT_NORM = Declared("gradient_norm", "Gradient norm", note="Before clipping.")


def write_report(
    run_folder: Path | str,
    *,
    backbone: nn.Module | None = None,
    train_source: Source | None = None,
    test_source: Source | None = None,
    max_train_images: int | None = None,
    device: torch.device | str | None = None,
) -> Path:
    """Write `report.html` into a run folder and return its path.

    Takes what there is: a run that was cut off, never evaluated or trained without a GPU has a shorter page that says what is missing.

    Args:
        backbone: the teacher's timm network, for attention maps and nearest neighbours; None: from the last checkpoint.
        train_source, test_source: labelled images; None: those that the run's settings name.
        max_train_images: nearest neighbours are searched among a fixed random subset of this many training images; 0: all; None: as many
            as take little time (`collect_pictures`).
        device: for a backbone from a checkpoint; None: the GPU where there is one.

    Raises:
        ValueError: the folder is not a run folder.
    """
    run = read_run(run_folder)
    pictures = pictures_of_run(
        run, backbone=backbone, train_source=train_source, test_source=test_source, max_train_images=max_train_images, device=device
    )
    target, partial = run.path / "report.html", run.path / ".report.html.partial"
    partial.write_text(page_of(run, pictures), encoding="utf-8")
    os.replace(partial, target)
    return target


def page_of(run: RunFolder, pictures: Pictures) -> str:
    """The page as HTML."""
    found, damage = results_in(run.path / FOLDER)
    # The page lies a folder above the pictures.
    blocks = [replace(block, pictures=[{**one, "file": f"{FOLDER}/{one['file']}"} for one in block.pictures]) for block in blocks_of(found)]
    what = [str(part) for part in (run.setting("model", "architecture"), run.setting("data", "train")) if part]
    settings = [(str(name), flat(values) if isinstance(values, dict) else [("", values)]) for name, values in run.settings.items()]
    return render(
        "report.html",
        title=run.path.resolve().name,
        subject="",
        what=" on ".join(what),
        state=run.stopped or ("complete" if run.summary else "not complete"),
        mark="good" if run.stopped or run.summary else "caution",
        answers=answers_of(run),
        headline=_headline(run),
        notices=run.warnings + run.notes + [damage] * bool(damage),
        bad_files=run.bad_files,
        knn=_knn(run),
        blocks=blocks,
        curves=[("Learning", _learning(run)), ("Schedules", _schedules(run)), ("Speed and memory", _speed(run))],
        attention=_attention(pictures),
        attention_note=pictures.attention_note,
        similarity=pictures.similarity,
        neighbours=_neighbours(pictures),
        neighbours_note=pictures.neighbours_note,
        ran=[
            (key.replace("_", " "), value) for key, value in flat({k: v for k, v in run.summary.items() if k not in ("warnings", "advice")})
        ],
        settings=settings,
    )


def _headline(run: RunFolder) -> list[tuple[str, str, str]]:
    """Tiles: name, value, note."""
    tiles = []
    knn = run.knn()
    if headline := run.headline_knn("teacher"):
        k, steps, values = headline
        value = values[-1]
        note = f"teacher, k = {k}, step {_count(steps[-1])}"
        if untrained := knn.get("untrained", {}).get(k):
            note = f"untrained {untrained[1][0]:.1f} %, {value - untrained[1][0]:+.1f} points · {note}"
        tiles.append(("k-NN accuracy", f"{value:.1f} %", note))
    steps, losses = run.series("loss")
    if losses:
        tiles.append(("Loss", f"{losses[-1]:.3f}", f"from {losses[0]:.3f} at step {_count(steps[0])}"))
    speeds, waits, utilization = (
        run.series(key)[1] for key in ("images_per_second", "data_wait_percent", "model_flops_utilization_percent")
    )
    if speeds:
        extra = [f"waiting for data {median(waits):.0f} % of the time"] if waits else []
        extra += [f"{median(utilization):.0f} % of the peak rate"] if utilization else []
        rate = median(speeds)
        tiles.append(("Images per second", _count(round(rate)) if rate >= 100 else f"{rate:.3g}", " · ".join(["median", *extra])))
    if run.rows:
        last = run.rows[-1]
        images = f"{_count(last['images_seen'])} images" if is_number(last.get("images_seen")) else ""
        epochs = f"{last['epoch']:.4g} epochs" if is_number(last.get("epoch")) else ""
        tiles.append(("Steps", _count(run.last_step), " · ".join(part for part in (images, epochs) if part)))
    return tiles


def _knn(run: RunFolder) -> dict[str, Any] | None:
    knn = run.knn()
    if not knn:
        return None
    ks = sorted({k for by_k in knn.values() for k in by_k})
    k = _headline_k(knn.get("teacher") or next(iter(knn.values())))
    untrained = {k: values[0] for k, (_, values) in knn.get("untrained", {}).items()}
    start = ([0], [untrained[k]]) if k in untrained else ([], [])  # teacher and student both set out as the untrained network
    curves = [
        Curve(name, start[0] + knn[name][k][0], start[1] + knn[name][k][1], colour, markers=True)
        for name, colour in NETWORKS.items()
        if k in knn.get(name, {})
    ]
    levels = [Level("untrained", untrained[k])] if k in untrained else []
    last = {name: [by_k[k][1][-1] if k in by_k else None for k in ks] for name, by_k in knn.items()}
    return {
        "drawn": Drawing(f"Over training, k = {k}", curve_figure(curves, unit="%", levels=levels)) if curves else None,
        "when": "Before training" if list(knn) == ["untrained"] else "At the last evaluation",
        "ks": ks,
        "rows": [(name, last[name]) for name in ("untrained", "student", "teacher") if name in last],
        "train": run.setting("evaluation", "train"),
        "test": run.setting("evaluation", "test"),
    }


def _learning(run: RunFolder) -> list[Drawing]:
    """Loss and gradient norm, and what the run's objective declared."""
    drawn_elsewhere = {key for key, *_ in SCHEDULES}
    of_loss = [metric for metric in run.declared if metric.key == LOSS.key]
    groups: dict[str, list[Declared]] = {}
    for metric in run.declared:
        if metric.key not in drawn_elsewhere and metric.key != LOSS.key:
            groups.setdefault(metric.figure or metric.title, []).append(metric)
    return [
        *_chart(run, "Loss", of_loss or [LOSS]),
        *(drawn for title, metrics in groups.items() for drawn in _chart(run, title, metrics, from_zero=True)),
        *_chart(run, "Gradient norm", [GRADIENT_NORM], logarithmic=True),
    ]


def _schedules(run: RunFolder) -> list[Drawing]:
    return [
        drawn
        for key, title, note, logarithmic in SCHEDULES
        for drawn in _chart(run, title, [Declared(key, title, note=note)], logarithmic=logarithmic, from_zero=key == "learning_rate")
    ]


def _speed(run: RunFolder) -> list[Drawing]:
    shares = [
        Declared("data_wait_percent", "waiting for data", "%", "Under 10 % waiting for data, the network is what takes the time."),
        Declared("model_flops_utilization_percent", "model FLOPs utilization", "%"),
    ]
    peaks = [Declared(f"{name}_peak_gib", name.split("_")[-1], "GiB") for name in ("memory_allocated", "memory_reserved")]
    peaks.append(Declared("host_memory_peak_gib", "host", "GiB", "Allocated and reserved: on the GPU, by PyTorch. Host: this process."))
    return [
        *_chart(run, "Images per second", [Declared("images_per_second", "images/s", "images/s")], from_zero=True),
        *_chart(run, "Share of the step", shares, from_zero=True),
        *_chart(run, "Peak memory", peaks, from_zero=True),
    ]


def _chart(run: RunFolder, title: str, metrics: Sequence[Declared], **style: bool) -> list[Drawing]:
    """A figure of those metrics that the run has logged; none if it has none."""
    found = [(metric, *run.series(metric.key), colour) for metric, colour in zip(metrics, COLOURS)]
    curves = [Curve(metric.title, steps, values, colour) for metric, steps, values, colour in found if values]
    if not curves:
        return []
    levels = {metric.level: Level(*metric.level) for metric in metrics if metric.level}
    notes = dict.fromkeys(metric.note for metric in metrics if metric.note)
    return [Drawing(title, curve_figure(curves, unit=metrics[0].unit, levels=list(levels.values()), **style), " ".join(notes))]


def _attention(pictures: Pictures) -> list[list[dict[str, Any]]] | None:
    """Rows of pictures: the image, and its map of similarities, or the mean over the heads and each head."""
    if pictures.attention is None:
        return None
    rows = []
    for image, maps in zip(pictures.images, pictures.attention):
        cells = [_picture(image.permute(1, 2, 0).numpy(), "held-out image") | {"column": "image"}]
        named = {"similarity": maps[0]} if pictures.similarity else {"mean": maps.mean(0)} | {f"head {n}": m for n, m in enumerate(maps, 1)}
        for name, one in named.items():
            alt = name if pictures.similarity else f"attention, {name}{' over the heads' if name == 'mean' else ''}"
            cells.append(_picture(_heat(one.numpy()), alt, smooth=True) | {"column": name})
        rows.append(cells)
    return rows


def _neighbours(pictures: Pictures) -> dict[str, Any] | None:
    sheet = pictures.neighbours
    if sheet is None:
        return None
    rows = []
    for q, name in enumerate(sheet.query_classes):
        neighbours = zip(sheet.neighbours[q], sheet.neighbour_classes[q], sheet.similarities[q].tolist())
        cells = [
            _labelled(image, other, f"neighbour, cosine {similarity:.2f}") | {"right": other == name}
            for image, other, similarity in neighbours
        ]
        rows.append((_labelled(sheet.queries[q], name, "held-out image"), cells))
    verdicts = [cell["right"] for _, cells in rows for cell in cells]
    columns = max(len(row) for row in sheet.neighbour_classes)
    return {"gallery": sheet.gallery, "correct": sum(verdicts), "total": len(verdicts), "columns": columns, "rows": rows}


def _labelled(image: Tensor, name: str, alt: str) -> dict[str, Any]:
    return _picture(image.permute(1, 2, 0).numpy(), f"{alt}: {name}") | {"name": name}


def _picture(pixels: np.ndarray, alt: str, smooth: bool = False) -> dict[str, Any]:
    """uint8 [h, w, 3] as an image that holds its own data: PNG for small pictures, JPEG for large ones."""
    small = max(pixels.shape) <= 64
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **({"format": "PNG", "optimize": True} if small else {"format": "JPEG", "quality": 88}))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"source": f"data:image/{'png' if small else 'jpeg'};base64,{data}", "alt": alt, "pixelated": small and not smooth}


def _heat(values: np.ndarray) -> np.ndarray:
    """A map [h, w] as colours, uint8 [h, w, 3]."""
    scaled = values.clip(0) / max(float(values.max()), 1e-12)
    return (colormaps["magma"](scaled)[..., :3] * 255).round().astype(np.uint8)


def _headline_k(by_k: dict[int, Any]) -> int:
    return HEADLINE_K if HEADLINE_K in by_k else min(by_k)


def _count(value: float) -> str:
    return f"{int(value):,}".replace(",", "\u202f")
