"""k-NN of a run: what cannot be read is told, once; and a run that came to its end without a summary gets one."""

import json

from test_cli import images, train  # noqa: F401

from massl_fast.run.evaluation import RunEvaluation
from small_images import write_images


def test_unreadable_images_are_told_once(images, tmp_path, capsys):  # noqa: F811
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
    assert summary["warnings"].count(sentence) == 1
    assert sentence in (tmp_path / "run/report.html").read_text()


def test_images_that_turn_unreadable_later_are_told_by_themselves():
    class Evaluator:
        unreadable = ("a.jpg",)

    class Images:
        path = "photos"

    evaluation = RunEvaluation.__new__(RunEvaluation)
    evaluation.evaluator, evaluation.sources, evaluation.told_unreadable = Evaluator, (Images, Images), set()
    assert "1 image of photos that cannot be read: a.jpg." in evaluation.unreadable()
    assert evaluation.unreadable() is None
    Evaluator.unreadable = ("a.jpg", "b.jpg")
    assert "1 image of photos that cannot be read: b.jpg." in evaluation.unreadable()


def test_a_run_killed_before_its_summary_gets_it_when_started_again(images, tmp_path, capsys):  # noqa: F811
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
