"""What holds for every objective: packed as separate, accumulated as whole, recorded as eager, frozen layers, commits undone, recipes."""

import os

import pytest
import timm
import torch
from safetensors.torch import load_file

from massl_fast.config import SETTINGS, load_config, recipe_names
from massl_fast.data.loaders import views_of
from massl_fast.distributed.world import World
from massl_fast.engine.graphed_step import WARM_UP, GraphedStep
from massl_fast.engine.optimizer import optimizer_tensors
from massl_fast.engine.trainer import Trainer
from massl_fast.length import Length
from massl_fast.models.export import export_backbone
from massl_fast.models.published import load_backbone
from massl_fast.objectives import OBJECTIVES as REGISTERED
from massl_fast.objectives import objective_class
from massl_fast.objectives.base import At
from operator_tape import OperatorTape
from small import CPU, OBJECTIVES, crops_of, settings_of, small_step, step_settings
from small_images import write_images

LENGTH = Length(total_steps=20, steps_per_epoch=4, global_batch=8, accumulation=1, micro_batch=8)


def state(step):
    tensors = {**step.pair.state_dict(), **step.objective.state_dict(), **optimizer_tensors(step.optimizer, step.pair.student)}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def losses(step, config, steps=3, accumulation=1):
    found = []
    for number in range(steps):
        crops = crops_of(config, 8, number, torch.float64)
        parts = [list(part) for part in zip(*(crop.chunk(accumulation) for crop in crops))]
        settings = step_settings(number, frozen=step.objective.frozen(number, LENGTH))
        found.append(step(parts, settings, number).loss)
    return torch.stack(found)


def test_settings_and_classes_have_the_same_names():
    assert set(SETTINGS) == set(REGISTERED)
    for name in REGISTERED:
        assert objective_class(name).Settings is SETTINGS[name]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_metric_is_declared_and_every_declared_metric_is_given(name):
    config = settings_of(name)
    step = small_step(config)
    own = {key: curve(0) for key, curve in step.objective.schedules(LENGTH).items()}
    result = step([crops_of(config, 8, 0)], step_settings(0), 0)
    given = {*result.metrics, *step.objective.readings(1, LENGTH), *own}
    assert given - {"masking"} == {metric.key for metric in step.objective.metrics()}
    assert all(value.isfinite() for value in result.metrics.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_crops_train_as_separate_ones(name):
    found = [
        losses(small_step(settings_of(name, model={"crops_pass": crops_pass}), torch.float64), settings_of(name))
        for crops_pass in ("packed", "separate")
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("carp", "mmc", "moco_v3", "dino-sinkhorn")])
def test_accumulated_micro_batches_train_as_one(name):
    config = settings_of(name)
    whole, accumulated = (losses(small_step(config, torch.float64), config, accumulation=parts) for parts in (1, 2))
    torch.testing.assert_close(whole, accumulated, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["carp", "mmc", "moco_v3", "dino-sinkhorn"])
def test_batch_terms_under_accumulation_get_a_sentence(name):
    step = small_step(settings_of(name))
    accumulated = Length(20, 4, 8, accumulation=2, micro_batch=4)
    assert any("micro-batch" in sentence for sentence in step.objective.warnings(accumulated, 1000))
    assert not any("micro-batch" in sentence for sentence in step.objective.warnings(LENGTH, 1000))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_that_is_not_finite_changes_nothing(name):
    config = settings_of(name)
    step = small_step(config)
    step([crops_of(config, 8, 0)], step_settings(0), 0)
    running = ("running_mean", "running_var", "num_batches_tracked")
    before = state(step)
    crops = crops_of(config, 8, 1)
    crops[0][0, 0, 0, 0] = torch.nan
    step([crops], step_settings(1), 1)
    for key, tensor in state(step).items():
        assert key.endswith(running) or torch.equal(tensor, before[key]), key
    assert "Step 1" in step.failure()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fp16_steps_as_fp32_and_skips_what_overflows(name):
    """By the scaler of the step, the same for all; the trainer refuses fp16 on CPUs, whose autocast it is here."""
    config, settings = settings_of(name), step_settings(0)
    wide, narrow = small_step(config), small_step(config, precision_name="fp16")
    narrow.scaler.scale.fill_(4.0)
    crops = crops_of(config, 8, 0)
    found, expected = narrow([crops], settings, 0), wide([crops], settings, 0)
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-2, atol=0)
    torch.testing.assert_close(found.gradient_norm, expected.gradient_norm, rtol=5e-2, atol=0)
    before, running = state(narrow), ("running_mean", "running_var", "num_batches_tracked")
    narrow.scaler.scale.fill_(2.0**60)
    found = narrow([crops], settings, 1)
    assert found.loss.isfinite() and narrow.scaler.scale == 2.0**59 and narrow.failure() is None
    assert all(key.endswith(running) or torch.equal(tensor, before[key]) for key, tensor in state(narrow).items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_recorded_steps_are_eager_steps(name):
    """By a tape of operators, which freezes what a CUDA graph freezes; layers that are frozen at first need a recording of their own."""
    config = settings_of(name, optimizer={"name": "adamw_with_teacher"})
    eager, recorded = small_step(config), small_step(config)
    graphed = GraphedStep(recorded, OperatorTape)
    for number in range(2 * WARM_UP + 3):
        frozen = recorded.objective.frozen(number, LENGTH)
        settings = step_settings(number, frozen=frozen)
        tensors = type(settings).of_vector(settings.vector(CPU), list(settings.own), frozen)
        crops = crops_of(config, 8, number)
        found = graphed([crops], settings, number, torch.zeros(()))
        expected = eager([crops], tensors, torch.tensor(number), torch.zeros(()))
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-7)
    assert graphed.result is not None and graphed.tape.calls, "nothing was recorded"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_compiled_blocks_train_as_eager_ones(name):
    """The graphs that ``model.compile`` takes. Inductor takes a minute for all of them, so it compiles MaSSL's alone in every run
    (tests/engine/test_compiled_step.py), and the others' where all configurations are asked for."""
    config = settings_of(name)
    eager, compiled = small_step(config), small_step(config)
    backend = "inductor" if os.environ.get("MASSL_FAST_TEST_ALL_CONFIGURATIONS") == "1" else "aot_eager"
    torch._dynamo.reset()
    for encoder in (compiled.pair.student, compiled.pair.teacher):
        encoder.compile_blocks(fullgraph=True, backend=backend)
    for number in range(3):
        crops, settings = crops_of(config, 8, number), step_settings(number)
        found, expected = compiled([crops], settings, number), eager([crops], settings, number)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    torch._dynamo.reset()


