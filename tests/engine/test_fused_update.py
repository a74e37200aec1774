"""AdamW and the teacher in one pass, against PyTorch's AdamW and a moving average; its kernel interpreted and compiled ahead of time."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_no_sync import NothingIsRead
from torch import nn

from massl_fast.config import OptimizerSection
from massl_fast.engine.fused_update import AdamWWithTeacher
from massl_fast.engine.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors, update_weights_
from massl_fast.engine.schedules import StepSettings


class Pair:
    """What ``update_weights_`` needs of a student and its teacher."""

    def __init__(self):
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)).double()
        self.student.to(memory_format=torch.channels_last)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def twins(self):
        teacher = dict(self.teacher.named_parameters())
        return {name: (parameter, teacher[name]) for name, parameter in self.student.named_parameters()}

    def update_teacher_(self, momentum):
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters()):
            teacher.lerp_(student.detach(), 1 - momentum)

    def tensors(self, optimizer):
        return {
            **{f"student/{name}": t.clone() for name, t in self.student.state_dict().items()},
            **{f"teacher/{name}": t.clone() for name, t in self.teacher.state_dict().items()},
            **{name: t.clone() for name, t in optimizer_tensors(optimizer, self.student).items()},
        }


def settings_of(number: int) -> StepSettings:
    return StepSettings(1e-2 * (1 + number), 0.1 + 0.05 * number, 0.9 + 0.02 * number, {})


def take_step(pair, optimizer, number, *, clip=0.5, clip_mode="parameter", scale=None, finite=True, settings=None):
    torch.manual_seed(number)
    loss = pair.student(torch.randn(5, 3, 3, 3, dtype=torch.float64)).square().sum()
    (loss if scale is None else loss * scale).backward()
    gradients = [parameter.grad for parameter in pair.student.parameters()]
    norms = torch.stack(torch._foreach_norm(gradients)) / (1 if scale is None else scale)
    assert (norms > clip).any()
    if not finite:
        gradients[0].fill_(torch.nan)
    update_weights_(
        pair,
        optimizer,
        gradients,
        norms,
        torch.tensor(finite),
        settings or settings_of(number),
        clip=clip,
        clip_mode=clip_mode,
        loss_scale=scale,
    )
    pair.student.zero_grad()


def optimizer_of(pair, name: str):
    return build_optimizer(pair.student, OptimizerSection.model_construct(**{**OptimizerSection().model_dump(), "name": name}))


@pytest.mark.parametrize("clip_mode", ["parameter", "global"])
@pytest.mark.parametrize("scale", [None, torch.tensor(1024.0, dtype=torch.float64)], ids=["", "scaled"])
def test_equals_adamw_and_a_moving_average(clip_mode, scale):
    plain, fused = Pair(), Pair()
    pytorch, ours = optimizer_of(plain, "adamw"), optimizer_of(fused, "adamw_with_teacher")
    assert isinstance(ours, AdamWWithTeacher)
    for number in range(5):
        take_step(plain, pytorch, number, clip_mode=clip_mode)
        take_step(fused, ours, number, clip_mode=clip_mode, scale=scale)
    expected = plain.tensors(pytorch)
    assert expected.keys() == fused.tensors(ours).keys(), "checkpoints of the two are interchangeable"
    for name, tensor in fused.tensors(ours).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_settings_may_be_tensors():
    by_number, by_tensor = Pair(), Pair()
    one, other = optimizer_of(by_number, "adamw_with_teacher"), optimizer_of(by_tensor, "adamw_with_teacher")
    for number in range(3):
        take_step(by_number, one, number)
        tensors = StepSettings.of_vector(settings_of(number).vector(torch.device("cpu")), [])
        take_step(by_tensor, other, number, settings=tensors)
    expected = by_number.tensors(one)
    for name, tensor in by_tensor.tensors(other).items():
        assert torch.equal(tensor, expected[name]), name


def test_no_tensor_is_read():
    pair = Pair()
    optimizer = optimizer_of(pair, "adamw_with_teacher")
    take_step(pair, optimizer, 0)
    pair.student(torch.randn(5, 3, 3, 3, dtype=torch.float64)).sum().backward()
    gradients = [parameter.grad for parameter in pair.student.parameters()]
    with NothingIsRead():
        norms = torch.stack(torch._foreach_norm(gradients))
        finite = norms.isfinite().all()
        update_weights_(pair, optimizer, gradients, norms, finite, settings_of(1), clip=0.5, clip_mode="parameter", loss_scale=norms[0])


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(steps_before):
    pair = Pair()
    optimizer = optimizer_of(pair, "adamw_with_teacher")
    for number in range(steps_before):
        take_step(pair, optimizer, number)
    before = pair.tensors(optimizer)
    take_step(pair, optimizer, 7, finite=False)
    for name, tensor in pair.tensors(optimizer).items():
        assert torch.equal(tensor, before.get(name, torch.zeros_like(tensor))), name
    take_step(pair, optimizer, 8)
    assert all(tensor.isfinite().all() for tensor in pair.tensors(optimizer).values())


@pytest.mark.parametrize(("first", "then"), [("adamw", "adamw_with_teacher"), ("adamw_with_teacher", "adamw")])
def test_either_continues_from_the_others_checkpoint(first, then):
    whole, resumed = Pair(), Pair()
    optimizer = optimizer_of(whole, first)
    for number in range(2):
        take_step(whole, optimizer, number)
    # As read from a file: contiguous, whatever the layout of the weight.
    stored = {name: tensor.contiguous().clone() for name, tensor in optimizer_tensors(optimizer, whole.student).items()}
    resumed.student.load_state_dict(whole.student.state_dict())
    resumed.teacher.load_state_dict(whole.teacher.state_dict())
    other = optimizer_of(resumed, then)
    load_optimizer_tensors(other, resumed.student, stored)
    for number in range(2, 4):
        take_step(whole, optimizer, number)
        take_step(resumed, other, number)
    expected = whole.tensors(optimizer)
    for name, tensor in resumed.tensors(other).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("interpreted_fused_update.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernel_errs_no_more_than_plain_float32(interpreted):
    for name, fused, plain, moved in zip(*(interpreted[key] for key in ("names", "fused_errors", "plain_errors", "moved"))):
        assert moved > 1000 * plain, f"{name} hardly moved"
        assert fused <= 2 * plain, name


def test_kernel_leaves_a_step_that_is_not_finite(interpreted):
    assert all(interpreted["skipped"])


@pytest.mark.parametrize("capability", [80, 90])
def test_kernel_compiles_to_wide_loads(capability):
    """Ahead of time, no GPU needed: four elements an instruction, and no register spilled."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from massl_fast.engine import fused_update_kernel
    from massl_fast.kernels.machine_code import _disassemble

    kernel, count = fused_update_kernel._update_kernel, fused_update_kernel.GROUP
    constants = {"COUNT": count, "BLOCK": fused_update_kernel.BLOCK, "ALIGNED": True}
    signature = dict.fromkeys(kernel.arg_names, "fp32") | dict.fromkeys(constants, "constexpr")
    signature |= dict.fromkeys(kernel.arg_names[:5], ("*fp32",) * count)
    signature |= dict.fromkeys(("parts_ptr", "sizes_ptr", "decays_ptr"), "*i32") | {"factors_ptr": "*fp32", "finite_ptr": "*i1"}
    signature |= dict.fromkeys(("corrections_ptr", "settings_ptr"), "*fp64")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": fused_update_kernel.WARPS, "enable_fp_fusion": True},
    )
    usage, code = _disassemble(compiled.asm["cubin"])
    assert re.search(r"\bSTACK:0\b", usage), usage
    # A whole block: 5 tensors read and 4 written, each in BLOCK / (32 · warps) / 4 instructions a thread.
    instructions = fused_update_kernel.BLOCK // (32 * fused_update_kernel.WARPS) // 4
    assert len(re.findall(r"\bLDG\.E\.128\b", code)) == 5 * instructions
    assert len(re.findall(r"\bSTG\.E\.128\b", code)) == 4 * instructions
