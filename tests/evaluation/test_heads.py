"""Heads and regressions in batches against one at a time: torch.optim.SGD, scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from massl_fast.evaluation import heads as heads_module
from massl_fast.evaluation.heads import Sweep, correct_of_heads, fit_logistic, train_heads


def clusters(count, width, classes, seed=0, spread=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(1), dtype=dtype)
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, width, generator=generator, dtype=dtype), labels


def one_at_a_time(features, labels, rate, decay, *, classes, epochs, batch_size, momentum, order, start):
    """The published loop for one head: nn.Linear, torch.optim.SGD, the cosine stepped once per epoch."""
    head = nn.Linear(features.shape[1], classes, dtype=features.dtype)
    with torch.no_grad():
        head.weight.copy_(start), head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
    losses = []
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for some in order(epoch).split(batch_size):
            loss = F.cross_entropy(head(features[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return head.weight.detach(), head.bias.detach(), losses


@pytest.mark.parametrize(("count", "width", "classes", "batch"), [(50, 5, 3, 16), (33, 7, 4, 33), (17, 8, 2, 100), (1, 3, 2, 4)])
@pytest.mark.parametrize("decays", [(0.0, 0.0, 0.0), (0.0, 1e-3, 0.1)])
def test_all_heads_together_are_each_alone(monkeypatch, count, width, classes, batch, decays):
    monkeypatch.setattr(heads_module, "COLUMNS_AT_ONCE", 2 * classes)  # several products, with a remainder
    features, labels = clusters(count, width, classes, dtype=torch.float64)
    rates = (1e-3, 0.3, 5.0)
    arguments = dict(classes=classes, epochs=3, batch_size=batch, momentum=0.9)
    orders = [torch.randperm(count, generator=torch.Generator().manual_seed(e)) for e in range(3)]
    start = 0.1 * torch.randn(3, classes, width, dtype=torch.float64)
    found, losses = train_heads(lambda _: features, labels, Sweep(rates, decays), order=orders.__getitem__, start=start, **arguments)
    for h, (rate, decay) in enumerate(zip(rates, decays)):
        weight, bias, expected = one_at_a_time(features, labels, rate, decay, order=orders.__getitem__, start=start[h], **arguments)
        torch.testing.assert_close(found.weight[h, :, :width], weight, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(found.weight[h, :, width], bias, atol=1e-10, rtol=1e-8)
        np.testing.assert_allclose(losses[h], expected, rtol=1e-8, atol=1e-10)
        guesses = (features @ weight.T + bias).argmax(1)
        assert correct_of_heads(found, features, labels)[h] == (guesses == labels).sum()


def test_lars_is_the_published_rule():
    features, labels = clusters(40, 6, 3, dtype=torch.float64)
    start = 0.1 * torch.randn(2, 3, 6, dtype=torch.float64)
    sweep, order = Sweep((0.5, 2.0), (1e-2, 1e-2), (True, False)), [torch.arange(40)] * 4
    found, _ = train_heads(lambda _: features, labels, sweep, classes=3, epochs=4, batch_size=20, order=order.__getitem__, start=start)
    weight, bias = start[0].clone(), torch.zeros(3, dtype=torch.float64)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(4):
        rate = 0.5 * (1 + math.cos(math.pi * epoch / 4)) / 2
        for some in order[epoch].split(20):
            w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            F.cross_entropy(features[some] @ w.T + b, labels[some]).backward()
            step = w.grad + 1e-2 * weight
            step = step * 0.001 * weight.norm() / step.norm()
            velocity = [0.9 * velocity[0] + step, 0.9 * velocity[1] + b.grad]
            weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    torch.testing.assert_close(found.weight[0, :, :6], weight, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(found.weight[0, :, 6], bias, atol=1e-10, rtol=1e-8)
    alone, _ = train_heads(
        lambda _: features, labels, Sweep((2.0,), (1e-2,)), classes=3, epochs=4, batch_size=20, order=order.__getitem__, start=start[1:]
    )
    torch.testing.assert_close(found.weight[1], alone.weight[0], atol=1e-10, rtol=1e-8)  # its neighbour uses plain SGD


def test_a_head_that_diverges_loses_alone():
    features, labels = clusters(64, 6, 3)
    features = 1e3 * features
    arguments = dict(classes=3, epochs=6, batch_size=16)
    seen = []
    found, losses = train_heads(
        lambda _: features, labels, Sweep((1e-6, 1e36, 1e-5)), after_epoch=lambda e, h: seen.append(h.numbers.tolist()), **arguments
    )
    assert found.lost == [1] and found.numbers.tolist() == [0, 2] and seen[-1] == [0, 2]
    alone, expected = train_heads(lambda _: features, labels, Sweep((1e-6, 1e-5)), **arguments)
    assert torch.equal(found.weight, alone.weight) and torch.equal(losses[[0, 2]], expected) and found.weight.isfinite().all()
    nobody, losses = train_heads(lambda _: features, labels, Sweep((1e37,)), **arguments)
    assert len(nobody) == 0 and nobody.lost == [0] and losses[0, -1].isnan()


def test_losses_in_float32_stay_near_float64():
    """Budget: twice the error of the same loop in float32."""
    features, labels = clusters(200, 16, 5, dtype=torch.float64)
    order = [torch.randperm(200, generator=torch.Generator().manual_seed(e)) for e in range(4)]
    start = 0.01 * torch.randn(1, 5, 16, dtype=torch.float64)
    arguments = dict(classes=5, epochs=4, batch_size=32)

    def losses(dtype):
        _, found = train_heads(lambda _: features.to(dtype), labels, Sweep((0.5,)), order=order.__getitem__, start=start, **arguments)
        return found[0].double()

    exact = losses(torch.float64)
    *_, plain = one_at_a_time(
        features.float(), labels, 0.5, 0.0, order=order.__getitem__, start=start[0].float(), momentum=0.9, **arguments
    )
    error, allowed = (losses(torch.float32) - exact).abs().max(), (torch.tensor(plain).double() - exact).abs().max()
    assert error <= 2 * allowed + 1e-7


def test_products_in_bf16_keep_weights_in_float32():
    features, labels = clusters(300, 32, 4)
    arguments = dict(classes=4, epochs=5, batch_size=64)
    whole, _ = train_heads(lambda _: features, labels, Sweep((0.1,)), **arguments)
    low, _ = train_heads(lambda _: features, labels, Sweep((0.1,)), products=torch.bfloat16, **arguments)
    assert low.weight.dtype == torch.float32
    assert 0 < (low.weight - whole.weight).norm() / whole.weight.norm() < 0.02


def test_views_take_turns_and_the_order_depends_on_the_seed_alone():
    features, labels = clusters(30, 4, 3)
    asked = []

    def view(epoch):
        asked.append(epoch)
        return features

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = train_heads(view, labels, Sweep((0.1,)), classes=3, epochs=3, batch_size=8, seed=4)
    assert torch.equal(torch.get_rng_state(), before) and asked == [0, 1, 2]
    torch.manual_seed(2)
    again, _ = train_heads(view, labels, Sweep((0.1,)), classes=3, epochs=3, batch_size=8, seed=4)
    other, _ = train_heads(view, labels, Sweep((0.1,)), classes=3, epochs=3, batch_size=8, seed=5)
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)


# Logistic regression


def objective(weight, features, labels, penalty):
    weight, features = weight.double(), features.double()
    return (F.cross_entropy(features @ weight.T, labels) + penalty / 2 * weight.square().sum()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_penalties_together_are_scikit_learn_one_by_one(dtype):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(150, 10, 4, spread=2.0, dtype=dtype)
    features = F.normalize(features, dim=1)
    penalties = (1e-5, 1e-3, 1e-1)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    fit = fit_logistic([features], [labels], penalties, classes=4, tolerance=tolerance)
    assert fit.converged.all()
    for i, penalty in enumerate(penalties):
        theirs = linear_model.LogisticRegression(C=1 / (penalty * 150), fit_intercept=False, tol=1e-10, max_iter=10000)
        theirs.fit(features.double().numpy(), labels.numpy())
        expected = torch.from_numpy(theirs.coef_)
        best = objective(expected, features, labels, penalty)
        assert abs(objective(fit.weight[0, i], features, labels, penalty) - best) <= 1e-6 * best
        assert abs(fit.objective[0, i].item() - best) <= 1e-6 * best
        bound = 1e-2 if dtype == torch.float32 and penalty == 1e-5 else 1e-3
        assert (fit.weight[0, i].double() - expected).norm() <= bound * expected.norm()


def test_training_sets_of_several_sizes_are_each_alone():
    sets = [clusters(n, 6, 3, seed=n, dtype=torch.float64) for n in (5, 30, 12)]
    together = fit_logistic([f for f, _ in sets], [y for _, y in sets], (1e-3, 1e-1), classes=3, tolerance=1e-9)
    for s, (features, labels) in enumerate(sets):
        alone = fit_logistic([features], [labels], (1e-3, 1e-1), classes=3, tolerance=1e-9)
        torch.testing.assert_close(together.weight[s], alone.weight[0], atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(2, 5), st.sampled_from(["multinomial", "one_vs_rest"]), st.integers(0, 99))
def test_no_direction_leads_down_from_a_minimum(count, width, classes, loss, seed):
    features, labels = clusters(count, width, classes, seed=seed, dtype=torch.float64)
    fit = fit_logistic([features], [labels], (1e-2,), classes=classes, loss=loss, tolerance=1e-8)
    weight = fit.weight[0, 0].clone().requires_grad_()
    logits = features @ weight.T
    signs = 2.0 * F.one_hot(labels, classes) - 1
    mean = F.cross_entropy(logits, labels) if loss == "multinomial" else F.softplus(-signs * logits).sum(1).mean()
    value = mean + 0.005 * weight.square().sum()
    value.backward()
    assert weight.grad.abs().max() < 1e-7 and fit.objective[0, 0].item() == pytest.approx(value.item(), rel=1e-9)


def test_chunks_of_rows_change_nothing(monkeypatch):
    features, labels = clusters(100, 5, 3, dtype=torch.float64)
    whole = fit_logistic([features], [labels], (1e-2,), classes=3, tolerance=1e-9)
    monkeypatch.setattr(heads_module, "VALUES_AT_ONCE", 7 * 3)
    parts = fit_logistic([features], [labels], (1e-2,), classes=3, tolerance=1e-9)
    torch.testing.assert_close(parts.weight, whole.weight, atol=1e-6, rtol=1e-6)


def test_a_regression_that_may_not_finish_says_so():
    features, labels = clusters(100, 5, 3)
    fit = fit_logistic([features], [labels], (1e-8, 1.0), classes=3, tolerance=1e-6, most_iterations=2)
    assert not fit.converged[0, 0] and fit.iterations.max() == 2 and fit.gradient[0, 0] > 1e-6


def test_extreme_logits_stay_finite():
    features = torch.tensor([[1e4, 0.0], [0.0, 1e4], [1e4, 1e4]])
    for loss in ("multinomial", "one_vs_rest"):
        fit = fit_logistic([features], [torch.tensor([0, 1, 2])], (1e-9, 1.0), classes=3, loss=loss, most_iterations=200)
        assert fit.weight.isfinite().all() and fit.objective.isfinite().all()


def test_the_order_of_penalties_and_repeats_of_one_change_nothing():
    features, labels = clusters(80, 6, 3, dtype=torch.float64)
    fit = fit_logistic([features], [labels], (1e-3, 1e-1, 1e-1, 1e-2), classes=3, tolerance=1e-9)
    assert fit.converged.all()
    for place, penalty in enumerate((1e-3, 1e-1, 1e-1, 1e-2)):
        alone = fit_logistic([features], [labels], (penalty,), classes=3, tolerance=1e-9)
        torch.testing.assert_close(fit.weight[0, place], alone.weight[0, 0], atol=1e-5, rtol=1e-5)
