"""Every shipped configuration, compiled without a GPU, keeps what it was chosen for; and the counts notice one that does not."""

import json
import os
from dataclasses import replace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from massl_fast import cli
from massl_fast.kernels import consistency_kernel, disassembly, fused_kernels, machine_code, partition_kernel, ring_kernel, throughput
from massl_fast.kernels.configurations import neighbours

ALL = "MASSL_FAST_TEST_ALL_CONFIGURATIONS"
SHIPPED = [(arch, variant) for arch in machine_code.ARCHITECTURES for variant in machine_code.shipped(arch)]


def in_every_run(arch: str, variant: machine_code.Variant) -> bool:
    """The published width in 16 bits on every architecture, one of float32, what losses ask for on two; the rest takes minutes."""
    if variant.extensions:
        return variant.width == 256 and variant.dtype == torch.bfloat16 and arch in ("sm_80", "sm_90")
    return variant.width == 256 and (variant.dtype != torch.float32 or (arch == "sm_80" and variant.constant_pivot))


def parameter(arch: str, variant: machine_code.Variant):
    skipped = not in_every_run(arch, variant) and os.environ.get(ALL) != "1"
    marks = pytest.mark.skipif(skipped, reason=f"Compiling every configuration takes minutes; {ALL}=1 asks for it.")
    return pytest.param(arch, variant, id=f"{arch} {variant.name}", marks=marks)


def known_spill(arch: str, variant: machine_code.Variant) -> int:
    """Bytes that may be spilled. The choices are those of Triton 3.9, with which there are none; 3.6 spills these at the published width
    (bench/notes/kernels.md), which costs time and no correctness. 3.7 and 3.8 were not tried.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) or variant.width != 256:
        return 0
    if arch == "sm_90":
        return 120 if variant.back and variant.dtype == torch.bfloat16 else 0
    if arch in ("sm_86", "sm_89"):
        return 16 if variant.dtype == torch.bfloat16 and not variant.constant_pivot else 0
    return 240 if arch == "sm_100" else 0


@pytest.mark.parametrize(("arch", "variant"), [parameter(*one) for one in SHIPPED])
def test_shipped_configuration(arch, variant):
    found = machine_code.resources(variant, arch)
    assert found.tensor_core_instructions > 0, "no tensor cores"
    assert found.async_copy_instructions > 0, "no asynchronous copies"
    assert found.pipeline_buffers > 1, "a single buffer: loads wait for products"
    assert found.spill_bytes <= known_spill(arch, variant), f"{found.spill_bytes} bytes of registers spilled"
    assert found.overwritten_operands == 0, "a register changes while a product may still read it"
    assert 0 < found.shared_bytes <= found.shared_bytes_limit == machine_code.ARCHITECTURES[arch].shared_bytes
    assert 0 < found.registers <= 255 and found.programs_per_multiprocessor >= (1 if variant.extensions else variant.choice.programs)


def test_every_architecture_ships_16_bits_at_the_published_width():
    chosen = {(arch, variant.dtype) for arch, variant in SHIPPED if variant.width == 256}
    assert chosen >= {(arch, dtype) for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100") for dtype in (torch.bfloat16, torch.float16)}


def one(arch: str) -> machine_code.Variant:
    return next(variant for at, variant in SHIPPED if at == arch and variant.width == 256 and variant.dtype == torch.bfloat16)


@pytest.mark.parametrize("constant_pivot", [True, False], ids=["constant pivot", "running pivot"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_temperatures_on_the_device_and_uneven_blocks_cost_no_spill(arch, constant_pivot):
    variant = replace(one(arch), constant_pivot=constant_pivot, temps_on_device=True, even_blocks=False)
    found = machine_code.resources(variant, arch)
    assert found.spill_bytes == found.overwritten_operands == 0 and found.pipeline_buffers > 1


def hopper_neighbours() -> dict[str, machine_code.Variant]:
    """What the tuner tries at the published width, by name; in every run two programs per multiprocessor, the rest takes half a minute."""
    shipped = [variant for arch, variant in SHIPPED if arch == "sm_90" and (variant.width, variant.dtype) == (256, torch.bfloat16)]
    shipped = [variant for variant in shipped if not variant.extensions]
    tried = [replace(variant, choice=choice) for variant in shipped for choice in neighbours(variant.choice, variant.width)[1:]]
    return {
        variant.name: variant
        for variant in tried
        if os.environ.get(ALL) == "1" or (variant.constant_pivot and variant.choice.programs == 2)
    }


@pytest.mark.parametrize("variant", [pytest.param(one, id=name) for name, one in hopper_neighbours().items()])
def test_what_the_tuner_tries_on_hopper_keeps_operands_until_products_have_read_them(variant):
    assert machine_code.resources(variant, "sm_90").overwritten_operands == 0


LOOP = """
.L_x_1:
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR12], RZ, !UPT, gsb0 ;
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0020*/                   F2FP.BF16.F32.PACK_AB R184, R153, R152 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R88, R184, gdesc[UR12].tnspB, R88, gsb0 ;
        /*0040*/                   {middle} ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(
    ("middle", "hazards"),
    [
        ("FADD R7, R184, R8", 0),
        ("MOV R187, RZ", 1),
        ("@P1 LDG.E.64 R182, desc[UR16][R152.64]", 0),
        ("@P1 LDG.E.128 R182, desc[UR16][R152.64]", 1),
        ("ISETP.GE.AND P0, PT, R184, 0x1, PT", 0),
        ("SHFL.BFLY PT, R185, R4, 0x2, 0x1f", 1),
        ("FMUL R151, R151, R2", 1),
        ("STS.128 [R184], R88", 0),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 0),
    ],
)
def test_the_walk_notices_a_register_that_changes_while_a_product_may_read_it(middle, hazards):
    found = disassembly.overwritten(disassembly.inner_loop(LOOP.replace("{middle}", middle)))
    assert len(found) == hazards


