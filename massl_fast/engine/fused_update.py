"""AdamW and the teacher's moving average in one pass over the weights: clip, step, follow, each byte touched once.

Per parameter, clipping, PyTorch's fused AdamW and the three operations of the average read and write 68 bytes; here it is 36. On a GPU of
compute capability 8.0 or newer it is one Triton kernel (fused_update_kernel.py), on a CPU ``update_tensors``, its readable twin. What
changes from step to step, the verdict on the step included, is read from tensors on the device, so that a CUDA graph can record it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from massl_fast.engine.schedules import StepSettings


class AdamWWithTeacher(Optimizer):
    """``torch.optim.AdamW`` (Loshchilov and Hutter, 2019) that moves a teacher along. ``update_`` takes the place of ``step``.

    Group 0 decays, group 1 does not. State has AdamW's names, so that either can continue from the other's checkpoint.
    """

    def __init__(self, groups, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(hasattr(parameter, "to_local") for parameter in parameters):
            raise ValueError(
                "optimizer.name is adamw_with_teacher, which works on whole weights; with parallel.strategy fsdp2 choose adamw."
            )
        device = parameters[0].device
        self.decayed = {id(parameter) for parameter in self.param_groups[0]["params"]}
        self.unread: dict[Tensor, Tensor] = {}
        self.betas = torch.tensor(betas, dtype=torch.float64, device=device)
        self.on_gpu = device.type == "cuda"
        if self.on_gpu and (torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0)):
            raise ValueError(
                f"optimizer.name is adamw_with_teacher, whose kernel needs an NVIDIA GPU of compute capability 8.0 or newer; this is "
                f"{torch.cuda.get_device_name(device)}. Choose adamw."
            )

    @torch.no_grad()
    def update_(
        self,
        students: list[Tensor],
        teachers: list[Tensor | None],
        gradients: list[Tensor],
        factors: Tensor,
        finite: Tensor,
        settings: StepSettings,
    ) -> None:
        """One step of ``students`` and of the ``teachers`` that follow them (None: nobody does). Where ``finite`` (bool 0-d tensor) is
        false, nothing changes.

        ``factors`` [number of weights]: what each gradient is multiplied by first. ``settings``: numbers, or 0-d tensors on the device.
        """
        for student in students:
            state = self.state[student]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=student.device)
                state["exp_avg"] = torch.zeros_like(student)
                state["exp_avg_sq"] = torch.zeros_like(student)
        # The kernel moves a teacher of every weight; what nobody follows (a predictor) gets one that nobody reads.
        teachers = [
            self.unread.setdefault(student, torch.zeros_like(student)) if teacher is None else teacher
            for student, teacher in zip(students, teachers)
        ]
        steps, firsts, seconds = ([self.state[student][name] for student in students] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, finite.to(torch.float32), alpha=1)  # without alpha PyTorch takes the tensor for a number, and reads it
        # A step that was skipped before any other leaves the count at 0, where the correction would be 0 as well.
        counts = torch.stack(steps).double().clamp(min=1)
        corrections = 1 - self.betas ** counts[:, None]  # [number of weights, 2]
        decays = [id(student) in self.decayed for student in students]
        values = settings.vector(finite.device)
        eps = self.defaults["eps"]
        tensors = (students, gradients, firsts, seconds, teachers)
        if self.on_gpu:
            from massl_fast.engine import fused_update_kernel

            fused_update_kernel.update_(*tensors, decays, factors, corrections, finite, values, self.defaults["betas"], eps)
        else:
            update_tensors(*tensors, decays, factors, corrections, finite, values, self.betas, eps)


def update_tensors(
    students: list[Tensor],
    gradients: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    teachers: list[Tensor],
    decays: list[bool],
    factors: Tensor,
    corrections: Tensor,
    finite: Tensor,
    settings: Tensor,
    betas: Tensor,
    eps: float,
) -> None:
    """The kernel's computation by one operation after another, in the weights' dtype.

    ``corrections`` float64 [number of weights, 2]: 1 − βᵗ; ``settings`` float64, ordered as in ``StepSettings.vector``; ``betas``
    float64 [2].
    """
    dtype = students[0].dtype
    learning_rate, weight_decay, momentum = settings[:3].unbind()
    beta1, beta2 = torch.where(finite, betas, 1.0).unbind()
    rate = torch.where(finite, learning_rate, 0.0)
    follow = torch.where(finite, 1 - momentum, 0.0)

    updates = torch._foreach_mul(gradients, list(factors.to(dtype).unbind()))
    updates = [torch.where(finite, update, 0.0) for update in updates]
    torch._foreach_mul_(firsts, beta1.to(dtype))
    torch._foreach_add_(firsts, torch._foreach_mul(updates, (1 - beta1).to(dtype)))
    torch._foreach_mul_(seconds, beta2.to(dtype))
    torch._foreach_add_(seconds, torch._foreach_mul(torch._foreach_mul(updates, updates), (1 - beta2).to(dtype)))

    denominators = torch._foreach_mul(torch._foreach_sqrt(seconds), list(corrections[:, 1].rsqrt().to(dtype).unbind()))
    torch._foreach_add_(denominators, eps)
    moves = torch._foreach_mul(torch._foreach_div(firsts, denominators), list((rate / corrections[:, 0]).to(dtype).unbind()))
    keep = (1 - rate * weight_decay).to(dtype)
    torch._foreach_mul_([student for student, decayed in zip(students, decays) if decayed], keep)
    torch._foreach_sub_(students, moves)

    gaps = torch._foreach_sub(students, teachers)
    torch._foreach_mul_(gaps, follow.to(dtype))
    torch._foreach_add_(teachers, gaps)
