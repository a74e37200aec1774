"""Floating-point operations of a network in a training step, counted from shapes.

A multiplication and an addition are two operations. Counted are products of matrices, convolutions and attention (both of
its products), in the forward pass and in the backward pass, which has two products for each of the forward pass (one where
no gradient of the images is needed); nothing that is computed a second time; no norms, activations or optimizer, which are
bound by memory and together below 1%.

Of a vision transformer with class-token pooling the last block is counted as far as the class token depends on it: queries,
output projection and MLP of one token per image. That is what the packed pass computes. Counts in the literature take the
whole block; ``whole_last_block`` gives those, and a utilisation that is higher by as much.

PyTorch's counter alone would not do: it counts what runs, so two products of fused attention's backward pass that are
computed a second time, and the whole last block where crops take separate passes. The tests hold this count against it.
"""

from __future__ import annotations

import copy

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from massl_fast.models import packed


def backbone_flops(backbone: nn.Module, size: int, *, whole_last_block: bool = False) -> tuple[float, float]:
    """Operations of the forward and the backward pass for one image of ``size`` × ``size`` pixels."""
    if not packed.supports(backbone)[0] or backbone.attn_pool is not None:
        return _counted(backbone, size)
    embed_forward, embed_backward, tokens = _embed_flops(backbone, size)
    class_token_only = backbone.global_pool == "token" and not whole_last_block
    blocks = 0.0
    for index, block in enumerate(backbone.blocks):
        attn = block.attn
        width = attn.num_heads * attn.head_dim
        all_linear = linear_flops(block)
        if class_token_only and index == len(backbone.blocks) - 1:
            key_value = 2 / 3 * linear_flops(attn.qkv)
            blocks += tokens * key_value + (all_linear - key_value) + 4 * tokens * width
        else:
            blocks += tokens * all_linear + 4 * tokens**2 * width
    return embed_forward + blocks, embed_backward + 2 * blocks


def _embed_flops(backbone: VisionTransformer, size: int) -> tuple[float, float, int]:
    """Forward and backward operations of the patch embedding, and the tokens of an image, class token included."""
    embed = backbone.patch_embed
    height, width = embed.dynamic_feat_size((size, size))
    tokens = height * width + backbone.num_prefix_tokens
    if packed.is_plain(embed):
        product = 2.0 * height * width * embed.proj.weight.numel()
        return product, product, tokens
    return *_counted(embed, size), tokens


def linear_flops(module: nn.Module) -> float:
    """Operations of one row through every linear layer in ``module``."""
    return sum(2.0 * layer.in_features * layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear))


def _counted(module: nn.Module, size: int) -> tuple[float, float]:
    """Forward and backward operations for one image, as PyTorch counts them (two images: some norms refuse one).

    The pass is one over shapes alone, by a copy without storage; a copy of a compiled module is not compiled.
    """
    module = copy.deepcopy(module).to("meta").eval().requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        output = module(torch.empty(2, 3, size, size, device="meta"))
        forward = counter.get_total_flops()
        output.sum().backward()
        total = counter.get_total_flops()
    return forward / 2, (total - forward) / 2
