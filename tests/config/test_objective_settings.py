"""The objective's settings: chosen by objective.name, extended by plugins, inherited by recipes."""

from typing import Literal

import pytest
import yaml

from massl_fast.cli import main
from massl_fast.config import (
    SETTINGS,
    Config,
    MasslSettings,
    ObjectiveSettings,
    load_config,
    read_config,
    register_settings,
    validated,
    write_config,
)


class PairsSettings(ObjectiveSettings):
    """Compares pairs of views and remembers nothing."""

    name: Literal["pairs"] = "pairs"
    student_temperature: float = 0.3
    """Temperature of the softmax."""
    margin: float = 0.5
    """How far pairs have to lie apart."""

    def check(self, config):
        if self.margin > config.train.global_batch:
            raise ValueError(f"objective.margin is {self.margin}, more than train.global_batch. Choose less.")


@pytest.fixture
def pairs(monkeypatch):
    monkeypatch.setitem(SETTINGS, "pairs", PairsSettings)


def test_settings_without_a_name_are_massl():
    assert type(Config().objective) is MasslSettings
    assert validated({"objective": {"memory_size": 2048, "block_size": 512}}, "test").objective.memory_size == 2048


def test_the_name_chooses_the_model_and_its_checks(pairs, tmp_path):
    config = validated({"objective": {"name": "pairs", "margin": 2}}, "test")
    assert type(config.objective) is PairsSettings and config.objective.margin == 2
    write_config(config, tmp_path / "config.yaml")
    assert "margin: 2.0" in (tmp_path / "config.yaml").read_text()
    assert read_config(tmp_path / "config.yaml") == config
    with pytest.raises(ValueError, match=r"more than train.global_batch"):
        validated({"objective": {"name": "pairs", "margin": 5000}}, "test")


def test_a_key_of_another_objective_is_named_as_such(pairs):
    with pytest.raises(ValueError, match=r"objective.memory_size is a setting of massl, but objective.name is pairs"):
        load_config("demo", ["--objective.name", "pairs", "--objective.memory_size", "64"])
    with pytest.raises(ValueError, match=r"objective.margin is a setting of pairs, but objective.name is massl"):
        load_config("demo", ["--objective.margin", "1"])
    with pytest.raises(ValueError, match=r"no setting objective.margni. Did you mean objective.margin"):
        load_config("demo", ["--objective.name", "pairs", "--objective.margni", "1"])


def test_a_name_is_given_once(pairs):
    register_settings("pairs", PairsSettings)
    with pytest.raises(ValueError, match=r"objective.name massl is taken already"):
        register_settings("massl", PairsSettings)


def test_another_objective_leaves_the_recipes_settings_of_the_first_out_and_says_so(pairs):
    config = load_config("demo", ["--objective.name", "pairs"])
    assert config.objective == PairsSettings(student_temperature=0.2), "what both have stays as the recipe has it"
    assert len(config.notes) == 1 and "memory_size" in config.notes[0] and "student_temperature" not in config.notes[0]
    assert load_config("demo", ["--objective.name", "massl"]) == load_config("demo")


