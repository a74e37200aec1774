import pytest
import torch
from torch import nn

from massl_fast.config import OptimizerSection
from massl_fast.engine.optimizer import apply_settings, build_optimizer, clip_factors, load_optimizer_tensors, optimizer_tensors
from massl_fast.engine.schedules import StepSettings

SETTINGS = StepSettings(learning_rate=0.01, weight_decay=0.1, teacher_momentum=0.9, own={})


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def step(module: nn.Module, optimizer, found_inf: float = 0.0) -> None:
    torch.manual_seed(1)
    module(torch.randn(8, 6)).square().mean().backward()
    apply_settings(optimizer, SETTINGS)
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()
    optimizer.zero_grad()


def test_only_matrices_decay():
    module = network()
    decayed, exempt = build_optimizer(module, OptimizerSection()).param_groups
    assert {id(p) for p in decayed["params"]} == {id(module[0].weight), id(module[2].weight)}
    assert len(exempt["params"]) == 4
    optimizer = build_optimizer(module, OptimizerSection())
    apply_settings(optimizer, SETTINGS)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_step_that_is_not_finite_changes_nothing(name):
    module = network()
    optimizer = build_optimizer(module, OptimizerSection(name=name))
    step(module, optimizer)
    before = {n: t.clone() for n, t in {**module.state_dict(), **optimizer_tensors(optimizer, module)}.items()}
    module(torch.full((8, 6), torch.inf)).square().mean().backward()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = {**module.state_dict(), **optimizer_tensors(optimizer, module)}
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_state_round_trip_continues_exactly(name):
    ours, theirs = network(), network(seed=5)
    optimizer = build_optimizer(ours, OptimizerSection(name=name))
    step(ours, optimizer)
    theirs.load_state_dict(ours.state_dict())
    restored = build_optimizer(theirs, OptimizerSection(name=name))
    load_optimizer_tensors(restored, theirs, {k: v.clone() for k, v in optimizer_tensors(optimizer, ours).items()})
    for module, its in ((ours, optimizer), (theirs, restored)):
        step(module, its)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(a, b)


def test_lars_against_a_readable_twin():
    module = network()
    optimizer = build_optimizer(module, OptimizerSection(name="lars"))
    twin = {n: p.detach().double() for n, p in module.named_parameters()}
    buffers = {n: torch.zeros_like(p) for n, p in twin.items()}
    for seed in range(3):
        torch.manual_seed(seed)
        module(torch.randn(8, 6)).square().mean().backward()
        for name, parameter in module.named_parameters():
            update = parameter.grad.double()
            if parameter.ndim > 1:
                update = update + 0.1 * twin[name]
                update = 0.001 * twin[name].norm() / update.norm() * update
            buffers[name] = 0.9 * buffers[name] + update
            twin[name] = twin[name] - 0.01 * buffers[name]
        apply_settings(optimizer, SETTINGS)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), twin[name], rtol=1e-5, atol=1e-7)


def test_clipping_by_parameter_and_globally():
    gradients = [torch.full((4,), 3.0), torch.full((9,), 0.1)]
    norms = torch.stack([g.norm() for g in gradients])
    by_parameter = clip_factors(norms, 3.0, "parameter")
    assert (by_parameter[0] * norms[0]).item() == pytest.approx(3.0, rel=1e-5)
    assert by_parameter[1] == 1
    globally = clip_factors(norms, 3.0, "global")
    assert (globally * norms).norm().item() == pytest.approx(3.0, rel=1e-5)
    assert (clip_factors(norms, 0, "parameter") == 1).all()


def test_apex_that_does_not_import_is_a_sentence():
    with pytest.raises(ValueError, match=r"apex\.optimizers\.FusedAdam does not import"):
        build_optimizer(network(), OptimizerSection(name="adamw_apex"))
