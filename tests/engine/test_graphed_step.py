"""A recorded step is the step: equal to the last bit on a tape of operators (CPU) and, where there is a GPU, as a CUDA graph."""

import pytest
import torch
from test_step import CPU, SETTINGS, build_step, crops, state

from massl_fast.distributed.world import World
from massl_fast.engine.graphed_step import WARM_UP, GraphedStep
from massl_fast.engine.schedules import StepSettings
from massl_fast.models.precision import LossScaler, Precision
from operator_tape import OperatorTape


def settings_of(number: int) -> StepSettings:
    """All four change at every step."""
    return StepSettings(1e-3 / (1 + number), 0.05 + 0.01 * number, 0.9 + 0.005 * number, {"teacher_temperature": 0.04 + 0.002 * number})


def take(step, number: int, micro_batches=None) -> torch.Tensor:
    torch.manual_seed(number)  # of drop path, as the trainer does
    settings = settings_of(number)
    if not isinstance(step, GraphedStep):  # which rounds a temperature as a tensor otherwise than as a number
        settings = StepSettings.of_vector(settings.vector(step.world.device), list(settings.own))
    stopping = torch.zeros((), device=(micro_batches or [[torch.zeros(())]])[0][0].device)
    result = step(micro_batches or [crops(number)], settings, number, stopping)
    return torch.stack([result.loss, result.gradient_norm, *result.metrics.values()]).clone()


def both(**options):
    eager, recorded = (build_step(optimizer="adamw_with_teacher", **options) for _ in range(2))
    return eager, recorded, GraphedStep(recorded, OperatorTape)


def demand_equal_states(eager, recorded) -> None:
    theirs = state(recorded)
    for name, tensor in state(eager).items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16-like", "fp16-like"])
def test_replayed_steps_are_eager_steps(scaled):
    eager, recorded, graphed = both(drop_path=0.3)
    if scaled:
        for step in (eager, recorded):
            step.scaler = LossScaler(Precision("fp16", "test"), CPU, initial=64.0, growth_interval=3)
    for number in range(WARM_UP + 8):
        assert torch.equal(take(eager, number), take(graphed, number)), number
    demand_equal_states(eager, recorded)
    assert recorded.scaler.scale == (64 * 2**3 if scaled else 1)
    assert graphed.tape.calls, "nothing was recorded"


def test_accumulated_micro_batches_and_the_steps_number():
    """The partition depends on the step's number alone: frozen, losses would differ."""
    eager, recorded, graphed = both()
    for number in range(WARM_UP + 4):
        parts = [crops(number), crops(100 + number)]
        assert torch.equal(take(eager, number, parts), take(graphed, number, parts)), number
    demand_equal_states(eager, recorded)


def test_a_replayed_step_that_is_not_finite_changes_nothing_and_is_named():
    eager, recorded, graphed = both()
    for number in range(WARM_UP + 1):
        take(eager, number), take(graphed, number)
    bad = crops(50)
    bad[4][1, 0, 2, 2] = torch.nan
    before = state(recorded)
    take(graphed, WARM_UP + 1, [bad])
    for name, tensor in state(recorded).items():
        assert torch.equal(tensor, before[name]), name
    assert recorded.failure().startswith(f"Step {WARM_UP + 1} ") and "the student's embeddings" in recorded.failure()
    take(eager, WARM_UP + 1, [bad])
    assert torch.equal(take(eager, WARM_UP + 2), take(graphed, WARM_UP + 2))
    demand_equal_states(eager, recorded)


def test_a_request_to_stop_reaches_a_replay():
    _, recorded, graphed = both()
    for number in range(WARM_UP + 1):
        take(graphed, number)
    assert recorded.stop_votes == 0
    graphed([crops(9)], SETTINGS, 9, torch.ones(()))
    assert recorded.stop_votes == 1


def test_what_a_graph_would_freeze_is_found_by_the_tape():
    """The stand-in must be able to fail: a momentum taken from the host's settings stays that of the recording."""
    eager, recorded, graphed = both()
    frozen = recorded.optimizer.update_

    def update_(*args, settings, **others):
        frozen(*args, settings=settings_of(int(settings_of.count)), **others)

    recorded.optimizer.update_ = update_
    for number in range(WARM_UP + 3):
        settings_of.count = number
        take(eager, number), take(graphed, number)
    with pytest.raises(AssertionError):
        demand_equal_states(eager, recorded)


def test_crops_of_another_shape_are_refused():
    _, _, graphed = both()
    take(graphed, 0)
    with pytest.raises(AssertionError, match="takes crops of"):
        take(graphed, 1, [crops(1, images=3)])


@pytest.mark.parametrize(
    "options, tape, size, sentence",
    [
        ({}, OperatorTape, 1, "Choose optimizer.name adamw_with_teacher"),
        ({"optimizer": "adamw_with_teacher"}, None, 1, "which has no CUDA graphs"),
        ({"optimizer": "adamw_with_teacher"}, OperatorTape, 2, "Choose parallel.strategy ddp with parallel.gradients auto or flat"),
    ],
)
def test_where_a_step_cannot_be_recorded(options, tape, size, sentence):
    step = build_step(**options)
    step.world = World(0, size, 0, CPU)
    with pytest.raises(ValueError, match=sentence):
        GraphedStep(step, tape)


@pytest.mark.parametrize(
    ("first", "told", "sentence"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), ValueError, "recorded: operation not .* capturing Leave"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "^CUDA out of memory$"),
    ],
)
@pytest.mark.parametrize("at_the_end", [False, True], ids=["alone", "and at the end"])
def test_what_keeps_a_step_from_being_recorded_is_told(first, told, sentence, at_the_end):
    class Refusing(OperatorTape):
        def record(self, function):
            try:
                raise first
            finally:
                if at_the_end:  # as the end of a capture does
                    raise RuntimeError("operation failed due to a previous error during capture")

    graphed = GraphedStep(build_step(optimizer="adamw_with_teacher"), Refusing)
    with pytest.raises(told, match=sentence):
        for number in range(WARM_UP + 1):
            take(graphed, number)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a CUDA graph is recorded")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_cuda_graph_is_the_step(compiled):
    device = torch.device("cuda", torch.cuda.current_device())
    eager, recorded = (build_step(optimizer="adamw_with_teacher", drop_path=0.3, device=device) for _ in range(2))
    if compiled:
        torch.compiler.reset()  # what other tests compiled counts against Dynamo's limit
        for encoder in (recorded.pair.student, recorded.pair.teacher):
            encoder.compile_blocks()
    graphed = GraphedStep(recorded)
    for number in range(WARM_UP + 10):
        batch = [crop.to(device) for crop in crops(number)]
        ones = take(eager, number, [batch])
        torch.testing.assert_close(take(graphed, number, [batch]), ones, rtol=1e-3, atol=1e-5)
    assert graphed.result is not None, "nothing was recorded"
    torch.testing.assert_close(eager.objective.memory, recorded.objective.memory, rtol=1e-2, atol=1e-3)
    assert torch.equal(eager.objective.pointer, recorded.objective.pointer)
