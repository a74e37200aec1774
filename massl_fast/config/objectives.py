"""The settings of each objective: one model per objective, chosen by ``objective.name``.

A new objective adds a model here and its line at the end of the file; one that lives outside the package calls ``register_settings``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from massl_fast.config.sections import Epochs, Temperature
from massl_fast.config.whole import Config, ObjectiveSettings, register_settings


class MasslSettings(ObjectiveSettings):
    """Learning from Memory (Silva et al., ICML 2024): similarities to random blocks of a memory of past embeddings."""

    name: Literal["massl"] = "massl"
    memory_size: int = Field(65536, ge=2, lt=2**31)
    """Entries of the memory, K."""
    block_size: int = Field(16384, ge=2, lt=2**31)
    """Entries of a block; the last K modulo block_size entries of each partition sit out a step."""
    partition: Literal["stochastic", "blockwise"] = "stochastic"
    """stochastic: a fresh random partition every step; blockwise: contiguous blocks (the ablation that collapses in table 13)."""
    partition_scope: Literal["shared", "rank"] = "shared"
    """shared: all ranks cut the memory into the same blocks; rank: each into its own, so that a step sees more different blocks."""
    student_temperature: Temperature = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature_start: Temperature = 0.04
    """Temperature of the teacher's softmax at step 0."""
    teacher_temperature: Temperature = 0.07
    """Temperature of the teacher's softmax after its warm-up."""
    teacher_temperature_warmup_epochs: Epochs = 30
    """Epochs over which the teacher temperature rises linearly."""
    block_reduction: Literal["mean", "sum"] = "mean"
    """Losses of the blocks are averaged (published code) or summed (paper, eq. 3)."""
    enqueue_view: Literal["first", "second"] = "second"
    """Which global crop's teacher embedding enters the memory: the second (published code) or the first (paper's listing)."""
    memory_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Format in which the memory is stored. auto: that of the step's precision."""
    backend: Literal["auto", "reference", "streaming", "triton"] = "auto"
    """Implementation of the loss. auto: the fastest that runs on the device; one that is named and cannot run is an error."""

    @property
    def entries_in_blocks(self) -> int:
        """Entries that take part in a step: those of whole blocks."""
        return self.memory_size // self.block_size * self.block_size

    def check(self, config: Config) -> None:
        if self.block_size > self.memory_size:
            raise ValueError(
                f"objective.block_size is {self.block_size}, larger than objective.memory_size {self.memory_size}: "
                f"there would be no block. Choose a block of at most the memory."
            )
        if self.memory_size < config.train.global_batch:
            raise ValueError(
                f"objective.memory_size is {self.memory_size}, smaller than train.global_batch {config.train.global_batch}: one step's "
                f"embeddings would not fit. Choose a memory of at least the batch (the published one holds 65536)."
            )


class PrototypeSettings(ObjectiveSettings):
    """What objectives with a teacher that sharpens over prototypes share."""

    prototypes: int = Field(65536, ge=2, lt=2**31)
    """Outputs of the last layer, K."""
    student_temperature: Temperature = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature_start: Temperature = 0.04
    """Temperature of the teacher's softmax at step 0."""
    teacher_temperature: Temperature = 0.04
    """Temperature of the teacher's softmax after its warm-up. The published default is 0.04 throughout; the boosted run ends at 0.07."""
    teacher_temperature_warmup_epochs: Epochs = 0
    """Epochs over which the teacher temperature rises linearly."""
    center_momentum: float = Field(0.9, ge=0, le=1)
    """Momentum of the centre's moving average."""
    freeze_norm: bool = True
    """Keep the prototypes at unit length. The published ViT-S run lets their lengths learn."""
    freeze_last_layer_epochs: Epochs = 1
    """Epochs at the start in which the last layer does not change."""
    backend: Literal["auto", "reference", "streaming", "triton"] = "auto"
    """Implementation of the loss. auto: the fastest that runs on the device; a named one that cannot run is an error."""


class DinoSettings(PrototypeSettings):
    """DINO (Caron et al., ICCV 2021): assignments to learned prototypes, kept apart by a centre or by Sinkhorn-Knopp (DINOv2)."""

    name: Literal["dino"] = "dino"
    centering: Literal["centre", "sinkhorn"] = "centre"
    """What keeps the teacher's assignments from collapsing: a moving centre (DINO) or Sinkhorn-Knopp over the batch (DINOv2, SwAV)."""
    sinkhorn_iterations: int = Field(3, ge=1, le=100)
    """Rounds of Sinkhorn-Knopp."""


