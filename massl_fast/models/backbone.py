"""Networks from timm, and the encoder that takes all crops of a step through backbone and head."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from massl_fast.models import packed, varlen
from massl_fast.models.precision import Precision
from massl_fast.models.recipes import features_of

# Set by massl-fast itself, or they would fetch weights or change what comes out.
RESERVED_MODEL_ARGS = {
    "img_size": "crops.global_size sets it",
    "drop_path_rate": "model.drop_path sets it",
    "num_classes": "features are pooled, never classified",
    "in_chans": "images are RGB",
    "pretrained": "nothing is downloaded; start from a file instead",
    "pretrained_cfg": "nothing is downloaded; start from a file instead",
    "pretrained_cfg_overlay": "nothing is downloaded; start from a file instead",
    "checkpoint_path": "nothing is downloaded; start from a file instead",
    "features_only": "pooled features are needed",
}


def build_backbone(
    arch: str,
    *,
    image_size: int,
    other_sizes: Sequence[int] = (),
    drop_path: float = 0.0,
    model_args: dict[str, Any] | None = None,
    position_embedding: str = "learned",
) -> nn.Module:
    """A timm network with random weights and pooled features instead of a classifier, ready for crops of several sizes.

    ``image_size`` is the side of the global crops in pixels (what position embeddings are laid out for), ``other_sizes``
    the further sides it will be given, ``drop_path`` the stochastic-depth rate of the last block, ``model_args`` further
    keyword arguments of ``timm.create_model``.

    The result carries ``feature_dim`` (C) and ``timm_args`` (``architecture``, ``model_args``, ``image_size``), from which
    ``timm.create_model(architecture, num_classes=0, **model_args)`` builds the same network without drop path.

    Raises ValueError for an unknown architecture or argument, a crop that the patches do not divide, a network that
    cannot take crops of several sizes, or one without pooled features.
    """
    if ":" in arch or not timm.is_model(arch):
        close = difflib.get_close_matches(arch, timm.list_models(), n=3, cutoff=0.5)
        hint = f" Closest names: {', '.join(close)}." if close else " timm.list_models() lists them."
        raise ValueError(f"timm has no architecture named {arch!r}.{hint}")
    model_args = dict(model_args or {})
    for name in RESERVED_MODEL_ARGS.keys() & model_args.keys():
        raise ValueError(f"model.model_args may not hold {name!r}: {RESERVED_MODEL_ARGS[name]}.")

    # What lets one network take several sizes goes by different names; a network that lacks one of them says so.
    optional: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True, "strict_img_size": False}
    optional = {name: value for name, value in optional.items() if name not in model_args}
    drop = {"drop_path_rate": drop_path} if drop_path else {}
    while True:
        try:
            backbone = timm.create_model(arch, pretrained=False, num_classes=0, **optional, **drop, **model_args)
            break
        except TypeError as error:
            unexpected = [name for name in (*optional, *drop, *model_args) if f"'{name}'" in str(error)]
            if "unexpected keyword argument" not in str(error) or not unexpected:
                raise ValueError(f"timm cannot build {arch} with {model_args or 'its defaults'}: {error}.") from error
            for name in unexpected:
                if name in drop:
                    raise ValueError(f"{arch} has no drop path; set model.drop_path to 0.") from error
                if name in model_args:
                    raise ValueError(f"{arch} takes no argument {name!r}; remove it from model.model_args.") from error
                del optional[name]
        except Exception as error:  # what a network raises over arguments it cannot take is its own choice
            message = _message(error)
            settings = f"{model_args or 'its default arguments'}"
            raise ValueError(f"timm cannot build {arch} for {image_size} px with {settings}: {message}") from error

    if position_embedding == "sin-cos":
        _fix_sin_cos_positions_(backbone, arch)
    sizes = [image_size, *other_sizes]
    patch = patch_size(backbone)
    for size in sizes:
        if patch and size % patch:
            lower = size // patch * patch
            choices = " or ".join(str(side) for side in (lower, lower + patch) if side)
            raise ValueError(f"A crop of {size} px is not divisible by the patch of {arch}, {patch} px; take {choices}.")
    backbone.feature_dim = _trace_feature_dim(backbone, arch, sizes)
    backbone.timm_args = {"architecture": arch, "model_args": {**optional, **model_args}, "image_size": image_size}
    return backbone


@torch.no_grad()
def _fix_sin_cos_positions_(backbone: nn.Module, arch: str) -> None:
    """Two-dimensional sine and cosine waves in place of learned position embeddings, zeros for prefix tokens (MoCo v3, section 4).

    A quarter of the width each: sine and cosine along x, sine and cosine along y, of frequencies 10000^(−i/quarter).
    """
    positions = getattr(backbone, "pos_embed", None)
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if not isinstance(positions, nn.Parameter) or grid is None or positions.shape[-1] % 4:
        raise ValueError(
            f"model.position_embedding is sin-cos, which takes a transformer with position embeddings of a width divisible by 4; {arch} "
            f"has none such. Choose learned."
        )
    height, width = grid
    quarter = positions.shape[-1] // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = torch.meshgrid(torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij")
    waves = [part for place in (x, y) for angle in (place.flatten()[:, None] * frequencies,) for part in (angle.sin(), angle.cos())]
    patches = torch.cat(waves, dim=1)
    positions.zero_()
    positions[0, -len(patches) :] = patches.to(positions.dtype)
    positions.requires_grad_(False)


def patch_size(backbone: nn.Module) -> int | None:
    """Side in pixels of what becomes one token (the stride of a convolutional stem included); None without patches."""
    embed = getattr(backbone, "patch_embed", None)
    if not hasattr(embed, "feat_ratio") or getattr(embed, "dynamic_img_pad", False):
        return None
    return embed.feat_ratio()


def _trace_feature_dim(backbone: nn.Module, arch: str, sizes: Sequence[int]) -> int:
    """C, from passes over shapes alone (meta device) at every crop size."""
    tensors = {name: tensor.to("meta") for name, tensor in backbone.state_dict(keep_vars=True).items()}
    tensors |= {name: buffer.to("meta") for name, buffer in backbone.named_buffers()}
    was_training = backbone.training
    backbone.eval()
    shapes = set()
    try:
        for size in dict.fromkeys(sizes):
            images = torch.empty(2, 3, size, size, device="meta")
            try:
                with torch.no_grad():
                    features = torch.func.functional_call(backbone, tensors, (images,))
            except Exception as error:
                raise ValueError(
                    f"{arch}, built for crops of {sizes[0]} px, cannot take crops of {size} px ({_message(error)}). "
                    "Give it crops of a size it accepts, or choose a network that takes any size, such as vit_* or resnet*."
                ) from error
            shapes.add(tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__)
    finally:
        backbone.train(was_training)
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 2 or shape[0] != 2:
        raise ValueError(f"{arch} gives {sorted(map(str, shapes))} for 2 images instead of one pooled feature an image.")
    return shape[1]


def _message(error: Exception) -> str:
    """The first line of what a network said, or the assertion that failed without a word."""
    return str(error).strip().split("\n")[0] or traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__


class Masks(NamedTuple):
    """What an objective hides of the global crops, and which of their patches it asks for."""

    hidden: Tensor | None
    """bool [G·N, P]: patches in whose place the student's blocks see the head's ``mask_token``; None: they see all."""
    rows: Tensor | None
    """int64 [M], patches of the [G·N·P] that the student's head is given; None: all."""
    extra: dict[str, Tensor]
    """What the objective itself wants to have at hand in ``forward``."""


