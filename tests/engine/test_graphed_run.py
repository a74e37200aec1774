"""A run of recorded steps is a run: logging, evaluation, checkpoints and resuming among replays change nothing.

On a CPU, with a tape of operators for the graph; ``test_graphed_step.py`` has the step alone and, where there is a GPU, the graph itself.
"""

import json

import pytest
import torch

from massl_fast.engine.graphed_step import WARM_UP, GraphedStep
from massl_fast.run.checkpoint import CheckpointFolder, read_checkpoint
from massl_fast.run.outputs import CLOCK_KEYS
from operator_tape import OperatorTape
from small_runs import train

STEPS = 12
SETTINGS = [
    *("--train.steps", str(STEPS), "--train.micro_batch", "4", "--optimizer.name", "adamw_with_teacher", "--model.drop_path", "0.2"),
    *("--objective.teacher_temperature_start", "0.04", "--objective.teacher_temperature_warmup_epochs", "3"),
    *("--evaluation.every_epochs", "1", "--logging.every_steps", "1", "--checkpoint.every_steps", "5"),
]


@pytest.fixture
def tapes(monkeypatch):
    """The tapes that stand in for CUDA graphs, one a run."""
    made = []

    def tape():
        made.append(OperatorTape())
        return made[-1]

    def on_tape(train_step):
        return GraphedStep(train_step, tape)

    monkeypatch.setattr("massl_fast.engine.trainer.GraphedStep", on_tape)
    return made


def rows(folder):
    found = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in found]


def demand_equal_runs(folder, expected):
    """Rows and last checkpoints, but for roundings: a temperature that is a tensor rounds otherwise than a number."""
    assert len(rows(expected)) == STEPS + 1
    for found, row in zip(rows(folder), rows(expected), strict=True):
        assert found == pytest.approx(row, rel=1e-4, abs=1e-6), f"step {row['step']}"
    ours, theirs = (read_checkpoint(CheckpointFolder(path / "run/checkpoints").last())[0] for path in (folder, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_run_of_recorded_steps_is_the_run(images, tmp_path, tapes):
    plain, graphed, resumed = tmp_path / "plain", tmp_path / "graphed", tmp_path / "resumed"
    recorded = [*SETTINGS, "--train.cuda_graph", "true"]
    assert train(plain, images, *SETTINGS) == 0 and not tapes
    assert train(graphed, images, *recorded) == 0
    demand_equal_runs(graphed, plain)
    assert train(resumed, images, *recorded, "--train.stop_at_step", "7") == 0  # in replays: the next run warms up and records anew
    assert train(resumed, images, *recorded) == 0
    assert WARM_UP < STEPS - 7 and [bool(tape.calls) for tape in tapes] == [True] * 3, "nothing was recorded"
    demand_equal_runs(resumed, plain)
