"""The program ``massl-fast``: sub-commands, and mistakes of the user as one sentence and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from massl_fast.distributed.listening import LISTENER, WARNINGS
from massl_fast.evaluation.registry import PROTOCOLS

EVALUATIONS = "massl_fast.commands.eval"
EVERY_EVALUATION = "massl_fast.commands.eval_all"
# Sub-commands and the modules that hold their `add_arguments(parser)` and `run(args) -> exit code`, imported when asked for, so
# that `massl-fast --help` answers at once.
COMMANDS = {
    "train": ("massl_fast.commands.train", "train a student and its teacher"),
    "eval all": (EVERY_EVALUATION, "every protocol of a plan for which there is data"),
    **{f"eval {name}": (EVALUATIONS, summary) for name, (_, summary) in PROTOCOLS.items()},
    "export": ("massl_fast.models.export", "write a backbone as a folder that timm loads"),
    "data check": ("massl_fast.commands.data_check", "find unreadable, tiny, duplicated and rotated images"),
    "report": ("massl_fast.commands.report", "render report.html of a run again"),
    "inspect": ("massl_fast.commands.inspect", "kernel resources, compiled here, no GPU needed"),
    "bench kernels": ("massl_fast.commands.bench_kernels", "time loss, readout, enqueue and partition beside their peers"),
    "bench objectives": ("massl_fast.commands.bench_objectives", "time the other losses beside the published way"),
    "bench loader": ("massl_fast.commands.bench_loader", "time the loaders alone"),
    "bench step": ("massl_fast.commands.bench_step", "time a training step on random crops, part by part"),
    "bench train": ("massl_fast.commands.bench_train", "time loader and model together and alone, and say what bounds the run"),
    "bench correctness": ("massl_fast.commands.bench_correctness", "the kernels on this device against float64"),
    "bench compare": ("massl_fast.commands.bench_compare", "what differs between two records beyond the noise"),
    "bench page": ("massl_fast.commands.bench_page", "draw records as one HTML page"),
    "bench everything": ("massl_fast.commands.bench_everything", "correctness, then every benchmark and profile, in minutes"),
    "profile memory": ("massl_fast.commands.profile_memory", "whose every byte of a step is, estimated and measured"),
    "profile budget": (
        "massl_fast.commands.profile_budget",
        "operations and bytes of a step by part, and the least time a GPU takes",
    ),
    "profile trace": ("massl_fast.commands.profile_trace", "trace steps: parts, operators, gaps, waits for the device"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # An evaluation may be that of a plugin, which nobody knows yet.
    evaluation = arguments[:1] == ["eval"] and len(arguments) > 1 and not arguments[1].startswith("-")
    words = 2 if evaluation or " ".join(arguments[:2]) in COMMANDS else 1
    command = " ".join(arguments[:words])
    if not evaluation and command not in COMMANDS:
        return _overview(arguments)
    # Importing PyTorch takes seconds, and a scheduler may ask a run to stop in the midst of them.
    listening = LISTENER.listening(*WARNINGS) if command == "train" else contextlib.nullcontext()
    try:
        with listening:
            return _run(command, arguments[words:])
    except ValueError as error:
        print(f"massl-fast {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"massl-fast {command}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(command: str, arguments: list[str]) -> int:
    module_name, summary = COMMANDS.get(command, (EVALUATIONS, ""))
    module = importlib.import_module(module_name)
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
    # A command with settings of its own (--section.key VALUE) takes what the parser does not know.
    if getattr(module, "TAKES_SETTINGS", False):
        args, args.settings = parser.parse_known_args(arguments)
    else:
        args = parser.parse_args(arguments)
    code = module.run(args)
    sys.stdout.flush()
    return code


def _overview(arguments: list[str]) -> int:
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    asked_for_help = (
        not arguments or arguments[0] in ("-h", "--help") or (arguments[0] in groups and arguments[1:2] in ([], ["-h"], ["--help"]))
    )
    lines = ["massl-fast: self-supervised pre-training of vision networks at the speed of the hardware", ""]
    lines += [f"  massl-fast {name:<18} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "massl-fast COMMAND --help tells more."]
    if asked_for_help:
        print("\n".join(lines))
        return 0
    print(f"massl-fast: there is no command '{' '.join(arguments[:2])}'.\n" + "\n".join(lines[2:]), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
