"""One run at a time in a folder: a lock that says who holds it, and that a dead holder does not keep.

The lock is a file, ``lock.json``, made so that only one process can make it (O_EXCL); it needs no flock, which many shared file systems
lack. While the run lives, a thread touches the file every ``BEAT_SECONDS``. Whoever finds the lock held judges:

- the same Slurm job before it was queued again, and the same torchrun's ranks before it started them again: they are over, or nobody
  would have been started again;
- a holder on the same host, in the same process namespace: by whether its process is there;
- anybody else: by watching the file for ``SILENT_SECONDS``. Its time of change is compared with itself only, as hosts' clocks differ.

A lock of the dead is replaced under a second file, named after the very lock that was judged, so that of several who judged it dead one
takes over and the others look again. A holder that was only asleep, or cut off from the file system, looks at the lock before it writes
anything (``confirm``), and ends where it finds another's.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0
POLL_SECONDS = 0.5
NAME = "lock.json"


class FolderLock:
    """The lock on a folder, held by this process from ``acquire`` to ``release`` (or the end of a with statement)."""

    def __init__(self, folder: Path, meeting: str, round_number: int, on_loss: Callable[[str], None]):
        """``meeting``, ``round_number``: ``World``'s. ``on_loss`` is called with a sentence, most often in a thread, where another process
        has taken the lock over.
        """
        self.folder, self.path, self.on_loss = folder, folder.absolute() / NAME, on_loss
        self.own = json.dumps(_identity(meeting, round_number))
        self._confirmed = -math.inf
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="folder lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock. It takes over from a dead holder and says so on stderr; ValueError names a holder that lives.

        A process that locks a folder again, as a program of its own may do after a run that failed, gives up its earlier lock first.
        """
        if self.path in _held:
            _held[self.path].release()
        while not self._make() and not self._succeed():
            pass
        _held[self.path] = self
        self._confirmed = _now()
        self._thread.start()
        atexit.register(self.release)  # a ValueError may end the program before the run begins

    def confirm(self) -> None:
        """To be called before the run writes anything into the folder: calls ``on_loss`` where the folder is another run's by now.

        It looks at the file only where the last look is so long ago that another process may have taken this one for dead since.
        """
        if _now() - self._confirmed > SILENT_SECONDS / 2:
            self._beat()

    def release(self) -> None:
        """Remove the lock, if it is still this process's; may be called again."""
        self._stop()
        with contextlib.suppress(OSError, ValueError), self._alone_with(self.own) as still_ours:
            if still_ours:
                self.path.unlink()

    def rename_folder(self, to: Path) -> None:
        """Give the locked folder another name, under which nobody holds it."""
        self._stop()
        self.folder.rename(to)
        (to / NAME).unlink()

    def _stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if _held.get(self.path) is self:
            del _held[self.path]
        atexit.unregister(self.release)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _make(self) -> bool:
        """Whether there was no lock, and now is this one."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self.own)
        except OSError:  # a full disk
            self.path.unlink()
            raise
        return True

    def _succeed(self) -> bool:
        """Whether the lock that is there could be taken over; False where it is to be tried again."""
        found = self._read()
        if found is None:
            return False
        holder = _parsed(found)
        why_over = why_ended(holder, json.loads(self.own))
        if why_over is None:
            if lives(holder):
                raise ValueError(self._refusal(holder))
            _say(f"run.folder {self.folder} is held by {_named(holder)}. Watching its lock for {SILENT_SECONDS:g} s for a sign of life.")
            if self._watch(found, holder):
                return False
            why_over = f"has given no sign of life for {SILENT_SECONDS:g} s"
        with self._alone_with(found) as unchanged:
            if not unchanged:
                return False
            temporary = self.path.with_suffix(".partial")
            try:
                temporary.write_text(self.own, encoding="utf-8")
                os.replace(temporary, self.path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
        _say(f"run.folder {self.folder} was held by {_named(holder)}, which {why_over}. This run takes it over.")
        return True

    def _watch(self, found: str, holder: dict[str, Any]) -> bool:
        """True once the lock is another one or gone, False once it has stood still for long; ValueError where its holder lives."""
        seen, until = self._changed(), time.monotonic() + SILENT_SECONDS
        while time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            if self._read() != found:
                return True
            if self._changed() != seen:
                raise ValueError(self._refusal(holder))
        return False

    def _refusal(self, holder: dict[str, Any]) -> str:
        return (
            f"run.folder {self.folder} is in use by {_named(holder)}, which is alive. Two runs would overwrite each other's metrics and "
            f"checkpoints: wait for that one to end, or name another run.folder."
        )

    @contextlib.contextmanager
    def _alone_with(self, content: str) -> Iterator[bool]:
        """Yields whether the lock still holds ``content``, and keeps everybody else from replacing that very lock meanwhile."""
        guard = self.path.with_name(f"{NAME}.{zlib.crc32(content.encode()):08x}")
        until = time.monotonic() + SILENT_SECONDS
        while True:
            try:
                os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                break
            except FileExistsError:
                if time.monotonic() > until:
                    raise ValueError(
                        f"{guard} has been there for {SILENT_SECONDS:g} s: another process is taking over {self.path}, or died over it. "
                        f"If no run uses the folder, delete both files."
                    ) from None
                time.sleep(POLL_SECONDS)
        try:
            yield self._read() == content
        finally:
            guard.unlink()

    def _read(self) -> str | None:
        """What the lock says, None where there is none."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def _changed(self) -> int | None:
        # Opened, because network file systems look at the server when a file is opened and may not when it is asked about.
        try:
            with self.path.open() as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _live(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        """Give a sign of life, or see that there is none to give."""
        with contextlib.suppress(OSError):  # a server that is away for a while; the next beat tries again
            before, found = _now(), self._read()
            if found == self.own:
                os.utime(self.path)
                self._confirmed = before
            elif found is None:
                self._make()  # somebody tidied up
            else:
                self._over.set()
                self.on_loss(
                    f"The lock on run.folder {self.folder} was taken over by {_named(_parsed(found))}, and this run ends, so that the "
                    f"folder stays that of one run."
                )


_held: dict[Path, FolderLock] = {}
_SINCE = datetime.now().astimezone().isoformat(timespec="seconds")


def _now() -> float:
    """Seconds that pass while the host sleeps, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _identity(meeting: str, round_number: int) -> dict[str, Any]:
    environment = os.environ
    job = ""
    if "SLURM_JOB_ID" in environment:
        job = f"Slurm job {environment['SLURM_JOB_ID']} of {environment.get('SLURM_CLUSTER_NAME', 'its cluster')}"
    elif environment.get("TORCHELASTIC_RUN_ID", "none") != "none":  # none: what torchrun says where it was given no name
        job = f"torchrun {environment['TORCHELASTIC_RUN_ID']}"
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "job": job,
        "restarts": int(environment.get("SLURM_RESTART_COUNT", 0)),
        "meeting": meeting,
        "round": round_number,
        "since": _SINCE,
        "namespace": _namespace(),
        "process_started": _started(os.getpid()),
    }


def _namespace() -> str:
    """This boot of this machine and its process namespace; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(process: int) -> int | None:
    """When a process started, in ticks since boot; None where there is none, or only its entry in the table is left."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _hidden(process: int) -> bool:
    """Whether a process is there of which /proc does not tell: another user's, where it is mounted with hidepid."""
    if _started(process) is not None:
        return False
    try:
        with contextlib.suppress(ProcessLookupError, OverflowError):
            os.kill(process, 0)
    except PermissionError:
        return True
    return False


def _is_here(holder: dict[str, Any]) -> bool:
    return bool(_namespace()) and holder["namespace"] == _namespace()


def lives(holder: dict[str, Any]) -> bool:
    """Whether the holder can be seen alive from here; False also where that cannot be seen."""
    started = _started(holder["process"])
    return _is_here(holder) and started is not None and started == holder["process_started"]


def sign_of_life(folder: Path) -> tuple[bool, float] | None:
    """(whether the run that holds ``folder`` lives, when its lock was last touched, in seconds since 1970); None where nobody holds it.

    For onlookers: nothing is waited for or written. Of a holder on another host, whose clock may differ from this one's by less than the
    silence, the age of the last beat decides.
    """
    try:
        found, touched = (folder / NAME).read_text(encoding="utf-8", errors="replace"), (folder / NAME).stat().st_mtime
    except OSError:
        return None
    holder = _parsed(found)
    if _is_here(holder) and not _hidden(holder["process"]):
        return lives(holder), touched
    return time.time() - touched < SILENT_SECONDS, touched


def why_ended(holder: dict[str, Any], here: dict[str, Any]) -> str | None:
    """How it can be known from here that the holder has ended, or None where it cannot."""
    if _is_here(holder) and not lives(holder) and not _hidden(holder["process"]):
        return "has ended without releasing it"
    queued_again = here["job"].startswith("Slurm") and holder["job"] == here["job"] and holder["restarts"] < here["restarts"]
    # A round counts at its own meeting only: two torchrun may bear the same --rdzv-id.
    started_again = here["meeting"] and holder["meeting"] == here["meeting"] and holder["round"] < here["round"]
    return "is an earlier attempt of this job" if queued_again or started_again else None


def _parsed(content: str) -> dict[str, Any]:
    """A lock's content; what cannot be read (a full disk, a file of somebody else) is a holder of whom nothing is known."""
    unknown = {
        **{"host": "an unknown host", "process": 0, "process_started": -1, "since": "an unknown time", "namespace": ""},
        **{"job": "", "restarts": 0, "meeting": "", "round": 0},
    }
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = {}
    known = found.items() if isinstance(found, dict) else ()
    return unknown | {key: value for key, value in known if key in unknown and type(value) is type(unknown[key])}


def _named(holder: dict[str, Any]) -> str:
    job = f", {holder['job']}" if holder["job"] else ""
    return f"process {holder['process']} on {holder['host']}{job}, since {holder['since']}"


def _say(sentence: str) -> None:
    print(f"massl-fast train: {sentence}", file=sys.stderr, flush=True)
