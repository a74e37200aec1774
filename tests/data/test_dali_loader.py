"""The DALI loader against the torchvision path: operation by operation, batch by batch, and on files that break decoders."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI is not installed; the torchvision loader covers what it does")

from massl_fast.data.bad_files import read_bad_files
from massl_fast.data.crops import View, published_views
from massl_fast.data.dali import graph as dali_graph
from massl_fast.data.dali import loader as dali_loader
from massl_fast.data.dali.draws import ViewTable, draw_batch, random_numbers
from massl_fast.data.dali.loader import DaliLoader
from massl_fast.data.sources import open_source
from massl_fast.data.torchvision_loader import TorchvisionLoader

SHARED = Path(__file__).parents[2] / "../shared/data"
PHOTOS, ODD = SHARED / "imagenette128/val", SHARED / "odd_images"
SIDE = 128
VIEWS = (
    *published_views(global_size=48, local_size=32, num_local=2),
    View(size=24, jitter_probability=0, grayscale_probability=0),  # neither colour nor blur
)


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def photo(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Smooth coloured shapes with fine grain: the spectrum of a photo, roughly."""
    random = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for octave in range(1, 6):
        coarse = random.uniform(0, 255, (3 * 2**octave, 4 * 2**octave, 3)).astype(np.uint8)
        image += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), float) / 2**octave
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for n in range(21):
        (folder / f"{n:02d}.jpg").write_bytes(jpeg(photo(n, 100 + 7 * n, 180 - 5 * n)))
    return folder


def loader(kind, path, views=VIEWS, **settings):
    batch = settings.pop("batch", 6)
    source = open_source(str(path))
    return kind(source, views, **{"seed": 5, "global_batch": batch, "device_batch": batch, "num_workers": 0, **settings})


def take(loader, start_step: int, count: int) -> list:
    batches = loader.batches(start_step)
    taken = [next(batches) for _ in range(count)]
    loader.close()
    return taken


def equal(a, b) -> bool:
    return torch.equal(a.indices, b.indices) and all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


def in_values(crops: torch.Tensor, view: View) -> torch.Tensor:
    """Normalised crops back in steps of 255."""
    std, mean = (torch.tensor(x)[:, None, None] for x in (view.std, view.mean))
    return (crops.float() * std + mean) * 255


# Parity, operation by operation


def only(**chosen) -> View:
    """A view that does one thing; the crop is the whole square image, so that the resize does nothing."""
    nothing = dict(size=SIDE, scale=(1, 1), ratio=(1, 1), flip_probability=0, jitter_probability=0, grayscale_probability=0)
    return View(**{**nothing, **chosen})


def jittered(*strengths: float) -> View:
    return only(jitter=strengths, jitter_probability=1)


RESIZE = dict(scale=(0.1, 1), ratio=(3 / 4, 4 / 3))
# Name: view, tolerance of the mean difference over the images and of any value's, in steps of 255.
OPERATIONS = {
    "decode": (only(), 0, 0),
    "flip": (only(flip_probability=0.5), 0, 0),
    "resize": (only(**RESIZE, size=96), 0.3, 40),  # the cubic sees past the edges of the crop, which the other repeats
    "brightness": (jittered(0.4, 0, 0, 0), 0.3, 1),
    "contrast": (jittered(0, 0.4, 0, 0), 0.3, 1),
    "saturation": (jittered(0, 0, 0.9, 0), 0.3, 1),
    "grey": (only(grayscale_probability=1), 0.3, 1),
    "brightness, contrast, saturation": (jittered(0.4, 0.4, 0.2, 0), 1.0, 60),  # clipped once instead of after each
    "hue": (jittered(0, 0, 0, 0.1), 5.5, 90),  # a turn about the grey axis instead of HSV's
    "blur": (only(blur_probability=1), 0.6, 100),  # a Gaussian instead of three boxes, edges reflected
    "solarize": (only(solarize_probability=0.5), 0, 0),
    "solarize at 60": (only(solarize_probability=1, solarize_threshold=60), 0, 0),
    "all": (View(size=96, blur_probability=0.5), 4.0, 255),
    "resize, bilinear": (only(**RESIZE, size=96, interpolation="bilinear"), 0.3, 40),
}


