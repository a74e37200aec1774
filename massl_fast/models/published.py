"""Networks out of checkpoints: of massl-fast, of its exports, and of other software (docs/checkpoints.md).

Files of others are read as data, and every weight has to find its place: what is missing, left over or of another shape is named in a
ValueError. What is passed over on purpose (a classifier, a mask token) is stated in the notes, and what the weights cannot tell (the
number of attention heads) is known from the source or stated first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from massl_fast.config import parsed_yaml
from massl_fast.models import positions
from massl_fast.models.backbone import build_backbone, patch_size
from massl_fast.models.checkpoint_files import DamagedCheckpoint, lacks_checksums, read_state, read_tensors
from massl_fast.models.foreign_file import ForeignFile, tensors_of
from massl_fast.models.key_layouts import Chosen, choose, known_heads, model_args, stored_grid, timm_names
from massl_fast.models.packed import resampling_matrix

HEAD_FILE = Path("head/head.safetensors")


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
    chosen: Chosen | None = None
    """Where a file of other software holds it; None for our own."""


POSITION_EMBEDDINGS = ("timm", "dino")
"""Whose resampling of position embeddings is taken at sizes other than the stored one; see ``positions``."""


def add_network_arguments(parser: argparse.ArgumentParser, *, position_embedding: bool = True) -> None:
    """The options that ``network_options`` reads: what a foreign file does not say of its network."""
    parser.add_argument("--arch", metavar="NAME", help="timm name of the network, for checkpoints that do not say it")
    parser.add_argument(
        "--model-args",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="further arguments of timm's network beside --arch, such as num_heads=12 init_values=1e-5",
    )
    if position_embedding:
        parser.add_argument(
            "--position-embedding",
            choices=POSITION_EMBEDDINGS,
            default="timm",
            help="how position embeddings are resampled at another image size: as timm does, or as DINO's code does (default: timm)",
        )


def network_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``load_backbone`` from the options of ``add_network_arguments``; raises ValueError for one that is no KEY=VALUE."""
    model_args = {}
    for entry in args.model_args:
        key, equals, text = entry.partition("=")
        if not key.isidentifier() or not equals:
            raise ValueError(f"--model-args takes KEY=VALUE, such as num_heads=12, not {entry!r}.")
        model_args[key] = parsed_yaml(text, f"The value of --model-args {key}, {text!r},")
    options = {"arch": args.arch, "model_args": model_args, "position_embedding": getattr(args, "position_embedding", "timm")}
    return options | ({"image_size": args.image_size} if getattr(args, "image_size", None) else {})


