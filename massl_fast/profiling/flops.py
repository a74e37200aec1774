"""Floating-point operations of a training step, counted from shapes, and what devices can do at best.

Model-FLOPs utilisation = ``step_flops(...)`` / (seconds a step · devices · ``peak_flops(...)``).

A multiplication and an addition are two operations. Counted are products of matrices, convolutions and attention (both of
its products), in the forward pass of student and teacher and in the student's backward pass, which has two products for
each of the forward pass (one where no gradient of the images is needed); nothing that is computed a second time; no norms,
activations or optimizer, which are bound by memory and together below 1%.

Of a vision transformer with class-token pooling the last block is counted as far as the class token depends on it: queries,
output projection and MLP of one token an image. That is what the packed pass computes. Counts in the literature take the
whole block; ``whole_last_block`` gives those, and a utilisation that is higher by as much.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from massl_fast.config import Config
from massl_fast.data.loaders import views_of
from massl_fast.engine.step import NUM_TEACHER_VIEWS
from massl_fast.models import packed
from massl_fast.models.backbone import Encoder

# Dense peaks of the matrix units in TFLOP/s with 32-bit accumulation, at the vendor's boost clock, and of plain float32.
# NVIDIA's data sheets and architecture white papers: V100 (2017, 2020), T4, A100, A10, A30, A40, RTX 3090 and 4090 (GA102,
# AD102 white papers), L4, L40, L40S, H100, H200, B200. Where a sheet gives the figure "with sparsity", half of it.
# The first pattern that occurs in the device's name counts, so special boards stand before their family.
_PEAKS: list[tuple[str, dict[str, float]]] = [
    (r"MIG", {}),
    (r"B200", {"16": 2250, "32": 75}),
    (r"H200 NVL", {"16": 835.5, "32": 60}),
    (r"H200|GH200", {"16": 989.4, "32": 67}),
    (r"H100 PCIe", {"16": 756.5, "32": 51}),
    (r"H100 NVL", {"16": 835.5, "32": 60}),
    (r"H100", {"16": 989.4, "32": 67}),
    (r"A100", {"16": 312, "32": 19.5}),
    (r"A10G", {"16": 70, "32": 31.5}),
    (r"A10\b", {"16": 125, "32": 31.2}),
    (r"A30\b", {"16": 165, "32": 10.3}),
    (r"A40\b", {"16": 149.7, "32": 37.4}),
    (r"L40S", {"16": 362, "32": 91.6}),
    (r"L40\b", {"16": 181, "32": 90.5}),
    (r"L4\b", {"16": 121, "32": 30.3}),
    (r"RTX 3090\b(?! Ti)", {"16": 71.2, "32": 35.6}),
    (r"RTX 4090\b(?! D)", {"16": 165.2, "32": 82.6}),
    (r"V100S", {"fp16": 130, "32": 16.4}),
    (r"V100-PCIE|V100-FHHL", {"fp16": 112, "32": 14}),
    (r"V100", {"fp16": 125, "32": 15.7}),
    (r"\bT4\b", {"fp16": 65, "32": 8.1}),
]


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak of a GPU in operations a second, from the vendor's data sheet; None where none is known.

    ``device_name`` as ``torch.cuda.get_device_name`` gives it; ``dtype`` that of the matrix products. float32 stands for
    true float32: products in TF32 can exceed it.
    """
    for pattern, rates in _PEAKS:
        if re.search(pattern, device_name):
            names = {torch.float16: ("16", "fp16"), torch.bfloat16: ("16",), torch.float32: ("32",)}.get(dtype, ())
            return next((rates[name] * 1e12 for name in names if name in rates), None)
    return None


def step_flops(
    encoder: Encoder,
    *,
    crop_sizes: Sequence[int],
    num_teacher_views: int,
    batch: int,
    memory_size: int,
    whole_last_block: bool = False,
) -> float:
    """Operations of one training step over ``batch`` images.

    ``crop_sizes``: sides in pixels of the V student views, of which the teacher sees the first ``num_teacher_views`` (T).
    ``memory_size``: entries of the memory that take part (whole blocks). The loss is 4·D·(V+T)·K operations an image: two
    products with the memory a view, gradient included.
    """
    forward: dict[int, float] = {}
    backward: dict[int, float] = {}
    for size in set(crop_sizes):
        forward[size], backward[size] = backbone_flops(encoder.backbone, size, whole_last_block=whole_last_block)
    head = _linear_flops(encoder.head)
    views, embedding_dim = len(crop_sizes), encoder.head.mlp[-1].out_features
    student = sum(forward[size] + backward[size] + 3 * head for size in crop_sizes)
    teacher = sum(forward[size] + head for size in crop_sizes[:num_teacher_views])
    memory = 4 * embedding_dim * (views + num_teacher_views) * memory_size
    return batch * (student + teacher + memory)


def flops_of_run(config: Config, encoder: Encoder, batch: int) -> float:
    """Operations of one step of the run that ``config`` describes, over ``batch`` images."""
    return step_flops(
        encoder,
        crop_sizes=[view.size for view in views_of(config.crops)],
        num_teacher_views=NUM_TEACHER_VIEWS,
        batch=batch,
        memory_size=config.objective.entries_in_blocks,
    )


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
        all_linear = _linear_flops(block)
        if class_token_only and index == len(backbone.blocks) - 1:
            key_value = 2 / 3 * _linear_flops(attn.qkv)
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


def _linear_flops(module: nn.Module) -> float:
    """Of one row through every linear layer in ``module``."""
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
