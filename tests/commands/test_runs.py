"""massl-fast runs, and runs compare, from run folders alone."""

import json
import os
import time

import pytest

from massl_fast.cli import main
from massl_fast.commands.runs import in_order
from massl_fast.config import Config, write_config
from massl_fast.run import lock
from massl_fast.run.catalogue import Entry, differing, entry_of, find_runs


def made(folder, steps=20, logged=(10, 20), knn=None, summary=True, rate=100.0, **train):
    folder.mkdir(parents=True)
    config = Config()
    config.data.train, config.train.steps, config.run.folder = "photos/train", steps, str(folder)
    for key, value in train.items():
        setattr(config.train, key, value)
    write_config(config, folder / "config.yaml")
    rows = [{"step": step, "loss": 5.0 - step / 10, "images_per_second": rate} for step in logged]
    if knn is not None:
        rows[-1] |= {"knn_teacher_k20_percent": knn, "linear_teacher_chosen_percent": knn + 5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        (folder / "summary.json").write_text(json.dumps({"steps": logged[-1], "objective": "massl"}))
    return folder


def test_a_table_of_all_runs_below_a_folder_and_what_differs(tmp_path, capsys):
    made(tmp_path / "a", knn=40.0)
    made(tmp_path / "deep" / "b", knn=60.0, global_batch=512)
    (tmp_path / ".hidden").mkdir()
    made(tmp_path / ".hidden" / "c")
    assert main(["runs", str(tmp_path), "--sort", "knn"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "deep/b" in lines[1] and "60.0" in lines[1] and "65.0" in lines[1] and "photos/train" in lines[1] and "complete" in lines[1]
    assert str(tmp_path / "a") in lines[2] and "20/20" in lines[2]
    differences = "\n".join(lines[3:])
    assert "train.global_batch" in differences and "512: 1" in differences and "run.folder" not in differences
    assert "optimizer.learning_rate" not in differences


def test_json_holds_the_settings_too(tmp_path, capsys):
    made(tmp_path / "a")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["step"] == 20 and one["knn_percent"] is None and one["settings"]["train.steps"] == 20


def test_states_complete_running_stopped_and_dead(tmp_path):
    assert entry_of(made(tmp_path / "complete")).state == "complete"
    stopped = entry_of(made(tmp_path / "stopped", logged=(10,), summary=False))
    assert stopped.state == "stopped" and stopped.since
    held = made(tmp_path / "held", logged=(10,), summary=False)
    own = lock._identity("", 0)
    (held / lock.NAME).write_text(json.dumps(own))
    assert entry_of(held).state == "running"
    # The process is gone, on this host.
    (held / lock.NAME).write_text(json.dumps({**own, "process": 2**22 + 1, "process_started": 1}))
    dead = entry_of(held)
    assert dead.state == "dead" and dead.since
    # On another host the last beat decides.
    (held / lock.NAME).write_text(json.dumps({**own, "host": "node7", "namespace": "another boot"}))
    assert entry_of(held).state == "running"
    past = time.time() - lock.SILENT_SECONDS - 60
    os.utime(held / lock.NAME, (past, past))
    assert entry_of(held).state == "dead"


def test_a_continued_run_is_not_complete_because_it_once_was(tmp_path):
    folder = made(tmp_path / "a", steps=40, logged=(10, 20, 30))
    (folder / "summary.json").write_text(json.dumps({"steps": 20}))
    assert entry_of(folder).state == "stopped"


def test_the_linear_probe_after_a_run_is_found_and_a_damaged_file_is_none(tmp_path):
    folder = made(tmp_path / "a")
    (folder / "evaluation").mkdir()
    result = {"protocol": "linear", "headline": "chosen_percent", "results": {"teacher": {"chosen_percent": 71.5}}}
    (folder / "evaluation" / "result.json").write_text(json.dumps({"results": [{"protocol": "knn"}, result]}))
    assert entry_of(folder).linear_percent == 71.5
    (folder / "evaluation" / "result.json").write_text("[1]")
    assert entry_of(folder).linear_percent is None


def test_runs_without_a_value_come_last_in_either_order():
    def entry(name, knn):
        return Entry(name, "massl", "vit", "data", 1, 1, None, knn, None, "complete")

    entries = [entry("a", 30.0), entry("b", None), entry("c", 50.0)]
    assert [e.name for e in in_order(entries, "knn", reverse=False)] == ["c", "a", "b"]
    assert [e.name for e in in_order(entries, "knn", reverse=True)] == ["a", "c", "b"]
    assert [e.name for e in in_order(entries, "name", reverse=False)] == ["a", "b", "c"]


def test_settings_of_other_objectives_differ_by_a_dash():
    assert differing([{"a": 1, "b": 2}, {"a": 1}]) == {"b": [("2", [0]), ("–", [1])]}
    assert differing([]) == {}


def test_no_runs_and_no_folder_are_sentences(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0 and "no runs below" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "gone")]) == 2 and "There is no folder" in capsys.readouterr().err
    assert find_runs([tmp_path]) == []


def test_names_in_brackets_are_printed_as_they_are(tmp_path, capsys):
    made(tmp_path / "lr [red]1e-3[/]")
    assert main(["runs", str(tmp_path)]) == 0
    assert "lr [red]1e-3[/]" in capsys.readouterr().out


def test_compare_draws_every_run_and_names_what_differs(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folders = [made(tmp_path / name / "run", knn=40.0, rate=rate) for name, rate in (("<a>", 100.0), ("b", 200.0))]
    (folders[1] / "config.yaml").write_text((folders[1] / "config.yaml").read_text().replace("steps: 20", "steps: 30"))
    page = tmp_path / "page.html"
    assert main(["runs", "compare", *map(str, folders), "--output", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == str(page)
    for part in ("&lt;a&gt;/run", "b/run", "train.<wbr>", "Images per second", "k-NN accuracy", "45.0"):
        assert part.replace("train.<wbr>", "train.steps") in html, part
    assert "<a>" not in html and "<script" not in html and "http://" not in html.replace("http://www.w3.org", "")


def test_a_curve_of_one_run_alone_says_whose_it_is(tmp_path):
    pytest.importorskip("matplotlib")
    from massl_fast.report.comparison import comparison_page

    folders = [made(tmp_path / "mine"), made(tmp_path / "other")]
    (folders[0] / "metrics.jsonl").write_text('{"step": 10, "gradient_norm": 1.0}\n{"step": 20, "gradient_norm": 2.0}\n')
    figure = comparison_page(folders).partition('aria-label="Gradient norm"')[2].partition("</svg>")[0]
    assert ">mine<" in figure and ">other<" not in figure


@pytest.mark.parametrize(("count", "words"), [(1, "between 2 and"), (16, "between 2 and")])
def test_compare_says_how_many_runs_it_takes(tmp_path, capsys, count, words):
    pytest.importorskip("matplotlib")
    folders = [str(made(tmp_path / str(i))) for i in range(count)]
    assert main(["runs", "compare", *folders]) == 2 and words in capsys.readouterr().err


def test_compare_refuses_a_run_named_twice_and_a_page_that_cannot_be_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    one, two = str(made(tmp_path / "a")), str(made(tmp_path / "b"))
    assert main(["runs", "compare", one, one]) == 2 and "named twice" in capsys.readouterr().err
    assert main(["runs", "compare", one, two, "--output", str(tmp_path / "gone" / "p.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
