"""Kill a run of each objective with SIGKILL at random moments, resume it, and compare its metrics with a run that was left alone.

``python tests/objectives/kill_each.py [KILLS [NAME …]]`` prints what it compared and exits with 1 where anything differs. Runs are forks of
one process that has imported everything, so that moments are those of a run and not of its imports.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from kill_and_resume import last_step, repeatable
from massl_fast.engine.trainer import Trainer
from small import CPU, OBJECTIVES, World, settings_of
from small_images import write_images

STEPS = 16


def train(name: str, workplace: Path, folder: Path) -> None:
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        config = settings_of(
            name, workplace, train={"steps": STEPS + 4, "stop_at_step": STEPS}, checkpoint={"every_steps": 3}, run={"seed": 5}
        )
        config.run.folder = str(folder)
        Trainer(config, World(0, 1, 0, CPU)).run()


def run_until(stop: Callable[[], bool], *arguments) -> int:
    """Train in a process of its own, killed when ``stop``; its exit code, below 0 where it was killed."""
    process = multiprocessing.get_context("fork").Process(target=train, args=arguments)
    process.start()
    while process.is_alive() and not stop():
        time.sleep(0.005)
    process.kill()
    process.join()
    return process.exitcode


def moments(folder: Path, kills: int, generator: random.Random) -> Iterator[Callable[[], bool]]:
    """Every other kill comes as a run starts, the others a little after a random row that is yet to come."""
    for number in range(kills):
        reached, seconds = last_step(folder), generator.uniform(0, 1 if number % 2 else 0.05)
        row = -1 if number % 2 else generator.randint(min(reached + 1, STEPS - 3), STEPS - 3)
        met: list[float] = []

        def stop(row=row, seconds=seconds, met=met) -> bool:
            if not met and last_step(folder) >= row:
                met.append(time.monotonic())
            return bool(met) and time.monotonic() - met[0] > seconds

        yield stop


def compare(name: str, kills: int, workplace: Path, generator: random.Random) -> str:
    """Returns a sentence; AssertionError where the metrics differ."""
    whole, killed, reached = workplace / f"{name}-whole", workplace / f"{name}-killed", []
    assert run_until(lambda: False, name, workplace, whole) == 0, f"{name}: the run that was left alone failed"
    for stop in moments(killed, kills, generator):
        code = run_until(stop, name, workplace, killed)
        assert code in (0, -9), f"{name}: a run that was to be killed ended with {code}"
        reached.append(last_step(killed) if code else "none")
    assert run_until(lambda: False, name, workplace, killed) == 0, f"{name}: the run did not come to its end after the kills"
    expected, found = repeatable(whole), repeatable(killed)
    assert len(expected) == STEPS and expected == found, f"{name}, kills after steps {reached}: {expected} != {found}"
    return f"{name}: {kills} kills, after steps {reached}: all {STEPS} rows of metrics.jsonl equal, bit for bit"


def main(kills: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", classes=2, per_class=16)
        for name in names or OBJECTIVES:
            print(compare(name, kills, Path(folder), generator), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2:])