@pytest.fixture(scope="module", params=["generated", "real"])
def square_photos(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("square")
    if request.param == "real" and not PHOTOS.is_dir():
        pytest.skip("the folder of real photos is not here")
    real = sorted(PHOTOS.glob("*/*.jpg"))[::160] if request.param == "real" else []
    for n in range(12):
        (folder / f"{n:02d}.jpg").write_bytes(real[n].read_bytes() if real else jpeg(photo(n)))
    return folder


def test_every_operation_is_that_of_the_torchvision_path(square_photos):
    views = [view for view, _, _ in OPERATIONS.values()]
    (ours,), (theirs,) = (take(loader(kind, square_photos, views, batch=12), 0, 1) for kind in (DaliLoader, TorchvisionLoader))
    assert torch.equal(ours.indices, theirs.indices)
    for (name, (view, mean, most)), a, b in zip(OPERATIONS.items(), ours.crops, theirs.crops):
        difference = (in_values(a, view) - in_values(b, view)).abs()
        assert difference.mean() <= mean + 1e-3, f"{name}: mean {difference.mean():.2f}"
        assert difference.max() <= most + 1e-2, f"{name}: most {difference.max():.2f}"


def test_contrast_keeps_the_mean_grey_of_a_dark_image(tmp_path):
    for n in range(2):
        dark = np.random.default_rng(n).integers(10, 70, (64, 64, 3), dtype=np.uint8)
        (tmp_path / f"{n}.jpg").write_bytes(jpeg(Image.fromarray(dark), quality=100))
    view = View(size=64, scale=(1, 1), ratio=(1, 1), jitter=(0, 0.4, 0, 0), jitter_probability=1, grayscale_probability=1)
    plain = View(size=64, scale=(1, 1), ratio=(1, 1), jitter_probability=0, grayscale_probability=1)
    (batch,) = take(loader(DaliLoader, tmp_path, [view, plain], batch=2), 0, 1)
    changed, same = (in_values(crops, view) for crops in batch.crops)
    assert (changed - same).abs().mean() > 0.5
    torch.testing.assert_close(changed.mean((1, 2, 3)), same.mean((1, 2, 3)), atol=0.5, rtol=0)


def test_what_a_gpu_runs_is_what_the_cpu_runs():
    """Colour and blur have a form for GPUs, without branches and without a mean that returns to the host; here it runs on the CPU."""
    from nvidia.dali import fn, pipeline_def

    images = np.stack([np.asarray(photo(n)) for n in range(8)])
    draws = draw_batch(ViewTable(VIEWS), random_numbers(0, 0, range(8), len(VIEWS)), np.full(8, SIDE), np.full(8, SIDE))

    @pipeline_def(enable_conditionals=True)
    def graph(augment):
        pixels, matrix, mean_matrix, sigma = fn.external_source(
            source=lambda: [images, draws.matrix, draws.mean_matrix, draws.sigma], num_outputs=4, batch=True, layout=["HWC", "", "", ""]
        )
        drawn = {"matrix": matrix, "mean_matrix": mean_matrix}
        return tuple(dali_graph._blurred(dali_graph._coloured(pixels, drawn, n, augment), sigma[n], augment) for n in range(3))

    ours, theirs = (graph(augment, batch_size=8, num_threads=1, device_id=None).run() for augment in ("gpu", "cpu"))
    for a, b in zip(ours, theirs):
        difference = np.abs(np.array(a.as_tensor()).astype(int) - np.array(b.as_tensor()))
        assert difference.max() <= 1 and difference.mean() < 0.05


# The contract of loaders


def test_batches_are_those_of_the_torchvision_loader(folder):
    """Same images in the same order with the same crops, over the end of an epoch."""
    ours, theirs = (loader(kind, folder, accumulation=2, global_batch=6, device_batch=3) for kind in (DaliLoader, TorchvisionLoader))
    assert ours.steps_per_epoch == theirs.steps_per_epoch == 3
    for a, b in zip(take(ours, 0, 8), take(theirs, 0, 8)):
        assert torch.equal(a.indices, b.indices)
        for view, x, y in zip(VIEWS, a.crops, b.crops, strict=True):
            assert x.shape == y.shape == (3, 3, view.size, view.size)
            assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
            assert (in_values(x, view) - in_values(y, view)).abs().mean() < 8


def test_resuming_is_seeking_bit_for_bit(folder):
    whole = take(loader(DaliLoader, folder), 0, 6)
    resumed = loader(DaliLoader, folder, num_workers=3, prefetch=1)
    assert equal(take(resumed, 4, 1)[0], whole[4])
    assert equal(take(resumed, 2, 1)[0], whole[2])  # the same loader, sent back
    assert not equal(whole[0], whole[3])  # another epoch is another order
    assert not equal(take(loader(DaliLoader, folder, seed=6), 0, 1)[0], whole[0])


def test_ranks_together_hold_the_batch_of_one(folder):
    (whole,) = take(loader(DaliLoader, folder), 1, 1)
    parts = [take(loader(DaliLoader, folder, global_batch=6, device_batch=2, rank=r, world_size=3), 1, 1)[0] for r in range(3)]
    assert torch.equal(whole.indices, torch.cat([part.indices for part in parts]))
    for v, crops in enumerate(whole.crops):
        assert torch.equal(crops, torch.cat([part.crops[v] for part in parts]))


def test_crops_stay_as_they_are_while_the_loader_goes_on_and_after_it(folder):
    running = loader(DaliLoader, folder)
    batches = running.batches(0)
    first = next(batches)
    copies = [crops.clone() for crops in first.crops]
    for _ in range(5):
        next(batches)
    running.close()
    assert all(torch.equal(a, b) for a, b in zip(first.crops, copies))


def test_sixteen_bits_hold_the_same_crops(folder):
    (half,), (full,) = (take(loader(DaliLoader, folder, dtype=dtype), 0, 1) for dtype in (torch.float16, None))
    for a, b in zip(half.crops, full.crops):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a.float(), b, atol=2e-3, rtol=1e-3)


