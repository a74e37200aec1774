"""The first eight minutes on a GPU: ``python bench/all_on_gpu.py [--to FOLDER] [--device cpu]``.

Native tests, then every benchmark and profile, as ``massl-fast bench everything``, also where the package is not installed: then a folder
of links stands in for the installation, in which ``kernels/`` is ``massl_fast.kernels``, and every process that is started finds it. What
lacks a package is named and stops nothing else; packages in a folder named by PYTHONPATH count as installed.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def installed() -> bool:
    try:
        return importlib.util.find_spec("massl_fast.kernels") is not None
    except ModuleNotFoundError:
        return False


def main() -> int:
    arguments = ["bench", "everything", *sys.argv[1:]]
    if installed():
        return subprocess.call([sys.executable, "-m", "massl_fast", *arguments])
    with tempfile.TemporaryDirectory(prefix="massl_fast_") as folder:
        package = Path(folder, "massl_fast")
        package.mkdir()
        for entry in (ROOT / "massl_fast").iterdir():
            (package / entry.name).symlink_to(entry)
        (package / "kernels").symlink_to(ROOT / "kernels")
        # A script, not -m: that would put the current folder, which holds another massl_fast, first on the path.
        start = Path(folder, "massl_fast_here.py")
        start.write_text("import sys\n\nfrom massl_fast.cli import main\n\nif __name__ == '__main__':\n    sys.exit(main())\n")
        path = os.pathsep.join(part for part in (folder, os.environ.get("PYTHONPATH", "")) if part)
        return subprocess.call([sys.executable, str(start), *arguments], env={**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    sys.exit(main())
