"""``massl-fast bench loader`` runs, records and says what it leaves out. What it measures is no business of a test."""

from pathlib import Path

import pytest
import torch

from massl_fast import records
from massl_fast.benchmarks.loader import read_step_rate
from massl_fast.cli import main
from massl_fast.extras import importable
from massl_fast.processes import host_bytes, processor_seconds
from small_images import write_images


@pytest.fixture
def small(tmp_path) -> list[str]:
    images = write_images(tmp_path / "images", classes=2, per_class=4)
    return ["bench", "loader", "--images", str(images), "--batch", "4", "--global-size", "16", "--local-size", "8", "--num-local", "1"]


def test_a_row_is_printed_and_recorded(small, tmp_path, capsys):
    output = tmp_path / "results" / "loader.jsonl"
    loader = "dali" if importable("nvidia.dali") else "torchvision"
    arguments = ["--loaders", loader, "--workers", "1", "--seconds", "0.2", "--step-rate", "1000", "--output", str(output)]
    assert main([*small, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "8 images" in printed and "24 × 24 pixels" in printed and " %" in printed
    if loader == "dali" and not torch.cuda.is_available():
        assert printed.count("skipped: it needs a GPU") == 2
    row = records.read(output)[0]
    assert row["case"]["loader"] == loader and row["details"]["step_rate"] == 1000
    assert all(row["figures"][name]["median"] > 0 for name in ("images_per_second", "images_per_core_second"))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--batch", "9"], "fewer than a batch of 9"),
        (["--workers", "0"], "--workers take at least 1"),
        (["--step-rate", "nowhere"], "neither a number nor a run's folder"),
        (["--images", "nowhere"], "There is no folder or file nowhere"),
    ],
)
def test_mistakes_are_sentences(small, capsys, arguments, sentence):
    assert main([*small, *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_the_step_rate_is_a_number_or_a_runs(tmp_path: Path):
    (tmp_path / "summary.json").write_text('{"images_per_second": 12.5}')
    assert read_step_rate(str(tmp_path)) == 12.5
    assert read_step_rate("3000") == 3000
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="no positive number"):
        read_step_rate(str(tmp_path))


def test_the_system_is_asked_for_what_it_knows():
    assert host_bytes() > 2**20
    assert processor_seconds() > 0
