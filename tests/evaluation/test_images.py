import numpy as np
import pytest
import torch
from PIL import Image

from massl_fast.evaluation.images import LongerSide, SizedImages, Square, files_below, in_order


@pytest.fixture
def folder(tmp_path):
    sizes = {"a.png": (40, 20), "b c.png": (20, 40), "ä.png": (40, 20), "d.png": (10, 10), "e.png": (40, 20)}
    for number, (name, size) in enumerate(sizes.items()):
        Image.new("RGB", size, (10 * number, 0, 0)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    return files_below(tmp_path, ["a.png", "b c.png", "broken.png", "ä.png", "d.png", "e.png"])


def test_images_of_one_shape_go_together_and_unreadable_ones_are_named(folder):
    images = SizedImages(folder, LongerSide(20))
    batches = [(positions, tuple(pixels.shape)) for positions, pixels in images.batches(256)]
    assert sorted(batches) == [([0, 3, 5], (3, 3, 10, 20)), ([1], (1, 3, 20, 10)), ([4], (1, 3, 10, 10))]
    assert images.names_of_unreadable() == ("broken.png",)


def test_large_images_go_fewer_at_a_time(folder):
    images = SizedImages(folder, Square(448))
    assert [len(positions) for positions, _ in images.batches(8)] == [2, 2, 1]


def test_ranks_share_the_images_and_put_them_together_in_order(folder):
    rows = []
    for rank in range(2):
        images = SizedImages(folder, Square(8), shard=(rank, 2))
        rows += [(position, int(pixels[i, 0, 0, 0])) for positions, pixels in images.batches(4) for i, position in enumerate(positions)]
    assert in_order(rows, (0, 1)) == [(0, 0), (1, 10), (3, 20), (4, 30), (5, 40)]


def test_nothing_is_enlarged_and_queries_are_cut_to_their_box(folder, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
    assert LongerSide(500)(image, 0).size == (50, 30)
    assert LongerSide(25)(image, 0).size == (25, 15)
    box = LongerSide(500, [(4.6, 5.2, 20, 25)])(image, 0)
    np.testing.assert_array_equal(np.array(box), np.array(image)[5:25, 5:20])


def test_rotated_and_grey_images_come_upright_and_in_colour(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 10), 77).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("CMYK", (30, 10)).save(tmp_path / "print.jpg")
    images = SizedImages(files_below(tmp_path, ["turned.jpg", "print.jpg"]), LongerSide(64))
    assert tuple(images[0][1].shape) == (3, 30, 10) and tuple(images[1][1].shape) == (3, 10, 30)


def test_workers_give_what_this_process_gives(folder):
    alone, worked = (
        {p: pixels[i] for ps, pixels in SizedImages(folder, Square(8)).batches(4, n) for i, p in enumerate(ps)} for n in (0, 1)
    )
    assert alone.keys() == worked.keys() and all(torch.equal(alone[p], worked[p]) for p in alone)
