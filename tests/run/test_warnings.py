"""What a run warns of stays in its folder, from the first line on, and the report's answers say it again."""

import json

from massl_fast.config import Config, write_config
from massl_fast.objectives.base import spread
from massl_fast.report.answers import answers_of
from massl_fast.run.outputs import WARNINGS, Telemetry, warnings_of
from massl_fast.run.reading import read_run

ADVICE = "teacher.momentum 0.999 averages over about 1000 steps. Short runs need a lower momentum."
COLLAPSE = "All images look alike at step 20. End it and start again with larger blocks."


def telemetry(folder, active=True):
    return Telemetry(
        folder,
        total_steps=40,
        metrics=(spread("embedding_spread", "Spread"),),
        tensorboard=False,
        wandb_project="",
        config={},
        active=active,
    )


def start(folder, step, *sentences, active=True):
    """A session that has warned of its settings and is about to train."""
    session = telemetry(folder, active)
    for sentence in sentences:
        session.warn(sentence, advice=True)
    session.start(step)
    return session


def logged(folder, **metrics):
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 20, "loss": 3.0} | metrics) + "\n")


def answers(folder):
    return {answer.question: answer for answer in answers_of(read_run(folder))}


def test_early_advice_is_in_the_folder_before_the_first_step(tmp_path):
    write_config(Config(), tmp_path / "config.yaml")
    start(tmp_path, 0, ADVICE).close()
    assert json.loads((tmp_path / WARNINGS).read_text()) == [{"step": None, "sentence": ADVICE, "advice": True}]
    run = read_run(tmp_path)
    assert run.warnings == run.advice == [ADVICE] and not run.summary


def test_a_run_that_has_not_learned_is_sent_to_its_own_advice(tmp_path):
    write_config(Config(), tmp_path / "config.yaml")
    start(tmp_path, 0, ADVICE).close()
    logged(tmp_path, embedding_spread=0.4)
    assert f"Change the settings that the run warned of: {ADVICE}" in answers(tmp_path)["What to do next?"].reason
    (tmp_path / WARNINGS).unlink()
    assert "warned" not in answers(tmp_path)["What to do next?"].reason


def test_a_collapsed_run_starts_again_with_the_remedy_that_it_named(tmp_path):
    write_config(Config(), tmp_path / "config.yaml")
    session = start(tmp_path, 0)
    session.warn(COLLAPSE, 20, advice=True)
    session.close()
    logged(tmp_path, embedding_spread=0.0001)
    following = answers(tmp_path)["What to do next?"]
    assert following.verdict == "Start again" and COLLAPSE in following.reason


def test_a_continued_run_keeps_what_happened_before_and_drops_what_no_longer_holds(tmp_path):
    session = start(tmp_path, 0, ADVICE)
    session.warn("An image cannot be read.", 10)
    session.warn("An image cannot be read.", 20)
    session.warn(COLLAPSE, 20, advice=True)
    session.close()
    again = start(tmp_path, 15, "Another setting.")
    assert again.warnings == ["An image cannot be read.", "Another setting."] and again.advice == ["Another setting."]
    again.close()
    start(tmp_path, 0).close()
    assert warnings_of(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path):
    start(tmp_path, 0, ADVICE, active=False).close()
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_holds_no_warnings(tmp_path):
    for text in ("", "{", "3", '[3, {"sentence": 3}, {"step": 1}]'):
        (tmp_path / WARNINGS).write_text(text)
        assert warnings_of(tmp_path) == []
    (tmp_path / WARNINGS).write_text('[{"sentence": "One.", "step": "x"}]')
    assert warnings_of(tmp_path) == [{"step": None, "sentence": "One.", "advice": False}]
