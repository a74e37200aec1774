"""Where the projects of the field keep a network in their checkpoints, and how its weights are called there.

``choose`` picks one network out of what a file holds; ``timm_names`` gives its weights timm's names; ``known_heads`` and ``model_args``
tell what the names, the arguments and the fixed position embeddings say about how the network is built. Nothing is guessed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SINGLE_NETWORK_KEYS = ("state_dict", "model", "model_state_dict")
"""Where other software keeps a single network."""
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What wrappers for distributed training, torch.compile and FSDP write into names."""

VIT_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280, "giant": 1536}
OF_64 = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 24}
"""Heads by width in the vision transformers of DINO, iBOT, MaSSL, DINOv2 and solo-learn: 64 channels per head."""
OF_FIXED_POSITIONS = {192: 12, 384: 12, 768: 12, 1024: 16, 1280: 16}
"""Heads by width where position embeddings are fixed: MoCo-v3, MAE and what solo-learn made of them."""


@dataclass(frozen=True)
class Pair:
    """A project that keeps teacher and student in one state dict, under prefixes."""

    project: str
    teacher: str
    student: str
    teacher_heads: tuple[str, ...]
    """Prefixes of the projection head beside the teacher; those of the student are ``student_heads``."""
    student_heads: tuple[str, ...]


PAIRS = (
    Pair("MoCo-v3", "momentum_encoder.", "base_encoder.", (), ()),
    Pair("solo-learn", "momentum_backbone.", "backbone.", ("momentum_projector.", "momentum_head."), ("projector.", "head.")),
    # solo-learn before version 1.0.5.
    Pair("solo-learn", "momentum_encoder.", "encoder.", ("momentum_projector.", "momentum_head."), ("projector.", "head.")),
)


@dataclass
class Chosen:
    """One network of a file, by the names it has there below its prefix."""

    backbone: dict[str, Any]
    head: dict[str, Any]
    project: str = ""
    """Whose layout it is; empty where the names do not tell."""
    aside: list[str] = field(default_factory=list)
    """What else the state dict holds, by the first part of its names."""
    prefix: str = ""
    """What its names begin with; empty where they do not."""
    single: bool = False
    """The file holds one network, which stands for teacher and student alike."""
    architecture: str = ""
    """What the arguments in the file call the network (vit_small); empty where there are none."""


def choose(content: Mapping[Any, Any], which: str, tensors_of: Any) -> Chosen | None:
    """The network ``which`` ("teacher" or "student") of a file that holds ``content``, or None where no network is known in it.

    ``tensors_of`` gives the tensors of a state dict, or None where it is none. Raises ValueError, in the middle of a sentence, where the
    file holds the other network alone.
    """
    arguments = content.get("args") if isinstance(content.get("args"), Mapping) else {}
    architecture = str(arguments.get("arch") or content.get("arch") or arguments.get("model") or "")
    tensors = tensors_of(content.get(which))
    if tensors is None and any(tensors_of(content.get(name)) for name in ("teacher", "student")):
        raise ValueError(f"holds no {which}")
    if tensors is not None:
        return _beside_its_head(_unwrapped(tensors), "DINO's kind", architecture)
    candidates = [tensors_of(content.get(key)) for key in SINGLE_NETWORK_KEYS]
    tensors = next((candidate for candidate in [*candidates, tensors_of(content)] if candidate), None)
    if tensors is None:
        return None
    tensors = _unwrapped(tensors)
    lightning = "pytorch-lightning_version" in content or any(name.startswith("classifier.") for name in tensors)
    for pair in PAIRS:
        teacher, student = (any(name.startswith(prefix) for name in tensors) for prefix in (pair.teacher, pair.student))
        if pair.project == "MoCo-v3" and any(name.startswith("encoder.") for name in tensors):
            continue
        if teacher or (student and (pair.project == "MoCo-v3" or lightning)):
            return _of_pair(tensors, pair, which, architecture, teacher and student)
    chosen = _beside_its_head(tensors, "", architecture)
    chosen.single = True
    return chosen


def _unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for name, tensor in tensors.items():
        for wrapper in reversed(WRAPPERS):
            name = name.replace(wrapper, "")
        if name in result:
            raise ValueError(f"names {name} twice, once inside a wrapper")
        result[name] = tensor
    return result


def _below(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _beside_its_head(tensors: dict[str, Any], project: str, architecture: str) -> Chosen:
    """``backbone.`` and what followed it, or a bare backbone."""
    backbone = _below(tensors, "backbone.")
    if not backbone:
        return Chosen(tensors, {}, project, architecture=architecture)
    rest = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if not name.startswith("backbone.")}
    return Chosen(backbone, rest, project, architecture=architecture)


def _of_pair(tensors: dict[str, Any], pair: Pair, which: str, architecture: str, both: bool) -> Chosen:
    prefix = pair.teacher if which == "teacher" else pair.student
    backbone = _below(tensors, prefix)
    if not backbone and both:
        raise ValueError(f"holds no {which}")
    if not backbone:
        prefix = pair.student if which == "teacher" else pair.teacher
        backbone, which = _below(tensors, prefix), "student" if which == "teacher" else "teacher"
    heads = pair.teacher_heads if which == "teacher" else pair.student_heads
    if not heads:
        # MoCo-v3 puts its projection head in the place of the classifier.
        own = [name for name in backbone if re.match(r"(head|fc)\.\d", name)]
        head = {name.split(".", 1)[1]: backbone.pop(name) for name in own}
        heads = (prefix,)
    else:
        head = {name: tensor for own in heads for name, tensor in _below(tensors, own).items()}
    used = (prefix, *heads)
    aside = sorted({name.split(".", 1)[0] for name in tensors if not name.startswith(used)})
    return Chosen(backbone, head, pair.project, aside, prefix, not both, architecture)


