"""The arithmetic of docs/scaling.md and bench/notes/scaling.md, against hand-made figures and limits."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import planning
from massl_fast.engine.flops import step_flops
from massl_fast.hardware import GPUS
from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead
from massl_fast.objectives.massl import MasslObjective
from planning import NETWORKS, Cluster, ddp_step, fsdp2_step

H100, SMALL, LARGE = GPUS["H100"], NETWORKS["vit_small"], NETWORKS["vit_large"]


def test_the_figures_of_vit_small_are_those_of_the_network():
    backbone = build_backbone("vit_small_patch16_224", image_size=224, other_sizes=[96])
    encoder = Encoder(backbone, ProjectionHead(backbone.feature_dim))
    assert SMALL.parameters == sum(p.numel() for p in encoder.parameters())
    objective = MasslObjective(65536, 256, block_size=16384, student_temperature=0.1)
    pair = SimpleNamespace(student=encoder, teacher=encoder)
    flops = step_flops(pair, objective, crop_sizes=[224] * 2 + [96] * 10, batch=1)
    assert flops == pytest.approx(SMALL.flops_per_image, rel=0.001)


def test_an_all_reduce_by_hand():
    # 1 GB over 2 hosts of 8: 2·(7/8)/(0.7·450) s within, 2·(1/8)·(1/2)/(0.7·50) s between, 2·(7 + 1) messages.
    expected = 2 * 7 / 8 / 315 + 2 / 8 / 2 / 35 + 16 * 10e-6
    assert planning.all_reduce_seconds(Cluster(H100, 16, 1000), 1e9) == pytest.approx(expected)
    within = planning.all_gather_seconds(Cluster(H100, 8, 1000), 1e9)
    assert within == pytest.approx(7 / 8 / 315 + 7 * 10e-6)


def test_one_gpu_waits_for_nobody():
    step = ddp_step(SMALL, Cluster(H100, 1, 1000, launch_seconds=0.0), 500)
    assert step.gradients_waited == step.memory_rows == step.small_sum == 0
    assert step.seconds == pytest.approx(0.5 + 60 * SMALL.parameters / 3.35e12)


def test_more_gpus_are_faster_and_less_efficient_at_one_batch():
    steps = {gpus: ddp_step(SMALL, Cluster(H100, gpus, 500, launch_seconds=0.0), 1024) for gpus in (8, 16, 32, 64)}
    seconds = [step.seconds for step in steps.values()]
    assert seconds == sorted(seconds, reverse=True)
    shares = [planning.efficiency(step, Cluster(H100, gpus, 500)) for gpus, step in steps.items()]
    assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < shares[0] < 1


def test_gradients_are_hidden_behind_a_long_backward_pass_only():
    slow, fast = (Cluster(H100, 64, rate, launch_seconds=0.0) for rate in (100, 100_000))
    hidden, exposed = ddp_step(LARGE, slow, 4096), ddp_step(LARGE, fast, 4096)
    assert hidden.gradients_sent == exposed.gradients_sent
    assert hidden.gradients_waited < 0.05 * hidden.gradients_sent < exposed.gradients_waited
    sharded = fsdp2_step(LARGE, fast, 4096)
    assert sharded.gradients_waited > sharded.gradients_sent / 12


def test_hours_are_steps_times_seconds():
    step = replace(ddp_step(SMALL, Cluster(H100, 8, 1000), 1024), computing=1.0, gradients_waited=0.0, memory_rows=0.0, small_sum=0.0)
    assert planning.hours(step, 100) == pytest.approx(100 * 1251 / 3600)
    assert planning.matters_from({8: step, 16: replace(step, memory_rows=0.1)}, "memory_rows") == 16
    assert planning.matters_from({8: step}, "memory_rows") is None


def test_what_fits_grows_with_the_device_and_with_shards():
    order = [GPUS[name] for name in ("V100-16", "V100-32", "A100-40", "A100-80", "H200")]
    for count in (lambda gpu: planning.largest_batch(LARGE, gpu), planning.largest_parameters):
        found = [count(gpu) for gpu in order]
        assert found == sorted(found) and found[0] < found[-1]
    assert planning.largest_batch(LARGE, H100, shards=8) > planning.largest_batch(LARGE, H100)
    assert planning.largest_batch(replace(LARGE, parameters=10**11), H100) == 0
    images = planning.largest_batch(SMALL, H100)
    used = planning.CONTEXT_BYTES + planning.state_bytes(SMALL) + SMALL.workspace_bytes + images * SMALL.bytes_per_image
    assert used < H100.bytes < used + 2 * SMALL.bytes_per_image


def test_the_pages_hold_what_the_script_prints():
    root = Path(__file__).parents[2]
    assert planning.summary() in (root / "docs/scaling.md").read_text(encoding="utf-8")
    assert planning.report() in (root / "bench/notes/scaling.md").read_text(encoding="utf-8")


def test_one_table_from_the_command_line(capsys):
    planning.main(["--model", "vit_base", "--gpu", "A100-40", "--images-per-second", "250", "--global-batch", "0", "--strategy", "fsdp2"])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(planning.GPU_COUNTS) + 2 and table[2].startswith("| 8 | 64 |") and table[-1].startswith("Predicted:")
