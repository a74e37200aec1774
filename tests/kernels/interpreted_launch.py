"""Cases of the fused pass's launcher that test_fused_interpreted.py runs where Triton interprets the kernels on the CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import case, loss_and_gradient
from test_loss_backends import GOLDEN

from massl_fast.kernels import fused, partition_indices, streaming


def launch(tensors, block_size, choice, programs, temps=(0.1, 0.05)):
    student, teacher, memory = tensors
    rows = student.shape[0] * student.shape[1] + teacher.shape[0] * teacher.shape[1]
    readout, logsumexp = torch.full((rows, memory.shape[1]), torch.nan), torch.full((rows,), torch.nan)
    partition = partition_indices(memory.shape[0], seed=0, step=0)
    inputs = (student.flatten(0, 1), teacher.flatten(0, 1), memory, partition, block_size, *temps, fused.Extensions(unit=True))
    fused.launch(*inputs, readout, logsumexp, choice, programs)
    return readout, logsumexp


def test_any_number_of_programs_deals_the_work_out_to_the_same_result():
    tensors = case(4, 2, 9, 24, 150, dtype=torch.float32)  # 3 + 2 row tiles, 3 blocks of 2 tiles: 30 pieces of work
    expected = launch(tensors, 48, fused.INTERPRETED, 1)
    for programs in (2, 13, 1000):
        for one, other in zip(launch(tensors, 48, fused.INTERPRETED, programs), expected):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_more_partials_and_blocks_than_are_combined_at_a_time():
    tensors, temps = case(2, 1, 3, 24, 1600, dtype=torch.float32), (0.1, 0.01)
    rows = torch.cat([part.flatten(0, 1) for part in tensors[:2]])
    inverse = torch.tensor([1 / temps[0]] * 6 + [1 / temps[1]] * 3)
    # Ten partials for each of 5 blocks, eight at a time; then one or two for each of 25, sixteen at a time.
    for block_size, programs in ((320, 1000), (64, 3)):
        found = launch(tensors, block_size, fused.INTERPRETED, programs, temps)
        expected = streaming.memory_readout(rows, tensors[2], partition_indices(1600, seed=0, step=0), block_size, inverse)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temps", [(0.1, 0.05), (0.1, 0.01)], ids=["constant-pivot", "running-maximum"])
@pytest.mark.parametrize(
    "change", [dict(parts=1), dict(parts=4), dict(mask_stores=True), dict(load_keys=True), dict(block_rows=32)], ids=str
)
def test_every_kind_of_configuration_gives_the_same_result(temps, change):
    tensors = case(2, 1, 7, 64, 90, dtype=torch.float32)
    expected = launch(tensors, 40, fused.INTERPRETED, 4, temps)
    for one, other in zip(launch(tensors, 40, replace(fused.INTERPRETED, **change), 4, temps), expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["loss_small", "loss_one_block"])
def test_golden_figures_of_the_published_code(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        stored = {key: torch.from_numpy(np.array(file[key], order="C")) for key in file.files}
    result, gradient = loss_and_gradient(
        *(stored[key].float() for key in ("student", "teacher", "memory")),
        block_size=int(stored["block_size"]),
        student_temp=float(stored["student_temp"]),
        teacher_temp=float(stored["teacher_temp"]),
        partition=stored["permutation"],
        backend="triton",
    )
    torch.testing.assert_close(result.loss.double(), stored["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), stored["grad_student"], rtol=1e-5, atol=1e-7)
