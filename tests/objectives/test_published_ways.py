"""The published ways that the step benchmark compares with take the steps of the trainer's own, in float64."""

import copy

import pytest
import torch

from massl_fast.kernels import partition_indices
from massl_fast.objectives.base import At
from published_step import STEPS, Drawn, published_encoder
from small import crops_of, settings_of, small_step, step_settings

IMAGES, COUNT = 5, 3
NAMES = [name for name in STEPS if name != "massl"]  # which tests/engine/test_published_step.py holds


def published_way(name, config, ours, dtype):
    """Beside ``ours``, from the same weights and with its draws."""
    encoders = [published_encoder(copy.deepcopy(one.backbone), copy.deepcopy(one.head)) for one in (ours.pair.student, ours.pair.teacher)]

    def drawn(step):
        if name == "carp":
            return Drawn(partition=partition_indices(40, seed=config.run.seed, step=step).long())
        at = At(step, step_settings(step).own, IMAGES, 0, (), ours.world, 4)
        inputs = ours.objective.student_inputs(crops_of(config, IMAGES, step, dtype), at)
        hidden = inputs.masks and inputs.masks.extra.get("corrupted", inputs.masks.hidden)
        return Drawn(mask=hidden, corrupted=inputs.crops)

    kind = STEPS[name]
    return kind(encoders[0].train(), encoders[1], config.objective, drawn, clip=ours.clip, precision=ours.precision)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_way_and_ours_are_the_same_mathematics(name):
    config = settings_of(name)
    ours = small_step(config, torch.float64)
    pair, published = ours.pair, published_way(name, config, ours, torch.float64)
    for step in range(COUNT):
        crops, settings = crops_of(config, IMAGES, step, torch.float64), step_settings(step)
        loss = published(crops, settings, step)
        torch.testing.assert_close(
            ours([crops], settings, step).loss.item(), loss, rtol=5e-8, atol=0
        )  # timm resamples positions in float32
    for mine, theirs in ((pair.student, published.student), (pair.teacher, published.teacher)):
        weights = theirs.state_dict()
        for key, weight in mine.state_dict().items():
            if not key.endswith("qkv.bias"):  # biases of keys have no gradient but rounding, which AdamW turns into whole steps
                torch.testing.assert_close(weight, weights[key], rtol=1e-7, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
    for center in ("center", "patch_center"):
        if hasattr(ours.objective, center):
            torch.testing.assert_close(getattr(ours.objective, center), getattr(published, center), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("narrow_name", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_16_bits_err_no_more_than_twice_as_much_as_those_of_the_published_way(name, narrow_name):
    """Mean over batches of the distance of the loss from that of float64; where published logits are 16 bits, ours are not."""
    config = settings_of(name)
    settings = step_settings(0)._replace(learning_rate=0.0, teacher_momentum=1.0)
    exact, ours = small_step(config, torch.float64), small_step(config, precision_name=narrow_name)
    ours.scaler.scale.fill_(1.0)  # at its first scale fp16 would skip steps, which leaves centres where they are
    narrow = published_way(name, config, ours, torch.float32)
    errors = []
    for step in range(8):
        crops = crops_of(config, IMAGES, step, torch.float64)
        rounded = [crop.float() for crop in crops]
        right = float(exact([crops], settings, step).loss)
        found = ours([rounded], settings, step)
        assert found.loss.isfinite() and found.gradient_norm.isfinite()
        errors.append((abs(float(found.loss) - right), abs(narrow(rounded, settings, step) - right)))
    mine, published = map(sum, zip(*errors))
    assert mine <= 2 * published + 8 * 1e-4 * abs(right), f"{mine / 8} against {published / 8}"