def test_recipes_inherit_section_by_section(pairs, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/mine.yaml").write_text("base: ../ours.yaml\ntrain: {steps: 9}\n")
    (tmp_path / "ours.yaml").write_text("base: demo\ntrain: {steps: 5, global_batch: 32}\nobjective: {name: pairs, margin: 1}\n")
    config, demo = load_config(str(tmp_path / "deep/mine.yaml")), load_config("demo")
    assert (config.train.steps, config.train.global_batch, config.run.folder) == (9, 32, "runs/mine")
    assert config.objective == PairsSettings(student_temperature=0.2, margin=1)
    assert config.crops == demo.crops and not config.notes


def test_mistakes_in_bases_are_sentences(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("base: second.yaml")
    second.write_text("base: first.yaml")
    with pytest.raises(ValueError, match=r"its own base"):
        load_config(str(first))
    second.write_text("base: dmo")
    with pytest.raises(ValueError, match=r"no recipe 'dmo'. Did you mean demo"):
        load_config(str(first))
    second.write_text("base: [demo]")
    with pytest.raises(ValueError, match=r"base is .'demo'.; it must be the name"):
        load_config(str(first))


def test_help_shows_the_chosen_objective_and_lists_the_others(pairs, tmp_path, capsys):
    def help_of(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["train", *arguments, "--help"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    text = help_of()
    assert "--objective.memory_size" in text and "--objective.margin" not in text
    assert "pairs: Compares pairs of views and remembers nothing." in text
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("objective: {name: pairs}")
    for arguments in (["--objective.name", "pairs"], ["--recipe", str(recipe)]):
        text = help_of(*arguments)
        assert (
            "--objective.memory_size" not in text and "--objective.margin (number, default 0.5)" in text and "massl: Learning from" in text
        )
    assert main(["train"]) == 2
    assert "--recipe and --data.train are missing" in capsys.readouterr().err


PLUGIN = '''
from typing import Literal
from massl_fast.config import ObjectiveSettings, Section, register_loader_settings, register_settings

class {kind}(ObjectiveSettings):
    """From a file of the user."""
    name: Literal["{name}"] = "{name}"
    width: int = 3
    """How wide."""

class LoaderSettings(Section):
    depth: int = 1
    """How deep."""

register_settings("{name}", {kind})
register_loader_settings("{name}", LoaderSettings)
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Writes a plugin of a name; what it registers is gone after the test."""
    import sys

    from massl_fast.config import LOADERS

    def write(name):
        path = tmp_path / f"{name}.py"
        path.write_text(PLUGIN.format(kind=name.title(), name=name))
        return path

    before = dict(SETTINGS), dict(LOADERS), list(sys.path)
    yield write
    for registry, entries in zip((SETTINGS, LOADERS), before):
        registry.clear()
        registry.update(entries)
    sys.path[:] = before[2]


def test_a_plugin_brings_settings_for_recipe_command_line_and_run_folder(plugin, tmp_path):
    path = plugin("cross")
    (tmp_path / "mine.yaml").write_text("base: demo\nrun: {plugins: cross.py}\nobjective: {name: cross, width: 4}\ndata: {loader: cross}")
    config = load_config(str(tmp_path / "mine.yaml"), ["--data.loader_settings.depth", "5"])
    assert (config.objective.width, config.data.loader_settings.depth, config.run.plugins) == (4, 5, (str(path),))
    write_config(config, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["loader_settings"] == {"depth": 5}
    assert read_config(tmp_path / "config.yaml").objective == config.objective
    with pytest.raises(ValueError, match=r"data.loader_settings.dpth. Did you mean data.loader_settings.depth"):
        load_config(str(tmp_path / "mine.yaml"), ["--data.loader_settings.dpth", "5"])


def test_validation_alone_imports_nothing(plugin):
    path = plugin("stranger")
    with pytest.raises(ValueError, match=r"objective.name is 'stranger'"):
        validated({"run": {"plugins": [str(path)]}, "objective": {"name": "stranger"}}, "a checkpoint")


def test_a_plugin_that_is_absent_or_fails_is_a_sentence(tmp_path):
    def refused(path):
        with pytest.raises(ValueError) as caught:
            load_config("demo", ["--run.plugins", str(path)])
        return str(caught.value)

    assert "which is not a Python file here" in refused(tmp_path / "absent.py")
    assert "which is not a Python file here" in refused(tmp_path)
    broken = tmp_path / "broken_plugin.py"
    broken.write_text("def f():\n    return 1 / 0\n\nf()\n")
    message = refused(broken)
    assert message.startswith("The plugin ") and "ZeroDivisionError" in message and "line 4" in message and "importlib" not in message
    broken.write_text("def f(:")
    assert "SyntaxError" in refused(broken)
    hiding = tmp_path / "torch.py"
    hiding.write_text("")
    assert "another Python module named torch" in refused(hiding)
