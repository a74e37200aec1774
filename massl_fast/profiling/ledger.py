"""Who holds memory at every moment of a step: each storage that PyTorch's operators make, when it comes, when it goes, and whose it is.

A dispatch mode sees every operator, on real tensors as on fake ones (shapes alone), so that an estimate and a measurement are read off the
same book. What an operator takes and gives back inside itself is not seen; ``memory_cross_entropy`` and ``memory_readout`` of the kernels
are therefore taken apart, where their implementation is plain PyTorch.
"""

from __future__ import annotations

import contextlib
import re
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from massl_fast.engine import phases
from massl_fast.engine.phases import END
from massl_fast.kernels.operators import implementation
from massl_fast.profiling.source_lines import calling_line
from massl_fast.profiling.synthetic import SyntheticRun

CATEGORIES = (
    "student weights",
    "teacher weights",
    "optimizer state",
    "memory (ring)",
    "crops",
    "gradients",
    "activations",
    "loss",
    "workspace",
)
WEIGHTS, TEACHER, OPTIMIZER, MEMORY, CROPS, GRADIENTS, ACTIVATIONS, LOSS, WORKSPACE = CATEGORIES


@dataclass
class Piece:
    """One storage."""

    bytes: int
    section: str
    part: str
    """Part of the network: block 3, head, …; empty outside a network."""
    operator: str
    line: str
    """File and line that made it (while autograd runs, those that called it); empty for what was there before."""
    shape: tuple[int, ...]
    role: str = ""
    """A category known otherwise than from its section."""
    saved: bool = False
    """Kept for the backward pass."""
    born: int = 0
    """Number of the step in which it came."""

    @property
    def category(self) -> str:
        if self.role:
            return self.role
        if self.section == phases.LOSS:
            return LOSS
        if self.saved:
            return ACTIVATIONS
        return WORKSPACE

    @property
    def owner(self) -> str:
        """Category, and for activations the part of the network."""
        return f"{self.category}: {self.part}" if self.category == ACTIVATIONS and self.part else self.category


@dataclass(frozen=True)
class Change:
    """A storage comes (``sign`` 1) or goes (−1)."""

    seconds: float
    section: str
    piece: Piece
    sign: int


