"""An objective and a loader in one file outside the package train, log, resume, export and report; no other file is touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml

from massl_fast.cli import main
from massl_fast.run.outputs import CLOCK_KEYS
from small_images import write_images

TOY = Path(__file__).parent / "toy.py"
SETTINGS = """
data: {num_workers: 0, loader: toy_noise}
crops: {global_size: 16, local_size: 8, num_local: 1}
model:
  architecture: vit_tiny_patch16_224
  model_args: {patch_size: 4, depth: 1, num_heads: 2, embed_dim: 32}
  drop_path: 0.0
objective: {name: toy, prototypes: 5}
teacher: {momentum: 0.9}
train: {steps: 8, global_batch: 8, device: cpu}
logging: {every_steps: 1, tensorboard: false}
checkpoint: {every_steps: 3}
"""


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in found]


@pytest.fixture
def arguments(tmp_path):
    images, recipe = write_images(tmp_path / "images", classes=2, per_class=16), tmp_path / "toy_run.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(SETTINGS) | {"run": {"plugins": [str(TOY)]}}))
    return lambda folder: ["train", "--recipe", str(recipe), "--data.train", str(images), "--run.folder", str(tmp_path / folder)]


def test_one_file_outside_the_package_is_enough(arguments, tmp_path, capsys):
    assert main(arguments("whole")) == 0
    said = capsys.readouterr().out
    assert "5 toy prototypes" in said and "agreement" in said and "Loader    toy_noise" in said
    found = rows(tmp_path / "whole")
    assert len(found) == 8 and all(0 <= row["toy_agreement"] <= 1 for row in found)
    assert "Agreement of toy assignments" in (tmp_path / "whole/report.html").read_text(encoding="utf-8")

    assert main([*arguments("cut"), "--train.stop_at_step", "4"]) == 0
    assert main(arguments("cut")) == 0
    assert rows(tmp_path / "cut") == found

    assert main(["export", "--checkpoint", str(tmp_path / "whole"), "--to", str(tmp_path / "exported")]) == 0
    assert timm.create_model(f"local-dir:{tmp_path / 'exported'}").embed_dim == 32


def test_two_processes_train_it_as_one(arguments, tmp_path):
    assert main(arguments("one")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "massl_fast"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run([*command, *arguments("two")], env=environment, capture_output=True, text=True, timeout=240)
    assert answer.returncode == 0, answer.stderr[-3000:]
    for found, expected in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


BROKEN = {
    "an_objective": "from massl_fast.objectives import register\nfrom massl_fast.objectives.base import Objective\n",
    "an_evaluation": "from massl_fast.evaluation.registry import register\nfrom massl_fast.evaluation.base import Protocol\n",
    "a_loader": "from massl_fast.data.loaders import register\nfrom massl_fast.data.loader import Loader\n",
}


@pytest.mark.parametrize(
    ("contract", "code", "words"),
    [
        ("an_objective", "class Mine(Objective): pass\nregister(Mine)", ["Mine lacks Settings, build, forward, heads, line, loss_flops"]),
        (
            "an_objective",
            "from massl_fast.objectives.massl import MasslObjective\nregister(MasslObjective)",
            ["objective.name massl is taken"],
        ),
        (
            "an_objective",
            "from massl_fast.objectives.massl import MasslObjective\nfrom massl_fast.config import ObjectiveSettings\n"
            "class Mine(MasslObjective):\n    Settings = ObjectiveSettings\nregister(Mine)",
            ["Mine.Settings must be an ObjectiveSettings with the objective's name"],
        ),
        ("an_evaluation", "@register\nclass Mine(Protocol):\n    name = 'mine'", ["Mine lacks title, Settings, figures, run"]),
        (
            "an_evaluation",
            "from massl_fast.evaluation.knn import Knn\nclass Mine(Knn): pass\nregister(Mine)",
            ["The evaluation knn is taken"],
        ),
        ("a_loader", "class Mine(Loader): pass\nregister(Mine)", ["Mine lacks name, _batches, which a loader must have"]),
        ("a_loader", "import no_such_module", ["ModuleNotFoundError", "no_such_module"]),
        ("a_loader", "class Mine(Loader:", ["SyntaxError", "line 3"]),
    ],
)
def test_what_a_plugin_lacks_is_named_when_it_is_imported(tmp_path, capsys, contract, code, words):
    path = tmp_path / f"broken_{contract}.py"
    path.write_text(BROKEN[contract] + code + "\n")
    assert main(["train", "--recipe", "demo", "--run.plugins", str(path), "--print-config"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"massl-fast train: The plugin {path} cannot be imported; this is where it fails:")
    assert all(word in said for word in words) and "importlib" not in said, said
    sys.path.remove(str(tmp_path))


LISTS = '''
from massl_fast.evaluation.base import Figure, Protocol, Result, Settings
from massl_fast.evaluation.registry import register


class ListSettings(Settings):
    scales: tuple[int, ...] = (1, 2)
    """Numbers."""
    rates: list[float] = [0.5]
    """More numbers, 100 % of them."""
    weights: dict[str, float] = {}
    """Numbers by name."""
    limit: int | None = None
    """A number or none."""


@register
class Lists(Protocol):
    """Distance to a number that falls as a run goes on."""

    name, title, Settings = "lists", "Distance", ListSettings

    def figures(self):
        return [Figure("scale", "scale", unit=""), Figure("distance", "distance", unit="nats", higher_is_better=False)]

    @property
    def headline(self):
        return self.figures()[1]

    def run(self, subject):
        distance = sum(self.settings.rates) + sum(self.settings.weights.values()) + (self.settings.limit or 0)
        results = {name: {"scale": sum(self.settings.scales), "distance": distance} for name in subject.networks}
        return Result(results, {}, "default", subject.image_size)
'''


def test_an_evaluation_of_ones_own_has_lists_for_settings_and_names_the_best_checkpoint(arguments, tmp_path, capsys):
    path = tmp_path / "lists_plugin.py"
    path.write_text(LISTS)
    run = [*arguments("run"), "--run.plugins", f"[{TOY}, {path}]", "--train.steps", "2", "--evaluation.protocols", "[lists]"]
    assert main([*run, "--evaluation.settings", "{lists: {scales: [3, 4], rates: [1.5]}}", "--evaluation.every_epochs", "0.25"]) == 0
    said = capsys.readouterr().out
    assert "lists_teacher_distance 1.5 nats" in said
    state = json.loads((tmp_path / "run/checkpoints/step_00000002/state.json").read_text())
    assert (state["best_metric"], state["best_value"]) == ("lists_teacher_distance", 1.5)
    assert (tmp_path / "run/checkpoints/best").read_text() == "step_00000001\n", "the second is no better"
    assert "Distance, teacher: distance" in (tmp_path / "run/report.html").read_text(encoding="utf-8")

    evaluate = [
        "eval",
        "lists",
        "--plugin",
        str(path),
        "--checkpoint",
        str(tmp_path / "run"),
        "--which",
        "teacher",
        "--no-baselines",
        "--json",
    ]
    assert main([*evaluate, "--scales", "3", "--rates", "1.5", "2", "--weights", "{a: 1e-1}", "--limit", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == {"teacher": {"scale": 3, "distance": 7.6}}
    with pytest.raises(SystemExit):
        main([*evaluate, "--weights", "{a: 1, a: 2}"])
    assert "the key a stands twice" in capsys.readouterr().err
    assert main([*evaluate, "--weights", "3"]) == 2
    assert "--weights is 3: input should be a valid dictionary." in capsys.readouterr().err
