"""Parts of bench everything are kept apart: what one loses, the others keep."""

import argparse
import importlib
import sys
import time

import pytest

import bench_step
from massl_fast.benchmarks import everything, records
from massl_fast.benchmarks.everything import Outcome, Part, headlines, launcher, line_of, run_part, run_parts
from massl_fast.cli import COMMANDS, main
from massl_fast.commands import bench_everything
from massl_fast.config import load_config


@pytest.fixture
def part(tmp_path):
    """Makes a part that runs some code."""

    def make(name: str, code: str, seconds: float = 30.0, timing: bool = True) -> Part:
        script = tmp_path / f"{name.replace(' ', '_')}.py"
        script.write_text(code)
        return Part(name, (), seconds, timing, program=(str(script),))

    return make


def test_a_part_that_fails_or_hangs_loses_no_other(tmp_path, part):
    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    parts = [part("breaks", "import sys; sys.exit('it broke')"), part("hangs", hanging, seconds=3.0), part("works", "print('fine')")]
    start = time.monotonic()
    outcomes = run_parts(parts, tmp_path, time.monotonic() + 600, keep_going=False, on_gpu=False)
    assert [outcome.status for outcome in outcomes] == ["failed", "too long", "done"]
    assert outcomes[0].words == "it broke"
    assert time.monotonic() - start < 120
    assert "fine" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(("keep_going", "statuses"), [(False, ["failed", "left out"]), (True, ["failed", "done"])])
def test_nothing_is_timed_where_kernels_are_wrong(tmp_path, part, keep_going, statuses):
    parts = [part("correctness", "raise SystemExit(1)", timing=False), part("kernels", "print('fine')")]
    outcomes = run_parts(parts, tmp_path, time.monotonic() + 600, keep_going=keep_going, on_gpu=False)
    assert [outcome.status for outcome in outcomes] == statuses


def test_what_there_is_no_time_for_is_named(tmp_path, part):
    (outcome,) = run_parts([part("late", "print('fine')")], tmp_path, time.monotonic() + 1, keep_going=False, on_gpu=False)
    assert outcome.status == "left out" and "--minutes" in outcome.words


def test_the_gpu_is_hidden_from_parts_of_a_cpu(tmp_path, part):
    outcome = run_part(part("looks", "import os, sys; sys.exit(os.environ['CUDA_VISIBLE_DEVICES'] or 0)"), tmp_path, 30, on_gpu=False)
    assert outcome.status == "done"


@pytest.mark.parametrize("on_gpu", [True, False])
def test_every_command_of_both_lists_parses(tmp_path, on_gpu):
    """Each part's arguments are those of its command, settings included; bench_step.py's are those of its own parser."""
    listed = everything.parts(on_gpu, tmp_path, "images")
    assert not listed[0].timing and all(other.timing for other in listed[1:])
    assert len({other.name for other in listed}) == len(listed)
    for each in listed:
        if each.program:
            bench_step.parser().parse_args(each.arguments)
            continue
        module = importlib.import_module(COMMANDS[" ".join(each.arguments[:2])][0])
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        args, settings = parser.parse_known_args(each.arguments[2:])
        if getattr(module, "TAKES_SETTINGS", False):
            load_config(args.recipe, settings)
        else:
            assert not settings, each.name


def test_records_of_the_published_comparison_take_the_common_form():
    slow, side = ({"step_seconds": times, "times_the_first_side": 1.5, "peak_mib": 10.0} for times in ([0.6], [0.3, 0.32]))
    sides = {"published": slow, "ours": side}
    case = {"architecture": "vit", "batch": 64, "memory_size": 65536}
    found = {"case": case | {"model_args": {}}, "precision": "bf16", "sides": sides, "rounds": 2}
    row = bench_step.as_record(found)
    assert row["case"] == case | {"precision": "bf16"}
    (line,) = headlines([row])
    assert line.startswith("published step: architecture vit, batch 64") and "ours: step seconds 0.31 s" in line
    largest = bench_step.as_record({"case": found["case"], "precision": "bf16", "largest_batch": {"ours": 96}})
    assert largest["figures"]["ours: largest batch"]["median"] == 96


def test_headlines_of_every_kind_can_be_told():
    from test_page import everything as every_record

    lines = headlines(every_record())
    assert any(line.startswith("kernels: operation loss") and "time 9 ms" in line for line in lines)
    assert any("images per second 40 images/s" in line for line in lines)


def test_a_line_names_a_part_and_what_came_of_it(part):
    assert "left out" in line_of(Outcome(part("b", ""), "left out", words="it needs a GPU"))


def test_the_program_starts_itself_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/massl-fast"])
    assert launcher() == ["/somewhere/massl-fast"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/massl_fast/__main__.py"])
    assert launcher() == ["-m", "massl_fast"]


def test_the_command_runs_chosen_parts_and_leaves_a_page(tmp_path, part, capsys, monkeypatch):
    def two_parts(on_gpu, folder, images):
        row = records.record("trace", {"architecture": "x", "batch": 1}, {"waits_per_step": records.figure(0, "1", exact=True)})
        records.append(folder / "records.jsonl", [row])
        return [part("correctness", "print()", timing=False), part("kernels", "print()"), part("loaders", "print()")]

    monkeypatch.setattr(everything, "parts", two_parts)
    monkeypatch.setattr(bench_everything, "page_of", lambda rows: f"{len(rows)} records")
    assert main(["bench", "everything", "--device", "cpu", "--to", str(tmp_path), "--parts", "kernels"]) == 0
    told = capsys.readouterr().out
    assert "correctness" in told and "kernels" in told and "loaders" not in told
    assert "triton kernels" in told and "it needs a GPU" in told
    assert (tmp_path / "benchmarks.html").read_text() == "1 records"


def test_a_folder_that_cannot_be_written_gets_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", "everything", "--device", "cpu", "--to", str(tmp_path / "file" / "x")]) == 2
    assert "Nothing can be written" in capsys.readouterr().err
