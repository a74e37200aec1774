"""Decodes every image once, in parallel, and lists those with problems.

The problems: ``unreadable``; ``tiny`` (a side shorter than --smallest); ``duplicate`` (the same bytes as another image); ``not_rgb``
(grey, palette, CMYK, alpha, 16-bit: converted in training) and ``rotated`` (by EXIF: turned upright in training). The list is what
``data.bad_files`` reads: training leaves out what is unreadable.
"""

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from massl_fast.data.bad_files import UNREADABLE
from massl_fast.data.decode import EncodedImage, UnreadableImage
from massl_fast.data.sources import Source

PROBLEMS = (UNREADABLE, "tiny", "duplicate", "not_rgb", "rotated")
IMAGES_A_TASK = 64
_held: Callable[[range], list]  # of a worker


def check_source(source: Source, *, smallest: int = 32, workers: int = 1, show_progress: bool = False) -> list[tuple[str, str, str]]:
    """(name, problem, detail) of every problem, in the order of the source and of ``PROBLEMS``."""
    found: list[tuple[int, str, str]] = []
    first_with: dict[bytes, int] = {}
    columns = (TextColumn("Checking"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns, disable=not show_progress) as progress:
        bar = progress.add_task("", total=len(source))
        for index, digest, problems in _examined(source, smallest, workers):
            original = first_with.setdefault(digest, index)
            if original != index:
                problems.append(("duplicate", f"the same bytes as {source.name(original)}"))
            found += [(index, *problem) for problem in problems]
            progress.advance(bar)
    found.sort(key=lambda row: (row[0], PROBLEMS.index(row[1])))
    return [(source.name(index), problem, detail) for index, problem, detail in found]


def _examined(source: Source, smallest: int, workers: int) -> Iterator[tuple[int, bytes, list[tuple[str, str]]]]:
    tasks = (range(begin, min(begin + IMAGES_A_TASK, len(source))) for begin in range(0, len(source), IMAGES_A_TASK))
    if workers == 1 or len(source) <= IMAGES_A_TASK:
        for task in tasks:
            yield from _examine_all(source, smallest, task)
        return
    # Not fork: the progress bar has a thread. Not forkserver: a process has one server, and the loader's is to hold PyTorch.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_hold, initargs=(source, smallest)) as pool:
        # A few tasks ahead and no more: a source of millions must not wait in a queue.
        waiting = deque((task, pool.submit(_examine_held, task)) for task in islice(tasks, 4 * workers))
        while waiting:
            task, future = waiting.popleft()
            try:
                yield from future.result()
            except BrokenProcessPool:
                raise ValueError(
                    f"A process ended while it checked images: its decoder crashed, or memory ran out. The image is {source.name(task[0])} "
                    "or one not far after it in the order of names. Move it away and check again, with fewer --workers if memory is short."
                ) from None
            waiting.extend((task, pool.submit(_examine_held, task)) for task in islice(tasks, 1))


def _hold(source: Source, smallest: int) -> None:
    global _held
    _held = partial(_examine_all, source, smallest)


def _examine_held(task: range) -> list:
    return _held(task)


def _examine_all(source: Source, smallest: int, task: Iterable[int]) -> list[tuple[int, bytes, list[tuple[str, str]]]]:
    return [(index, *_examine(source, smallest, index)) for index in task]


def _examine(source: Source, smallest: int, index: int) -> tuple[bytes, list[tuple[str, str]]]:
    """A digest of the image's bytes, and its own problems."""
    try:
        data = source.read(index)
    except OSError as error:
        return index.to_bytes(8, "big"), [(UNREADABLE, error.strerror or str(error))]
    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        image = EncodedImage(data, source.name(index))
        image.decode()
    except UnreadableImage as error:
        return digest, [(UNREADABLE, error.reason)]
    problems = []
    if min(image.width, image.height) < smallest:
        problems.append(("tiny", f"{image.width} × {image.height} pixels"))
    if image.mode != "RGB":
        problems.append(("not_rgb", f"{image.mode} {image.format}"))
    if image.orientation != 1:
        problems.append(("rotated", f"EXIF orientation {image.orientation}"))
    return digest, problems
