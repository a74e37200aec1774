"""The losses of DINO, iBOT, CARP, MoCo-v3 and the Sinkhorn-Knopp bias beside the published way.

The published way holds the logits: plain PyTorch, written after the losses' published code (a log-softmax per pair in DINO, all patches in
iBOT, a product per pair in CARP). "reference" is the same mathematics with every logit made once and masked rows alone, the stricter
baseline. A call is loss and gradients, of student rows and of prototypes; of Sinkhorn-Knopp the bias, or the assignment.

Errors are the largest of a tensor relative to its largest value, against float64. How times and memory are taken: benchmarks.beside. The
results of a call are counted apart, for a gradient of [K, D] is the parameter's own and no way can do without it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from massl_fast import kernels
from massl_fast.benchmarks import beside
from massl_fast.benchmarks.beside import DTYPES, OURS, Call, Inputs, differentiate, relative_error, unit_rows
from massl_fast.kernels import flops as _formulas  # noqa: F401  registers those of our operators

KIND, ERRORS, DETAILS, GRAPHED = "objectives", ("error", "error of gradients"), {}, ()
PUBLISHED, REFERENCE = "published way", "reference"
MASKED = 0.15  # share of patches, iBOT's mean


@dataclass(frozen=True)
class Case:
    """One loss at one shape; letters as in docs/kernels.md. ``rows``: patches of all views (ibot), queries of a view (moco_v3), rows."""

    loss: str
    V: int
    T: int
    N: int
    D: int
    K: int
    block: int
    rows: int
    dtype: str

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in asdict(self).items() if value)


# At the published sizes of one GPU, but for N: 16 images (CARP 32) keep the published way within a workstation's memory.
CASES = (
    Case("dino", 10, 2, 16, 256, 65536, 65536, 0, "float32"),
    Case("ibot", 2, 2, 16, 256, 8192, 8192, 2 * 16 * 196, "float32"),
    Case("carp", 8, 2, 32, 256, 65536, 512, 0, "float32"),
    Case("moco_v3", 2, 2, 0, 256, 1024, 1024, 128, "float32"),
    Case("sinkhorn", 0, 1, 0, 256, 65536, 65536, 128, "float32"),
)
QUICK = {
    "dino": dict(N=2, K=2048, block=2048),
    "ibot": dict(K=512, block=512, rows=400),
    "carp": dict(N=2, K=2048, block=128),
    "sinkhorn": dict(K=2048, block=2048),
}
STUDENT_TEMP, TEACHER_TEMP, ITERATIONS = 0.1, 0.04, 3


def make_inputs(case: Case, seed: int, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    unit = functools.partial(unit_rows, case, generator)
    if case.loss in ("moco_v3", "sinkhorn"):
        return dict(student=unit(*([2] if case.loss == "moco_v3" else []), case.rows), prototypes=unit(case.K), teacher=unit(2, case.K))
    length = 9.0 if case.loss == "carp" else 1.0  # of rows from the published head at its start
    shape = (case.rows,) if case.loss == "ibot" else (case.V, case.N)
    teacher_shape = (case.rows,) if case.loss == "ibot" else (case.T, case.N)
    found = dict(
        student=length * unit(*shape), teacher=length * unit(*teacher_shape), prototypes=unit(case.K), teacher_prototypes=unit(case.K)
    )  # fmt: skip
    if case.loss == "carp":
        return found | dict(partition=torch.randperm(case.K, device=device, generator=generator).int())
    found |= dict(bias=torch.rand(case.K, device=device, generator=generator) - 0.5)
    if case.loss == "ibot":
        order = torch.randperm(case.rows, device=device, generator=generator)
        found |= dict(masked=order[: round(MASKED * case.rows)].sort().values)
    return found


# The ways: losses of the inputs, in the order ours and published


def variants(case: Case, device: torch.device, compiled: bool = False) -> tuple[dict[str, Call], dict[str, str]]:
    """The ways of a case by name, the baseline first, and why others cannot run here."""
    ours, published = WAYS[case.loss]
    losses = {PUBLISHED: functools.partial(published, case=case)}
    losses |= {backend: functools.partial(ours, case=case, backend=backend) for backend in ("reference", "streaming", "triton")}
    missing = beside.without_triton(device, case.dtype, case.D, "partition_consistency" if case.loss == "carp" else "memory_readback")
    for name in missing:
        del losses[name]
    learned = {"moco_v3": ("student",), "sinkhorn": ()}.get(case.loss, ("student", "prototypes"))
    return {name: functools.partial(differentiate, function=function, names=learned) for name, function in losses.items()}, missing


def _of_prototypes(i: Inputs, backend: str, **more: Any) -> Tensor:
    temperatures = dict(student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP)
    sides = i["student"], i["teacher"], i["prototypes"], i["teacher_prototypes"]
    return kernels.prototype_cross_entropy(*sides, key_bias=i["bias"], **temperatures, **more, backend=backend).loss


def _of_logits(i: Inputs) -> tuple[Tensor, Tensor]:
    """The student's logits and the teacher's probabilities, held whole."""
    student = (i["student"] @ i["prototypes"].T) / STUDENT_TEMP
    with torch.no_grad():
        return student, F.softmax((i["teacher"] @ i["teacher_prototypes"].T) / TEACHER_TEMP + i["bias"], dim=-1)


def _dino(i: Inputs, case: Case, backend: str) -> Tensor:
    return _of_prototypes(i, backend)


def _published_dino(i: Inputs, case: Case) -> Tensor:
    return over_pairs(*_of_logits(i), cross_entropy)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over rows; ``targets`` are probabilities."""
    return torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1).mean()


