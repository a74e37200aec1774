import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from massl_fast.evaluation.transfer import SETS, Transfer, TransferSettings, open_set

sys.path.insert(0, str(Path(__file__).parent))

import small_subjects as small


def write_country(root):
    for split, count in (("train", 4), ("test", 2)):
        small.write_classes(root / "country211" / split, ("AD", "AE"), count, seed=len(split))


def write_pets(root):
    base = root / "oxford-iiit-pet"
    lines = {"trainval": [], "test": []}
    for number, name in enumerate(("Abyssinian", "beagle")):
        for i in range(6):
            small.photo(base / f"images/{name}_{i}.jpg", small.COLOURS[number], 10 * number + i)
            lines["trainval" if i < 4 else "test"].append(f"{name}_{i} {number + 1} 1 1")
    (base / "annotations").mkdir()
    for split, rows in lines.items():
        (base / f"annotations/{split}.txt").write_text("\n".join(rows) + "\n")


def test_sets_that_are_there_are_evaluated_and_absent_ones_named(tmp_path):
    write_country(tmp_path)
    write_pets(tmp_path)
    protocol = Transfer(TransferSettings(data=str(tmp_path), k=(1, 20)))
    result = protocol.run(small.subject_of())
    row = result.results["raw pixels"]
    assert row["pets_k1_percent"] == row["country_k1_percent"] == row["mean_k1_percent"] == 100
    assert sum("This set is absent" in note for note in result.notes) == len(SETS) - 2
    assert any("20 compares with all 8 training images" in note for note in result.notes)
    assert result.published == [] and result.data["pets, test"]["images"] == 4


def test_images_of_an_array_are_read_as_they_are(tmp_path):
    base = tmp_path / "stl10_binary"
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (3, 3, 96, 96), dtype=np.uint8)
    pixels.transpose(0, 1, 3, 2).tofile(base / "test_X.bin")
    np.array([1, 2, 1], np.uint8).tofile(base / "test_y.bin")
    (base / "class_names.txt").write_text("airplane\nbird\n")
    kind = SETS["stl"][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_check_integrity", lambda self: True)
        source = open_set(kind, str(tmp_path), "test")
    assert [source.label(i) for i in range(3)] == [0, 1, 0]
    (tmp_path / "one.png").write_bytes(source.read(1))
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "one.png")), pixels[1].transpose(1, 2, 0))


def test_a_folder_without_any_set_and_an_unknown_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds none of the sets"):
        Transfer(TransferSettings(data=str(tmp_path))).run(small.subject_of())
    with pytest.raises(ValueError, match="they can be pets"):
        TransferSettings(data="x", sets=("mnist",))


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    write_pets(tmp_path)
    small.photo(tmp_path.parent / "secret_1.jpg", (1, 2, 3), 0)
    (tmp_path / "oxford-iiit-pet/annotations/test.txt").write_text("../../../secret_1 1 1 1\n")
    with pytest.raises(ValueError, match="no file inside"):
        Transfer(TransferSettings(data=str(tmp_path), sets=("pets",))).run(small.subject_of())
