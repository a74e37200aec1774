"""Two gloo processes against one: equality, change of world size and strategy, agreed stops, drift, a NaN on one rank."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from kill_ranks import command, kill_once, write_recipe
from two_ranks import configured, play

from massl_fast.models.published import load_backbone
from massl_fast.run.checkpoint import read_checkpoint
from massl_fast.run.outputs import CLOCK_KEYS
from rank_processes import run_two_ranks
from small_encoders import ONE_CPU
from small_images import write_images


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK_KEYS} for line in lines]


def assert_close(found: list[dict], expected: list[dict]) -> None:
    """To the rounding of sums taken in another order."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(expected, found):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=2e-4, abs=2e-5), f"{key} at step {one['step']}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Runs of one process and of two, with what the two reported in outcomes.<rank>.json."""
    folder = tmp_path_factory.mktemp("ranks")
    write_images(folder / "images", classes=2, per_class=14)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert play(configured(folder, "one"), ONE_CPU) == ("finished", "")
    shutil.copytree(folder / "one", folder / "one-then-fsdp2")
    for step in (15, 20):
        shutil.rmtree(folder / f"one-then-fsdp2/checkpoints/step_{step:08d}", ignore_errors=True)
    (folder / "output").write_text(run_two_ranks(Path(__file__).with_name("two_ranks.py"), folder, seconds=270))
    assert play(configured(folder, "fsdp2-then-one"), ONE_CPU) == ("finished", "")
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def outcomes(workplace) -> list[dict]:
    return [json.loads((workplace / f"outcomes.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.timeout(300)
def test_two_ddp_processes_train_as_one_does(workplace, outcomes):
    assert outcomes[0]["ddp"] == outcomes[1]["ddp"] == ["finished", ""]
    one, ddp = rows(workplace / "one"), rows(workplace / "ddp")
    assert len(one) == 20 and one[0]["loss"] != one[-1]["loss"]
    assert_close(ddp, one)
    clock = json.loads((workplace / "ddp/metrics.jsonl").read_text().splitlines()[-1])
    assert clock["step_seconds_fastest"] <= clock["step_seconds_slowest"] and clock["slowest_rank"] in (0, 1)
    assert clock["images_per_second_per_device"] == pytest.approx(clock["images_per_second"] / 2, abs=0.02)
    output = (workplace / "output").read_text()
    assert "rank 1 of 2 on" in output and "8 images = 2 processes × 1 micro-batch × 4" in output and "Strategy  ddp" in output


@pytest.mark.parametrize("folder", ["fsdp2", "fsdp2-then-one", "one-then-fsdp2"])
def test_strategy_and_world_size_may_change_at_a_checkpoint(workplace, outcomes, folder):
    for rank in outcomes:
        assert all(rank[scene] == ["finished", ""] for scene in ("fsdp2", "fsdp2 then ddp", "one then fsdp2"))
    found = rows(workplace / folder)
    assert_close(found, rows(workplace / "one")[: len(found)])
    assert len(found) == (15 if folder == "one-then-fsdp2" else 20)


def test_a_sharded_run_leaves_checkpoints_that_one_cpu_reads(workplace):
    path = workplace / "fsdp2-then-one/checkpoints/step_00000010"
    tensors, state = read_checkpoint(path)
    assert state["strategy"] == "fsdp2" and state["world_size"] == 2
    expected, _ = read_checkpoint(workplace / "one/checkpoints/step_00000010")
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    backbone, _ = load_backbone(path)
    assert torch.equal(backbone.pos_embed, tensors["teacher/backbone.pos_embed"])


def test_a_signal_to_one_rank_stops_both_after_the_same_step_and_nothing_is_lost(workplace, outcomes):
    ends = []
    for rank, sender in zip(outcomes, ("a signal to another rank", "SIGUSR1")):
        kind, sentence = rank["signal"]
        ended = re.match(rf"Ended by {sender} after step (\d)\.", sentence)
        assert kind == "Interrupted 75" and ended, sentence
        ends.append(ended[1])
        assert rank["after the signal"] == ["finished", ""]
    # The signal came before the fourth step; another thread takes it, perhaps after that step's vote.
    assert ends[0] == ends[1] and ends[0] in ("4", "5")
    assert rows(workplace / "signal") == rows(workplace / "ddp")[:6]


def test_a_memory_that_drifts_on_one_rank_ends_the_run(workplace, outcomes):
    for rank in outcomes:
        kind, sentence = rank["drift"]
        assert kind == "Drifted 1" and "they hold different memory" in sentence and "after step 3" in sentence
    assert [p.name for p in (workplace / "drift/checkpoints").glob("step_*")] == ["step_00000000"]


def test_a_value_that_is_not_finite_is_traced_to_its_rank(workplace, outcomes):
    for rank in outcomes:
        kind, sentence = rank["nan"]
        assert kind == "Diverged 1" and sentence.startswith("Step 2 was not finite, beginning with the student's embeddings (rank 1).")


@pytest.mark.timeout(300)
def test_a_killed_rank_is_named_and_torchrun_continues_by_itself(workplace):
    write_recipe(workplace)
    arguments = command(workplace, workplace / "killed", "--parallel.strategy", "ddp", restarts=1)
    code, said = kill_once(arguments, workplace / "killed", step=7, victims=[1])
    assert code == 0, said[-3000:]
    assert "massl-fast train: Rank 1 of 2 does not answer" in said
    assert rows(workplace / "killed") == rows(workplace / "ddp")
