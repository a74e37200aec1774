"""Loss, gradient and telemetry of the plain PyTorch backends, against float64 and against the published code's own figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import case, loss_and_gradient

from massl_fast.kernels import enqueue_, memory_cross_entropy, memory_readout, partition_indices, streaming

GOLDEN = Path(__file__).parent / "golden"
SHARED_GOLDEN = Path(__file__).parents[2] / "../shared/golden"


def check_golden(path: Path, backend: str) -> None:
    with np.load(path, allow_pickle=False) as file:
        stored = {name: torch.from_numpy(np.array(file[name], order="C")) for name in file.files}
    result, gradient = loss_and_gradient(
        stored["student"],
        stored["teacher"],
        stored["memory"],
        block_size=int(stored["block_size"]),
        student_temp=float(stored["student_temp"]),
        teacher_temp=float(stored["teacher_temp"]),
        partition=stored["permutation"],
        backend=backend,
    )
    torch.testing.assert_close(result.loss, stored["loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, stored["grad_student"], rtol=1e-9, atol=1e-14)
    memory, pointer = stored["memory"].clone(), torch.zeros(1, dtype=torch.int64)
    enqueue_(memory, pointer, stored["teacher"][1])
    torch.testing.assert_close(memory, stored["memory_after"], rtol=0, atol=1e-12)
    assert pointer.item() == int(stored["pointer_after"])


@pytest.mark.parametrize("backend", ["reference", "streaming"])
@pytest.mark.parametrize("name", ["loss_small", "loss_one_block"])
def test_golden_figures_of_the_published_code(name, backend):
    check_golden(GOLDEN / f"{name}.npz", backend)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_golden_multicrop(backend):
    path = SHARED_GOLDEN / "loss_multicrop.npz"
    if not path.is_file():
        pytest.skip("The multi-crop golden case (8 MB) lies outside the repository and is absent here.")
    check_golden(path, backend)


@settings(max_examples=40, deadline=None)
@given(
    views=st.integers(1, 5),
    teachers=st.integers(1, 3),
    images=st.integers(1, 4),
    width=st.integers(2, 33),
    entries=st.integers(2, 90),
    block_share=st.floats(0.02, 1.0),
    student_temp=st.floats(0.01, 1.0),
    teacher_temp=st.floats(0.01, 1.0),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_streaming_equals_the_reference(views, teachers, images, width, entries, block_share, student_temp, teacher_temp, reduction):
    if views == teachers == 1:
        views = 2
    arguments = dict(
        block_size=max(1, int(entries * block_share)),
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        seed=3,
        step=7,
        block_reduction=reduction,
    )
    tensors = case(views, teachers, images, width, entries)
    expected, expected_gradient = loss_and_gradient(*tensors, **arguments, backend="reference")
    found, gradient = loss_and_gradient(*tensors, **arguments, backend="streaming")
    for name, value in found._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("student_temp", "teacher_temp"), [(0.1, 0.04), (0.01, 0.01), (1.0, 1.0)])
def test_error_is_at_most_twice_that_of_the_reference_in_the_same_precision(dtype, student_temp, teacher_temp):
    student, teacher, memory = case(4, 2, 16, 64, 1000, dtype=dtype)
    arguments = dict(block_size=256, student_temp=student_temp, teacher_temp=teacher_temp, seed=1, step=2)
    truth, true_gradient = loss_and_gradient(student.double(), teacher.double(), memory.double(), **arguments, backend="reference")
    errors = {}
    for backend in ("reference", "streaming"):
        result, gradient = loss_and_gradient(student, teacher, memory, **arguments, backend=backend)
        assert result.loss.dtype == torch.float32 and gradient.dtype == dtype
        loss_error = (result.loss.double() - truth.loss).abs().item()
        gradient_error = (gradient.double() - true_gradient).abs().max().item()
        errors[backend] = (loss_error, gradient_error)
    # The floor is half a unit in the last place of what is returned: nothing can be asked below it.
    floors = (torch.finfo(torch.float32).eps * truth.loss.item(), torch.finfo(dtype).eps * true_gradient.abs().max().item())
    for ours, theirs, floor in zip(errors["streaming"], errors["reference"], floors):
        assert ours <= 2 * theirs + floor


def test_gradcheck():
    student, teacher, memory = case(3, 2, 2, 6, 20)

    def loss(rows):
        return memory_cross_entropy(rows, teacher, memory, block_size=6, student_temp=0.3, teacher_temp=0.2, backend="streaming").loss

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


def test_order_inside_a_block_changes_nothing_beyond_rounding():
    tensors = case(entries=96)
    partition = partition_indices(96, seed=0, step=0).long()
    shuffled = partition.view(4, 24)[:, torch.randperm(24, generator=torch.Generator().manual_seed(0))].reshape(-1)
    arguments = dict(block_size=24, student_temp=0.1, teacher_temp=0.05, backend="streaming")
    one, one_gradient = loss_and_gradient(*tensors, **arguments, partition=partition)
    other, other_gradient = loss_and_gradient(*tensors, **arguments, partition=shuffled)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one_gradient, other_gradient, rtol=1e-10, atol=1e-13)


def test_contiguous_blocks_and_strided_inputs():
    student, teacher, memory = case()
    arguments = dict(block_size=32, student_temp=0.1, teacher_temp=0.05, partition=torch.arange(96, dtype=torch.int32))
    expected, expected_gradient = loss_and_gradient(student, teacher, memory, **arguments, backend="reference")
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (student, teacher, memory)]
    found, gradient = loss_and_gradient(*strided, **arguments, backend="streaming")
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(gradient, expected_gradient)


def test_equal_rows_give_uniform_distributions():
    student, teacher, memory = case(entries=64, close=False)
    memory = memory[:1].expand(64, -1).contiguous()
    result = memory_cross_entropy(student, teacher, memory, block_size=16, student_temp=0.1, teacher_temp=0.05)
    for value in (result.loss, result.student_entropy, result.teacher_entropy):
        torch.testing.assert_close(value, torch.tensor(16.0, dtype=torch.float64).log())
    assert result.kl.abs() < 1e-10


def test_rows_that_are_not_quite_unit_and_extreme_temperatures_stay_finite():
    student, teacher, memory = (1.05 * t.float() for t in case(close=True))
    for temperature in (0.01, 1.0):
        result, gradient = loss_and_gradient(student, teacher, memory, block_size=32, student_temp=temperature, teacher_temp=temperature)
        assert all(value.isfinite() for value in result) and gradient.isfinite().all() and result.loss >= 0


def test_results_repeat_bit_for_bit():
    tensors = case(dtype=torch.float32)
    arguments = dict(block_size=32, student_temp=0.1, teacher_temp=0.05, seed=5, step=6)
    (one, one_gradient), (other, other_gradient) = (loss_and_gradient(*tensors, **arguments) for _ in range(2))
    assert torch.equal(torch.stack(list(one)), torch.stack(list(other))) and torch.equal(one_gradient, other_gradient)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_readout_against_its_definition(backend):
    rows, _, memory = case(entries=70)
    partition = partition_indices(70, seed=1, step=1).long()
    readout, logsumexp = memory_readout(rows, memory, block_size=32, temperature=0.1, partition=partition, backend=backend)
    expected_readout, expected_logsumexp = torch.zeros_like(rows), torch.zeros(rows.shape[:-1], dtype=rows.dtype)
    for block in partition[:64].view(2, 32):
        logits = rows @ memory[block].T / 0.1
        expected_readout += logits.softmax(-1) @ memory[block]
        expected_logsumexp += logits.logsumexp(-1)
    torch.testing.assert_close(readout, expected_readout)
    torch.testing.assert_close(logsumexp, expected_logsumexp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_older_pytorch_multiplies_16_bit_matrices_in_32_bits(dtype, monkeypatch):
    """Without ``torch.mm(..., out_dtype=...)``: a sum of 4,096 products is not rounded to 16 bits, where it would be off by 1e-3."""
    monkeypatch.setattr(streaming, "WIDE_PRODUCTS", False)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 4096), (4096, 3)))
    found, exact = streaming._product(a, b, torch.float32), a.double() @ b.double()
    assert found.dtype == torch.float32 and (found - exact).norm() < 1e-5 * exact.norm()
