"""Pages are drawn from records alone, whole, and without anything from elsewhere."""

import re
import xml.dom.minidom

import pytest

from massl_fast import records
from massl_fast.benchmarks.chapters import intensity
from massl_fast.benchmarks.charts import Bar, Line, bars, over_sizes, roofline
from massl_fast.benchmarks.page import page_of
from massl_fast.cli import main
from massl_fast.engine.phases import PHASES as NAMES
from massl_fast.profiling.ledger import CATEGORIES
from massl_fast.records import latest

MODEL = {"architecture": "vit_tiny", "batch": 4, "crops": "2×32 + 2×16", "memory": 64, "precision": "fp32", "device": "cpu"}


def kernel(variant: str, images: int, milliseconds: float) -> dict:
    case = dict(operation="loss", V=12, T=2, N=images, D=256, K=8192, block=2048, dtype="float32", variant=variant, device="cpu")
    figures = {
        "time": records.figure([milliseconds] * 9, "ms", "lower"),
        "error": records.figure(2e-7, "relative", "lower"),
        "rate": records.figure([0.5] * 9, "TFLOP/s", "higher"),
        "share of the matrix rate": records.figure([50.0] * 9, "%", "higher"),
        "matrix product": records.figure([1.0] * 9, "TFLOP/s"),
        "copy": records.figure([20.0] * 9, "GB/s"),
        "extra memory": records.figure(12.5, "MiB", "lower"),
    }
    return records.record("kernels", case, figures)


def everything() -> list[dict]:
    """A record of every kind."""
    figure = records.figure
    step = {"step_seconds": figure([0.1] * 9, "s", "lower"), "images_per_second": figure([40.0] * 9, "images/s")}
    step |= {"watched_step_seconds": figure([0.101] * 9, "s"), "utilization_of_measured_rate": figure([30.0] * 9, "%")}
    step |= {f"part: {name}": figure([0.01] * 9, "s", "lower") for name in NAMES}
    rates = {f"{name}_images_per_second": figure([10.0] * 9, "images/s", "higher") for name in ("loader", "model", "together")}
    line = {"seconds": [0.0, 1.0, 2.0], "sections": ["teacher", "loss", "backward"], "bytes": {c: [1, 2, 3 << 20] for c in CATEGORIES}}
    sizes = {"student weights": 2 << 20, "activations: block 0": 3 << 20, "activations: block 10": 1 << 20}
    memory = {"estimated": sizes, "measured": sizes, "measured_timeline": line, "estimated_timeline": line, "peak_section": "backward"}
    memory |= {"largest": ["1 MiB activations"], "leaks": ["No leak"], "rest": {"allocator slack": 1 << 20}}
    sides = {"published": {"images_per_second": 1.0, "step_seconds_median": 0.5, "peak_mib": 10.0}}
    of_step = {"global_size": 32, "local_size": 16, "num_local": 2, "memory_size": 64}
    tried = [[8, {"images_per_second": 3.0, "step_seconds": 0.1, "peak_bytes": 1 << 20}], [16, None]]
    published = {"published: step_seconds": figure(0.5, "s", "lower"), "published: times the first": figure(1.0, "×")}
    trace = {"operators": [{"name": "aten::mm<script>", "seconds": 0.1, "calls": 3, "share_percent": 9.0}], "steps": 2}
    trace |= {"parts": {}, "gaps": None, "waits": [{"operator": "item", "line": "a.py:3", "count": 2}]}
    gaps = {"idle_share": 0.1, "largest": [{"seconds": 1e-4, "part": "loss", "meanwhile": ""}]}
    loader = dict(loader="dali", workers=2, decode="cpu", augment="cpu", images="generated", batch=8)
    loader |= dict(global_size=224, local_size=96, num_local=10, device="cpu")
    return [
        *(kernel(variant, images, 1.0 + images) for variant in ("reference", "streaming") for images in (8, 64)),
        records.record("step", MODEL, step, {"gflop_per_image": 1.0, "matrix_tflops_measured": 0.1, "matrix_tflops_data_sheet": None}),
        records.record("published step", MODEL | of_step, published, {"sides": sides, "rounds": 3, "case": {"model_args": {"depth": 4}}}),
        records.record(
            "ablation",
            MODEL | of_step | {"sides": "massl-fast, a, b, c"},
            {"massl-fast: step_seconds": figure(0.5, "s", "lower")},
            {"sides": dict.fromkeys(("massl-fast", "a", "b", "c"), sides["published"]), "rounds": 3, "case": {"model_args": {}}},
        ),
        records.record("batch search", MODEL, {"x": figure(1.0, "s")}, {"tried": tried, "best": 8}),
        records.record(
            "train", MODEL | {"loader": "dali", "workers": 3}, rates | {"data_wait": figure([5.0], "%")}, {"verdict": ["Model bounds."]}
        ),
        records.record("loader", loader, {k: figure([9.0] * 9, "images/s") for k in ("images_per_second", "images_per_core_second")}),
        records.record("memory", MODEL, {"estimate_error": figure(-3.0, "%")}, memory),
        records.record("memory", MODEL | {"batch": 5}, {}, {"estimated": sizes, "estimated_timeline": line}),
        records.record("trace", MODEL, {"waits_per_step": figure(2, "1", exact=True)}, trace),
        records.record("trace", MODEL | {"batch": 5}, {"waits_per_step": figure(0, "1", exact=True)}, trace | {"gaps": gaps, "waits": []}),
    ]


