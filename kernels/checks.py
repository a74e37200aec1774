"""Checks of the public functions' arguments. None of them reads a value of a GPU tensor, unless MASSL_FAST_CHECK_PARTITION=1 is set."""

import math
import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from massl_fast.kernels.loss import count_pairs
from massl_fast.kernels.shuffle import check_step

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CHECK_PARTITION = "MASSL_FAST_CHECK_PARTITION"


def check_plain_tensors(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        if hasattr(tensor, "device_mesh"):
            raise ValueError(
                "The kernels work on plain tensors; found a DTensor. Pass tensor.to_local() of a replicated tensor, or gather it "
                "with tensor.full_tensor() first."
            )


def check_views(student: Tensor, teacher: Tensor, memory: Tensor, of: str = "memory") -> None:
    for name, views in (("student", student), ("teacher", teacher)):
        if views.ndim != 3:
            raise ValueError(f"{name} must be [views, images, width]; found shape {list(views.shape)}.")
        check_rows(name, views, memory, of)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher must hold the same images; found {student.shape[1]} and {teacher.shape[1]} of them "
            f"(shapes {list(student.shape)} and {list(teacher.shape)})."
        )
    if count_pairs(student.shape[0], teacher.shape[0]) == 0 or student.shape[1] == 0:
        raise ValueError(
            "There is no pair of different views to compare: teacher view j is the same crop as student view j; found shapes "
            f"{list(student.shape)} and {list(teacher.shape)}. Pass at least two student views or two teacher views, and an image."
        )


def check_rows(name: str, rows: Tensor, memory: Tensor, of: str = "memory") -> None:
    """Check rows and the entries that they read; ``of`` is the name of the argument that holds the entries."""
    if memory.ndim != 2 or memory.dtype not in DTYPES:
        raise ValueError(
            f"{of} must be [entries, width] of float32, bfloat16, float16 or float64; found {memory.dtype} of shape {list(memory.shape)}."
        )
    if rows.ndim < 1 or rows.shape[-1] != memory.shape[1]:
        raise ValueError(f"{name} must be as wide as the {of}, {memory.shape[1]}; found shape {list(rows.shape)}.")
    if rows.dtype != memory.dtype:
        raise ValueError(
            f"{name} must have the {of}'s dtype, {memory.dtype}; found {rows.dtype}. Cast one of them, or call under autocast."
        )
    if rows.device != memory.device:
        raise ValueError(f"{name} must lie on the {of}'s device, {memory.device}; found {rows.device}.")


def check_prototypes(student: Tensor, teacher: Tensor, prototypes: Tensor, teacher_prototypes: Tensor) -> None:
    for name, rows in (("student", student), ("teacher", teacher)):
        check_rows(name, rows, prototypes, "prototypes")
    if teacher_prototypes.shape != prototypes.shape:
        raise ValueError(
            f"teacher_prototypes must have the shape of the prototypes, {list(prototypes.shape)}; found {list(teacher_prototypes.shape)}."
        )
    check_rows("teacher_prototypes", teacher_prototypes, prototypes, "prototypes")
    if prototypes.shape[0] == 0:
        raise ValueError("prototypes must hold at least one entry; found none.")


def check_blocks(memory: Tensor, block_size: int, of: str = "memory") -> None:
    if not isinstance(block_size, (int, torch.SymInt)) or isinstance(block_size, bool) or not 1 <= block_size <= memory.shape[0]:
        raise ValueError(f"block_size must be an integer between 1 and the {memory.shape[0]} entries of the {of}; found {block_size!r}.")
    if memory.shape[0] >= 2**31:
        raise ValueError(f"{of} must hold fewer than 2**31 entries; found {memory.shape[0]}.")


def check_temperature(name: str, value: float | Tensor, memory: Tensor) -> float | Tensor:
    """Return the temperature as a number, or as a 0-d tensor whose value stays unread.

    Compiled code gets a tensor in any case: an op's float argument is a constant of the graph, so a schedule would recompile every
    step, while a product of a tensor and a number stays symbolic.
    """
    wide = torch.float64 if memory.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name} must be a number or a float tensor of one element; found {value.dtype} of shape {list(value.shape)}.")
        if value.device != memory.device:
            raise ValueError(f"{name} must lie on the memory's device, {memory.device}; found {value.device}.")
        return value.detach().reshape(()).to(wide)
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number; found {value!r}.")
    return torch.ones((), device=memory.device, dtype=wide) * value if torch.compiler.is_compiling() else value


def check_partition(partition: Tensor | None, step: int | Tensor, memory: Tensor) -> int | Tensor:
    """Check shape, dtype and device of partition and step; return the step as an integer or a 0-d tensor."""
    if partition is not None:
        if not isinstance(partition, Tensor) or partition.dtype not in (torch.int32, torch.int64):
            found = partition.dtype if isinstance(partition, Tensor) else type(partition).__name__
            raise ValueError(f"partition must be an int32 or int64 tensor; found {found}.")
        if partition.shape != memory.shape[:1]:
            raise ValueError(
                f"partition must name each of the {memory.shape[0]} entries of the memory once; found shape {list(partition.shape)}."
            )
        if partition.device != memory.device:
            raise ValueError(f"partition must lie on the memory's device, {memory.device}; found {partition.device}.")
    if not isinstance(step, Tensor):
        return step
    if partition is None and step.device != memory.device:
        raise ValueError(f"step must be an integer or lie on the memory's device, {memory.device}; found {step.device}.")
    return check_step(step)


