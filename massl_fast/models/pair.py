"""Student and teacher: the teacher is the exponential moving average of those of the student's parts that it has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from massl_fast.models.backbone import Encoder
from massl_fast.models.precision import Precision


class StudentTeacher(nn.Module):
    """The teacher starts as a copy of the student, never receives a gradient, and stays in evaluation mode.

    Its parameters are matched with the student's by name. The student may have more (a predictor, a decoder), the teacher may not.

    Batch-norm layers of a teacher are the exception: during training they normalise with the batch's own statistics, as
    the student's do, and keep running ones of their own. The student's running statistics would not fit: they belong to
    other weights and mix global with local crops.

    Weights must be float32 or float64 (autocast makes the 16-bit copies): a teacher moving by 0.4% of a difference a
    step would stand still in 16 bits.
    """

    def __init__(self, student: Encoder, teacher: Encoder) -> None:
        super().__init__()
        for name, parameter in student.named_parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"Weights must be float32 (or float64), but {name} is {parameter.dtype}.")
        self.student = student
        self.teacher = teacher
        whole = student.state_dict()
        alone = [name for name in teacher.state_dict() if name not in whole]
        if alone:
            raise ValueError(f"The teacher has {', '.join(alone)}, which the student has not: it would never move.")
        self.teacher.load_state_dict({name: whole[name] for name in teacher.state_dict()})
        self.teacher.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> StudentTeacher:
        """Sets the mode of the student and of the teacher's batch norms; the rest of the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        for module in self.teacher.modules():
            if isinstance(module, _BatchNorm):
                module.train(mode)
        return self

    def compile_blocks(self, **options: Any) -> None:
        """``torch.compile`` what repeats in both networks; ``options`` go to ``torch.compile`` (see ``Encoder.compile_blocks``)."""
        for encoder in (self.student, self.teacher):
            encoder.compile_blocks(**options)

    def choose_attention(self, asked: str, device: torch.device, precision: Precision) -> None:
        """See ``Encoder.choose_attention``."""
        for encoder in (self.student, self.teacher):
            encoder.choose_attention(asked, device, precision)

    def twins(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """(student's, teacher's) parameter by the name that both have, in the student's order."""
        teacher = dict(self.teacher.named_parameters())
        return {name: (parameter, teacher[name]) for name, parameter in self.student.named_parameters() if name in teacher}

    @torch.no_grad()
    def update_teacher_(self, momentum: float | Tensor) -> None:
        """teacher ← momentum · teacher + (1 − momentum) · student, all parameters at once.

        ``momentum`` may be a 0-d tensor on the weights' device, so that a captured CUDA graph follows a schedule; it
        costs one temporary of the weights' size, which a float does not. Nothing here waits for the device.
        """
        student, teacher = map(list, zip(*self.twins().values()))
        if isinstance(momentum, Tensor):
            difference = torch._foreach_sub(student, teacher)
            torch._foreach_mul_(difference, (1 - momentum).to(teacher[0].dtype))
            torch._foreach_add_(teacher, difference)
        else:
            torch._foreach_lerp_(teacher, student, 1 - momentum)
