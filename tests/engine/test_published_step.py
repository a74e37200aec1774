"""The reference path of the step benchmark takes the same steps as the trainer's own."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from massl_fast.config import OptimizerSection
from massl_fast.distributed.world import World
from massl_fast.engine.optimizer import build_optimizer
from massl_fast.engine.schedules import StepSettings
from massl_fast.engine.step import TrainStep
from massl_fast.kernels import partition_indices
from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import Precision
from massl_fast.objectives.massl import MasslObjective

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from published_step import Drawn, Massl, published_encoder

K, BLOCK, IMAGES, STEPS = 64, 16, 4, 5


def parts(depth: int = 2):
    torch.manual_seed(0)
    # Crops of the size that the position embeddings are laid out for: timm resamples those of other sizes in float32.
    backbone = build_backbone("vit_tiny_patch16_224", image_size=16, model_args=dict(patch_size=4, depth=depth, embed_dim=32, num_heads=2))
    return backbone.double(), ProjectionHead(32, hidden_dim=32, out_dim=16).double()


def test_the_published_step_and_ours_are_the_same_mathematics():
    world, precision = World(0, 1, 0, torch.device("cpu")), Precision("fp32", "stands for no autocast; the weights are float64")
    pair = StudentTeacher(Encoder(*parts()), Encoder(*parts()))
    objective = MasslObjective(K, 16, block_size=BLOCK, student_temperature=0.1, memory_dtype=torch.float64)
    optimizer = build_optimizer(pair.student, OptimizerSection())
    ours = TrainStep(pair, objective, optimizer, world=world, precision=precision, clip=0.05, clip_mode="parameter")
    published = Massl(
        published_encoder(*parts()),
        published_encoder(*parts()),
        SimpleNamespace(block_size=BLOCK, student_temperature=0.1),
        lambda step: Drawn(partition=partition_indices(K, seed=0, step=step)),
        memory=objective.memory.clone(),
        clip=0.05,
        precision=precision,
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        crops = [torch.randn(IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(5)]
        settings = StepSettings(1e-3 * (step + 1), 0.1, 0.9 + 0.01 * step, {"teacher_temperature": 0.05})
        loss = published(crops, settings, step)
        torch.testing.assert_close(ours([crops], settings, step).loss.item(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective.memory, published.memory.T, rtol=1e-9, atol=1e-12)
    weights = published.student.state_dict()
    for name, weight in pair.student.state_dict().items():
        # Biases of keys have no gradient but for rounding, which AdamW turns into whole steps.
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(weight, weights[name], rtol=1e-9, atol=1e-10, msg=name)
