"""The losses on prototypes and keys: published figures, their own derivation in plain PyTorch, precision, and what callers may do."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import unit_rows
from test_loss_backends import SHARED_GOLDEN

from massl_fast.kernels import contrast, partition_consistency, partition_indices, prototype_cross_entropy, sinkhorn_bias
from replay_objective import replay

BACKENDS = ["reference", "streaming"]
GOLDENS = ["carp_loss", "carp_loss_sharp", "dino_loss", "ibot_loss", "mmc_loss", "mocov3_loss", "sinkhorn"]
TWO_RANKS = ["carp_two_ranks", "mocov3_two_ranks"]


def golden(name: str) -> Path:
    path = SHARED_GOLDEN / "objectives" / f"{name}.npz"
    if not path.is_file():
        pytest.skip("The golden cases of other objectives lie outside the repository and are absent here.")
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDENS)
def test_figures_of_the_published_losses(name, backend):
    assert max(replay(golden(name), backend=backend).values()) <= 1e-10
    assert max(replay(golden(name), backend=backend, dtype=torch.float32).values()) <= 1e-5


@pytest.mark.parametrize("name", TWO_RANKS)
def test_figures_of_the_published_losses_on_two_ranks(name):
    assert max(replay(golden(name), backend="streaming").values()) <= 1e-10


def test_a_file_made_here_is_replayed_on_two_ranks(tmp_path):
    """The same as the published case, from the plain PyTorch below: it is there where the published one is not."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = (3 * torch.randn(2, views, 3, 8, generator=generator, dtype=torch.float64) for views in (3, 2))
    keys, teacher_keys = (torch.randn(25, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    permutation = torch.randperm(25, generator=generator)
    blocks = permutation[:24].view(3, 8)
    stored = dict(
        student=student, teacher=teacher, student_prototypes=keys, teacher_prototypes=teacher_keys,
        permutation=permutation, block_size=torch.tensor(8), eps=torch.tensor(2.0**-23, dtype=torch.float64),
    )  # fmt: skip
    found = {name: [] for name in ("loss", "consistency", "entropy", "grad_student", "grad_prototypes")}
    for rank in range(2):
        other = [(rows[1 - rank] @ c.T)[..., blocks].softmax(-1).flatten(0, 1) for rows, c in ((student, keys), (teacher, teacher_keys))]
        z, c = leaves(student[rank], keys)
        consistency, entropy = carp_in_plain_pytorch(z, teacher[rank], c, teacher_keys, blocks, 2**-23, torch.cat(other))
        grads = torch.autograd.grad(consistency + 2 * entropy, (z, c))
        for name, value in zip(found, (consistency + entropy, consistency, entropy, *grads)):
            found[name].append(value.detach())
    np.savez(tmp_path / "carp_made_here.npz", **{k: v.numpy() for k, v in (stored | {k: torch.stack(v) for k, v in found.items()}).items()})
    assert max(replay(tmp_path / "carp_made_here.npz").values()) <= 1e-10


def test_a_file_that_names_no_objective_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="does not say which objective"):
        replay(tmp_path / "unknown.npz")


# Independent derivations: logits of everything, autograd


def dino_in_plain_pytorch(z, w, keys, teacher_keys, bias, student_temp, teacher_temp):
    q = (w @ teacher_keys.T / teacher_temp + bias).softmax(-1).detach()
    log_p = (z @ keys.T / student_temp).log_softmax(-1)
    terms = [-(q[j] * log_p[i]).sum(-1).mean() for i in range(len(z)) for j in range(len(w)) if i != j]
    return torch.stack(terms).mean()


def carp_in_plain_pytorch(z, w, keys, teacher_keys, blocks, clamp, others=None):
    """``blocks`` [B, block_size]; ``others``: probabilities of other ranks' rows [n, B, block_size], constants."""
    p, q = ((rows @ c.T)[..., blocks].softmax(-1) for rows, c in ((z, keys), (w.detach(), teacher_keys.detach())))
    terms = [-(p[i] * q[j]).sum(-1).clamp(clamp, 1 - clamp).log().mean() for i in range(len(z)) for j in range(len(w)) if i != j]
    everything = torch.cat((p, q)).flatten(0, 1)
    if others is not None:
        everything = torch.cat((everything, others))
    mean = everything.mean(0)
    entropy = torch.log(torch.tensor(float(blocks.shape[1]), dtype=z.dtype)) + (mean * mean.clamp(clamp, 1 - clamp).log()).sum(-1).mean()
    return torch.stack(terms).mean(), entropy


def prototype_case(views=4, teachers=2, images=3, width=12, entries=37, *, dtype=torch.float64, length=1.0):
    generator = torch.Generator().manual_seed(7)
    z, w = (unit_rows(n, images, width, seed=n) * length for n in (views, teachers + 10))
    keys, teacher_keys = unit_rows(entries, width, seed=2), unit_rows(entries, width, seed=3)
    teacher_keys = F.normalize(keys + 0.3 * teacher_keys, dim=-1)
    bias = torch.randn(entries, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (z, w[:teachers], keys, teacher_keys)] + [bias]


def gradients(loss, *of):
    return loss.detach(), *torch.autograd.grad(loss, of)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("views", "teachers", "images", "entries"), [(4, 2, 3, 37), (2, 1, 1, 1), (1, 2, 5, 300), (2, 3, 4, 64)])
