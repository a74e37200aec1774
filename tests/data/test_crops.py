"""What views draw, and what they do to pixels, against torchvision's transforms on Pillow images."""

import colorsys
import io
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from massl_fast.data import crops
from massl_fast.data.crops import View, apply, color_, draw, largest_reduction, normalize, published_views, resize, sample_generator
from massl_fast.data.decode import UnreadableImage, decode_rgb
from massl_fast.data.pixels import Pixels

PHOTOS = Path(__file__).parents[2] / "../shared/data/imagenette128/val"


def generated_photo(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Smooth coloured shapes with fine grain: the spectrum of a photo, roughly."""
    random = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for octave in range(1, 6):
        coarse = random.uniform(0, 255, (3 * 2**octave, 4 * 2**octave, 3)).astype(np.uint8)
        image += np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), float) / 2**octave
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module", params=["generated", "real"])
def photos(request) -> list[Image.Image]:
    if request.param == "generated":
        return [generated_photo(seed) for seed in range(6)]
    if not PHOTOS.is_dir():
        pytest.skip("the folder of real photos is not here")
    return [Image.open(file).convert("RGB") for file in sorted(PHOTOS.glob("*/*.jpg"))[::250]]


def difference(ours: np.ndarray, theirs: Image.Image) -> np.ndarray:
    """Absolute difference of planes [3, H, W] and a Pillow image, in steps of 255."""
    return np.abs(ours.astype(int) - np.asarray(theirs.convert("RGB")).transpose(2, 0, 1).astype(int))


def adjusted(operation, image: Image.Image, amount: float) -> np.ndarray:
    planes = np.asarray(image).transpose(2, 0, 1).astype(np.float32).reshape(3, -1)
    return (operation(planes, amount) + 0.5).astype(np.uint8).reshape(3, image.height, image.width)


def blurred(image: Image.Image, sigma: float) -> np.ndarray:
    return crops.blur(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), sigma)


# Each operation


@pytest.mark.parametrize(
    ("name", "theirs", "amounts"),
    [
        ("brightness", tv.adjust_brightness, (0.6, 0.9, 1.4)),
        ("contrast", tv.adjust_contrast, (0.6, 0.9, 1.4)),
        ("saturation", tv.adjust_saturation, (0.8, 1.2)),
    ],
)
def test_blends_differ_from_pillow_by_rounding_alone(photos, name, theirs, amounts):
    for photo in photos:
        for amount in amounts:
            off = difference(adjusted(crops.JITTER[name], photo, amount), theirs(photo, amount))
            assert off.max() <= 1


def test_grey_is_pillows(photos):
    for photo in photos:
        assert difference(adjusted(crops.adjust_saturation, photo, 0.0), tv.rgb_to_grayscale(photo, 3)).max() <= 1


def test_hue_differs_from_pillow_by_its_256_angles(photos):
    # Pillow rounds the hue to 1/256 of the circle and saturation to 1/255: up to 3 % of a colour's chroma.
    for photo in photos:
        for turn in (-0.1, 0.03, 0.1):
            off = difference(adjusted(crops.adjust_hue, photo, turn), tv.adjust_hue(photo, turn))
            assert off.mean() <= 1.5 and np.percentile(off, 99) <= 7 and off.max() <= 20


def test_hue_is_the_rotation_of_hsv():
    random = np.random.default_rng(0)
    colours = np.concatenate([random.integers(0, 256, (3, 500)), np.eye(3)[:, [0, 1, 2]] * 255, np.full((3, 2), (0, 255))], 1)
    for turn in (-0.5, -0.37, 0.0, 0.1, 1 / 3, 0.5):
        turned = crops.adjust_hue(colours.astype(np.float32), turn)
        for got, colour in zip(turned.T, colours.T / 255):
            hue, saturation, value = colorsys.rgb_to_hsv(*colour)
            assert got == pytest.approx(255 * np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)), abs=2e-3)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 1.0, 1.9, 2.0])
def test_blur_is_pillows(photos, sigma):
    # Pillow rounds after each of its six passes, and repeats the border at each; here after each of two.
    for photo in photos:
        off = difference(blurred(photo, sigma), photo.filter(ImageFilter.GaussianBlur(sigma)))
        assert off.mean() <= 0.9
        assert off[:, 6:-6, 6:-6].max() <= 3


@pytest.mark.parametrize("shape", [(3, 40, 60), (1, 7, 5), (3, 1, 1), (3, 2, 33)], ids=str)
@pytest.mark.parametrize("sigma", [0.1, 0.55, 1.3, 2.0, 8.0])
def test_blur_in_integers_is_the_one_in_float32_but_for_rounding(shape, sigma):
    random = np.random.default_rng(0)
    for image in (random.integers(0, 256, shape), np.full(shape, 255), np.zeros(shape), 255 * random.integers(0, 2, shape)):
        image = image.astype(np.uint8)
        off = np.abs(crops.blur(image, sigma) - crops.gaussian_blur(image.astype(np.float32), sigma))
        assert off.max() <= 2.5 and off.mean() <= 0.9
    assert (crops.blur(np.full(shape, 255, np.uint8), sigma) == 255).all()


@given(st.floats(0.05, 8))
def test_blur_weights_have_the_variance_asked_for(sigma):
    weights = crops.gaussian_kernel(sigma)
    assert weights[0] + 2 * sum(weights[1:]) == pytest.approx(1)
    variance = 2 * sum(w * distance**2 for distance, w in enumerate(weights))
    assert variance == pytest.approx(sigma**2, rel=0.02, abs=0.01)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_and_resize_are_pillows(photos, interpolation):
    for n, photo in enumerate(photos):
        for size in (16, 96, 224):
            drawn = draw(View(size=size, scale=(0.05, 1.0), interpolation=interpolation), sample_generator(0, 0, n), *photo.size)
            box = (drawn.top, drawn.left, drawn.height, drawn.width)
            theirs = tv.resized_crop(photo, *box, [size, size], InterpolationMode(interpolation), antialias=True)
            theirs = tv.horizontal_flip(theirs) if drawn.flip else theirs
            off = difference(resize(torch.from_numpy(np.array(photo)), drawn), theirs)
            assert off.max() <= 3 and off.mean() <= 0.25


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_crop_of_an_image_decoded_smaller_is_moved_by_half_a_pixel_of_it_at_most(reduction):
    """Beside what a move by half a pixel of the smaller image, to the right and down, changes in the crop of the whole one."""
    for seed, (width, height) in enumerate(((1203, 805), (801, 1200), (1024, 768))):
        image = Pixels(jpeg(generated_photo(seed, width, height)), "x")
        whole, small = image.decode(), image.decode(reduction)
        assert small.shape[:2] == (-(-height // reduction), -(-width // reduction))
        drawn = replace(draw(View(size=64, scale=(0.6, 0.8)), sample_generator(0, 0, seed), width, height), left=9, top=11)
        assert largest_reduction([drawn]) >= reduction
        moved = replace(drawn, left=drawn.left + reduction // 2, top=drawn.top + reduction // 2)
        off, allowed = (np.abs(resize(whole, drawn).astype(int) - other).mean() for other in (resize(small, drawn), resize(whole, moved)))
        assert off <= 1.5 + allowed


def test_an_image_is_decoded_smaller_only_where_every_crop_still_shrinks():
    views = published_views()
    for n, (width, height) in enumerate(((500, 375), (1300, 1000), (2600, 2000), (5200, 4000), (200, 100))):
        draws = [draw(view, sample_generator(0, 0, n), width, height) for view in views]
        reduction = largest_reduction(draws)
        assert all(min(d.width, d.height) >= reduction * d.view.size for d in draws) or reduction == 1
        assert any(min(d.width, d.height) < 2 * reduction * d.view.size for d in draws) or reduction == 8


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}], ids=str)
def test_both_decoders_give_the_same_pixels(mode, options):
    for seed, size in enumerate(((160, 120), (33, 17), (1, 1), (8, 250))):
        data = jpeg(generated_photo(seed, *size).convert(mode), **options)
        image = Pixels(data, "x")
        assert image._plain and (image.width, image.height) == size
        assert (image.decode().numpy() == np.asarray(decode_rgb(data, "x"))).all()


def test_what_is_not_plain_or_refused_is_pillows():
    photo = generated_photo(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    png = io.BytesIO()
    photo.save(png, "PNG")
    for data in (jpeg(photo.convert("CMYK")), jpeg(photo, exif=turned), png.getvalue()):
        image = Pixels(data, "x")
        expected = np.asarray(decode_rgb(data, "x"))
        assert not image._plain and (image.decode().numpy() == expected).all() and expected.shape[:2] == (image.height, image.width)
    with pytest.raises(UnreadableImage):
        Pixels(jpeg(photo)[:-400], "x").decode()
    with pytest.raises(UnreadableImage):
        Pixels(bytes((255, 216, 255)), "x")


def test_a_damaged_jpeg_is_read_or_refused_as_pillow_reads_or_refuses_it():
    random, data = np.random.default_rng(0), jpeg(generated_photo(1, 64, 48))
    outcomes = Counter()
    for _ in range(150):
        damaged = bytearray(data)
        for at in random.integers(20, len(data), 3):
            damaged[at] = random.integers(256)
        damaged = bytes(damaged[: len(data) if random.random() < 0.7 else random.integers(300, len(data))])
        found = []
        for decode in (decode_rgb, lambda data, name: Pixels(data, name).decode().numpy()):
            try:
                found.append(np.asarray(decode(damaged, "x")))
            except UnreadableImage:
                found.append(None)
        expected, ours = found
        outcomes[expected is None] += 1
        assert (expected is None) == (ours is None)
        assert expected is None or (expected.shape == ours.shape and (expected == ours).all())
    assert min(outcomes.values()) > 10


def in_pillow(photo: Image.Image, drawn: crops.Drawn) -> Image.Image:
    """The same draw with torchvision's own operations, in the published order."""
    size = drawn.view.size
    box = (drawn.top, drawn.left, drawn.height, drawn.width)
    image = tv.resized_crop(photo, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    image = tv.horizontal_flip(image) if drawn.flip else image
    for name, amount in drawn.jitter:
        image = getattr(tv, f"adjust_{name}")(image, amount)
    image = tv.rgb_to_grayscale(image, 3) if drawn.grayscale else image
    image = image.filter(ImageFilter.GaussianBlur(drawn.blur_sigma)) if drawn.blur_sigma else image
    return tv.solarize(image, drawn.view.solarize_threshold) if drawn.solarize else image


def test_whole_views_are_torchvisions(photos):
    views = published_views(global_size=96, local_size=40, num_local=2)
    offs = []
    for n, photo in enumerate(photos):
        generator = sample_generator(1, 0, n)
        for view in views:
            drawn = draw(view, generator, *photo.size)
            theirs = normalize(torch.from_numpy(np.asarray(in_pillow(photo, drawn)).transpose(2, 0, 1).copy())[None], view)[0]
            ours = apply(photo, drawn)
            assert ours.shape == (3, view.size, view.size) and ours.dtype == torch.float32
            offs.append(((ours - theirs).abs() * torch.tensor(view.std)[:, None, None]).mean().item() * 255)
    # Solarizing turns a step of 1 around the threshold into one of 255: a few views stand out.
    assert np.median(offs) < 1.5 and max(offs) < 4


def test_solarize_is_exact():
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, 1)
    view = View(size=16, solarize_probability=1.0, jitter_probability=0, grayscale_probability=0, flip_probability=0)
    expected = np.asarray(tv.solarize(Image.fromarray(values[0].transpose(1, 2, 0)), 128)).transpose(2, 0, 1)
    color_(values, [draw(view, sample_generator(0, 0, 0), 16, 16)])
    assert (values[0] == expected).all()


def test_each_crop_of_many_is_what_it_is_alone():
    random = np.random.default_rng(3)
    view = View(size=24, blur_probability=0.5, solarize_probability=0.3, jitter_probability=0.7)
    drawn = [draw(view, sample_generator(0, 1, n), 50, 40) for n in range(70)]
    together = random.integers(0, 256, (70, 3, 24, 24)).astype(np.uint8)
    apart = together.copy()
    color_(together, drawn)
    for n, d in enumerate(drawn):
        color_(apart[n : n + 1], [d])
    assert (together == apart).all()


def test_normalize():
    view = View(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    values = torch.randint(0, 256, (5, 3, 8, 6), dtype=torch.uint8)
    expected = (values.double() / 255 - torch.tensor(view.mean).view(3, 1, 1)) / torch.tensor(view.std).view(3, 1, 1)
    got = normalize(values, view)
    assert got.dtype == torch.float32 and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


# What is drawn

DRAWS = 6000


@pytest.fixture(scope="module")
def drawn():
    view = View(blur_probability=0.1, solarize_probability=0.2)
    return [draw(view, sample_generator(5, 0, n), 500, 375) for n in range(DRAWS)]


def assert_share(count: int, of: int, probability: float) -> None:
    assert abs(count / of - probability) < 4.5 * math.sqrt(probability * (1 - probability) / of)


def assert_uniform(values, least: float, most: float) -> None:
    """Kolmogorov-Smirnov at about one in 10,000."""
    values = np.sort(np.asarray(values))
    assert least <= values[0] and values[-1] <= most
    expected = (values - least) / (most - least)
    assert np.abs(expected - np.arange(len(values)) / len(values)).max() < 2.2 / math.sqrt(len(values))


def test_probabilities(drawn):
    assert_share(sum(d.flip for d in drawn), DRAWS, 0.5)
    assert_share(sum(bool(d.jitter) for d in drawn), DRAWS, 0.8)
    assert_share(sum(d.grayscale for d in drawn), DRAWS, 0.2)
    assert_share(sum(d.blur_sigma > 0 for d in drawn), DRAWS, 0.1)
    assert_share(sum(d.solarize for d in drawn), DRAWS, 0.2)
    # One coin tells nothing about another.
    assert_share(sum(d.grayscale and d.flip for d in drawn), DRAWS, 0.1)
    assert_share(sum(d.solarize and bool(d.jitter) for d in drawn), DRAWS, 0.16)


def test_ranges(drawn):
    for name, least, most in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)):
        assert_uniform([dict(d.jitter)[name] for d in drawn if d.jitter], least, most)
    assert_uniform([d.blur_sigma for d in drawn if d.blur_sigma], 0.1, 2.0)


