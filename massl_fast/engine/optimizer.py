"""Optimizers: parameter groups with and without weight decay, AdamW, SGD and LARS; clipping, step and teacher without asking the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from massl_fast.config import OptimizerSection
from massl_fast.engine.fused_update import AdamWWithTeacher
from massl_fast.engine.phases import AVERAGE, OPTIMIZER, Observer, unobserved
from massl_fast.engine.schedules import StepSettings
from massl_fast.models.pair import StudentTeacher


def build_optimizer(module: nn.Module, settings: OptimizerSection) -> Optimizer:
    """The optimizer of all trainable parameters: group 0 decays, group 1 (biases and one-dimensional parameters, or nothing) does not."""
    decayed, exempt = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempted = settings.decayed == "matrices" and (parameter.ndim <= 1 or name.endswith(".bias"))
            (exempt if exempted else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
    if settings.name == "adamw_with_teacher":
        return AdamWWithTeacher(groups, lr=settings.learning_rate, betas=settings.betas)
    if settings.name == "adamw_apex":
        try:
            from apex.optimizers import FusedAdam
        except ImportError:
            raise ValueError(
                "optimizer.name is adamw_apex, but apex.optimizers.FusedAdam does not import. Build NVIDIA's apex from its source "
                "(the package of that name on an index is not it), or choose adamw."
            ) from None
        return FusedAdam(groups, lr=settings.learning_rate, betas=settings.betas, adam_w_mode=True)
    if settings.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=True)
        if settings.momentum:
            # With buffers from the start a first step that is skipped for a non-finite gradient leaves none uninitialised.
            for parameter in decayed + exempt:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return Lars(groups, lr=settings.learning_rate, momentum=settings.momentum)


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer leaves everything as it is where its ``found_inf`` (float 0-d tensor) is 1, without the host reading it."""
    return isinstance(optimizer, Lars) or bool(optimizer.defaults.get("fused"))


def apply_settings(optimizer: Optimizer, settings: StepSettings) -> None:
    """Put a step's learning rate and weight decay into the groups."""
    for group, decays in zip(optimizer.param_groups, (True, False)):
        group["lr"] = settings.learning_rate
        group["weight_decay"] = settings.weight_decay if decays else 0.0


class Lars(Optimizer):
    """SGD whose step is scaled per parameter by ‖weight‖/‖update‖ (You, Gitman, Ginsburg, 2017), for large batches of CNNs.

    Parameters without weight decay get no such scaling, as is usual for biases and norms. Where ``found_inf`` is 1 nothing changes.
    """

    found_inf: Tensor

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust_coefficient: float = 0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self) -> None:
        for group, decays in zip(self.param_groups, (True, False)):
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            finite = self.found_inf == 0
            updates = [torch.where(finite, p.grad, 0.0) for p in weights]
            if decays:
                updates = torch._foreach_add(updates, weights, alpha=group["weight_decay"])
                weight_norms, update_norms = torch._foreach_norm(weights), torch._foreach_norm(updates)
                ratios = torch.stack(weight_norms) / torch.stack(update_norms)
                # A zero weight or a zero update leaves no ratio to speak of: step as SGD would.
                ratios = torch.where(torch.isfinite(ratios) & (ratios > 0), group["trust_coefficient"] * ratios, 1.0)
                updates = torch._foreach_mul(updates, list(ratios.unbind()))
            for parameter in weights:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [self.state[p]["momentum_buffer"] for p in weights]
            torch._foreach_mul_(buffers, torch.where(finite, group["momentum"], 1.0))
            torch._foreach_add_(buffers, torch._foreach_mul(updates, finite.to(updates[0].dtype)))
            torch._foreach_add_(weights, torch._foreach_mul(buffers, torch.where(finite, -group["lr"], 0.0)))


@torch.no_grad()
def update_weights_(
    pair: StudentTeacher,
    optimizer: Optimizer,
    gradients: list[Tensor],
    norms: Tensor,
    finite: Tensor,
    settings: StepSettings,
    *,
    clip: float,
    clip_mode: str,
    loss_scale: Tensor | None = None,
    teacher_first: bool = False,
    observe: Observer = unobserved,
) -> None:
    """Clip, step and move the teacher, or with ``teacher_first`` move the teacher and step; where ``finite`` (bool 0-d tensor) is false,
    nothing changes. An ``AdamWWithTeacher`` has the teacher follow whatever ``teacher_first`` says.

    ``gradients``: of those of the student's parameters that have one, in their order, multiplied by ``loss_scale`` (0-d, where there is
    one); ``norms``
    [number of gradients]: of them without that scale. ``settings`` may hold 0-d tensors on the device for an ``AdamWWithTeacher``.
    """
    factors = clip_factors(norms, clip, clip_mode)
    if loss_scale is not None:
        factors = factors / loss_scale
    if isinstance(optimizer, AdamWWithTeacher):
        observe(OPTIMIZER)
        twins = pair.twins()
        moving = [twins.get(name, (parameter, None)) for name, parameter in pair.student.named_parameters() if parameter.grad is not None]
        optimizer.update_(*map(list, zip(*moving)), gradients=gradients, factors=factors, finite=finite, settings=settings)
        return
    if clip or loss_scale is not None:
        torch._foreach_mul_(gradients, list(factors.unbind()))
    apply_settings(optimizer, settings)
    if teacher_first:
        _move_teacher_(pair, finite, settings, observe)
    observe(OPTIMIZER)
    if skips_on_device(optimizer):
        optimizer.found_inf = (~finite).to(torch.float32)
        optimizer.step()
    elif finite.item():  # apex's optimizer: it has no such switch outside apex's own loss scaler, so the host asks
        optimizer.step()
    if not teacher_first:
        _move_teacher_(pair, finite, settings, observe)


def _move_teacher_(pair: StudentTeacher, finite: Tensor, settings: StepSettings, observe: Observer) -> None:
    observe(AVERAGE)
    # In float64, because 1 − momentum is small and taken later.
    momentum = torch.full((), settings.teacher_momentum, dtype=torch.float64, device=finite.device)
    pair.update_teacher_(torch.where(finite, momentum, 1.0))


def clip_factors(norms: Tensor, limit: float, mode: str) -> Tensor:
    """What gradients of these norms are multiplied by so that none exceeds ``limit`` (0: all by 1), a tensor like ``norms``.

    ``mode``: parameter (each by its own norm, as the published code does) or global (all by the root of the summed squares).
    """
    if limit == 0:
        return torch.ones_like(norms)
    reference = norms if mode == "parameter" else torch.linalg.vector_norm(norms).expand_as(norms)
    return (limit / (reference + 1e-6)).clamp(max=1.0)


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as ``optimizer/<parameter>/<moment>``: tensors that share memory with it."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"optimizer/{names[parameter]}/{moment}": value
        for parameter, state in optimizer.state.items()
        for moment, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The reverse of ``optimizer_tensors``; parameters that a checkpoint has no state for start fresh."""
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        _, name, moment = key.split("/")
        if name not in parameters:
            raise ValueError(f"The checkpoint holds optimizer state of {name}, which this model does not have.")
        parameter = parameters[name]
        if moment == "step":  # a scalar of its own dtype
            value = value.to(parameter.device)
        elif (value.dtype, value.device, value.stride()) != (parameter.dtype, parameter.device, parameter.stride()):
            # Optimizers walk through memory: moments laid out otherwise than a channels-last weight would meet the wrong elements.
            value = torch.empty_like(parameter, requires_grad=False).copy_(value)
        optimizer.state[parameter][moment] = value
