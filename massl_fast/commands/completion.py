"""``massl-fast completion SHELL``: what a shell needs to complete commands, options, settings and their choices."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import shtab

from massl_fast.commands.registry import COMMANDS, parser_of, takes_settings
from massl_fast.config import SETTINGS, Config, recipe_names

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print a script for the completion of commands, options and settings. Where it belongs:\n\n"
        "  massl-fast completion bash > ~/.local/share/bash-completion/completions/massl-fast\n"
        '  massl-fast completion zsh > "${fpath[1]}/_massl-fast"\n'
        "  massl-fast completion fish > ~/.config/fish/completions/massl-fast.fish\n\n"
        "A new shell reads it. Print it anew after an update of massl-fast."
    )
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    print(shtab.complete(whole_parser(), args.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """One parser for all commands, whose options are those of the commands' own parsers."""
    whole = argparse.ArgumentParser(prog="massl-fast")
    top = whole.add_subparsers()
    groups: dict[str, Any] = {}
    for command, (_, summary) in COMMANDS.items():
        module, own = parser_of(command, [])
        group, _, name = command.partition(" ")
        if name and group not in groups:
            there = top.choices.get(group) or top.add_parser(group, help=f"{group} NAME")
            groups[group] = there.add_subparsers()
        place = groups[group] if name else top
        parser = place.add_parser(name or command, help=summary, parents=[own], add_help=False, conflict_handler="resolve")
        if takes_settings(module):
            _add_settings(parser)
        _complete_files(parser)
    return whole


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """--section.key for every setting of every objective; recipes by name."""
    models = [(section, field.annotation) for section, field in Config.model_fields.items() if section != "objective"]
    models += [("objective", model) for model in SETTINGS.values()]
    for section, model in models:
        for key, field in model.model_fields.items():
            option = f"--{section}.{key}"
            if option not in parser._option_string_actions:
                choices = tuple(SETTINGS) if option == "--objective.name" else _choices(field.annotation)
                parser.add_argument(option, help=(field.description or "").split(". ")[0].replace("%", "%%"), choices=choices)
    if recipe := parser._option_string_actions.get("--recipe"):
        recipe.choices = recipe_names()


def _choices(annotation: Any) -> Iterable[str] | None:
    if annotation is bool:
        return "true", "false"
    return tuple(map(str, get_args(annotation))) if get_origin(annotation) is Literal else None


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Files and folders for whatever names one and has no list of choices."""
    for action in parser._actions:
        if action.choices is None and action.nargs != 0 and (action.type is Path or action.metavar in ("PATH", "FILE", "DATA", "DIR")):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