def test_a_page_of_every_kind_is_whole_and_needs_nothing_else():
    page = page_of(everything())
    for heading in (
        "Kernels",
        "Roofline",
        "A step, model alone",
        "Loader and model",
        "Loaders alone",
        "Memory of a step",
        "Operators of a step",
    ):
        assert f"{heading}</h" in page
    assert "a.py:3" in page and "aten::mm&lt;script&gt;" in page and "-3.0 % off" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page) and "<script" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        xml.dom.minidom.parseString(svg)


def test_the_latest_record_of_a_case_counts():
    old, other, new = kernel("streaming", 8, 1.0), kernel("streaming", 64, 1.0), kernel("streaming", 8, 2.0)
    assert latest([old, other, new]) == [new, other]


def test_intensity_is_operations_over_least_traffic():
    case = dict(V=12, T=2, N=64, D=256, K=65536, block=16384, dtype="bfloat16")
    rows = 14 * 64
    assert intensity(case) == 4 * 256 * rows * 65536 / (65536 * 256 * 2 + rows * 256 * 6)
    assert intensity(case | {"K": 65537, "N": 64}) == intensity(case)


@pytest.mark.parametrize("samples", [[1.0], [0.0], [1e-9] * 9, [1.0, 1e9] * 5])
def test_any_bar_can_be_drawn(samples):
    xml.dom.minidom.parseString(bars([Bar("a", samples), Bar("b", [3.0])], "ms"))


def test_lines_and_dots_are_drawn():
    xml.dom.minidom.parseString(over_sizes([Line("a", [(8, 1.0), (64, 9.0)], "--blue")], "N", "ms"))
    xml.dom.minidom.parseString(roofline([Line("a", [(100.0, 1e12)], "--blue"), Line("b", [(1.0, 1e9)], "--green", peer=True)], 2e12, 1e10))


def test_the_command_writes_beside_the_records(tmp_path, capsys):
    records.append(tmp_path / "kernels.jsonl", [kernel("streaming", 8, 1.0)])
    assert main(["bench", "page", str(tmp_path)]) == 0
    assert (tmp_path / "benchmarks.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["bench", "page", str(tmp_path), "--output", str(tmp_path / "kernels.jsonl" / "page.html")]) == 2
    assert "The page cannot be written" in capsys.readouterr().err
