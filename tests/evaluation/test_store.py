"""Kept features: whole or absent, found by what they depend on, continued where an extraction was interrupted."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from massl_fast.data.sources import open_source
from massl_fast.evaluation.features import LabelledImages, extract, raw_pixels
from massl_fast.evaluation.store import FeatureStore
from massl_fast.evaluation.subject import RecipeFunction
from massl_fast.models.backbone import build_backbone
from small_images import write_images

EXTRACTION = dict(device="cpu", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), batch_size=4)
ARGUMENTS = dict(patch_size=8, embed_dim=24, depth=1, num_heads=3)


def network(seed=1):
    torch.manual_seed(seed)
    return build_backbone("vit_tiny_patch16_224", image_size=16, model_args=ARGUMENTS)


@pytest.fixture
def source(tmp_path):
    return open_source(write_images(tmp_path / "images", classes=2, per_class=7))


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "kept", quiet=True)


def kept(store, functions, images, recipe="cls", **changes):
    return store.features(functions, images, recipe=recipe, precision="fp32", **(EXTRACTION | changes))


def folders(store):
    return sorted(path.name for path in store.folder.iterdir())


class Counting(nn.Module):
    """A network that counts the images it sees, and may fail after some of them."""

    def __init__(self, fails_after=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen, self.fails_after = 0, fails_after

    def forward(self, images):
        if self.fails_after is not None and self.seen >= self.fails_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        return self.scale * images.mean((2, 3))


def test_kept_features_are_those_of_an_extraction_and_are_not_made_twice(source, store):
    images, net = LabelledImages(source, 16), Counting()
    expected = extract({"a": net, "raw": raw_pixels}, images, **EXTRACTION)
    for _ in range(2):
        found = kept(store, {"a": net, "raw": raw_pixels}, images)
        for name, part in expected.items():
            for attribute in ("features", "labels", "indices"):
                assert torch.equal(getattr(found[name], attribute), getattr(part, attribute))
            assert found[name].classes == part.classes and found[name].unreadable == ()
    assert net.seen == 2 * len(source) and len(folders(store)) == 2


def test_they_are_mapped_and_changing_them_does_not_reach_the_disk(source, store):
    images, net = LabelledImages(source, 16), Counting()
    first = kept(store, {"a": net}, images)["a"].features
    assert str(next(store.folder.glob("*/features.npy"))) in Path("/proc/self/maps").read_text()
    copied = first.clone()
    first.zero_()
    assert torch.equal(kept(store, {"a": net}, images)["a"].features, copied)


def test_the_same_weights_in_another_object_find_them_and_other_weights_do_not(source, store):
    images = LabelledImages(source, 16)
    kept(store, {"teacher": RecipeFunction(network(1), "cls")}, images)
    kept(store, {"another name": RecipeFunction(network(1), "cls")}, images)
    assert len(folders(store)) == 1
    kept(store, {"teacher": RecipeFunction(network(2), "cls")}, images)
    assert len(folders(store)) == 2


def test_what_features_depend_on_tells_them_apart(source, store, tmp_path):
    function = {"a": RecipeFunction(network(), "pooled")}
    images = LabelledImages(source, 16)
    kept(store, function, images)
    variants = [
        lambda: kept(store, function, LabelledImages(source, 24)),
        lambda: kept(store, function, LabelledImages(source, 16, resize_ratio=1.2)),
        lambda: kept(store, function, LabelledImages(source, 16, positions=[1, 2])),
        lambda: kept(store, function, images, recipe="mean"),
        lambda: kept(store, function, images, mean=(0.1, 0.2, 0.3)),
        lambda: store.features(function, images, recipe="cls", precision="bf16", **EXTRACTION, amp_dtype=torch.bfloat16),
    ]
    for count, variant in enumerate(variants, start=2):
        variant()
        assert len(folders(store)) == count
    some = tmp_path / "images" / source.name(3)
    os.utime(some, ns=(1, 1))  # the file may hold another image now
    kept(store, function, LabelledImages(open_source(tmp_path / "images"), 16))
    assert len(folders(store)) == len(variants) + 2


def test_an_interrupted_extraction_is_not_taken_for_whole_and_continues(source, store):
    images = LabelledImages(source, 16)
    with pytest.raises(KeyboardInterrupt):
        kept(store, {"a": Counting(fails_after=8)}, images)
    assert [name.endswith(".partial") for name in folders(store)] == [True]
    resumed = Counting()
    found = kept(store, {"a": resumed}, images)["a"]
    assert resumed.seen == len(source) - 8
    assert torch.equal(found.features, extract({"a": Counting()}, images, **EXTRACTION)["a"].features)
    assert not folders(store)[0].endswith(".partial") and len(folders(store)) == 1


def test_damaged_notes_of_an_interrupted_extraction_are_not_trusted(source, store):
    images = LabelledImages(source, 16)
    for text in ("", "{}", '{"rows": 999}', '{"rows": -1}', "[1]", '{"rows": "x"}'):
        with pytest.raises(KeyboardInterrupt):
            kept(store, {"a": Counting(fails_after=4)}, images)
        next(store.folder.glob("*.partial/progress.json")).write_text(text)
        fresh = Counting()
        kept(store, {"a": fresh}, images)
        assert fresh.seen == len(source)
        shutil.rmtree(store.folder)


def test_unreadable_images_in_the_midst_are_left_out_and_named_from_the_disk_too(source, store):
    with open(f"{source.path}/{source.name(5)}", "wb") as file:
        file.write(b"no image")
    images = LabelledImages(source, 16)
    for _ in range(2):
        found = kept(store, {"a": Counting()}, images)["a"]
        assert found.unreadable == (source.name(5),) and len(found.features) == len(source) - 1
        assert found.indices.tolist() == [i for i in range(len(source)) if i != 5]
    names = next(store.folder.glob("*/names.txt")).read_text().splitlines()
    assert names == [source.name(i) for i in found.indices.tolist()]


def test_nothing_readable_leaves_nothing(tmp_path, store):
    folder = tmp_path / "broken" / "ant"
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="None of the 1 images"):
        kept(store, {"a": Counting()}, LabelledImages(open_source(folder.parent), 16))
    assert folders(store) == []


def test_fp16_halves_the_file_and_refuses_what_overflows(source, tmp_path):
    images, half = LabelledImages(source, 16), FeatureStore(tmp_path / "half", "fp16", quiet=True)
    whole = FeatureStore(tmp_path / "whole", quiet=True)
    found, exact = (kept(store, {"a": RecipeFunction(network(), "cls")}, images)["a"].features for store in (half, whole))
    assert found.dtype == torch.float16 and torch.equal(found, exact.half())
    large = Counting()
    large.scale.data.fill_(1e6)
    with pytest.raises(ValueError, match="exceed the range of fp16"):
        kept(half, {"a": large}, images)


@pytest.mark.parametrize("damage", ["cut", "pickle", "meta", "swap"])
def test_damaged_features_are_a_sentence_and_never_unpickled(source, store, damage):
    images = LabelledImages(source, 16)
    kept(store, {"a": Counting()}, images)
    place = next(store.folder.iterdir())
    if damage == "cut":
        (place / "features.npy").write_bytes((place / "features.npy").read_bytes()[:-40])
    elif damage == "pickle":
        np.save(place / "labels.npy", np.array([object()] * len(source)), allow_pickle=True)
    elif damage == "meta":
        (place / "meta.json").write_text(json.dumps({"recipe": "cls"}))
    else:
        np.save(place / "labels.npy", np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"are damaged .* Delete that folder"):
        kept(store, {"a": Counting()}, images)


def test_a_second_process_at_the_same_features_is_a_sentence(source, store):
    images = LabelledImages(source, 16)

    class Second(Counting):
        def forward(self, batch):
            with pytest.raises(ValueError, match="Another process is extracting the same features"):
                kept(store, {"a": Counting()}, images)
            return super().forward(batch)

    class SameHash(Second):
        pass

    SameHash.__name__ = "Counting"
    found = kept(store, {"a": SameHash()}, images)["a"]
    assert len(found.features) == len(source)
    assert not list(store.folder.glob("*.lock"))


def test_a_folder_that_cannot_be_written_is_a_sentence(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Features cannot be kept in .*file"):
        kept(FeatureStore(tmp_path / "file", quiet=True), {"a": Counting()}, LabelledImages(source, 16))
