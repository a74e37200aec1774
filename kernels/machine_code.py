"""The fused kernels' machine code, without a GPU: kernels are compiled ahead of time, the code is read, resources are counted.

Every shipped configuration is compiled as the run-time would compile it for aligned inputs and blocks that fill their tiles. The figures
come from the compiler's own tools that Triton carries: registers and stack from cuobjdump, instructions from nvdisasm, buffers from
Triton's last intermediate code.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from massl_fast.kernels import disassembly, fused, throughput
from massl_fast.kernels.configurations import Configuration, back_configuration, configuration, padded_width, with_two_tiles
from massl_fast.kernels.fused_kernels import back_kernel, read_kernel

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor, from the CUDA C++ Programming Guide, table of technical specifications per compute capability."""

    capability: tuple[int, int]
    shared_bytes: int
    """Shared memory that one program can have."""
    shared_bytes_total: int
    """Shared memory of all resident programs, each of which takes 1 KiB more."""
    warps: int


ARCHITECTURES = {
    "sm_80": Architecture((8, 0), 163 * KIB, 164 * KIB, 64),
    "sm_86": Architecture((8, 6), 99 * KIB, 100 * KIB, 48),
    "sm_89": Architecture((8, 9), 99 * KIB, 100 * KIB, 48),
    "sm_90": Architecture((9, 0), 227 * KIB, 228 * KIB, 64),
    "sm_100": Architecture((10, 0), 227 * KIB, 228 * KIB, 64),
}
REGISTERS = 65536  # of a multiprocessor, on all of them
WIDTHS = (32, 64, 128, 256, 512)
# Of the read-out: other values than keys, biases, groups. Of the read-back: those, rows' values (their own, or others), weights.
EXTENSIONS = ("values", "own values", "bias", "groups", "weights", "stored order")
TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """One compile of the read kernel, or of the read-back's."""

    width: int
    dtype: torch.dtype
    constant_pivot: bool
    choice: Configuration
    temps_on_device: bool = False
    even_blocks: bool = True
    back: bool = False
    extensions: tuple[str, ...] = ()
    """Names from EXTENSIONS."""

    @property
    def name(self) -> str:
        c = self.choice
        pivot = "constant" if self.constant_pivot else "running"
        tile = f"{c.block_rows}x{c.block_entries} parts={c.parts} warps={c.warps} stages={c.stages}"
        rest = ", temperatures on the device" * self.temps_on_device + ", uneven blocks" * (not self.even_blocks)
        rest += "".join(f", {extension}" for extension in self.extensions)
        return f"{TRITON_NAMES[self.dtype]} D={self.width} {'back' if self.back else pivot + ' pivot'}, {tile}{rest}"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes; instructions are counted in the whole machine code, once each however often they run."""

    arch: str
    kernel: str
    configuration: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_bytes_limit: int
    tensor_core_instructions: int
    async_copy_instructions: int
    overwritten_operands: int
    """Instructions of the inner loop that write a register which a product may still read."""
    pipeline_buffers: int
    instructions: int
    warps: int
    programs_per_multiprocessor: int
    occupancy_percent: float


def shipped(arch: str) -> Iterator[Variant]:
    """Every configuration that ships for an architecture: dtypes × widths × pivots, then the extensions that the losses use."""
    architecture = ARCHITECTURES[arch]
    capability, shared = architecture.capability, architecture.shared_bytes
    for dtype in TRITON_NAMES:
        for width in WIDTHS:
            choice = configuration(capability, width, dtype, shared)
            if choice is not None:
                for constant_pivot in (False,) if dtype == torch.float16 else (True, False):
                    yield Variant(width, dtype, constant_pivot, choice)
    for dtype in TRITON_NAMES:
        for width in WIDTHS:
            choice, back = configuration(capability, width, dtype, shared), back_configuration(capability, width, dtype, shared)
            if choice is not None and back is not None:
                two, back_two = (with_two_tiles(one, capability, (width, width), dtype, shared) for one in (choice, back))
                yield Variant(width, dtype, False, two, extensions=("values", "bias", "stored order"))
                yield Variant(width, dtype, False, choice, even_blocks=False, extensions=("groups", "stored order"))
                yield Variant(width, dtype, False, back, back=True, extensions=("own values", "weights", "stored order"))
                yield Variant(width, dtype, False, back_two, back=True, extensions=("values", "bias", "weights", "stored order"))


def compile_variant(variant: Variant, arch: str) -> Any:
    """Triton's compiled kernel; needs no GPU."""
    kernel, choice, name = back_kernel if variant.back else read_kernel, variant.choice, TRITON_NAMES[variant.dtype]
    has = {extension: extension in variant.extensions for extension in EXTENSIONS}
    padded = padded_width(variant.width, choice.parts)
    constants = {
        "WIDTH": variant.width,
        "PADDED_WIDTH": padded,
        "VALUE_WIDTH": variant.width,
        "PADDED_VALUE_WIDTH": padded,
        "PARTS": choice.parts,
        "GATHERED": not has["stored order"],
        "OTHER_VALUES": has["values"],
        "HAS_BIAS": has["bias"],
        "HAS_GROUPS": has["groups"],
        "TEMPS_ON_DEVICE": variant.temps_on_device,
        "PRECISION": fused.PRECISION,
        "STAGES": choice.stages,
        "LOAD_KEYS": choice.load_keys,
    }
    if variant.back:
        constants |= {
            "BLOCK_ENTRIES": choice.block_rows,
            "BLOCK_ROWS": choice.block_entries,
            "HAS_VALUES": has["values"] or has["own values"],
            "HAS_FACTOR": has["weights"],
            "SCALED": variant.dtype == torch.float16,
            "SIZE": 2.0 ** -fused.headroom(variant.dtype),
        }
    else:
        constants |= {
            "BLOCK_ROWS": choice.block_rows,
            "BLOCK_ENTRIES": choice.block_entries,
            "EVEN_BLOCK": variant.even_blocks,
            "CONSTANT_PIVOT": variant.constant_pivot,
            "EITHER_PIVOT": variant.temps_on_device and variant.dtype != torch.float16 and not variant.extensions,
            "HEADROOM": fused.headroom(variant.dtype),
            "MASK_STORES": choice.mask_stores,
        }
    rows_and_entries = ("student_ptr", "teacher_ptr", "rows_ptr", "memory_ptr", "entry_values_ptr", "row_values_ptr")
    integers = ("partition_ptr", "row_group_ptr", "key_group_ptr")
    temperature = "*fp32" if variant.temps_on_device else "fp32"

    def kind(argument: str) -> str:
        if argument in rows_and_entries:
            return f"*{name}"
        if argument.endswith("_ptr"):
            return "*i32" if argument in integers else "*fp32"
        return temperature if argument.startswith(("student_temp", "teacher_temp", "temperature")) else "i32"

    signature = {argument: "constexpr" if argument in constants else kind(argument) for argument in kernel.arg_names}
    # As the run-time specialises aligned pointers and round numbers; without it nothing is copied asynchronously.
    aligned = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
    aligned += [argument for argument in ("block_size", "entries", "factor_stride") if variant.even_blocks and argument in kernel.arg_names]
    attributes = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in aligned}
    major, minor = ARCHITECTURES[arch].capability
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options={"num_warps": choice.warps, "num_stages": choice.stages, "enable_fp_fusion": True},
    )


