"""A whole training step of each objective against an independent one in plain PyTorch, five steps in float64."""

import copy

import pytest
import torch

from massl_fast.kernels import partition_indices
from massl_fast.objectives.base import At
from massl_fast.objectives.draws import block_masks, chosen_rows
from plain import PlainStep, carp_loss, dino_loss, moco_loss, pairs, patch_contrast_loss, sinkhorn_targets
from small import crops_of, settings_of, small_step, step_settings

STEPS, IMAGES = 5, 6


def plain_side(step):
    """Copies of both networks, walked through one crop at a time."""
    student, teacher = copy.deepcopy(step.pair.student), copy.deepcopy(step.pair.teacher)
    return student, teacher, PlainStep(student, teacher, step.clip, step.teacher_first)


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


@pytest.mark.parametrize("moves", ["after_student", "before_student"])
def test_carp(moves):
    config = settings_of("carp", teacher={"moves": moves})
    step = small_step(config, torch.float64)
    assert step.teacher_first == (moves == "before_student")
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


def test_a_teacher_that_moves_first_and_an_update_that_moves_it_last_exclude_each_other():
    with pytest.raises(ValueError, match=r"Choose optimizer\.name adamw, or teacher\.moves after_student"):
        small_step(settings_of("carp", teacher={"moves": "before_student"}, optimizer={"name": "adamw_with_teacher"}))


def test_moco_v3():
    config = settings_of("moco_v3")
    step = small_step(config, torch.float64)
    student, teacher, plain = plain_side(step)
    for number in range(STEPS):
        crops = crops_of(config, IMAGES, number, torch.float64)
        settings = step_settings(number, frozen=("backbone.patch_embed.",))
        result = step([crops], settings, number)
        query = torch.stack([student.head.predictor(student.head.projector(student.backbone(crop))) for crop in crops])
        with torch.no_grad():
            key = torch.stack([teacher.head.projector(teacher.backbone(crop)) for crop in crops])
        loss = moco_loss(query, key, 0.2)
        plain(loss, settings.learning_rate, settings.weight_decay, settings.teacher_momentum, settings.frozen)
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-10, atol=1e-10)
    demand_equal(step, student, teacher)
    assert "head.predictor.0.weight" not in dict(step.pair.teacher.named_parameters())


