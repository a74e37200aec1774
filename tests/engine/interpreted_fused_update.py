"""The fused update's kernel in the interpreter (TRITON_INTERPRET=1): prints its errors against float64; test_fused_update.py runs it."""

import json

import torch
from triton import knobs

from massl_fast.engine import fused_update_kernel
from massl_fast.engine.fused_update import update_tensors

BETAS = (0.9, 0.999)
SETTINGS = torch.tensor([1e-2, 0.1, 0.99, 0.05], dtype=torch.float64)
# Parts of a block, whole blocks, dimensions of size 1, channels-last; more weights than one launch takes.
SHAPES = [(fused_update_kernel.BLOCK,), (2 * fused_update_kernel.BLOCK + 37,), (1, 1, 7), (4, 3, 2, 2), (1,)]
SHAPES += [(n,) for n in range(2, fused_update_kernel.GROUP)]


def tensors(dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Weights, gradients, moments and teachers, the same numbers in any dtype."""
    generator = torch.Generator().manual_seed(0)
    kinds = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(5)]
    kinds[3] = [second.square() for second in kinds[3]]
    for kind in kinds:
        kind[3] = kind[3].contiguous(memory_format=torch.channels_last)
    kinds[1][5] = torch.randn(SHAPES[5][0] + 1, generator=generator)[1:]  # not aligned to 16 bytes
    return [[tensor.to(dtype) if dtype != tensor.dtype else tensor for tensor in kind] for kind in kinds]


def arguments(dtype: torch.dtype, finite: bool):
    generator = torch.Generator().manual_seed(1)
    count = len(SHAPES)
    decays = [number % 3 != 0 for number in range(count)]
    factors = torch.rand(count, generator=generator).to(dtype)
    corrections = 0.01 + 0.99 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return decays, factors, corrections, torch.tensor(finite), SETTINGS


def flat(kinds: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat([tensor.flatten() for tensor in kind]).double() for kind in (kinds[0], *kinds[2:])]


def main() -> None:
    assert knobs.runtime.interpret, "to be run with TRITON_INTERPRET=1"
    betas = torch.tensor(BETAS, dtype=torch.float64)
    exact, plain, fused = tensors(torch.float64), tensors(torch.float32), tensors(torch.float32)
    update_tensors(*exact, *arguments(torch.float64, True), betas, 1e-8)
    update_tensors(*plain, *arguments(torch.float32, True), betas, 1e-8)
    fused_update_kernel.update_(*fused, *arguments(torch.float32, True), BETAS, 1e-8)
    skipped, untouched = tensors(torch.float32), tensors(torch.float32)
    for gradient in skipped[1]:
        gradient.fill_(torch.nan)
    fused_update_kernel.update_(*skipped, *arguments(torch.float32, False), BETAS, 1e-8)
    report = {
        "names": ["weights", "first moments", "second moments", "teachers"],
        "fused_errors": [(a - b).norm().item() for a, b in zip(flat(fused), flat(exact))],
        "plain_errors": [(a - b).norm().item() for a, b in zip(flat(plain), flat(exact))],
        "moved": [(a - b).norm().item() for a, b in zip(flat(fused), flat(untouched))],
        "skipped": [torch.equal(a, b) for a, b in zip(flat(skipped), flat(untouched))],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
