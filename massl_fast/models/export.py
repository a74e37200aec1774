"""`massl-fast export`: a backbone as a folder that timm loads, complete or absent.

    DIR/model.safetensors       weights by timm's names
    DIR/config.json             architecture, its arguments, image size, mean and deviation
    DIR/head/head.safetensors   the projection head, mlp.0 …, where the checkpoint has one; timm does not read it

``timm.create_model("local-dir:DIR", pretrained=True)`` gives the features, with ``num_classes=…`` a classifier on top. timm
before 1.0.26 cannot read safetensors from a local folder, and takes no second file of that kind beside the weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from massl_fast.models.published import HEAD_FILE, add_network_arguments, build_network, network_options, read_network, rebuild

TOLERANCE = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the backbone of a checkpoint as safetensors and a config that timm loads:\n"
        "timm.create_model('local-dir:DIR', pretrained=True)"
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="PATH", help="a checkpoint, a run's folder or a published .pth file"
    )
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to write; must not hold anything yet")
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher", help="network to write (default: teacher)")
    add_network_arguments(parser, position_embedding=False)


def run(args: argparse.Namespace) -> int:
    network = read_network(args.checkpoint, args.which)
    backbone, info = build_network(network, **network_options(args))
    for note in info["notes"] + export_backbone(backbone, info, args.to, head=network.head):
        print(note)
    size = info["image_size"]
    print(
        f"Wrote the {args.which} of {info['path']} ({info['architecture']}, {size} px, {backbone.feature_dim} features) to {args.to}.\n"
        f'It loads with timm.create_model("local-dir:{args.to}", pretrained=True); compared there, its features are the same.'
    )
    return 0


def export_backbone(backbone: nn.Module, info: dict[str, Any], to: Path, *, head: dict[str, Tensor] | None = None) -> list[str]:
    """Write ``backbone`` (from ``load_backbone``, with its ``info``) to the folder ``to``; returns what there is to say about it.

    The folder is written under another name, loaded through timm and compared, and then renamed. ValueError where ``to``
    already holds something, where the disk refuses, or where timm gives other features.
    """
    to = Path(os.path.abspath(to))
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} exists already. Name a folder that does not, so that nothing is overwritten.")
    partial = to.with_name(f".{to.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        if head:
            (partial / HEAD_FILE).parent.mkdir()
            save_file({name: tensor.contiguous() for name, tensor in head.items()}, partial / HEAD_FILE, metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(timm_config(backbone, info), indent=2) + "\n", encoding="utf-8")
        notes = _compare(backbone, info["image_size"], partial)
        os.replace(partial, to)
    except OSError as error:
        raise ValueError(f"{to} could not be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notes


def timm_config(backbone: nn.Module, info: dict[str, Any]) -> dict[str, Any]:
    """The config.json that timm reads from a local folder or a hub repository."""
    size, known = info["image_size"], getattr(backbone, "pretrained_cfg", {})
    model_args = backbone.timm_args["model_args"]
    flexible = "img_size" not in model_args or model_args.get("dynamic_img_size") or model_args.get("strict_img_size") is False
    # The module that pools knows how: a head, a layer, or the network itself where it pools in its own forward pass.
    holders = [getattr(getattr(backbone, "head", None), "global_pool", None), getattr(backbone, "global_pool", None)]
    pool = next((kind for kind in (getattr(holder, "pool_type", holder) for holder in holders) if isinstance(kind, str) and kind), None)
    # timm names the grid before pooling for the size of its own weights, and none for another size.
    known_size = tuple(known.get("input_size") or ())[1:] == (size, size)
    return {
        "architecture": info["architecture"],
        "num_classes": 0,
        "num_features": backbone.num_features,
        **({"global_pool": pool} if pool else {}),
        "model_args": model_args,
        "pretrained_cfg": {
            "tag": "massl_fast",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": not flexible,
            "interpolation": "bicubic",
            # Resized as for this project's own k-NN: to 256 for 224, and without a margin up to 64 pixels.
            "crop_pct": 1.0 if size <= 64 else 0.875,
            "crop_mode": "center",
            "mean": list(info["mean"]),
            "std": list(info["std"]),
            "num_classes": 0,
            "pool_size": known.get("pool_size") if known_size else None,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }


@torch.no_grad()
def _compare(backbone: nn.Module, size: int, folder: Path) -> list[str]:
    """Raises ValueError where timm gives other features than ``backbone``, apart from what it has no setting for: that is returned."""
    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except RuntimeError as error:
        raise ValueError(f"timm {timm.__version__} does not load this network again: {str(error).splitlines()[0]}") from None
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours, found, notes = copy.deepcopy(backbone).cpu().eval(), loaded(images), []
    expected = ours(images)
    if "layer_norm_epsilon" in backbone.timm_args:
        named = {name: value for name, value in backbone.timm_args.items() if name != "layer_norm_epsilon"}
        as_timm_builds_it = rebuild(named).eval()
        as_timm_builds_it.load_state_dict(ours.state_dict())
        exact, expected = expected, as_timm_builds_it(images)
        added = backbone.timm_args["layer_norm_epsilon"]
        notes.append(
            f"The norms of this network add {added:g} to the variance, and timm, which has no argument for it, another number: on noise, "
            f"features of the exported folder are {_difference(expected, exact):.1g} apart, relative to the largest."
        )
    if expected.shape != found.shape or not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise ValueError(
            f"timm {timm.__version__} loads this network, but its features differ from ours; nothing was written. "
            "Please report this with the architecture and model_args."
        )
    return notes


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
