"""Cases of CARP's kernels that test_fused_interpreted.py runs where Triton interprets them on the CPU."""

import os
from pathlib import Path

import pytest
import torch
from interpreted_fused import bfloat16, poisoned  # noqa: F401  (fixtures)
from problems import unit_rows

from massl_fast.kernels import consistency_kernel, partition_consistency
from replay_objective import replay

SHARED = Path(__file__).parents[2] / "../shared/golden/objectives"


def case(views=3, teachers=2, images=6, width=24, entries=40, *, length=1.0, dtype=torch.float32):
    student, teacher = unit_rows(views, images, width, seed=0), unit_rows(teachers, images, width, seed=1)
    keys, teacher_keys = unit_rows(entries, width, seed=2), unit_rows(entries, width, seed=3)
    return [(length * t).to(dtype) for t in (student, teacher)] + [t.to(dtype) for t in (3 * keys, 3 * teacher_keys)]


def figures(tensors, *, learned=True, dtype=torch.float64, **arguments):
    """Loss, consistency and entropy, the student's gradient, and the prototypes' where they have one."""
    student, teacher, keys, teacher_keys = (t.to(dtype) if dtype else t for t in tensors)
    student, keys = student.clone().requires_grad_(), keys.clone().requires_grad_(learned)
    result = partition_consistency(student, teacher, keys, teacher_keys, seed=1, step=2, **arguments)
    return [*(v.detach() for v in result), *torch.autograd.grad(result.loss, [student, keys] if learned else [student])]


@pytest.mark.parametrize(
    ("shape", "block_size", "length", "clamp"),
    [
        ((3, 2, 6, 24, 40), 19, 4.0, 2**-23),  # two tiles of images and of entries, a remainder
        ((2, 1, 1, 40, 16), 5, 1.0, 0.01),  # one image, blocks smaller than a tile, clamps active
        ((3, 3, 2, 16, 20), 20, 300.0, 2**-23),  # rows that are far from unit, one block
    ],
    ids=str,
)
def test_against_float64(shape, block_size, length, clamp):
    tensors = case(*shape, length=length)
    arguments = dict(block_size=block_size, clamp=clamp)
    truth = figures(tensors, **arguments, backend="reference")
    theirs = figures(tensors, **arguments, dtype=None, backend="reference")
    ours = figures(tensors, **arguments, dtype=None, backend="triton")
    for found, reference, true in zip(ours, theirs, truth):
        assert found.dtype == torch.float32 and found.isfinite().all()
        # Logits are rounded, and with them −log⟨s,t⟩ and every probability.
        size = true.abs().max().item() * (3 * length if true.ndim else 1)
        floor = 4 * torch.finfo(torch.float32).eps * max(size, 0.0 if true.ndim else 3 * length)
        assert (found - true).abs().max() <= 2 * (reference - true).abs().max() + floor
    again = figures(tensors, **arguments, dtype=None, backend="triton")
    assert all(torch.equal(one, other) for one, other in zip(ours, again))
    frozen = figures(tensors, **arguments, learned=False, dtype=None, backend="triton")
    assert all(torch.equal(one, other) for one, other in zip(ours, frozen))


def test_bfloat16(bfloat16):  # noqa: F811
    tensors = case(length=4.0, dtype=bfloat16)
    truth = figures(tensors, block_size=19, backend="reference")
    ours = figures(tensors, block_size=19, dtype=None, backend="triton")
    for found, true in zip(ours[:3], truth):
        torch.testing.assert_close(found.double(), true, rtol=2e-6, atol=2e-6)  # products of bfloat16 are exact
    for found, true in zip(ours[3:], truth[3:]):  # both the tile of G and what is returned are rounded
        assert found.dtype == bfloat16 and (found.double() - true).abs().max() <= 2**-7 * true.abs().max()


EVERY_RUN = ("carp_loss", "dino_loss")  # the others take half a minute


@pytest.mark.parametrize("name", [*EVERY_RUN, "carp_loss_sharp", "ibot_loss", "mmc_loss", "mocov3_loss", "sinkhorn"])
def test_golden_figures_of_published_losses(name):
    if name not in EVERY_RUN and os.environ.get("MASSL_FAST_TEST_ALL_CONFIGURATIONS") != "1":
        pytest.skip("All golden figures under the interpreter take half a minute; MASSL_FAST_TEST_ALL_CONFIGURATIONS=1 asks for them.")
    path = SHARED / f"{name}.npz"
    if not path.is_file():
        pytest.skip("The golden figures of the objectives lie outside the repository and are absent here.")
    errors = replay(path, backend="triton")
    assert errors["max_loss_error"] <= 1e-5 and errors["max_gradient_error"] <= 1e-5


def test_a_tile_holds_all_views_or_says_that_none_does(monkeypatch):
    monkeypatch.setattr(consistency_kernel.fused, "INTERPRETING", False)
    monkeypatch.setattr(consistency_kernel.fused, "shared_limit", lambda device: 227 * 1024)
    tiles = {
        dtype: consistency_kernel._tile(8, 2, 256, torch.empty(1, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    assert tiles == {torch.bfloat16: (64, 64, 2), torch.float16: (64, 64, 2), torch.float32: (64, 16, 2)}
    with pytest.raises(ValueError, match="no tile for 65 views of 256 columns"):
        consistency_kernel._tile(65, 2, 256, torch.empty(1))
