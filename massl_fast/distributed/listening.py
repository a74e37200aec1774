"""Signals that ask to stop, noted from the first lines of the program on, and kept from the processes that it starts.

A scheduler signals every process of a job step, and may do so while the program is still importing PyTorch. Imports nothing heavy, so that
the command line listens before it does anything else.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

WARNINGS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they kill."""


class Listener:
    """Notes the first signal that asked this process to stop. There is one (``LISTENER``), because handlers belong to the whole process.

    SIGUSR1 ends a process that does not expect it: loader workers, their server, multiprocessing's resource tracker, a compiler. A blocked
    signal stays blocked in what is forked or executed, and so the thread that listens, from which all of them descend, blocks it; a thread
    of its own leaves it open for the process. SIGTERM stays open, since it is how children are ended; those that must outlive it ignore it
    (data.worker_server).
    """

    def __init__(self) -> None:
        self.noted: signal.Signals | None = None
        self._depth = 0

    @contextlib.contextmanager
    def listening(self, *numbers: signal.Signals) -> Iterator[None]:
        """Note ``numbers`` from now on; a second SIGINT is a KeyboardInterrupt. The main thread calls it. It may be entered again within
        itself and then keeps what it has noted.
        """
        if self._depth == 0:
            self.noted = None
        before = {number: signal.signal(number, self._note) for number in numbers}
        self._depth += 1
        try:
            with _kept_from_children(signal.SIGUSR1):
                yield
        finally:
            self._depth -= 1
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.noted is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = signal.Signals(number)


@contextlib.contextmanager
def _kept_from_children(number: signal.Signals) -> Iterator[None]:
    over = threading.Event()

    def stay_open() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        over.wait()

    receiver = threading.Thread(target=stay_open, name="signals", daemon=True)
    receiver.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()
        receiver.join()


LISTENER = Listener()
