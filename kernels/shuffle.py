"""The keyed shuffle: a bijection of [0, K) that any rank, device or resumed run computes from (seed, step) alone.

A swap-or-not shuffle (Hoang, Morris, Rogaway, An Enciphering Scheme Based on a Card Shuffle, CRYPTO 2012): in each round a position x is
paired with (reflection − x) mod K, and a hash of the pair says whether the two change places. Every round is an involution, so the whole is
a bijection for every K: no sort, no cycle walking, no table. Two positions keep their distance only while they move together, which 24
rounds leave a chance of 2**-24.

The hash needs products below 2**63 only, so Python integers, int64 tensors and Triton's unsigned integers agree bit for bit.
"""

from typing import Any

import torch
from torch import Tensor

ROUNDS = 24
MASK = 0xFFFFFFFF
MULTIPLIER = 0x119DE1F3  # of the two-multiplication finaliser by Thomas Mueller; below 2**31
ROUND_STRIDE = 0x9E3779B9  # 2**32 / golden ratio
STATES = (0x243F6A88, 0x85A308D3)  # first bits of pi: independent streams for reflections and swap keys


def check_step(step: Tensor) -> Tensor:
    """The step as a 0-d int64 tensor."""
    if step.numel() != 1 or step.dtype != torch.int64:
        raise ValueError(f"step must be an integer or an int64 tensor of one element; found {step.dtype} of shape {list(step.shape)}.")
    return step.reshape(())


def round_keys(num_entries: int, seed: int, step: int | Tensor) -> tuple[list, list]:
    """Reflection (below num_entries) and swap key (32 bits) of every round: integers, or 0-d int64 tensors where step is one."""
    words: tuple = (seed & MASK, seed >> 32 & MASK, step & MASK, step >> 32 & MASK)
    states = []
    for state in STATES:
        for word in words:
            state = _mix(state ^ word)
        states.append(state)
    if isinstance(step, Tensor):
        strides = torch.arange(1, ROUNDS + 1, device=step.device) * ROUND_STRIDE & MASK
        reflections = _mix(states[0] + strides & MASK) * num_entries >> 32
        return list(reflections.unbind()), list(_mix(states[1] + strides & MASK).unbind())
    strides = [r * ROUND_STRIDE & MASK for r in range(1, ROUNDS + 1)]
    return (
        [_mix(states[0] + stride & MASK) * num_entries >> 32 for stride in strides],
        [_mix(states[1] + stride & MASK) for stride in strides],
    )


def shuffle(positions: Tensor, num_entries: int, reflections: list, keys: list) -> Tensor:
    """Where the bijection sends int64 positions of [0, num_entries)."""
    for reflection, key in zip(reflections, keys):
        partner = reflection - positions
        partner = partner + (partner >> 63 & num_entries)
        hashed = torch.maximum(positions, partner) ^ key
        hashed = (hashed >> 16 ^ hashed) * MULTIPLIER & MASK
        hashed = (hashed >> 16 ^ hashed) * MULTIPLIER  # the rest of _mix leaves bit 31 as it is
        positions = torch.where((hashed & 2**31).bool(), partner, positions)
    return positions


def _mix(x: Any) -> Any:
    """A 32-bit hash of an integer or an int64 tensor, in which every bit of the result depends on every bit of x."""
    x = (x >> 16 ^ x) * MULTIPLIER & MASK
    x = (x >> 16 ^ x) * MULTIPLIER & MASK
    return x >> 16 ^ x
