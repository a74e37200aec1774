"""A training run of two steps on sixteen small images, as tests of several rooms start it."""

from __future__ import annotations

from pathlib import Path

from massl_fast.cli import main

TINY = [
    *("--recipe", "demo", "--data.loader", "torchvision", "--data.num_workers", "0", "--logging.tensorboard", "false"),
    *("--model.architecture", "vit_tiny_patch16_224", "--model.model_args", "{patch_size: 4, depth: 1, num_heads: 2, embed_dim: 32}"),
    *("--crops.global_size", "16", "--crops.local_size", "8", "--crops.num_local", "1", "--model.head_hidden_dim", "16"),
    *("--objective.memory_size", "32", "--objective.block_size", "16", "--train.global_batch", "8", "--train.steps", "2"),
    *("--optimizer.warmup_epochs", "0", "--evaluation.image_size", "16", "--evaluation.ks", "[3]", "--evaluation.every_epochs", "0"),
]


def train(folder: Path, images: Path, *settings: str) -> int:
    data = ["--data.train", str(images), "--evaluation.train", str(images), "--evaluation.test", str(images)]
    return main(["train", *TINY, "--run.folder", str(folder / "run"), *data, *settings])
