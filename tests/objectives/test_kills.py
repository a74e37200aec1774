"""SIGKILL at random moments: metrics of each objective are those of a run that was left alone."""

import subprocess
import sys
from pathlib import Path

from small import OBJECTIVES

SCRIPT = Path(__file__).parent / "kill_each.py"


def test_every_objective_killed_at_random_moments_repeats_its_metrics():
    found = subprocess.run([sys.executable, str(SCRIPT), "2"], capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("equal, bit for bit") == len(OBJECTIVES), found.stdout
