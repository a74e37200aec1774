"""Kill a run with SIGKILL at random steps, resume it, and compare its metrics with a run that was left alone.

``python tests/kill_and_resume.py [KILLS]`` prints what it compared and exits with 1 where anything differs.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from massl_fast.run.outputs import CLOCK_KEYS
from small_images import write_images

SETTINGS = """
data: {num_workers: 1, loader: torchvision}
crops: {global_size: 16, local_size: 8, num_local: 2}
model:
  architecture: vit_tiny_patch16_224
  model_args: {patch_size: 4, depth: 2, num_heads: 2, embed_dim: 32}
  drop_path: 0.2
  head_hidden_dim: 32
  embedding_dim: 16
objective: {memory_size: 64, block_size: 16, teacher_temperature_warmup_epochs: 1}
teacher: {momentum: 0.9}
train: {steps: 40, global_batch: 8, micro_batch: 4}
evaluation: {every_epochs: 2, ks: [3, 20], image_size: 16}
logging: {every_steps: 1, tensorboard: false}
checkpoint: {every_steps: 7}
"""


def command(folder: Path, recipe: Path, images: Path) -> list[str]:
    data = ["--data.train", str(images), "--evaluation.train", str(images), "--evaluation.test", str(images)]
    return [sys.executable, "-m", "massl_fast", "train", "--recipe", str(recipe), "--run.folder", str(folder), *data]


def last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # the last may be half written
    return json.loads(lines[-1])["step"] if lines else -1


def repeatable(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without what the clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in rows]


def killed_at(step: int, arguments: list[str], folder: Path) -> int:
    """Run until ``step`` has been logged, then SIGKILL; returns the last step that was logged."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        while process.poll() is None and last_step(folder) < step:
            time.sleep(0.005)
        if process.poll() not in (None, 0):
            raise RuntimeError(process.stderr.read().decode())
    finally:
        process.kill()
        process.wait()
    return last_step(folder)


def compare(kills: int, workplace: Path, seed: int = 0) -> str:
    """Returns a sentence; AssertionError where the metrics differ."""
    images, recipe = workplace / "images", workplace / "recipe.yaml"
    write_images(images, classes=3, per_class=10)
    recipe.write_text(SETTINGS)
    subprocess.run(command(workplace / "whole", recipe, images), check=True, stdout=subprocess.DEVNULL)
    targets = sorted(random.Random(seed).sample(range(1, 40), kills))
    steps = [killed_at(target, command(workplace / "killed", recipe, images), workplace / "killed") for target in targets]
    subprocess.run(command(workplace / "killed", recipe, images), check=True, stdout=subprocess.DEVNULL)
    whole, killed = repeatable(workplace / "whole"), repeatable(workplace / "killed")
    assert len(whole) == 41, f"expected 41 rows, found {len(whole)}"
    for expected, found in zip(whole, killed, strict=True):
        assert expected == found, f"step {expected['step']}: {expected} != {found}"
    return f"{kills} kills, after steps {steps}: all {len(whole)} rows of metrics.jsonl equal, bit for bit"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(compare(int(sys.argv[1]) if len(sys.argv) > 1 else 5, Path(folder)))
