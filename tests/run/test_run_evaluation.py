"""k-NN of a run: what cannot be read is told, once; and a run that came to its end without a summary gets one."""

import json

import pytest

from massl_fast.config import load_config
from massl_fast.distributed.world import join_world
from massl_fast.length import length_of
from massl_fast.models.precision import choose_precision
from massl_fast.run.evaluation import RunEvaluation
from massl_fast.run.outputs import CLOCK_KEYS
from small_images import write_images
from small_runs import TINY, train


def run_evaluation(images, *settings):
    data = ["--evaluation.train", str(images), "--evaluation.test", str(images)]
    config = load_config("demo", [*TINY[2:], *data, *settings])
    world = join_world("cpu", 60)
    return RunEvaluation(config, world, choose_precision("fp32", world.device), length_of(config, 2, 1), num_workers=0)


def test_unreadable_images_are_told_once(images, tmp_path, capsys):
    held_out = write_images(tmp_path / "held-out", classes=2, per_class=8)
    broken = ["class_0/003.jpg", *(f"class_1/00{number}.jpg" for number in range(6))]
    for name in broken:
        (held_out / name).write_bytes(b"no image")
    assert train(tmp_path, images, "--evaluation.test", str(held_out)) == 0
    sentence = (
        f"k-NN leaves out 7 images of {images} and {held_out} that cannot be read: {', '.join(broken[:5])} and 2 more. "
        "massl-fast data check says what is wrong with them."
    )
    assert capsys.readouterr().out.count(f"Warning: {sentence}") == 1  # evaluated before the first step and after the last
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["warnings"].count(sentence) == 1 and sentence not in summary["advice"]
    assert {"step": 0, "sentence": sentence, "advice": False} in json.loads((tmp_path / "run/warnings.json").read_text())
    assert sentence in (tmp_path / "run/report.html").read_text()


def test_images_that_turn_unreadable_later_are_told_by_themselves(images):
    evaluation = run_evaluation(images)
    evaluation.take_note_of(["a.jpg"])
    assert f"1 image of {images} that cannot be read: a.jpg." in evaluation.unreadable()
    assert evaluation.unreadable() is None
    evaluation.take_note_of(["a.jpg", "b.jpg"])
    assert f"1 image of {images} that cannot be read: b.jpg." in evaluation.unreadable()


def test_a_run_killed_before_its_summary_gets_it_when_started_again(images, tmp_path, capsys):
    assert train(tmp_path, images) == 0
    path = tmp_path / "run/summary.json"
    before = json.loads(path.read_text())
    path.unlink()
    assert train(tmp_path, images) == 0
    after = json.loads(path.read_text())
    assert before["loss"] is not None
    for key in ("loss", "knn_percent", "knn_untrained_percent", "images_per_second", "steps"):
        assert after[key] == before[key], key
    assert f"Done      loss {before['loss']:.4f}" in capsys.readouterr().out


def test_the_best_checkpoint_is_by_the_named_metric(images):
    evaluation = run_evaluation(images)
    assert evaluation.best_metric == "knn_teacher_k3_percent"
    evaluation = run_evaluation(images, "--evaluation.best_metric", "knn_student_k3_percent")
    found = []
    for student, teacher in ((50.0, 10.0), (40.0, 90.0), (50.0, 90.0), (60.0, 0.0)):
        evaluation.figures = {"knn_student_k3_percent": student, "knn_teacher_k3_percent": teacher}
        found.append(evaluation.is_best())
    assert found == [True, False, False, True]
    again = run_evaluation(images, "--evaluation.best_metric", "knn_student_k3_percent")
    again.restore(json.loads(json.dumps(evaluation.state())))
    assert again.best == 60.0 and again.figures == evaluation.figures
    other = run_evaluation(images)
    other.restore(evaluation.state())
    assert other.best is None  # the best student is no measure of the teacher


def test_what_is_evaluated_moves_no_number_of_the_training(images, tmp_path):
    rows = []
    more = ["--evaluation.protocols", "[knn, linear]", "--evaluation.rank_measures", "true", "--evaluation.best_metric", "lidar"]
    more += ["--evaluation.settings.linear", "{epochs: 2, views: 0, rates: [0.1, 1], validation: 0.2}"]
    for name, settings in (("plain", []), ("more", more)):
        (tmp_path / name).mkdir()
        always = ["--evaluation.every_epochs", "0.5", "--logging.every_steps", "1", "--train.steps", "3"]
        assert train(tmp_path / name, images, *always, *settings) == 0
        rows.append([json.loads(line) for line in (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()])
    plain, evaluated = rows
    assert len(plain) == len(evaluated) == 4
    for before, after in zip(plain, evaluated):
        assert {key: after[key] for key in before if key not in CLOCK_KEYS} == {k: v for k, v in before.items() if k not in CLOCK_KEYS}
    assert "linear_untrained_chosen_percent" in evaluated[0] and "rankme" not in evaluated[0]
    assert 1 <= evaluated[1]["rankme"] <= 16 and 1 <= evaluated[1]["lidar"] <= 8 and "linear_student_best_percent" in evaluated[-1]
    state = json.loads(next((tmp_path / "more/run/checkpoints").glob("step_*3/state.json")).read_text())
    assert state["best_metric"] == "lidar" and state["best_value"] == max(row["lidar"] for row in evaluated[1:])
    declared = (tmp_path / "more/run/metrics.schema.json").read_text()
    assert "linear_teacher_best_percent" in declared and "rankme" in declared


def test_the_state_of_older_checkpoints_is_read(images):
    evaluation = run_evaluation(images)
    evaluation.restore({"best_knn_percent": 71.5, "knn_percent": {"knn_teacher_k3_percent": 70.0}})
    assert evaluation.best == 71.5 and evaluation.headline("teacher") == 70.0
    evaluation.restore({"best_knn_percent": -1.0, "knn_percent": {}})
    assert evaluation.best is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--evaluation.best_metric", "loss"], "evaluation.best_metric is 'loss', which no evaluation of this run finds"),
        (["--evaluation.protocols", "[kn]"], "The evaluation is 'kn'. Did you mean knn?"),
        (["--evaluation.settings.linear.epochs", "3"], "names linear, which is not among evaluation.protocols"),
        (["--evaluation.settings.knn.kk", "3"], "There is no setting evaluation.settings.knn.kk"),
        (["--evaluation.settings.knn.temperature", "-3"], "evaluation.settings.knn.temperature is -3: input should be greater than 0"),
    ],
)
def test_mistakes_are_sentences(images, settings, message):
    with pytest.raises(ValueError, match=message):
        run_evaluation(images, *settings)