class IbotSettings(PrototypeSettings):
    """iBOT (Zhou et al., ICLR 2022): DINO on class tokens and on masked patches."""

    name: Literal["ibot"] = "ibot"
    prototypes: int = Field(8192, ge=2, lt=2**31)
    """Outputs of the last layer, K."""
    shared_head: bool = True
    """Class tokens and patches share the last layer (the published command); the code's default gives patches one of their own."""
    patch_teacher_temperature_start: Temperature = 0.04
    """Temperature of the teacher's softmax over patches at step 0."""
    patch_teacher_temperature: Temperature = 0.07
    """Temperature of the teacher's softmax over patches after the warm-up."""
    patch_center_momentum: float = Field(0.9, ge=0, le=1)
    """Momentum of the moving average of the patches' centre."""
    class_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of the loss of class tokens."""
    patch_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of the loss of masked patches."""
    masked_share: float = Field(0.5, ge=0, le=1)
    """Share of global crops that are masked at all."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of patches that a mask hides."""
    mask_from_epoch: Epochs = 0
    """Epoch from which crops are masked."""

    def check(self, config: Config) -> None:
        low, high = self.mask_ratio
        if not 0 <= low <= high <= 1:
            raise ValueError(f"objective.mask_ratio is ({low}, {high}); it takes two numbers from 0 to 1, the smaller first.")


class MmcSettings(ObjectiveSettings):
    """MMC (Ahmed et al., arXiv 2308.11448): contrast of class tokens and of patches of corrupted images, and their reconstruction."""

    name: Literal["mmc"] = "mmc"
    temperature: Temperature = 0.2
    """Temperature of both contrasts."""
    class_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of the contrast of class tokens; the paper prints none."""
    patch_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of the contrast of patches; the paper prints none."""
    pixel_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of the reconstruction; the paper prints none."""
    masked_patches_only: bool = True
    """Contrast the corrupted patches alone; otherwise all."""
    noise_ratio: float = Field(0.75, ge=0, le=1)
    """Share of patches that noise replaces."""
    alien_ratio: float = Field(0.3, ge=0, le=1)
    """Largest share of patches that come from another image of the batch."""
    block_share: float = Field(0.3, gt=0, le=1)
    """Largest side of a corrupted block as a share of the image's."""
    backend: Literal["auto", "reference", "streaming", "triton"] = "auto"
    """Implementation of the contrasts. auto: the fastest that runs on the device; a named one that cannot run is an error."""

    def check(self, config: Config) -> None:
        if config.crops.num_local:
            raise ValueError(
                f"crops.num_local is {config.crops.num_local}, but mmc takes two global crops and no others (what the paper does with "
                f"local ones is not known). Set crops.num_local 0."
            )


class CarpSettings(ObjectiveSettings):
    """CARP (Silva and Ramírez Rivera, NeurIPS 2023): consistent assignments over random partitions of learned prototypes."""

    name: Literal["carp"] = "carp"
    prototypes: int = Field(65536, ge=2, lt=2**31)
    """Outputs of the last layer, K."""
    block_size: int = Field(512, ge=2, lt=2**31)
    """Prototypes of a block; the last K modulo block_size of each partition sit out a step."""
    backend: Literal["auto", "reference", "streaming", "triton"] = "auto"
    """Implementation of the loss. auto: streaming, in float32 on every device; triton takes TF32 products where PyTorch may, and no GPU has
    confirmed it; reference keeps all logits."""

    def check(self, config: Config) -> None:
        if self.block_size > self.prototypes:
            raise ValueError(
                f"objective.block_size is {self.block_size}, larger than objective.prototypes {self.prototypes}: there would be no block. "
                f"Choose a block of at most the prototypes."
            )


class MocoV3Settings(ObjectiveSettings):
    """MoCo v3 (Chen, Xie, He, ICCV 2021): contrast of queries with a moving average's keys of the same batch."""

    name: Literal["moco_v3"] = "moco_v3"
    temperature: Temperature = 0.2
    """Temperature of the contrast: 0.2 for transformers, 1.0 for ResNet-50."""
    predictor_batch_norm: bool = True
    """A batch norm behind the predictor's last layer (transformers; the published ResNet-50 has none)."""
    freeze_patch_embedding: bool = True
    """Keep the patch embedding as it was drawn, which steadies the training of transformers (section 4.3). Other networks have none."""
    backend: Literal["auto", "reference", "streaming", "triton"] = "auto"
    """Implementation of the loss. auto: the fastest that runs on the device; a named one that cannot run is an error."""

    def check(self, config: Config) -> None:
        if config.crops.num_local:
            raise ValueError(
                f"crops.num_local is {config.crops.num_local}, but moco_v3 compares two global crops with each other and takes no others. "
                f"Set crops.num_local 0."
            )


register_settings("massl", MasslSettings)
register_settings("carp", CarpSettings)
register_settings("dino", DinoSettings)
register_settings("ibot", IbotSettings)
register_settings("mmc", MmcSettings)
register_settings("moco_v3", MocoV3Settings)
