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
