"""The program ``massl-fast``: sub-commands, and mistakes of the user as one sentence and exit code 2."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from massl_fast.commands.registry import COMMANDS, is_evaluation, parser_of, takes_settings
from massl_fast.distributed.listening import LISTENER, WARNINGS

HELP = ("-h", "--help")
PRINTS = {*HELP, "--print-config"}
"""With which ``train`` says something and trains nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code. Without ``arguments`` they are the command line's, and the process is the command's alone."""
    whole_process, arguments = arguments is None, list(sys.argv[1:] if arguments is None else arguments)
    words = 2 if is_evaluation(arguments) or " ".join(arguments[:2]) in COMMANDS else 1
    command = " ".join(arguments[:words])
    # Set before PyTorch is imported: its profiler would remark on every start and stop, and on a missing GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "10")
    try:
        with _training(whole_process) if command == "train" and not PRINTS & set(arguments) else contextlib.nullcontext():
            if command in COMMANDS or is_evaluation(arguments):
                return _run(command, arguments[words:])
            return _overview(arguments)
    except ValueError as error:
        print(f"massl-fast {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"massl-fast {command}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


@contextlib.contextmanager
def _training(whole_process: bool) -> Iterator[None]:
    """What a run wants to be so before anything else is imported."""
    # Where a rank is lost, PyTorch's C++ side warns of its broken connections with a page of addresses each; we say which rank it was.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if whole_process:
        sys.stdout, sys.stderr = _patient(sys.stdout), _patient(sys.stderr)
    # Importing PyTorch takes seconds, and a scheduler may ask a run to stop in the midst of them.
    with LISTENER.listening(*WARNINGS, to_the_end=whole_process):
        yield


class _Patient(io.FileIO):
    """A file that takes what cannot be written for written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _patient(stream: TextIO) -> TextIO:
    """``stream`` for a run that goes on where nobody hears it any more: a terminal that was closed, a ``tee`` that Ctrl-C ended as well, a
    full disk under its log.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = _Patient(stream.fileno(), "wb", closefd=False)
    binary = raw if stream.write_through else io.BufferedWriter(raw)  # the first with PYTHONUNBUFFERED
    kind = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(binary, encoding=stream.encoding, errors=stream.errors, **kind)


def _run(command: str, arguments: list[str]) -> int:
    module, parser = parser_of(command, arguments)
    if takes_settings(module):
        if arguments and not arguments[0].startswith("-") and set(arguments[1:]) & set(HELP):
            args, settings = parser.parse_known_args([argument for argument in arguments[1:] if argument not in HELP])
            return _settings_of(arguments[0], args.recipe or "", settings)
        args, args.settings = parser.parse_known_args(arguments)
    else:
        args = parser.parse_args(arguments)
    code = module.run(args)
    sys.stdout.flush()
    return code


def _settings_of(section: str, recipe: str, settings: Sequence[str]) -> int:
    """Help for one section of the settings, or for one objective, which may be that of a plugin among ``settings``."""
    from massl_fast.config import chosen_objective, describe_section

    objective = chosen_objective(recipe, settings)
    print(describe_section(objective if section == "objective" else section))
    return 0


def _overview(arguments: list[str]) -> int:
    """All commands, or those of one group, such as eval."""
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    group = arguments[0] if arguments and arguments[0] in groups else ""
    listed = {name: summary for name, (_, summary) in COMMANDS.items() if not group or name.split()[0] == group}
    lines = [f"  massl-fast {name:<18} {summary}" for name, summary in listed.items()]
    lines += ["", f"massl-fast {group or 'COMMAND'}{' NAME' if group else ''} --help tells more."]
    if not arguments or arguments[0] in HELP or (group and (not arguments[1:] or arguments[1] in HELP)):
        print("\n".join(["massl-fast: self-supervised pre-training of vision networks at the speed of the hardware", "", *lines]))
        return 0
    print(f"massl-fast: there is no command '{' '.join(arguments[:2])}'.\n" + "\n".join(lines), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
