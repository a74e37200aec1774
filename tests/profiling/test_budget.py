"""Operations and bytes of a step, counted operator by operator."""

from pathlib import Path

import pytest
import torch

from massl_fast import records
from massl_fast.cli import main
from massl_fast.config import load_config
from massl_fast.data.loaders import views_of
from massl_fast.engine import phases
from massl_fast.engine.build import build_objective, build_pair
from massl_fast.engine.flops import step_flops
from massl_fast.hardware import GPUS
from massl_fast.profiling import budget
from massl_fast.profiling.estimate import estimate_step
from small_encoders import FP32

SMALL = ["--crops.global_size", "64", "--crops.local_size", "32", "--crops.num_local", "2", "--train.global_batch", "6"]
SMALL += ["--model.architecture", "vit_tiny_patch16_224", "--model.model_args", "{depth: 2}", "--objective.memory_size", "2048"]
SMALL += ["--objective.block_size", "512"]


def count(function) -> budget.Calls:
    with budget.OperatorCount() as counted:
        function()
    return [call for calls in counted.budget.values() for call in calls]


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda a, b: a + b, 3 * 64),
        (lambda a, b: a.mul_(b), 3 * 64),
        (lambda a, b: a.copy_(b), 2 * 64),
        (lambda a, b: a.zero_(), 64),
        (lambda a, b: a.view(16).detach(), 0),
        (lambda a, b: a + b[:1, :1].expand(4, 4), 2 * 64 + 4),
        (lambda a, b: a.sum(), 64 + 4),
        (lambda a, b: torch._foreach_add_([a, b], 1.0), 4 * 64),
        (lambda a, b: a.to(torch.bfloat16), 64 + 32),
    ],
)
def test_bytes_are_those_read_and_written(function, expected):
    a, b = torch.ones(4, 4), torch.ones(4, 4)
    assert sum(moved for _, moved in count(lambda: function(a, b))) == expected


def test_operations_of_a_product():
    calls = count(lambda: torch.ones(3, 5) @ torch.ones(5, 7))
    assert sum(flops for flops, _ in calls) == 2 * 3 * 5 * 7


def test_the_floor_is_the_slower_of_computing_and_moving():
    gpu = GPUS["H200"]
    assert budget.floor([(gpu.peak_flops, gpu.bandwidth / 4), (0.0, gpu.bandwidth / 2)], gpu) == pytest.approx(1.5)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_with_teacher"])
def test_operations_are_those_of_the_formula(accumulation, optimizer):
    """But for the backward pass of fused attention, which computes its logits again, and resampled position embeddings."""
    config = load_config("vit_small_in1k", [*SMALL, "--optimizer.name", optimizer])
    found = budget.count_step(config, 6, accumulation)
    flops = sum(flops for calls in found.values() for flops, _ in calls)
    again = sum(flops for flops, _ in found[phases.BACKWARD, "attention"]) / 5
    objective = build_objective(config, FP32, rank=0)
    pair, _ = build_pair(config, objective)
    sizes = [view.size for view in views_of(config.crops)]
    expected = step_flops(pair, objective, crop_sizes=sizes, batch=6 * accumulation)
    assert flops - again == pytest.approx(expected, rel=2e-3)
    assert len(found[phases.LOSS, "loss"]) == accumulation


@pytest.mark.parametrize("objective", ["carp", "dino", "ibot", "mmc", "moco_v3"])
def test_the_step_of_every_objective_is_counted_and_estimated_from_shapes(objective):
    more = ["--crops.num_local", "0"] if objective in ("mmc", "moco_v3") else []
    tiny = ["--model.model_args", "{patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}", "--train.global_batch", "4", *more]
    config = load_config("cifar10", ["--objective.name", objective, "--model.architecture", "vit_tiny_patch16_224", *tiny])
    found = budget.count_step(config, 4, 1)
    for name in (phases.STUDENT, phases.BACKWARD):
        assert sum(flops for (phase, _), calls in found.items() if phase == name for flops, _ in calls) > 0
    assert estimate_step(config, device_type="cpu", device_batch=4).bytes > 0


def test_the_command(capsys, tmp_path):
    assert main(["profile", "budget", *SMALL, "--gpu", "A100-80"]) == 0
    told = capsys.readouterr().out
    assert "| **whole step** |" in told and "312 TFLOP/s" in told and "GFLOP per image" in told and "measured" not in told

    case = {"recipe": "vit_small_in1k", "architecture": "vit_tiny_patch16_224", "batch": 6, "accumulation": 1}
    figures = {f"part: {name}": records.figure([0.25], "s", "lower") for name in phases.PHASES}
    path = tmp_path / "records.jsonl"
    records.append(path, [records.record("step", case, figures)])
    assert main(["profile", "budget", *SMALL, "--record", str(path)]) == 0
    told = capsys.readouterr().out
    assert "measured ms" in told and "| 250.00 |" in told and "| 2250.00 |" in told

    assert main(["profile", "budget", *SMALL, "--record", str(path), "--train.global_batch", "8"]) == 2
    assert "holds no `bench step` of" in capsys.readouterr().err
    assert main(["profile", "budget", "--record", str(tmp_path / "none.jsonl")]) == 2


@pytest.mark.skipif(
    not torch.__version__.startswith("2.15"), reason="the documents' table was counted with torch 2.15, others call other operators"
)
def test_the_documents_table_is_the_commands(capsys):
    assert main(["profile", "budget", "--train.global_batch", "64", "--objective.memory_size", "65536"]) == 0
    documents = (Path(__file__).parents[2] / "bench/notes/performance.md").read_text(encoding="utf-8")
    lines = capsys.readouterr().out.split("\n\n")
    assert lines[0] in documents and lines[1] in documents


@pytest.mark.parametrize("command", [["profile", "budget", "--gpu", "V100-32"], ["bench", "step", "--recipe", "vit_small_in1k"]])
def test_tokens_in_bf16_are_not_counted_or_timed_in_a_step_of_another_precision(command, capsys):
    device = ["--train.device", "cpu"] if command[0] == "bench" else []
    assert main([*command, *SMALL, *device, "--model.residual", "bf16"]) == 2
    assert "model.residual is bf16, but the step's precision is" in capsys.readouterr().err
