"""The partition as one small Triton launch: the twin of ``shuffle.shuffle``, bit for bit."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from massl_fast.kernels import shuffle

ROUNDS: tl.constexpr = tl.constexpr(shuffle.ROUNDS)
MULTIPLIER: tl.constexpr = tl.constexpr(shuffle.MULTIPLIER)
ROUND_STRIDE: tl.constexpr = tl.constexpr(shuffle.ROUND_STRIDE)
REFLECTION_STATE: tl.constexpr = tl.constexpr(shuffle.STATES[0])
KEY_STATE: tl.constexpr = tl.constexpr(shuffle.STATES[1])
BLOCK = 256


@triton.jit
def _mix(x):
    """``shuffle._mix`` on uint32."""
    x = ((x >> 16) ^ x) * MULTIPLIER
    x = ((x >> 16) ^ x) * MULTIPLIER
    return (x >> 16) ^ x


@triton.jit
def _state(state, seed_low, seed_high, step_low, step_high):
    return _mix(_mix(_mix(_mix(state ^ seed_low) ^ seed_high) ^ step_low) ^ step_high)


@triton.jit(do_not_specialize=["entries", "seed_low", "seed_high", "step_low", "step_high"])
def _partition_kernel(
    indices_ptr,  # [entries] int32
    entries,
    seed_low,  # words of 32 bits, as int32
    seed_high,
    step_low,
    step_high,
    step_ptr,  # int64 [1] where STEP_ON_DEVICE
    STEP_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if STEP_ON_DEVICE:
        step = tl.load(step_ptr)
        low = step.to(tl.uint32)
        high = (step >> 32).to(tl.uint32)
    else:
        low = step_low.to(tl.uint32)
        high = step_high.to(tl.uint32)
    seed_low = seed_low.to(tl.uint32)
    seed_high = seed_high.to(tl.uint32)
    zero = seed_low ^ seed_low
    reflection_state = _state(zero + REFLECTION_STATE, seed_low, seed_high, low, high)
    key_state = _state(zero + KEY_STATE, seed_low, seed_high, low, high)

    o_entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_position = tl.minimum(o_entry, entries - 1)
    stride = zero
    for _ in range(ROUNDS):
        stride += ROUND_STRIDE
        reflection = ((_mix(reflection_state + stride).to(tl.uint64) * entries.to(tl.uint64)) >> 32).to(tl.int32)
        key = _mix(key_state + stride)
        b_partner = reflection - b_position
        b_partner = tl.where(b_partner < 0, b_partner + entries, b_partner)
        b_hash = _mix(tl.maximum(b_position, b_partner).to(tl.uint32) ^ key)
        b_position = tl.where((b_hash >> 31) == 1, b_partner, b_position)
    tl.store(indices_ptr + o_entry, b_position, mask=o_entry < entries)


def supported(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def partition_indices(num_entries: int, seed: int, step: int | Tensor, device: torch.device) -> Tensor:
    """``partition.partition_indices`` on a GPU: no sort, no host work, one launch."""
    indices = torch.empty(num_entries, dtype=torch.int32, device=device)
    on_device = isinstance(step, Tensor)
    low, high = (0, 0) if isinstance(step, Tensor) else _words(step)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _partition_kernel[(triton.cdiv(num_entries, BLOCK),)](
            indices,
            num_entries,
            *_words(seed),
            low,
            high,
            step if on_device else indices,
            STEP_ON_DEVICE=on_device,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return indices


def _words(number: int) -> tuple[int, int]:
    """Low and high 32 bits, as the signed integers that Triton passes in one type whatever their value."""
    low, high = ((number >> shift & shuffle.MASK) - (number >> shift + 31 & 1) * 2**32 for shift in (0, 32))
    return low, high
