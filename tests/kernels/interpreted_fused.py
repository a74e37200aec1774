"""Cases of the fused pass that test_fused_interpreted.py runs in a process of its own, where Triton interprets its kernels on the CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from problems import case, loss_and_gradient, unit_rows
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from massl_fast.kernels import available_backends, fused, memory_cross_entropy, memory_readout, partition_indices


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN, so that reading it, or leaving an output unwritten, shows."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    assert all(t.isnan().all() for t in (torch.empty(2), torch.empty_like(torch.ones(2)), torch.ones(2).new_empty(2)))


def check_budget(student, teacher, memory, **arguments):
    """Loss, telemetry and gradient against float64: at most twice the error that the reference has in the precision of the inputs."""
    truth, true_gradient = loss_and_gradient(student.double(), teacher.double(), memory.double(), **arguments, backend="reference")
    expected = torch.stack(list(truth))
    errors = {}
    for backend in ("reference", "triton"):
        result, gradient = loss_and_gradient(student, teacher, memory, **arguments, backend=backend)
        assert result.loss.dtype == torch.float32 and gradient.dtype == student.dtype
        figures = torch.stack([value.detach().double() for value in result])
        errors[backend] = [*(figures - expected).abs().tolist(), (gradient.double() - true_gradient).abs().max().item()]
    # Below these floors there is nothing to ask: what is returned is rounded, and figures are differences of logits this large.
    eps = torch.finfo(torch.float32).eps
    size = max(expected.abs().max().item(), 1 / min(arguments["student_temp"], arguments["teacher_temp"]))
    floors = [2 * eps * size] * 4 + [torch.finfo(student.dtype).eps * true_gradient.abs().max().item()]
    names = (*truth._fields, "gradient")
    for name, ours, theirs, floor in zip(names, errors["triton"], errors["reference"], floors):
        assert ours <= 2 * theirs + floor, f"{name}: error {ours:.3e}, of the reference {theirs:.3e}, floor {floor:.3e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("student_temp", "teacher_temp"), [(0.1, 0.04), (0.01, 0.01), (0.1, 0.02), (1.0, 1.0)])
def test_temperatures(dtype, student_temp, teacher_temp):
    # Rows that fill no tile, a remainder of 10 entries, blocks of two tiles less four entries, a width that is no power of two.
    tensors = case(3, 2, 3, 48, 130, dtype=dtype)
    check_budget(*tensors, block_size=60, student_temp=student_temp, teacher_temp=teacher_temp, seed=1, step=2)


@pytest.fixture
def bfloat16(monkeypatch):
    """The interpreter's bfloat16 made right: it keeps such numbers as the 16 bits they are, and multiplies those as integers."""

    def widened(operand):
        return (operand.data.astype(np.uint32) << 16).view(np.float32) if operand.dtype.scalar == tl.bfloat16 else operand.data

    def create_dot(self, a, b, d, *_):
        return TensorHandle(np.matmul(widened(a), widened(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(fused, "obstacle", lambda *_: None)
    return torch.bfloat16


@pytest.mark.parametrize(("student_temp", "teacher_temp", "images"), [(0.1, 0.04, 8), (0.01, 0.01, 3), (0.1, 0.02, 3)], ids=str)
def test_cut_weights_of_bfloat16(bfloat16, student_temp, teacher_temp, images):
    tensors = case(3, 2, images, 48, 330, dtype=bfloat16)
    check_budget(*tensors, block_size=150, student_temp=student_temp, teacher_temp=teacher_temp, seed=1, step=2)


def test_cut_weights_at_a_temperature_where_logits_hardly_differ(bfloat16):
    """All weights lie in one octave, where cutting favours the upper end: entropies err by 4e-5 (bench/notes/kernels.md), the loss not."""
    tensors = case(3, 2, 3, 48, 330, dtype=bfloat16)
    arguments = dict(block_size=150, student_temp=1.0, teacher_temp=1.0, seed=1, step=2)
    truth, true_gradient = loss_and_gradient(*(t.double() for t in tensors), **arguments, backend="reference")
    found, gradient = loss_and_gradient(*tensors, **arguments, backend="triton")
    errors = [abs(ours - true).item() for ours, true in zip(found, truth)]
    assert errors[0] <= 1e-5 and max(errors) <= 1e-4
    assert (gradient.double() - true_gradient).abs().max() <= 2**-7 * true_gradient.abs().max()


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_readout_of_bfloat16_is_a_mean_of_entries(bfloat16, temperature):
    """Cut weights are all too small: a read-out divided by the sum of exact ones would be shorter by a 300th."""
    rows, _, memory = case(1, 1, 9, 40, 75, dtype=bfloat16)
    memory[:, 0] = 0.5
    readout, _ = memory_readout(rows, memory, block_size=75, temperature=temperature, backend="triton")
    torch.testing.assert_close(readout[..., 0], torch.full((1, 9), 0.5), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(32, torch.float16), (80, torch.float32), (200, torch.float16), (384, torch.float32), (512, torch.float16)],
    ids=str,
)
def test_widths(width, dtype):
    check_budget(*case(3, 2, 3, width, 70, dtype=dtype), block_size=33, student_temp=0.1, teacher_temp=0.05, seed=3, step=4)


@pytest.mark.parametrize(
    ("views", "teachers", "images", "entries", "block_size"),
    [
        pytest.param(2, 1, 1, 40, 40, id="one-pair-one-block"),
        pytest.param(1, 2, 3, 40, 7, id="one-student-view-small-blocks"),
        pytest.param(2, 3, 5, 128, 32, id="more-teacher-views-even-blocks"),
        pytest.param(4, 2, 7, 100, 96, id="two-row-tiles-share-cut"),
    ],
)
def test_shapes(views, teachers, images, entries, block_size):
    tensors = case(views, teachers, images, 32, entries, dtype=torch.float32)
    check_budget(*tensors, block_size=block_size, student_temp=0.1, teacher_temp=0.05, seed=5, step=6)


def test_blocks_of_one_entry_teach_nothing():
    result, gradient = loss_and_gradient(
        *case(3, 2, 3, 32, 5, dtype=torch.float32), block_size=1, student_temp=0.1, teacher_temp=0.05, backend="triton"
    )
    torch.testing.assert_close(torch.stack(list(result)), torch.zeros(4), rtol=0, atol=5e-6)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_configurations_that_differ_in_kind(monkeypatch, dtype):
    """Keys loaded by themselves, masked stores and more parts ship for some architectures only."""
    monkeypatch.setattr(fused, "INTERPRETED", replace(fused.INTERPRETED, load_keys=True, mask_stores=True, parts=4))
    check_budget(*case(3, 2, 3, 72, 70, dtype=dtype), block_size=33, student_temp=0.1, teacher_temp=0.05, seed=3, step=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_readout(dtype, temperature):
    rows, _, memory = case(2, 1, 9, 40, 75, dtype=dtype)
    arguments = dict(block_size=36, temperature=temperature, seed=7, step=8)
    truth = memory_readout(rows.double(), memory.double(), **arguments, backend="reference")
    theirs = memory_readout(rows, memory, **arguments, backend="reference")
    ours = memory_readout(rows, memory, **arguments, backend="triton")
    assert ours[0].shape == rows.shape and ours[1].shape == rows.shape[:-1]
    for true, reference, found in zip(truth, theirs, ours):
        assert found.dtype == torch.float32
        error, allowed = (found - true).abs().max(), 2 * (reference - true).abs().max()
        assert error <= allowed + 4 * torch.finfo(torch.float32).eps * max(true.abs().max(), 1 / temperature)


@pytest.mark.parametrize(("student_temp", "teacher_temp"), [(0.1, 0.04), (0.1, 0.02)], ids=["constant-pivot", "running-maximum"])
def test_temperatures_and_step_on_the_device_change_nothing(student_temp, teacher_temp):
    tensors = case(3, 2, 3, 32, 70, dtype=torch.float32)
    given, gradient = loss_and_gradient(
        *tensors, block_size=33, student_temp=student_temp, teacher_temp=teacher_temp, seed=9, step=10, backend="triton"
    )
    found, other_gradient = loss_and_gradient(
        *tensors, block_size=33, student_temp=torch.tensor(student_temp), teacher_temp=torch.tensor([teacher_temp]), seed=9,
        step=torch.tensor([10]), backend="triton",
    )  # fmt: skip
    torch.testing.assert_close(list(found), list(given), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-7)


def test_a_given_partition_is_the_one_computed_and_results_repeat_bit_for_bit():
    tensors = case(3, 2, 3, 32, 70, dtype=torch.float32)
    arguments = dict(block_size=33, student_temp=0.1, teacher_temp=0.04, backend="triton")
    partition = partition_indices(70, seed=2, step=3)
    runs = [
        loss_and_gradient(*tensors, **arguments, seed=2, step=3),
        loss_and_gradient(*tensors, **arguments, seed=2, step=3),
        loss_and_gradient(*tensors, **arguments, partition=partition),
        loss_and_gradient(*tensors, **arguments, partition=partition.long()),
    ]
    for result, gradient in runs[1:]:
        assert torch.equal(torch.stack(list(result)), torch.stack(list(runs[0][0]))) and torch.equal(gradient, runs[0][1])


def test_strided_inputs():
    tensors = case(3, 2, 3, 32, 70, dtype=torch.float32)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    arguments = dict(block_size=33, student_temp=0.1, teacher_temp=0.04, backend="triton")
    one, gradient = loss_and_gradient(*tensors, **arguments)
    other, other_gradient = loss_and_gradient(*strided, **arguments)
    assert torch.equal(torch.stack(list(one)), torch.stack(list(other))) and torch.equal(gradient, other_gradient)


def test_equal_entries_give_uniform_distributions():
    student, teacher, memory = case(entries=64, dtype=torch.float32, close=False)
    memory = memory[:1].expand(64, -1)
    for temperature in (0.01, 0.1):
        result = memory_cross_entropy(
            student, teacher, memory, block_size=20, student_temp=temperature, teacher_temp=temperature, backend="triton"
        )
        for value in (result.loss, result.student_entropy, result.teacher_entropy):
            torch.testing.assert_close(value, torch.tensor(20.0).log(), rtol=0, atol=1e-6 / temperature)
        assert result.kl.abs() < 1e-6 / temperature


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.025, 1.0])
def test_rows_and_entries_that_coincide_or_oppose_stay_finite(dtype, temperature):
    """Logits at both ends, ±1/τ, from rows 2% longer than a unit: the weights of the second block would vanish under a careless pivot."""
    rows = 1.02 * unit_rows(1, 3, 32, seed=4)
    memory = torch.cat((rows[0, :1].expand(33, -1), -rows[0, :1].expand(33, -1)))
    student, teacher = rows.expand(3, -1, -1).to(dtype), rows.expand(2, -1, -1).to(dtype)
    result, gradient = loss_and_gradient(
        student, teacher, memory.to(dtype), block_size=33, student_temp=temperature, teacher_temp=temperature,
        partition=torch.arange(66), backend="triton",
    )  # fmt: skip
    assert gradient.isfinite().all()
    torch.testing.assert_close(result.loss, torch.tensor(33.0).log(), rtol=0, atol=2e-6 / temperature + 1e-5)


def test_bfloat16_is_refused_with_a_sentence():
    tensors = case(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
        memory_cross_entropy(*tensors, block_size=32, student_temp=0.1, teacher_temp=0.05, backend="triton")
    assert "triton" not in available_backends("cpu", torch.bfloat16)
    assert available_backends("cpu", torch.float32)[-1] == "triton"
