import pytest
import yaml

from massl_fast.cli import main
from massl_fast.config import (
    Config,
    MasslSettings,
    describe_settings,
    load_config,
    parse_overrides,
    parsed_yaml,
    read_config,
    recipe_names,
    write_config,
)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_valid_and_survives_a_round_trip(recipe, tmp_path):
    config = load_config(recipe)
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_published_settings():
    """Figures of the published commands (ViT-S, ViT-B) and of the paper."""
    small, base, paper = (load_config(name) for name in ("vit_small_in1k", "vit_base_in1k", "vit_small_in1k_paper"))
    for config, momentum, rate, floor, warmup, temperature_epochs in (
        (small, 0.992, 5e-4, 1e-6, 0, 30),
        (base, 0.996, 7.5e-4, 2e-6, 10, 50),
    ):
        assert (config.objective.memory_size, config.objective.block_size) == (131072, 16384)
        assert (config.teacher.momentum, config.teacher.momentum_end) == (momentum, 1.0)
        optimizer = config.optimizer
        assert (optimizer.learning_rate, optimizer.minimum_learning_rate, optimizer.warmup_epochs) == (rate, floor, warmup)
        assert (optimizer.weight_decay, optimizer.weight_decay_end, optimizer.clip, optimizer.clip_mode) == (0.04, 0.4, 3.0, "parameter")
        assert config.objective.teacher_temperature_warmup_epochs == temperature_epochs
        assert (config.crops.global_scale, config.crops.local_scale, config.crops.num_local) == ((0.32, 1.0), (0.05, 0.32), 10)
        assert config.model.drop_path == 0.1
    assert (paper.objective.memory_size, paper.train.global_batch, paper.optimizer.learning_rate) == (65536, 1024, 1e-5)
    assert (paper.objective.block_reduction, paper.objective.enqueue_view) == ("sum", "first")


