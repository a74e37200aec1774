"""Parts of bench everything are kept apart: what one loses, the others keep. The rehearsal runs them where packages are missing."""

import argparse
import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bench_step
from massl_fast import records
from massl_fast.benchmarks import everything
from massl_fast.benchmarks.everything import Outcome, Part, arguments, groups, headlines, launcher, line_of, obstacle, run_parts, words
from massl_fast.cli import COMMANDS, main
from massl_fast.commands import bench_everything
from massl_fast.config import load_config

ROOT = Path(__file__).parents[2]
# Stands in for a machine that has PyTorch, Triton, timm and pytest, but neither this package nor what it installs beside them.
BARE = """
import sys

MISSING = {"pydantic", "pydantic_core", "rich", "psutil", "scipy", "hypothesis", "nvidia", "matplotlib", "sklearn", "pyarrow"}

class Path:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, path, target)

usual = [finder for finder in sys.meta_path if getattr(finder, "__module__", "").startswith("_frozen_importlib")]
sys.meta_path[:] = map(Path, usual)
sys.path[:] = [entry for entry in sys.path if entry != ROOT]
"""


@pytest.fixture
def part(tmp_path, monkeypatch):
    """Makes a part that runs some code."""

    def make(name: str, code: str, seconds: float = 30.0, **more) -> Part:
        script = tmp_path / f"{name.replace(' ', '_')}.py"
        script.write_text(code)
        program = f"{name.replace(' ', '_')}"
        monkeypatch.setitem(everything.PROGRAMS, program, (str(script),))
        return Part(name, seconds, program, program, **more)

    return make


def test_a_part_that_fails_or_hangs_loses_no_other(tmp_path, part):
    hanging = "import subprocess, sys; print('half'); subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    parts = [part("breaks", "import sys; sys.exit('it broke')"), part("hangs", hanging, seconds=1.0), part("works", "print('fine')")]
    start = time.monotonic()
    outcomes = run_parts(parts, tmp_path, time.monotonic() + 600, on_gpu=False)
    assert [outcome.status for outcome in outcomes] == ["failed", "failed", "ran"]
    assert outcomes[0].words == "it broke" and "its limit of 10 s" in outcomes[1].words
    assert time.monotonic() - start < 120
    logs = sorted((tmp_path / "logs").iterdir())
    assert [log.name for log in logs] == ["01 breaks.txt", "02 hangs.txt", "03 works.txt"] and "fine" in logs[2].read_text()


def test_parts_beside_each_other_run_at_once_and_none_ends_the_other(tmp_path, part):
    meeting = "import pathlib, sys, time; pathlib.Path(sys.argv[0] + '.here').touch(); other = pathlib.Path(__file__).with_name({!r})\n"
    meeting += "while not other.exists(): time.sleep(0.05)"
    parts = [part("one", meeting.format("two.py.here")), part("two", meeting.format("one.py.here") + "\nsys.exit(3)", beside=True)]
    outcomes = run_parts(parts, tmp_path, time.monotonic() + 600, on_gpu=False)
    assert [outcome.status for outcome in outcomes] == ["ran", "failed"]


def test_a_missing_package_is_named_whether_or_not_it_was_foreseen(tmp_path, part):
    parts = [
        part("foreseen", "", needs=("no_such_package",)),
        part("not foreseen", "import no_other.package"),
        part("ncu", "", needs=("/no_ncu",)),
    ]
    outcomes = run_parts(parts, tmp_path, time.monotonic() + 600, on_gpu=False)
    assert [outcome.status for outcome in outcomes] == ["not run"] * 3
    assert [o.words for o in outcomes] == ["no_such_package is not installed", "no_other is not installed", "no_ncu is not on the path"]
    assert "pip install no_such_package" in everything.advice(outcomes) and "PYTHONPATH" in everything.advice(outcomes)
    assert everything.advice([]) == ""


