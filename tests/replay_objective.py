"""Replay stored figures of a published loss through the public functions: ``python tests/replay_objective.py FILE.npz [--backend …]``.

The file's name says which objective it is (carp…, dino…, ibot…, mocov3…, mmc…, sinkhorn…). Prints JSON with the largest relative errors:
``max_loss_error`` of losses and their parts, ``max_gradient_error`` of gradients and updated centres, relative to each array's greatest
value (sinkhorn: of the entropy of an assignment, and of the assignments). Files of several ranks run one gloo process per rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from massl_fast.data.torchvision_loader import worker_arguments
from massl_fast.kernels import contrast, memory_readout, partition_consistency, prototype_cross_entropy, sinkhorn_bias

Stored = dict[str, Tensor]
Figures = dict[str, Tensor]
BACKENDS = ("reference", "streaming", "triton")


def replay(path: str | Path, *, backend: str = "streaming", dtype: torch.dtype | None = None) -> dict[str, float]:
    """Errors of one file; in float64 unless the backend is Triton's, which has float32."""
    path = Path(path)
    known = [name for name in REPLAYS if path.name.startswith(name)]
    if not known:
        raise ValueError(f"The name of {path} begins with none of {', '.join(REPLAYS)}, so it does not say which objective it is.")
    dtype = dtype or (torch.float32 if backend == "triton" else torch.float64)
    stored = load(path)
    ranks = len(stored["student"]) if stored.get("student", torch.empty(0)).ndim == 4 and known[0] == "carp" else 1
    ranks = len(stored["query"]) if known[0] == "mocov3" else ranks
    if ranks == 1:
        found = REPLAYS[known[0]](stored, backend, dtype)
    else:
        found = _on_ranks(ranks, path, known[0], backend, dtype)
    expected = stored | {name: value for name, value in found.items() if name.startswith("expected_")}
    errors: dict[str, float] = {"max_loss_error": 0.0, "max_gradient_error": 0.0}
    for name, value in found.items():
        if name.startswith("expected_"):
            continue
        truth = expected.get(f"expected_{name}", expected.get(name)).double()
        is_loss = name.startswith(("loss", "consistency", "entropy"))
        key = "max_loss_error" if is_loss else "max_gradient_error"
        error = (
            ((value.double() - truth).abs() / truth.abs()).max() if is_loss else (value.double() - truth).abs().max() / truth.abs().max()
        )
        errors[key] = max(errors[key], error.item())
    return errors


def load(path: Path) -> Stored:
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(np.array(file[name], order="C")) for name in file.files if file[name].dtype.kind in "fib"}


def _on_ranks(ranks: int, path: Path, name: str, backend: str, dtype: torch.dtype) -> Figures:
    """Figures of all ranks, stacked: this process is rank 0, and the others come from the server that workers of loaders are forked from,
    which imports PyTorch once for all files.
    """
    context = worker_arguments()["multiprocessing_context"]
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, path, name, backend, dtype, folder)
        others = [context.Process(target=_rank, args=(rank, *given)) for rank in range(1, ranks)]
        for process in others:
            process.start()
        _rank(0, *given)
        for process in others:
            process.join()
        parts = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _rank(rank: int, ranks: int, path: Path, name: str, backend: str, dtype: torch.dtype, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=3))
    try:
        torch.save(REPLAYS[name](load(path), backend, dtype, rank), f"{folder}/{rank}.pt")
        dist.barrier()  # so that no rank leaves while another still reads from it
    finally:
        dist.destroy_process_group()


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def _leaf(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).clone().requires_grad_()


