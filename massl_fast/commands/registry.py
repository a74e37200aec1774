"""The sub-commands there are, and the argument parser of each. Light to import, so that `massl-fast --help` answers at once."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from massl_fast.evaluation.registry import PROTOCOLS

EVALUATIONS = "massl_fast.commands.eval"
EVERY_EVALUATION = "massl_fast.commands.eval_all"
# Sub-commands and the modules that hold their `add_arguments(parser)` and `run(args) -> exit code`, imported when they are needed.
COMMANDS = {
    "train": ("massl_fast.commands.train", "train a student and its teacher"),
    "runs": ("massl_fast.commands.runs", "list runs: what they train, how far they are, what they reached"),
    "runs compare": ("massl_fast.commands.runs_compare", "draw the curves of several runs on one page"),
    "report": ("massl_fast.commands.report", "write report.html of a run again"),
    "eval all": (EVERY_EVALUATION, "run every protocol of a plan for which there is data"),
    **{f"eval {name}": (EVALUATIONS, summary) for name, (_, summary) in PROTOCOLS.items()},
    "export": ("massl_fast.models.export", "write a backbone as a folder that timm loads"),
    "data check": ("massl_fast.commands.data_check", "find unreadable, tiny, duplicated and rotated images"),
    "doctor": ("massl_fast.commands.doctor", "show what is installed and what runs here, as a table for an issue"),
    "inspect": ("massl_fast.commands.inspect", "show the resources of compiled kernels, without a GPU"),
    "bench kernels": ("massl_fast.commands.bench_kernels", "time loss, readout, enqueue and partition against other implementations"),
    "bench objectives": ("massl_fast.commands.bench_objectives", "time the other losses against the published way"),
    "bench loader": ("massl_fast.commands.bench_loader", "time the loaders alone"),
    "bench step": ("massl_fast.commands.bench_step", "time a training step on random crops, part by part"),
    "bench train": ("massl_fast.commands.bench_train", "time loader and model together and alone, and say what bounds the run"),
    "bench correctness": ("massl_fast.commands.bench_correctness", "compare the kernels on this device with float64"),
    "bench compare": ("massl_fast.commands.bench_compare", "show what differs between two records beyond the noise"),
    "bench page": ("massl_fast.commands.bench_page", "draw records as one HTML page"),
    "bench everything": (
        "massl_fast.commands.bench_everything",
        "run the tests that need a GPU, then every benchmark and profile, in minutes",
    ),
    "profile memory": ("massl_fast.commands.profile_memory", "say what every byte of a step belongs to, estimated and measured"),
    "profile budget": (
        "massl_fast.commands.profile_budget",
        "count operations and bytes of a step by part, and the least time a GPU takes",
    ),
    "profile trace": ("massl_fast.commands.profile_trace", "trace steps: parts, operators, gaps, waits for the device"),
    "completion": ("massl_fast.commands.completion", "print the script with which a shell completes commands and options"),
}


def is_evaluation(words: list[str]) -> bool:
    """Whether these words of a command line name an evaluation; it may be that of a plugin, which is not imported yet."""
    return words[:1] == ["eval"] and len(words) > 1 and not words[1].startswith("-")


def parser_of(command: str, arguments: list[str]) -> tuple[Any, argparse.ArgumentParser]:
    """(what runs ``command``, its parser). ``arguments`` may name plugins, which are imported."""
    module_name, summary = COMMANDS.get(command, (EVALUATIONS, ""))
    module: Any = importlib.import_module(module_name)
    if module_name == EVALUATIONS:
        module = module.Evaluation(command.split()[1], arguments)
        summary = module.summary
    elif module_name == EVERY_EVALUATION:
        module = module.All(arguments)
    parser = argparse.ArgumentParser(
        prog=f"massl-fast {command}",
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",  # a command may answer --help itself
    )
    module.add_arguments(parser)
    return module, parser


def takes_settings(module: Any) -> bool:
    """Whether a command takes --section.key VALUE beside the options of its parser."""
    return getattr(module, "TAKES_SETTINGS", False)
