"""What a step goes through, as ``TrainStep.observed`` names it."""

from __future__ import annotations

from collections.abc import Callable

TEACHER, STUDENT, LOSS, BACKWARD, CLIP, OPTIMIZER, AVERAGE, COMMIT, REST = PHASES = (
    "teacher",
    "student forward",
    "loss",
    "backward",
    "norms, check, clip",
    "optimizer",
    "teacher average",
    "enqueue",
    "rest",
)
"""``COMMIT`` is the objective's ``commit_``, ``REST`` lies between the others; ``AdamWWithTeacher`` moves the teacher in ``OPTIMIZER``."""

END = ""
"""Said by those who take many steps, after each."""

Observer = Callable[[str], None]
"""Is called with the name of a phase as it begins."""


def unobserved(phase: str) -> None:
    """The observer of a step that nobody watches."""
