"""Ways in which a run ends before its end, each with a sentence for the user and an exit code."""

from __future__ import annotations


class Ended(RuntimeError):
    """The message says why. All ranks end together, so that one of them may speak for all; not so ``RankLost`` and ``OutOfMemory``."""

    exit_code = 1


class Diverged(Ended):
    """A value was not finite; the message says where, and which checkpoint is good."""


class Drifted(Ended):
    """Ranks no longer hold the same numbers."""


class RankLost(Ended):
    """A rank does not answer; the message names it where it can be known."""


class OutOfMemory(Ended):
    """Device or host had no more memory; the message names ways out. One rank may meet it alone."""


class Interrupted(Ended):
    """A signal ended the run after a finished step and a checkpoint."""

    exit_code = 75  # EX_TEMPFAIL: schedulers take it as "run again", and running again continues
