"""What the documents show is what the committed records hold."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def make_docs():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "bench" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path, make_docs):
    """A repository of the kernels' records alone, its documents just made."""
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "docs" / "plots").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "cpu").mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "results" / "cpu" / "kernels.jsonl", tmp_path / "bench" / "results" / "cpu")
    for path, text in make_docs.files(tmp_path).items():
        path.write_text(text)
    assert make_docs.differences(tmp_path, make_docs.files(tmp_path)) == ([], [])
    return tmp_path


def test_documents_are_what_the_records_give(make_docs):
    stale, of_no_record = make_docs.differences(ROOT, make_docs.files(ROOT))
    assert not stale and not of_no_record, "python bench/make_docs.py makes them anew"


def test_every_plot_is_shown_and_there(make_docs):
    wanted = make_docs.files(ROOT)
    page = wanted[ROOT / "docs" / "benchmarks.md"]
    plots = [path for path in wanted if path.suffix == ".svg"]
    assert plots and all(f"](plots/{path.name})" in page for path in plots)
    assert page.count("](plots/") == len(plots)


@pytest.mark.parametrize(
    ("pattern", "before", "after"),
    [
        ("docs/benchmarks.md", "| reference | ", "| reference | 1"),
        ("docs/plots/*-times.svg", " ms · error", "1 ms · error"),
        ("README.md", "All of it:", "1000 times as fast."),
    ],
)
def test_a_figure_changed_by_hand_is_stale(make_docs, copy, pattern, before, after):
    path = next(copy.glob(pattern))
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    assert make_docs.differences(copy, make_docs.files(copy)) == ([path], [])


def test_strokes_alone_are_not_stale(make_docs, copy):
    path = next((copy / "docs" / "plots").glob("*.svg"))
    path.write_text(path.read_text().replace("<path d=", '<path class="other" d='))
    assert make_docs.differences(copy, make_docs.files(copy)) == ([], [])


def test_a_new_record_and_a_plot_of_no_record_are_told(make_docs, copy):
    records = copy / "bench" / "results" / "cpu" / "kernels.jsonl"
    lines = records.read_text().splitlines()
    records.write_text("\n".join([*lines, lines[-1].replace('"median": ', '"median": 1')]))
    left_over = copy / "docs" / "plots" / "gone.svg"
    left_over.write_text("<svg/>")
    stale, of_no_record = make_docs.differences(copy, make_docs.files(copy))
    assert copy / "docs" / "benchmarks.md" in stale
    assert of_no_record == [left_over]


def test_the_command_mends_and_checks(make_docs, copy, monkeypatch, capsys):
    monkeypatch.setattr(make_docs, "ROOT", copy)
    run = lambda *arguments: monkeypatch.setattr("sys.argv", ["make_docs.py", *arguments]) or make_docs.main()  # noqa: E731
    assert run("--check") == 0
    (copy / "docs" / "benchmarks.md").write_text("by hand")
    assert run("--check") == 1
    assert (copy / "docs" / "benchmarks.md").read_text() == "by hand"
    assert run() == 0
    assert run("--check") == 0
    assert "stale: docs/benchmarks.md" in capsys.readouterr().out


def test_mistakes_get_a_sentence(make_docs, copy, monkeypatch, capsys):
    monkeypatch.setattr(make_docs, "ROOT", copy)
    monkeypatch.setattr("sys.argv", ["make_docs.py"])
    (copy / "README.md").write_text("no marks")
    assert make_docs.main() == 2
    assert "README.md holds the marks" in capsys.readouterr().err
    (copy / "bench" / "results" / "cpu" / "kernels.jsonl").unlink()
    assert make_docs.main() == 2
    assert "holds no DEVICE/*.jsonl" in capsys.readouterr().err
