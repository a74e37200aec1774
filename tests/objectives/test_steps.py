"""A whole training step of each objective against an independent one in plain PyTorch, five steps in float64."""

import copy

import pytest
import torch

from massl_fast.kernels import partition_indices
from plain import PlainStep, carp_loss, dino_loss, moco_loss, pairs, sinkhorn_targets
from small import crops_of, settings_of, small_step, step_settings

STEPS, IMAGES = 5, 6


def plain_side(step):
    """Copies of both networks, walked through one crop at a time."""
    student, teacher = copy.deepcopy(step.pair.student), copy.deepcopy(step.pair.teacher)
    return student, teacher, PlainStep(student, teacher, clip=step.clip)


def walked(encoder, crops):
    """Embeddings [V, N, D] and prototypes, by timm's own forward and the head's own layers."""
    features = [
        encoder.backbone(torch.cat([crop for crop in crops if crop.shape[-1] == size]))
        for size in dict.fromkeys(c.shape[-1] for c in crops)
    ]
    rows = encoder.head.mlp(torch.cat(features)).view(len(crops), len(crops[0]), -1)
    last = encoder.head.last_layer
    return rows, last.g * last.v / last.v.norm(dim=1, keepdim=True)


def demand_equal(step, student, teacher):
    for ours, theirs in ((step.pair.student, student), (step.pair.teacher, teacher)):
        for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
            if not name.endswith("qkv.bias"):  # biases of keys have no gradient but rounding, which AdamW turns into whole steps
                torch.testing.assert_close(a, b, rtol=1e-8, atol=2e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["dino", "dino-sinkhorn"])
def test_dino(name):
    config = settings_of(name)
    step = small_step(config, torch.float64)
    student, teacher, plain = plain_side(step)
    center = torch.zeros(40, dtype=torch.float64)
    for number in range(STEPS):
        crops = crops_of(config, IMAGES, number, torch.float64)
        frozen = ("head.last_layer.",) if number < 2 and name == "dino" else ()
        settings = step_settings(number, frozen=frozen)
        result = step([crops], settings, number)
        (z, c), (w, c_teacher) = walked(student, crops), walked(teacher, crops[:2])
        z, w = (rows / rows.norm(dim=-1, keepdim=True) for rows in (z, w.detach()))
        c_teacher = c_teacher.detach()
        if name == "dino":
            loss = dino_loss(z, w, c, c_teacher, center, 0.1, 0.05)
            center = 0.9 * center + 0.1 * (w @ c_teacher.T).mean((0, 1))
        else:
            targets = sinkhorn_targets(w, c_teacher, 0.05, 3)
            logits = (z @ c.T / 0.1).log_softmax(-1)
            loss = sum(-(targets[j] * logits[i]).sum(-1).mean() for i, j in pairs(4, 2)) / 6
        plain(loss, settings.learning_rate, settings.weight_decay, settings.teacher_momentum, frozen)
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-10, atol=1e-10)
        if name == "dino":
            torch.testing.assert_close(step.objective.center, center, rtol=1e-9, atol=1e-10)
    demand_equal(step, student, teacher)


def test_carp():
    config = settings_of("carp")
    step = small_step(config, torch.float64)
    student, teacher, plain = plain_side(step)
    for number in range(STEPS):
        crops = crops_of(config, IMAGES, number, torch.float64)
        settings = step_settings(number)
        result = step([crops], settings, number)
        student.train(), step.pair.train()
        (z, c), (w, c_teacher) = walked(student, crops), walked(teacher, crops[:2])
        order = partition_indices(40, seed=config.run.seed, step=number)
        loss = carp_loss(z, w.detach(), c, c_teacher.detach(), order, 16)
        plain(loss, settings.learning_rate, settings.weight_decay, settings.teacher_momentum)
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-10, atol=1e-10)
    demand_equal(step, student, teacher)


def test_moco_v3():
    config = settings_of("moco_v3")
    step = small_step(config, torch.float64)
    student, teacher, plain = plain_side(step)
    for number in range(STEPS):
        crops = crops_of(config, IMAGES, number, torch.float64)
        settings = step_settings(number, frozen=("backbone.patch_embed.",))
        result = step([crops], settings, number)
        features = student.backbone(torch.cat(crops))
        query = student.head.predictor(student.head.projector(features)).view(2, IMAGES, -1)
        with torch.no_grad():
            key = teacher.head.projector(teacher.backbone(torch.cat(crops))).view(2, IMAGES, -1)
        loss = moco_loss(query, key, 0.2)
        plain(loss, settings.learning_rate, settings.weight_decay, settings.teacher_momentum, settings.frozen)
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-10, atol=1e-10)
    demand_equal(step, student, teacher)
    assert "head.predictor.0.weight" not in dict(step.pair.teacher.named_parameters())
