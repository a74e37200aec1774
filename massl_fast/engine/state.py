"""What of a run goes into a checkpoint, and back: networks, memory, optimizer and loss scale, by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from massl_fast.distributed.sharding import local
from massl_fast.engine.optimizer import load_optimizer_tensors, optimizer_tensors
from massl_fast.engine.step import TrainStep
from massl_fast.run.checkpoint import demand_same, read_into, shapes_of, with_prefix, without_prefix


def tensors_of(run: TrainStep) -> dict[str, Tensor]:
    """Everything that the next step depends on; tensors share memory with the run, and are sharded where it is."""
    return {**_fixed_tensors(run), **optimizer_tensors(run.optimizer, run.pair.student)}


def _fixed_tensors(run: TrainStep) -> dict[str, Tensor]:
    """All but the optimizer's, which come into being with its first step."""
    return {
        **with_prefix("student", run.pair.student.state_dict()),
        **with_prefix("teacher", run.pair.teacher.state_dict()),
        **with_prefix("objective", run.objective.state_dict()),
        **run.scaler.tensors(),
    }


@torch.no_grad()
def restore(run: TrainStep, path) -> None:
    """Put a run into the state of a checkpoint, whatever the number of processes and the strategy that wrote it.

    Raises ValueError naming what does not fit.
    """
    shapes = shapes_of(path)
    fixed = _fixed_tensors(run)
    for prefix in ("student", "teacher", "objective", "scaler"):
        ours = {name: tensor.shape for name, tensor in without_prefix(prefix, fixed).items()}
        demand_same(prefix, ours, without_prefix(prefix, shapes))
    moments = _optimizer_targets(run.optimizer, run.pair.student, without_prefix("optimizer", shapes))
    read_into(path, {**fixed, **moments})
    load_optimizer_tensors(run.optimizer, run.pair.student, moments)


def _optimizer_targets(optimizer: Optimizer, module: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Room for the optimizer tensors of a checkpoint: moments laid out (and sharded) as their parameters, counters as they are."""
    parameters, targets = dict(module.named_parameters()), {}
    for key, shape in shapes.items():
        name, _ = key.rsplit("/", 1)
        if name not in parameters:
            raise ValueError(f"The checkpoint holds optimizer state of {name}, which this model does not have.")
        parameter = parameters[name]
        if shape not in (parameter.shape, torch.Size()):
            raise ValueError(f"The checkpoint holds optimizer state {key} of shape {tuple(shape)} for {tuple(parameter.shape)}.")
        counter = shape != parameter.shape
        targets[f"optimizer/{key}"] = torch.zeros(shape, device=parameter.device) if counter else torch.zeros_like(parameter)
    return targets


@torch.no_grad()
def demand_equal(run: TrainStep, path) -> None:
    """RuntimeError where a checkpoint just written does not read back as the run is."""
    written = tensors_of(run)
    found = {name: torch.empty_like(tensor) for name, tensor in written.items()}
    read_into(path, found)
    for name, tensor in written.items():
        if not torch.equal(local(found[name]), local(tensor)):
            raise RuntimeError(f"The first checkpoint was written, but {name} did not read back as it was.")
