"""The four questions at the top of a report, answered from what the run has logged and nothing else."""

import json
from dataclasses import asdict

import pytest

from massl_fast.config import Config, write_config
from massl_fast.objectives import OBJECTIVES, objective_class
from massl_fast.objectives.base import Metric, spread
from massl_fast.report.answers import answers_of
from massl_fast.run.outputs import DECLARATIONS
from massl_fast.run.reading import read_run

SPREAD = spread("embedding_spread", "Spread")


def answers(tmp_path, rows, summary=True, declared=(SPREAD,)):
    write_config(Config(), tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / DECLARATIONS).write_text(json.dumps([asdict(metric) for metric in declared]))
    if summary:
        (tmp_path / "summary.json").write_text(json.dumps({"steps": rows[-1]["step"]}))
    return answers_of(read_run(tmp_path))


def rows(knn=(), untrained=30.0, **changes):
    """Ten logged steps; the last ones are evaluated."""
    logged = [{"step": 10 * i, "loss": 3.0, "images_per_second": 100.0, "data_wait_percent": 2.0} | changes for i in range(1, 11)]
    for row, value in zip(reversed(logged), reversed(knn)):
        row["knn_teacher_k20_percent"] = value
    start = [{"step": 0, "knn_untrained_k20_percent": untrained}] if knn and untrained else []
    return start + logged


@pytest.mark.parametrize(
    ("knn", "untrained", "verdict", "words"),
    [
        ((50.0, 52.0), 30.0, "Yes", "+22.0 points from the untrained network's 30.0 %"),
        ((31.0,), 30.0, "Not yet", "+1.0 points"),
        ((20.0,), 30.0, "No", "-10.0 points"),
        ((60.0, 50.0), 30.0, "Yes", "best was 60.0 % at step 90"),
        ((50.0,), None, "Not compared", "untrained network was not evaluated"),
        ((), None, "Not measured", "from 3.000 to 3.000"),
    ],
)
def test_whether_it_learned_is_said_against_the_untrained_network(tmp_path, knn, untrained, verdict, words):
    learned = answers(tmp_path, rows(knn, untrained))[0]
    assert learned.verdict == verdict and words in learned.reason


@pytest.mark.parametrize(("value", "verdict"), [(0.4, "No"), (0.0004, "Yes"), (None, "Not measured")])
def test_collapse_is_judged_by_what_the_objective_declares(tmp_path, value, verdict):
    found = answers(tmp_path, rows(embedding_spread=value))
    assert found[1].verdict == verdict
    assert (found[3].verdict == "Start again") == (verdict == "Yes")


def test_a_metric_that_is_not_declared_as_a_sign_is_none(tmp_path):
    assert answers(tmp_path, rows(embedding_spread=0.0), declared=(Metric("embedding_spread", "Spread"),))[1].verdict == "Not measured"


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "The network"),
        ({"data_wait_percent": 60.0}, "The loader"),
        ({"step_seconds_slowest": 1.5, "step_seconds_fastest": 1.0}, "The slowest rank"),
        ({"images_per_second": None}, "Not measured"),
    ],
)
def test_what_bounds_the_speed(tmp_path, changes, verdict):
    assert answers(tmp_path, rows(**changes))[2].verdict == verdict


def test_what_to_do_next_follows_from_the_other_answers(tmp_path):
    assert answers(tmp_path, rows((50.0,)), summary=False)[3].verdict == "Continue the run"
    (tmp_path / "b").mkdir()
    assert answers(tmp_path / "b", rows())[3].verdict == "Measure it"
    (tmp_path / "c").mkdir()
    rising = answers(tmp_path / "c", rows((40.0, 45.0, 50.0, 55.0)))[3]
    assert rising.verdict == "Train longer" and "rose by 15.0 points" in rising.reason and "export" in rising.reason
    (tmp_path / "d").mkdir()
    assert answers(tmp_path / "d", rows((50.0, 50.0, 50.0, 50.0)))[3].verdict == "Evaluate and use it"


def test_a_run_without_a_single_row_has_answers_too(tmp_path):
    write_config(Config(), tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text("")
    assert [answer.verdict for answer in answers_of(read_run(tmp_path))] == ["Not measured"] * 3 + ["Continue the run"]


def test_every_shipped_objective_declares_a_sign_of_collapse():
    for name in (name for name, where in OBJECTIVES.items() if isinstance(where, str)):
        assert [metric for metric in objective_class(name).METRICS if metric.collapsed], name
