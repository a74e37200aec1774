"""Sinkhorn-Knopp's assignment as a bias per prototype: SwAV, and optionally DINOv2.

Q = exp(x·c/τ), normalised in turn over keys and over rows, ends as Q = softmax(x·c/τ + α): nothing of size rows × K has to be held, and the
bias goes where a centre goes. From α = 0 and any constant λ, each round is

    α_k ← α_k − log readback(rows, C; logsumexp λ, bias α)_k,    λ ← logsumexp of the read-out with bias α

where the last λ comes with the read-out that uses the bias. Sums over rows are sums over the rows of all ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from massl_fast.kernels import checks, reference
from massl_fast.kernels.backends import autocast, choose_backend, wide_dtype
from massl_fast.kernels.readout import read_back, read_out


@torch.no_grad()
def sinkhorn_bias(
    rows: Tensor,
    prototypes: Tensor,
    *,
    temperature: float | Tensor,
    iterations: int,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """The bias α [K], float32 (float64 for float64), that makes softmax(rows · Cᵀ/τ + α) the Sinkhorn-Knopp assignment of the rows.

    Sources: SwAV (NeurIPS 2020), section 3.1 and equation 5; DINOv2 (TMLR 2024), section 4. Pass it as ``key_bias``. A constant added to
    α changes nothing.

    Arguments:
        rows: unit rows [..., D]; float32, bfloat16, float16 (float64 for the reference and streaming backends). SwAV's queue may be among
            them.
        prototypes: unit rows [K, D] of the same dtype.
        temperature: ε, a positive number, or a float tensor of one element on the device.
        iterations: rounds, at least 1.
        sum_over_ranks: a function that returns the sum over ranks of a tensor [K] (a new tensor, or the same one changed); None: there is
            one rank.
        backend: as in ``memory_cross_entropy``.

    A key whose terms all underflow would get an infinite bias; its sum is clamped at the smallest normal number. Raises ValueError with the
    argument's name for anything that does not fit.
    """
    rows, prototypes = autocast(rows, prototypes)
    checks.check_rows("rows", rows, prototypes, "prototypes")
    temperature = checks.check_temperature("temperature", temperature, prototypes)
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1; found {iterations!r}.")
    rows, entries, wide = rows.reshape(-1, rows.shape[-1]), prototypes.shape[0], wide_dtype(prototypes)
    if backend == "reference":
        return reference.sinkhorn_bias(rows, prototypes, temperature, iterations, sum_over_ranks)
    forth, back = choose_backend(backend, prototypes, "memory_readout"), choose_backend(backend, prototypes, "memory_readback")
    # Only the logsumexp is needed: plain PyTorch reads out values of no width, the fused pass reads out the prototypes.
    values = prototypes[:, :0] if forth == "streaming" else None
    bias = torch.zeros(entries, device=rows.device, dtype=wide)
    logsumexp = torch.ones(rows.shape[0], 1, device=rows.device, dtype=wide) / temperature  # of unit rows no logit is larger
    for iteration in range(iterations):
        sums = read_back(rows, prototypes, logsumexp, entries, temperature, key_bias=bias, stored_order=True, backend=back)
        if sum_over_ranks is not None:
            sums = sum_over_ranks(sums)
        bias = bias - sums.clamp_min(torch.finfo(wide).tiny).log()
        if iteration + 1 < iterations:
            logsumexp = read_out(rows, prototypes, entries, temperature, values=values, key_bias=bias, stored_order=True, backend=forth)[1][
                :, None
            ]
    return bias