def _prototypes(stored: Stored, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's prototypes C = g·v/|v| (or C itself where the file has no v and g), and the tensors whose gradients are stored."""
    if "student_weight_v" not in stored:
        keys = _leaf(stored["student_prototypes"], dtype)
        return keys, {"grad_prototypes": keys}
    v, g = _leaf(stored["student_weight_v"], dtype), _leaf(stored["student_weight_g"], dtype)
    keys = g * F.normalize(v, dim=1)
    return keys, {"grad_prototypes": keys, "grad_weight_v": v, "grad_weight_g": g}


def _gradients(loss: Tensor, of: dict[str, Tensor]) -> Figures:
    return dict(zip(of, torch.autograd.grad(loss, list(of.values()))))


def carp(stored: Stored, backend: str, dtype: torch.dtype, rank: int | None = None) -> Figures:
    student, teacher = stored["student"], stored["teacher"]
    if rank is not None:
        student, teacher = student[rank], teacher[rank]
    student = _leaf(student, dtype)
    keys, leaves = _prototypes(stored, dtype)
    result = partition_consistency(
        student,
        teacher.to(dtype),
        keys,
        stored["teacher_prototypes"].to(dtype),
        block_size=int(stored["block_size"]),
        partition=stored["permutation"],
        clamp=float(stored["eps"]),
        sum_over_ranks=None if rank is None else _sum_over_ranks,
        backend=backend,
    )
    gradients = _gradients(result.loss, {"grad_student": student} | leaves)
    return {name: value.detach() for name, value in result._asdict().items()} | gradients


def dino(stored: Stored, backend: str, dtype: torch.dtype) -> Figures:
    teacher_keys = stored["teacher_prototypes"].to(dtype)
    momentum, center = float(stored["center_momentum"]), stored["center"][0].to(dtype)
    steps: list[Figures] = []
    centers = [center]
    for student, teacher, teacher_temp in zip(stored["student"], stored["teacher"].to(dtype), stored["teacher_temp"].tolist()):
        student = _leaf(student, dtype)
        keys, leaves = _prototypes(stored, dtype)
        result = prototype_cross_entropy(
            student,
            teacher,
            keys,
            teacher_keys,
            key_bias=-center / teacher_temp,
            student_temp=float(stored["student_temp"]),
            teacher_temp=teacher_temp,
            backend=backend,
        )
        steps.append({"loss": result.loss.detach()} | _gradients(result.loss, {"grad_student": student} | leaves))
        center = momentum * center + (1 - momentum) * (teacher_keys @ teacher.mean((0, 1)))
        centers.append(center)
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]} | {"center": torch.stack(centers)}


def ibot(stored: Stored, backend: str, dtype: torch.dtype) -> Figures:
    def floats(name: str) -> Tensor:
        return stored[name].to(dtype)

    student, patches = _leaf(stored["student"], dtype), _leaf(stored["student_patch"], dtype)
    keys, patch_keys = _leaf(stored["student_prototypes"], dtype), _leaf(stored["student_patch_prototypes"], dtype)
    teacher, teacher_patches = floats("teacher"), floats("teacher_patch")
    student_temp, teacher_temp, patch_temp = (float(stored[f"{name}_temp"]) for name in ("student", "teacher", "teacher_patch"))
    cls = prototype_cross_entropy(
        student,
        teacher,
        keys,
        floats("teacher_prototypes"),
        key_bias=-floats("center_before") / teacher_temp,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        backend=backend,
    )
    mask = stored["mask"].flatten(2)  # [2, N, P]
    weight = mask.to(dtype) / mask.sum(-1, keepdim=True).clamp_min(1) / mask.shape[:2].numel()
    patch = prototype_cross_entropy(
        patches[mask],
        teacher_patches[mask],
        patch_keys,
        floats("teacher_patch_prototypes"),
        key_bias=-floats("center2_before") / patch_temp,
        student_temp=student_temp,
        teacher_temp=patch_temp,
        pairs="same row",
        row_weight=weight[mask],
        backend=backend,
    )
    loss_cls, loss_patch = float(stored["lambda1"]) * cls.loss, float(stored["lambda2"]) * patch.loss
    loss = loss_cls + loss_patch
    of = dict(grad_student=student, grad_student_patch=patches, grad_prototypes=keys, grad_patch_prototypes=patch_keys)
    centers = {}
    for number, rows, its_keys in (("", teacher, "teacher_prototypes"), ("2", teacher_patches, "teacher_patch_prototypes")):
        momentum, mean = float(stored[f"center_momentum{number}"]), rows.flatten(0, -2).mean(0)
        centers[f"center{number}_after"] = momentum * floats(f"center{number}_before") + (1 - momentum) * floats(its_keys) @ mean
    losses = dict(loss=loss.detach(), loss_cls=loss_cls.detach(), loss_patch=loss_patch.detach())
    return losses | _gradients(loss, of) | centers


