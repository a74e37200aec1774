"""What every test shares: nothing is downloaded, threads do not multiply, and the scripts of tests/ and bench/ can be imported."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(2)
for folder in (Path(__file__).parents[1] / "bench", Path(__file__).parent):
    sys.path.insert(0, str(folder))

import pytest  # noqa: E402

from small_images import write_images  # noqa: E402


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Sixteen images of two classes."""
    return write_images(tmp_path_factory.mktemp("images"), classes=2, per_class=8)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Beside other processes two threads spend most of their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