def test_command_line_overrides():
    config = load_config("demo", ["--train.steps", "7", "--optimizer.learning-rate=1e-3", "--crops.global_scale", "[0.2, 0.9]"])
    assert (config.train.steps, config.optimizer.learning_rate, config.crops.global_scale) == (7, 1e-3, (0.2, 0.9))
    assert parse_overrides(["--model.compile=true"]) == [(("model", "compile"), True)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.stepz", "1"], ["train.stepz", "train.steps"]),
        (["--trian.steps", "1"], ["trian", "train"]),
        (["--optimizer.memory_size", "1"], ["optimizer.memory_size", "objective.memory_size"]),
        (["--data.loader", "dalli"], ["data.loader", "'dalli'", "Did you mean dali?", "torchvision"]),
        (["--objective.name", "masl"], ["objective.name", "'masl'", "Did you mean massl?"]),
        (["--objective.name", "[massl]"], ["objective.name", "['massl']"]),
        (["--data.loader_settings.width", "3"], ["data.loader_settings.width", "Settings of data.loader_settings: none"]),
        (["--train.steps.more", "3"], ["train.steps holds no keys"]),
        (["--optimizer.name", "adam"], ["optimizer.name", "'adam'", "adamw", "lars"]),
        (["--train.steps", "many"], ["train.steps", "'many'", "integer"]),
        (["--train.global_batch", "0"], ["train.global_batch", "greater than or equal to 1"]),
        (["--objective.block_size", "100000"], ["block_size", "100000", "memory_size", "4096"]),
        (["--train.global_batch", "5000"], ["memory_size", "4096", "5000"]),
        (["--evaluation.test", ""], ["evaluation.test"]),
        (["--crops.global_scale", "[0.9, 0.1]"], ["crops.global_scale", "smaller first"]),
        (["--train.steps"], ["--train.steps", "no value"]),
        (["steps", "3"], ["'steps'", "--section.key"]),
        (["--train.steps", "["], ["--train.steps", "YAML"]),
    ],
)
def test_mistakes_are_sentences_that_name_the_culprit(arguments, words):
    with pytest.raises(ValueError) as caught:
        load_config("demo", arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_key_of_more_than_one_dot_sets_one_entry_of_a_mapping():
    config = load_config("cifar10", ["--model.model_args.depth", "4"])
    assert config.model.model_args == {"patch_size": 4, "depth": 4}
    assert load_config("cifar10", ["--model.model_args", "{depth: 4}"]).model.model_args == {"depth": 4}


def test_unknown_recipe_and_damaged_file(tmp_path):
    with pytest.raises(ValueError, match="Did you mean cifar10"):
        load_config("cifar100")
    damaged = tmp_path / "mine.yaml"
    damaged.write_text("train: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(str(damaged))
    damaged.write_text("- a list")
    with pytest.raises(ValueError, match="mapping"):
        load_config(str(damaged))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1.0e+308", 1e308), ("1_000", 1000), ("0x10", 16), ("-3", -3), (".5", 0.5), ("on", True), ("null", None)]
    + [(text, text) for text in ("2026-11-21", "010", "12:30", "1:30:45.5", "3.5.2", ".")],
)
def test_what_text_without_quotes_is(text, value):
    assert parsed_yaml(f"[{text}]", "") == [value] and type(parsed_yaml(f"[{text}]", "")[0]) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 1}\ndata: {}\ntrain: {epochs: 2}", "the key train stands twice in one mapping (line 3, column 1)."),
        ("model: {model_args: {depth: 1, depth: 2}}", "the key depth stands twice"),
        ("train: {steps: !!int x}", "invalid literal for int() with base 10: 'x'."),
        ("train: {steps: !!timestamp x}", "does not fit its tag (AttributeError"),
        ("train: {steps: !!bool x}", "does not fit its tag (KeyError"),
        ("train: {steps: [", "(line 1, column 17)."),
    ],
)
def test_text_that_is_no_yaml_is_one_sentence_with_its_place(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(str(tmp_path / "mine.yaml"))
    said = str(caught.value)
    assert "mine.yaml is not valid YAML: " in said and words in said and said.endswith(".") and "\n" not in said


def test_a_mapping_may_set_again_what_it_merges(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: demo\ndata: &a {num_workers: 1}\ntrain: {<<: &b {steps: 3}, steps: 4}\n")
    assert load_config(str(tmp_path / "mine.yaml")).train.steps == 4


@pytest.mark.parametrize("text", ["2026-11-21", "010", "1e5", "on", "1_000", "null", "12:30", ".5", "@x", "*"])
def test_text_stays_as_it_was_typed_and_as_it_was_written(tmp_path, text):
    config = load_config("demo", ["--run.folder", text, f"--logging.wandb={text}"])
    assert config.run.folder == config.logging.wandb == text
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml").run.folder == text
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["run"]["folder"] == text, "for other readers of YAML, too"
    assert load_config("demo", ["--run.folder", f"'{text}'"]).run.folder == text


def test_every_setting_is_described():
    text = describe_settings()
    assert "typing" not in text and "Annotated" not in text
    for name in MasslSettings.model_fields:
        assert f"--objective.{name} " in text
    for section, field in Config.model_fields.items():
        for name, setting in field.annotation.model_fields.items():
            assert f"--{section}.{name} " in text
            assert setting.description, f"{section}.{name} has no docstring"


def test_the_old_name_of_a_setting_is_taken_with_a_note(tmp_path, capsys):
    config = load_config("demo", ["--train.device_batch", "8"])
    assert config.train.micro_batch == 8 and config.notes == [
        "train.device_batch is called train.micro_batch now; the next version knows the new name only."
    ]
    assert main(["train", "--recipe", "demo", "--train.device_batch", "8", "--print-config"]) == 0
    printed = capsys.readouterr()
    assert "micro_batch: 8" in printed.out and "train.device_batch is called train.micro_batch now" in printed.err
    (tmp_path / "config.yaml").write_text("train: {device_batch: 4}")
    assert read_config(tmp_path / "config.yaml").train.micro_batch == 4
    (tmp_path / "mine.yaml").write_text("base: demo\ntrain: {device_batch: 4}")
    assert load_config(str(tmp_path / "mine.yaml"), ["--train.micro_batch", "2"]).train.micro_batch == 2, "the command line lies on top"
    with pytest.raises(ValueError, match=r"train.device_batch is the old name of train.micro_batch, and both are set"):
        load_config("demo", ["--train.device_batch", "8", "--train.micro_batch", "4"])
    assert not load_config("demo", ["--train.micro_batch", "8"]).notes
