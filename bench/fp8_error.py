"""What fp8 linear layers would do to embeddings and gradients, emulated: ``python bench/fp8_error.py``. No GPU needed, no time measured.

The blocks' linear layers multiply numbers rounded to 8 bits as a Hopper's matrix units take them: e4m3 forward, e5m2 for gradients,
scaled so that the largest of a tensor (or of a row) fits, sums in float32. Everything else is bf16 autocast, as in the trainer. Printed is
the distance to float64 of embeddings and of all gradients, beside that of bf16 autocast alone and of 16-bit tokens between blocks.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(tensor: Tensor, dtype: torch.dtype, by_row: bool) -> Tensor:
    """``tensor`` as fp8 numbers times a scale, in float32."""
    tensor = tensor.float()
    largest = tensor.abs().amax(-1, keepdim=True) if by_row else tensor.abs().max()
    scale = largest.clamp(min=1e-12) / torch.finfo(dtype).max
    return (tensor / scale).to(dtype).float() * scale


class Fp8Linear(torch.autograd.Function):
    """``F.linear`` of [rows, in] with three products in fp8."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None, by_row: bool) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.by_row, ctx.has_bias = by_row, bias is not None
        out = rounded(rows, FORWARD, by_row) @ rounded(weight, FORWARD, by_row).T
        return (out if bias is None else out + bias.float()).bfloat16()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, weight = ctx.saved_tensors
        by_row = ctx.by_row
        # A product sums over the last dimension of both sides, which is the one that a row's scale belongs to.
        of_rows = rounded(gradient, BACKWARD, by_row) @ rounded(weight.T, FORWARD, by_row).T
        of_weight = rounded(gradient.T, BACKWARD, by_row) @ rounded(rows.T, FORWARD, by_row).T
        return of_rows.to(rows.dtype), of_weight, gradient.float().sum(0) if ctx.has_bias else None, None


class Linear8(nn.Module):
    """Stands where an ``nn.Linear`` stood."""

    def __init__(self, linear: nn.Linear, by_row: bool):
        super().__init__()
        self.weight, self.bias, self.by_row = linear.weight, linear.bias, by_row
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, rows: Tensor) -> Tensor:
        return Fp8Linear.apply(rows, self.weight, self.bias, self.by_row)


def with_fp8(encoder: Encoder, by_row: bool) -> Encoder:
    """The same network; the last block's attention, whose products the packed pass takes apart, stays as it is."""
    blocks = list(encoder.backbone.blocks)
    for block in blocks:
        for owner, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            if owner is not blocks[-1].attn:
                setattr(owner, name, Linear8(getattr(owner, name), by_row))
    return encoder


def results(encoder: Encoder, crops: list[Tensor], autocast: bool) -> tuple[Tensor, Tensor]:
    """Embeddings, and all gradients in a row, in float64."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embeddings = encoder(crops)
    weights = torch.sin(torch.arange(embeddings.numel(), dtype=embeddings.dtype)).view_as(embeddings)
    (embeddings * weights).sum().backward()
    return embeddings.detach().double(), torch.cat([p.grad.double().flatten() for _, p in sorted(encoder.named_parameters())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    ways: dict[str, Callable[[Encoder], Encoder]] = {
        "bf16 autocast": lambda encoder: encoder,
        "bf16 tokens, too": lambda encoder: Encoder(encoder.backbone, encoder.head, residual="bf16"),
        "fp8, a scale a tensor": lambda encoder: with_fp8(encoder, by_row=False),
        "fp8, a scale a row": lambda encoder: with_fp8(encoder, by_row=True),
    }
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        shape = {"patch_size": 8, "depth": args.depth, "embed_dim": args.width, "num_heads": args.width // 64}
        backbone = build_backbone("vit_small_patch16_224", image_size=64, other_sizes=[32], model_args=shape)
        encoder = Encoder(backbone, ProjectionHead(args.width))
        crops = [torch.randn(4, 3, size, size) for size in (64, 64, 32, 32, 32, 32)]
        exact = results(copy.deepcopy(encoder).double(), [crop.double() for crop in crops], autocast=False)
        for name, way in ways.items():
            found = results(way(copy.deepcopy(encoder)), crops, autocast=True)
            errors[name].append(tuple(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact)))
    print(f"{'distance to float64, mean of ' + str(args.seeds) + ' seeds':<40}{'embeddings':>12}{'gradients':>12}")
    for name, pairs in errors.items():
        print(f"  {name:<38}" + "".join(f"{sum(values) / len(values):>11.2%} " for values in zip(*pairs)))


if __name__ == "__main__":
    main()
