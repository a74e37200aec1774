"""`massl-fast eval all --plan FILE`: every protocol of a plan for which there is data, on features that are extracted once.

A plan is a YAML mapping from protocols to their settings, or to a list of settings where a protocol has several sets of data:

    knn: {train: /data/imagenet/train, test: /data/imagenet/val}
    linear:
      - {train: /data/imagenet/train, test: /data/imagenet/val}
      - {train: /data/pets/train, test: /data/pets/test, epochs: 50}
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from massl_fast.commands.eval import (
    add_common_arguments,
    demand_report,
    evaluate,
    folder_of,
    joined_world,
    load_named_plugins,
    print_table,
    subject_of,
    write_results,
)
from massl_fast.config import parsed_yaml
from massl_fast.data.sources import expand_braces
from massl_fast.distributed.world import World
from massl_fast.evaluation.base import Protocol, checked_settings
from massl_fast.evaluation.registry import protocol_named

DATA_SETTINGS = ("train", "test", "data", "validation", "subset", "test_subset")
SHIPPED = "massl_fast.recipes.plans"


class All:
    """The command. Imports the files that ``--plugin`` names in ``arguments``."""

    summary = "every protocol of a plan for which there is data"

    def __init__(self, arguments: list[str]) -> None:
        load_named_plugins(arguments)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.description = (
            "Every protocol of a plan, a YAML mapping from protocols to their settings. Features are extracted once per recipe.\n"
            "Data that is not there is skipped and named."
        )
        add_common_arguments(parser)
        parser.add_argument("--plan", required=True, metavar="FILE", help=f"the plan, or one that is shipped: {', '.join(shipped_plans())}")

    def run(self, args: argparse.Namespace) -> int:
        demand_report(args)
        planned, unfinished = planned_in(args.plan)
        found: list[dict[str, Any]] = []
        failed = False
        with joined_world(args) as world, _features_kept(args, world):
            say, out = world.is_main and not args.json, args.out if world.is_main else None
            for checkpoint in args.checkpoint:
                subject, info = subject_of(args, checkpoint, world)
                for number, protocol in enumerate(planned):
                    within = str(Path(folder_of(checkpoint, args.checkpoint), f"{number + 1}_{protocol.name}"))
                    try:
                        found.append(evaluate(protocol, subject, info, out, within))
                    except ValueError as error:  # the others may still be right
                        unfinished.append(f"{protocol.name} on {checkpoint}: {error}")
                        failed = True
                        continue
                    if say:
                        print_table(found[-1])
        for sentence in unfinished if say else []:
            print(sentence)
        if out is not None:
            page = write_results(out, found, unfinished)
            if say:
                print(f"Report: {page}")
        if args.json and world.is_main:
            print(json.dumps({"results": found, "unfinished": unfinished}))
        return 2 if failed or not found else 0


def shipped_plans() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in resources.files(SHIPPED).iterdir() if path.name.endswith(".yaml"))


def planned_in(plan: str) -> tuple[list[Protocol], list[str]]:
    """(protocols with their settings, in the order of the plan; sentences on what is skipped because its data is not there).

    Raises ValueError for a plan that cannot be read, protocols that do not exist and settings that do not fit.
    """
    if plan in shipped_plans():
        text = resources.files(SHIPPED).joinpath(f"{plan}.yaml").read_text(encoding="utf-8")
    elif Path(plan).is_file():
        try:
            text = Path(plan).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"The plan {plan} cannot be read: {error}.") from None
    else:
        raise ValueError(f"There is no plan {plan}. Give the path of a YAML file, or one of {', '.join(shipped_plans())}.")
    content = parsed_yaml(text, f"The plan {plan}")
    if not isinstance(content, dict) or not content:
        raise ValueError(f"The plan {plan} must be a mapping from protocols to their settings.")
    planned, skipped = [], []
    for name, entries in content.items():
        kind = protocol_named(str(name))
        for values in entries if isinstance(entries, list) else [entries]:
            if not isinstance(values, dict):
                raise ValueError(f"The plan {plan} gives {name} {values!r}; it must be a mapping of settings, or a list of such.")
            settings = checked_settings(values, kind.Settings, f"{name}.{{}}".format)
            if absent := [path for path in _paths_of(settings) if not _is_there(path)]:
                skipped.append(f"Skipped: {name} needs {' and '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not there.")
            else:
                planned.append(kind(settings))
    return planned, skipped


def _paths_of(settings: Any) -> list[str]:
    values = {name: getattr(settings, name, None) for name in DATA_SETTINGS}
    # A validation of 0.1 is a share, not a path.
    return [str(value) for name, value in values.items() if value and not (name == "validation" and _is_number(str(value)))]


def _is_there(path: str) -> bool:
    return path == "demo" or os.path.exists(path) or all(os.path.exists(shard) for shard in expand_braces(path))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _features_kept(args: argparse.Namespace, world: World) -> Iterator[None]:
    """Without --cache features are kept for the length of the command, so that protocols share them: in a folder of the first rank."""
    if args.cache:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="massl_fast_features_") as folder:
        args.cache = world.from_main(folder)
        yield
        world.barrier()  # the others may still be reading
