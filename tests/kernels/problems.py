"""Inputs of the kernels' tests and the definitions that they are held to; imports torch and the kernels alone, so that the tests on a GPU
need no more."""

import torch
from torch.nn.functional import normalize

from massl_fast.kernels import memory_cross_entropy, partition_indices


def unit_rows(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1).to(dtype)


def case(views=4, teachers=2, images=5, width=24, entries=96, *, dtype=torch.float64, close=True):
    """Student, teacher and memory; part of the memory lies close to the rows, so that some logits are large."""
    student, teacher = unit_rows(views, images, width, seed=0), unit_rows(teachers, images, width, seed=1)
    memory = unit_rows(entries, width, seed=2)
    if close:
        near = min(entries // 2, views * images)
        memory[:near] = normalize(student.reshape(-1, width)[:near] + 0.2 * memory[:near], dim=-1)
    return student.to(dtype), teacher.to(dtype), memory.to(dtype)


def loss_and_gradient(student, teacher, memory, **arguments):
    student = student.detach().clone().requires_grad_()
    result = memory_cross_entropy(student, teacher, memory, **arguments)
    (gradient,) = torch.autograd.grad(result.loss, student)
    return result, gradient


def readout_case(rows=13, width=10, entries=57, values=7, block_size=16, *, seed=0, dtype=torch.float64):
    """Arguments of a read-out with every extension; the partition leaves a remainder out."""
    generator = torch.Generator().manual_seed(seed)
    return dict(
        rows=unit_rows(rows, width, seed=seed).to(dtype),
        memory=unit_rows(entries, width, seed=seed + 1).to(dtype),
        values=torch.randn(entries, values, generator=generator, dtype=torch.float64).to(dtype),
        key_bias=torch.randn(entries, generator=generator, dtype=torch.float64),
        row_group=torch.randint(4, (rows,), generator=generator),
        key_group=torch.randint(4, (entries,), generator=generator),
        block_size=block_size,
        temperature=0.1,
        partition=partition_indices(entries, seed=seed, step=5),
    )


def defined_logits(rows, memory, *, key_bias=None, row_group=None, key_group=None, block_size, temperature, partition, **_):
    """The logits [R, B, block_size] in float64, and the entries [B, block_size] of the blocks."""
    blocks = len(memory) // block_size
    entries = partition[: blocks * block_size].long().view(blocks, block_size)
    logits = torch.einsum("rd,bkd->rbk", rows.double(), memory.double()[entries]) / temperature
    if key_bias is not None:
        logits = logits + key_bias.double()[entries]
    if row_group is not None:
        logits = logits.masked_fill(row_group[:, None, None] == key_group[entries], -torch.inf)
    return logits, entries


def defined_readout(**arguments):
    logits, entries = defined_logits(**arguments)
    values = arguments.get("values")
    values = (arguments["memory"] if values is None else values).double()[entries]
    logsumexp = logits.logsumexp(-1)
    weights = (logits - logsumexp[..., None]).exp().masked_fill((logsumexp == -torch.inf)[..., None], 0.0)
    return torch.einsum("rbk,bkd->rd", weights, values), logsumexp


def defined_readback(*, logsumexp, row_values=None, row_weight=None, **arguments):
    logits, entries = defined_logits(**arguments)
    rows, blocks, _ = logits.shape
    logsumexp = logsumexp.double().view(rows, blocks)
    weights = (logits - logsumexp[..., None]).exp().masked_fill((logsumexp == -torch.inf)[..., None], 0.0)
    if row_weight is not None:
        weights = weights * row_weight.double().view(rows, -1, 1)
    result = torch.zeros(len(arguments["memory"]), 1 if row_values is None else row_values.shape[1], dtype=torch.float64)
    y = torch.ones(rows, 1, dtype=torch.float64) if row_values is None else row_values.double()
    result[entries.flatten()] = torch.einsum("rbk,rd->bkd", weights, y).flatten(0, 1)
    return result.squeeze(1) if row_values is None else result


def without(arguments, *names):
    return {name: value for name, value in arguments.items() if name not in names}
