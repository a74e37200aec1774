"""Every setting against values that no run can have: the answer is a sentence or a run that can be set up, never a traceback."""

import math
import random

import pytest
import yaml

from massl_fast.cli import main
from massl_fast.config import SETTINGS, Config, load_config
from massl_fast.data.loaders import views_of
from massl_fast.engine.build import build_objective
from massl_fast.engine.schedules import Schedules
from massl_fast.length import length_of
from massl_fast.models.backbone import build_backbone
from small_encoders import FP32

TRIALS = 1000
NUMBERS = ["0", "-1", "1", "3.5", "-0.0", "1.0e-320", "1.0e+308", "1.0e+20", "1" + "0" * 20, "-1" + "0" * 20, "1" + "0" * 5000]
NOT_NUMBERS = [".inf", "-.inf", ".nan", "null", "true", "2020-13-45", "2020-01-01", "0x7fffffffffffffffffff", "1_000", "!!binary gICA"]
LISTS = [
    "[]",
    "[1]",
    "[.nan, .inf]",
    "[1.0e+308, -1.0e+308]",
    "[0, 0]",
    "[0, 0, 0]",
    "[-1, 1, 1]",
    "[9, 9, 9, 9]",
    "[null]",
    "[[1]]",
    "[1" * 3000,
]
MAPPINGS = [
    "{}",
    "{a: 1}",
    "{a: {b: .inf}}",
    "{1: 2}",
    "{[1]: 2}",
    "{depth: 1" + "0" * 20 + "}",
    "&a [*a]",
    "&a {x: *a}",
    "{<<: [1]}",
    "{a: 1, a: 2}",
]
TEXTS = [
    "",
    "x" * 300,
    "x" * 100_000,
    "/dev/null",
    "..",
    "äöü",
    "'\\0'",
    '"\\0"',
    '"\\ud800"',
    "\x7f",
    "%s",
    "*",
    "'",
    "!!python/name:os.system ''",
    "!!timestamp x",
    "!!bool x",
]
VALUES = [*NUMBERS, *NOT_NUMBERS, *LISTS, *MAPPINGS, *TEXTS]


def settings() -> list[str]:
    models = {section: field.annotation for section, field in Config.model_fields.items()} | {"objective": SETTINGS["massl"]}
    return [f"--{section}.{name}" for section, model in models.items() for name in model.model_fields]


def set_up(config: Config) -> None:
    """What a run computes from its settings before it touches data, device or weights."""
    views_of(config.crops)
    small = config.model_copy(deep=True)  # sizes that this machine lacks the memory for end a run with another sentence
    small.objective.memory_size = small.objective.block_size = 64
    small.model.embedding_dim = 8
    objective = build_objective(small, FP32, rank=0)
    for steps_per_epoch in (1, 10**6):
        length = length_of(config, steps_per_epoch, world_size=1)
        schedules = Schedules(config, length, objective)
        for step in (0, length.total_steps // 2, length.total_steps - 1):
            values = schedules.at(step)
            for value in (values.learning_rate, values.weight_decay, values.teacher_momentum, *values.own.values()):
                assert math.isfinite(value)
        length.steps(config.evaluation.every_epochs)


def test_a_thousand_hostile_settings_end_in_sentences(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train: {global_batch: 64}\ndata: {train: demo}\nevaluation: {train: demo, test: demo}\n")
    draw = random.Random(11)
    keys = settings()
    taken = 0
    for trial in range(TRIALS):
        argument = f"{keys[trial % len(keys)]}={draw.choice(VALUES)}"
        code = main(["train", "--recipe", str(recipe), "--print-config", argument])
        printed = capsys.readouterr()
        assert code in (0, 2) and "Traceback" not in printed.err, argument[:100]
        if code == 2:
            assert printed.err.startswith("massl-fast train: ") and 40 < len(printed.err) < 2000, argument[:100]
            continue
        taken += 1
        try:
            set_up(Config.model_validate(yaml.safe_load(printed.out)))
        except ValueError as sentence:
            assert str(sentence).endswith("."), (argument[:100], str(sentence))
    assert TRIALS // 20 < taken < TRIALS // 2, "some of the values are possible for some of the settings, most are not"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--optimizer.warmup_epochs=.inf", ["optimizer.warmup_epochs", "finite"]),
        ("--evaluation.every_epochs=.inf", ["evaluation.every_epochs", "finite"]),
        ("--evaluation.ks=[]", ["evaluation.ks", "at least 1 item"]),
        ("--evaluation.ks=[0]", ["evaluation.ks", "greater than or equal to 1"]),
        ("--objective.teacher_temperature=.nan", ["objective.teacher_temperature", "finite"]),
        ("--crops.std=[1, 0, 1]", ["crops.std.1", "greater than"]),
        ("--crops.mean=[.nan, 0, 0]", ["crops.mean.0", "finite"]),
        ("--model.model_args={depth: .inf}", ["model.model_args", "finite"]),
        ("--model.model_args.depth=100000000000000000000", ["model.model_args", "depth", "1e+20"]),
        (f"--run.folder={'x' * 300}", ["run.folder", "too long"]),
        ('--data.train="\\0"', ["data.train", "zero byte"]),
        *(
            (f"--{key}=100000000000000000000", [key, "less than"])
            for key in ("crops.global_size", "model.embedding_dim", "train.global_batch")
        ),
        *((f"--{key}=100000000000000000000", [key, "less than"]) for key in ("objective.memory_size", "train.steps", "run.seed")),
    ],
)
def test_what_would_overflow_is_refused_by_name(argument, words):
    with pytest.raises(ValueError) as caught:
        load_config("demo", [argument])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [{"patch_size": 0}, {"depth": -1, "num_heads": 0}, {"norm_layer": "none of timm's"}, {"embed_dim": "wide"}, {"mlp_ratio": [1, 2]}],
)
def test_arguments_that_timm_stumbles_over_are_sentences(arguments):
    small = {"patch_size": 4, "depth": 1, "embed_dim": 32, "num_heads": 2}
    with pytest.raises(ValueError, match="vit_tiny"):
        build_backbone("vit_tiny_patch16_224", image_size=16, other_sizes=[8], model_args={**small, **arguments})