class Ledger(TorchDispatchMode):
    """The book of one or more steps; enter it around them. ``rounding``: allocations take multiples of this many bytes.

    ``hidden(operator, arguments by name)`` gives the bytes that an operator takes and gives back inside itself; None: the kernels'
    operators are taken apart instead, and of others nothing is known.

    ``observe`` is an observer for ``sections.marked``.
    """

    def __init__(self, student: nn.Module, *, rounding: int = 1, hidden: Callable[[OpOverload, dict[str, Any]], int] | None = None):
        super().__init__()
        self.rounding, self.hidden = rounding, hidden
        self.changes: list[Change] = []
        self.ends: list[int] = []
        """How many changes there were at the end of each step."""
        self.section, self.part, self.number = phases.REST, "", 0
        self._pieces: dict[int, Piece] = {}  # of living storages, by the address of their implementation
        self._references: dict[int, weakref.ref] = {}
        self._student, self._undo = student, contextlib.ExitStack()
        self._start = time.perf_counter()
        self.on_backward_end = lambda: None
        """Called when the gradients are complete, before they are used."""

    def __enter__(self) -> Ledger:
        for name, module in self._student.named_modules():
            if part := part_of(name):
                self._undo.callback(module.register_forward_pre_hook(lambda *_, part=part: self._enter_part(part)).remove)
        self._undo.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor))
        super().__enter__()
        return self

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._undo.close()

    def know(self, role: str, tensors: Iterable[Tensor]) -> None:
        """Storages that are there already, or that turn out to be of a role."""
        for tensor in tensors:
            self._see(tensor, "", role)

    def observe(self, section: str) -> None:
        if section == phases.CLIP:
            self.on_backward_end()
        if section == phases.BACKWARD:
            # Also what a recomputed part keeps as its argument, which autograd's hooks do not see.
            for piece in self._pieces.values():
                piece.saved |= piece.section == phases.STUDENT
        if section == phases.TEACHER or section == phases.STUDENT:
            self.part = "embedding"
        elif section in (phases.LOSS, phases.CLIP):
            self.part = ""
        if section == END:
            self.number += 1
            self.ends.append(len(self.changes))
        self.section = section or phases.REST

    def living(self) -> dict[int, Piece]:
        """Storages that are there now, by the address of their implementation (``_cdata``)."""
        return dict(self._pieces)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "massl_fast" and self.hidden is None and (inside := implementation(func)) is not None:
            with self._nested():
                return inside(*args, **kwargs)
        operator = str(func).removesuffix(".default")
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf, operator)
        if self.hidden is not None and (size := self.hidden(func, kwargs | dict(zip((a.name for a in func._schema.arguments), args)))):
            inside = Piece(size, self.section, self.part, f"inside {operator}", calling_line(), ())
            self._note(inside, 1)
            self._note(inside, -1)
        return out

    @contextlib.contextmanager
    def _nested(self):
        """See operators inside an operator."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _enter_part(self, part: str) -> None:
        if self.section in (phases.STUDENT, phases.TEACHER):
            self.part = part

    def _save(self, tensor: Tensor) -> Tensor:
        piece = self._pieces.get(tensor.untyped_storage()._cdata)
        if piece is not None:
            piece.saved = True
        return tensor

    def _see(self, tensor: Tensor, operator: str, role: str = "") -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._pieces:
            if role:
                self._pieces[key].role = role
            return
        size = -(-storage.nbytes() // self.rounding) * self.rounding
        if size == 0:
            return
        line = "" if role else calling_line()
        piece = Piece(size, self.section, self.part, operator, line, tuple(tensor.shape), role, born=self.number)
        self._pieces[key] = piece
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._note(piece, 1)

    def _forget(self, key: int) -> None:
        self._references.pop(key, None)
        self._note(self._pieces.pop(key), -1)

    def _note(self, piece: Piece, sign: int) -> None:
        self.changes.append(Change(time.perf_counter() - self._start, self.section, piece, sign))


def holdings(run: SyntheticRun) -> dict[str, list[Tensor]]:
    """What there is before a step begins, by category."""
    step = run.train_step
    return {
        WEIGHTS: [*step.pair.student.parameters(), *step.pair.student.buffers()],
        TEACHER: [*step.pair.teacher.parameters(), *step.pair.teacher.buffers()],
        MEMORY: list(step.objective.buffers()),
        OPTIMIZER: [v for state in step.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)],
        CROPS: [crop for crops in run.crop_sets for micro_batch in crops for crop in micro_batch],
    }


def record_steps(
    run: SyntheticRun, book: Ledger, steps: int = 1, around: Callable[[], AbstractContextManager] = contextlib.nullcontext
) -> None:
    """Take steps with a book open, each inside a context of its own."""
    book.on_backward_end = lambda: book.know(GRADIENTS, [p.grad for _, p in run.train_step.parameters])
    with run.observed(book.observe), book:
        for role, tensors in holdings(run).items():
            book.know(role, tensors)
        for _ in range(steps):
            with around():
                run.step()


@dataclass
class Peak:
    """The moment of a book with most bytes."""

    bytes: int
    section: str
    seconds: float
    by_owner: dict[str, int]
    pieces: list[Piece]
    """Largest first."""
    last: Piece | None
    """The storage whose coming makes the peak."""

    @property
    def by_category(self) -> dict[str, int]:
        totals: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        for piece in self.pieces:
            totals[piece.category] += piece.bytes
        return totals


def find_peak(changes: list[Change]) -> Peak:
    heights = list(accumulate(change.sign * change.piece.bytes for change in changes))
    highest = max(heights, default=0)
    position = heights.index(highest) if heights else 0
    living: dict[int, Piece] = {}
    for change in changes[: position + 1]:
        if change.sign > 0:
            living[id(change.piece)] = change.piece
        else:
            living.pop(id(change.piece), None)
    pieces = sorted(living.values(), key=lambda piece: -piece.bytes)
    by_owner: dict[str, int] = defaultdict(int)
    for piece in pieces:
        by_owner[piece.owner] += piece.bytes
    at = changes[position] if changes else None
    return Peak(highest, at.section if at else "", at.seconds if at else 0.0, dict(by_owner), pieces, at.piece if at else None)


def highest_by_section(changes: list[Change]) -> dict[str, int]:
    """Most bytes at any moment of each part of a step that takes or gives back any, in the order in which the parts come; the rest last."""
    highest: dict[str, int] = {}
    total = 0
    for change in changes:
        before, total = total, total + change.sign * change.piece.bytes
        highest[change.section] = max(highest.get(change.section, 0), before, total)
    return {name: highest[name] for name in sorted(highest, key=lambda name: name == phases.REST)}


def timeline(changes: list[Change], points: int = 400) -> dict[str, Any]:
    """Bytes of each category over a book, thinned to about ``points`` moments, each the highest of its stretch: seconds, sections and
    a list per category."""
    levels = np.zeros((len(changes), len(CATEGORIES)), np.int64)
    for level, change in zip(levels, changes):
        level[CATEGORIES.index(change.piece.category)] = change.sign * change.piece.bytes
    levels = levels.cumsum(0)
    stretch = max(1, len(changes) // points)
    moments = [start + int(levels[start : start + stretch].sum(1).argmax()) for start in range(0, len(changes), stretch)]
    return {
        "seconds": [round(changes[moment].seconds, 6) for moment in moments],
        "sections": [changes[moment].section for moment in moments],
        "bytes": {category: [int(levels[moment, number]) for moment in moments] for number, category in enumerate(CATEGORIES)},
    }


def part_of(module_name: str) -> str:
    """Name of the part of an encoder that a module belongs to, as a report groups them; empty for containers."""
    name = module_name.removeprefix("module.").removeprefix("_orig_mod.")
    if name == "head" or name.startswith("head."):
        return "head"
    name = name.removeprefix("backbone.")
    if match := re.match(r"(?:blocks|layers|stages|layer\d+|stages\.\d+\.blocks)\.\d+", name):
        return match.group(0).replace("blocks.", "block ").replace("stages.", "stage ")
    if re.match(r"(patch_embed|conv1|stem|bn1|act1|maxpool|norm_pre|pos_drop)\b", name):
        return "embedding"
    if re.match(r"(norm|fc_norm|head|head_drop|global_pool|attn_pool)\b", name):
        return "pooling"
    return ""
