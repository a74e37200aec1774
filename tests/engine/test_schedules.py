import itertools
import math

import pytest

from massl_fast.config import load_config
from massl_fast.engine.build import build_objective
from massl_fast.engine.schedules import Schedules
from massl_fast.length import Length, cosine, linear
from massl_fast.models.precision import Precision


def schedules(*overrides: str, total: int = 100, per_epoch: int = 10) -> Schedules:
    config = load_config("vit_small_in1k", ["--objective.memory_size", "1024", "--objective.block_size", "64", *overrides])
    length = Length(total, per_epoch, config.train.global_batch, 1, config.train.global_batch)
    return Schedules(config, length, build_objective(config, Precision("fp32", "test"), rank=0))


def test_cosine_and_linear_touch_their_ends():
    assert cosine(0, 3.0, 1.0, 10) == 3.0
    assert cosine(10, 3.0, 1.0, 10) == pytest.approx(1.0)
    assert cosine(5, 3.0, 1.0, 10) == pytest.approx(2.0)
    assert [linear(step, 0.0, 1.0, 4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_learning_rate_warms_up_to_the_scaled_peak_and_ends_near_the_minimum():
    run = schedules("--optimizer.warmup_epochs", "2", "--train.global_batch", "512")
    rates = [run.at(step).learning_rate for step in range(100)]
    assert rates[0] == 0
    assert rates[19] == pytest.approx(5e-4 * 2)
    assert max(rates) == pytest.approx(5e-4 * 2)
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))
    assert 1e-6 < rates[-1] < 2e-6


def test_unscaled_learning_rate():
    assert schedules("--optimizer.learning_rate_scaling", "none").peak_learning_rate == 5e-4


def test_weight_decay_momentum_and_temperature():
    run = schedules("--objective.teacher_temperature_warmup_epochs", "5")
    first, middle, last = run.at(0), run.at(50), run.at(99)
    assert (first.weight_decay, first.teacher_momentum, first.own["teacher_temperature"]) == (0.04, 0.992, 0.04)
    assert middle.weight_decay == pytest.approx(0.22)
    assert middle.teacher_momentum == pytest.approx(0.996)
    assert middle.own == last.own == {"teacher_temperature": 0.07}
    assert run.at(25).own["teacher_temperature"] == pytest.approx(0.055)
    assert math.isclose(last.teacher_momentum, 1.0, abs_tol=1e-5)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_epochs 20"):
        schedules("--optimizer.warmup_epochs", "20")