def load_backbone(checkpoint: Path, *, which: str = "teacher", **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of a checkpoint, in evaluation mode on the CPU, and what is known of it.

    ``checkpoint``: a checkpoint folder of a run, the run's folder (its last checkpoint is taken), a folder written by
    ``massl-fast export``, or a file of other software. ``which``: "teacher" or "student". ``options``: those of ``build_network``.

    The second value holds ``architecture``, ``image_size`` (pixels), ``mean``, ``std``, ``path``, ``notes`` (sentences) and ``assumed``,
    the first of the notes: what decides over the features and that the file does not tell.
    Raises ValueError where the file cannot be read or does not fit.
    """
    return build_network(read_network(Path(checkpoint), which), **options)


def build_network(
    network: Network,
    *,
    arch: str | None = None,
    model_args: dict[str, Any] | None = None,
    image_size: int | None = None,
    position_embedding: str = "timm",
) -> tuple[nn.Module, dict[str, Any]]:
    """What ``load_backbone`` returns, of a network that has been read.

    ``arch``, ``model_args``: timm's name of the network and further arguments, for a file that does not say its architecture.
    ``image_size``: side of the images it will be given, pixels; None: that of the checkpoint. ``position_embedding``: "timm" or "dino".
    """
    if network.timm_args is None:
        if arch is None:
            said = f" Its arguments call it {network.chosen.architecture}." if network.chosen and network.chosen.architecture else ""
            raise ValueError(f"{network.source} does not say its architecture.{said} Name it as timm does: --arch vit_small_patch16_224.")
        backbone, assumed = _build_like(arch, model_args or {}, network)
    else:
        stored = network.timm_args["architecture"]
        if arch not in (None, stored):
            raise ValueError(f"{network.source} holds a {stored}, not a {arch}. Leave --arch out.")
        if model_args:
            raise ValueError(f"{network.source} says how its {stored} is built. Leave --model-args out.")
        backbone, assumed = rebuild(network.timm_args), []
    notes = [*assumed, *network.notes, *_fill(backbone, network)]
    notes += positions.prepare(backbone, image_size or backbone.timm_args["image_size"], position_embedding)
    if isinstance(backbone, SwinTransformer) and network.timm_args is None:
        notes += _swin_windows(backbone, image_size or backbone.timm_args["image_size"])
    info = {
        "architecture": backbone.timm_args["architecture"],
        "image_size": image_size or backbone.timm_args["image_size"],
        "mean": network.mean,
        "std": network.std,
        "path": str(network.source),
        "notes": notes,
        "assumed": assumed,
    }
    return backbone.eval(), info


def start_from(backbone: nn.Module, checkpoint: Path, *, which: str = "teacher") -> list[str]:
    """Put the weights of a checkpoint into ``backbone``, in place; returns what there is to say about it.

    Takes what ``load_backbone`` takes. Position embeddings of another grid are resampled; anything else that does not fit is a
    ValueError, a number of attention heads that the file tells otherwise included.
    """
    network = read_network(Path(checkpoint), which)
    heads = _heads_of(backbone)
    assumed = []
    if network.chosen and heads:
        tensors, _ = timm_names(network.backbone, set(backbone.state_dict()))
        known = known_heads(network.chosen, tensors)
        if known and known[0] != heads:
            raise ValueError(
                f"{network.source} is of a network of {known[0]} attention heads ({known[1]}), and the one set here has {heads}. "
                f"Set --model.model_args.num_heads {known[0]}."
            )
        if not known:
            assumed = [f"The run's {heads} attention heads are taken: {network.source} does not tell how many its network has."]
    if isinstance(backbone, SwinTransformer) and network.chosen and network.chosen.project == "DINO's kind":
        assumed.append("The run keeps timm's 1e-5 in its norms, where iBOT's and MaSSL's Swin have 1e-6; timm has no argument for it.")
    first = f"Start from the backbone of the {which} in {network.source}; the projection head starts from random weights."
    return [*assumed, first, *network.notes, *_fill(backbone, network)]


def rebuild(timm_args: dict[str, Any]) -> nn.Module:
    """The network that ``build_backbone`` described by its ``timm_args``, without drop path and with random weights.

    The arguments may come from a stranger's file: they pass the same checks as a user's.
    """
    model_args = {name: value for name, value in timm_args["model_args"].items() if name != "img_size"}
    backbone = build_backbone(timm_args["architecture"], image_size=timm_args["image_size"], model_args=model_args)
    if timm_args.get("layer_norm_epsilon"):
        _set_norms(backbone, float(timm_args["layer_norm_epsilon"]))
    if timm_args.get("position_embedding"):
        positions.prepare(backbone, timm_args["image_size"], timm_args["position_embedding"])
    return backbone


def read_network(path: Path, which: str) -> Network:
    """Read the network ``which`` ("teacher" or "student") of a checkpoint in any of the forms ``load_backbone`` takes."""
    if which not in ("teacher", "student"):
        raise ValueError(f"A checkpoint holds a teacher and a student, no {which!r}.")
    if not path.exists():
        raise ValueError(f"There is no checkpoint {path}. Name a run's folder, a checkpoint's or a file of other software.")
    path, *earlier = _meant_by(path)
    if (path / "state.json").is_file() or earlier:
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
    """Checkpoint folders that a run, its checkpoints or one of their pointers means: the last one, then those before it, newest first."""
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


def read_linear_head(path: Path) -> tuple[Tensor, Tensor]:
    """(weight [classes, features], bias [classes]) float32 of a linear classifier: a safetensors file, or what ``torch.save`` wrote,
    such as the linear probes of DINO and iBOT (``state_dict`` with ``module.linear.weight``).

    Raises ValueError where the file cannot be read or holds another number of linear layers than one.
    """
    if path.suffix == ".safetensors":
        return _only_linear(path, _read_safetensors(path), lambda tensor: tensor)
    with ForeignFile(path) as file:
        content = file.content.get("state_dict", file.content) if isinstance(file.content, dict) else {}
        return _only_linear(path, tensors_of(content) or {}, file.tensor)


def _only_linear(path: Path, stored: dict[str, Any], read: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    layers = [
        (tensor, stored[name.removesuffix("weight") + "bias"])
        for name, tensor in stored.items()
        if name.endswith("weight") and len(tensor.shape) == 2 and name.removesuffix("weight") + "bias" in stored
    ]
    if len(layers) != 1 or tuple(layers[0][1].shape) != (layers[0][0].shape[0],):
        held = _listed(sorted(stored)) if stored else "no tensors"
        raise ValueError(f"{path} should hold one linear layer, weight [classes, features] and bias [classes], but holds {held}.")
    weight, bias = (read(part).float() for part in layers[0])
    return weight, bias


def _read_file(path: Path, which: str) -> Network:
    notes = [f"{path} does not say how images are normalised; the mean and deviation of ImageNet are taken."]
    if path.suffix == ".safetensors":
        return _network_of(path, which, _read_safetensors(path), _plain_tensors, lambda tensor: tensor, notes)
    with ForeignFile(path) as file:
        if not isinstance(file.content, dict):
            raise ValueError(f"{path} holds a {type(file.content).__name__}, not a dictionary of weights.")
        return _network_of(path, which, file.content, tensors_of, file.tensor, notes)


def _network_of(
    path: Path, which: str, content: dict[Any, Any], tensors_of: Callable[..., Any], read: Callable[[Any], Tensor], notes: list[str]
) -> Network:
    held = _listed(sorted(str(key) for key in content))
    try:
        chosen = choose(content, which, tensors_of)
    except ValueError as error:
        raise ValueError(f"{path} {error}, but {held}.") from None
    if chosen is None:
        raise ValueError(f"{path} holds no network that is known here, but {held}.")
    if chosen.single:
        notes.append(_one_network(path, which))
    elif chosen.prefix:
        notes.append(f"The {which} is {chosen.prefix.removesuffix('.')} of {path} ({chosen.project}).")
    if chosen.aside:
        notes.append(f"Of {path}, {_listed(chosen.aside)} is left aside.")
    backbone, head = ({name: read(stored) for name, stored in part.items()} for part in (chosen.backbone, chosen.head))
    return Network(path, backbone, head, notes=notes, chosen=chosen)


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


def _plain_tensors(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, dict):
        return None
    return {name: value for name, value in content.items() if isinstance(value, Tensor)} or None


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(backbone, projection head) of our own checkpoint."""
    backbone = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    head = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if not name.startswith("backbone.")}
    return backbone, head


