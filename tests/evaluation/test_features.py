import io
import threading

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from massl_fast.data.sources import open_source
from massl_fast.evaluation import features
from massl_fast.evaluation.features import LabelledImages, extract, extract_features, fixed_subset, raw_pixels, resize_and_crop
from massl_fast.evaluation.knn import Knn, KnnSettings
from massl_fast.evaluation.subject import Subject

NORMALISATION = dict(device="cpu", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def picture(seed, size=(20, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_images(folder, per_class=6, classes=("ant", "bee", "cat"), seed=0):
    """Class folders of PNG files, each class of its own brightness."""
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            picture(seed + 100 * c + i).point(lambda v, c=c: v // 3 + 80 * c).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def source(tmp_path):
    return open_source(write_images(tmp_path / "images"))


def flatten(images):
    return images.flatten(1)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (224, 224), (500, 333), (100, 40), (227, 1000)])
def test_resizes_and_crops_as_torchvision_does(size):
    image = picture(3, size)
    published = transforms.Compose([transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)])
    assert np.array_equal(resize_and_crop(image, 224, features.default_resize_ratio(224)), published(image))


def test_small_images_keep_their_margin():
    image = picture(4, (32, 32))
    assert np.array_equal(resize_and_crop(image, 32, features.default_resize_ratio(32)), image)
    assert features.default_resize_ratio(64) == 1 and features.default_resize_ratio(96) == 256 / 224


def test_features_are_of_the_normalised_images_in_the_order_of_the_source(source):
    found = extract_features(flatten, source, image_size=16, batch_size=5, **NORMALISATION)
    for i in (0, 7, 17):
        image = Image.open(io.BytesIO(source.read(i))).convert("RGB")
        pixels = torch.tensor(np.array(resize_and_crop(image, 16, 1.0))).permute(2, 0, 1).double() / 255
        expected = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
        torch.testing.assert_close(found.features[i].double(), expected.flatten(), atol=1e-5, rtol=0)
    assert found.features.dtype == torch.float32 and found.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert found.indices.tolist() == list(range(18)) and found.classes == ("ant", "bee", "cat") and found.unreadable == ()


def test_unreadable_images_are_left_out_and_named(source):
    with open(f"{source.path}/bee/2.png", "wb") as file:
        file.write(b"\x89PNG but no image")
    found = extract_features(flatten, source, image_size=16, **NORMALISATION)
    assert found.unreadable == ("bee/2.png",)
    assert found.indices.tolist() == [i for i in range(18) if i != 8] and len(found.features) == len(found.labels) == 17


def test_nothing_readable_is_a_sentence(tmp_path):
    folder = tmp_path / "broken" / "ant"
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"None of the 1 images of .*broken can be read"):
        extract_features(flatten, open_source(folder.parent), image_size=16, **NORMALISATION)


def test_unlabelled_images_are_a_sentence_that_names_the_folder(tmp_path):
    picture(0).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=rf"{tmp_path} is not labelled .* Give a folder of class folders"):
        extract_features(flatten, open_source(tmp_path), image_size=16, **NORMALISATION)


def test_a_network_without_pooled_features_is_a_sentence(source):
    with pytest.raises(ValueError, match=r"shape \(18, 3, 16, 16\) for 18 images"):
        extract_features(lambda images: images, source, image_size=16, **NORMALISATION)


def test_workers_change_nothing(source):
    alone = extract_features(flatten, source, image_size=12, batch_size=4, **NORMALISATION)
    helped = extract_features(flatten, source, image_size=12, batch_size=4, num_workers=2, **NORMALISATION)
    assert torch.equal(alone.features, helped.features)


def test_workers_are_no_copies_of_this_process(source, monkeypatch):
    """A fork of a process that holds CUDA or DALI threads may lock up; what only this process knows must not reach a worker."""
    monkeypatch.setattr(features, "decode_rgb", lambda *_: pytest.fail("the worker is a fork"))
    assert len(extract_features(flatten, source, image_size=12, num_workers=1, **NORMALISATION).features) == 18


def test_one_pass_serves_all_networks_and_leaves_the_random_state(source):
    reads = []
    read = source.read
    source.read = lambda i: reads.append(i) or read(i)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = extract({"a": flatten, "b": raw_pixels}, LabelledImages(source, 16), **NORMALISATION)
    assert torch.equal(torch.get_rng_state(), before)
    assert reads == list(range(18)) and found.keys() == {"a", "b"}
    assert torch.equal(found["a"].features, found["b"].features)  # 16 pixels are less than 32: raw pixels are the pixels


def test_raw_pixels_are_averages():
    images = torch.randn(2, 3, 64, 64)
    expected = images.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(raw_pixels(images), expected)


def test_modules_are_run_in_eval_mode_and_put_back(source):
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)
            self.norm.eval()

        def features(self, images):
            assert not self.drop.training
            return self.drop(self.norm(images)).flatten(1)

    student = Student()
    student.norm.training = False
    first = extract_features(student.features, source, image_size=16, **NORMALISATION).features
    assert torch.equal(first, extract_features(student.features, source, image_size=16, **NORMALISATION).features)
    assert student.training and student.drop.training and not student.norm.training
    assert student.norm.num_batches_tracked == 0
    with pytest.raises(ZeroDivisionError):
        extract_features(BrokenModule(), source, image_size=16, **NORMALISATION)


class BrokenModule(nn.Module):
    def forward(self, images):
        raise ZeroDivisionError


def test_autocast_is_as_asked(source):
    seen = []
    linear = nn.Linear(3 * 16 * 16, 4)

    def network(images):
        seen.append(linear(images.flatten(1)).dtype)
        return linear(images.flatten(1))

    for dtype in (None, torch.bfloat16):
        assert extract_features(network, source, image_size=16, amp_dtype=dtype, **NORMALISATION).features.dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]


