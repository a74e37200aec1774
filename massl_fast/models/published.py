"""Networks out of checkpoints: of massl-fast, of its exports, and of other software (published MaSSL, DINO, timm).

Nothing is unpickled but tensors and the plain values around them, and every weight has to find its place: what is missing,
left over or of another shape is named in a ValueError. What is passed over on purpose (a classifier, a mask token) is stated
in the notes.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from massl_fast.models.backbone import build_backbone, patch_size
from massl_fast.models.checkpoint_files import DamagedCheckpoint, lacks_checksums, read_state, read_tensors
from massl_fast.models.packed import resampling_matrix

HEAD_FILE = Path("head/head.safetensors")
# Where other software keeps a single network; and tokens that only masked training needs.
SINGLE_NETWORK_KEYS = ("state_dict", "model")
MASK_TOKENS = ("mask_token", "masked_embed")


@dataclass
class Network:
    """One network of a checkpoint, as stored."""

    source: Path
    backbone: dict[str, Tensor]
    """Weights by timm's names."""
    head: dict[str, Tensor]
    """Weights of what followed the backbone, by the names they have below it (``mlp.0.weight`` for ours)."""
    timm_args: dict[str, Any] | None = None
    """``architecture``, ``model_args``, ``image_size``; None where the file does not say."""
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    notes: list[str] = field(default_factory=list)
    """Sentences for the user about what was assumed or passed over."""