def test_without_a_gpu_a_note_says_so(folder):
    asked = loader(DaliLoader, folder, decode="mixed", augment="gpu")
    assert (asked.decode, asked.augment) == ("cpu", "cpu") and "decode mixed, augment gpu" in asked.notes[0]
    assert loader(DaliLoader, folder).notes == ()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(device="cuda:0", decode="mixed", augment="cpu"), "Set data.decode cpu"),
        (dict(dtype=torch.bfloat16), "float16 or float32"),
        (dict(batch=22), "22"),
        (dict(global_batch=5), "5"),
    ],
)
def test_settings_that_do_not_go_together_are_told(folder, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        loader(DaliLoader, folder, **settings)


# Files that break decoders


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """Photos, and among them: two that nobody reads, three that Pillow reads in DALI's stead."""
    for file in folder.glob("*.jpg"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = jpeg(photo(50, 200, 150))
    (tmp_path / "03 cut off.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "04 empty.jpg").write_bytes(b"")
    (tmp_path / "05 four components.jpg").write_bytes(jpeg(photo(51).convert("CMYK")))
    photo(52, 90, 130).save(tmp_path / "06 another format.png")
    photo(53, 50, 50).save(tmp_path / "07 wrong name.jpg", "PNG")
    return tmp_path


def test_a_damaged_file_ends_nothing_and_is_named_once(damaged, tmp_path):
    ours = loader(DaliLoader, damaged, batch=9, max_bad_percent=50, bad_files_path=tmp_path / "ours.txt")
    theirs = loader(TorchvisionLoader, damaged, batch=9, max_bad_percent=50, bad_files_path=tmp_path / "theirs.txt")
    for a, b in zip(take(ours, 0, 8), take(theirs, 0, 8)):
        assert torch.equal(a.indices, b.indices)
        for view, x, y in zip(VIEWS, a.crops, b.crops):
            assert (in_values(x, view) - in_values(y, view)).abs().mean() < 8
    assert read_bad_files(tmp_path / "ours.txt") == read_bad_files(tmp_path / "theirs.txt") >= {"03 cut off.jpg", "04 empty.jpg"}
    assert ours.num_bad == theirs.num_bad and (ours.bad.seen, ours.bad.unreadable) == (theirs.bad.seen, theirs.bad.unreadable)
    assert ours.num_on_host > 0


def test_the_pipeline_recovers_at_the_same_place(folder, tmp_path, monkeypatch):
    """DALI is handed files it cannot decode, as if the look at their headers had seen nothing."""
    expected = take(loader(DaliLoader, folder), 0, 5)
    for file in folder.glob("*.jpg"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = tmp_path / "09.jpg"
    whole = broken.read_bytes()
    size = Image.open(broken).size
    broken.write_bytes(whole[: len(whole) // 2])

    real = dali_loader.Feed._load
    built = []

    def trusting(feed, index):
        if feed.source.name(index) == broken.name and index not in feed.not_for_dali:
            return np.frombuffer(feed.source.read(index), np.uint8), size, True
        return real(feed, index)

    monkeypatch.setattr(dali_loader.Feed, "_load", trusting)
    build = dali_loader.build_graph
    monkeypatch.setattr(dali_loader, "build_graph", lambda *a, **k: built.append(1) or build(*a, **k))
    recovering = loader(DaliLoader, tmp_path, max_bad_percent=100, bad_files_path=tmp_path / "bad.txt")
    found = take(recovering, 0, 5)
    assert len(built) == 2
    assert read_bad_files(tmp_path / "bad.txt") == {broken.name}
    bad = 9
    for a, b in zip(found, expected):
        kept = b.indices != bad
        assert torch.equal(a.indices[kept], b.indices[kept]) and bad not in a.indices
        for x, y in zip(a.crops, b.crops):
            assert torch.equal(x[kept], y[kept])


def test_an_error_that_no_image_explains_is_raised(folder, monkeypatch):
    class Failing:
        def __init__(self, source):
            self.source = source

        def run(self, stream):
            self.source()
            raise RuntimeError("out of memory")

    monkeypatch.setattr(dali_loader, "build_graph", lambda views, source, **settings: Failing(source))
    with pytest.raises(RuntimeError, match="out of memory"):
        take(loader(DaliLoader, folder), 0, 1)


def test_too_many_bad_files_end_the_run_with_a_sentence(tmp_path):
    for n in range(12):
        (tmp_path / f"{n}.jpg").write_bytes(b"not an image" if n % 2 else jpeg(photo(n, 40, 40)))
    with pytest.raises(ValueError, match=r"data\.max_bad_percent allows"):
        take(loader(DaliLoader, tmp_path, batch=4), 0, 9)


def test_nothing_but_bad_files_is_a_sentence(tmp_path):
    for n in range(6):
        (tmp_path / f"{n}.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="cannot be read"):
        take(loader(DaliLoader, tmp_path, max_bad_percent=100), 0, 1)


def test_odd_images_among_photos(tmp_path):
    """One file in ten is odd: both loaders finish and name the same ones."""
    if not (ODD.is_dir() and PHOTOS.is_dir()):
        pytest.skip("the folders of odd images and real photos are not here")
    odd = sorted(file for file in ODD.glob("*.*") if file.suffix != ".csv")
    photos = sorted(PHOTOS.glob("*/*.jpg"))[: 9 * len(odd)]
    (tmp_path / "data").mkdir()
    for n, file in enumerate(odd + photos):
        (tmp_path / "data" / f"{n:04d}_{file.name}").symlink_to(file.resolve())
    views = published_views(global_size=16, local_size=8, num_local=1)
    named = []
    for kind in (DaliLoader, TorchvisionLoader):
        path = tmp_path / f"{kind.name}.txt"
        running = loader(kind, tmp_path / "data", views, batch=70, max_bad_percent=100, bad_files_path=path)
        seen = torch.cat([batch.indices for batch in take(running, 0, running.steps_per_epoch)])
        assert len(seen) == running.steps_per_epoch * 70
        named.append(read_bad_files(path))
    assert named[0] == named[1] and len(named[0]) > 20
    assert not any("imagenette" in name for name in named[0])
