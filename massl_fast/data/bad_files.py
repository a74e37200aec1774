"""The list of images with problems: written by ``massl-fast data check`` and by a run, read by training.

One image per line, UTF-8: name, tab, problem, tab, detail. A backslash, tab or line break in a name is written ``\\\\``, ``\\t``, ``\\n``,
``\\r``, a ``#`` at its beginning ``\\#``. Lines that begin with ``#`` are comments.
"""

import os
import re
from pathlib import Path

UNREADABLE = "unreadable"
ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
LETTERS = {"t": "\t", "n": "\n", "r": "\r"}


def format_line(name: str, problem: str, detail: str) -> str:
    name = re.sub(r"[\\\t\n\r]", lambda match: ESCAPES[match[0]], name)
    name = "\\" + name if name.startswith("#") else name
    return f"{name}\t{problem}\t{' '.join(detail.split())}\n"


def read_bad_files(path: str | os.PathLike) -> set[str]:
    """Names of the images to leave out: those called unreadable, and those on a line of their own without a problem.

    Raises ValueError where there is no such list.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise ValueError(f"The list of bad files {path} cannot be read: {error.strerror}.") from None
    names = set()
    for line in text.split("\n"):
        name, _, rest = line.rstrip("\r").partition("\t")
        if name and not line.startswith("#") and (not rest or rest.split("\t")[0] == UNREADABLE):
            names.add(re.sub(r"\\(.)", lambda match: LETTERS.get(match[1], match[1]), name))
    return names


class BadFiles:
    """Unreadable images met by a run: each named once in ``path`` (None: nowhere), their share watched.

    Above ``max_percent`` of the images seen the run is ended, but not before ``judge_after`` images: a few bad files at the
    start say little.
    """

    def __init__(self, source_path: str, path: str | os.PathLike | None, max_percent: float, judge_after: int) -> None:
        self.source_path, self.path = source_path, None if path is None else Path(path)
        self.max_percent, self.judge_after = max_percent, judge_after
        self.names: set[str] = set()
        self.seen = self.unreadable = 0

    def count(self, images: int, bad: list[tuple[str, str]]) -> None:
        """``images`` more were seen, of which ``bad`` (name, reason) could not be read. Raises ValueError above the share."""
        self.seen += images
        self.unreadable += len(bad)
        fresh = {name: reason for name, reason in bad if name not in self.names}
        if fresh:
            self.names |= fresh.keys()
            self._append(fresh)
        if bad and self.seen >= self.judge_after and 100 * self.unreadable > self.max_percent * self.seen:
            name, reason = bad[-1]
            raise ValueError(
                f"{self.unreadable} of the {self.seen} images drawn so far from {self.source_path} cannot be read, more than the "
                f"{self.max_percent:g} % that data.max_bad_percent allows; the last was {name}: {reason}."
                + (f" They are named in {self.path}." if self.path else "")
                + " Look at the data with massl-fast data check, or allow more."
            )

    def _append(self, fresh: dict[str, str]) -> None:
        if self.path is None:
            return
        # Several ranks write here, and so did the run that this one continues: what is named already stays named once.
        known = read_bad_files(self.path) if self.path.exists() else set()
        lines = [format_line(name, UNREADABLE, reason) for name, reason in fresh.items() if name not in known]
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write("".join(lines).encode("utf-8", "surrogateescape"))