def resources(variant: Variant, arch: str) -> Resources:
    """Compile one variant and read its machine code."""
    compiled = compile_variant(variant, arch)
    usage, code = _disassemble(compiled.asm["cubin"])
    registers, stack = (int(re.findall(rf"\b{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
    found = disassembly.instructions(code)
    # The tile buffers are the allocations with a leading dimension; all others hold one tensor.
    buffers = [int(depth) for depth in re.findall(r"local_alloc\b.*?memdesc<(\d+)x\d+x\d+x", compiled.asm["ttgir"])]
    architecture, shared = ARCHITECTURES[arch], compiled.metadata.shared
    warps = compiled.metadata.num_warps
    registers_a_warp = -(-registers * 32 // 256) * 256
    programs = min(
        architecture.shared_bytes_total // (shared + KIB),
        REGISTERS // registers_a_warp // warps,
        architecture.warps // warps,
    )
    return Resources(
        arch=arch,
        kernel="back" if variant.back else "read",
        configuration=variant.name,
        registers=registers,
        spill_bytes=stack,
        shared_bytes=shared,
        shared_bytes_limit=architecture.shared_bytes,
        tensor_core_instructions=sum(one.is_product for one in found),
        async_copy_instructions=sum(one.opcode in ("LDGSTS", "UTMALDG", "UBLKCP") for one in found),
        overwritten_operands=len(disassembly.overwritten(disassembly.inner_loop(code))),
        pipeline_buffers=min(buffers, default=1),
        instructions=len(found),
        warps=warps,
        programs_per_multiprocessor=programs,
        occupancy_percent=round(100 * programs * warps / architecture.warps, 1),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a compiled kernel as text."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([tools / tool, option, path], check=True, capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return usage, code


def modelled(arch: str) -> list[dict[str, Any]]:
    """A model of every shipped configuration's speed: clocks per unit of the inner loop, and the share of the nominal rate that follows."""
    throughput.check_architecture(arch)
    rows = []
    for variant in shipped(arch):
        choice = variant.choice
        _, code = _disassemble(compile_variant(variant, arch).asm["cubin"])
        operations = 4 * choice.block_rows * choice.block_entries * variant.width  # two products of a tile
        found = throughput.clocks(code, arch, operations, choice.warps, choice.programs)
        rows.append({"arch": arch, "configuration": variant.name, "programs": choice.programs, "model": True} | asdict(found))
    return rows