def test_other_views_against_plain_pytorch(views, teachers, images, entries, backend):
    z, w, keys, teacher_keys, bias = prototype_case(views, teachers, images, 12, entries)
    z, keys = leaves(z, keys)
    expected = gradients(dino_in_plain_pytorch(z, w, keys, teacher_keys, bias, 0.1, 0.05), z, keys)
    result = prototype_cross_entropy(z, w, keys, teacher_keys, key_bias=bias, student_temp=0.1, teacher_temp=0.05, backend=backend)
    torch.testing.assert_close(gradients(result.loss, z, keys), expected, rtol=1e-10, atol=1e-13)
    log_p = (z @ keys.T / 0.1).log_softmax(-1)
    targets = torch.tensor([sum(i != j for j in range(teachers)) for i in range(views)]).double()
    entropies = -(log_p.exp() * log_p).sum(-1).mean(1)
    torch.testing.assert_close(result.student_entropy, ((targets * entropies).sum() / targets.sum()).detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_row_with_weights_and_padding_against_plain_pytorch(backend):
    z, w, keys, teacher_keys, bias = prototype_case(3, 3, 5)
    weight = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[1:, 2:] = 0
    z, keys = leaves(z, keys)
    q = (w @ teacher_keys.T / 0.05 + bias).softmax(-1)
    expected = -(weight * (q * (z @ keys.T / 0.1).log_softmax(-1)).sum(-1)).sum()
    temps = dict(student_temp=0.1, teacher_temp=torch.tensor(0.05, dtype=torch.float64))
    arguments = dict(key_bias=bias, pairs="same row", backend=backend, **temps)
    found = prototype_cross_entropy(z, w, keys, teacher_keys, row_weight=weight, **arguments).loss
    torch.testing.assert_close(gradients(found, z, keys), gradients(expected, z, keys), rtol=1e-10, atol=1e-13)
    kept = weight > 0
    packed = prototype_cross_entropy(z[kept], w[kept], keys, teacher_keys, row_weight=weight[kept], **arguments).loss
    torch.testing.assert_close(packed, found)


def test_rows_that_are_all_masked_and_rows_that_are_none_cost_nothing():
    z, w, keys, teacher_keys, _ = prototype_case(2, 2, 3)
    z, keys = leaves(z, keys)
    arguments = dict(student_temp=0.1, teacher_temp=0.05, pairs="same row")
    masked = prototype_cross_entropy(z, w, keys, teacher_keys, row_weight=torch.zeros(2, 3), **arguments)
    none = prototype_cross_entropy(z.flatten(0, 1)[:0], w.flatten(0, 1)[:0], keys, teacher_keys, **arguments)
    for result in (masked, none):
        assert result.loss == 0 and result.student_entropy == 0
        assert all((g == 0).all() for g in torch.autograd.grad(result.loss, (z, keys)))


@pytest.mark.parametrize("clamp", [2**-23, 0.05], ids=["published", "active"])
@pytest.mark.parametrize("block_size", [1, 7, 16, 37])
@pytest.mark.parametrize("backend", BACKENDS)
def test_partition_consistency_against_plain_pytorch(backend, block_size, clamp):
    z, w, keys, teacher_keys, _ = prototype_case(length=8.0)
    z, keys = leaves(z, keys)
    partition = partition_indices(37, seed=1, step=2)
    blocks = partition[: 37 // block_size * block_size].long().view(-1, block_size)
    expected = gradients(sum(carp_in_plain_pytorch(z, w, keys, teacher_keys, blocks, clamp)), z, keys)
    result = partition_consistency(z, w, keys, teacher_keys, block_size=block_size, seed=1, step=2, clamp=clamp, backend=backend)
    torch.testing.assert_close(gradients(result.loss, z, keys), expected, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(result.loss.detach(), result.consistency + result.entropy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_of_all_ranks_enters_with_the_gradient_of_this_one(backend):
    z, w, keys, teacher_keys, _ = prototype_case(length=8.0)
    z, keys = leaves(z, keys)
    blocks = torch.arange(32).view(4, 8)
    other_z, other_w = (4 * torch.randn(n, 3, 12, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (4, 2))
    others = torch.cat(
        [(rows @ c.T)[..., blocks].softmax(-1).flatten(0, 1) for rows, c in ((other_z, keys), (other_w, teacher_keys))]
    ).detach()

    def sum_over_ranks(counted):
        elsewhere = torch.zeros(37, dtype=torch.float64)
        elsewhere[blocks] = others.sum(0)
        return counted + torch.cat((elsewhere[: len(counted) - 1], torch.tensor([float(len(others))], dtype=torch.float64)))

    partition = torch.arange(37)
    result = partition_consistency(
        z, w, keys, teacher_keys, block_size=8, partition=partition, sum_over_ranks=sum_over_ranks, backend=backend
    )
    consistency, entropy = carp_in_plain_pytorch(z, w, keys, teacher_keys, blocks, 2**-23, others)
    torch.testing.assert_close(result.loss.detach(), (consistency + entropy).detach())
    # Half of the mean's rows are this rank's. The mean over both ranks of twice its share is the gradient of the global entropy.
    expected = torch.autograd.grad(consistency + 2 * entropy, (z, keys))
    torch.testing.assert_close(torch.autograd.grad(result.loss, (z, keys)), expected, rtol=1e-9, atol=1e-12)


def contrast_case(rows=10, keys=23, width=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(n, width, generator=generator, dtype=torch.float64) * 5 for n in (rows, keys))
    own = torch.randperm(keys, generator=generator)[:rows]
    key_group = torch.randint(5, (keys,), generator=generator)
    key[own] = query + key[own]
    return query.to(dtype), key.to(dtype), own, key_group[own], key_group


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_contrast_against_plain_pytorch(backend, grouped):
    query, key, own, row_group, key_group = contrast_case()
    (query,) = leaves(query)
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / 0.2
    groups = {}
    if grouped:
        logits = logits.masked_fill((row_group[:, None] == key_group) & (torch.arange(23) != own[:, None]), -torch.inf)
        groups = dict(row_group=row_group, key_group=key_group)
    weight = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for given, used in ((None, torch.full((10,), 0.1, dtype=torch.float64)), (weight, weight)):
        result = contrast(query, key, own, temperature=0.2, row_weight=given, **groups, backend=backend)
        loss = (used * F.cross_entropy(logits, own, reduction="none")).sum()
        expected = loss.detach(), *torch.autograd.grad(loss, query, retain_graph=True)
        torch.testing.assert_close(gradients(result.loss, query), expected)
        share = used / used.sum()
        entropies = torch.special.entr(logits.softmax(-1)).sum(-1)
        torch.testing.assert_close(result.entropy, (share * entropies).sum().detach())
        torch.testing.assert_close(result.similarity, (share * F.cosine_similarity(query, key[own])).sum().detach())


def test_a_query_whose_group_is_everything_costs_nothing():
    query, key, own, _, _ = contrast_case()
    (query,) = leaves(query)
    groups = dict(row_group=torch.zeros(10, dtype=torch.int64), key_group=torch.zeros(23, dtype=torch.int64))
    result = contrast(query, key, own, temperature=0.2, **groups)
    assert result.loss == 0 and result.entropy == 0
    torch.testing.assert_close(*torch.autograd.grad(result.loss, query), torch.zeros_like(query))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_bias_gives_the_assignment_of_alternate_normalisation(iterations, backend):
    rows, keys = unit_rows(20, 8, seed=0), unit_rows(15, 8, seed=1)
    logits = rows @ keys.T / 0.05
    q = (logits - logits.max()).exp()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    bias = sinkhorn_bias(rows, keys, temperature=0.05, iterations=iterations, backend=backend)
    torch.testing.assert_close((logits + bias).softmax(1), q)
    halves = []

    def sum_over_ranks(sums):
        halves.append(sums)
        return 2 * sums

    doubled = sinkhorn_bias(rows, keys, temperature=0.05, iterations=iterations, sum_over_ranks=sum_over_ranks, backend=backend)
    torch.testing.assert_close((logits + doubled).softmax(1), q)  # both ranks with the same rows
    assert len(halves) == iterations


def test_a_key_that_nobody_comes_near_gets_a_finite_bias():
    rows = torch.tensor([[1.0, 0.0]]).expand(4, -1)
    keys = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    bias = sinkhorn_bias(rows, keys, temperature=0.005, iterations=3)  # exp(-400) is 0 in float32
    assert bias.isfinite().all()


# What callers may do


def test_gradcheck():
    z, w, keys, teacher_keys, bias = prototype_case(3, 2, 2, 4, 11)
    z, keys = leaves(z, keys)
    query, key, own, row_group, key_group = contrast_case(4, 9, 5)
    (query,) = leaves(query)
    weight = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    temps = dict(student_temp=0.4, teacher_temp=0.3)
    losses = [
        lambda z, c: prototype_cross_entropy(z, w, c, teacher_keys, key_bias=bias, row_weight=weight, **temps).loss,
        lambda z, c: prototype_cross_entropy(z[:2], w, c, teacher_keys, pairs="same row", **temps).loss,
        lambda z, c: partition_consistency(3 * z, w, c, teacher_keys, block_size=4, clamp=0.01).loss,
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(loss, (z, keys))
    groups = dict(row_group=row_group, key_group=key_group)
    assert torch.autograd.gradcheck(lambda q: contrast(q, key, own, temperature=0.4, **groups).loss, query)


def every_loss(dtype=torch.float32, length=1.0, **prototypes):
    """Losses by name: functions of (student rows, prototypes) and what to call them with."""
    z, w, keys, teacher_keys, bias = prototype_case(dtype=dtype, **prototypes)
    z, w = z * length, w * length
    query, key, own, row_group, key_group = contrast_case(dtype=dtype)
    temps = dict(student_temp=0.1, teacher_temp=0.05)

    def other_views(z, c, **more):
        return prototype_cross_entropy(z, w.to(z.dtype), c, teacher_keys.to(z.dtype), key_bias=bias, **temps, **more).loss

    def same_row(z, c, **more):
        return prototype_cross_entropy(z[:2], w.to(z.dtype), c, teacher_keys.to(z.dtype), pairs="same row", **temps, **more).loss

    def carp(z, c, **more):
        return partition_consistency(z, w.to(z.dtype), c, teacher_keys.to(z.dtype), block_size=12, seed=1, **more).loss

    def moco(q, c, **more):
        return contrast(q, c, own, temperature=0.2, **more).loss

    def mmc(q, c, **more):
        return contrast(q, c, own, temperature=0.2, row_group=row_group, key_group=key_group, **more).loss

    on_prototypes = {f.__name__: (f, z, keys) for f in (other_views, same_row, carp)}
    return on_prototypes | {f.__name__: (f, query, key) for f in (moco, mmc)}


LOSSES = ["other_views", "same_row", "carp", "moco", "mmc"]


def with_gradients(loss, rows, keys, **more):
    rows, keys = leaves(rows, keys)
    value = loss(rows, keys, **more)
    return [value.detach(), *(g for g in torch.autograd.grad(value, (rows, keys), allow_unused=True) if g is not None)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_the_reference_in_the_same_precision(name, dtype):
    loss, rows, keys = every_loss(dtype, views=4, images=16, width=32, entries=400)[name]
    truth = with_gradients(loss, rows.double(), keys.double(), backend="reference") if name not in ("moco", "mmc") else None
    if truth is None:
        double = every_loss(torch.float64)[name][0]
        truth = with_gradients(double, rows.double(), keys.double(), backend="reference")
    errors = {}
    for backend in BACKENDS:
        found = with_gradients(loss, rows, keys, backend=backend)
        assert found[0].dtype == torch.float32 and all(g.dtype == dtype for g in found[1:])
        errors[backend] = [float((f.double() - t).abs().max()) for f, t in zip(found, truth)]
    floors = [4 * torch.finfo(torch.float32).eps * float(truth[0])]
    floors += [4 * torch.finfo(dtype).eps * float(t.abs().max()) for t in truth[1:]]
    for ours, theirs, floor in zip(errors["streaming"], errors["reference"], floors):
        assert ours <= 2 * theirs + floor


def test_rows_of_length_300_stay_as_exact_as_the_published_computation():
    loss, rows, keys = every_loss(torch.float32, length=300.0, images=16, width=32, entries=400)["carp"]
    truth = with_gradients(loss, rows.double(), keys.double(), backend="reference")
    errors = []
    for backend in BACKENDS:
        found = with_gradients(loss, rows, keys, backend=backend)
        assert all(f.isfinite().all() for f in found)
        errors.append([float((f.double() - t).abs().max() / t.abs().max()) for f, t in zip(found, truth)])
    assert all(ours <= 2 * theirs + 1e-6 for theirs, ours in zip(*errors))


@pytest.mark.parametrize("name", LOSSES)
def test_results_repeat_bit_for_bit_and_do_not_depend_on_memory_that_nobody_wrote(name, monkeypatch):
    loss, rows, keys = every_loss()[name]
    expected = with_gradients(loss, rows, keys)

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    for owner, what in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, what, poison(getattr(owner, what)))
    assert all(map(torch.equal, with_gradients(loss, rows, keys), expected))


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_whole_with_its_backward(name):
    loss, rows, keys = every_loss()[name]
    expected = with_gradients(loss, rows, keys)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for found, value in zip(with_gradients(compiled, rows, keys), expected):
        torch.testing.assert_close(found, value)


def test_opcheck():
    z, w, keys, teacher_keys, bias = prototype_case(dtype=torch.float32)
    bias, one, slope = bias.float(), torch.ones(()), torch.randn(37)
    sums, teacher_sums, weight = torch.randn(4, 3), torch.randn(2, 3), torch.rand(4, 3)
    for temps in ((0.1, None, 0.05, None), (0.0, torch.tensor(0.1), 0.0, torch.tensor(0.05))):
        given = (one, z, weight, sums, w, w, teacher_sums, keys, teacher_keys, bias, *temps, "streaming")
        torch.library.opcheck(torch.ops.massl_fast.prototype_gradient.default, given)
    order = (16, 2**-23, None, 0, 0, torch.tensor(3), "streaming")
    torch.library.opcheck(torch.ops.massl_fast.partition_consistency.default, (z, w, keys, teacher_keys, *order))
    for learned in (False, True):
        given = (one, slope, z, w, keys, teacher_keys, *order, learned)
        torch.library.opcheck(torch.ops.massl_fast.partition_consistency_gradient.default, given)


@pytest.mark.parametrize("name", ["other_views", "same_row", "carp"])
def test_frozen_prototypes_are_not_read_back(name):
    loss, rows, keys = every_loss()[name]
    _, expected, _ = with_gradients(loss, rows, keys)
    (rows,) = leaves(rows)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        value = loss(rows, keys)
        found = torch.autograd.grad(value, rows)[0]
    assert torch.equal(found, expected)
    names = {event.key for event in profile.key_averages()}
    assert "massl_fast::prototype_gradient" not in names and ("massl_fast::partition_consistency" in names) == (name == "carp")


@pytest.mark.parametrize("name", LOSSES)
def test_upstream_scale_autocast_and_no_gradient_mode(name):
    loss, rows, keys = every_loss()[name]
    value, *plain = with_gradients(loss, rows, keys)
    scaled = with_gradients(lambda *given: 4.0 * loss(*given), rows, keys)
    for one, other in zip(scaled[1:], plain):
        torch.testing.assert_close(one, 4 * other)
    with torch.no_grad():
        assert torch.equal(loss(rows, keys), value) and not loss(rows, keys).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = with_gradients(loss, rows, keys)
    assert half[0].dtype == torch.float32 and all(g.dtype == torch.float32 for g in half[1:])
    for one, other in zip(half, (value, *plain)):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.05 * float(other.abs().max()))


def test_small_tiles_change_nothing_beyond_rounding(monkeypatch):
    z, w, keys, teacher_keys, _ = prototype_case(length=8.0)
    arguments = dict(w=w, teacher_keys=teacher_keys)

    def carp(z, c):
        return partition_consistency(z, arguments["w"], c, arguments["teacher_keys"], block_size=9).loss

    expected = with_gradients(carp, z, keys)
    for most in (6 * 9, 6 * 9 * 2, 6 * 9 * 3 * 2):  # one image, two images, two blocks
        monkeypatch.setattr("massl_fast.kernels.consistency.CPU_TILE", (1, most))
        torch.testing.assert_close(with_gradients(carp, z, keys), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(pairs="all"), "pairs must be"),
        (dict(teacher=torch.zeros(2, 5, 12)), "same images"),
        (dict(teacher=torch.zeros(2, 5, 12), pairs="same row"), "one shape"),
        (dict(teacher_prototypes=torch.zeros(36, 12)), "teacher_prototypes must have the shape"),
        (dict(prototypes=torch.zeros(37, 11)), "as wide as the prototypes"),
        (dict(key_bias=torch.zeros(36)), "key_bias must be"),
        (dict(row_weight=torch.zeros(4, 2)), "row_weight must be"),
        (dict(student_temp=-1.0), "student_temp must be"),
        (dict(backend="triton"), "cannot run here"),
    ],
)
def test_mistakes_are_sentences_that_name_the_argument(changes, words):
    z, w, keys, teacher_keys, _ = prototype_case(dtype=torch.float32)
    given = dict(student=z, teacher=w, prototypes=keys, teacher_prototypes=teacher_keys, student_temp=0.1, teacher_temp=0.05)
    with pytest.raises(ValueError, match=words):
        prototype_cross_entropy(**given | changes)


def test_mistakes_of_the_other_losses_are_sentences():
    z, w, keys, teacher_keys, _ = prototype_case(dtype=torch.float32)
    query, key, own, row_group, _ = contrast_case(dtype=torch.float32)
    for words, call in {
        "clamp must be": lambda: partition_consistency(z, w, keys, teacher_keys, block_size=4, clamp=0.5),
        "between 1 and the 37 entries of the prototypes": lambda: partition_consistency(z, w, keys, teacher_keys, block_size=38),
        "cannot run here": lambda: partition_consistency(z, w, keys, teacher_keys, block_size=4, backend="triton"),
        "own must hold values from 0 to 22": lambda: contrast(query, key, own + 20, temperature=0.2),
        "own must be an int32": lambda: contrast(query, key, own[:3], temperature=0.2),
        "go together": lambda: contrast(query, key, own, temperature=0.2, row_group=row_group),
        "as wide as the key": lambda: contrast(query[:, :4], key, own, temperature=0.2),
        "iterations must be": lambda: sinkhorn_bias(z, keys, temperature=0.05, iterations=0),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
