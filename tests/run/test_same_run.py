"""Which settings a checkpoint may be continued with, and which make another run."""

import copy
from pathlib import Path

import pytest

from massl_fast.config import Config
from massl_fast.config.whole import SETTINGS as OBJECTIVES
from massl_fast.run.same_run import demand_same_run

SETTINGS = Config().model_dump(mode="json")


def changed(**values) -> dict:
    settings = copy.deepcopy(SETTINGS)
    for name, value in values.items():
        section, key = name.split("__")
        assert key in settings[section], name
        settings[section][key] = value
    return settings


def compare(settings: dict, num_images: int = 100, images: str = "a", **state) -> list[str]:
    stored = {"config": SETTINGS, "num_images": 100, "images": "a", **state}
    return demand_same_run(Path("step_00000007"), stored, settings, num_images, images)


def test_every_setting_that_makes_another_run_is_named():
    with pytest.raises(ValueError, match="is of another run") as found:
        compare(
            changed(
                run__seed=1,
                crops__num_local=2,
                model__drop_path=0.3,
                objective__student_temperature=0.2,
                train__global_batch=64,
                optimizer__name="sgd",
            ),
            num_images=99,
        )
    for words in (
        "run.seed 0 (here 1)",
        "crops.num_local 10 (here 2)",
        "model.drop_path 0.1 (here 0.3)",
        "objective.student_temperature 0.1 (here 0.2)",
        "train.global_batch 1024 (here 64)",
        "optimizer.name adamw (here sgd)",
        "100 images in data.train (here 99)",
    ):
        assert words in str(found.value)


def test_other_images_are_seen_even_where_they_are_as_many():
    with pytest.raises(ValueError, match=r"as many images in .* under other names"):
        compare(SETTINGS, images="b")


def test_what_does_not_change_the_run_may_change_without_a_word():
    assert compare(SETTINGS) == []
    other = changed(
        run__folder="x",
        run__resume="must",
        data__train="/elsewhere",
        data__num_workers=3,
        model__crops_pass="separate",
        model__compile=True,
        train__micro_batch=8,
        train__stop_at_step=5,
        parallel__strategy="fsdp2",
        evaluation__ks=[3],
        logging__every_steps=1,
        checkpoint__every_steps=3,
    )
    assert compare(other) == []


def test_what_changes_the_training_from_here_on_is_told():
    (sentence,) = compare(changed(optimizer__learning_rate=1e-4, train__epochs=200, optimizer__name="adamw_with_teacher"))
    assert "optimizer.learning_rate 0.0005 → 0.0001" in sentence and "train.epochs" in sentence


def test_settings_that_one_side_does_not_know_are_not_compared():
    older = copy.deepcopy(SETTINGS)
    del older["objective"]["student_temperature"], older["parallel"]
    assert compare(changed(objective__student_temperature=0.3), config=older) == []


TOLD = {
    "data": {"loader", "loader_settings", "bad_files", "decode", "augment"},
    "model": {"residual"},
    "objective": {"backend", "memory_dtype"},
    "optimizer": set(SETTINGS["optimizer"]) - {"name"},
    "teacher": {"momentum", "momentum_end", "moves"},
    "train": {"epochs", "steps", "precision"},
}
SILENT = {
    "run": {"folder", "resume", "plugins"},
    "data": {"train", "num_workers", "max_bad_percent"},
    "model": {"crops_pass", "attention", "compile", "recompute"},
    "train": {"stop_at_step", "device", "micro_batch", "cpu_products", "cuda_graph"},
    **{section: set(SETTINGS[section]) for section in ("parallel", "evaluation", "logging", "checkpoint")},
}
REFUSED = {
    "run": {"seed", "init_from"},
    "crops": set(SETTINGS["crops"]),
    "model": {"architecture", "model_args", "drop_path", "head_hidden_dim", "head_layers", "embedding_dim", "position_embedding"},
    "optimizer": {"name"},
    "train": {"global_batch"},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_of_each_setting_it_is_said_whether_it_makes_another_run(objective):
    """A setting that is new fails here until somebody has put it into one of the three groups, and into same_run where it belongs there."""
    settings = {**SETTINGS, "objective": OBJECTIVES[objective].model_validate({"name": objective}).model_dump(mode="json")}
    found: dict[str, dict[str, set[str]]] = {"refused": {}, "told": {}, "silent": {}}
    for section, values in settings.items():
        for name in values:
            other = {**settings, section: {**values, name: "another value"}}
            try:
                outcome = "told" if compare(other, config=settings) else "silent"
            except ValueError as error:
                assert f"{section}.{name} " in str(error)
                outcome = "refused"
            found[outcome].setdefault(section, set()).add(name)
    of_objective = set(settings["objective"])
    told = {**TOLD, "objective": TOLD["objective"] & of_objective}
    told = {section: names for section, names in told.items() if names}
    assert found == {"refused": {**REFUSED, "objective": of_objective - TOLD["objective"]}, "told": told, "silent": SILENT}
