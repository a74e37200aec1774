"""The loader: the same batches whatever the workers and wherever it starts, and no trouble with bad files."""

import contextlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from massl_fast.data import torchvision_loader
from massl_fast.data.bad_files import read_bad_files
from massl_fast.data.crops import apply, draw, published_views, sample_generator
from massl_fast.data.decode import UnreadableImage, decode_rgb
from massl_fast.data.sources import open_source
from massl_fast.data.torchvision_loader import TorchvisionLoader

SHARED = Path(__file__).parents[2] / "../shared/data"
VIEWS = published_views(global_size=32, local_size=16, num_local=2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for n in range(50):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3)).astype(np.uint8))
        coarse.resize(tuple(generator.integers(30, 90, 2).tolist()), Image.BICUBIC).save(folder / f"{n:02d}.jpg")
    return folder


def make(folder, views=VIEWS, batch=8, **settings) -> TorchvisionLoader:
    return TorchvisionLoader(open_source(folder), views, **{"seed": 0, "global_batch": batch, "device_batch": batch, **settings})


def take(loader: TorchvisionLoader, count: int, start: int = 0) -> list:
    found = list(itertools.islice(loader.batches(start), count))
    loader.close()
    return found


def assert_same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


def test_a_batch_is_what_crops_say(photos):
    views = (VIEWS[2], VIEWS[0], VIEWS[1], VIEWS[3])  # not in order of size
    loader = make(photos, views, seed=7)
    assert loader.name == "torchvision" and loader.steps_per_epoch == 6
    (batch,) = take(loader, 1, start=13)  # epoch 2
    assert batch.indices.tolist() == loader.order.permutation(2)[8:16].tolist()
    assert [tuple(crop.shape) for crop in batch.crops] == [(8, 3, s, s) for s in (16, 32, 32, 16)]
    assert all(c.dtype == torch.float32 and c.is_contiguous(memory_format=torch.channels_last) for c in batch.crops)
    for n, index in enumerate(batch.indices.tolist()):
        image = decode_rgb(loader.source.read(index), "")
        generator = sample_generator(7, 2, index)
        for view, crop in zip(views, batch.crops):
            assert (apply(image, draw(view, generator, *image.size)) - crop[n]).abs().max() < 0.02  # a step of 255 at most


