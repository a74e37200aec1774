"""report.html of a run: one self-contained page, readable from a disk, without a network, and while the run is still under way."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

from massl_fast.data.sources import Source
from massl_fast.report.figures import Curve, Level, curve_figure, is_number
from massl_fast.report.html import document, figure, flat, grid, section, table
from massl_fast.report.pictures import Pictures, pictures_of_run
from massl_fast.report.run_folder import RunFolder, read_run

HEADLINE_K = 20
MAX_BAD_FILES_SHOWN = 20
NETWORKS = {"teacher": "--blue", "student": "--orange"}


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
        run,
        backbone=backbone,
        train_source=train_source,
        test_source=test_source,
        max_train_images=max_train_images,
        device=device,
    )
    target = run.path / "report.html"
    partial = run.path / ".report.html.partial"
    partial.write_text(page_of(run, pictures), encoding="utf-8")
    os.replace(partial, target)
    return target


def page_of(run: RunFolder, pictures: Pictures) -> str:
    """The page as HTML."""
    sections = [
        _header(run),
        _headline(run),
        _notices(run),
        _knn(run),
        _learning(run),
        _schedules(run),
        _speed(run),
        _attention(pictures),
        _neighbours(pictures),
        _what_ran(run),
        _settings(run),
    ]
    return document(f"{_name(run)} · massl-fast", sections)


def _name(run: RunFolder) -> str:
    return run.path.resolve().name


def _header(run: RunFolder) -> str:
    architecture, train = run.setting("model", "architecture"), run.setting("data", "train")
    what = " on ".join(escape(str(part)) for part in (architecture, train) if part)
    state = run.stopped or ("complete" if run.summary else "not complete")
    mark = "good" if run.stopped or run.summary else "caution"
    return f'<header><h1>{escape(_name(run))}</h1><span class="state {mark}">{state}</span><p>{what}</p></header>'


def _headline(run: RunFolder) -> str:
    tiles = []
    knn = run.knn()
    if teacher := knn.get("teacher"):
        k = _headline_k(teacher)
        value = teacher[k][1][-1]
        note = f"teacher, k = {k}, step {_count(teacher[k][0][-1])}"
        if untrained := knn.get("untrained", {}).get(k):
            gain = value - untrained[1][0]
            note = f"untrained {untrained[1][0]:.1f} %, {gain:+.1f} points · {note}"
        tiles.append(("k-NN accuracy", f"{value:.1f} %", note))
    steps, losses = run.series("loss")
    if losses:
        tiles.append(("Loss", f"{losses[-1]:.3f}", f"from {losses[0]:.3f} at step {_count(steps[0])}"))
    _, speeds = run.series("images_per_second")
    if speeds:
        _, waits = run.series("data_wait_percent")
        _, utilization = run.series("model_flops_utilization_percent")
        extra = [f"waiting for data {median(waits):.0f} % of the time"] if waits else []
        extra += [f"{median(utilization):.0f} % of the peak rate"] if utilization else []
        tiles.append(("Images per second", _significant(median(speeds)), "median" + "".join(f" · {part}" for part in extra)))
    if run.rows:
        last = run.rows[-1]
        images = f"{_count(last['images_seen'])} images" if is_number(last.get("images_seen")) else ""
        epochs = f"{last['epoch']:.4g} epochs" if is_number(last.get("epoch")) else ""
        tiles.append(("Steps", _count(run.last_step), " · ".join(part for part in (images, epochs) if part)))
    if not tiles:
        return ""
    cells = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><dd>{escape(c)}</dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _notices(run: RunFolder) -> str:
    warnings = run.summary.get("warnings") or []
    sentences = [str(w) for w in (warnings if isinstance(warnings, list) else [warnings])] + run.notes
    body = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    if run.bad_files:
        shown = "".join(f"<li><code>{escape(name)}</code></li>" for name in run.bad_files[:MAX_BAD_FILES_SHOWN])
        more = len(run.bad_files) - MAX_BAD_FILES_SHOWN
        rest = f"<li>and {more} more in bad_files.txt</li>" if more > 0 else ""
        verb = "image was" if len(run.bad_files) == 1 else "images were"
        title = f"{len(run.bad_files)} {verb} unreadable and replaced by others"
        body += f"<li><details><summary>{title}</summary><ul>{shown}{rest}</ul></details></li>"
    return f'<aside aria-label="Notices"><ul>{body}</ul></aside>' if body else ""


def _knn(run: RunFolder) -> str:
    knn = run.knn()
    if not knn:
        return section("k-NN accuracy", "<p>This run has not been evaluated.</p>")
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
    drawn = figure(f"Over training, k = {k}", curve_figure(curves, unit="%", levels=levels)) if curves else ""

    def last(name: str, k: int) -> float | None:
        return knn[name][k][1][-1] if k in knn.get(name, {}) else None

    head = "".join(f"<th>k = {k}</th>" for k in ks)
    rows = [("untrained", [untrained.get(k) for k in ks])] if untrained else []
    rows += [(name, [last(name, k) for k in ks]) for name in ("student", "teacher") if name in knn]
    body = "".join(f"<tr><th>{name}</th>" + "".join(f"<td>{_number(v, '.1f')}</td>" for v in values) + "</tr>" for name, values in rows)
    when = "Before training" if list(knn) == ["untrained"] else "At the last evaluation"
    table = f'<div class="card"><h3>{when}, %</h3><table class="numbers"><tr><th></th>{head}</tr>{body}</table>'
    sets = [run.setting("evaluation", name) for name in ("train", "test")]
    table += (
        f"<p>Test images of {escape(str(sets[1]))}, classified by training images of {escape(str(sets[0]))}.</p></div>"
        if all(sets)
        else "</div>"
    )
    return section(
        "k-NN accuracy",
        f'<div class="grid">{drawn}{table}</div>',
        "Held-out images take the class that their k nearest training images vote for, by cosine similarity of frozen features.",
    )


def _learning(run: RunFolder) -> str:
    block, memory = run.setting("objective", "block_size"), run.setting("objective", "memory_size")
    ends = [Level(f"ln(block size) = {math.log(block):.2f}", math.log(block))] if is_number(block) and block > 0 else []
    entropies = {"student": "student_entropy_nats", "teacher": "teacher_entropy_nats"}
    figures = [
        _chart(run, "Loss", {"loss": "loss"}, "nats", "Cross-entropy of student views against teacher views over blocks of the memory."),
        _chart(
            run,
            "Entropy over a block",
            entropies,
            "nats",
            "Collapse shows at either end: 0, all weight on one entry; ln(block size), the same weight on all.",
            levels=ends,
            from_zero=True,
        ),
        _chart(
            run, "KL divergence, teacher to student", {"kl": "kl_nats"}, "nats", "The loss without the teacher's entropy.", from_zero=True
        ),
        _chart(
            run,
            "Spread of unit vectors",
            {"embeddings": "embedding_spread", "memory": "memory_spread"},
            "",
            "1 − ‖mean‖²: 1 if spread evenly over the sphere, 0 if all are equal.",
            from_zero=True,
        ),
        _chart(run, "Gradient norm", {"gradient norm": "gradient_norm"}, "", "Before clipping.", logarithmic=True),
        _chart(
            run,
            "Age of the oldest memory entry",
            {"age": "memory_age_steps"},
            "steps",
            f"The memory holds {_count(memory)} embeddings." if is_number(memory) else "",
            from_zero=True,
        ),
    ]
    return section("Learning", grid(figures)) if any(figures) else ""


def _schedules(run: RunFolder) -> str:
    figures = [
        _chart(run, "Learning rate", {"learning rate": "learning_rate"}, "", from_zero=True),
        _chart(run, "Weight decay", {"weight decay": "weight_decay"}, ""),
        _chart(run, "Teacher momentum", {"momentum": "teacher_momentum"}, ""),
        _chart(run, "Teacher temperature", {"temperature": "teacher_temperature"}, ""),
        _chart(run, "Loss scale", {"loss scale": "loss_scale"}, "", "fp16: halved when gradients overflow.", logarithmic=True),
    ]
    return section("Schedules", grid(figures)) if any(figures) else ""


def _speed(run: RunFolder) -> str:
    peaks = {
        "allocated": "memory_allocated_peak_gib",
        "reserved": "memory_reserved_peak_gib",
        "host": "host_memory_peak_gib",
    }
    figures = [
        _chart(run, "Images per second", {"images/s": "images_per_second"}, "images/s", from_zero=True),
        _chart(
            run,
            "Share of the step",
            {"waiting for data": "data_wait_percent", "model FLOPs utilization": "model_flops_utilization_percent"},
            "%",
            "Under 10 % waiting for data, the network is what takes the time.",
            from_zero=True,
        ),
        _chart(run, "Peak memory", peaks, "GiB", "Allocated and reserved: on the GPU, by PyTorch. Host: this process.", from_zero=True),
    ]
    return section("Speed and memory", grid(figures)) if any(figures) else ""


def _attention(pictures: Pictures) -> str:
    title = "Attention of the [CLS] token"
    if pictures.attention is None:
        return section(title, f"<p>{escape(pictures.attention_note)}</p>")
    heads = pictures.attention.shape[1]
    head = "".join(f"<th>{name}</th>" for name in ("image", "mean", *(f"head {i + 1}" for i in range(heads))))
    rows = []
    for image, maps in zip(pictures.images, pictures.attention):
        cells = [_picture(image.permute(1, 2, 0).numpy(), "held-out image")]
        names = ["mean over the heads", *(f"head {i + 1}" for i in range(heads))]
        cells += [_picture(_heat(m.numpy()), f"attention, {n}", smooth=True) for n, m in zip(names, [maps.mean(0), *maps])]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    body = f'<div class="card scroll fit"><table class="pictures"><tr>{head}</tr>{"".join(rows)}</table></div>'
    return section(title, body, "Last block, held-out images; each map from 0 (dark) to its own largest value (bright).")


def _neighbours(pictures: Pictures) -> str:
    title = "Nearest neighbours of held-out images"
    sheet = pictures.neighbours
    if sheet is None:
        return section(title, f"<p>{escape(pictures.neighbours_note)}</p>")
    rows, correct, total = [], 0, 0
    for q, name in enumerate(sheet.query_classes):
        cells = [f'<td class="query">{_labelled(sheet.queries[q], name, "", "held-out image")}</td>']
        for image, other, similarity in zip(sheet.neighbours[q], sheet.neighbour_classes[q], sheet.similarities[q].tolist()):
            same = other == name
            correct, total = correct + same, total + 1
            cells.append(f"<td>{_labelled(image, other, 'right' if same else 'wrong', f'neighbour, cosine {similarity:.2f}')}</td>")
        rows.append("<tr>" + "".join(cells) + "</tr>")
    columns = max(len(row) for row in sheet.neighbour_classes)
    head = "<th>held out</th>" + "".join(f"<th>{i + 1}</th>" for i in range(columns))
    body = f'<div class="card scroll fit"><table class="pictures sheet"><tr>{head}</tr>{"".join(rows)}</table></div>'
    return section(
        title,
        body,
        f"Random held-out images, one a class in turn, and the nearest of {sheet.gallery}. "
        f"Green: of the same class ({correct} of {total}); red: of another.",
    )


def _what_ran(run: RunFolder) -> str:
    shown = {key: value for key, value in run.summary.items() if key != "warnings"}
    rows = [(key.replace("_", " "), value) for key, value in flat(shown)]
    return section("What ran", f'<div class="card two">{table(rows)}</div>') if shown else ""


def _settings(run: RunFolder) -> str:
    groups = [
        f'<div class="card"><h3>{escape(str(section))}</h3>{table(flat(values) if isinstance(values, dict) else [("", values)])}</div>'
        for section, values in run.settings.items()
    ]
    return section("Settings", f'<div class="columns">{"".join(groups)}</div>') if groups else ""


def _chart(run: RunFolder, title: str, keys: dict[str, str], unit: str, note: str = "", levels: Sequence[Level] = (), **style: bool) -> str:
    """A figure of those of `keys` ({label: key of metrics.jsonl}) that the run has logged; empty if it has none."""
    colours = ("--blue", "--orange", "--green")
    series = [(label, *run.series(key), colour) for (label, key), colour in zip(keys.items(), colours)]
    curves = [Curve(label, steps, values, colour) for label, steps, values, colour in series if values]
    return figure(title, curve_figure(curves, unit=unit, levels=levels, **style), note) if curves else ""


def _labelled(image: Tensor, name: str, verdict: str, alt: str) -> str:
    mark = {"right": "✓ ", "wrong": "✗ ", "": ""}[verdict]
    return f'<div class="{verdict}">{_picture(image.permute(1, 2, 0).numpy(), f"{alt}: {name}")}<small>{mark}{escape(name)}</small></div>'


def _picture(pixels: np.ndarray, alt: str, smooth: bool = False) -> str:
    """uint8 [h, w, 3] as an <img> that holds its own data: PNG for small pictures, JPEG for large ones."""
    small = max(pixels.shape) <= 64
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **({"format": "PNG", "optimize": True} if small else {"format": "JPEG", "quality": 88}))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind = "png" if small else "jpeg"
    look = ' class="pixels"' if small and not smooth else ""
    return f'<img{look} src="data:image/{kind};base64,{data}" alt="{escape(alt)}" title="{escape(alt)}">'


def _heat(values: np.ndarray) -> np.ndarray:
    """A map [h, w] as colours, uint8 [h, w, 3]."""
    scaled = values / max(float(values.max()), 1e-12)
    return (colormaps["magma"](scaled)[..., :3] * 255).round().astype(np.uint8)


def _headline_k(by_k: dict[int, Any]) -> int:
    return HEADLINE_K if HEADLINE_K in by_k else min(by_k)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _count(value: float) -> str:
    return f"{int(value):,}".replace(",", "\u202f")


def _significant(value: float) -> str:
    return _count(round(value)) if value >= 100 else f"{value:.3g}"
