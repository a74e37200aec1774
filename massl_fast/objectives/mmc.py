"""MMC: masked momentum contrast of class tokens and of patches, with reconstruction (Ahmed, Atito, Awais, Kittler, arXiv 2308.11448).

No official code is known, and the paper leaves much open. Assumed here: class tokens are contrasted as in SiT (same group), view a against
the teacher's view b ≠ a, times 2τ; patches against the same view's uncorrupted patches, with those of other images of this rank and view as
negatives; reconstruction is the mean absolute difference over corrupted pixels; the three weigh the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from massl_fast.config import Config
from massl_fast.config.objectives import MmcSettings
from massl_fast.kernels import available_backends, contrast
from massl_fast.length import Length
from massl_fast.models.backbone import Masks
from massl_fast.models.flops import linear_flops
from massl_fast.models.heads import ClassPatchPixelHead
from massl_fast.models.precision import Precision
from massl_fast.objectives.base import At, Inputs, Metric, Objective, Outcome, head_sizes, patch_side, patches_of, spread
from massl_fast.objectives.draws import names_of_crops, small_blocks, uniforms
from massl_fast.objectives.meters import positive_rank


class MmcObjective(Objective):
    """Remembers nothing. In the student's crops blocks of patches are noise or come from another image; the teacher sees them whole."""

    Settings = MmcSettings
    METRICS = (
        Metric("class_loss", "Contrast of class tokens", "nats", figure="Losses"),
        Metric("patch_loss", "Contrast of patches", "nats", figure="Losses"),
        Metric("pixel_loss", "Reconstruction", note="Mean absolute difference of corrupted pixels, after normalisation."),
        Metric("class_similarity", "Cosine of class token and own key", figure="Similarity"),
        Metric("patch_similarity", "Cosine of patch and own key", figure="Similarity"),
        Metric(
            "positive_rank_percent",
            "Keys nearer to a class token than its own",
            "%",
            note="Mean over the first tokens of a rank. Near 50 they tell nothing of their image: the representation has collapsed.",
            console="rank",
            collapsed=("above", 35.0),
        ),
        spread("embedding_spread", "Spread of the teacher's class tokens", figure="Similarity"),
        Metric("corrupted_percent", "Corrupted patches", "%"),
    )
    needs_patches = True

    place: Tensor

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.settings: MmcSettings = config.objective
        self.register_buffer("place", torch.zeros(()), persistent=False)  # moves with the objective, so that it knows its device

    @classmethod
    def build(cls, config: Config, precision: Precision, rank: int) -> MmcObjective:
        return cls(config, precision.dtype)

    def heads(self, feature_dim: int) -> tuple[nn.Module, nn.Module]:
        sizes = head_sizes(self.config, feature_dim)
        side = patch_side(self.config)
        student, teacher = (ClassPatchPixelHead(**sizes, pixels=pixels) for pixels in (3 * side * side, 0))
        return student, teacher

    def student_inputs(self, crops: list[Tensor], at: At) -> Inputs:
        """Corrupted crops; noise is normal with the moments of normalised pixels, alien patches come from the next image of the batch."""
        assert at.patch is not None, "an objective of patches is refused a network without them"
        settings, side = self.settings, crops[0].shape[-1] // at.patch
        names = names_of_crops(self.teacher_views, at, crops[0].device)
        choices = uniforms(self.config.run.seed, at.step, names + (1 << 40), 1)[:, 0]
        seed = self.config.run.seed
        noise = small_blocks(
            names,
            (side, side),
            seed=seed + 1,
            step=at.step,
            ratio=torch.full_like(choices, settings.noise_ratio),
            largest=settings.block_share,
        )
        alien = small_blocks(
            names, (side, side), seed=seed + 2, step=at.step, ratio=choices * settings.alien_ratio, largest=settings.block_share
        )
        original = torch.cat(crops[: self.teacher_views])
        masks = [mask.view(-1, 1, side, side).repeat_interleave(at.patch, 2).repeat_interleave(at.patch, 3) for mask in (noise, alien)]
        drawn = uniforms(seed + 3, at.step, names, 2 * original[0].numel()).view(len(names), 2, *original.shape[1:])
        pixels = drawn.to(original.dtype).unbind(1)
        # Box and Muller's way from uniform to normal numbers.
        normal = (-2 * (1 - pixels[0]).clamp_min(1e-7).log()).sqrt() * (2 * torch.pi * pixels[1]).cos()
        others = torch.cat([crop.roll(1, 0) for crop in crops[: self.teacher_views]])
        corrupted = torch.where(masks[1], others, torch.where(masks[0], normal, original))
        hidden = noise | alien
        corrupted = corrupted.contiguous(memory_format=torch.channels_last).chunk(self.teacher_views)
        extra = {"corrupted": hidden, "original": original}
        return Inputs([*corrupted, *crops[self.teacher_views :]], Masks(None, None, extra))

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], at: At) -> Outcome:
        """``class_embeddings`` [2·N, D] and ``patch_embeddings`` [2·N·P, D] of both sides, ``pixels`` [2·N·P, 3·side²] of the student."""
        assert at.inputs is not None and at.inputs.masks is not None and at.patch is not None, "as student_inputs gave them"
        views, settings = self.teacher_views, self.settings
        corrupted, original = at.inputs.masks.extra["corrupted"], at.inputs.masks.extra["original"]
        wide = torch.promote_types(original.dtype, torch.float32)
        student, teacher = ({name: rows.to(wide) for name, rows in outputs.items()} for outputs in (student, teacher))
        query, key = (outputs["class_embeddings"].view(views, at.images, -1) for outputs in (student, teacher))
        keys = [at.world.gather_rows(of_view) for of_view in key]
        own = torch.arange(at.images, device=query.device) + at.world.rank * at.images
        classes = [contrast(query[a], keys[1 - a], own, temperature=settings.temperature, backend=settings.backend) for a in range(views)]
        class_loss = 2 * settings.temperature * (classes[0].loss + classes[1].loss)

        count = corrupted.shape[1]
        x, y = (outputs["patch_embeddings"].view(views, at.images * count, -1) for outputs in (student, teacher))
        weight = corrupted.to(wide) if settings.masked_patches_only else torch.ones_like(corrupted, dtype=wide)
        weight = (weight / weight.sum().clamp_min(1)).view(views, -1)
        image = torch.arange(at.images, device=x.device).repeat_interleave(count)
        places = torch.arange(at.images * count, device=x.device)
        patches = [
            contrast(
                x[a],
                y[a],
                places,
                temperature=settings.temperature,
                row_group=image,
                key_group=image,
                row_weight=weight[a],
                backend=settings.backend,
            )
            for a in range(views)
        ]
        patch_loss = patches[0].loss + patches[1].loss

        blocks = F.unfold(original, at.patch, stride=at.patch).mT.to(wide)  # [2N, P, 3·side²]
        difference = (student["pixels"].view_as(blocks) - blocks).abs().mean(-1)
        pixel_loss = (difference * corrupted).sum() / corrupted.sum().clamp_min(1)

        loss = settings.class_weight * class_loss + settings.patch_weight * patch_loss + settings.pixel_weight * pixel_loss
        unit = F.normalize(torch.cat(keys).detach(), dim=-1)
        metrics = {
            "class_loss": class_loss.detach(),
            "patch_loss": patch_loss.detach(),
            "pixel_loss": pixel_loss.detach(),
            "class_similarity": (classes[0].similarity + classes[1].similarity) / 2,
            "patch_similarity": (patches[0].similarity + patches[1].similarity) / 2,
            "positive_rank_percent": positive_rank(query[0], keys[1], own),
            "embedding_spread": 1 - unit.mean(0).square().sum(),
            "corrupted_percent": 100 * corrupted.to(wide).mean(),
        }
        return Outcome(loss, metrics, {})

    def loss_flops(self, views: int) -> float:
        """Two products of each patch with the patches of its view on this rank, and of each class token with those of all ranks."""
        train, width = self.config.train, self.config.model.embedding_dim
        patches = patches_of(self.config)
        images = train.micro_batch or train.global_batch
        return 4.0 * width * views * (patches * images * patches + train.global_batch)

    def head_flops(self, student: nn.Module, teacher: nn.Module, views: int) -> float:
        """Class tokens through one perceptron, all patches of both views through the others, on both sides."""
        assert isinstance(student, ClassPatchPixelHead) and isinstance(teacher, ClassPatchPixelHead)
        patches, of_classes = views * patches_of(self.config), linear_flops(student.class_mlp)
        of_student, of_teacher = (linear_flops(head) - of_classes for head in (student, teacher))
        return 3 * (views * of_classes + patches * of_student) + self.teacher_views * of_classes + patches * of_teacher

    @property
    def backend(self) -> str:
        asked = self.settings.backend
        return asked if asked != "auto" else available_backends(self.place.device, self.dtype)[0]

    def line(self, world_size: int) -> str:
        return (
            f"backend {self.backend}; contrast of class tokens and of patches at temperature {self.settings.temperature}, reconstruction; "
            f"{self.settings.noise_ratio:.0%} noise, up to {self.settings.alien_ratio:.0%} alien patches"
        )

    def warnings(self, length: Length, num_images: int) -> list[str]:
        if length.accumulation == 1:
            return []
        return [
            f"The contrasts of mmc see the keys of one micro-batch: a step of {length.accumulation} micro-batches differs from one "
            f"of {length.global_batch} images at once."
        ]

    def drawn_per_rank(self) -> list[str]:
        return ["negatives of patches", "alien patches"]
