"""Signals that ask to stop, noted from the first lines of the program on, and kept from the processes that it starts.

A scheduler signals every process of a job step, and may do so while the program is still importing PyTorch. Imports nothing heavy, so that
the command line listens before it does anything else.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

WARNINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What schedulers send before they kill, and what a terminal sends that is closed."""
RELAYED_SECONDS = 1.0
"""Launchers pass a Ctrl-C on that their processes have had already; a person's second one comes later."""


class Listener:
    """Notes the last signal that asked this process to stop. There is one (``LISTENER``), because handlers belong to the whole process.

    SIGUSR1 and SIGHUP end a process that does not expect them: loader workers, their server, multiprocessing's resource tracker, a
    compiler. A blocked signal stays blocked in what is forked or executed, and so the thread that listens, from which all of them descend,
    blocks them; a thread of its own leaves them open for the process. SIGTERM stays open, since it is how children are ended; those that
    must outlive it ignore it (data.worker_server).
    """

    def __init__(self) -> None:
        self.noted: signal.Signals | None = None
        self._interrupted = 0.0
        self._depth = 0

    @contextlib.contextmanager
    def listening(self, *numbers: signal.Signals, to_the_end: bool = False) -> Iterator[None]:
        """Note ``numbers`` from now on; a second SIGINT is a KeyboardInterrupt. The main thread calls it. It may be entered again within
        itself and then keeps what it has noted. A SIGHUP that is ignored, as nohup has it, stays so.

        ``to_the_end``: of the process. They are ignored afterwards, so that none that comes while Python ends replaces the exit code.
        """
        before = {number: signal.getsignal(number) for number in numbers}
        if before.get(signal.SIGHUP) == signal.SIG_IGN:
            del before[signal.SIGHUP]
        for number in before:
            signal.signal(number, self._note)
        self._depth += 1
        try:
            with _kept_from_children({signal.SIGUSR1, signal.SIGHUP}):
                yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.noted = None
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if to_the_end else handler)

    def _note(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT == self.noted and now - self._interrupted > RELAYED_SECONDS:
            raise KeyboardInterrupt
        if number == signal.SIGINT != self.noted:
            self._interrupted = now
        self.noted = signal.Signals(number)


@contextlib.contextmanager
def _kept_from_children(numbers: set[signal.Signals]) -> Iterator[None]:
    over = threading.Event()

    def stay_open() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        over.wait()

    receiver = threading.Thread(target=stay_open, name="signals", daemon=True)
    receiver.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()
        receiver.join()


LISTENER = Listener()
