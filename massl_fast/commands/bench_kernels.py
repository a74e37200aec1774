"""``massl-fast bench kernels``: time loss, read-out, enqueue and partition beside their peers."""

from __future__ import annotations

import argparse
import json
from typing import Any

from massl_fast.benchmarks import kernels
from massl_fast.commands.arguments import prints_json, sentences_aside


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kernels.add_arguments(parser)
    prints_json(parser)


def run(args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    with sentences_aside(args):
        code = kernels.run(args, rows)
    if args.json:
        print(json.dumps(rows))
    return code
