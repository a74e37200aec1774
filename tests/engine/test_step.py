import pytest
import torch

from massl_fast.config import OptimizerSection
from massl_fast.distributed.world import World
from massl_fast.engine.optimizer import build_optimizer, optimizer_tensors
from massl_fast.engine.schedules import StepSettings
from massl_fast.engine.step import TrainStep
from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import LossScaler, Precision, choose_precision
from massl_fast.objectives.massl import MasslObjective, unit_row_spread

CPU = torch.device("cpu")
SETTINGS = StepSettings(learning_rate=1e-3, weight_decay=0.05, teacher_momentum=0.9, own={"teacher_temperature": 0.05})
VIT = {"patch_size": 4, "depth": 2, "num_heads": 2, "embed_dim": 32}


def build_step(
    *, drop_path: float = 0.0, optimizer: str = "adamw", architecture="vit_tiny_patch16_224", model_args=VIT, device=CPU
) -> TrainStep:
    torch.manual_seed(0)

    def encoder(rate: float) -> Encoder:
        backbone = build_backbone(architecture, image_size=16, other_sizes=[8], drop_path=rate, model_args=model_args)
        return Encoder(backbone, ProjectionHead(backbone.feature_dim, hidden_dim=32, out_dim=16))

    pair = StudentTeacher(encoder(drop_path), encoder(0.0)).to(device)
    objective = MasslObjective(64, 16, block_size=16, student_temperature=0.1).to(device)
    return TrainStep(
        pair,
        objective,
        build_optimizer(pair.student, OptimizerSection(name=optimizer)),
        world=World(0, 1, 0, device),
        precision=Precision("fp32", "test"),
        clip=3.0,
        clip_mode="parameter",
    )


def crops(seed: int = 0, images: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, size, size, generator=generator) for size in (16, 16, 8, 8, 8)]


def state(step: TrainStep) -> dict[str, torch.Tensor]:
    tensors = {**step.pair.state_dict(), **step.objective.state_dict(), **optimizer_tensors(step.optimizer, step.pair.student)}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_a_step_moves_student_teacher_and_memory():
    step = build_step()
    before = state(step)
    result = step([crops()], SETTINGS, 0)
    after = state(step)
    assert result.loss.isfinite() and not result.loss.requires_grad
    assert not torch.equal(before["student.head.mlp.0.weight"], after["student.head.mlp.0.weight"])
    expected = 0.9 * before["teacher.head.mlp.0.weight"] + 0.1 * after["student.head.mlp.0.weight"]
    torch.testing.assert_close(after["teacher.head.mlp.0.weight"], expected)
    assert after["pointer"].item() == 6
    assert torch.equal(before["memory"][6:], after["memory"][6:])
    assert step.failure() is None
    assert 0 < result.metrics["embedding_spread"] < 1


def test_the_second_view_enters_the_memory():
    step = build_step()
    with torch.no_grad():
        expected = step.pair.teacher(crops()[1:2])
    step([crops()], SETTINGS, 0)
    torch.testing.assert_close(step.objective.memory[:6], expected)


@pytest.mark.parametrize("poisoned_view", [0, 4], ids=["teacher", "student"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_with_teacher", "lars", "sgd"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was_and_is_named(poisoned_view, optimizer):
    step = build_step(optimizer=optimizer)
    step([crops(0)], SETTINGS, 0)
    before = state(step)
    bad = crops(1)
    bad[poisoned_view][2, 0, 3, 3] = torch.nan
    step([bad], SETTINGS, 1)
    after = state(step)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    culprit = "teacher's embeddings" if poisoned_view == 0 else "student's embeddings"
    assert "Step 1 was not finite" in step.failure() and culprit in step.failure()
    step([crops(2)], SETTINGS, 2)
    assert "Step 1 " in step.failure(), "the first failure is the one to report"


def test_a_gradient_that_is_not_finite_is_named():
    step = build_step()
    weight = step.pair.student.head.mlp[2].weight
    weight.register_hook(lambda gradient: gradient.fill_(torch.inf))
    before = state(step)
    step([crops()], SETTINGS, 3)
    assert step.failure().startswith("Step 3") and "gradient of head.mlp.2.weight" in step.failure()
    assert torch.equal(before["student.head.mlp.2.weight"], state(step)["student.head.mlp.2.weight"])


def test_accumulation_equals_one_batch():
    # SGD, because AdamW turns the rounding noise of gradients that are exactly zero (biases of keys) into whole steps.
    whole, parts = build_step(optimizer="sgd"), build_step(optimizer="sgd")
    for number in range(3):
        batch = crops(number)
        one = whole([batch], SETTINGS, number)
        three = parts([[crop[2 * i : 2 * i + 2] for crop in batch] for i in range(3)], SETTINGS, number)
        torch.testing.assert_close(one.loss, three.loss, rtol=1e-5, atol=1e-6)
    for name, tensor in state(whole).items():
        torch.testing.assert_close(tensor, state(parts)[name], rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16-like", "fp16-like"])
def test_adamw_with_teacher_steps_as_adamw_and_teacher(scaled):
    apart, together = build_step(), build_step(optimizer="adamw_with_teacher")
    for number in range(4):
        settings = SETTINGS._replace(learning_rate=3e-4 * number, teacher_momentum=0.9 + 0.01 * number)
        for step in (apart, together):
            if scaled and not number:
                step.scaler = LossScaler(Precision("fp16", "test"), CPU, initial=1024)
        one, other = (step([crops(number)], settings, number) for step in (apart, together))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name, tensor in state(apart).items():
        # Gradients of key biases are rounding noise, which AdamW makes whole steps of.
        if not name.endswith("qkv.bias") and "exp_avg" not in name:
            torch.testing.assert_close(tensor, state(together)[name], rtol=1e-3, atol=5e-5, msg=name)


def test_convolutional_network_steps():
    step = build_step(architecture="resnet10t", model_args={}, optimizer="lars")
    result = step([crops()], SETTINGS, 0)
    assert result.loss.isfinite() and step.failure() is None and step.pair.student.pass_name == "separate"


def test_blockwise_partition_keeps_the_memory_order():
    objective = MasslObjective(64, 16, block_size=16, student_temperature=0.1, partition="blockwise")
    assert torch.equal(objective.partition_of_step(5), torch.arange(64, dtype=torch.int32))


def test_memory_is_the_same_for_a_seed_and_spread_out():
    one, same, other = (MasslObjective(512, 32, block_size=64, student_temperature=0.1, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.memory, same.memory) and not torch.equal(one.memory, other.memory)
    assert unit_row_spread(one.memory) > 0.99
    assert unit_row_spread(one.memory[:1].expand(10, -1)).abs() < 1e-6


def test_loss_scaler_halves_doubles_and_stays_out_of_other_formats():
    scaler = LossScaler(Precision("fp16", "test"), CPU, initial=1024, growth_interval=2)
    scales = []
    for finite in (True, True, False, True, True):
        scaler.update(torch.tensor(finite))
        scales.append(scaler.scale.item())
    assert scales == [1024, 2048, 1024, 1024, 2048]
    off = LossScaler(Precision("bf16", "test"), CPU)
    off.update(torch.tensor(False))
    assert off.scale.item() == 1 and off.tensors() == {}


def test_precision_on_the_cpu():
    assert choose_precision("auto", CPU).name == "fp32"
    assert choose_precision("bf16", CPU).name == "bf16"
    with pytest.raises(ValueError, match="GPUs only"):
        choose_precision("fp16", CPU)