def tokens_of(encoder, crops, mask=None):
    """Class token [V·N, C] and patch tokens [V·N, P, C] of crops of one size, by the network's own layers; masked patches replaced."""
    backbone = encoder.backbone
    patches = backbone.patch_embed(torch.cat(crops))
    patches = patches.flatten(1, 2) if patches.ndim == 4 else patches
    if mask is not None:
        patches = torch.where(mask[..., None], encoder.head.mask_token, patches)
    whole = torch.cat([backbone.cls_token.expand(len(patches), -1, -1), patches], 1)
    positions = backbone.pos_embed
    if whole.shape[1] != positions.shape[1]:
        side = int((whole.shape[1] - 1) ** 0.5)
        old = int((positions.shape[1] - 1) ** 0.5)
        grid = positions[:, 1:].view(1, old, old, -1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", antialias=True).flatten(2).mT
        positions = torch.cat([positions[:, :1], grid], 1)
    whole = backbone.norm(backbone.blocks(whole + positions))
    return whole[:, 0], whole[:, 1:]


def test_ibot():
    config = settings_of("ibot")
    step = small_step(config, torch.float64)
    student, teacher, plain = plain_side(step)
    center, patch_center = torch.zeros(2, 40, dtype=torch.float64)
    for number in range(STEPS):
        crops = crops_of(config, IMAGES, number, torch.float64)
        settings = step_settings(number)
        result = step([crops], settings, number)
        at = At(number, settings.own, IMAGES, 0, (), step.world, 4)
        mask = step.objective.student_inputs(crops, at).masks.hidden
        (z_global, x), (z_local, _) = tokens_of(student, crops[:2], mask), tokens_of(student, crops[2:])
        z = student.head.mlp(torch.cat([z_global, z_local])).view(len(crops), IMAGES, -1)
        x = student.head.mlp(x)
        with torch.no_grad():
            w, y = tokens_of(teacher, crops[:2])
            w, y = teacher.head.mlp(w).view(2, IMAGES, -1), teacher.head.mlp(y)
            c_teacher, d_teacher = teacher.head.last_layer(), teacher.head.patch_last_layer()
        z, x, w, y = (rows / rows.norm(dim=-1, keepdim=True) for rows in (z, x, w, y))
        of_classes = dino_loss(z, w, student.head.last_layer(), c_teacher, center, 0.1, 0.05)
        targets = ((y @ d_teacher.T - patch_center) / 0.06).softmax(-1)
        of_patches = -(targets * (x @ student.head.patch_last_layer().T / 0.1).log_softmax(-1)).sum(-1)  # [2N, P]
        of_patches = ((of_patches * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()
        loss = of_classes + of_patches
        center = 0.9 * center + 0.1 * (w @ c_teacher.T).mean((0, 1))
        patch_center = 0.9 * patch_center + 0.1 * (y @ d_teacher.T).mean((0, 1))
        plain(loss, settings.learning_rate, settings.weight_decay, settings.teacher_momentum)
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(step.objective.patch_center, patch_center, rtol=1e-8, atol=1e-9)
    assert mask.any() and not mask.all()
    demand_equal(step, student, teacher)


def patches_of(images, side):
    """Pixels of each patch, [n, P, 3·side²] in the order channel, row, column."""
    count, channels, height, width = images.shape
    cut = images.view(count, channels, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * side * side)


def test_mmc():
    config = settings_of("mmc")
    step = small_step(config, torch.float64)
    student, teacher, plain = plain_side(step)
    for number in range(STEPS):
        crops = crops_of(config, IMAGES, number, torch.float64)
        settings = step_settings(number)
        result = step([crops], settings, number)
        at = At(number, settings.own, IMAGES, 0, (), step.world, 4)
        inputs = step.objective.student_inputs(crops, at)
        hidden = inputs.masks.extra["corrupted"]
        seen, whole, others = (patches_of(torch.cat(part), 4) for part in (inputs.crops, crops, [crop.roll(1, 0) for crop in crops]))
        alien = (seen == others).all(-1)
        assert torch.equal(hidden, (seen != whole).any(-1)) and hidden.any() and not hidden.all()
        assert alien.any() and not alien[~hidden].any() and not alien.all()
        classes, patches = tokens_of(student, inputs.crops)
        with torch.no_grad():
            class_keys, patch_keys = tokens_of(teacher, crops)
            class_keys, patch_keys = teacher.head.class_mlp(class_keys), teacher.head.patch_mlp(patch_keys)
        pixels = student.head.decoder(patches)
        query, key = (rows.view(2, IMAGES, -1) for rows in (student.head.class_mlp(classes), class_keys))
        x, y = (rows.view(2, IMAGES * 16, -1) for rows in (student.head.patch_mlp(patches), patch_keys))
        loss = moco_loss(query, key, 0.2) + patch_contrast_loss(x, y, hidden.view(2, -1), 16, 0.2)
        loss = loss + ((pixels - whole).abs().mean(-1) * hidden).sum() / hidden.sum()
        plain(loss, settings.learning_rate, settings.weight_decay, settings.teacher_momentum)
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-10, atol=1e-10)
    demand_equal(step, student, teacher)
    assert not any(name.startswith("head.decoder") for name, _ in step.pair.teacher.named_parameters())


def test_masks_are_blocks_of_the_published_sizes():
    names = torch.arange(4000)
    mask = block_masks(names, (14, 14), seed=3, step=7, ratio=(0.1, 0.5), share=0.5)
    shares = mask.float().mean(1)
    assert 0.45 < (shares > 0).float().mean() < 0.55
    assert shares.max() <= 0.5 and 0.13 < shares.mean() < 0.15, "about 15 % in all, less what no block fills"
    assert torch.equal(mask[10:20], block_masks(names[10:20], (14, 14), seed=3, step=7, ratio=(0.1, 0.5), share=0.5))
    assert not torch.equal(mask, block_masks(names, (14, 14), seed=3, step=8, ratio=(0.1, 0.5), share=0.5))
    rows = chosen_rows(mask[:20], 20 * 98)
    exact = chosen_rows(mask[:20], None)
    assert torch.equal(rows[: len(exact)], exact) and not mask[:20].flatten()[rows[len(exact) :]].any()
