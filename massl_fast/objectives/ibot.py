"""iBOT: DINO on class tokens, and the same distillation of masked patches (Zhou et al., ICLR 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from massl_fast.config import Config
from massl_fast.config.objectives import IbotSettings
from massl_fast.kernels import prototype_cross_entropy
from massl_fast.length import Length, linear
from massl_fast.models.backbone import Masks
from massl_fast.models.flops import linear_flops
from massl_fast.models.heads import PatchPrototypeHead
from massl_fast.objectives.base import At, Curve, Inputs, Metric, Outcome, head_sizes, patches_of
from massl_fast.objectives.dino import LAST_LAYER, DinoObjective, move_center_
from massl_fast.objectives.draws import block_masks, chosen_rows, names_of_crops


class IbotObjective(DinoObjective):
    """Owns two centres [K], of class tokens and of patches.

    Only masked patches go through the student's head: the others have no gradient, and the head normalises over no batch, so this is exact.
    The teacher's head sees all patches, as its centre is the mean over all. Where the host must not wait (a GPU, a recorded step) masked
    rows are padded to their bound with rows of weight 0.
    """

    Settings = IbotSettings
    METRICS = (
        *DinoObjective.METRICS,
        Metric("class_loss", "Loss of class tokens", "nats", figure="Losses"),
        Metric("patch_loss", "Loss of masked patches", "nats", figure="Losses"),
        Metric("masked_percent", "Masked patches", "%"),
        Metric("patch_center_norm", "Norm of the patches' centre"),
        Metric("patch_teacher_temperature", "Temperature of the teacher's softmax over patches"),
    )
    REMEMBERS = "centres"
    needs_patches = True

    patch_center: Tensor
    settings: IbotSettings

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__(config, dtype)
        self.register_buffer("patch_center", torch.zeros(self.settings.prototypes))

    def heads(self, feature_dim: int) -> tuple[nn.Module, nn.Module]:
        sizes = head_sizes(self.config, feature_dim)
        student, teacher = (
            PatchPrototypeHead(
                **sizes,
                prototypes=self.settings.prototypes,
                free_norm=not self.settings.freeze_norm,
                shared=self.settings.shared_head,
                mask_token=masks,
            )
            for masks in (True, False)
        )
        return student, teacher

    def student_inputs(self, crops: list[Tensor], at: At) -> Inputs:
        """Block-wise masks on the global crops, and the weight of each masked row in the loss."""
        assert at.patch is not None, "an objective of patches is refused a network without them"
        settings, side = self.settings, crops[0].shape[-1] // at.patch
        count, patches = self.teacher_views * at.images, side * side
        mask = block_masks(
            names_of_crops(self.teacher_views, at, crops[0].device),
            (side, side),
            seed=self.config.run.seed,
            step=at.step,
            ratio=settings.mask_ratio,
            share=settings.masked_share,
        )
        mask = mask & (torch.as_tensor(at.schedules["masking"], device=mask.device) > 0)
        host_may_wait = mask.device.type == "cpu" and not isinstance(at.step, Tensor)
        rows = chosen_rows(mask, None if host_may_wait else count * math.floor(settings.mask_ratio[1] * patches))
        weight = mask.to(torch.promote_types(crops[0].dtype, torch.float32)) / (mask.sum(1, keepdim=True).clamp_min(1) * count)
        return Inputs(crops, Masks(mask, rows, {"weight": weight.flatten().index_select(0, rows), "masked": mask.float().mean()}))

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], at: At) -> Outcome:
        """Takes what ``DinoObjective.forward`` takes, and ``patch_embeddings`` ([M, D] of masked patches, [T·N·P, D] of all) and
        ``patch_prototypes``."""
        assert at.inputs is not None and at.inputs.masks is not None, "as student_inputs gave them"
        masks = at.inputs.masks
        of_classes = super().forward(student, teacher, at)
        keys, teacher_keys = student["patch_prototypes"], teacher["patch_prototypes"]
        if LAST_LAYER in at.frozen and at.world.size == 1:
            keys = keys.detach()
        x, y = student["patch_embeddings"], teacher["patch_embeddings"]
        temperature = at.schedules["patch_teacher_temperature"]
        assert masks.rows is not None
        target = y.index_select(0, masks.rows)
        x, target, keys, teacher_keys = (tensor.to(self._dtype_of(tensor)) for tensor in (x, target, keys, teacher_keys))
        patch_loss = prototype_cross_entropy(
            x,
            target,
            keys,
            teacher_keys,
            key_bias=-self.patch_center / temperature,
            student_temp=self.settings.student_temperature,
            teacher_temp=temperature,
            pairs="same row",
            row_weight=masks.extra["weight"].to(x.dtype),
            backend=self.settings.backend,
        ).loss
        metrics = of_classes.metrics | {
            "class_loss": of_classes.loss.detach(),
            "patch_loss": patch_loss.detach(),
            "masked_percent": 100 * masks.extra["masked"],
        }
        carried = of_classes.carried | {"patch_mean": y.to(self.patch_center.dtype).mean(0), "patch_prototypes": teacher_keys}
        loss = self.settings.class_weight * of_classes.loss + self.settings.patch_weight * patch_loss
        return Outcome(loss, metrics, carried)

    def commit_(self, carried: Sequence[dict[str, Tensor]], finite: Tensor, at: At) -> dict[str, Tensor]:
        mean = at.world.mean(torch.stack([each["patch_mean"] for each in carried]).mean(0))
        move_center_(self.patch_center, self.settings.patch_center_momentum, mean, carried[-1]["patch_prototypes"], finite)
        return super().commit_(carried, finite, at)

    def readings(self, step: int, length: Length) -> dict[str, float]:
        return super().readings(step, length) | {"patch_center_norm": self.patch_center.norm().item()}

    def schedules(self, length: Length) -> dict[str, Curve]:
        settings = self.settings
        warm_up = settings.teacher_temperature_warmup_epochs * length.steps_per_epoch
        begin = settings.mask_from_epoch * length.steps_per_epoch
        start, end = settings.patch_teacher_temperature_start, settings.patch_teacher_temperature
        return super().schedules(length) | {
            "patch_teacher_temperature": lambda step: linear(step, start, end, warm_up),
            "masking": lambda step: float(step >= begin),
        }

    def frozen(self, step: int, length: Length) -> tuple[str, ...]:
        return (LAST_LAYER, "head.patch_last_layer.") if super().frozen(step, length) else ()

    def loss_flops(self, views: int) -> float:
        """DINO's, and eight products per masked row."""
        masked = self.settings.masked_share * sum(self.settings.mask_ratio) / 2 * self.teacher_views * patches_of(self.config)
        return super().loss_flops(views) + 16.0 * self.config.model.embedding_dim * masked * self.settings.prototypes

    def head_flops(self, student: nn.Module, teacher: nn.Module, views: int) -> float:
        """Masked patches through the student's head, all patches of the global crops through the teacher's."""
        patches = self.teacher_views * patches_of(self.config)
        masked = self.settings.masked_share * sum(self.settings.mask_ratio) / 2 * patches
        return 3 * (views + masked) * linear_flops(student) + (self.teacher_views + patches) * linear_flops(teacher)

    def line(self, world_size: int) -> str:
        low, high = self.settings.mask_ratio
        return f"{super().line(world_size)}; {self.settings.masked_share:.0%} of global crops masked to {low:.0%} to {high:.0%}"
