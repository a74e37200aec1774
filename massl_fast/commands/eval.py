"""`massl-fast eval NAME`: a checkpoint under one of the protocols of `evaluation.registry`, or of a plugin.

Options common to all protocols are here; those of a protocol are made from its settings.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import timm
import torch
import torch.distributed as dist
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from torch import nn

from massl_fast.config import parsed_yaml
from massl_fast.data.crops import IMAGENET_MEAN, IMAGENET_STD
from massl_fast.distributed.world import World, join_world
from massl_fast.evaluation.base import Protocol, Result, Settings, checked_settings
from massl_fast.evaluation.registry import PROTOCOLS, protocol_named
from massl_fast.evaluation.store import DTYPES, FeatureStore
from massl_fast.evaluation.subject import Subject
from massl_fast.hardware import chosen_device, versions
from massl_fast.models.backbone import build_backbone
from massl_fast.models.published import add_network_arguments, load_backbone, network_options, rebuild
from massl_fast.models.recipes import RECIPES
from massl_fast.plugins import load_plugins

TIMM = "timm:"
UNTRAINED = "untrained"
UNTRAINED_SEED = 0
NAMES_SHOWN = 5
WIDEST_TABLE = 6
"""Figures that are columns; more are rows."""


class Evaluation:
    """The command of one protocol. Imports the files that ``--plugin`` names in ``arguments``.

    Raises ValueError for a protocol that neither the package nor a plugin has.
    """

    def __init__(self, name: str, arguments: list[str]) -> None:
        load_named_plugins(arguments)
        self.protocol = protocol_named(name)
        self.summary = PROTOCOLS[name][1]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.description = inspect.cleandoc(self.protocol.__doc__ or self.summary) + f"\n\n{DATA_HELP}"
        add_common_arguments(parser)
        group = parser.add_argument_group(f"of {self.protocol.name}")
        for name, field in self.protocol.Settings.model_fields.items():
            _add_option(group, name, field)

    def run(self, args: argparse.Namespace) -> int:
        demand_report(args)
        protocol = self.protocol(settings_from(args, self.protocol.Settings))
        found = []
        with joined_world(args) as world:
            for checkpoint in args.checkpoint:
                subject, info = subject_of(args, checkpoint, world)
                out = args.out if world.is_main else None
                found.append(evaluate(protocol, subject, info, out, folder_of(checkpoint, args.checkpoint)))
        if not world.is_main:
            return 0
        if args.out is not None:
            write_results(args.out, found)
        if args.json:
            print(json.dumps(found[0] if len(found) == 1 else {"protocol": protocol.name, "results": found}))
        else:
            for one in found:
                print_table(one)
        return 0


def demand_report(args: argparse.Namespace) -> None:
    """Raise ValueError where --out asks for a page that cannot be written here: before hours of evaluation rather than after."""
    if args.out is not None:
        import massl_fast.report.evaluations  # noqa: F401


@contextlib.contextmanager
def joined_world(args: argparse.Namespace) -> Iterator[World]:
    """The processes that torchrun or srun has started, which share the images; without either this one alone."""
    device = chosen_device(args.device)
    world = join_world(args.device)
    try:
        yield world if world.size > 1 else replace(world, device=device)
    finally:
        if world.size > 1:
            dist.destroy_process_group()


def load_named_plugins(arguments: list[str]) -> None:
    """Import the files that ``--plugin`` names: what they add must be known before the options are."""
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--plugin", action="append", default=[])
    load_plugins(early.parse_known_args(arguments)[0].plugin)


def evaluate(protocol: Protocol, subject: Subject, info: dict[str, Any], out: Path | None, within: str = "") -> dict[str, Any]:
    """The JSON object of one protocol on one checkpoint; its pictures go to the sub-folder ``within`` of ``out``."""
    started = time.perf_counter()
    result = protocol.run(subject)
    return {
        "protocol": protocol.name,
        "title": protocol.title,
        "figures": [asdict(figure) for figure in protocol.figures()],
        "headline": protocol.headline.key,
        "checkpoint": info["checkpoint"],
        "step": info["step"],
        "architecture": info["architecture"],
        "features": result.features,
        "image_size": result.image_size,
        "precision": subject.precision,
        "settings": protocol.settings.model_dump(mode="json"),
        "data": result.data,
        "about": result.about,
        "departures": result.departures,
        "assumed": info.get("assumed", []),
        "notes": info["notes"] + result.notes,
        "unreadable": result.unreadable,
        "results": result.results,
        "published": result.published,
        "pictures": write_pictures(out, within, result) if out is not None else [],
        "seconds": round(time.perf_counter() - started, 2),
        "versions": versions(),
        **result.more,
    }


def write_pictures(out: Path, within: str, result: Result) -> list[dict[str, str]]:
    """Write the pictures to the sub-folder ``within`` of ``out``; returns their files, as seen from ``out``, and captions."""
    (out / within).mkdir(parents=True, exist_ok=True)
    pictures = [{"file": str(Path(within, f"{picture.name}.jpg")), "caption": picture.caption} for picture in result.pictures]
    for entry, picture in zip(pictures, result.pictures):
        picture.image.save(out / entry["file"], quality=90)
    return pictures


def write_results(folder: Path, found: list[dict[str, Any]], unfinished: Sequence[str] = ()) -> Path:
    """Write result.json and report.html of all evaluations; returns the page. ``unfinished``: sentences on what was not evaluated."""
    from massl_fast.report.evaluations import evaluations_page

    folder.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = found[0] if len(found) == 1 and not unfinished else {"results": found, "unfinished": list(unfinished)}
    (folder / "result.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    page = folder / "report.html"
    page.write_text(evaluations_page(found, unfinished), encoding="utf-8")
    return page


def folder_of(checkpoint: Path, among: Sequence[Path]) -> str:
    """The sub-folder of --out for the pictures of a checkpoint: none where it is the only one."""
    return "" if len(among) == 1 else f"{list(among).index(checkpoint) + 1}_{checkpoint.name}"


DATA_HELP = (
    "DATA is a folder of class folders, WebDataset tars (path/train-{000..003}.tar), or `demo`, where the options of the\n"
    "protocol name no other layout."
)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        nargs="+",
        metavar="PATH",
        help="a checkpoint folder, a run's folder, a published .pth file, or timm:NAME (random weights); several are shown side by side",
    )
    parser.add_argument(
        "--which", choices=("teacher", "student", "both"), default="both", help="networks of the checkpoint (default: both)"
    )
    add_network_arguments(parser)
    parser.add_argument("--features", choices=RECIPES, help="which features of the network (default: the protocol's)")
    parser.add_argument("--image-size", type=int, help="side of the images, pixels (default: that of the checkpoint's global crops)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, or cuda:1 and so on (default: auto)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the forward pass (default: fp32)")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time (default: 256)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode images (default: 0, this one)")
    parser.add_argument("--cache", metavar="DIR", help="keep features in this folder, and take them from it where they are whole")
    parser.add_argument("--cache-dtype", choices=tuple(DTYPES), default="fp32", help="format of kept features (default: fp32)")
    parser.add_argument("--seed", type=int, default=0, help="of whatever a protocol draws (default: 0)")
    parser.add_argument("--no-baselines", action="store_true", help="leave out the untrained network and raw pixels")
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE.py", help="Python file of your own that adds evaluations")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for result.json, report.html and pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def _add_option(parser: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    """The option of one setting: ``--field-name``, typed as its annotation, with its docstring as help."""
    kind, several = _kind_of(field.annotation)
    flag = option_of(name)
    required = field.is_required()
    default = field.get_default()
    shown = " ".join(map(str, default)) if isinstance(default, (tuple, list)) else default
    text = (field.description or "").rstrip(".")
    text = text[:1].lower() + text[1:] + ("" if required or default in (None, "") else f" (default: {shown})")
    text = text.replace("%", "%%")
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    extra: dict[str, Any] = {"choices": get_args(kind)} if get_origin(kind) is Literal else {"type": kind}
    if kind is str:
        extra["metavar"] = "DATA" if name in ("train", "test", "data") else name.upper()
    if several:
        extra["nargs"] = "+"
    parser.add_argument(flag, required=required, default=argparse.SUPPRESS, help=text, **extra)


def _kind_of(annotation: Any) -> tuple[Any, bool]:
    """(int, float, str, bool, Path, a Literal, or what reads YAML; whether several are taken) of a setting's annotation."""
    if get_origin(annotation) in (Union, types.UnionType):
        # A number or a word, such as 10 or fresh: pydantic tells them apart.
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _kind_of(kinds[0]) if len(kinds) == 1 else (str, False)
    if get_origin(annotation) in (tuple, list):
        return _kind_of(get_args(annotation)[0])[0], True
    plain = annotation in (bool, int, float, str, Path) or get_origin(annotation) is Literal
    return annotation if plain else _yaml, False


