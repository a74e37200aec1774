"""Cases of the losses on prototypes and keys that test_fused_interpreted.py runs where Triton interprets its kernels on the CPU."""

import pytest
import torch
from test_objective_losses import LOSSES, every_loss, golden, with_gradients

from massl_fast.kernels import sinkhorn_bias
from replay_objective import replay


# mmc_loss and sinkhorn pass, too (replay_objective.py --backend triton), and take the interpreter ten times as long.
@pytest.mark.parametrize("name", ["dino_loss", "ibot_loss", "mocov3_loss"])
def test_figures_of_the_published_losses(name):
    assert max(replay(golden(name), backend="triton").values()) <= 1e-5


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "carp"])
def test_triton_equals_the_reference(name):
    loss, rows, keys = every_loss()[name]
    truth = with_gradients(loss, rows, keys, backend="reference")
    for found, expected in zip(with_gradients(loss, rows, keys, backend="triton"), truth):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_sinkhorn_bias_equals_the_reference():
    _, rows, keys = every_loss()["other_views"]
    one, other = (sinkhorn_bias(rows, keys, temperature=0.1, iterations=3, backend=backend) for backend in ("reference", "triton"))
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