def test_what_there_is_no_time_for_is_named(tmp_path, part):
    (outcome,) = run_parts([part("late", "print('fine')")], tmp_path, time.monotonic() + 1, on_gpu=False)
    assert outcome.status == "not run" and "--minutes" in outcome.words


def test_the_gpu_is_hidden_from_parts_of_a_cpu(tmp_path, part):
    looking = part("looks", "import os, sys; sys.exit(os.environ['CUDA_VISIBLE_DEVICES'] or 0)")
    (outcome,) = run_parts([looking], tmp_path, time.monotonic() + 600, on_gpu=False)
    assert outcome.status == "ran"


def test_limits_add_up_to_less_than_eight_minutes():
    always = [group for group in groups(everything.PARTS) if not group[0].further]
    assert sum(max(part.seconds for part in group) for group in always) <= everything.OF_ALL_PARTS
    ends = bench_everything.START_SECONDS + bench_everything.PAGE_SECONDS
    assert everything.OF_ALL_PARTS + ends <= 60 * bench_everything.MINUTES <= 480
    # What is timed has the machine to itself; what takes the time left over comes last.
    assert all(part.on_gpu.startswith("pytest") for group in groups(everything.PARTS) if len(group) > 1 for part in group)
    assert [part.further for part in everything.PARTS] == sorted(part.further for part in everything.PARTS)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_every_command_of_both_lists_parses(tmp_path, on_gpu):
    """Each part's arguments are those of its command, settings included; bench_step.py's are those of its own parser."""
    assert len({part.name for part in everything.PARTS}) == len(everything.PARTS)
    for part in everything.PARTS:
        if not (command := part.on_gpu if on_gpu else part.on_cpu):
            continue
        environment, split = arguments(command, words(tmp_path, "images"))
        assert set(environment) <= {"MASSL_FAST_AUTOTUNE"}
        if split[0] == "ncu":
            split = split[split.index("bench") :]
        if split[0] == "pytest":
            assert all(Path(word).is_file() for word in split if word.endswith(".py"))
            continue
        if split[0] == "bench_step.py":
            bench_step.parser().parse_args(split[1:])
            continue
        module = importlib.import_module(COMMANDS[" ".join(split[:2])][0])
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        args, settings = parser.parse_known_args(split[2:])
        if getattr(module, "TAKES_SETTINGS", False):
            assert part.needs == everything.SETTINGS
            load_config(args.recipe, settings)
        else:
            assert not settings, part.name


def test_tests_are_counted_by_what_they_said_even_where_the_limit_ended_them():
    said = "a.py::test_one PASSED [ 3%]\na.py::test_two[x y] FAILED [ 6%]\na.py::test_three PASSED\na.py::test_four "
    row, told = everything.of_tests("native", said)
    assert told == "2 passed, 1 failed: a.py::test_two[x y]"
    assert row["kind"] == "tests" and row["figures"]["passed"]["median"] == 2 and row["details"]["failed"] == ["a.py::test_two[x y]"]
    row, told = everything.of_tests("native", "SKIPPED [1] a.py:26: There is no GPU here.\n")
    assert row["figures"] == {} and told == "left out: There is no GPU here."


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


def test_sides_one_by_one_are_recorded_as_they_are_known_and_one_that_fails_costs_no_other(monkeypatch):
    def compare(case, sides, *_):
        if "breaks" in sides:
            raise RuntimeError("no\ncompiler")
        return {"sides": {side: {"figure": number} for number, side in enumerate(sides)}}

    monkeypatch.setattr(bench_step, "compare", compare)
    kept = []
    failed = bench_step.compare_one_by_one(
        None, ["published", "a", "breaks", "b"], None, "fp32", 2, lambda found: kept.append(dict(found["sides"]))
    )
    assert [list(sides) for sides in kept] == [["published", "a"], ["published", "a", "b"]]
    assert failed == {"breaks": "RuntimeError: no compiler"}