def test_every_order_of_jitter_is_as_likely(drawn):
    orders = Counter(tuple(name for name, _ in d.jitter) for d in drawn if d.jitter)
    assert len(orders) == 24
    for count in orders.values():
        assert_share(count, sum(orders.values()), 1 / 24)


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
@pytest.mark.parametrize("shape", [(500, 375), (80, 300)])
def test_boxes_are_distributed_as_torchvisions(scale, shape):
    width, height = shape
    ours = [draw(View(scale=scale), sample_generator(9, 0, n), width, height) for n in range(3000)]
    torch.manual_seed(0)
    blank = Image.new("L", shape)
    theirs = [RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)]
    pairs = {
        "top": ([d.top for d in ours], [t[0] for t in theirs]),
        "left": ([d.left for d in ours], [t[1] for t in theirs]),
        "area": ([d.width * d.height for d in ours], [t[2] * t[3] for t in theirs]),
        "ratio": ([d.width / d.height for d in ours], [t[3] / t[2] for t in theirs]),
    }
    for name, (a, b) in pairs.items():
        grid = np.sort(np.concatenate([a, b]))
        gap = np.abs(np.searchsorted(np.sort(a), grid, "right") - np.searchsorted(np.sort(b), grid, "right")).max() / 3000
        assert gap < 2.2 * math.sqrt(2 / 3000), name