def mocov3(stored: Stored, backend: str, dtype: torch.dtype, rank: int | None = None) -> Figures:
    """Query of view a against keys of the other view, of all ranks; both directions, times 2τ."""
    temperature = float(stored["temperature"])
    query, key = _leaf(stored["query"][rank or 0], dtype), stored["key"][rank or 0].to(dtype)
    images = query.shape[1]
    keys = [key]
    if rank is not None:
        keys = [torch.empty_like(key) for _ in range(dist.get_world_size())]
        dist.all_gather(keys, key)
    key = torch.cat(keys, 1)  # [2, W·N, D]
    own = torch.arange(images) + (rank or 0) * images
    loss = sum(contrast(query[a], key[1 - a], own, temperature=temperature, backend=backend).loss for a in range(2))
    loss = 2 * temperature * loss
    found = {"loss": loss.detach()} | _gradients(loss, {"grad_query": query})
    return found if rank is not None else {name: value[None] for name, value in found.items()}


def mmc(stored: Stored, backend: str, dtype: torch.dtype) -> Figures:
    one_rank = {"query": stored["query"][None], "key": stored["key"][None], "temperature": stored["temperature"]}
    cls = mocov3(one_rank, backend, dtype)
    found = {"loss_cls": cls["loss"][0], "grad_query": cls["grad_query"][0]}
    temperature = float(stored["temperature"])
    views, images, patches, _ = stored["patch_query"].shape
    image = torch.arange(images)[:, None].expand(images, patches).flatten()
    for suffix in ("", "_masked"):
        query, key = _leaf(stored["patch_query"], dtype), stored["patch_key"].to(dtype)
        counted = stored["token_mask"] if suffix else torch.ones_like(stored["token_mask"])
        loss = torch.zeros((), dtype=dtype)
        for a in range(views):
            rows = counted[a].flatten()
            part = contrast(
                query[a].flatten(0, 1)[rows],
                key[a].flatten(0, 1),
                torch.arange(images * patches)[rows],
                temperature=temperature,
                row_group=image[rows],
                key_group=image,
                row_weight=torch.full((int(rows.sum()),), 1 / int(counted.sum()), dtype=dtype),
                backend=backend,
            )
            loss = loss + part.loss
        found |= {f"loss_patch{suffix}": loss.detach()} | _gradients(loss, {f"grad_patch_query{suffix}": query})
    reconstruction, mask = _leaf(stored["reconstruction"], dtype), stored["pixel_mask"].expand_as(stored["reconstruction"])
    loss = (reconstruction - stored["image"].to(dtype)).abs()[mask].mean()
    return found | {"loss_pixel": loss.detach()} | _gradients(loss, {"grad_reconstruction": reconstruction})


def sinkhorn(stored: Stored, backend: str, dtype: torch.dtype) -> Figures:
    """The assignments as the loss uses them: softmax with a bias per key, read out with one-hot values."""
    keys, rows = stored["prototypes"].to(dtype), stored["rows"].to(dtype)
    joined = torch.cat((rows, stored["queue"].to(dtype)))
    found = {}
    for name, given, temperature in (("dinov2", rows, "teacher_temp"), ("swav", joined, "epsilon")):
        temperature = float(stored[temperature])
        bias = sinkhorn_bias(given, keys, temperature=temperature, iterations=int(stored["iterations"]), backend=backend)
        one_hot = torch.eye(len(keys), dtype=dtype)
        assignment, _ = memory_readout(
            rows, keys, values=one_hot, key_bias=bias, block_size=len(keys), temperature=temperature, backend=backend
        )
        found[f"assignment_{name}"] = assignment
        found[f"entropy_{name}"] = torch.special.entr(assignment).sum(-1).mean()
        found[f"expected_entropy_{name}"] = torch.special.entr(stored[f"assignment_{name}"]).sum(-1).mean()
    return found


REPLAYS: dict[str, Callable[..., Figures]] = dict(carp=carp, dino=dino, ibot=ibot, mocov3=mocov3, mmc=mmc, sinkhorn=sinkhorn)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Replay stored figures of a published loss.")
    parser.add_argument("file")
    parser.add_argument("--backend", choices=BACKENDS, default="streaming")
    parser.add_argument("--dtype", choices=("float64", "float32"), help="float64, but float32 where the backend is triton")
    arguments = parser.parse_args()
    try:
        errors = replay(arguments.file, backend=arguments.backend, dtype=arguments.dtype and getattr(torch, arguments.dtype))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(json.dumps(errors, indent=1))
