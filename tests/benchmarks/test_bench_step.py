"""What bench step and bench train record and say; how long anything takes is tested nowhere."""

import pytest
import torch

from massl_fast import records
from massl_fast.benchmarks import step, timing, train
from massl_fast.benchmarks.train import Situation, verdict
from massl_fast.cli import main
from massl_fast.config import load_config
from massl_fast.engine.phases import PHASES as NAMES
from massl_fast.models.backbone import Encoder
from small_encoders import FP32, ONE_CPU

TINY = ["--model.architecture", "vit_tiny_patch16_224", "--model.model_args", "{patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}"]
TINY += ["--objective.memory_size", "64", "--objective.block_size", "32", "--model.head_hidden_dim", "16"]


@pytest.fixture(autouse=True)
def short(monkeypatch, one_thread):
    """Few steps, in one thread."""
    monkeypatch.setattr(step, "ROUND_SECONDS", 1e-6)
    monkeypatch.setattr(step, "SEARCH_SECONDS", 1e-6)
    monkeypatch.setattr(step, "OVERTIME", 1e9)
    monkeypatch.setattr(step, "matrix_rate", lambda device, dtype: 1e11)


def test_bench_step_records_the_whole_and_its_parts(tmp_path, capsys):
    output = tmp_path / "step.jsonl"
    assert main(["bench", "step", "--seconds", "0.001", "--output", str(output), "--train.global_batch", "4", *TINY]) == 0
    (row,) = records.read(output)
    figures = row["figures"]
    assert row["case"]["batch"] == 4 and row["case"]["crops"] == "2×32 + 2×16"
    assert len(figures["step_seconds"]["samples"]) == len(figures["watched_step_seconds"]["samples"]) >= 8
    for seconds, images in zip(figures["step_seconds"]["samples"], figures["images_per_second"]["samples"]):
        assert seconds * images == pytest.approx(4, rel=1e-4)
    # The parts of a round are its steps, but for what lies between two steps.
    for number, whole in enumerate(figures["watched_step_seconds"]["samples"]):
        parts = sum(figures[f"part: {name}"]["samples"][number] for name in NAMES)
        assert parts <= whole * 1.001
    operations = row["details"]["gflop_per_image"] * 4e9
    share = 100 * operations / (figures["step_seconds"]["samples"][0] * 1e11)
    assert figures["utilization_of_measured_rate"]["samples"][0] == pytest.approx(share, rel=1e-4)
    told = capsys.readouterr().out
    assert "Parts of a step (marking them changed its time by" in told and "Utilisation" in told


def test_the_batch_search_stops_at_memory(tmp_path, capsys, monkeypatch):
    def pretend(config, world, precision, batch):
        if batch > 100:
            return None
        return {"images_per_second": 1000 * batch / (batch + 10), "step_seconds": (batch + 10) / 1000, "peak_bytes": batch << 20}

    monkeypatch.setattr(step, "rate_at", pretend)
    monkeypatch.setattr(step, "largest_batch", lambda config, device_type, budget: (90, None))
    output = tmp_path / "search.jsonl"
    more = ["--objective.memory_size", "1024"]
    assert main(["bench", "step", "--search-batch", "--max-batch", "4096", "--output", str(output), *TINY, *more]) == 0
    told = capsys.readouterr().out
    assert "128  out of memory" in told
    assert "Largest that fits: 96 images; predicted from shapes alone, 6 % of the device left free: 90." in told
    (row,) = records.read(output)
    assert row["details"]["largest"] == 96
    assert [batch for batch, result in row["details"]["tried"] if result is None] == [104, 112, 128]


def test_a_search_in_which_nothing_fits_gets_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(step, "rate_at", lambda *arguments: None)
    assert main(["bench", "step", "--search-batch", *TINY]) == 2
    assert "Out of memory: a step" in capsys.readouterr().err


def test_the_batch_search_on_a_cpu_is_bounded(capsys):
    assert main(["bench", "step", "--search-batch", "--max-batch", "16", *TINY]) == 0
    told = capsys.readouterr().out
    assert "No limit was met up to 16 images" in told