@settings(max_examples=150)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 2**62), st.integers(0, 10**7))
def test_boxes_lie_in_the_image(width, height, seed, index):
    for view in published_views(num_local=1):
        d = draw(view, sample_generator(seed, 3, index), width, height)
        assert 0 <= d.left < d.left + d.width <= width and 0 <= d.top < d.top + d.height <= height


@pytest.mark.parametrize("shape", [(1, 1), (2, 900), (3000, 1), (17, 5)])
def test_tiny_and_narrow_images(shape):
    image = Image.new("RGB", shape, (10, 200, 90))
    for n in range(10):
        for view in published_views(global_size=32, local_size=16, num_local=1, solarize_probabilities=(0, 0, 0)):
            plain = View(size=view.size, scale=view.scale, jitter_probability=0, grayscale_probability=0, blur_probability=1)
            crop = apply(image, draw(plain, sample_generator(0, 0, n), *shape))
            mean, std = torch.tensor(plain.mean)[:, None, None], torch.tensor(plain.std)[:, None, None]
            assert ((crop * std + mean) * 255 - torch.tensor([10, 200, 90]).view(3, 1, 1)).abs().max() < 1.01


def test_draws_depend_on_seed_epoch_and_image_alone():
    view = View()

    def at(*key):
        return draw(view, sample_generator(*key), 300, 200)

    assert at(1, 2, 3) == at(1, 2, 3)
    assert len({at(*key) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, 3, 1))}) == 5
    # The second view of an image is the same whatever the first one was.
    first, second = sample_generator(0, 0, 0), sample_generator(0, 0, 0)
    draw(View(jitter_probability=0, scale=(0.9, 1.0)), first, 300, 200)
    draw(View(), second, 300, 200)
    assert draw(view, first, 300, 200) == draw(view, second, 300, 200)