def test_headlines_of_every_kind_can_be_told():
    from test_page import everything as every_record

    lines = headlines(every_record())
    assert any(line.startswith("kernels: operation loss") and "time 9 ms" in line for line in lines)
    assert any("images per second 40 images/s" in line for line in lines)


def test_a_line_names_a_part_and_what_came_of_it(part):
    assert "not run" in line_of(Outcome(part("b", ""), "not run", words="it needs a GPU"))


def test_the_program_starts_itself_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/massl-fast"])
    assert launcher() == ["/somewhere/massl-fast"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/massl_fast/__main__.py"])
    assert launcher() == ["-m", "massl_fast"]


def test_the_command_runs_chosen_parts_and_leaves_summary_and_page(tmp_path, part, capsys, monkeypatch):
    row = records.record("trace", {"architecture": "x", "batch": 1}, {"waits_per_step": records.figure(0, "1", exact=True)})
    records.append(tmp_path / "records.jsonl", [row])
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write('{"cut off')
    parts = (part("kernels", "print()"), part("loaders", "print()"), Part("kernels of a GPU", 5, "bench kernels"))
    monkeypatch.setattr(everything, "PARTS", parts)
    monkeypatch.setattr("massl_fast.benchmarks.page.page_of", lambda rows: f"{len(rows)} records")
    assert main(["bench", "everything", "--device", "cpu", "--to", str(tmp_path), "--parts", "kernels"]) == 0
    told = capsys.readouterr().out
    assert "loaders" not in told and "it needs a GPU" in told
    assert (tmp_path / "benchmarks.html").read_text() == "1 records"
    summary = (tmp_path / "summary.md").read_text()
    assert (
        "| kernels | ran |" in summary
        and "| kernels of a GPU | not run | 0 | it needs a GPU |" in summary
        and "waits per step 0" in summary
    )


def test_a_folder_that_cannot_be_written_gets_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", "everything", "--device", "cpu", "--to", str(tmp_path / "file" / "x")]) == 2
    assert "Nothing can be written" in capsys.readouterr().err
    assert main(["bench", "everything", "--device", "cpu", "--to", str(tmp_path), "--parts", "no such"]) == 2
    assert "no part has no such in its name" in capsys.readouterr().err


@pytest.mark.timeout(1200)
def test_rehearsal_where_neither_this_package_nor_pydantic_nor_dali_is_installed(tmp_path):
    """The script as it starts on a rented GPU, each part's stand-in on the CPU; parts that lack a package say which, the others record."""
    site, folder = tmp_path / "site", tmp_path / "records"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BARE.replace("ROOT", repr(str(ROOT)), 1))
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, str(ROOT / "bench" / "all_on_gpu.py"), "--device", "cpu", "--to", str(folder)]
    chosen = ["native tests", "loss", "step", "loader", "memory", "trace"]
    run = subprocess.run([*command, "--parts", *chosen], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1100)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    outcomes = dict(re.findall(r"^\| (.+?) \| (ran|failed|not run) \|", (folder / "summary.md").read_text(), re.MULTILINE))
    ran = {"native tests: the kernels' errors", "loss, 512 and 64 images", "losses of the other objectives"}
    assert {name for name, status in outcomes.items() if status == "ran"} == ran
    assert all(status == "not run" for name, status in outcomes.items() if name not in ran)
    assert len(outcomes) == len([part for part in everything.PARTS if any(word in part.name for word in chosen)])
    assert {row["kind"] for row in records.read(folder / "records.jsonl")} == {"tests", "kernels", "objectives"}
    assert "pydantic, psutil, rich are not installed" in run.stdout and "No page: " in run.stdout
    assert "--target packages" in run.stdout


def test_nothing_is_said_to_be_missing_here():
    """Of what the parts' stand-ins name: the project's own environment has it."""
    assert not [part.name for part in everything.PARTS if part.on_cpu and obstacle(part, on_gpu=False)]
