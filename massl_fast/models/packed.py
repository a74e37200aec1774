"""One pass of a vision transformer over crops of several sizes.

Everything but attention works on single tokens, so the tokens of all crops are laid end to end, [Σ_g B_g·L_g, C] for
groups g of B_g crops of equal size with L_g tokens each, and patch embedding, projections, norms and MLPs see one large
matrix instead of one per size. Attention runs once per group, or once for all (varlen.py). Results equal separate passes up to rounding.

With class-token pooling the last block computes what the class tokens need and no more: keys and values of all tokens,
but queries, output projection and MLP of one row per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from massl_fast.models.products import OneDnnLinear, linear
from massl_fast.models.varlen import Sequences, Varlen, in_one_call, sequences_of

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Shapes = tuple[tuple[int, int], ...]
"""(B, L) of each group: crops, tokens per crop."""

RECOMPUTE = ("nothing", "pointwise", "blocks")
"""What the backward pass computes again instead of keeping it; see ``PackedPass``."""
RESIDUAL = ("fp32", "bf16")
"""Format in which tokens travel from block to block under autocast; see ``PackedPass``."""


class Hidden(NamedTuple):
    """Patches that a network is not to see: one learned vector stands in their place (BEiT, iBOT)."""

    mask: Tensor
    """bool [crops, P], of the first crops of the first group."""
    token: Tensor
    """[C]."""

    def replace(self, embedded: Tensor) -> Tensor:
        """Patch embeddings [B, P, C], before positions are added, with the token where the mask is set."""
        mask = self.mask
        if len(mask) < len(embedded):
            mask = torch.cat([mask, mask.new_zeros(len(embedded) - len(mask), mask.shape[1])])
        return torch.where(mask[:, :, None], self.token.to(embedded.dtype), embedded)


def supports(backbone: nn.Module) -> tuple[bool, str]:
    """Whether ``PackedPass`` computes what ``backbone`` computes, and why (or why not)."""
    if type(backbone) is not VisionTransformer:
        return False, f"{type(backbone).__name__} is not timm's VisionTransformer"
    if not backbone.dynamic_img_size:
        return False, "it was built for one image size (dynamic_img_size is off)"
    if not isinstance(backbone.patch_drop, nn.Identity):
        return False, "it drops patches"
    if not len(backbone.blocks):
        return False, "it has no blocks"
    for index, block in enumerate(backbone.blocks):
        expected = [
            ("", block, (Block,)),
            (".attn", getattr(block, "attn", None), (Attention,)),
            (".mlp", getattr(block, "mlp", None), (Mlp, SwiGLU, GluMlp)),
            *[(f".ls{i}", getattr(block, f"ls{i}", None), (LayerScale, nn.Identity)) for i in (1, 2)],
            *[(f".drop_path{i}", getattr(block, f"drop_path{i}", None), (DropPath, nn.Identity)) for i in (1, 2)],
        ]
        for name, module, types in expected:
            if type(module) not in types:
                return False, f"blocks.{index}{name} is a {type(module).__name__}"
        if any(isinstance(module, (_BatchNorm, nn.GroupNorm)) for module in block.modules()):
            return False, f"blocks.{index} normalises over more than one token"
    return True, "all blocks of the network work on single tokens or by plain self-attention"


class PackedPass(nn.Module):
    """The pass itself, with what it needs beside the backbone's weights (no parameters, nothing in the state dict).

    ``recompute``: "pointwise" keeps the outputs of matrix products and attention and computes norms, activation and concatenation again in
    the backward pass, eager or compiled; "blocks" keeps the input of each block alone.

    ``residual``: "fp32" is what autocast gives, a stream of float32 tokens to which 16-bit branches are added. "bf16" lets the tokens
    themselves be bfloat16 between the blocks where autocast is on in that format: norms read and write 16 bits (and compute in 32), as do
    the additions. A quarter fewer bytes per step, for more rounding (docs/performance.md).

    ``attention`` of (query, key, value) [B, heads, L, width] and a dropout rate takes the place of ``attend``.

    A compiled block ends behind the next block's first norm where nothing is recomputed: that norm then reads the tokens before they go to
    memory, and its backward pass adds up their gradient there.
    """

    def __init__(
        self, backbone: VisionTransformer, recompute: str = "nothing", residual: str = "fp32", attention: Attend | None = None
    ) -> None:
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"model.recompute is {recompute!r}; it can be {', '.join(RECOMPUTE[:-1])} or {RECOMPUTE[-1]}.")
        if residual not in RESIDUAL:
            raise ValueError(f"model.residual is {residual!r}; it can be {' or '.join(RESIDUAL)}.")
        self.recompute = recompute
        self.residual = residual
        self.attention = attention
        rates = [_drop_rate(path) for block in backbone.blocks for path in (block.drop_path1, block.drop_path2)]
        keep = 1 - torch.tensor(rates, dtype=torch.float32)[:, None] if any(rates) else None
        self.register_buffer("keep", keep, persistent=False)
        self.run_block: Callable[..., Any] = packed_block
        self.norm_ahead = False
        self.varlen: Varlen | None = None
        """What attends to the tokens of all groups at once, in place of ``attention``; None: nothing does."""
        self._resampling: dict[tuple[Any, ...], Tensor] = {}
        self._sequences: dict[tuple[Any, ...], Sequences] = {}

    def run_blocks_by(self, run: Callable[..., Tensor]) -> None:
        """Have ``run``, with the arguments of ``packed_block``, compute each block, from its own weights alone."""
        self.run_block = run
        self.norm_ahead = False

    def attend_by(self, varlen: Varlen | None) -> None:
        """Have ``varlen`` attend in all crops of a pass at once; None: attention runs per crop size."""
        self.varlen = varlen

    def compile_blocks(self, **options: Any) -> None:
        """Compile the block; its weights are inputs of the graph, so that one graph serves all blocks."""
        self.run_block = torch.compile(packed_block, **options)
        self.norm_ahead = self.recompute == "nothing"

    def forward(
        self, backbone: VisionTransformer, groups: Sequence[Sequence[Tensor]], *, patches_of: int = 0, hidden: Hidden | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Groups of crops [N_i, 3, H, W] of one size each → pooled features [ΣN_i, C] in the order given, and patch tokens.

        ``patches_of``: of how many crops at the beginning of the first group patch tokens [crops·P, C] are given, after the final norm; the
        shortcut for class tokens is then not taken. ``hidden``: patches of these crops that the blocks are not to see.
        """
        tokens, shapes = self._embed(backbone, groups, hidden)
        scales = self._drop_path_scales(shapes) if self.training else None
        if self.residual == "bf16" and _autocasts_to_bf16(tokens.device):
            tokens = tokens.bfloat16()
            scales = None if scales is None else scales.bfloat16()
        blocks = list(backbone.blocks)
        class_token_only = backbone.attn_pool is None and backbone.global_pool == "token" and not patches_of
        pointwise = self.recompute == "pointwise" and torch.is_grad_enabled()
        always: dict[str, Any] = {"part": _recomputed} if pointwise else {}
        if self.varlen is not None:
            always |= {"attention": self.varlen, "sequences": self._sequences_of(shapes, tokens.device)}
        elif self.attention is not None:
            always |= {"attention": self.attention}
        norm_ahead = self.norm_ahead and not backbone.grad_checkpointing
        normed = norm_for_product(blocks[0].norm1, tokens) if norm_ahead else None
        for index, block in enumerate(blocks):
            last = class_token_only and index == len(blocks) - 1
            scale1, scale2 = (None, None) if scales is None else (scales[2 * index], scales[2 * index + 1])
            others = always if normed is None else {**always, "normed": normed}
            run = partial(self.run_block, block, shapes=shapes, first_only=last, **others)
            if norm_ahead and index + 1 < len(blocks):
                tokens, normed = run(tokens, scale1, scale2, next_norm=blocks[index + 1].norm1)
                continue
            if (backbone.grad_checkpointing or self.recompute == "blocks") and torch.is_grad_enabled():
                # Drop path was drawn above; only dropout would need its random state replayed.
                dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in block.modules())
                tokens = checkpoint(run, tokens, scale1, scale2, use_reentrant=False, preserve_rng_state=dropout)
            else:
                tokens = run(tokens, scale1, scale2)
        patches = None
        if class_token_only:
            pooled = backbone.norm(tokens)
        else:
            tokens = backbone.norm(tokens)
            rows = tokens.split([crops * length for crops, length in shapes])
            pooled = torch.cat([backbone.pool(row.view(*shape, -1)) for row, shape in zip(rows, shapes)])
            if patches_of:
                patches = rows[0].view(*shapes[0], -1)[:patches_of, backbone.num_prefix_tokens :].flatten(0, 1)
        return backbone.head(backbone.head_drop(backbone.fc_norm(pooled))), patches

    def _embed(
        self, backbone: VisionTransformer, groups: Sequence[Sequence[Tensor]], hidden: Hidden | None = None
    ) -> tuple[Tensor, Shapes]:
        """Patch, position and prefix embeddings: tokens [Σ B·L, C] and the groups' shapes."""
        embed = backbone.patch_embed
        if is_plain(embed) and not any(crop.requires_grad for group in groups for crop in group):
            grids, patches = _embed_patches(embed, groups)
        else:
            maps = [embed(torch.cat(list(group)).contiguous(memory_format=torch.channels_last)) for group in groups]
            grids = [tuple(grid.shape[1:3]) for grid in maps]
            patches = [grid.flatten(1, 2) for grid in maps]

        if hidden is not None:
            patches = [hidden.replace(patches[0]), *patches[1:]]
        prefix = [token for token in (backbone.cls_token, backbone.reg_token) if token is not None]
        rows = []
        for grid, patch in zip(grids, patches):
            prefix_position, patch_position = self._positions(backbone, grid)
            if patch_position is not None:
                patch = patch + patch_position
            if prefix:
                first = torch.cat(prefix, dim=1)
                if prefix_position is not None:
                    first = first + prefix_position
                patch = torch.cat([first.expand(len(patch), -1, -1).to(patch.dtype), patch], dim=1)
            rows.append(patch)
        shapes = tuple((row.shape[0], row.shape[1]) for row in rows)
        tokens = torch.cat([row.flatten(0, 1) for row in rows]) if len(rows) > 1 else rows[0].flatten(0, 1)
        return backbone.norm_pre(backbone.pos_drop(tokens)), shapes

    def _positions(self, backbone: VisionTransformer, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Position embeddings of the prefix tokens and of a grid of patches, [1, P, C] and [1, h·w, C]."""
        if backbone.pos_embed is None:
            return None, None
        count = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
        prefix, patches = backbone.pos_embed[:, :count], backbone.pos_embed[:, count:]
        built_for = tuple(backbone.patch_embed.grid_size)
        if grid != built_for:
            matrix = self._resample_by(built_for, grid, patches)
            with torch.autocast(patches.device.type, enabled=False):
                patches = (matrix @ patches.to(matrix.dtype)).to(patches.dtype)
        return (prefix if count else None), patches

    def _resample_by(self, old: tuple[int, int], new: tuple[int, int], like: Tensor) -> Tensor:
        """[h·w new, h·w old]: resampling is linear in the embeddings, so that it is computed once and not once per step.

        A matrix product also has a deterministic gradient, which CUDA's bicubic resize has not.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        if torch.compiler.is_compiling():
            return resampling_matrix(old, new, like.device, dtype)
        key = (old, new, like.device, dtype)
        if key not in self._resampling:
            # Not an inference tensor: training may come after an evaluation and saves it for its backward.
            with torch.inference_mode(False), torch.no_grad():
                self._resampling[key] = resampling_matrix(old, new, like.device, dtype)
        return self._resampling[key]

    def _sequences_of(self, shapes: Shapes, device: torch.device) -> Sequences:
        """Kept, so that a step does not wait for its table and a recording finds it where it was."""
        key = (shapes, device)
        if key not in self._sequences:
            self._sequences[key] = sequences_of(shapes, device)
        return self._sequences[key]

    def _drop_path_scales(self, shapes: Shapes) -> Tensor | None:
        """[2·blocks, Σ B·L, 1]: 0 where a crop skips a branch, 1/keep where it does not; one draw a crop and branch."""
        if self.keep is None:
            return None
        crops = sum(count for count, _ in shapes)
        scales = torch.bernoulli(self.keep.expand(-1, crops)) / self.keep
        rows = [
            scale[:, :, None].expand(-1, -1, length).flatten(1)
            for scale, (_, length) in zip(scales.split([count for count, _ in shapes], dim=1), shapes)
        ]
        return torch.cat(rows, dim=1)[:, :, None]


Part = Callable[..., Tensor]
"""Calls a function of tensors."""


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Attention of [B, heads, L, width], by PyTorch's fused kernels except on a CPU in 16 bits.

    There the fused backward pass takes three to six times as long as the plain products (bench/notes/performance.md).
    """
    if query.device.type != "cpu" or value.dtype in (torch.float32, torch.float64) or dropout:
        return fused_attention(query, key, value, dropout)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return logits.softmax(-1) @ value


def fused_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Attention of [B, heads, L, width] by PyTorch's fused kernels."""
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


def _kept(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return function(*tensors)


def _recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Keep the arguments alone. What comes again ends where the last product has its operands; the product itself does not."""
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def packed_block(
    block: Block,
    tokens: Tensor,
    scale1: Tensor | None,
    scale2: Tensor | None,
    *,
    shapes: Shapes,
    first_only: bool,
    part: Part = _kept,
    attention: Attend = attend,
    sequences: Sequences | None = None,
    normed: Tensor | None = None,
    next_norm: nn.Module | None = None,
) -> Any:
    """One transformer block on packed tokens [Σ B·L, C]; with ``first_only`` it returns each crop's first token, [Σ B, C].

    ``part`` calls each piece that ends in a matrix product. ``sequences``: have one call of variable length attend instead of ``attention``
    once per group. ``normed``: the tokens after the block's first norm, where the block before made them. With ``next_norm``, the first
    norm of the block behind, it returns (tokens, these normed) likewise.
    """
    norm = block.norm1 if normed is None else None
    attended = _attention(block.attn, norm, tokens if normed is None else normed, shapes, first_only, part, attention, sequences)
    if first_only:
        tokens = _first_rows(tokens, shapes)
        if scale1 is not None:
            scale1, scale2 = _first_rows(scale1, shapes), _first_rows(scale2, shapes)
    tokens = _add(tokens, attended, block.ls1, scale1)
    tokens = _add(tokens, _mlp(block.mlp, block.norm2, tokens, part), block.ls2, scale2)
    return tokens if next_norm is None else (tokens, norm_for_product(next_norm, tokens))


def _add(tokens: Tensor, branch: Tensor, layer_scale: nn.Module, scale: Tensor | None) -> Tensor:
    """tokens + scale · layer scale · branch, in the tokens' format, without a copy of a 16-bit branch in theirs.

    CUDA's autocast would make one: it casts the arguments of ``addcmul`` to the widest.
    """
    if scale is None and isinstance(layer_scale, nn.Identity):
        return tokens + branch
    with torch.autocast(tokens.device.type, enabled=False):
        if isinstance(layer_scale, LayerScale):
            # In float32 it would widen 16-bit tokens for good.
            gamma = layer_scale.gamma.to(tokens.dtype)
            if scale is None:
                return torch.addcmul(tokens, branch, gamma)
            branch = branch * gamma
        return torch.addcmul(tokens, branch, scale) if torch.compiler.is_compiling() else _ScaledAdd.apply(tokens, branch, scale)


class _ScaledAdd(torch.autograd.Function):
    """``torch.addcmul(tokens, branch, scale)`` whose gradient of the branch is written in the branch's format at once; autograd writes it
    in the tokens' format and casts it then."""

    @staticmethod
    def forward(ctx, tokens: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = branch.dtype
        return torch.addcmul(tokens, branch, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (scale,) = ctx.saved_tensors
        return gradient, torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=ctx.dtype)), None


def _mlp(mlp: nn.Module, norm: nn.Module, tokens: Tensor, part: Part) -> Tensor:
    if part is _kept or type(mlp) is not Mlp or mlp.drop1.p or mlp.drop2.p:
        return mlp(_norm(norm, tokens))
    hidden = part(lambda tokens: mlp.fc1(_norm(norm, tokens)), tokens)
    return part(lambda hidden: mlp.fc2(mlp.norm(mlp.act(hidden))), hidden)


def _attention(
    attn: Attention,
    norm: nn.Module | None,
    tokens: Tensor,
    shapes: Shapes,
    first_only: bool,
    part: Part,
    attention: Callable[..., Tensor],
    sequences: Sequences | None,
) -> Tensor:
    """timm's ``Attention`` of tokens that ``norm`` takes first (None: it has), with one product for all groups before and after.

    Attention itself runs once per group, or with ``sequences`` once.
    """
    heads, width = attn.num_heads, attn.head_dim
    groups, queries = shapes, [crops for crops, _ in shapes]
    if sequences is not None:
        groups, queries, attention = ((1, len(tokens)),), [sum(queries)], in_one_call(attention, sequences, first_only)
    rows = [crops * length for crops, length in groups]
    dropout = attn.attn_drop.p if attn.training else 0.0
    gate = getattr(attn, "gate", None)
    if first_only or gate is not None:
        tokens, norm = _norm(norm, tokens), None
    queries_from = _first_rows(tokens, shapes) if first_only else tokens
    if first_only:
        size, bias = heads * width, attn.qkv.bias
        multiply = linear if isinstance(attn.qkv, OneDnnLinear) else F.linear
        query = multiply(queries_from, attn.qkv.weight[:size], None if bias is None else bias[:size])
        other = multiply(tokens, attn.qkv.weight[size:], None if bias is None else bias[size:])
        parts = [
            (query_g.view(crops, -1, 1, heads, width), other_g.view(crops, length, 2, heads, width))
            for query_g, other_g, (crops, length) in zip(query.split(queries), other.split(rows), groups)
        ]
        parts = [(*q.unbind(2), *kv.unbind(2)) for q, kv in parts]
    else:
        qkv = part(lambda tokens: attn.qkv(_norm(norm, tokens)), tokens)
        split = split_heads if torch.compiler.is_compiling() or not qkv.requires_grad else _SplitHeads.apply
        pieces = split(qkv, groups, heads, width)
        parts = [pieces[start : start + 3] for start in range(0, len(pieces), 3)]
    outputs = []
    for query, key, value in parts:
        query, key = attn.q_norm(query.transpose(1, 2)), attn.k_norm(key.transpose(1, 2))
        output = attention(query, key, value.transpose(1, 2), dropout)
        outputs.append(output.transpose(1, 2).reshape(-1, heads * width))

    def project(*outputs: Tensor) -> Tensor:
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        if hasattr(attn, "norm"):
            output = attn.norm(output)
        if gate is not None:
            output = output * attn.gate(queries_from).sigmoid()
        return attn.proj(output)

    return attn.proj_drop(part(project, *outputs) if gate is None else project(*outputs))


def split_heads(qkv: Tensor, shapes: Shapes, heads: int, width: int) -> tuple[Tensor, ...]:
    """[Σ B·L, 3·heads·width] → queries, keys and values [B, L, heads, width] of each group in turn: 3 views a group."""
    groups = qkv.split([crops * length for crops, length in shapes])
    return tuple(piece for group, (crops, length) in zip(groups, shapes) for piece in group.view(crops, length, 3, heads, width).unbind(2))


class _SplitHeads(torch.autograd.Function):
    """``split_heads`` whose gradients are written once, straight to their place; autograd's own way stacks and then joins them, which
    moves twice the bytes."""

    @staticmethod
    def forward(ctx, qkv: Tensor, shapes: Shapes, heads: int, width: int) -> tuple[Tensor, ...]:
        ctx.shapes, ctx.layout = shapes, (heads, width)
        return split_heads(qkv, shapes, heads, width)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        heads, width = ctx.layout
        rows = [crops * length for crops, length in ctx.shapes]
        whole = gradients[0].new_empty(sum(rows), 3 * heads * width)
        for number, (group, (crops, length)) in enumerate(zip(whole.split(rows), ctx.shapes)):
            torch.stack(gradients[3 * number : 3 * number + 3], dim=2, out=group.view(crops, length, 3, heads, width))
        return whole, None, None, None


def norm_for_product(norm: nn.Module, tokens: Tensor) -> Tensor:
    """``_norm``, in the format in which a matrix product takes it."""
    normed = _norm(norm, tokens)
    device = tokens.device.type
    return normed.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normed


def _norm(norm: nn.Module | None, tokens: Tensor) -> Tensor:
    """``norm`` of the tokens. Of 16-bit tokens a layer norm is one kernel from 16 to 16 bits; autocast would widen them first and after."""
    if norm is None:
        return tokens
    if tokens.dtype != torch.bfloat16 or not isinstance(norm, nn.LayerNorm):
        return norm(tokens)
    weight, bias = (None if each is None else each.to(tokens.dtype) for each in (norm.weight, norm.bias))
    with torch.autocast(tokens.device.type, enabled=False):
        return F.layer_norm(tokens, norm.normalized_shape, weight, bias, norm.eps)


def _autocasts_to_bf16(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16


def _first_rows(tokens: Tensor, shapes: Shapes) -> Tensor:
    """[Σ B·L, C] → [Σ B, C]: the first token of each crop."""
    rows = tokens.split([crops * length for crops, length in shapes])
    return torch.cat([row.view(*shape, -1)[:, 0] for row, shape in zip(rows, shapes)])


def _drop_rate(path: nn.Module) -> float:
    return path.drop_prob if isinstance(path, DropPath) else 0.0


def is_plain(embed: nn.Module) -> bool:
    """A patch embedding that is one linear map of each patch's pixels."""
    if type(embed) is not PatchEmbed or embed.dynamic_img_pad or type(embed.proj) is not nn.Conv2d:
        return False
    conv = embed.proj
    return conv.kernel_size == conv.stride == tuple(embed.patch_size) and conv.groups == 1 and not any(conv.padding)


def _embed_patches(embed: PatchEmbed, groups: Sequence[Sequence[Tensor]]) -> tuple[list[tuple[int, int]], tuple[Tensor, ...]]:
    """The patch embedding as one matrix product over all crops: grids (h, w) and [B, h·w, C] of each group.

    Each crop is copied once, straight to its place, cast on the way. Pixels of a patch stay in channels-last order
    (row, column, channel), which is how the loader lays images out.
    """
    conv, (height, width) = embed.proj, embed.patch_size
    device = conv.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else conv.weight.dtype
    grids, counts = [], []
    for group in groups:
        side_y, side_x = group[0].shape[-2:]
        if side_y % height or side_x % width:
            raise ValueError(f"A crop of {side_y}×{side_x} px is not divisible by the patch, {height}×{width} px.")
        grids.append((side_y // height, side_x // width))
        counts.append(sum(len(crop) for crop in group))
    rows = [count * h * w for count, (h, w) in zip(counts, grids)]

    pixels = torch.empty(sum(rows), height * width * conv.in_channels, dtype=dtype, device=groups[0][0].device)
    start = 0
    for group, (h, w) in zip(groups, grids):
        for crop in group:
            patches = crop.view(len(crop), -1, h, height, w, width).permute(0, 2, 4, 3, 5, 1)
            stop = start + len(crop) * h * w
            pixels[start:stop].view(patches.shape).copy_(patches)
            start = stop
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    embedded = embed.norm(F.linear(pixels, weight, conv.bias)).split(rows)
    return grids, tuple(part.view(count, -1, part.shape[-1]) for part, count in zip(embedded, counts))


def resampling_matrix(old: tuple[int, int], new: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """timm's resampling of position embeddings (bicubic, antialiased) as a matrix, [h·w new, h·w old]."""
    basis = torch.eye(old[0] * old[1], device=device, dtype=dtype).view(1, -1, *old)
    # Channels-last as in timm; with contiguous input PyTorch 2.15 resizes wrongly to a width of 1 on the CPU.
    basis = basis.contiguous(memory_format=torch.channels_last)
    return F.interpolate(basis, size=new, mode="bicubic", antialias=True)[0].flatten(1).T.contiguous()