def test_workers_change_nothing(photos):
    one = take(make(photos, batch=8, device_batch=4, accumulation=2), 30)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    two = make(photos, batch=8, device_batch=4, accumulation=2, num_workers=2)
    assert_same(one, take(two, 30))
    assert_same(one[22:], take(two, 8, start=11))  # the same loader again, elsewhere
    assert torch.equal(state[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]


def test_ranks_together_are_one_process(photos):
    whole = take(make(photos, batch=12), 9)
    ranks = [take(make(photos, batch=12, device_batch=3, accumulation=2, rank=r, world_size=2), 18) for r in range(2)]
    for t, batch in enumerate(whole):
        parts = [rank[2 * t + a] for rank in ranks for a in range(2)]
        assert torch.equal(torch.cat([p.indices for p in parts]), batch.indices)
        for view, crop in enumerate(batch.crops):
            assert (torch.cat([p.crops[view] for p in parts]) - crop).abs().max() < 0.02


def test_seeds_and_epochs_differ(photos):
    (first,), (second,) = take(make(photos, seed=0), 1), take(make(photos, seed=1), 1)
    assert not torch.equal(first.indices, second.indices)
    loader = make(photos, batch=50)
    (first,), (second,) = take(loader, 1, 0), take(loader, 1, 1)
    here, there = (dict(zip(b.indices.tolist(), b.crops[0])) for b in (first, second))
    assert all(not torch.equal(here[i], there[i]) for i in range(50))


def spoil(folder: Path, into: Path) -> dict[str, str]:
    """A copy of ``folder`` with bad files in it: their names, and a word of the reason each will have."""
    shutil.copytree(folder, into)
    whole = (into / "00.jpg").read_bytes()
    (into / "zero.jpg").touch()
    (into / "cut 猫.jpg").write_bytes(whole[: len(whole) // 2])
    (into / "text.png").write_text("no image")
    return {"zero.jpg": "empty", "cut 猫.jpg": "truncated", "text.png": "format"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_named_and_replaced(photos, tmp_path, num_workers):
    bad = spoil(photos, tmp_path / "data")
    settings = dict(max_bad_percent=20, bad_files_path=tmp_path / "run/bad_files.txt", num_workers=num_workers)
    loader = make(tmp_path / "data", **settings)
    batches = take(loader, 12)  # two epochs of 48 of the 53
    assert loader.num_bad == 3 and loader.bad.names == set(bad) == read_bad_files(tmp_path / "run/bad_files.txt")
    lines = (tmp_path / "run/bad_files.txt").read_text().splitlines()
    assert len(lines) == 3 and all(bad[line.split("\t")[0]] in line for line in lines)
    shown = [loader.source.name(i) for b in batches for i in b.indices.tolist()]
    assert not set(shown) & set(bad) and len(shown) == 96
    # What replaces them does not hang on what was met before: a run that continues sees the same.
    assert_same(batches[5:], take(make(tmp_path / "data", **settings), 7, start=5))
    assert (tmp_path / "run/bad_files.txt").read_text().splitlines() == lines


def test_known_bad_files_are_left_out_from_the_start(photos, tmp_path):
    bad = spoil(photos, tmp_path / "data")
    loader = make(tmp_path / "data", bad_files=set(bad), max_bad_percent=0)
    take(loader, 12)
    assert loader.num_bad == 0 and len(loader.source) == 50


def test_a_file_that_vanishes_is_a_bad_file(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data")
    loader = make(tmp_path / "data", max_bad_percent=50)
    os.remove(tmp_path / "data/07.jpg")
    take(loader, 12)
    assert loader.bad.names == {"07.jpg"}


def test_too_many_bad_files_end_the_run(photos, tmp_path):
    spoil(photos, tmp_path / "data")
    with pytest.raises(ValueError, match=r"cannot be read, more than the 1 % that data\.max_bad_percent allows"):
        take(make(tmp_path / "data", max_bad_percent=1), 20)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_bad_files_ends_at_once(tmp_path, num_workers):
    for n in range(10):
        (tmp_path / f"{n}.jpg").write_text("no image")
    with pytest.raises(ValueError, match="tried one after another cannot be read") as caught:
        take(make(tmp_path, max_bad_percent=100, num_workers=num_workers), 1)
    assert "Traceback" not in str(caught.value)


def test_more_than_the_source_holds_is_refused(photos):
    with pytest.raises(ValueError, match="holds 50 images, but one step takes a global batch of 64"):
        make(photos, batch=64)


def test_too_little_shared_memory_is_said_before_the_start(photos, monkeypatch):
    class Small:
        f_bavail, f_frsize = 16, 4096

    monkeypatch.setattr(torchvision_loader.os, "statvfs", lambda path: Small)
    with pytest.raises(ValueError, match="shared memory"):
        make(photos, num_workers=2)
    make(photos, num_workers=0)


SIGNALLED = """
import os, signal, sys, time
from massl_fast.data.crops import published_views
from massl_fast.data.sources import open_source
from massl_fast.data.torchvision_loader import TorchvisionLoader

if __name__ == "__main__":
    views = published_views(global_size=32, local_size=16, num_local=0)
    loader = TorchvisionLoader(open_source(sys.argv[1]), views, seed=0, global_batch=8, device_batch=8, num_workers=1)
    batches = loader.batches(0)
    next(batches)
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.killpg(0, signal.SIGTERM)
    for _ in range(6):
        next(batches)
    print("survived", flush=True)
    time.sleep(60)
"""


def living(session: int) -> list[int]:
    """Processes of a session that are not yet ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def test_workers_outlive_a_termination_signal_but_not_the_main_process(photos, tmp_path):
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    command = [sys.executable, tmp_path / "signalled.py", photos]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "survived\n"
        assert len(living(process.pid)) >= 3  # itself, the server, the worker
        process.kill()
        end = time.monotonic() + 20
        while living(process.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert living(process.pid) == []


@pytest.mark.filterwarnings("ignore::Warning:PIL.*")
def test_odd_images_among_photos(tmp_path):
    odd, real = SHARED / "odd_images", SHARED / "imagenette128/val"
    if not odd.is_dir() or not real.is_dir():
        pytest.skip("the folders of odd images and real photos are not here")
    for file in [*odd.glob("*.*"), *sorted(real.glob("*/*.jpg"))[:1270]]:
        (tmp_path / file.name).symlink_to(file)
    loader = make(tmp_path, VIEWS[2:], batch=127, bad_files_path=tmp_path / "bad_files.txt")
    undecodable = set()
    for i in range(len(loader.source)):
        name = loader.source.name(i)
        if "pillow_" in name or "turbo_" in name:
            try:
                decode_rgb(loader.source.read(i), name)
            except UnreadableImage:
                undecodable.add(name)
    shown = {loader.source.name(i) for b in take(loader, loader.steps_per_epoch) for i in b.indices.tolist()}
    # The remainder of the epoch was not looked at; everything else was shown or is listed.
    looked_at = {loader.source.name(i) for i in loader.order.permutation(0)[: loader.steps_per_epoch * 127].tolist()}
    assert read_bad_files(tmp_path / "bad_files.txt") >= undecodable & looked_at
    assert loader.bad.names <= undecodable and looked_at - undecodable <= shown