def _yaml(text: str) -> Any:
    """The value of an option that is neither a number nor a word nor a list of such."""
    try:
        return parsed_yaml(text, repr(text))
    except ValueError as sentence:
        raise argparse.ArgumentTypeError(str(sentence)) from None


def option_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def settings_from(args: argparse.Namespace, kind: type[Settings]) -> Settings:
    """The protocol's settings among ``args``; raises ValueError with a sentence per problem."""
    return checked_settings({name: getattr(args, name) for name in kind.model_fields if hasattr(args, name)}, kind, option_of)


def subject_of(args: argparse.Namespace, checkpoint: Path, world: World) -> tuple[Subject, dict[str, Any]]:
    """(what the common options name, what is known of the checkpoint)."""
    for name, least in (("batch_size", 1), ("num_workers", 0), ("image_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")
    networks, info = networks_of(checkpoint, args.which, **network_options(args))
    if not args.no_baselines:
        networks[UNTRAINED] = untrained(next(iter(networks.values())))
    subject = Subject(
        networks={name: network.to(world.device) for name, network in networks.items()},
        image_size=info["image_size"],
        mean=info["mean"],
        std=info["std"],
        device=world.device,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        precision=args.precision,
        seed=args.seed,
        recipe=args.features,
        raw_pixels=not args.no_baselines,
        shard=(world.rank, world.size),
        store=FeatureStore(Path(args.cache), args.cache_dtype) if args.cache else None,
        size_is_chosen=args.image_size is not None,
        pictures=args.out is not None,
    )
    if args.cache and args.cache_dtype == "fp16":
        info["notes"] = [*info["notes"], "Features are kept, and evaluated, rounded to fp16."]
    return subject, info | {"checkpoint": str(checkpoint), "step": step_of(Path(info.get("path", checkpoint)))}


def step_of(checkpoint: Path) -> int | None:
    """The step of a run's checkpoint; None for what does not say."""
    try:
        step = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def networks_of(checkpoint: Path, which: str, **options: Any) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """({name: network}, what is known of the checkpoint). Of "both", a student that the checkpoint lacks is noted and left out.

    ``options`` go to ``load_backbone``. ``timm:NAME`` is a network of timm with random weights, which stands for the teacher.
    """
    if str(checkpoint).startswith(TIMM):
        return _random_network(str(checkpoint).removeprefix(TIMM), options.get("image_size"), options.get("model_args"))
    first = "student" if which == "student" else "teacher"
    network, info = load_backbone(checkpoint, which=first, **options)
    networks = {first: network}
    if which == "both":
        try:
            student, _ = load_backbone(checkpoint, which="student", **options)
        except ValueError as reason:
            info["notes"] = [*info["notes"], f"Without a student: {reason}"]
        else:
            weights = student.state_dict()
            if not all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items()):
                networks["student"] = student
            else:
                info["notes"] = [*info["notes"], f"Student and teacher of {checkpoint} are the same network; it is shown once."]
    return networks, info


