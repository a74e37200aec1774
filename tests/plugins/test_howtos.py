"""The files that docs/howto shows do what it says: each is run as a plugin, on images and networks of a few pixels."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from massl_fast.cli import main
from massl_fast.config import SETTINGS
from massl_fast.config.sections import LOADERS as LOADER_SETTINGS
from massl_fast.data.loaders import LOADERS
from massl_fast.evaluation.registry import PROTOCOLS
from massl_fast.objectives import OBJECTIVES
from small_images import write_images

HOWTO = Path(__file__).parents[2] / "docs/howto"
MARK = "<!-- example: a plugin -->\n```python\n"
RUN = {
    "data": {"num_workers": 0},
    "crops": {"global_size": 16, "local_size": 8, "num_local": 1},
    "model": {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"patch_size": 4, "depth": 1, "num_heads": 2, "embed_dim": 32},
        "head_hidden_dim": 16,
        "embedding_dim": 8,
    },
    "train": {"steps": 2, "global_batch": 8, "device": "cpu"},
    "logging": {"every_steps": 1, "tensorboard": False},
}


@pytest.fixture
def plugins(tmp_path):
    """The three files, under names of their own; what they registered is forgotten afterwards."""
    found = {}
    for page in ("add_an_objective", "add_a_loader", "add_an_evaluation"):
        text = (HOWTO / f"{page}.md").read_text(encoding="utf-8")
        assert text.count(MARK) == 1
        found[page] = tmp_path / f"howto_{page}.py"
        found[page].write_text(text.partition(MARK)[2].partition("\n```")[0] + "\n", encoding="utf-8")
    yield found
    for registry, name in ((SETTINGS, "agreement"), (OBJECTIVES, "agreement"), (LOADER_SETTINGS, "centre"), (LOADERS, "centre")):
        registry.pop(name, None)
    PROTOCOLS.pop("centroid", None)
    for path in found.values():
        sys.modules.pop(path.stem, None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def test_the_files_of_the_howtos_work_as_they_stand(plugins, tmp_path, capsys):
    images = write_images(tmp_path / "images", classes=2, per_class=12)
    (images / "class_0/broken.jpg").write_bytes(b"no image")
    recipe = tmp_path / "howto.yaml"
    recipe.write_text(yaml.safe_dump(RUN | {"run": {"plugins": [str(path) for path in plugins.values()]}}))
    folder = tmp_path / "run"
    train = ["train", "--recipe", str(recipe), "--data.train", str(images), "--run.folder", str(folder)]
    train += ["--objective.name", "agreement", "--data.loader", "centre", "--data.loader_settings.margin", "0.5"]
    train += ["--evaluation.train", str(images), "--evaluation.test", str(images), "--evaluation.protocols", "[centroid]"]
    assert main(train) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "agreement of views of width 8" in said and "centre" in said
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= rows[-1]["centroid_teacher_accuracy_percent"] <= 100 and -1 <= rows[-1]["agreement"] <= 1
    assert rows[-1]["loss"] == pytest.approx(1 - rows[-1]["agreement"], abs=1e-6) and rows[-1]["embedding_spread"] > 0

    plugin = ["--plugin", str(plugins["add_an_evaluation"]), "--checkpoint", str(folder)]
    assert main(["eval", "centroid", *plugin, "--train", str(images), "--test", str(images), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["teacher"]["accuracy_percent"] == pytest.approx(rows[-1]["centroid_teacher_accuracy_percent"], abs=1e-3)
    assert results["raw pixels"]["accuracy_percent"] > 50


@pytest.mark.parametrize("asked", [["agreement"], ["objective", "--objective.name", "agreement"]])
def test_help_shows_the_settings_of_an_objective_that_a_plugin_adds(plugins, asked, capsys):
    assert main(["train", *asked, "--run.plugins", str(plugins["add_an_objective"]), "--help"]) == 0
    said = capsys.readouterr().out
    assert "the settings of agreement" in said and "Momentum of the remembered mean." in said and "--objective.memory_size" not in said
