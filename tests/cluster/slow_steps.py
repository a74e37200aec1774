"""A plugin that lets each step take longer, so that a job meets what the trial has in store for it. It changes no number."""

import os
import time

from massl_fast.engine.step import TrainStep

SECONDS = float(os.environ.get("SLOW_STEP_SECONDS", 0))
_step = TrainStep.__call__


def _slow_step(self, *arguments, **named):
    time.sleep(SECONDS)
    return _step(self, *arguments, **named)


TrainStep.__call__ = _slow_step
