"""The trainer's own step against whole training steps of the published code."""

from pathlib import Path

import pytest

from replay import replay

TRAJECTORY = Path(__file__).parent / "golden/trajectory.npz"


@pytest.mark.parametrize(
    "choices",
    [{}, {"crops_pass": "separate"}, {"backend": "reference"}, {"accumulation": 4}],
    ids=["packed", "separate", "reference-loss", "accumulated"],
)
def test_step_repeats_the_published_trajectory(choices):
    errors = replay(str(TRAJECTORY), **choices)
    # The stored weights and memory are float32, so nothing can agree better than about 3e-8.
    assert errors["max_loss_error"] < 1e-10
    assert max(errors["max_student_error"], errors["max_teacher_error"], errors["max_memory_error"]) < 1e-7
