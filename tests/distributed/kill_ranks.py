"""Kill ranks of a two-process run with SIGKILL at random moments, let torchrun start it again, and compare with a run left alone.

``python tests/distributed/kill_ranks.py [KILLS]`` prints what it compared and exits with 1 where anything differs or hangs. The kills go
round: rank 1, rank 0, both, rank 0 while it saves; half of them come while the ranks start. Everything goes through ``torchrun`` and
``massl-fast train``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from two_ranks import SETTINGS

HANG_SECONDS = 300
START_SECONDS = 8
VICTIMS = ([1], [0], [0, 1], "saving")


def command(workplace: Path, folder: Path, *settings: str, restarts: int = 0) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    data = ["--data.train", str(workplace / "images"), "--run.folder", str(folder)]
    return [*launcher, "-m", "massl_fast", "train", "--recipe", str(workplace / "recipe.yaml"), *data, *settings]


def write_recipe(workplace: Path) -> None:
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(SETTINGS)))


def last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return json.loads(lines[-1])["step"] if lines else -1
    except json.JSONDecodeError:
        return -1


def rank_processes(launcher: int) -> dict[int, int]:
    """{rank: process id} of the children of a torchrun process that are trainers by now."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # gone meanwhile, or no trainer yet
            parent = int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("PPid:")))
            if parent == launcher:
                environment = dict(entry.partition("=")[::2] for entry in (status.parent / "environ").read_text().split("\0"))
                found[int(environment["RANK"])] = int(status.parent.name)
    return found


def wait_until(condition, launcher: subprocess.Popen) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        if launcher.poll() is not None:
            raise RuntimeError(f"The run ended with {launcher.returncode} before it was killed.")
        if time.monotonic() > deadline:
            raise RuntimeError(f"The run hangs: nothing happened for {HANG_SECONDS} s.")
        time.sleep(0.005)


def kill_once(arguments: list[str], folder: Path, step: int, victims) -> tuple[int, str]:
    """Run until ``step`` is logged, kill, let torchrun finish as it will; returns (exit code, what was said on stderr)."""
    log = folder.parent / f"stderr.{step}"
    with log.open("w") as stderr:
        launcher = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
    try:
        wait_until(lambda: len(rank_processes(launcher.pid)) == 2, launcher)
        processes = rank_processes(launcher.pid)
        # A step that an earlier attempt had logged already is a kill while the run starts: those count, too.
        wait_until(lambda: last_step(folder) >= step, launcher)
        if victims == "saving":
            wait_until(lambda: any((folder / "checkpoints").glob(".step_*.partial")) or last_step(folder) >= 19, launcher)
            victims = [0]
        for rank in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[rank], signal.SIGKILL)
        return launcher.wait(), log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


def compare(kills: int, workplace: Path, seed: int = 0) -> str:
    """Kill ranks of one torchrun that starts them again each time. Returns a sentence; AssertionError where metrics differ, RuntimeError
    where the run hangs.
    """
    from massl_fast.run.outputs import CLOCK_KEYS
    from small_images import write_images

    def rows(folder: Path) -> list[dict]:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in CLOCK_KEYS} for line in lines]

    write_images(workplace / "images", classes=2, per_class=14)
    write_recipe(workplace)
    steps = 20 + 4 * kills  # a kill while ranks start takes no step away, one while they train at most five
    length = ["--train.steps", str(steps + 4), "--train.stop_at_step", str(steps)]
    whole, killed = workplace / "whole", workplace / "killed"
    subprocess.run(command(workplace, whole, *length), check=True, stdout=subprocess.DEVNULL)
    log = workplace / "stderr"
    with log.open("w") as stderr:
        arguments = command(workplace, killed, *length, restarts=kills + 1)
        launcher = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
    try:
        moments = list(kill_again_and_again(launcher, killed, kills, random.Random(seed)))
        code = launcher.wait(HANG_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"The run hangs after {len(moments)} kills:\n{log.read_text()[-3000:]}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert code == 0, f"torchrun ended with {code}:\n{log.read_text()[-3000:]}"
    for expected, found in zip(rows(whole), rows(killed), strict=True):
        assert expected == found, f"step {expected['step']}: {expected} != {found}"
    starting = sum(moment == "starting" for moment in moments)
    return f"{kills} kills, {starting} of them while ranks started: all {steps} rows of metrics.jsonl equal, bit for bit, and no hang"


def kill_again_and_again(launcher: subprocess.Popen, folder: Path, kills: int, generator: random.Random) -> Iterator[str]:
    """Yields what the ranks were doing at each kill."""
    before: set[int] = set()

    def both_anew() -> bool:
        found = rank_processes(launcher.pid)
        return len(found) == 2 and not before & set(found.values())

    for number in range(kills):
        wait_until(both_anew, launcher)
        processes, victims = rank_processes(launcher.pid), VICTIMS[number % len(VICTIMS)]
        before = set(processes.values())
        moment = "starting"
        if generator.random() < 0.5:
            time.sleep(generator.uniform(0, START_SECONDS))
        else:
            # The last row may be of an attempt before: then the next one is waited for.
            reached, moment = last_step(folder), "training"
            wait_until(lambda reached=reached: last_step(folder) > reached, launcher)
            time.sleep(generator.uniform(0, 0.5))
        if victims == "saving":
            until = time.monotonic() + START_SECONDS
            wait_until(lambda: any((folder / "checkpoints").glob(".step_*.partial")) or time.monotonic() > until, launcher)  # noqa: B023
            victims = [0]
        for rank in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[rank], signal.SIGKILL)
        print(f"kill {number + 1}: ranks {victims} while {moment}, step {last_step(folder)}", file=sys.stderr, flush=True)
        yield moment


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        print(compare(int(sys.argv[1]) if len(sys.argv) > 1 else 10, Path(folder)))