def load_backbone(checkpoint: Path, *, arch: str | None = None, which: str = "teacher") -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of a checkpoint, in evaluation mode on the CPU, and what is known of it.

    ``checkpoint``: a checkpoint folder of a run, the run's folder (its last checkpoint is taken), a folder written by
    ``massl-fast export``, or a file of other software, for which ``arch`` names the architecture. ``which``: "teacher" or
    "student".

    The second value holds ``architecture``, ``image_size`` (pixels), ``mean``, ``std``, ``path`` and ``notes`` (sentences).
    Raises ValueError where the file cannot be read or does not fit.
    """
    return build_network(read_network(Path(checkpoint), which), arch=arch)


def build_network(network: Network, *, arch: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """What ``load_backbone`` returns, of a network that has been read."""
    if network.timm_args is None:
        if arch is None:
            raise ValueError(f"{network.source} does not say its architecture. Name it as timm does: --arch vit_small_patch16_224.")
        backbone = _build_like(arch, network)
    else:
        stored = network.timm_args["architecture"]
        if arch not in (None, stored):
            raise ValueError(f"{network.source} holds a {stored}, not a {arch}. Leave --arch out.")
        backbone = rebuild(network.timm_args)
    notes = network.notes + _fill(backbone, network)
    info = {
        "architecture": backbone.timm_args["architecture"],
        "image_size": backbone.timm_args["image_size"],
        "mean": network.mean,
        "std": network.std,
        "path": str(network.source),
        "notes": notes,
    }
    return backbone.eval(), info


def start_from(backbone: nn.Module, checkpoint: Path, *, which: str = "teacher") -> list[str]:
    """Put the weights of a checkpoint into ``backbone``, in place; returns what there is to say about it.

    Takes what ``load_backbone`` takes. Position embeddings of another grid are resampled; anything else that does not fit is a
    ValueError.
    """
    network = read_network(Path(checkpoint), which)
    first = f"Start from the backbone of the {which} in {network.source}; the projection head starts from random weights."
    return [first, *network.notes, *_fill(backbone, network)]


def rebuild(timm_args: dict[str, Any]) -> nn.Module:
    """The network that ``build_backbone`` described by its ``timm_args``, without drop path and with random weights.

    The arguments may come from a stranger's file: they pass the same checks as a user's.
    """
    model_args = {name: value for name, value in timm_args["model_args"].items() if name != "img_size"}
    return build_backbone(timm_args["architecture"], image_size=timm_args["image_size"], model_args=model_args)


def read_network(path: Path, which: str) -> Network:
    """Read the network ``which`` ("teacher" or "student") of a checkpoint in any of the forms ``load_backbone`` takes."""
    if which not in ("teacher", "student"):
        raise ValueError(f"A checkpoint holds a teacher and a student, no {which!r}.")
    if not path.exists():
        raise ValueError(f"There is no checkpoint {path}.")
    path, *earlier = _meant_by(path)
    if (path / "state.json").is_file():
        return _read_first_intact([path, *earlier], which)
    if (path / "config.json").is_file():
        return _read_export(path, which)
    if path.is_dir():
        raise ValueError(
            f"{path} holds no checkpoint: a checkpoint folder has a state.json, a run has checkpoints/last, an exported folder has a "
            "config.json."
        )
    return _read_file(path, which)


def _meant_by(path: Path) -> list[Path]:
    """From a run, its checkpoints or one of their pointers to the folder meant; behind the last one those before it, newest first."""
    for pointer in (path / "checkpoints" / "last", path / "last", path):
        if pointer.is_file() and pointer.name in ("last", "best"):
            # The last part alone: a pointer never leads out of the folder.
            target = pointer.parent / Path(pointer.read_text(encoding="utf-8", errors="replace").strip()).name
            if not target.is_dir():
                raise ValueError(f"{pointer} names {target.name}, which is not there. Name a checkpoint folder itself.")
            earlier = [folder for folder in target.parent.glob("step_*") if folder.name < target.name]
            return [target, *(sorted(earlier, reverse=True) if pointer.name == "last" else [])]
    return [path]


def _read_first_intact(folders: list[Path], which: str) -> Network:
    """The network of the first checkpoint whose bytes are those that were written; the notes name those passed over."""
    notes = []
    for folder in folders:
        try:
            network = _read_own(folder, which)
        except DamagedCheckpoint as error:
            if folder == folders[-1]:
                raise
            notes.append(f"{error} The one before is taken.")
        else:
            network.notes = notes + network.notes
            return network
    raise AssertionError("no folder was given")


def _read_own(path: Path, which: str) -> Network:
    state = read_state(path)
    tensors = {name.removeprefix(f"{which}/"): tensor for name, tensor in read_tensors(path, state, f"{which}/")}
    backbone, head = _split(tensors)
    if not backbone:
        raise ValueError(f"{path} holds no {which}.")
    network = Network(path, backbone, head, _checked_timm_args(state.get("timm_args"), path / "state.json"))
    if state.get("mean") and state.get("std"):
        network.mean, network.std = tuple(state["mean"]), tuple(state["std"])
    if lacks_checksums(state):
        network.notes.append(f"The checkpoint {path} carries no checksums (format 1): damage to its weights would not be noticed.")
    return network


def _read_export(path: Path, which: str) -> Network:
    config = _read_json(path / "config.json")
    stored = config.get("pretrained_cfg") if isinstance(config.get("pretrained_cfg"), dict) else {}
    timm_args = {
        "architecture": config.get("architecture"),
        "model_args": config.get("model_args", {}),
        "image_size": (stored.get("input_size") or [None])[-1],
    }
    head_file = path / HEAD_FILE
    return Network(
        path,
        _read_safetensors(path / "model.safetensors"),
        _read_safetensors(head_file) if head_file.is_file() else {},
        _checked_timm_args(timm_args, path / "config.json"),
        tuple(stored.get("mean") or IMAGENET_DEFAULT_MEAN),
        tuple(stored.get("std") or IMAGENET_DEFAULT_STD),
        [_one_network(path, which)],
    )


def _read_file(path: Path, which: str) -> Network:
    notes = [f"{path} does not say how images are normalised; the mean and deviation of ImageNet are taken."]
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    tensors = _tensors_of(content.get(which))
    if tensors is None and any(_tensors_of(content.get(name)) for name in ("teacher", "student")):
        raise ValueError(f"{path} holds no {which}, but {_listed(sorted(str(key) for key in content))}.")
    if tensors is None:
        candidates = [_tensors_of(content.get(key)) for key in SINGLE_NETWORK_KEYS]
        tensors = next((candidate for candidate in [*candidates, _tensors_of(content)] if candidate), None)
        notes.append(_one_network(path, which))
    if not tensors:
        raise ValueError(f"{path} holds no network that is known here, but {_listed(sorted(str(key) for key in content))}.")
    backbone, head = _split(tensors)
    return Network(path, backbone, head, notes=notes)


def _one_network(path: Path, which: str) -> str:
    return f"{path} holds one network only; it stands for the {which}."


def _checked_timm_args(timm_args: Any, file: Path) -> dict[str, Any]:
    kinds = {"architecture": str, "model_args": dict, "image_size": int}
    if not isinstance(timm_args, dict) or any(not isinstance(timm_args.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{file} does not say architecture, model_args and image_size of its network; it is damaged or not ours.")
    return timm_args


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} cannot be read: it holds a {type(content).__name__} where settings should be.")
    return content


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from None


def _read_pickle(file: Path) -> dict[Any, Any]:
    """What ``torch.save`` wrote, if it is tensors and plain values; DINO's files also hold their argparse namespace."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors and plain values ({str(error).strip().splitlines()[0]}), and loading that would run "
            "code from the file. Where you trust it, save its state dict alone and give that."
        ) from None
    except Exception as error:  # bytes that are no checkpoint fail in the unpickler in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{file} cannot be read as a PyTorch checkpoint ({reason}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dictionary of weights.")
    return content


