"""Nothing in a step reads a tensor's value: on a GPU the host would wait there for all the work before it."""

import pytest
import torch
from test_step import CPU, SETTINGS, build_step, crops
from torch.utils._python_dispatch import TorchDispatchMode

from massl_fast.models.precision import LossScaler, Precision

READS = {"_local_scalar_dense", "item", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "_unique2", "bincount"}
# On the CPU these read without an operator that the mode below would see.
METHODS = ("tolist", "numpy", "cpu", "__array__")


class NothingIsRead(TorchDispatchMode):
    """Raises where a tensor's value, or a shape that depends on one, reaches the host, by Python or inside an operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in READS:
            raise AssertionError(f"{func} reads a tensor")
        return func(*args, **kwargs or {})


@pytest.fixture
def nothing_is_read(monkeypatch):
    def refuse(name):
        def method(*_args, **_kwargs):
            raise AssertionError(f"Tensor.{name} reads a tensor")

        return method

    for name in METHODS:
        monkeypatch.setattr(torch.Tensor, name, refuse(name))
    return NothingIsRead()


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16-like", "fp16-like"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_with_teacher", "sgd", "lars"])
@pytest.mark.parametrize("clip_mode", ["parameter", "global"])
def test_a_step_reads_nothing(optimizer, clip_mode, scaled, nothing_is_read):
    step = build_step(optimizer=optimizer, drop_path=0.2)
    step.clip_mode = clip_mode
    if scaled:
        step.scaler = LossScaler(Precision("fp16", "test"), CPU)
    step([crops(0)], SETTINGS, 0)  # position embeddings are resampled once, optimizers make their state
    with nothing_is_read:
        step([crops(1), crops(2)], SETTINGS, 1, stopping=torch.zeros(()))


@pytest.mark.parametrize(
    "read", [lambda t: t.item(), lambda t: bool(t > 0), lambda t: t.tolist(), lambda t: torch.full((), t), torch.nonzero]
)
def test_a_read_is_noticed(read, nothing_is_read):
    value = torch.ones(())
    with nothing_is_read, pytest.raises(AssertionError, match="reads a tensor"):
        read(value)
