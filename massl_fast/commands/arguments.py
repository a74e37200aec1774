"""Arguments that several commands share, and what ``--json`` and ``--output`` do."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from massl_fast import records

NOWHERE = "none"
"""The value of ``--output`` that keeps no records."""


def takes_a_run(parser: argparse.ArgumentParser, command: str, options: str, default: str = "demo") -> None:
    """``--recipe``, and the settings of a run, which the parser itself does not know."""
    from massl_fast.config import recipe_names  # of what takes a run alone: kernels are measured without pydantic, too

    parser.usage = f"massl-fast {command} [--recipe NAME|FILE] {options} [--section.key VALUE ...]"
    names = f"one of {', '.join(recipe_names())}, or the path of a YAML file (default: {default})"
    parser.add_argument("--recipe", metavar="NAME|FILE", default=default, help=names)
    parser.epilog = "The command takes every setting of a run; massl-fast train --help lists them."


def prints_json(parser: argparse.ArgumentParser, what: str = "the records") -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON on stdout; sentences and tables go to stderr")


def keeps_records(parser: argparse.ArgumentParser, default: str = "") -> None:
    """``--output``, by default ``default``, and ``--json``; ``keeping`` does what they say."""
    where = f"default: {default or NOWHERE}; {NOWHERE}: nowhere" if default else f"default: {NOWHERE}, nowhere"
    parser.add_argument(
        "--output", metavar="FILE", default="", help=f"file to which records are appended, a JSON object per line ({where})"
    )
    prints_json(parser)


@contextlib.contextmanager
def sentences_aside(args: argparse.Namespace) -> Iterator[None]:
    """With ``--json``, what is printed inside goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def keeping(args: argparse.Namespace) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes the records of a command as they come: each is in ``--output`` at once; ``--json`` prints all at the end."""
    rows: list[dict[str, Any]] = []
    output = "" if args.output == NOWHERE else args.output

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if output:
            records.append(output, [row])

    if output:
        records.check_writable(output)
    try:
        with sentences_aside(args):
            yield keep
            if output:
                print(f"Appended to {output}: {len(rows)} record{'s' if len(rows) != 1 else ''}.")
    finally:
        if args.json:
            print(json.dumps(rows))
