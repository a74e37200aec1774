"""Help by group and by section, and completion that bash, zsh and fish can read."""

import argparse
import shutil
import subprocess

import pytest

from massl_fast.cli import main
from massl_fast.commands.arguments import keeping, keeps_records
from massl_fast.commands.completion import whole_parser
from massl_fast.commands.registry import COMMANDS

SETTINGS = ["--train.steps", "--objective.memory_size", "--model.compile"]


@pytest.mark.parametrize("group", ["bench", "eval", "profile", "data"])
def test_help_of_a_group_lists_that_group_alone(group, capsys):
    assert main([group, "--help"]) == 0
    told = capsys.readouterr().out
    assert all((f"massl-fast {name} " in told) == (name.split()[0] == group) for name in COMMANDS)


def test_an_unknown_member_of_a_group_is_told_the_others(capsys):
    assert main(["bench", "kernel"]) == 2
    told = capsys.readouterr().err
    assert "no command 'bench kernel'" in told and "bench kernels" in told and "massl-fast train" not in told


@pytest.mark.parametrize(("section", "own", "other"), [("teacher", "--teacher.momentum", "--train"), ("dino", "--objective.", "--train")])
def test_help_of_one_section_or_objective(section, own, other, capsys):
    assert main(["train", section, "--help"]) == 0
    told = capsys.readouterr().out
    assert own in told and other not in told


def test_help_of_a_section_that_is_none_names_the_choices(capsys):
    assert main(["train", "teachr", "--help"]) == 2
    assert "Sections: run, data" in capsys.readouterr().err


@pytest.fixture(scope="module")
def parser():
    return whole_parser()


def test_the_parser_for_completion_has_every_command_and_setting(parser):
    commands = parser._subparsers._group_actions[0].choices
    assert set(commands) == {name.split()[0] for name in COMMANDS}
    assert set(commands["bench"]._subparsers._group_actions[0].choices) == {n.split()[1] for n in COMMANDS if n.startswith("bench ")}
    assert all(option in commands["train"]._option_string_actions for option in SETTINGS)


@pytest.fixture(scope="module")
def script(parser):
    import shtab

    return lambda shell: shtab.complete(parser, shell)


@pytest.mark.parametrize(
    ("words", "last", "offered"),
    [
        (["massl-fast"], "prof", "profile"),
        (["massl-fast", "profile"], "mem", "memory"),
        (["massl-fast", "train"], "--optimizer.clip_m", "--optimizer.clip_mode"),
        (["massl-fast", "train", "--recipe"], "vit_small_in1k_p", "vit_small_in1k_paper"),
        (["massl-fast", "train", "--objective.name"], "mo", "moco_v3"),
    ],
)
def test_bash_completes_commands_settings_and_choices(script, tmp_path, words, last, offered):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    file = tmp_path / "completion.bash"
    file.write_text(script("bash"))
    listed = " ".join(f'"{word}"' for word in [*words, last])
    call = f"_shtab_massl_fast massl-fast '{last}' '{words[-1]}'"
    ask = f"COMP_WORDS=({listed}); COMP_CWORD={len(words)}; {call}; printf '%s\\n' ${{COMPREPLY[@]}}"
    answer = subprocess.run(["bash", "-c", f"source {file}; {ask}"], capture_output=True, text=True)
    assert offered in answer.stdout.split(), answer.stdout + answer.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_their_script(script, tmp_path, shell):
    text = script(shell)
    assert "massl-fast" in text and "memory_size" in text
    if shutil.which(shell):
        file = tmp_path / f"completion.{shell}"
        file.write_text(text)
        assert subprocess.run([shell, "-n", str(file)]).returncode == 0


@pytest.mark.parametrize("output", ["none", ""])
def test_output_none_keeps_nothing_in_every_command_that_keeps_records(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    keeps_records(parser)
    with keeping(parser.parse_args(["--output", output, "--json"])) as keep:
        keep({"a": 1})
    assert list(tmp_path.iterdir()) == []