def _tensors_of(content: Any) -> dict[str, Tensor] | None:
    """The tensors of a state dict, or None if this is none."""
    if not isinstance(content, dict):
        return None
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)} or None


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(backbone, what followed it) by their own names; what wrappers wrote before the names falls away."""
    tensors = {name.replace("module.", "").replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    if not any(name.startswith("backbone.") for name in tensors):
        return tensors, {}
    backbone = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    head = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if not name.startswith("backbone.")}
    return backbone, head


def _build_like(arch: str, network: Network) -> nn.Module:
    """A network of ``arch`` laid out for the image size that the file's position embeddings had."""
    size = timm.get_pretrained_cfg_value(arch, "input_size")[-1] if timm.is_model(arch) else 224
    backbone = build_backbone(arch, image_size=size)
    patch, grid = patch_size(backbone), _stored_grid(backbone, network)
    if patch and grid and patch * grid != size:
        backbone = build_backbone(arch, image_size=patch * grid)
    return backbone


def _prefix_length(backbone: nn.Module) -> int:
    return 0 if getattr(backbone, "no_embed_class", False) else getattr(backbone, "num_prefix_tokens", 0)


def _stored_grid(backbone: nn.Module, network: Network) -> int | None:
    """Side in patches of the stored position embeddings, where both networks have such and they are square."""
    stored, ours = network.backbone.get("pos_embed"), getattr(backbone, "pos_embed", None)
    if stored is None or ours is None or stored.ndim != 3 or stored.shape[0] != 1 or stored.shape[2:] != ours.shape[2:]:
        return None
    patches = stored.shape[1] - _prefix_length(backbone)
    side = math.isqrt(max(patches, 0))
    return side if side and side**2 == patches else None


@torch.no_grad()
def _fill(backbone: nn.Module, network: Network) -> list[str]:
    """Copy the stored weights into ``backbone``; returns what was passed over or resampled, raises ValueError for the rest."""
    ours = backbone.state_dict()
    stored = dict(network.backbone)
    notes = []
    passed_over = sorted(name for name in _optional_names(backbone, stored) if name not in ours)
    for name in passed_over:
        del stored[name]
    if passed_over:
        notes.append(f"Of {network.source}, {_listed(passed_over)} is not used.")

    grid = _stored_grid(backbone, network)
    built_for = tuple(getattr(getattr(backbone, "patch_embed", None), "grid_size", None) or ())
    if grid and built_for and (grid, grid) != built_for:
        stored["pos_embed"] = _resampled(stored["pos_embed"], (grid, grid), built_for, _prefix_length(backbone))
        notes.append(f"Position embeddings were resampled from {grid}×{grid} to {built_for[0]}×{built_for[1]} patches.")

    missing, besides = sorted(ours.keys() - stored.keys()), sorted(stored.keys() - ours.keys())
    shapes = [
        f"{name} {tuple(stored[name].shape)} for {tuple(ours[name].shape)}"
        for name in sorted(ours.keys() & stored.keys())
        if stored[name].shape != ours[name].shape
    ]
    problems = [("it lacks", missing), ("it has besides", besides), ("shapes differ:", shapes)]
    if any(names for _, names in problems):
        found = "; ".join(f"{what} {_listed(names)}" for what, names in problems if names)
        raise ValueError(
            f"{network.source} is of another architecture than {backbone.timm_args['architecture']} as set here: {found}. "
            "Name the architecture (and model_args) it was made with."
        )
    for name, tensor in ours.items():
        tensor.copy_(stored[name])
    return notes


def _optional_names(backbone: nn.Module, stored: dict[str, Tensor]) -> Iterator[str]:
    """Names that a feature extractor has no use for: mask tokens and the classifier."""
    classifiers = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    for name in stored:
        if name in MASK_TOKENS or any(name.startswith(f"{classifier}.") for classifier in classifiers):
            yield name


def _resampled(position: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    matrix = resampling_matrix(old, new, position.device, torch.float32)
    patches = (matrix @ position[:, prefix:].float()).to(position.dtype)
    return torch.cat([position[:, :prefix], patches], dim=1)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
