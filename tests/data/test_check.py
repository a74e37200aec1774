"""massl-fast data check."""

import argparse
import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from test_decode import READ_BY_SOME

from massl_fast.commands import data_check
from massl_fast.data import check
from massl_fast.data.bad_files import read_bad_files
from massl_fast.data.sources import open_source

pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL.*")
ODD = Path(__file__).parents[2] / "../shared/data/odd_images"


def run(*arguments) -> int:
    parser = argparse.ArgumentParser()
    data_check.add_arguments(parser)
    return data_check.run(parser.parse_args(list(map(str, arguments))))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    for name in "ab":
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (40, 40), "red").save(folder / "a/good.jpg")
    (folder / "b/copy.jpg").write_bytes((folder / "a/good.jpg").read_bytes())
    Image.new("L", (40, 20)).save(folder / "a/grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 40)).save(folder / "b/turned.jpg", exif=exif)
    (folder / "b/zero.jpg").touch()
    return folder


def test_what_is_found(folder, tmp_path, capsys):
    assert run(folder, "--output", tmp_path / "list.txt", "--workers", 1) == 0
    rows = [line.split("\t") for line in (tmp_path / "list.txt").read_text().splitlines() if not line.startswith("#")]
    assert [row[:2] for row in rows] == [
        ["a/grey.png", "tiny"],
        ["a/grey.png", "not_rgb"],
        ["b/copy.jpg", "duplicate"],
        ["b/turned.jpg", "rotated"],
        ["b/zero.jpg", "unreadable"],
    ]
    assert rows[0][2] == "40 × 20 pixels" and rows[2][2] == "the same bytes as a/good.jpg" and rows[3][2] == "EXIF orientation 6"
    assert read_bad_files(tmp_path / "list.txt") == {"b/zero.jpg"}
    assert len(open_source(folder, exclude=read_bad_files(tmp_path / "list.txt"))) == 4
    assert "5 images: 1 unreadable, 1 tiny, 1 duplicate, 1 not rgb, 1 rotated" in " ".join(capsys.readouterr().out.split())


def test_json_and_several_processes(tmp_path, capsys):
    for n in range(150):
        Image.new("RGB", (36, 36), (n, 0, 0)).save(tmp_path / f"{n:03d}.png")
    (tmp_path / "149.png").write_bytes((tmp_path / "002.png").read_bytes())
    assert run(tmp_path, "--output", tmp_path / "list.txt", "--workers", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["duplicate"], found["unreadable"]) == (150, 1, 0)
    assert check.check_source(open_source(tmp_path)) == [("149.png", "duplicate", "the same bytes as 002.png")]


@pytest.mark.parametrize("arguments", [["nowhere"], ["{data}", "--output", "no/such/list.txt"], ["{data}", "--workers", "0"]])
def test_mistakes_are_sentences(folder, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"\w+ .*\."):
        run(*(a.format(data=folder) for a in arguments))


def test_odd_images_are_as_pillow_says():
    if not ODD.is_dir():
        pytest.skip("the folder of odd images is not here")
    with open(ODD / "pillow_says.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file) if row["file"] != READ_BY_SOME}
    found = [problem for problem in check.check_source(open_source(ODD)) if problem[0] != READ_BY_SOME]
    by_problem = {problem: {n for n, p, _ in found if p == problem} for problem in check.PROBLEMS}
    assert by_problem["unreadable"] == {n for n, row in rows.items() if row["pillow"] != "ok"}
    assert by_problem["rotated"] >= {n for n in rows if n.startswith("exif_") and not n.endswith("_1.jpg")}
    readable = {n: row for n, row in rows.items() if row["pillow"] == "ok"}
    assert by_problem["not_rgb"] == {n for n, row in readable.items() if row["mode_or_error"] != "RGB"}
    assert by_problem["tiny"] == {n for n, row in readable.items() if min(int(row["width"]), int(row["height"])) < 32}