def timm_names(tensors: Mapping[str, Any], ours: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The weights by timm's names, and the names of those that a feature extractor has no use for.

    ``ours``: the names in the network that is filled. Renames what projects call otherwise: DINOv2's chunks of blocks, registers and
    SwiGLU, iBOT's layer scale, the downsampling of Swin, which timm counts to the next stage. Raises ValueError, in the middle of a
    sentence, where two weights come to one name.
    """
    is_transformer = "cls_token" in tensors and "cls_token" in ours
    is_swin = any(name.startswith("layers.0.downsample.") for name in tensors)
    renamed, aside = {}, []
    for name, tensor in tensors.items():
        new = name
        if name not in ours:
            if name.startswith(("decoder_", "decoder.")) or name in ("mask_token", "masked_embed"):
                aside.append(name)
                continue
            if is_transformer:
                new = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", new)
                new = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", new)
                new = new.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
                new = "reg_token" if new == "register_tokens" else new
        if is_swin:
            if name.endswith((".relative_position_index", ".attn_mask")):
                continue  # not learned: timm computes them
            new = re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample.", new)
        if new in renamed:
            raise ValueError(f"names {new} twice")
        renamed[new] = tensor
    return renamed, aside


def model_args(tensors: Mapping[str, Any], ours: set[str]) -> dict[str, Any]:
    """timm's arguments that the names alone tell, where a network of the named architecture lacks or has what they have not.

    ``tensors``: by timm's names; ``ours``: the names in the architecture as timm builds it.
    """
    found: dict[str, Any] = {}
    if "blocks.0.attn.qkv.weight" not in ours:
        return found
    if "fc_norm.weight" in tensors and "fc_norm.weight" not in ours and "norm.weight" not in tensors:
        found["global_pool"] = "avg"
    if "blocks.0.ls1.gamma" in tensors and "blocks.0.ls1.gamma" not in ours:
        found["init_values"] = 1e-5
    if "reg_token" in tensors and "reg_token" not in ours and tensors["reg_token"].shape[2:] == tensors["cls_token"].shape[2:]:
        found |= {"reg_tokens": tensors["reg_token"].shape[1], "no_embed_class": True}
    if "blocks.0.attn.qkv.bias" not in tensors and "blocks.0.attn.qkv.bias" in ours and "blocks.0.attn.qkv.weight" in tensors:
        found["qkv_bias"] = False
    return found


def known_heads(chosen: Chosen, tensors: Mapping[str, Tensor]) -> tuple[int, str] | None:
    """(number of attention heads, how that is known), or None where the file does not tell.

    ``tensors``: by timm's names.
    """
    if "blocks.0.attn.qkv.weight" not in tensors or "cls_token" not in tensors or tensors["cls_token"].ndim != 3:
        return None
    width = tensors["cls_token"].shape[-1]
    by_width = None
    if layout := fixed_positions(tensors.get("pos_embed")):
        by_width, reason = OF_FIXED_POSITIONS, f"the position embeddings are the fixed ones of {layout}"
    elif chosen.project == "MoCo-v3":
        by_width, reason = OF_FIXED_POSITIONS, "the names of the weights are MoCo-v3's"
    elif chosen.project == "solo-learn":
        by_width, reason = OF_64, "the names of the weights are solo-learn's"
    elif chosen.project == "DINO's kind" and VIT_WIDTHS.get(chosen.architecture.split("_")[-1]) == width:
        by_width, reason = OF_64, f"its arguments say {chosen.architecture}"
    elif "blocks.0.ls1.gamma" in tensors and ("mask_token" in chosen.backbone or "register_tokens" in chosen.backbone):
        by_width, reason = OF_64, "the names of the weights are DINOv2's"
    return (by_width[width], reason) if by_width and width in by_width else None


def stored_grid(tensors: Mapping[str, Any], prefix_tokens: int) -> int | None:
    """Side in patches of square position embeddings, after ``prefix_tokens`` entries for other tokens; None without such."""
    stored = tensors.get("pos_embed")
    if stored is None or len(stored.shape) != 3 or stored.shape[0] != 1:
        return None
    patches = max(stored.shape[1] - prefix_tokens, 0)
    side = math.isqrt(patches)
    return side if side and side**2 == patches else None


def fixed_positions(embeddings: Tensor | None) -> str | None:
    """ "MoCo-v3" or "MAE" where position embeddings are the fixed ones of that code, sines and cosines of row and column; else None.

    Both take D/4 frequencies 10000^(-4i/D) and concatenate sine and cosine of one axis and then of the other, with zeros for the class
    token. MoCo-v3 begins with the row (vits.py, build_2d_sincos_position_embedding), MAE with the column (util/pos_embed.py).
    """
    if embeddings is None or not (side := stored_grid({"pos_embed": embeddings}, 1)) or embeddings.shape[-1] % 4 or side < 2:
        return None
    quarter = embeddings.shape[-1] // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    places = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([places.sin(), places.cos()], dim=1)
    row, column = axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)
    stored = embeddings[0].double()
    if stored[0].abs().max() > 0:
        return None
    for name, expected in (("MoCo-v3", torch.cat([row, column], dim=1)), ("MAE", torch.cat([column, row], dim=1))):
        # Files may be in 16 bits.
        if torch.allclose(stored[1:], expected, rtol=0, atol=5e-3):
            return name
    return None