def _random_network(arch: str, size: int | None, model_args: dict[str, Any] | None) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    size = size or (timm.get_pretrained_cfg_value(arch, "input_size")[-1] if timm.is_model(arch) else 224)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED + 1)
        network = build_backbone(arch, image_size=size, model_args=model_args).eval()
    note = f"{arch} has random weights here. Weights in a file are taken with --checkpoint FILE --arch {arch}."
    known = {"architecture": arch, "image_size": size, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "notes": [note]}
    return {"teacher": network}, known


def untrained(network: nn.Module) -> nn.Module:
    """The same network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        return rebuild(network.timm_args).eval()


def print_table(found: dict[str, Any]) -> None:
    """The table that a person reads: a row per network, a column per figure, then sentences."""
    console = Console(highlight=False)
    table = Table()
    figures = found["figures"]
    if len(figures) <= WIDEST_TABLE:
        table.add_column("features of")
        for figure in figures:
            table.add_column(figure["title"], justify="right")
        for name, values in found["results"].items():
            table.add_row(name, *(_shown(values.get(figure["key"])) for figure in figures))
    else:
        table.add_column("")
        for name in found["results"]:
            table.add_column(name, justify="right")
        for figure in figures:
            table.add_row(figure["title"], *(_shown(values.get(figure["key"])) for values in found["results"].values()))
    say = partial(console.print, markup=False, soft_wrap=True)
    for assumption in found["assumed"]:
        say(assumption)
    say(f"{found['title']}: {found['architecture']} at {found['image_size']} px")
    console.print(table)
    for row in found["published"]:
        say(f"Published: {row['who']}: {row['value']} ({row['source']})")
    if found["about"]:
        say(found["about"])
    for departure in found["departures"]:
        say(f"Not as published: {departure}")
    for note in found["notes"]:
        if note not in found["assumed"]:
            say(note)
    if names := found["unreadable"]:
        shown = ", ".join(names[:NAMES_SHOWN]) + (" …" if len(names) > NAMES_SHOWN else "")
        say(f"{len(names)} of these images could not be read and were left out: {shown}")


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