def _build_like(arch: str, chosen_args: dict[str, Any], network: Network) -> tuple[nn.Module, list[str]]:
    """(a network of ``arch`` laid out for what the file holds, what had to be assumed for it)."""
    size = timm.get_pretrained_cfg_value(arch, "input_size")[-1] if timm.is_model(arch) else 224
    skeleton = _skeleton(arch, size, chosen_args)
    ours = set(skeleton.state_dict())
    tensors = _renamed(network, ours)[0]
    found = model_args(tensors, ours)
    known = known_heads(network.chosen, tensors)
    heads, notes = _heads_of(skeleton), []
    if heads and "num_heads" not in chosen_args:
        if known and known[0] != heads:
            found["num_heads"] = known[0]
            notes.append(f"{arch} is built with {known[0]} attention heads, not timm's {heads}: {known[1]}.")
        elif not known:
            notes.append(
                f"{arch} is taken with timm's {heads} attention heads: {network.source} does not tell how many its network has, and "
                "another number gives other features. --model-args num_heads=N sets it."
            )
    elif heads and known and known[0] != heads:
        notes.append(f"{arch} is built with {heads} attention heads, as --model-args says. The file's own are {known[0]}: {known[1]}.")
    args = {**found, **chosen_args}
    if found:
        skeleton = _skeleton(arch, size, args)
    patch, grid = patch_size(skeleton), _stored_grid(skeleton, tensors)
    backbone = build_backbone(arch, image_size=patch * grid if patch and grid else size, model_args=args)
    if isinstance(backbone, SwinTransformer):
        notes += _swin_norms(backbone, network)
    return backbone, notes


def _skeleton(arch: str, size: int, args: dict[str, Any]) -> nn.Module:
    """The network without values, which costs no drawing of random ones; whole where it cannot be built so."""
    try:
        with torch.device("meta"):
            return build_backbone(arch, image_size=size, model_args=args)
    except ValueError:
        return build_backbone(arch, image_size=size, model_args=args)