def test_every_batch_of_a_search_is_compiled(monkeypatch):
    """Four graphs a batch (teacher and student, all blocks but the last and the last), and Dynamo keeps eight of a function."""
    monkeypatch.setattr(Encoder, "compile_blocks", lambda encoder: encoder.packed.compile_blocks(dynamic=False, backend="eager"))
    config = load_config("demo", [*TINY, "--model.model_args", "{patch_size: 8, depth: 2, embed_dim: 24, num_heads: 2}"])
    config.model.compile = True
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch in (2, 3, 4):
            assert step.rate_at(config, ONE_CPU, FP32, batch)


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--max-batch", "-1"], ["--recipe", "none"], ["--train.batch", "3"]])
def test_bad_arguments_get_a_sentence(arguments, capsys):
    assert main(["bench", "step", *arguments]) == 2
    assert "massl-fast bench step: " in capsys.readouterr().err


def situation(**changes) -> Situation:
    common = dict(loader=100.0, model=100.0, together=95.0, waited=0.0, on_gpu=True, loader_name="dali", workers=7, cores=8)
    return Situation(**{**common, "compiled": False, "precision": "bf16", "decode": "mixed", "augment": "gpu", **changes})


@pytest.mark.parametrize(
    ("changes", "head", "advice"),
    [
        (dict(loader=50.0, together=48.0, waited=0.5), "The loader bounds this run: steps wait for images 50 %", "smaller files"),
        (dict(loader=50.0, together=48.0, waited=0.5, decode="cpu"), "The loader bounds", "--data.decode mixed"),
        (dict(loader=50.0, together=48.0, waited=0.5, loader_name="torchvision", workers=2), "The loader bounds", "--data.num_workers 7"),
        (dict(loader=50.0, together=48.0, waited=0.5, loader_name="torchvision"), "The loader bounds", "augments on the GPU"),
        (dict(loader=400.0), "The model bounds this run: 100 images/s alone, 95 with the loader, which could make 4.0", "--model.compile"),
        (dict(loader=400.0, precision="fp32"), "The model bounds", "--train.precision bf16"),
        (dict(together=50.0), "Together they make 50 images/s, less than either alone", "--data.augment cpu"),
        (dict(together=50.0, on_gpu=False, loader=120.0), "Loader and model share 8 cores", "--data.num_workers 3"),
        (dict(together=50.0, on_gpu=False, loader=900.0), "The model bounds", "--model.compile"),
    ],
)
def test_verdicts_in_words(changes, head, advice):
    sentences = verdict(situation(**changes))
    assert sentences[0].startswith(head)
    assert any(advice in sentence for sentence in sentences[1:])


def test_nothing_is_advised_that_is_so_already():
    sentences = verdict(situation(loader=400.0, compiled=True))
    assert not any("compile" in sentence or "bf16" in sentence for sentence in sentences)


def test_bench_train_measures_three_ways_and_says_what_bounds(tmp_path, capsys):
    from small_images import write_images

    images = write_images(tmp_path / "images", classes=2, per_class=8, size=40)
    output = tmp_path / "train.jsonl"
    more = ["--data.train", str(images), "--data.num_workers", "0", "--train.global_batch", "4"]
    assert main(["bench", "train", "--seconds", "0.02", "--output", str(output), *TINY, *more]) == 0
    told = capsys.readouterr().out
    assert "loader alone" in told and "data wait" in told
    (row,) = records.read(output)
    assert set(row["figures"]) == {*(f"{kind}_images_per_second" for kind in train.KINDS), "data_wait"}
    assert all(0 <= share <= 100 for share in row["figures"]["data_wait"]["samples"])
    assert row["details"]["verdict"][0] in told


def test_windows_count_every_call():
    done = []
    found = timing.windows(lambda: done.append(1), 0.01, torch.device("cpu"), lambda: done.append(2))
    assert done.count(2) == len(found) and done.count(1) == sum(count for count, _ in found) and all(seconds > 0 for _, seconds in found)
