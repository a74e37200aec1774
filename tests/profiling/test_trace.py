"""Named parts, gaps and planted waits of profile trace; nothing here depends on how long anything takes."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from massl_fast import records
from massl_fast.benchmarks.timing import PhaseClock
from massl_fast.cli import main
from massl_fast.commands import profile_trace
from massl_fast.config import load_config
from massl_fast.engine import phases
from massl_fast.models.precision import choose_precision
from massl_fast.profiling import trace
from massl_fast.profiling.synthetic import END, SyntheticRun, synthetic_run
from massl_fast.profiling.waits import find_waits
from small_encoders import ONE_CPU

TINY = ["--model.architecture", "vit_tiny_patch16_224", "--model.model_args", "{patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}"]
TINY += ["--objective.memory_size", "64", "--objective.block_size", "32", "--train.global_batch", "2", "--model.head_hidden_dim", "16"]


def tiny_run(*more: str, accumulation: int = 1) -> SyntheticRun:
    config = load_config("demo", [*TINY, *more])
    return synthetic_run(config, ONE_CPU, choose_precision("fp32", ONE_CPU.device), device_batch=2, accumulation=accumulation)


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_every_part_is_marked_in_its_place(optimizer):
    seen = []
    run = tiny_run("--optimizer.name", optimizer, accumulation=2)
    with run.observed(seen.append):
        run.step()
    named = [name for name in seen if name not in (phases.REST, END)]
    forward = [phases.TEACHER, phases.STUDENT, phases.LOSS, phases.BACKWARD]
    assert named == [*forward, *forward, phases.CLIP, phases.OPTIMIZER, phases.AVERAGE, phases.COMMIT]
    assert seen[0] == phases.REST and seen[-1] == END
    seen.clear()
    run.step()
    assert not seen, "the marks were left on"


def test_marks_change_no_number():
    plain, watched = tiny_run(), tiny_run()
    for _ in range(2):
        torch.manual_seed(0)
        plain.step()
        torch.manual_seed(0)
        with watched.observed(PhaseClock(ONE_CPU.device)):
            watched.step()
    for ours, theirs in zip(plain.train_step.pair.parameters(), watched.train_step.pair.parameters()):
        assert torch.equal(ours, theirs)
    assert torch.equal(plain.train_step.objective.memory, watched.train_step.objective.memory)


def test_the_clock_adds_up_the_parts_of_each_step():
    clock = PhaseClock(ONE_CPU.device)
    clock.marks = [("rest", 0.0), ("loss", 1.0), ("rest", 3.0), ("loss", 4.0), ("", 9.0), ("rest", 20.0), ("", 21.0)]
    assert clock.read() == [{"rest": 2.0, "loss": 7.0}, {"rest": 1.0}]
    assert clock.read() == []


def test_gaps_are_when_no_kernel_runs():
    kernels = [(0.0, 1.0, "a"), (0.5, 2.0, "b"), (0.6, 0.7, "inside b"), (5.0, 6.0, "c"), (6.000001, 7.0, "d"), (9.0, 10.0, "e")]
    host = [(0.0, 4.0, "loss"), (2.5, 4.5, "aten::item"), (4.0, 8.5, "backward"), (8.5, 9.5, "optimizer"), (2.0, 2.1, "aten::mul")]
    gaps = trace.find_gaps(kernels, sorted(host))
    assert gaps.idle_share == pytest.approx(5.0 / 10.0)
    assert [(gap.seconds, gap.part, gap.meanwhile) for gap in gaps.largest] == [(3.0, "backward", "aten::item"), (2.0, "optimizer", "")]
    assert trace.find_gaps([], []).idle_share == 1.0


def test_a_step_waits_for_nothing_and_a_planted_wait_is_found():
    run = tiny_run()
    assert find_waits(run) == []
    inner = run.train_step.objective.commit_

    def planted(carried, finite, at):
        if finite.sum().item() > 1e9:  # this line waits
            raise AssertionError
        return inner(carried, finite, at)

    run.train_step.objective.commit_ = planted
    (wait,) = find_waits(run)
    assert (wait.operator, wait.count) == ("_local_scalar_dense", 1)
    file, _, line = wait.line.rpartition(":")
    assert "# this line waits" in Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1]


PLANTED = {
    "cpu": lambda teacher: teacher.cpu(),
    "tolist": lambda teacher: teacher[0, 0].tolist(),
    "numpy": lambda teacher: teacher.numpy(),
    "nonzero": lambda teacher: teacher.nonzero(),
    "Event.synchronize": lambda teacher: torch.cuda.Event.synchronize(teacher),
}


@pytest.mark.parametrize("operator", PLANTED)
def test_other_ways_to_wait_are_found_too(operator, monkeypatch):
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: None)  # no device here to wait for
    run = tiny_run()
    inner = run.train_step.objective.commit_

    def planted(carried, finite, at):
        PLANTED[operator](next(iter(carried[0].values())))
        return inner(carried, finite, at)

    run.train_step.objective.commit_ = planted
    (wait,) = find_waits(run)
    assert (wait.operator, wait.count) == (operator, 1)
    line = wait.line.rpartition(":")[2]
    assert f'"{operator}": lambda teacher' in Path(__file__).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_a_planted_wait_is_told_by_the_command(monkeypatch, tmp_path, capsys):
    build = profile_trace.synthetic_run

    def with_a_wait(*arguments, **settings):
        run = build(*arguments, **settings)
        run.train_step.objective.register_forward_hook(lambda module, arguments, outcome: outcome.loss.item() and None)
        return run

    monkeypatch.setattr(profile_trace, "synthetic_run", with_a_wait)
    assert main(["profile", "trace", "--steps", "1", "--to", str(tmp_path), *TINY]) == 0
    told = capsys.readouterr().out
    assert "1 × per step  _local_scalar_dense" in told and f"{Path(__file__).name}:" in told


def test_the_command_writes_a_trace_with_the_parts(tmp_path, capsys):
    assert main(["profile", "trace", "--steps", "2", "--to", str(tmp_path / "trace"), *TINY]) == 0
    told = capsys.readouterr().out
    assert "Parts of a step" in told and "Nothing in a step makes the host wait" in told
    events = json.loads(gzip.decompress((tmp_path / "trace" / "trace.json.gz").read_bytes()))["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert set(phases.PHASES) <= set(ranges)
    assert ranges.count(phases.STUDENT) == 2
    (row,) = records.read(tmp_path / "trace" / "trace.jsonl")
    assert row["details"]["operators"][0]["seconds"] > 0
    assert row["figures"]["waits_per_step"]["median"] == 0
    assert sum(operator["share_percent"] for operator in row["details"]["operators"]) <= 100.001


def test_a_folder_that_cannot_be_written_gets_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["profile", "trace", "--to", str(tmp_path / "file" / "trace"), *TINY]) == 2
    assert "Nothing can be written to the folder" in capsys.readouterr().err