def test_subset_is_fixed_random_and_ascending():
    subset = fixed_subset(1000, 100)
    assert len(set(subset)) == 100 and (np.diff(subset) > 0).all() and np.array_equal(subset, fixed_subset(1000, 100))
    assert 300 < subset.mean() < 700
    assert np.array_equal(fixed_subset(5, 0), range(5)) and np.array_equal(fixed_subset(5, 9), range(5))


class Exchange:
    """all_gather among threads, each standing for a rank."""

    def __init__(self, world_size):
        self.barrier, self.rows, self.mine = threading.Barrier(world_size), [None] * world_size, threading.local()

    def all_gather(self, parts, tensor):
        self.rows[self.mine.rank] = tensor
        self.barrier.wait(10)
        for part, row in zip(parts, self.rows):
            part.copy_(row)
        self.barrier.wait(10)


@pytest.mark.parametrize(("world_size", "per_class"), [(2, 6), (4, 3), (5, 1)])
def test_ranks_share_the_work_and_agree_with_one(tmp_path, monkeypatch, world_size, per_class):
    source = open_source(write_images(tmp_path / "images", per_class))
    with open(f"{source.path}/cat/0.png", "wb") as file:
        file.write(b"no image")
    alone = extract_features(flatten, source, image_size=16, **NORMALISATION)
    exchange, results, calls = Exchange(world_size), {}, []
    monkeypatch.setattr(features.dist, "all_gather", exchange.all_gather)

    def work(rank):
        exchange.mine.rank = rank
        images = LabelledImages(source, 16, shard=(rank, world_size))
        functions = {"network": lambda batch: calls.append(len(batch)) or flatten(batch)}
        results[rank] = extract(functions, images, batch_size=2, **NORMALISATION)["network"]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert len(results) == world_size
    for found in results.values():
        for name in ("features", "labels", "indices"):
            assert torch.equal(getattr(found, name), getattr(alone, name))
        assert found.unreadable == alone.unreadable == ("cat/0.png",)
    # Every rank runs its network equally often, on batches of equal sizes: a sharded network would wait for ever otherwise.
    assert sum(calls) == world_size * -(-3 * per_class // world_size)


class TestKnn:
    """The protocol on real folders: as often as a run evaluates, and for any number of networks."""

    @pytest.fixture
    def folders(self, tmp_path):
        return write_images(tmp_path / "train"), write_images(tmp_path / "test", per_class=3, seed=50)

    def knn(self, folders, **changes):
        return Knn(KnnSettings(train=str(folders[0]), test=str(folders[1]), **({"k": (1, 5)} | changes)))

    def subject(self, **changes):
        settings = dict(networks={}, image_size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), device=torch.device("cpu"))
        return Subject(**(settings | dict(raw_pixels=False, keep_images=True) | changes))

    def percents(self, protocol, subject, **networks):
        found = protocol.run(subject.of({name: Function(network) for name, network in networks.items()})).results
        return {name: list(figures.values()) for name, figures in found.items()}

    def test_tells_what_can_be_told_apart(self, folders):
        found = self.percents(
            self.knn(folders),
            self.subject(),
            brightness=lambda images: torch.cat([images.mean((1, 2, 3))[:, None], torch.ones(len(images), 1)], 1),
            nothing=lambda images: torch.ones(len(images), 2),
        )
        assert found["brightness"][1] == 100.0 and found["nothing"] == [pytest.approx(100 / 3), pytest.approx(100 / 3)]

    def test_small_sets_are_decoded_once(self, folders, monkeypatch):
        protocol, subject, reads = self.knn(folders), self.subject(), []
        protocol.prepare(subject)
        for source in [source for key, source in subject.opened.items() if key[0] == "source"]:
            monkeypatch.setattr(source, "read", lambda i, read=source.read: reads.append(i) or read(i))
        first = self.percents(protocol, subject, teacher=flatten, student=raw_pixels)
        assert len(reads) == 27 and first == self.percents(protocol, subject, teacher=flatten, student=raw_pixels) and len(reads) == 27

    @pytest.mark.parametrize(("limit", "kept"), [(27 * 3 * 16 * 16 - 1, False), (27 * 3 * 16 * 16, True)])
    def test_large_sets_are_not_kept(self, folders, monkeypatch, limit, kept):
        monkeypatch.setattr("massl_fast.evaluation.subject.KEPT_BYTES", limit)
        subject = self.subject()
        self.percents(self.knn(folders), subject, network=flatten)
        held = [images.kept for key, images in subject.opened.items() if key[0] == "images"]
        assert [images is not None for images in held] == [kept, kept]
        if kept:
            assert held[0][0].shape == (18, 3, 16, 16)

    def test_a_subset_of_the_training_images(self, folders):
        subject = self.subject()
        result = self.knn(folders, max_train_images=9).run(subject.of({"network": Function(flatten)}))
        assert result.data["train"]["images"] == result.data["test"]["images"] == 9

    def test_what_is_known_beforehand_is_noted(self, folders):
        protocol, subject = self.knn(folders, k=(10, 200)), self.subject()
        assert protocol.prepare(subject) == ["k-NN with k = 200 compares with all 18 training images: there are no more."]
        assert protocol.run(subject.of({"network": Function(flatten)})).results["network"].keys() == {"k10_percent", "k200_percent"}

    def test_modules_under_evaluation_are_put_back(self, folders):
        network = timm.create_model("resnet18", num_classes=0)
        found = self.knn(folders, k=(3,)).run(self.subject(image_size=32).of({"network": network}))
        assert 0 <= found.results["network"]["k3_percent"] <= 100 and network.training and found.features == "pooled"


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)
