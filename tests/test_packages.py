"""What is distributed works outside the source tree, and says what it lacks where it was installed without extras."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from small_images import write_images

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
# Modules that only extras install are made absent; nothing is found but the wheel and the libraries that this Python has.
START = """
import sys
sys.path[:0] = {paths!r}
for name in {absent!r}:
    sys.modules[name] = None
import massl_fast, massl_fast.kernels
assert massl_fast.__file__.startswith({place!r}) and massl_fast.kernels.__file__.startswith({place!r})
from massl_fast.cli import main
print("exit codes", *[main(command) for command in {commands!r}])
"""
EXTRAS = ("matplotlib", "tensorboard", "torch.utils.tensorboard", "wandb", "sklearn", "pycocotools", "nvidia.dali")


def build(hook: str, source: Path, target: Path) -> Path:
    """What a front end without build isolation calls; the built file."""
    shown = subprocess.run([sys.executable, "-c", BUILD, hook, str(target)], cwd=source, check=True, capture_output=True, text=True)
    return target / shown.stdout.split()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, the wheel that is made of the sdist alone)."""
    place = tmp_path_factory.mktemp("packages")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results", "plots")
    shutil.copytree(ROOT, place / "source", ignore=ignored)
    sdist = build("build_sdist", place / "source", place)
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    return sdist, build("build_wheel", unpacked, place)


def sources() -> set[str]:
    """Every file of the packages by its place in the wheel."""
    kept = {".py", ".yaml", ".html", ".css", ".typed"}
    found = {path: path.relative_to(ROOT) for path in (ROOT / "massl_fast").rglob("*")}
    found |= {path: Path("massl_fast", path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*")}
    return {str(place) for path, place in found.items() if path.is_file() and path.suffix in kept}


def test_the_wheel_holds_the_packages_whole_and_the_sdist_no_tests(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("METADATA"))
        described = message_from_string(archive.read(metadata).decode())
        scripts = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert sources() <= names and "massl_fast/py.typed" in names
    assert not [name for name in names if not name.startswith(("massl_fast/", "massl_fast-"))], "nothing lands outside the package"
    assert any(name.endswith("LICENSE") for name in names)
    assert "massl-fast = massl_fast.cli:main" in scripts
    extras = set(described.get_all("Provides-Extra"))
    assert {"dali-cuda12", "dali-cuda13", "report", "tensorboard", "wandb", "eval", "test"} <= extras
    always = [line for line in described.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in always if line.startswith(("nvidia", "matplotlib", "tensorboard", "wandb"))]
    with tarfile.open(sdist) as archive:
        held = [name.split("/", 1)[-1] for name in archive.getnames()]
    assert {"LICENSE", "README.md", "setup.py", "kernels/loss.py", "massl_fast/cli.py"} <= set(held)
    assert not [name for name in held if name.startswith(("tests", "bench", "docs"))]


def test_installed_without_extras_it_trains_and_names_what_is_missing(built, tmp_path):
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(tmp_path / "site")
    images = write_images(tmp_path / "images", classes=2, per_class=8)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    train = ["train", "--recipe", "demo", "--run.folder", "run", "--train.steps", "1", "--train.global_batch", "8"]
    train += ["--data.train", str(images), "--data.num_workers", "0", "--evaluation.train", str(images), "--evaluation.test", str(images)]
    train += ["--evaluation.ks=[3]", "--objective.memory_size=32", "--objective.block_size=16", "--optimizer.warmup_epochs=0"]
    evaluate = ["eval", "knn", "--checkpoint", "run", "--train", str(images), "--test", str(images), "--out", "found"]
    site = str(tmp_path / "site")
    program = START.format(paths=[site, *libraries], absent=EXTRAS, place=site, commands=[train, ["report", "run"], evaluate])
    # -I: no path of this folder and no environment; -S: no .pth file that leads back to the source tree.
    run = subprocess.run([sys.executable, "-I", "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.endswith("exit codes 0 2 2\n") and "Traceback" not in run.stderr, run.stderr
    assert (tmp_path / "run/metrics.jsonl").is_file() and not (tmp_path / "run/report.html").exists()
    assert "pip install 'massl-fast[report]'. The run goes on without; `massl-fast report` writes it afterwards." in run.stderr
    assert "pip install 'massl-fast[tensorboard]'" in " ".join(run.stdout.split()) and "nvidia.dali does not import" in run.stdout
    assert "massl-fast report: matplotlib does not import" in run.stderr
    assert "massl-fast eval knn: matplotlib does not import" in run.stderr and not (tmp_path / "found").exists()
