"""Linear classifiers on frozen features, many at once.

``train_heads`` takes SGD steps of all heads of a sweep together: their weights are one matrix, so a step is two products, whatever the
number of heads. iBOT and DINOv2 train 45 and 52 heads beside each other in as many modules and optimizers. ``fit_logistic`` minimises
regularised logistic regressions for many penalties and many training sets together by L-BFGS.

``tests/evaluation/test_heads.py`` holds the readable twins: ``torch.optim.SGD`` head by head, scikit-learn penalty by penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

INITIAL_DEVIATION = 0.01
LARS_COEFFICIENT = 0.001
COLUMNS_AT_ONCE = 4608
"""Outputs (heads × classes) of one product on a CPU. Fewer keep weights in its cache and cost calls; this is even for 45 heads."""
ALIGNMENT = 8
"""Features are filled up to a multiple of this, with the column of ones that makes the bias."""
VALUES_AT_ONCE = 2**20
"""Logits that ``fit_logistic`` and ``correct_of_heads`` hold at once on a CPU, whose cache they should not leave."""
VALUES_AT_ONCE_ON_GPU = 2**26
HISTORY = 6
ARMIJO = 1e-4
MOST_HALVINGS = 25

# Heads by stochastic gradient descent


@dataclass(frozen=True)
class Sweep:
    """One head per entry: learning rates (as used, after scaling with the batch), weight decays, and which heads use LARS."""

    rates: tuple[float, ...]
    decays: tuple[float, ...] = ()
    """Empty: none."""
    lars: tuple[bool, ...] = ()
    """Empty: none."""

    def __len__(self) -> int:
        return len(self.rates)


class Heads:
    """H linear classifiers over the same features.

    Attributes:
        weight: [H, C, D'], one or two columns of D' being bias and fill; float32, or float64 for features of that type.
        numbers: [H] int64: which entries of the sweep these are. Heads that diverge leave.
        lost: numbers of heads that have left.
    """

    def __init__(self, sweep: Sweep, features: int, classes: int, *, seed: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.sweep, self.features, self.classes = sweep, features, classes
        width = -(-(features + 1) // ALIGNMENT) * ALIGNMENT
        generator = torch.Generator().manual_seed(seed)
        weight = torch.zeros(len(sweep), classes, width, dtype=dtype)
        # The same start for every head, so that heads differ by their settings alone.
        start = torch.empty(classes, features, dtype=torch.float32).normal_(0, INITIAL_DEVIATION, generator=generator)
        weight[:, :, :features] = start.to(dtype)
        self.weight = weight.to(device)
        self.velocity = torch.zeros_like(self.weight)
        self.numbers = torch.arange(len(sweep))
        self.lost: list[int] = []
        self._rate = torch.tensor(sweep.rates, dtype=dtype, device=device)
        self._decay = torch.tensor(sweep.decays or [0.0] * len(sweep), dtype=dtype, device=device)
        self._lars = torch.tensor(sweep.lars or [False] * len(sweep), device=device)
        self._room: dict[tuple[str, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def padded(self, features: Tensor) -> Tensor:
        """[n, D] → [n, D'] of the heads' type: a column of ones for the bias, then zeros."""
        padded = torch.zeros(len(features), self.weight.shape[2], dtype=self.weight.dtype, device=self.weight.device)
        padded[:, : self.features] = features
        padded[:, self.features] = 1
        return padded

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, *, schedule: float, momentum: float, products: torch.dtype | None = None) -> Tensor:
        """One step of every head on a batch; returns the mean cross entropies [H] before it.

        Args:
            features: [n, D'], see ``padded``.
            labels: [n] int64.
            schedule: factor of all learning rates.
            products: type of the matrix products; None: that of the weights.
        """
        heads, at_once = len(self), self._heads_at_once()
        losses = torch.empty(heads, dtype=self.weight.dtype, device=self.weight.device)
        low = features if products is None else features.to(products)
        rows = torch.arange(len(labels), device=labels.device)
        for first in range(0, heads, at_once):
            part = slice(first, min(first + at_once, heads))
            flat = self.weight[part].flatten(0, 1)
            scores = torch.mm(self._as(low.dtype, "weight", flat), low.T, out=self._space("scores", (len(flat), len(low)), low.dtype))
            scores = self._as(flat.dtype, "probabilities", scores)
            slope = scores.unflatten(0, (-1, self.classes))
            torch.softmax(slope, dim=1, out=slope)
            true = slope[:, labels, rows]
            losses[part] = -true.clamp(min=torch.finfo(true.dtype).tiny).log().mean(1)
            slope[:, labels, rows] = true - 1
            self._update(part, self._as(low.dtype, "slopes", scores), low, schedule, momentum)
        return losses

    def _update(self, part: slice, slope: Tensor, features: Tensor, schedule: float, momentum: float) -> None:
        """SGD with momentum as ``torch.optim.SGD`` has it; LARS after You et al. 2017, weight decay and trust ratio sparing biases."""
        weight, velocity = self.weight[part], self.velocity[part]
        decay, lars, rate = self._decay[part], self._lars[part], schedule * self._rate[part]
        moved, scale = velocity.flatten(0, 1), 1 / len(features)
        if not lars.any() and features.dtype == velocity.dtype:  # the momentum costs nothing inside the product
            moved.addmm_(slope, features, beta=momentum, alpha=scale)
        else:
            product = torch.mm(slope, features, out=self._space("product", moved.shape, features.dtype))
            gradient = self._as(moved.dtype, "gradient", product).mul_(scale).view_as(weight)
            if lars.any():
                spared = torch.ones_like(gradient[:1, :1])
                spared[..., self.features :] = 0
                gradient += decay[:, None, None] * torch.where(lars[:, None, None], spared, 1) * weight
                sizes = (weight * spared).flatten(1).norm(dim=1), (gradient * spared).flatten(1).norm(dim=1)
                ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), LARS_COEFFICIENT * sizes[0] / sizes[1], 1.0)
                gradient *= torch.where(lars[:, None, None] & (spared > 0), ratio[:, None, None], 1.0)
            torch.add(gradient, velocity, alpha=momentum, out=velocity)
        if decay.any() and not lars.any():
            velocity.addcmul_(weight, decay[:, None, None])
        torch.addcmul(weight, velocity, -rate[:, None, None], out=weight)

    def _space(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for an intermediate of a step, kept for the next one: fresh pages cost a tenth of a step on a CPU."""
        count = math.prod(shape)
        kept = self._room.get((name, dtype))
        if kept is None or len(kept) < count:
            kept = self._room[name, dtype] = torch.empty(count, dtype=dtype, device=self.weight.device)
        return kept[:count].view(*shape)

    def _as(self, dtype: torch.dtype, name: str, values: Tensor) -> Tensor:
        """``values`` in another type, in memory that is kept; themselves where they have it."""
        return values if values.dtype == dtype else self._space(name, values.shape, dtype).copy_(values)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """[n, D'] → [H, C, n]."""
        return (self.weight.flatten(0, 1) @ features.T).unflatten(0, (-1, self.classes))

    @torch.no_grad()
    def drop_diverged(self) -> list[int]:
        """Take away heads whose weights are no longer finite; returns their numbers in the sweep."""
        # Extremes are finite where all is, and nan is both. One pass over each, and nothing as large is made.
        extremes = [value for of in (self.weight, self.velocity) for value in of.flatten(1).aminmax(dim=1)]
        finite = torch.stack(extremes).isfinite().all(0)
        if bool(finite.all()):
            return []
        gone = self.numbers[~finite.cpu()].tolist()
        self.weight, self.velocity = self.weight[finite], self.velocity[finite]
        self._rate, self._decay, self._lars = self._rate[finite], self._decay[finite], self._lars[finite]
        self.numbers = self.numbers[finite.cpu()]
        self.lost += gone
        return gone

    def _heads_at_once(self) -> int:
        return len(self) if self.weight.device.type == "cuda" else max(1, COLUMNS_AT_ONCE // self.classes)


@torch.no_grad()
def train_heads(
    view: Callable[[int], Tensor],
    labels: Tensor,
    sweep: Sweep,
    *,
    classes: int,
    epochs: int,
    batch_size: int,
    momentum: float = 0.9,
    seed: int = 0,
    device: torch.device | str = "cpu",
    order: Callable[[int], Tensor] | None = None,
    start: Tensor | None = None,
    products: torch.dtype | None = None,
    after_epoch: Callable[[int, Heads], None] | None = None,
) -> tuple[Heads, Tensor]:
    """Train all heads of a sweep on the same batches. Cosine of the learning rates to 0, one step of it per epoch.

    Args:
        view: epoch → features [n, D] of that epoch, float32 or float64, on any device.
        labels: [n] int64.
        batch_size: the last batch of an epoch is short.
        order: epoch → the images' order in it [n]; None: drawn by (seed, epoch).
        start: weights to start from, [H, C, D]; None: N(0, 0.01²) by ``seed``. Biases start at 0.
        products: type of the matrix products, such as bfloat16; None: that of the features. Weights keep the type of the features.
        after_epoch: called with the epoch and the heads that are left.

    Returns:
        the heads after the last epoch, and losses [H, steps]: mean cross entropy of each step before it was taken, nan for lost heads.
    """
    first = view(0)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    heads = Heads(sweep, first.shape[1], classes, seed=seed, device=device, dtype=dtype)
    if start is not None:
        heads.weight[:, :, : first.shape[1]] = start
    steps = -(-len(labels) // batch_size)
    losses = torch.full((len(sweep), epochs * steps), math.nan, dtype=dtype)
    for epoch in range(epochs):
        features = first if epoch == 0 else view(epoch)
        positions = _drawn_order(seed, epoch, len(labels)) if order is None else order(epoch)
        schedule = (1 + math.cos(math.pi * epoch / epochs)) / 2
        of_epoch = []
        for some in positions.split(batch_size):
            batch = heads.padded(features[some].to(device))
            of_epoch.append(heads.step(batch, labels[some].to(device), schedule=schedule, momentum=momentum, products=products))
        losses[heads.numbers, epoch * steps : (epoch + 1) * steps] = torch.stack(of_epoch, dim=1).cpu()
        heads.drop_diverged()
        if not len(heads):
            break
        if after_epoch is not None:
            after_epoch(epoch, heads)
    return heads, losses


def _drawn_order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


@torch.no_grad()
def correct_of_heads(heads: Heads, features: Tensor, labels: Tensor) -> Tensor:
    """How many of [n, D] each head classifies as ``labels`` [n] says: [H] int64 on the CPU. Of equal logits the first class wins."""
    device = heads.weight.device
    correct = torch.zeros(len(heads), dtype=torch.int64)
    rows = _rows_at_once(len(heads) * heads.classes, device)
    for some, truth in zip(features.split(rows), labels.split(rows)):
        guesses = heads.logits(heads.padded(some.to(device))).argmax(1)
        correct += (guesses == truth.to(device)).sum(1).cpu()
    return correct


def _rows_at_once(columns: int, device: torch.device) -> int:
    return max(1, (VALUES_AT_ONCE_ON_GPU if device.type == "cuda" else VALUES_AT_ONCE) // columns)


# Logistic regression


@dataclass(frozen=True)
class LogisticFit:
    """Minima of mean loss + λ/2 · ‖W‖², without intercept, of S training sets and L penalties λ."""

    weight: Tensor
    """[S, L, C, D], of the features' type, on their device."""
    objective: Tensor
    """[S, L] float64."""
    gradient: Tensor
    """[S, L] float64: largest norm of a class's gradient there."""
    iterations: Tensor
    """[S, L] int64."""
    converged: Tensor
    """[S, L] bool: whether the gradient came below the tolerance; otherwise arithmetic or ``most_iterations`` was at its end."""


@torch.no_grad()
def fit_logistic(
    features: Sequence[Tensor],
    labels: Sequence[Tensor],
    penalties: Sequence[float],
    *,
    classes: int,
    loss: str = "multinomial",
    tolerance: float = 1e-5,
    most_iterations: int = 1000,
) -> LogisticFit:
    """Logistic regressions of all training sets together, for one penalty after the other, by L-BFGS with a backtracking line search.

    The strongest penalty comes first, and each next one starts where the line through the two minima before it, over log λ, leads to.
    Value, gradient and the pairs of L-BFGS are known for the next penalty without a pass over the features: only λ/2 · ‖W‖² changes.

    Every regression takes steps of its own length; one that has converged leaves the products. Sums of losses and inner products are
    float64, products are of the features' type. Features are rotated to their principal axes, as many as there are images at most: the
    minimum lies in their span, the penalty does not feel a rotation, and along them the curvature is nearly diagonal, which L-BFGS starts
    from (Böhning 1992 bounds it by that of the features).

    Args:
        features: S tensors [n_s, D], float32 or float64, on one device.
        labels: S tensors [n_s] int64.
        penalties: L values of λ > 0.
        loss: multinomial, mean over images of the cross entropy; one_vs_rest, mean over images of the sum over classes of
            log(1 + exp(-y z)), y = ±1.
        tolerance: largest norm of a class's gradient at which a regression is done.
        most_iterations: of one regression.
    """
    width = features[0].shape[1]
    most = min(width, max(len(rows) for rows in features))
    # Sets of few images have fewer axes; theirs are filled up, and nothing ever moves along the rest.
    axes, rotated, variances = zip(*(_principal(rows, most) for rows in features))
    problems = _Problems(rotated, labels, classes, loss)
    shape = (len(features), len(penalties))
    point = torch.zeros(len(features), classes * most, dtype=features[0].dtype, device=features[0].device)
    solution = torch.empty(*shape, classes, width, dtype=point.dtype, device=point.device)
    found = [torch.empty(shape, dtype=kind) for kind in (torch.float64, torch.float64, torch.int64)]
    state = _State(point, *problems.evaluate(point, torch.arange(len(features))), [])
    minima: list[tuple[float, Tensor]] = []
    for place in sorted(range(len(penalties)), key=lambda place: -penalties[place]):
        penalty = penalties[place]
        inverse = _inverse_curvature(torch.stack(variances), penalty, classes, loss).to(point.dtype)
        state = _under_next_penalty(state, problems.change_penalty(penalty), inverse)
        if len(minima) > 1 and minima[0][0] > minima[1][0]:
            (older, before), (last, _) = minima
            state = _extrapolated(problems, state, before, math.log(penalty / last) / math.log(last / older), inverse)
        state, iterations = _minimum(problems, state, inverse, tolerance, most_iterations)
        minima = [*minima[-1:], (penalty, state.point)]
        solution[:, place] = torch.stack([w.view(classes, -1) @ to.T for w, to in zip(state.point, axes)])
        for table, values in zip(found, (state.value, _largest(state.slope, classes), iterations)):
            table[:, place] = values
    objective, gradient, iterations = found
    return LogisticFit(solution, objective, gradient, iterations, converged=gradient <= tolerance)


@dataclass(frozen=True)
class _State:
    """Where S regressions are: points [S, C·R], values [S] float64, gradients [S, C·R], the last pairs of steps and changes."""

    point: Tensor
    value: Tensor
    slope: Tensor
    history: list[Pair]


def _minimum(problems: _Problems, state: _State, inverse: Tensor, tolerance: float, most_iterations: int) -> tuple[_State, Tensor]:
    """(the minima of the current penalty, or as far as arithmetic and ``most_iterations`` allow, iterations [S] int64)."""
    iterations = torch.zeros(len(state.value), dtype=torch.int64)
    going = _largest(state.slope, problems.classes) > tolerance
    while bool(going.any()):
        direction = _direction(state.slope, state.history, inverse)
        descent = _dot(direction, state.slope)
        uphill = descent >= 0
        if uphill.any():  # rounding has spoilt the curvature; the gradient itself always leads down
            direction[uphill], descent[uphill] = -state.slope[uphill], -_dot(state.slope[uphill], state.slope[uphill])
        point, value, slope, moved = _line_search(problems, going.nonzero()[:, 0], state, direction, descent)
        iterations += going.cpu()
        pair = _pair(point - state.point, slope - state.slope, inverse)
        state = _State(point, value, slope, [*state.history[-(HISTORY - 1) :], pair])
        going = going & moved & (_largest(slope, problems.classes) > tolerance) & (iterations < most_iterations).to(going.device)
    return state, iterations


def _under_next_penalty(state: _State, change: float, inverse: Tensor) -> _State:
    """The same points under a penalty that is larger by ``change``: λ/2 · ‖W‖² adds λ · W to gradients and λ · s to changes of them."""
    return _State(
        state.point,
        state.value + 0.5 * change * _dot(state.point, state.point),
        state.slope + change * state.point,
        [_pair(step, difference + change * step, inverse) for step, difference, _, _ in state.history],
    )


def _extrapolated(problems: _Problems, state: _State, before: Tensor, factor: float, inverse: Tensor) -> _State:
    """Further along the line from the minima ``before`` to the points of ``state``, for the regressions that this leads down."""
    trial = state.point + factor * (state.point - before)
    value, slope = problems.evaluate(trial, torch.arange(len(trial), device=trial.device))
    better = value < state.value
    point, slope = (torch.where(better[:, None], new, old) for new, old in ((trial, state.point), (slope, state.slope)))
    pair = _pair(point - state.point, slope - state.slope, inverse)
    return _State(point, torch.where(better, value, state.value), slope, [*state.history[-(HISTORY - 1) :], pair])


class _Problems:
    """Value and gradient of S regressions under one penalty.

    Attributes:
        penalty: λ of mean loss + λ/2 · ‖W‖²; 0 until it is set.
    """

    def __init__(self, features: Sequence[Tensor], labels: Sequence[Tensor], classes: int, loss: str) -> None:
        assert loss in ("multinomial", "one_vs_rest")
        self.features, self.labels, self.classes, self.loss = features, labels, classes, loss
        self.penalty = 0.0

    def change_penalty(self, penalty: float) -> float:
        """Take another λ; returns by how much it is larger."""
        change, self.penalty = penalty - self.penalty, penalty
        return change

    def evaluate(self, point: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        """Values [P] float64 and gradients [P, C·D] of the regressions ``problems`` [P] at ``point`` [P, C·D]."""
        value = 0.5 * self.penalty * _dot(point, point)
        slope = point * self.penalty
        for row, number in enumerate(problems.tolist()):
            self._add_losses(number, point[row], value[row], slope[row])
        return value, slope

    def _add_losses(self, number: int, point: Tensor, value: Tensor, slope: Tensor) -> None:
        features, labels = self.features[number], self.labels[number]
        weight, gradient = point.view(self.classes, -1), slope.view(self.classes, -1)
        rows = _rows_at_once(self.classes, features.device)
        for some, truth in zip(features.split(rows), labels.split(rows)):
            logits = weight @ some.T
            images = torch.arange(len(some), device=some.device)
            true = logits[truth, images]
            if self.loss == "multinomial":
                top = logits.amax(0)
                sums = logits.sub_(top).exp_().sum(0)
                value += (sums.log() + top - true).sum(dtype=torch.float64) / len(features)
                outer = logits.div_(sums)
            else:
                # log(1 + exp(-y z)) = softplus(z) - z for y = 1, softplus(z) for y = -1.
                value += (F.softplus(logits).sum(0) - true).sum(dtype=torch.float64) / len(features)
                outer = logits.sigmoid_()
            outer[truth, images] -= 1
            gradient.addmm_(outer, some, alpha=1 / len(features))


def _line_search(
    problems: _Problems, waiting: Tensor, state: _State, direction: Tensor, descent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(points, values, gradients, which regressions have moved [S] bool) after sufficient decrease of the regressions ``waiting``, each by
    a step of its own.
    """
    rounding = 4 * torch.finfo(state.point.dtype).eps * state.value.abs()
    point, value, slope, step = state.point.clone(), state.value.clone(), state.slope.clone(), torch.ones_like(state.value)
    moved = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(MOST_HALVINGS):
        trial = state.point[waiting] + step[waiting, None].to(point.dtype) * direction[waiting]
        found, gradient = problems.evaluate(trial, waiting)
        enough = found <= state.value[waiting] + ARMIJO * step[waiting] * descent[waiting] + rounding[waiting]
        done = waiting[enough]
        point[done], value[done], slope[done], moved[done] = trial[enough], found[enough], gradient[enough], True
        if bool(enough.all()):
            break
        # The minimum of the parabola through what is known, kept within sensible bounds.
        waiting, found = waiting[~enough], found[~enough]
        curvature = found - state.value[waiting] - step[waiting] * descent[waiting]
        best = -descent[waiting] * step[waiting] ** 2 / (2 * curvature)
        step[waiting] = torch.where(best.isfinite(), best, 0.5 * step[waiting]).clamp(0.1 * step[waiting], 0.5 * step[waiting])
    return point, value, slope, moved


Pair = tuple[Tensor, Tensor, Tensor, Tensor]


def _pair(step: Tensor, change: Tensor, inverse_curvature: Tensor) -> Pair:
    """(s, y, 1 / sᵀy, sᵀy / yᵀPy) of every regression, P the curvature to start from; 1 / sᵀy is 0 where rounding has left no curvature,
    which leaves the pair out.
    """
    product = _dot(step, change)
    sound = product > 1e-12 * _dot(change, change).sqrt() * _dot(step, step).sqrt()
    inverse = torch.where(sound, 1 / product, 0.0)
    return step, change, inverse, torch.where(sound, product / _dot(change, inverse_curvature * change), 0.0)


def _direction(slope: Tensor, history: list[Pair], inverse_curvature: Tensor) -> Tensor:
    """-H · gradient by the two-loop recursion (Nocedal 1980), for every regression its own."""
    direction = -slope
    factors = []
    for step, change, inverse, _ in reversed(history):
        factor = inverse * torch.linalg.vecdot(step, direction)
        direction.addcmul_(factor[:, None].to(slope.dtype), change, value=-1)
        factors.append(factor)
    scale = torch.ones(len(slope), dtype=torch.float64, device=slope.device)
    for _, _, inverse, ratio in history:
        scale = torch.where(inverse > 0, ratio, scale)
    direction.mul_(scale[:, None].to(slope.dtype)).mul_(inverse_curvature)
    for (step, change, inverse, _), factor in zip(history, reversed(factors)):
        other = inverse * torch.linalg.vecdot(change, direction)
        direction.addcmul_((factor - other)[:, None].to(slope.dtype), step)
    return direction


def _principal(features: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(axes [D, R], features along them [n, R], their mean squares [R] float64) of [n, D]; R = ``most`` by axes of zeros."""
    rows = features.double()
    count, width = rows.shape
    if count >= width:
        values, axes = torch.linalg.eigh(rows.T @ rows)
    else:
        values, images = torch.linalg.eigh(rows @ rows.T)
        axes = rows.T @ images / values.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        axes = axes * (values > 1e-12 * values.amax().clamp(min=torch.finfo(torch.float64).tiny))
    missing = most - len(values)
    axes = F.pad(axes, (0, missing)).to(features.dtype)
    return axes, features @ axes, F.pad(values.clamp(min=0) / count, (0, missing))


def _inverse_curvature(variances: Tensor, penalty: float, classes: int, loss: str) -> Tensor:
    """[S, C · R], of the features' axes: 1 / (mean squares [S, R] · slope of the softmax or sigmoid at 0 + λ)."""
    sharpness = (1 - 1 / classes) / classes if loss == "multinomial" else 0.25
    return (1 / (sharpness * variances + penalty)).repeat(1, classes)


def _largest(slope: Tensor, classes: int) -> Tensor:
    """The largest norm of a class's gradient [P] float64."""
    return slope.unflatten(1, (classes, -1)).double().norm(dim=2).amax(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, summed in float64."""
    return (a * b).sum(1, dtype=torch.float64)
