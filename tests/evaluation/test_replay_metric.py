"""The evaluation's metrics agree with what the official code gave (see replay_metric.py)."""

import os
from pathlib import Path

import pytest

from replay_metric import CASES, replay_metric

GOLDEN = Path(__file__).parents[3] / "shared/golden/evaluation"
LIMITS = {"label_propagation": 5e-6}


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden cases of the evaluation protocols are not beside this repository")
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_golden_case_is_reproduced(name):
    pytest.importorskip("sklearn")
    result = replay_metric(GOLDEN / f"{name}.npz")
    assert result["max_error"] <= LIMITS.get(name, 1e-6), result["errors"]


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden cases of the evaluation protocols are not beside this repository")
def test_every_golden_case_has_a_replay():
    assert {Path(name).stem for name in os.listdir(GOLDEN) if name.endswith(".npz")} == set(CASES)
