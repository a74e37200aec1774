"""`massl-fast eval knn`: k-NN accuracy of a checkpoint, with the untrained network and raw pixels beside it."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from massl_fast.data.loaders import open_data
from massl_fast.evaluation.features import FeatureFunction, raw_pixels
from massl_fast.evaluation.knn import DEFAULT_KS, KnnEvaluator
from massl_fast.hardware import chosen_device
from massl_fast.models.published import load_backbone, rebuild

UNTRAINED_SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Weighted k-NN: every test image takes the class that its k nearest training images vote for,\n"
        "by cosine similarity of frozen features. The untrained network and raw pixels stand beside.\n"
        "DATA is a folder of class folders, WebDataset tars (path/train-{000..003}.tar), or `demo`."
    )
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="PATH", help="a checkpoint folder, or a published .pth file")
    parser.add_argument("--train", required=True, metavar="DATA", help="labelled images that vote")
    parser.add_argument("--test", required=True, metavar="DATA", help="labelled images that are classified")
    parser.add_argument(
        "--which", choices=("teacher", "student", "both"), default="both", help="networks of the checkpoint (default: both)"
    )
    parser.add_argument("--k", type=int, nargs="+", default=list(DEFAULT_KS), help="numbers of neighbours (default: 10 20 100 200)")
    parser.add_argument("--temperature", type=float, default=0.07, help="votes weigh exp(similarity / temperature) (default: 0.07)")
    parser.add_argument("--image-size", type=int, help="side of the images, pixels (default: that of the checkpoint's global crops)")
    parser.add_argument("--arch", metavar="NAME", help="timm name of the network, for checkpoints that do not say it")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time (default: 256)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode images (default: 0, this one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    device = chosen_device(args.device)
    networks, info = networks_of(args.checkpoint, args.which, args.arch)
    networks["untrained"] = untrained(next(iter(networks.values())))
    functions: dict[str, FeatureFunction] = {name: network.to(device) for name, network in networks.items()}
    image_size = args.image_size or info["image_size"]
    evaluator = KnnEvaluator(
        open_data(args.train, "--train", "train"),
        open_data(args.test, "--test", "test"),
        image_size=image_size,
        device=device,
        mean=info["mean"],
        std=info["std"],
        ks=args.k,
        temperature=args.temperature,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    percents = evaluator.evaluate_all({**functions, "raw pixels": raw_pixels})
    result = {
        "checkpoint": str(args.checkpoint),
        "architecture": info["architecture"],
        "image_size": image_size,
        "temperature": args.temperature,
        "train": {"data": args.train, "images": len(evaluator.train.labels)},
        "test": {"data": args.test, "images": len(evaluator.test.labels)},
        "notes": info["notes"] + evaluator.notes,
        "unreadable": evaluator.unreadable,
        "knn_percent": percents,
    }
    if args.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    return 0


def networks_of(checkpoint: Path, which: str, arch: str | None) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """({name: network}, what is known of the checkpoint). Of "both", a student that the checkpoint lacks is noted and left out."""
    first = "student" if which == "student" else "teacher"
    network, info = load_backbone(checkpoint, arch=arch, which=first)
    networks = {first: network}
    if which == "both":
        try:
            student, _ = load_backbone(checkpoint, arch=arch, which="student")
        except ValueError as reason:
            info["notes"] = [*info["notes"], f"Without a student: {reason}"]
        else:
            weights = student.state_dict()
            if not all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items()):
                networks["student"] = student
            else:
                info["notes"] = [*info["notes"], f"Student and teacher of {checkpoint} are the same network; it is shown once."]
    return networks, info


def untrained(network: nn.Module) -> nn.Module:
    """The same network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        return rebuild(network.timm_args)


def _print_table(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table()
    table.add_column("features of")
    rows = result["knn_percent"]
    for k in next(iter(rows.values())):
        table.add_column(f"k = {k}", justify="right")
    for name, percents in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in percents.values()))
    say = partial(console.print, markup=False, soft_wrap=True)
    say(f"k-NN accuracy, %: {result['architecture']} at {result['image_size']} px")
    console.print(table)
    test, train = result["test"], result["train"]
    say(f"{test['images']} test images of {test['data']}, classified by {train['images']} training images of {train['data']}.")
    for note in result["notes"]:
        say(note)
    if names := result["unreadable"]:
        shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
        say(f"{len(names)} of these images could not be read and were left out: {shown}")