class Encoder(nn.Module):
    """Backbone and head. Parameters are named ``backbone.*`` (timm's own names) and ``head.*``.

    ``crops_pass``: "packed" takes the tokens of all crops of a step through the blocks together (ValueError where the
    backbone does not allow it), "separate" gives each crop size a pass of its own, "auto" packs where that is possible.
    ``pass_name`` and ``pass_reason`` say which was taken and why.

    ``recompute``: what a packed pass computes again in its backward pass instead of keeping it, nothing, pointwise or blocks (see
    ``packed.PackedPass``). A separate pass takes blocks, by timm's own means (ValueError where the network has none), but not pointwise.

    ``residual``: format of the tokens between the blocks of a packed pass, fp32 or bf16 (ValueError for bf16 in a separate pass).

    ``patch_views``: G, of how many views at the beginning the head is given patch tokens, too: ``head(features, patches)``. ValueError
    for networks whose patches the packed pass does not know.

    ``attention``: what a packed pass takes in place of its own (see ``packed.PackedPass``).
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        crops_pass: str = "auto",
        recompute: str = "nothing",
        residual: str = "fp32",
        patch_views: int = 0,
        attention: packed.Attend | None = None,
    ) -> None:
        super().__init__()
        if crops_pass not in ("auto", "packed", "separate"):
            raise ValueError(f"model.crops_pass is {crops_pass!r}; it can be auto, packed or separate.")
        self.backbone = backbone
        self.head = head
        self.patch_views = patch_views
        supported, reason = packed.supports(backbone)
        if crops_pass == "packed" and not supported:
            raise ValueError(f"model.crops_pass is packed, which this network does not allow: {reason}.")
        if patch_views and not supported:
            raise ValueError(f"The objective needs patch tokens, which are taken of plain vision transformers alone, but {reason}.")
        together = supported and crops_pass != "separate"
        if crops_pass == "separate":
            reason = "model.crops_pass asks for it"
        # Where the head wants patches, a pass per size is the packed pass of one size.
        self.packed = packed.PackedPass(backbone, recompute, residual, attention) if together or patch_views else None
        if not self.packed and residual != "fp32":
            raise ValueError(f"model.residual is {residual}, which needs the packed pass, and that is not taken: {reason}. Choose fp32.")
        if not self.packed and recompute != "nothing":
            self._recompute_separately(recompute, reason)
        self.pass_name = "packed" if together else "separate"
        self.pass_reason = reason
        self.attention_name, self.attention_reason = "per crop size", "as set"

    def _recompute_separately(self, recompute: str, reason: str) -> None:
        if recompute != "blocks":
            raise ValueError(
                f"model.recompute is {recompute}, which needs the packed pass, and that is not taken: {reason}. Choose blocks."
            )
        try:
            self.backbone.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise ValueError(f"model.recompute is blocks, which {type(self.backbone).__name__} does not offer. Choose nothing.") from None

    def choose_attention(self, asked: str, device: torch.device, precision: Precision) -> None:
        """How a packed pass attends, for ``model.attention``: ``attention_name`` and ``attention_reason`` say what was chosen and why.

        Raises ValueError where the setting is varlen, which cannot be had.
        """
        if self.packed is not None and self.pass_name == "packed":
            blocks: Any = self.backbone.blocks
            layers = [block.attn for block in blocks]
            heads, width = layers[0].num_heads, layers[0].head_dim
            dropout = any(layer.attn_drop.p > 0 for layer in layers)
            function, reason = varlen.choose_attention(asked, device, precision, heads=heads, width=width, dropout=dropout)
            self.packed.attend_by(function)
        elif asked == "varlen":
            raise ValueError(
                f"model.attention is varlen, which needs the packed pass, and that is not taken: {self.pass_reason}. Choose auto."
            )
        else:
            function, reason = None, "crops are not packed"
        self.attention_name, self.attention_reason = "of all crops in one call" if function else "per crop size", reason

    @property
    def timm_args(self) -> dict[str, Any]:
        """What rebuilds the backbone: ``architecture``, ``model_args``, ``image_size`` (see ``build_backbone``)."""
        return self.backbone.timm_args

    def forward(self, crops: Sequence[Tensor], masks: Masks | None = None) -> Any:
        """Crops of any sizes, [N_i, 3, H_i, W_i] each → what the head makes of ΣN_i features, in the order of the crops."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for view, crop in enumerate(crops):
            by_size.setdefault((crop.shape[-2], crop.shape[-1]), []).append(view)
        groups = [[crops[view] for view in views] for views in by_size.values()]
        features, patches = self._features(groups, masks)
        order = [view for views in by_size.values() for view in views]
        if order != sorted(order):
            rows = features.split([len(crops[view]) for view in order])
            features = torch.cat([rows[order.index(view)] for view in range(len(crops))])
        if patches is None:
            return self.head(features)
        return self.head(features, patches if masks is None or masks.rows is None else patches.index_select(0, masks.rows))

    def _features(self, groups: list[list[Tensor]], masks: Masks | None) -> tuple[Tensor, Tensor | None]:
        """Pooled features of all groups, and patch tokens of the first views where the head wants them."""
        if self.packed is None:
            return torch.cat([self.backbone(torch.cat(group)) for group in groups]), None
        hidden = None
        if masks is not None and masks.hidden is not None:
            hidden = packed.Hidden(masks.hidden, self.head.mask_token)
        count = sum(len(crop) for crop in groups[0][: self.patch_views])
        if self.pass_name == "packed":
            return self.packed(self.backbone, groups, patches_of=count, hidden=hidden)
        features, patches = self.packed(self.backbone, groups[:1], patches_of=count, hidden=hidden)
        return torch.cat([features, *(self.packed(self.backbone, [group])[0] for group in groups[1:])]), patches

    def features(self, images: Tensor, recipe: str = "pooled") -> Tensor:
        """Images of one size, [N, 3, H, W] → features by timm's own forward (``recipes.features_of``): what evaluation and export use."""
        return features_of(self.backbone, images, recipe)

    def compile_blocks(self, **options: Any) -> None:
        """``torch.compile`` what repeats: one graph serves all blocks of a packed pass; otherwise the backbone is compiled.

        ``options`` go to ``torch.compile``. Shapes are taken as static: a training step has the same ones every time.
        """
        options = {"dynamic": False, **options}
        if self.packed is not None:
            self.packed.compile_blocks(**options)
        else:
            self.backbone.compile(**options)