def check_permutation(partition: Tensor) -> None:
    """Check that each entry is named once: always on the CPU; on a GPU, where the host would wait, if MASSL_FAST_CHECK_PARTITION=1."""
    if torch.compiler.is_compiling() or (partition.device.type != "cpu" and os.environ.get(CHECK_PARTITION) != "1"):
        return
    entries = partition.shape[0]
    indices = partition.long()
    if bool(((indices < 0) | (indices >= entries)).any()):
        raise ValueError(f"partition must hold values from 0 to {entries - 1}; found {int(indices.min())} to {int(indices.max())}.")
    named = torch.zeros(entries, dtype=torch.bool, device=partition.device)
    named[indices] = True
    if not bool(named.all()):
        raise ValueError(
            f"partition must be a permutation; found {int((~named).sum())} of {entries} entries never named and others named twice."
        )


def check_values(values: Tensor | None, memory: Tensor) -> None:
    if values is None:
        return
    if values.ndim != 2 or values.shape[0] != memory.shape[0]:
        raise ValueError(
            f"values must hold a row for each of the {memory.shape[0]} entries of the memory; found shape {list(values.shape)}."
        )
    if values.dtype != memory.dtype or values.device != memory.device:
        raise ValueError(
            f"values must have the memory's dtype and device, {memory.dtype} on {memory.device}; found {values.dtype} on {values.device}."
        )


def check_key_bias(key_bias: Tensor | None, memory: Tensor) -> None:
    if key_bias is None:
        return
    if key_bias.shape != memory.shape[:1] or not key_bias.is_floating_point():
        raise ValueError(
            f"key_bias must be a float tensor with a number for each of the {memory.shape[0]} entries; found {key_bias.dtype} of shape "
            f"{list(key_bias.shape)}."
        )
    if key_bias.device != memory.device:
        raise ValueError(f"key_bias must lie on the memory's device, {memory.device}; found {key_bias.device}.")


def check_groups(row_group: Tensor | None, key_group: Tensor | None, rows: Tensor, memory: Tensor) -> None:
    if row_group is None and key_group is None:
        return
    if row_group is None or key_group is None:
        raise ValueError("row_group and key_group go together; found one of them. Pass both, or neither.")
    for name, group, shape in (("row_group", row_group, rows.shape[:-1]), ("key_group", key_group, memory.shape[:1])):
        if group.dtype not in (torch.int32, torch.int64) or group.shape != shape:
            raise ValueError(
                f"{name} must be an int32 or int64 tensor of shape {list(shape)}; found {group.dtype} of shape {list(group.shape)}."
            )
        if group.device != memory.device:
            raise ValueError(f"{name} must lie on the memory's device, {memory.device}; found {group.device}.")


def check_of_rows(name: str, tensor: Tensor, rows: Tensor, blocks: int) -> None:
    """Check a tensor that has one number per row, or one per row and block."""
    shapes = (rows.shape[:-1], (*rows.shape[:-1], blocks))
    if tensor.shape not in shapes or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a float tensor of shape {list(shapes[0])} or {list(shapes[1])}; found {tensor.dtype} of shape "
            f"{list(tensor.shape)}."
        )
    if tensor.device != rows.device:
        raise ValueError(f"{name} must lie on the rows' device, {rows.device}; found {tensor.device}.")


def check_row_values(row_values: Tensor, rows: Tensor) -> None:
    if row_values.ndim != rows.ndim or row_values.shape[:-1] != rows.shape[:-1] or not row_values.is_floating_point():
        raise ValueError(
            f"row_values must be a float tensor of shape {[*rows.shape[:-1], 'Dv']}; found {row_values.dtype} of shape "
            f"{list(row_values.shape)}."
        )
    if row_values.device != rows.device:
        raise ValueError(f"row_values must lie on the rows' device, {rows.device}; found {row_values.device}.")


def check_row_weight(row_weight: Tensor, rows: Tensor) -> None:
    if row_weight.shape != rows.shape[:-1] or not row_weight.is_floating_point():
        raise ValueError(
            f"row_weight must be a float tensor with a number for each row, {list(rows.shape[:-1])}; found {row_weight.dtype} of shape "
            f"{list(row_weight.shape)}."
        )
    if row_weight.device != rows.device:
        raise ValueError(f"row_weight must lie on the rows' device, {rows.device}; found {row_weight.device}.")


def check_own(own: Tensor, query: Tensor, key: Tensor) -> None:
    if own.dtype not in (torch.int32, torch.int64) or own.shape != query.shape[:-1]:
        raise ValueError(
            f"own must be an int32 or int64 tensor with a key for each query, {list(query.shape[:-1])}; found {own.dtype} of shape "
            f"{list(own.shape)}."
        )
    if own.device != query.device:
        raise ValueError(f"own must lie on the queries' device, {query.device}; found {own.device}.")
    # Where the host would wait, or where there are no values (shapes alone), they are not looked at.
    readable = own.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(own, FakeTensor)
    if readable and bool(((own < 0) | (own >= key.shape[0])).any()):
        raise ValueError(f"own must hold values from 0 to {key.shape[0] - 1}; found {int(own.min())} to {int(own.max())}.")
