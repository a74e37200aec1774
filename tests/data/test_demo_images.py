"""The generated images: complete or absent, the same again, and not to be told apart by their pixels."""

import json
import os

import numpy as np
import pytest

from massl_fast.data import demo
from massl_fast.data.decode import decode_rgb
from massl_fast.data.demo import FORMS, draw_picture, ensure_demo_images
from massl_fast.data.sources import open_source


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_A_CLASS", 40)
    monkeypatch.setattr(demo, "TEST_A_CLASS", 10)


def test_made_once_as_a_labelled_pair(few, tmp_path):
    train, test = ensure_demo_images(tmp_path / "runs/demo")
    made = os.stat(train).st_ino
    sources = open_source(train), open_source(test)
    assert [len(s) for s in sources] == [480, 120]
    assert sources[0].classes == sources[1].classes == tuple(sorted(FORMS)) and len(FORMS) >= 10
    image = decode_rgb(sources[0].read(5), "")
    assert image.size == (48, 48) and sources[0].read(5)[:2] == b"\xff\xd8"
    assert ensure_demo_images(tmp_path / "runs/demo") == (train, test) and os.stat(train).st_ino == made
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["demo"]


def test_another_version_is_made_anew_and_a_strangers_folder_is_not(few, tmp_path, monkeypatch):
    train, _ = ensure_demo_images(tmp_path / "demo")
    mark = tmp_path / "demo" / demo.MARK
    mark.write_text(json.dumps({"version": 0}))
    (train / "disc/0000.jpg").unlink()
    ensure_demo_images(tmp_path / "demo")
    assert (train / "disc/0000.jpg").exists() and json.loads(mark.read_text())["version"] == demo.VERSION
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_text("precious")
    with pytest.raises(ValueError, match="does not hold the demonstration images"):
        ensure_demo_images(tmp_path / "mine")
    assert (tmp_path / "mine/photo.jpg").read_text() == "precious"


def test_absent_when_it_could_not_be_finished(few, tmp_path, monkeypatch):
    def fail(form, number):
        if number % 1_000_000 == 30:
            raise OSError(28, "No space left on device")
        return draw_picture(form, number)

    monkeypatch.setattr(demo, "draw_picture", fail)
    with pytest.raises(ValueError, match="No space left on device"):
        ensure_demo_images(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_decided_by_their_numbers():
    for form in FORMS:
        assert draw_picture(form, 3).tobytes() == draw_picture(form, 3).tobytes() != draw_picture(form, 4).tobytes()


def test_pixels_hardly_tell_the_classes_apart():
    forms = list(FORMS)

    def pictures(first: int, count: int) -> np.ndarray:
        images = [draw_picture(form, 10_000_000 * k + first + n) for k, form in enumerate(forms) for n in range(count)]
        flat = np.stack([np.asarray(image, np.float32).ravel() for image in images]) - 128
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    train, test = pictures(0, 100), pictures(5000, 20)
    near = np.argsort(-test @ train.T, axis=1)[:, :20] // 100
    votes = np.stack([(near == k).sum(1) for k in range(len(forms))], 1)
    accuracy = (votes.argmax(1) == np.repeat(np.arange(len(forms)), 20)).mean()
    assert accuracy < 0.25  # chance is 1 in 12
