"""``massl-fast train``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from massl_fast.commands.recipe_choice import config_without_recipe
from massl_fast.config import Config, chosen_objective, config_text, describe_settings, load_config, recipe_names

if TYPE_CHECKING:
    from massl_fast.distributed.world import World

TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "massl-fast train [--recipe NAME|FILE] --data.train DATA [--section.key VALUE ...]"
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        default="",
        help=f"one of {', '.join(recipe_names())}, or the path of a YAML file; without one, the images and the machine choose",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and exit")
    # The settings to show depend on arguments that may follow, so help waits for all of them.
    parser.add_argument("-h", "--help", action="store_true", help="show this text, with the settings of the chosen objective, and exit")
    parser.set_defaults(parser=parser)


def print_help(args: argparse.Namespace) -> None:
    objective = chosen_objective(args.recipe, args.settings)
    args.parser.epilog = f"Settings, each --section.key VALUE:\n{describe_settings(objective)}"
    args.parser.print_help()
    args.parser.exit()


def print_notes(config: Config) -> None:
    for note in config.notes:
        print(f"massl-fast train: {note}", file=sys.stderr)


def report_writer(world: World) -> Callable[..., Path] | None:
    """What writes report.html; None where matplotlib is missing, which is said before the run rather than after."""
    try:
        from massl_fast.report.page import write_report
    except ValueError as missing:
        if world.is_main:
            print(f"massl-fast train: {missing} The run goes on without; `massl-fast report` writes it afterwards.", file=sys.stderr)
        return None
    return write_report


def kept_of(config: Config) -> str:
    """What a run that fails has kept, in a sentence."""
    if not (Path(config.run.folder) / "checkpoints" / "last").is_file():
        return "The run has no checkpoint yet, so there is nothing to continue from."
    return "What was trained until the last checkpoint is kept; the same command continues from it."


@contextlib.contextmanager
def explaining_out_of_memory(config: Config, world: World) -> Iterator[None]:
    """Turn the error of an allocator into ``OutOfMemory``, and leave a report in the run's folder."""
    from massl_fast.profiling.out_of_memory import is_out_of_memory, write_out_of_memory_report
    from massl_fast.run.exits import OutOfMemory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sentence = write_out_of_memory_report(config, world, config.run.folder)
        raise OutOfMemory(f"{sentence} {kept_of(config)}") from error


@contextlib.contextmanager
def explaining_a_full_disk(config: Config) -> Iterator[None]:
    """A ValueError in place of the error of a disk or a quota that is full; checkpoints and metrics lines have sentences of their own."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or config.run.folder
        raise ValueError(
            f"{place} could not be written: {error.strerror}. Make room there, or name another run.folder. {kept_of(config)}"
        ) from error


def run(args: argparse.Namespace) -> int:
    if args.help:
        print_help(args)
    config = load_config(args.recipe, args.settings) if args.recipe else config_without_recipe(args.settings)
    if args.print_config:
        print_notes(config)
        print(config_text(config), end="")
        return 0
    from massl_fast.distributed.heartbeat import end_process
    from massl_fast.distributed.signals import StopRequest
    from massl_fast.distributed.world import RanksDidNotMeet, join_world, leave_world
    from massl_fast.engine.trainer import Trainer
    from massl_fast.run.exits import Ended, Interrupted, OutOfMemory, RankLost

    try:
        world = join_world(config.train.device, config.parallel.timeout_seconds)
    except RanksDidNotMeet as error:
        print(f"massl-fast train: {error}", file=sys.stderr)
        return Interrupted.exit_code if error.stopped else 1
    if world.is_main:
        print_notes(config)
    stop = StopRequest(world)
    try:
        with explaining_a_full_disk(config), explaining_out_of_memory(config, world):
            if stop.at_start(world):
                raise Interrupted(f"Ended by {stop.name} before its first step, and nothing is lost; the same command goes on.")
            Trainer(config, world, report_writer(world)).run()
    except Ended as error:
        if world.size > 1 and isinstance(error, (RankLost, OutOfMemory)):
            end_process(str(error))  # leaving the process group would wait for the others
        if world.is_main:  # all ranks end so, one speaks
            print(f"massl-fast train: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if stop.noted is None or isinstance(error, ValueError):
            raise
        print(
            f"massl-fast train: Ended by {stop.name} and by what followed from it, most likely the end of a process that this one needed: "
            f"{type(error).__name__}: {error}. {kept_of(config)}",
            file=sys.stderr,
        )
        return Interrupted.exit_code
    finally:
        leave_world()
    return 0
