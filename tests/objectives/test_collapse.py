"""What keeps each objective from collapsing is taken away: its own meters see it, and do not trip while it is there.

A head trains on features that tell images apart, so that whether they still do is up to the objective alone: small networks on so few
images lose them by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from massl_fast import kernels
from massl_fast.engine.build import build_objective
from massl_fast.models.precision import Precision
from massl_fast.objectives.base import At, Objective
from massl_fast.objectives.meters import positive_rank
from plain import pairs
from small import CPU, World, crops_of, settings_of

STEPS, IMAGES, POOL, WIDTH, PATCHES = 60, 16, 64, 32, 16
RATE, MOMENTUM, NOISE = 5e-3, 0.95, 0.3
WORLD = World(0, 1, 0, CPU)


@pytest.fixture(autouse=True)
def one_thread():
    """Products of this size take longer with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(
    name: str, plant: Callable[[Objective], None] = lambda objective: None, temperature: float = 0.04, told: float = 1.0, **settings
) -> dict:
    """The metrics after ``STEPS`` steps of the objective's own heads; a view of an image is its features, times ``told``, and noise."""
    torch.manual_seed(0)
    config = settings_of(name, objective=settings)
    objective = build_objective(config, Precision("fp32", "test"), rank=0)
    plant(objective)
    student, teacher = objective.heads(WIDTH)
    teacher.load_state_dict({key: value for key, value in student.state_dict().items() if key in teacher.state_dict()})
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=RATE)
    generator = torch.Generator().manual_seed(1)
    images, patches = told * torch.randn(POOL, WIDTH, generator=generator), torch.randn(POOL, PATCHES, WIDTH, generator=generator)

    def views(features: Tensor, count: int) -> Tensor:
        repeated = features.repeat(count, 1)
        return repeated + NOISE * torch.randn(repeated.shape, generator=generator)

    for step in range(STEPS):
        chosen = torch.randperm(POOL, generator=generator)[:IMAGES]
        schedules = {"teacher_temperature": temperature, "patch_teacher_temperature": temperature, "masking": 1.0}
        at = At(step, schedules, IMAGES, 0, (), WORLD, 4)
        at = at._replace(inputs=objective.student_inputs(crops_of(config, IMAGES, step), at))
        seen = [[views(images[chosen], count)] for count in (2 + config.crops.num_local, 2)]
        if objective.needs_patches:
            for sides in seen:
                sides.append(views(patches[chosen].flatten(0, 1), 2))
            if at.inputs.masks.rows is not None:
                seen[0][1] = seen[0][1][at.inputs.masks.rows]
        with torch.no_grad():
            keys = teacher(*seen[1])
        outcome = objective(student(*seen[0]), keys, at)
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        with torch.no_grad():
            ours = dict(student.named_parameters())
            for key, parameter in teacher.named_parameters():
                parameter.lerp_(ours[key], 1 - MOMENTUM)
        committed = objective.commit_([{key: value.detach() for key, value in outcome.carried.items()}], torch.tensor(True), at)
    return {key: float(value) for key, value in {**outcome.metrics, **committed}.items()}


# What is taken away


def without_sinkhorn(objective: Objective) -> None:
    objective.sinkhorn_rounds = 0
    objective.settings.center_momentum = 1.0


def without_entropy(monkeypatch) -> None:
    """CARP's consistency alone, by plain PyTorch."""

    def consistency(z, w, keys, teacher_keys, *, block_size, seed, step, **others):
        found = kernels.partition_consistency(z, w, keys, teacher_keys, block_size=block_size, seed=seed, step=step, **others)
        order = kernels.partition_indices(len(keys), seed=seed, step=step).long()
        blocks = order[: len(keys) // block_size * block_size].view(-1, block_size)
        s, t = ((rows @ of.T)[..., blocks].softmax(-1) for rows, of in ((z, keys), (w, teacher_keys)))
        of = pairs(len(z), len(w))
        return found._replace(loss=sum(-(s[i] * t[j]).sum(-1).log().mean() for i, j in of) / len(of))

    monkeypatch.setattr("massl_fast.objectives.carp.partition_consistency", consistency)


def without_negatives(monkeypatch, module: str) -> None:
    """Each row is drawn to its own key and pushed from none."""

    def attraction(query, keys, own, *, temperature, row_weight=None, **others):
        found = kernels.contrast(query, keys, own, temperature=temperature, row_weight=row_weight, **others)
        similarity = F.cosine_similarity(query, keys[own], dim=-1)
        loss = -(similarity.mean() if row_weight is None else (similarity * row_weight).sum()) / temperature
        return found._replace(loss=loss)

    monkeypatch.setattr(f"massl_fast.objectives.{module}.contrast", attraction)


CENTRELESS = {"center_momentum": 1.0}  # the centre stays at 0
CASES = {
    "massl": (partial(trained, "massl", temperature=0.2), None, {"embedding_spread": (0.0, 0.05)}),
    "dino": (partial(trained, "dino", **CENTRELESS), None, {"assignment_information_nats": (0.0, 0.1), "embedding_spread": (0.0, 0.05)}),
    "dino-sinkhorn": (partial(trained, "dino-sinkhorn", without_sinkhorn), None, {"assignment_information_nats": (0.0, 0.1)}),
    "ibot": (
        partial(trained, "ibot", **CENTRELESS, patch_center_momentum=1.0),
        None,
        {"assignment_information_nats": (0.0, 0.3), "embedding_spread": (0.0, 0.1)},
    ),
    "carp": (partial(trained, "carp"), without_entropy, {"block_entropy_nats": (1.0, 3.0)}),
    # Its batch norms keep keys apart even without negatives; what is left is a network that tells nothing of the image.
    "moco_v3": (
        partial(trained, "moco_v3", told=0.0),
        None,
        {"positive_rank_percent": (35.0, 65.0), "contrast_entropy_nats": (2.2, 2.8)},
    ),
    "mmc": (
        partial(trained, "mmc"),
        partial(without_negatives, module="mmc"),
        {"embedding_spread": (0.0, 0.05), "class_similarity": (0.99, 1.0), "patch_similarity": (0.99, 1.0)},
    ),
}
"""How the collapse is planted, what is replaced for it, and between which values its meters then lie and the healthy ones do not."""


@pytest.mark.parametrize("name", CASES)
def test_meters_see_a_planted_collapse_and_trip_at_no_healthy_run(name, monkeypatch):
    plant, replace, meters = CASES[name]
    alive = trained(name)
    if replace:
        replace(monkeypatch)
    dead = plant()
    for meter, (low, high) in meters.items():
        assert low - 1e-3 <= dead[meter] <= high + 1e-3, f"{meter} does not see the collapse: {dead}"
        assert not low <= alive[meter] <= high, f"{meter} trips without a collapse: {alive}"


def test_a_dead_network_behind_batch_norms_is_seen_by_the_rank_of_positives():
    """Equal features become 0 there, which no spread tells from keys in all directions."""
    torch.manual_seed(0)
    head = build_objective(settings_of("moco_v3"), Precision("fp32", "test"), rank=0).heads(WIDTH)[1]
    dead, alive = torch.ones(IMAGES, WIDTH), torch.randn(IMAGES, WIDTH)
    own = torch.arange(IMAGES)
    ranks = [float(positive_rank(head(features + 1e-3), head(features), own)) for features in (dead, alive)]
    assert 30 < ranks[0] < 70 and ranks[1] < 1
    assert float(positive_rank(torch.ones(4, 3), torch.ones(4, 3), torch.arange(4))) == 50, "equal keys count by half"