def test_a_frozen_last_layer_stands_still_and_then_moves():
    config = settings_of("dino")
    step = small_step(config)
    before = step.pair.student.head.last_layer.v.detach().clone()
    for number in range(4):
        frozen = step.objective.frozen(number, LENGTH)
        assert bool(frozen) == (number < 2)  # half an epoch of four steps
        step([crops_of(config, 8, number)], step_settings(number, frozen=frozen), number)
        assert torch.equal(step.pair.student.head.last_layer.v, before) == (number < 2)
        assert bool(step.optimizer.state[step.pair.student.head.last_layer.v]) == (number >= 2)


def test_a_centre_is_the_same_however_ranks_divide_the_images():
    config = settings_of("dino")
    step = small_step(config, torch.float64)
    w = torch.nn.functional.normalize(torch.randn(2, 8, 12, dtype=torch.float64), dim=-1)
    keys = torch.randn(40, 12, dtype=torch.float64)

    class Half(World):
        def mean(self, values):
            return (values + w[:, 4:].mean((0, 1))) / 2

    whole, half = small_step(config, torch.float64).objective, step.objective
    for objective, rows, world in ((whole, w, World(0, 1, 0, CPU)), (half, w[:, :4], Half(0, 2, 0, CPU))):
        at = At(0, {"teacher_temperature": 0.05}, rows.shape[1], 0, (), world)
        objective.commit_([{"mean": rows.mean((0, 1)), "prototypes": keys}], torch.tensor(True), at)
    torch.testing.assert_close(whole.center, half.center, rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run of three steps of each objective."""
    workplace = tmp_path_factory.mktemp("trained")
    write_images(workplace / "images", classes=2, per_class=8)

    def folder(name):
        if not (workplace / name).exists():
            Trainer(settings_of(name, workplace, train={"steps": 3}, checkpoint={"every_steps": 3}), World(0, 1, 0, CPU)).run()
        return workplace / name

    return folder


def teacher_of(folder):
    state = max(folder.glob("checkpoints/step_*/state.safetensors"))
    prefix = "teacher/backbone."
    return {name.removeprefix(prefix): tensor for name, tensor in load_file(state).items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_of_each_is_exported_for_timm(name, trained, tmp_path):
    backbone, info = load_backbone(trained(name))
    export_backbone(backbone, info, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    expected = teacher_of(trained(name))
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("source", "name"), [("ibot", "massl"), ("moco_v3", "dino"), ("mmc", "massl"), ("massl", "ibot"), ("dino", "mmc"), ("carp", "moco_v3")]
)
def test_one_objective_starts_from_the_weights_of_anothers_run(source, name, trained, tmp_path):
    config = settings_of(name, run={"init_from": str(trained(source))})
    step = small_step(config)
    expected = teacher_of(trained(source))
    for encoder in (step.pair.student, step.pair.teacher):
        assert all(torch.equal(tensor, expected[key]) for key, tensor in encoder.backbone.state_dict().items())
    fresh = small_step(settings_of(name)).pair.student.head.state_dict()
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in step.pair.student.head.state_dict().items()), "heads start anew"
    assert step([crops_of(config, 8, 0)], step_settings(0), 0).loss.isfinite()


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name.startswith(("dino", "carp", "mmc", "moco", "ibot"))])
def test_recipes_build(recipe):
    config = load_config(recipe, ["--data.train", "somewhere"])
    assert config.objective.name in recipe
    assert objective_class(config.objective.name).Settings is type(config.objective)
    published = "bilinear" if config.objective.name == "moco_v3" else "bicubic"
    assert {view.interpolation for view in views_of(config.crops)} == {published}