def _renamed(network: Network, ours: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    try:
        return timm_names(network.backbone, ours)
    except ValueError as error:
        raise ValueError(f"{network.source} {error}; it is of no layout that is known here.") from None


def _heads_of(backbone: nn.Module) -> int | None:
    """Attention heads of a vision transformer that has as many in each block; None for other networks, whose weights tell."""
    if not hasattr(backbone, "blocks") or not hasattr(backbone, "cls_token"):
        return None
    counts = {getattr(getattr(block, "attn", None), "num_heads", None) for block in backbone.blocks}
    return counts.pop() if len(counts) == 1 else None


def _swin_norms(backbone: nn.Module, network: Network) -> list[str]:
    """iBOT and MaSSL build Swin with 1e-6 in its norms, timm and Microsoft with 1e-5; timm has no argument for it."""
    if network.chosen.project != "DINO's kind":
        return [f"timm's 1e-5 is taken for the norms' epsilon: {network.source} does not tell it, and iBOT's Swin has 1e-6."]
    _set_norms(backbone, 1e-6)
    return []


def _swin_windows(backbone: SwinTransformer, image_size: int) -> list[str]:
    """Where windows do not divide a map, timm shifts and then pads; the code of iBOT and MaSSL pads and then shifts."""
    side = image_size // backbone.patch_embed.patch_size[0]
    windows = [(-(-side // 2**index), layer.blocks[-1]) for index, layer in enumerate(backbone.layers)]
    if all(side % block.window_size[0] == 0 for side, block in windows):
        return []
    return [
        f"At {image_size} px the windows of Swin do not divide its maps: features differ from those of iBOT's code, which pads elsewhere."
    ]


def _set_norms(backbone: nn.Module, epsilon: float) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = epsilon
    backbone.timm_args["layer_norm_epsilon"] = epsilon


def _prefix_length(backbone: nn.Module) -> int:
    return 0 if getattr(backbone, "no_embed_class", False) else getattr(backbone, "num_prefix_tokens", 0)


def _stored_grid(backbone: nn.Module, tensors: dict[str, Tensor]) -> int | None:
    """Side in patches of the stored position embeddings, where both networks have such and they are square."""
    stored, ours = tensors.get("pos_embed"), getattr(backbone, "pos_embed", None)
    if stored is None or ours is None or stored.shape[2:] != ours.shape[2:]:
        return None
    return stored_grid(tensors, _prefix_length(backbone)) or (stored_grid(tensors, 1) if _adds_class_position(backbone, tensors) else None)


def _adds_class_position(backbone: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Whether the file keeps a position of the class token, which timm has added to the token itself (DINOv2 with registers)."""
    return "reg_token" in tensors and _prefix_length(backbone) == 0 and stored_grid(tensors, 0) is None


@torch.no_grad()
def _fill(backbone: nn.Module, network: Network) -> list[str]:
    """Copy the stored weights into ``backbone``; returns what was passed over or resampled, raises ValueError for the rest."""
    ours = backbone.state_dict()
    stored, passed_over = _renamed(network, set(ours))
    notes = []
    passed_over = sorted([*passed_over, *(name for name in _classifier_names(backbone, stored) if name not in ours)])
    for name in passed_over:
        stored.pop(name, None)
    if passed_over:
        notes.append(f"Of {network.source}, {_listed(_parts(passed_over))} is not used.")

    grid = _stored_grid(backbone, stored)
    if _adds_class_position(backbone, stored) and grid:
        stored["cls_token"] = stored["cls_token"] + stored["pos_embed"][:, :1]
        stored["pos_embed"] = stored["pos_embed"][:, 1:]
    built_for = tuple(getattr(getattr(backbone, "patch_embed", None), "grid_size", None) or ())
    if grid and built_for and (grid, grid) != built_for:
        stored["pos_embed"] = _resampled(stored["pos_embed"], (grid, grid), built_for, _prefix_length(backbone))
        notes.append(f"Position embeddings were resampled from {grid}×{grid} to {built_for[0]}×{built_for[1]} patches, as timm does.")

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
            "Name the architecture it was made with (--arch), and what it was built with besides (--model-args)."
        )
    for name, tensor in ours.items():
        tensor.copy_(stored[name])
    return notes


def _classifier_names(backbone: nn.Module, stored: dict[str, Tensor]) -> Iterator[str]:
    classifiers = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    for name in stored:
        if any(name.startswith(f"{classifier}.") for classifier in classifiers):
            yield name


def _parts(names: list[str]) -> list[str]:
    """The names, those of a decoder as one."""
    return list(dict.fromkeys("the decoder (decoder_*)" if name.startswith("decoder") else name for name in names))


def _resampled(position: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    matrix = resampling_matrix(old, new, position.device, torch.float32)
    patches = (matrix @ position[:, prefix:].float()).to(position.dtype)
    return torch.cat([position[:, :prefix], patches], dim=1)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
