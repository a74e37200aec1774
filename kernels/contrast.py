"""Contrast of queries against keys: MoCo-v3, SiT, and MMC's patches, whose own image is left out.

With u = q/|q|, v = k/|k|, R and L read out of the keys v at u, p_r = u_r·v_own(r)/τ and weights ω (1/R where none are given)

    loss = Σ_r ω_r (E_r − p_r),   ∂loss/∂u_r = ω_r/τ · (e^{L−E} R + (e^{p−E}·[own left out] − 1) v_own(r))

where E = L if the row's own key is among those it sees, and E = log(e^L + e^p) if groups leave its whole image out: the positive then joins
by arithmetic on rows, and no mask of rows × keys is needed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from massl_fast.kernels import checks, reference
from massl_fast.kernels.backends import autocast, choose_backend, wide_dtype
from massl_fast.kernels.loss import AttachGradient
from massl_fast.kernels.readout import read_out


class Contrast(NamedTuple):
    """What ``contrast`` returns: 0-d tensors, float32 (float64 for float64 inputs); means in proportion to the rows' weights."""

    loss: Tensor
    """Cross-entropy in nats of the row's own key, differentiable in the queries."""
    entropy: Tensor
    """Entropy of the rows' distributions over keys, in nats."""
    similarity: Tensor
    """Cosine of query and own key, -1 to 1."""


def contrast(
    query: Tensor,
    key: Tensor,
    own: Tensor,
    *,
    temperature: float | Tensor,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
    row_weight: Tensor | None = None,
    backend: str = "auto",
) -> Contrast:
    """InfoNCE of each query against all keys; its own key is the right one. Source: MoCo v3 (ICCV 2021), equation 1, without the factor 2τ.

    Arguments:
        query: [..., D], normalised here; float32, bfloat16, float16 (float64 for the reference and streaming backends).
        key: [M, D], normalised here, of the same dtype; usually the keys of all ranks. Receives no gradient.
        own: int64 [...], which key belongs to each query. Checked on the CPU alone.
        temperature: a positive number, or a float tensor of one element on the device.
        row_group, key_group: integers [...] and [M]. A row sees no key of its own group except its own key (MMC's patches: the groups
            are images).
        row_weight: float [...]; None: the mean over rows. A row of weight 0 takes no part.
        backend: as in ``memory_cross_entropy``.

    Under autocast the unit rows are cast to its dtype. Raises ValueError with the argument's name for anything that does not fit.
    """
    checks.check_plain_tensors((query, key))
    checks.check_rows("query", query, key, "key")
    checks.check_own(own, query, key)
    checks.check_groups(row_group, key_group, query, key)
    if row_weight is not None:
        checks.check_row_weight(row_weight, query)
    wide = wide_dtype(key)
    unit, keys = F.normalize(query.to(wide), dim=-1), F.normalize(key.detach().to(wide), dim=-1)
    unit, keys = autocast(unit.to(query.dtype), keys.to(key.dtype))
    unit = unit.reshape(-1, unit.shape[-1])
    own = own.reshape(-1).long()
    temperature = checks.check_temperature("temperature", temperature, keys)
    if row_group is not None:
        row_group = row_group.reshape(-1)
    if row_weight is None:
        row_weight = keys.new_full((unit.shape[0],), 1 / max(1, unit.shape[0]), dtype=wide)
    row_weight = row_weight.detach().reshape(-1).to(wide)
    u, v = unit.detach().to(wide), keys.index_select(0, own).to(wide)
    cosine = (u * v).sum(-1)
    positive = cosine / temperature
    if backend == "reference":
        loss, entropies = reference.contrast(unit, keys, own, temperature, row_group, key_group, row_weight)
    else:
        backend = choose_backend(backend, keys, "memory_readout")
        readout, logsumexp = read_out(
            unit.detach(), keys, keys.shape[0], temperature,
            row_group=row_group, key_group=key_group, stored_order=True, backend=backend,
        )  # fmt: skip
        total, others, joined = logsumexp, 1.0, 0.0
        if row_group is not None:
            total = torch.logaddexp(logsumexp, positive)
            others, joined = (logsumexp - total).exp()[:, None], (positive - total).exp()[:, None]
        mean_key = others * readout + joined * v
        entropies = total - (u * mean_key).sum(-1) / temperature
        loss = (row_weight * (total - positive)).sum()
        gradient = (mean_key - v) * (row_weight[:, None] / temperature)
        loss = AttachGradient.apply(unit, loss, gradient)
    weight = row_weight / row_weight.sum().clamp_min(torch.finfo(wide).tiny)
    return Contrast(loss, (weight * entropies.detach()).sum(), (weight * cosine).sum())