def test_strength_zero_leaves_the_operation_out():
    view = View(jitter=(0.4, 0.0, 0.4, 0.0), jitter_probability=1.0)
    assert {name for n in range(50) for name, _ in draw(view, sample_generator(0, 0, n), 90, 90).jitter} == {"brightness", "saturation"}


# Settings


def test_published_views():
    views = published_views()
    assert len(views) == 12
    assert [v.size for v in views] == [224] * 2 + [96] * 10
    assert [v.blur_probability for v in views] == [1.0, 0.1] + [0.5] * 10
    assert [v.solarize_probability for v in views] == [0.0, 0.2] + [0.0] * 10
    assert {v.scale for v in views[:2]} == {(0.32, 1.0)} and {v.scale for v in views[2:]} == {(0.05, 0.32)}
    for view in views:
        assert view.ratio == (3 / 4, 4 / 3) and view.flip_probability == 0.5
        assert view.jitter == (0.4, 0.4, 0.2, 0.1) and view.jitter_probability == 0.8
        assert view.grayscale_probability == 0.2 and view.blur_sigma == (0.1, 2.0) and view.solarize_threshold == 128
    small = published_views(global_size=32, local_size=16, num_local=4, blur_probabilities=(0, 0, 0), jitter=(0.8, 0.8, 0.8, 0.2))
    assert len(small) == 6 and small[5].size == 16 and small[5].jitter[0] == 0.8 and small[0].blur_probability == 0


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"size": 0}, "size"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.3)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"flip_probability": 1.1}, "flip_probability"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "hue"),
        ({"jitter": (0.4, 0.4, 0.2)}, "jitter"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
    ],
)
def test_impossible_views_are_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        View(**bad)
    with pytest.raises(ValueError, match="local crops"):
        published_views(num_local=-1)