def over_pairs(student: Sequence[Tensor], teacher: Sequence[Tensor], term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean of a term over pairs of different views."""
    terms = [term(s, t) for j, t in enumerate(teacher) for k, s in enumerate(student) if k != j]
    return sum(terms) / len(terms)


def _ibot(i: Inputs, case: Case, backend: str) -> Tensor:
    """The masked patches alone: the gradient of the others is zero."""
    masked = {name: i[name].index_select(0, i["masked"]) for name in ("student", "teacher")}
    return _of_prototypes(i | masked, backend, pairs="same row")


def _published_ibot(i: Inputs, case: Case) -> Tensor:
    """All patches through both sides, the mask on their losses."""
    mask = torch.zeros(case.rows, device=i["student"].device).index_fill_(0, i["masked"], 1)
    student, teacher = _of_logits(i)
    rows = torch.sum(-teacher * F.log_softmax(student, dim=-1), dim=-1)
    return (rows * mask).sum() / mask.sum()


def _carp(i: Inputs, case: Case, backend: str) -> Tensor:
    sides = i["student"], i["teacher"], i["prototypes"], i["teacher_prototypes"]
    return kernels.partition_consistency(*sides, block_size=case.block, partition=i["partition"], backend=backend).loss


def _published_carp(i: Inputs, case: Case) -> Tensor:
    def probabilities(rows: Tensor, keys: Tensor) -> Tensor:
        kept = i["partition"][: case.K // case.block * case.block]
        return F.softmax((rows @ keys.T)[..., kept].unflatten(-1, (-1, case.block)), dim=-1)

    student = probabilities(i["student"], i["prototypes"])
    with torch.no_grad():
        teacher = probabilities(i["teacher"], i["teacher_prototypes"])
    return published_consistency(student, teacher)


def published_consistency(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """CARP's loss of probabilities [N, blocks, block] of each view."""
    least = torch.finfo(torch.float32).eps
    mean = torch.cat((*student, *teacher)).mean(0)
    entropy = math.log(mean.shape[-1]) + (mean * mean.clamp(least, 1 - least).log()).sum(-1).mean()
    return over_pairs(student, teacher, lambda s, t: -torch.sum(s * t, dim=-1).clamp(least, 1 - least).log().mean()) + entropy


def _moco_v3(i: Inputs, case: Case, backend: str) -> Tensor:
    own = torch.arange(case.rows, device=i["student"].device)
    return sum(kernels.contrast(i["student"][a], i["teacher"][1 - a], own, temperature=0.2, backend=backend).loss for a in range(2))


def _published_moco_v3(i: Inputs, case: Case) -> Tensor:
    return published_contrast(i["student"], i["teacher"], 0.2)


def published_contrast(queries: Sequence[Tensor], keys: Sequence[Tensor], temperature: float) -> Tensor:
    """Cross-entropies of two views' rows [N, D] with those of the other view, own rows being right."""
    own = torch.arange(len(queries[0]), device=queries[0].device)
    rows = [F.normalize(q, dim=-1) @ F.normalize(keys[1 - a], dim=-1).T / temperature for a, q in enumerate(queries)]
    return sum(F.cross_entropy(each, own) for each in rows)


def _sinkhorn(i: Inputs, case: Case, backend: str) -> Tensor:
    return kernels.sinkhorn_bias(i["student"], i["prototypes"], temperature=0.07, iterations=ITERATIONS, backend=backend)


@torch.no_grad()
def _published_sinkhorn(i: Inputs, case: Case) -> Tensor:
    """The assignment itself, [R, K]."""
    q = torch.exp((i["student"] @ i["prototypes"].T).float() / 0.07).t()
    q /= q.sum()
    for _ in range(ITERATIONS):
        q /= q.sum(dim=1, keepdim=True)
        q /= len(q)
        q /= q.sum(dim=0, keepdim=True)
        q /= q.shape[1]
    q *= q.shape[1]
    return q.t()


WAYS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "dino": (_dino, _published_dino),
    "ibot": (_ibot, _published_ibot),
    "carp": (_carp, _published_carp),
    "moco_v3": (_moco_v3, _published_moco_v3),
    "sinkhorn": (_sinkhorn, _published_sinkhorn),
}


# Correctness


def truth(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The reference in float64."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return _comparable(case, inputs, variants(case, inputs["student"].device)[0][REFERENCE](wide))


def _comparable(case: Case, inputs: Inputs, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of Sinkhorn-Knopp the assignment, which constants in the bias do not change."""
    if case.loss != "sinkhorn" or results[0].ndim == 2:
        return results
    logits = inputs["student"].double() @ inputs["prototypes"].double().T / 0.07
    return ((logits + results[0].double()).softmax(1),)


def errors_of(case: Case, name: str, inputs: Inputs, results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> tuple[float, ...]:
    """Relative errors, in the order of the results."""
    return tuple(map(relative_error, _comparable(case, inputs, results), truth))


def excess(case: Case, found: dict[str, tuple[float, ...]]) -> dict[str, str]:
    """Which of our ways err more than twice as much as the better of the two baselines' worse result allows, and by how much."""
    unit = torch.finfo(DTYPES[case.dtype]).eps
    worst = [max(errors) for errors in zip(*(found[name] for name in (PUBLISHED, REFERENCE) if name in found))]
    return beside.too_wrong(found, OURS, [max(2 * error, 4 * unit) for error in worst], "baselines' allow")


def operations_of(case: Case, name: str, call: Call, inputs: Inputs) -> float:
    """Those of the way itself, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        call(inputs)
    return counter.get_total_flops()
