import json

import numpy as np
import pytest
import torch
from PIL import Image

from massl_fast.cli import main
from massl_fast.evaluation.layouts.masks import read_mask, write_mask
from massl_fast.evaluation.video import network_size, one_hot_on_grid


@pytest.fixture
def checkpoint(tmp_path):
    """Weights of a small network, and the options that name it."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, embed_dim=192)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    return ["--checkpoint", str(tmp_path / "net.pth"), "--arch", "vit_tiny_patch16_224", "--model-args", "depth=1"]


def write_sequence(root, name, frames, objects=2, missing=()):
    """Coloured squares that move to the right, one pixel a frame."""
    generator = np.random.default_rng(0)
    background = generator.integers(90, 110, (64, 96, 3), dtype=np.uint8)
    for t in range(frames):
        pixels, mask = background.copy(), np.zeros((64, 96), np.uint8)
        for number in range(objects):
            rows, columns = slice(4 + 30 * number, 28 + 30 * number), slice(10 + 2 * t, 42 + 2 * t)
            pixels[rows, columns] = (220, 30, 40) if number == 0 else (20, 60, 230)
            mask[rows, columns] = number + 1
        for folder in ("JPEGImages", "Annotations"):
            (root / folder / "480p" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / f"JPEGImages/480p/{name}/{t:05d}.jpg", quality=95)
        if t not in missing:
            write_mask(root / f"Annotations/480p/{name}/{t:05d}.png", mask)
    listed = root / "ImageSets/2017/val.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    with open(listed, "a") as file:
        file.write(f"{name}\n")


def evaluate(root, checkpoint, *options):
    return main(
        ["eval", "video", *checkpoint, "--which", "teacher", "--data", str(root), "--image-size", "64", "--device", "cpu", *options]
    )


def test_masks_move_with_their_objects_and_are_written_as_the_official_evaluator_reads_them(tmp_path, checkpoint, capsys):
    root = tmp_path / "DAVIS"
    write_sequence(root, "two squares", 5)
    write_sequence(root, "one frame", 1)
    out = tmp_path / "out"
    assert evaluate(root, checkpoint, "--json", "--write", str(tmp_path / "masks"), "--out", str(out)) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["results"]) == ["teacher", "untrained", "raw pixels", "first mask repeated"]
    rows = result["results"]
    assert rows["raw pixels"]["j_mean_percent"] > 50  # colours tell these objects
    assert rows["raw pixels"]["jf_mean_percent"] == pytest.approx(
        (rows["raw pixels"]["j_mean_percent"] + rows["raw pixels"]["f_mean_percent"]) / 2
    )
    assert any("one frame has fewer than three frames" in note for note in result["notes"])
    assert result["published"] == [] and any("DAVIS-2017 val has 30 with 61" in text for text in result["departures"])
    written = sorted((tmp_path / "masks/teacher/two squares").iterdir())
    assert [file.name for file in written] == [f"{t:05d}.png" for t in range(5)]
    with Image.open(written[2]) as mask:
        assert mask.mode == "P" and mask.size == (96, 64)
    np.testing.assert_array_equal(read_mask(written[0]), read_mask(root / "Annotations/480p/two squares/00000.png"))
    assert (out / "result.json").is_file() and (out / result["pictures"][0]["file"]).is_file()


def test_sequences_without_truth_are_predicted_but_not_scored(tmp_path, checkpoint, capsys):
    root = tmp_path / "DAVIS"
    write_sequence(root, "blind", 3, missing=(1, 2))
    assert evaluate(root, checkpoint) == 2
    assert "Set --write to keep predictions" in capsys.readouterr().err
    assert evaluate(root, checkpoint, "--write", str(tmp_path / "masks")) == 0
    assert len(list((tmp_path / "masks/teacher/blind").iterdir())) == 3


def test_an_object_that_no_patch_hits_keeps_its_number():
    mask = np.zeros((64, 96), np.uint8)
    mask[1:3, 1:3], mask[20:60, 20:60] = 1, 2
    mask[40:, 64:] = 0
    one_hot = one_hot_on_grid(mask, (4, 6))
    # Patches take the pixel at their centre: a corner would shift every object by half a patch.
    assert one_hot[2].tolist() == [[float(mask[8 + 16 * r, 8 + 16 * c] == 2) for c in range(6)] for r in range(4)]
    assert one_hot.shape == (3, 4, 6) and not one_hot[1].any() and one_hot[2].any()


@pytest.mark.parametrize(
    ("shape", "shorter", "patch", "size"),
    [
        ((480, 854), 480, 16, (480, 832)),
        ((480, 910), 480, 8, (480, 896)),
        ((854, 480), 480, 14, (826, 476)),
        ((480, 480), 480, 16, (480, 480)),
    ],
)
def test_the_longer_side_is_cut_down_to_a_multiple_of_64(shape, shorter, patch, size):
    assert network_size(shape, shorter, patch) == size