def test_the_walk_follows_a_product_into_the_next_turn():
    body = disassembly.inner_loop(LOOP.replace("{middle}", "NOP").replace("R152, gdesc[UR12], RZ", "R152, gdesc[UR14], RZ"))
    early = disassembly.Instruction(-16, "MOV", ("R186", "RZ"))
    assert disassembly.overwritten([early, *body]) == [early]


def test_counts_notice_a_kernel_without_a_pipeline():
    variant = one("sm_80")
    found = machine_code.resources(replace(variant, choice=replace(variant.choice, stages=1)), "sm_80")
    assert found.pipeline_buffers == 1 and found.async_copy_instructions == 0 and found.tensor_core_instructions > 0


def test_counts_notice_a_kernel_that_spills(monkeypatch, capsys):
    variant = one("sm_80")
    greedy = replace(variant, choice=replace(variant.choice, block_rows=128, warps=4, stages=2))
    monkeypatch.setattr(machine_code, "shipped", lambda arch: [greedy])
    assert cli.main(["inspect", "--arch", "sm_80", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["spill_bytes"] > 0


@pytest.mark.parametrize("as_json", [True, False])
def test_inspect_prints_rows(monkeypatch, capsys, as_json):
    variant = one("sm_90")
    if os.environ.get(ALL) != "1":
        monkeypatch.setattr(machine_code, "shipped", lambda arch: [variant])
    assert cli.main(["inspect", "--arch", "sm_90", *["--json"] * as_json]) == 0
    printed = capsys.readouterr().out
    assert variant.name in printed
    if as_json:
        keys = {
            "kernel",
            "configuration",
            "registers",
            "spill_bytes",
            "shared_bytes",
            "tensor_core_instructions",
            "async_copy_instructions",
        }
        rows = json.loads(printed)
        assert rows and all(keys <= row.keys() for row in rows)


MODELLED = """
.L_x_1:
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR12], RZ, !UPT, gsb0 ;
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0020*/                   MUFU.EX2 R184, R152 ;
        /*0030*/                   F2F.BF16.F32 R184, R184 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R4+0x10000], desc[UR16][R6.64] ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R88, R184, gdesc[UR12].tnspB, R88, gsb0 ;
        /*0060*/                   LDS R7, [R8] ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize("programs", [1, 2])
def test_the_model_counts_what_each_unit_does(programs):
    """Eight warps, two groups of four: figures by hand."""
    found = throughput.clocks(MODELLED, "sm_90", 2 * 2 * 64 * 64 * 16, 8, programs)
    assert found.tensor_cores == 2 * 2 * (2 * 64 * 64 * 16) / 4096 * programs
    assert found.transcendental == 2 * 32 * 8 / 16 * programs and found.issue == 8 * 8 / 4 * programs
    operands, others = 2 * 32 * (64 + 64 + 64), 8 * 32 * (16 + 4)  # the first product reads both from shared memory
    assert found.shared_memory == (operands + others) / 128 * programs
    assert found.second_cache == pytest.approx(8 * 32 * 16 / (5120 / 132) * programs)
    in_turns = max(128, operands / 128) + max(32, 16, others / 128)
    # Half of what the tensor cores do is for nothing: both groups compute the same.
    assert found.share_in_turns_percent == pytest.approx(100 * 64 / max(in_turns, found.second_cache / programs))
    assert found.share_overlapped_percent == pytest.approx(100 * 64 / max(128, (operands + others) / 128))


def test_the_model_of_a_loop_without_products_is_an_error():
    with pytest.raises(ValueError, match="no loop with tensor-core"):
        throughput.clocks(LOOP.replace("HGMMA", "FMUL"), "sm_90", 1, 8)


@pytest.mark.parametrize(("arch", "rate"), [("sm_80", 2048), ("sm_90", 4096)])
def test_inspect_prints_a_model_marked_as_one(monkeypatch, capsys, arch, rate):
    variant = one(arch)
    monkeypatch.setattr(machine_code, "shipped", lambda arch: [variant])
    assert cli.main(["inspect", "--model", "--arch", arch]) == 0
    assert "a model, not a measurement" in (printed := capsys.readouterr().out) and variant.name in printed
    assert cli.main(["inspect", "--model", "--arch", arch, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["model"] is True
    assert row["tensor_cores"] == 4 * variant.choice.block_rows * variant.choice.block_entries * 256 / rate  # nothing twice
    assert 50 < row["share_in_turns_percent"] < row["share_overlapped_percent"] <= 100


def test_the_model_of_an_architecture_without_rates_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(machine_code, "compile_variant", lambda *_: pytest.fail("compiled"))
    assert cli.main(["inspect", "--model", "--arch", "sm_86"]) == 2
    assert "sm_86" in (message := capsys.readouterr().err) and "sm_80, sm_90" in message


def test_inspect_of_an_unknown_architecture(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", "--arch", "sm_70"])
    assert ended.value.code == 2
    assert "sm_70" in (message := capsys.readouterr().err) and "sm_80" in message


FLOAT, HALF, INT32, INT64, FLAG = "*fp32", "*bf16", "*i32", "*i64", "*i8"
CONSISTENCY = {
    "statistics": (consistency_kernel.statistics_kernel, 4, {"HAS_SLOPE": True}, (64, {"sm_80": 32, "sm_90": 64})),
    "row gradient": (consistency_kernel.row_gradient_kernel, 8, {"SPLITS": 16}, (32, {"sm_80": 32, "sm_90": 32})),
    "entry gradient": (consistency_kernel.entry_gradient_kernel, 8, {}, (32, {"sm_80": 32, "sm_90": 32})),
}


NOT_IN_EVERY_RUN = pytest.mark.skipif(os.environ.get(ALL) != "1", reason=f"One architecture will do; {ALL}=1 asks for the other.")


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=NOT_IN_EVERY_RUN)])
@pytest.mark.parametrize("name", list(CONSISTENCY))
def test_the_kernels_of_partition_consistency_keep_their_registers(name, arch):
    """Ten views of 256 columns in bfloat16, as published."""
    kernel, warps, constants, (rows, entries) = CONSISTENCY[name]
    constants = constants | dict(V=8, T=2, IMAGES=rows // 8, WIDTH=256, PADDED_WIDTH=256, ROWS=rows, TEACHER_ROWS=16)
    constants |= dict(ENTRIES=entries[arch], PRECISION="tf32", STAGES=2)
    rows_and_entries = ("student_ptr", "teacher_ptr", "keys_ptr", "teacher_keys_ptr")
    pointers = {
        a: HALF if a in rows_and_entries else INT32 if a == "partition_ptr" else FLOAT for a in kernel.arg_names if a.endswith("_ptr")
    }
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    attributes = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in (*pointers, "block_size")}
    target, options = GPUTarget("cuda", int(arch[3:]), 32), dict(num_warps=warps, num_stages=2, enable_fp_fusion=True)
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    usage, code = machine_code._disassemble(compiled.asm["cubin"])
    loop = disassembly.inner_loop(code)
    assert "STACK:0" in usage and not disassembly.overwritten(loop) and any(one.opcode == "LDGSTS" for one in loop)
    assert compiled.metadata.shared <= machine_code.ARCHITECTURES[arch].shared_bytes


# What the run-time makes of an argument that is 1: a constant, on which tensor methods fail. The interpreter does not do that.
ASSEMBLE = dict.fromkeys(("student_ptr", "teacher_ptr"), HALF) | dict.fromkeys(
    ("readout_ptr", "logsumexp_ptr", "statistics_ptr", "gradient_ptr"), FLOAT
)
COMBINE = dict.fromkeys(("values_ptr", "totals_ptr", "pivots_ptr", "readout_ptr", "logsumexp_ptr"), FLOAT)
TEMPS = {"student_temp": "fp32", "teacher_temp": "fp32"}
DEVICE_TEMPS = dict.fromkeys(TEMPS, FLOAT)
WIDTHS = {"WIDTH": 24, "PADDED_WIDTH": 32}
PARTIALS = {"PER_BLOCK": False, "WIDTH": 24, "COLUMNS": 32, "BLOCKS": 4, "SLOTS": 8, "BLOCK_ROWS": 16}
WRITE = {"memory_ptr": HALF, "pointer_ptr": INT64, "rows_ptr": HALF, "enabled_ptr": FLAG}
SMALL_KERNELS = {
    "assemble": (fused_kernels.assemble_kernel, ASSEMBLE | TEMPS, WIDTHS | {"TEACHERS": 2, "TEMPS_ON_DEVICE": False}),
    "assemble, temperatures on the device": (
        fused_kernels.assemble_kernel,
        ASSEMBLE | DEVICE_TEMPS,
        WIDTHS | {"TEACHERS": 2, "TEMPS_ON_DEVICE": True},
    ),
    "combine": (fused_kernels.combine_kernel, COMBINE | TEMPS, PARTIALS | {"CONSTANT_PIVOT": False, "TEMPS_ON_DEVICE": False}),
    "combine, temperatures on the device": (
        fused_kernels.combine_kernel,
        COMBINE | DEVICE_TEMPS,
        PARTIALS | {"CONSTANT_PIVOT": True, "TEMPS_ON_DEVICE": True},
    ),
    "partition": (
        partition_kernel._partition_kernel,
        {"indices_ptr": INT32, "step_ptr": INT64},
        {"STEP_ON_DEVICE": True, "BLOCK": partition_kernel.BLOCK},
    ),
    "ring, write": (ring_kernel._write_kernel, WRITE, WIDTHS | {"EPS": 1e-6, "GUARDED": True}),
    "ring, advance": (ring_kernel._advance_kernel, {"pointer_ptr": INT64, "enabled_ptr": FLAG}, {"GUARDED": True}),
}


@pytest.mark.parametrize("ones", [False, True], ids=["many of everything", "one of everything"])
@pytest.mark.parametrize("kernel", list(SMALL_KERNELS))
def test_small_kernels_compile(kernel, ones):
    """V, T, pairs, images, blocks, entries or rows may each be 1, and that is a compile of its own."""
    function, types, constants = SMALL_KERNELS[kernel]
    signature = dict.fromkeys(function.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    constants = dict(constants)
    if ones:
        kept = {p.name for p in function.params if p.do_not_specialize}
        single = [name for name, kind in signature.items() if kind == "i32" and name not in kept]
        signature |= dict.fromkeys(single, "constexpr")
        constants |= dict.fromkeys(single, 1)
    compiled = triton.compile(ASTSource(function, signature, constants, {}), target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"]


def test_counts_of_rows_views_and_tiles_compile_nothing_anew():
    """Each would be a second and a third compile of a second or two: one where it is 1, one where 16 divides it."""
    kept = {"student_rows", "teacher_rows", "student_tiles", "blocks", "tiles", "share", "extra"}
    kernels = (fused_kernels.read_kernel, fused_kernels.combine_kernel, fused_kernels.assemble_kernel)
    for kernel in kernels:
        free = {p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize and not p.name.endswith(("_ptr", "_temp"))}
        assert free <= {"block_size"} and free.isdisjoint(kept)
