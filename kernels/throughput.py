"""A model of the read kernel's speed: clocks that each unit of a multiprocessor needs for one turn of the inner loop, from machine code.

Nothing here is measured. Each unit is taken at its peak: the figures say which unit bounds the loop and what a change of the code buys,
not how long it takes. Rates per clock and multiprocessor: tensor cores from NVIDIA's A100 and H100 white papers (peak rate over
multiprocessors and boost clock); transcendental unit, issue and shared memory from the CUDA C++ Programming Guide, arithmetic throughput
and compute capabilities; the second cache from the A100 white paper, 5120 bytes per clock in all, which is taken for the H100, too.
"""

import math
from dataclasses import dataclass

from massl_fast.kernels.disassembly import Instruction, inner_loop


@dataclass(frozen=True)
class Rates:
    """Rates of one multiprocessor, per clock."""

    dense_operations: int
    """Operations of 16-bit products; TF32 products have half the rate."""
    cache_bytes: float
    """Bytes read from the second cache."""
    transcendental: int = 16
    issued: int = 4
    shared_bytes: int = 128


RATES = {"sm_80": Rates(2048, 5120 / 108), "sm_90": Rates(4096, 5120 / 132)}


@dataclass(frozen=True)
class Clocks:
    """Clocks that all programs of a multiprocessor need for one turn each, by the model."""

    tensor_cores: float
    transcendental: float
    issue: float
    shared_memory: float
    second_cache: float
    share_in_turns_percent: float
    """Share of the nominal rate where products and everything else take turns: the least that the units allow."""
    share_overlapped_percent: float
    """Share of the nominal rate where the busiest unit never waits: the most."""


def check_architecture(arch: str) -> None:
    if arch not in RATES:
        raise ValueError(f"The model knows the rates of {', '.join(RATES)}; found {arch}.")


def clocks(code: str, arch: str, operations: int, warps: int, programs: int = 1) -> Clocks:
    """The model for nvdisasm's text of a kernel of ``warps`` warps, ``programs`` of which share a multiprocessor.

    ``operations``: those that one turn of one program serves. Where warps compute the same product twice, tensor cores do more. Raises
    ValueError where the code has no loop with products, or the rates of the architecture are not known.
    """
    check_architecture(arch)
    rates, body, all_warps = RATES[arch], inner_loop(code), warps * programs
    products = [one for one in body if one.is_product]
    tensor = sum(_operations(one) / (1 if _is_half(one) else 0.5) * _groups(one, all_warps) for one in products) / rates.dense_operations
    operands = sum(_operand_bytes(one) * _groups(one, all_warps) for one in body) / rates.shared_bytes
    others = sum(_shared_bytes(one) for one in body) * all_warps / rates.shared_bytes
    transcendental = 32 * all_warps * sum(one.opcode in ("MUFU", "F2F") for one in body) / rates.transcendental
    issue = all_warps * len(body) / rates.issued
    cache = all_warps * sum(_loaded_bytes(one) for one in body) / rates.cache_bytes
    in_turns = max(max(tensor, operands) + max(transcendental, issue, others), cache)
    overlapped = max(tensor, operands + others, transcendental, issue, cache)
    nominal = operations * programs / (rates.dense_operations * (1 if all(map(_is_half, products)) else 0.5))
    return Clocks(tensor, transcendental, issue, operands + others, cache, 100 * nominal / in_turns, 100 * nominal / overlapped)


def _is_half(product: Instruction) -> bool:
    return "TF32" not in product.name


def _groups(instruction: Instruction, warps: int) -> float:
    """How often the multiprocessor carries out an instruction that each warp has once: HGMMA is one for four warps."""
    return warps / 4 if instruction.opcode == "HGMMA" else warps


def _operations(product: Instruction) -> int:
    return 2 * math.prod(product.shape)


def _operand_bytes(instruction: Instruction) -> int:
    """What products, or a warp's loads for them, read from shared memory."""
    if instruction.opcode == "HGMMA":
        rows, columns, _ = instruction.shape
        return 32 * (columns + (rows if instruction.operands[1].startswith("gdesc") else 0))  # 32 bytes of depth
    return 128 * instruction.matrices if instruction.opcode == "LDSM" else 0


def _shared_bytes(instruction: Instruction) -> int:
    """What everything else of a warp reads from or writes to shared memory, without bank conflicts."""
    return 32 * instruction.bytes_per_thread if instruction.opcode in ("LDS", "STS", "LDGSTS") else 0


def _loaded_bytes(instruction: Instruction) -> int:
    """What a warp loads from global memory."""
    return 32 * instruction.bytes_per_thread if instruction.opcode in ("LDG", "LDGSTS") else 0
