"""Kernels, objectives, settings, what ranks share, the way to crops, and the ground floor are whole to a type checker (pyproject.toml)."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "objectives", "config", "distributed")
MODULES = ("extras", "hardware", "length", "plugins", "processes", "records", "registry")
DATA = ("bad_files", "check", "crops", "decode", "loader", "loaders", "order", "source", "sources")


def test_a_type_checker_finds_nothing(tmp_path):
    # As it is installed: kernels/ at the top is massl_fast.kernels.
    package = tmp_path / "massl_fast"
    package.mkdir()
    for path in (*(ROOT / "massl_fast").iterdir(), ROOT / "kernels"):
        (package / path.name).symlink_to(path)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    for name in PACKAGES:
        command += ["-p", f"massl_fast.{name}"]
    for name in (*MODULES, *(f"data.{name}" for name in DATA)):
        command += ["-m", f"massl_fast.{name}"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(tmp_path)})
    assert checked.returncode == 0, checked.stdout + checked.stderr
