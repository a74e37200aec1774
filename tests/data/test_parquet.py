"""Parquet files as Hugging Face's datasets writes them, and as other writers and accidents leave them."""

import itertools
import json
import pickle
import threading
from pathlib import Path

import pytest
import torch

from massl_fast.cli import main
from massl_fast.data.crops import published_views
from massl_fast.data.sources import open_source
from massl_fast.data.torchvision_loader import TorchvisionLoader
from massl_fast.extras import importable
from small_images import write_images

pa = pytest.importorskip("pyarrow", reason="PyArrow is not installed")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ("ant", "bee", "cat")


def write(path: Path, images: list, labels: list | None = None, *, plain: bool = False, names=NAMES, rows: int = 3) -> Path:
    """A file as datasets writes it: images as a struct of bytes and path (or plain binary), names of classes in the metadata."""
    kind = pa.binary() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = images if plain else [None if data is None else {"bytes": data, "path": f"{n}.JPEG"} for n, data in enumerate(images)]
    columns = {"image": pa.array(values, kind)} | ({} if labels is None else {"label": pa.array(labels)})
    table = pa.table(columns)
    if names:
        label = {"names": list(names), "_type": "ClassLabel"}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def contents(source) -> list[bytes]:
    return [source.read(i) for i in range(len(source))]


@pytest.fixture
def two(tmp_path) -> Path:
    write(tmp_path / "train-00000-of-00002.parquet", [bytes([n]) * (n + 1) for n in range(8)], [n % 3 for n in range(8)])
    write(tmp_path / "train-00001-of-00002.parquet", [bytes([n]) * 9 for n in range(4)], [2, 1, 0, 2])
    return tmp_path


@pytest.mark.parametrize("name", ["", "train-*.parquet", "train-{00000..00001}-of-00002.parquet"])
def test_a_split_as_hugging_face_stores_it(two, name):
    source = open_source(two / name)
    assert len(source) == 12 and source.classes == NAMES and not source.notes
    assert source.name(0) == "train-00000-of-00002.parquet/0" and source.name(9) == "train-00001-of-00002.parquet/1"
    assert [source.label(i) for i in (0, 1, 2, 8, 11)] == [0, 1, 2, 2, 2]
    expected = [bytes([n]) * (n + 1) for n in range(8)] + [bytes([n]) * 9 for n in range(4)]
    assert contents(source) == expected
    # At random, twice in a row in a group, backwards, from a copy in another process's hands.
    order = [7, 0, 1, 11, 2, 2, 10, 6, 8, 5, 4, 3, 9]
    assert [source.read(i) for i in order] == [expected[i] for i in order]
    assert contents(pickle.loads(pickle.dumps(source))) == expected
    less = source.without({"train-00000-of-00002.parquet/0"})
    assert len(less) == 11 and contents(less) == expected[1:] and less.label(0) == 1
    assert list(source.files()) == sorted(map(str, two.glob("*.parquet")))


def test_threads_read_at_once(two):
    source, wrong = open_source(two), []
    expected = contents(open_source(two))

    def read(seed: int) -> None:
        wrong.extend(i for k in range(200) if source.read(i := (7 * k + seed) % 12) != expected[i])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_plain_binary_texts_as_labels_and_other_columns(tmp_path):
    source = open_source(write(tmp_path / "a.parquet", [b"x", b"yy"], ["wasp", "ant"], plain=True, names=()))
    assert contents(source) == [b"x", b"yy"] and source.classes == ("ant", "wasp") and source.label(0) == 1
    table = pa.table({"text": ["a"], "picture": pa.array([b"z"], pa.large_binary())})
    pq.write_table(table, tmp_path / "b.parquet")
    source = open_source(tmp_path / "b.parquet")
    assert contents(source) == [b"z"] and source.classes == () and source.label(0) is None


@pytest.mark.parametrize("labels", [[-1, -1], None])
def test_a_test_split_has_no_labels(tmp_path, labels):
    source = open_source(write(tmp_path / "test-00000-of-00001.parquet", [b"x", b"y"], labels))
    assert source.classes == () and source.label(1) is None and not source.notes


def test_what_cannot_be_opened_is_a_sentence(tmp_path, two):
    def refused(path, *words):
        with pytest.raises(ValueError) as error:
            open_source(path)
        assert all(word in str(error.value) for word in words), error.value

    write(tmp_path / "both" / "train-00000-of-00001.parquet", [b"x"], [0])
    write(tmp_path / "both" / "validation-00000-of-00001.parquet", [b"x"], [0])
    refused(tmp_path / "both", "2 splits, train, validation", "train-*.parquet")
    assert len(open_source(tmp_path / "both" / "train-*.parquet")) == 1
    refused(tmp_path / "none-*.parquet", "There is no file")
    refused(tmp_path / "none-{0..2}.parquet", "3 of the 3 parquets")
    (tmp_path / "cut.parquet").write_bytes((two / "train-00000-of-00002.parquet").read_bytes()[:-9])
    refused(tmp_path / "cut.parquet", "cut.parquet cannot be read as Parquet")
    pq.write_table(pa.table({"a": [1], "label": [0]}), tmp_path / "numbers.parquet")
    refused(tmp_path / "numbers.parquet", "no column of images", "a (int64)")
    refused(write(tmp_path / "wild.parquet", [b"x"], [5]), "between 5 and 5", "3 classes")
    refused(write(tmp_path / "empty.parquet", [], None), "no rows")


def test_damaged_and_empty_rows_are_named_and_cost_no_other(tmp_path):
    # Bytes that no codec makes smaller, one group a row: damage is where it was done.
    images = [
        torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(n), dtype=torch.uint8).numpy().tobytes() for n in range(4)
    ]
    path = write(tmp_path / "d.parquet", [*images, None], [0] * 5, rows=1)
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[at : at + 40] = b"\xff" * 40
    path.write_bytes(data)
    source = open_source(path)
    assert [source.read(i) for i in (0, 1, 3)] == [images[0], images[1], images[3]]
    with pytest.raises(OSError, match=r"d\.parquet, row 2: "):
        source.read(2)
    with pytest.raises(OSError, match=r"d\.parquet, row 4 holds no bytes"):
        source.read(4)


@pytest.fixture
def photos(tmp_path) -> tuple[Path, Path]:
    """The same images as a folder and as Parquet, which holds an unreadable one in addition."""
    folder = write_images(tmp_path / "folder", classes=2, per_class=10, size=40)
    files = sorted(folder.rglob("*.jpg"))
    images = [file.read_bytes() for file in files]
    write(tmp_path / "table" / "train-00000-of-00002.parquet", images[:13], [0] * 10 + [1] * 3, names=("a", "b"))
    write(tmp_path / "table" / "train-00001-of-00002.parquet", images[13:], [1] * 7, names=("a", "b"))
    return folder, tmp_path / "table"


LOADERS = ["torchvision", pytest.param("dali", marks=pytest.mark.skipif(not importable("nvidia.dali"), reason="DALI is not installed"))]


@pytest.mark.parametrize("name", LOADERS)
def test_both_loaders_make_the_crops_of_a_folder_and_resume_by_seeking(photos, name):
    if name == "dali":
        from massl_fast.data.dali.loader import DaliLoader as Loader
    else:
        Loader = TorchvisionLoader
    views = published_views(global_size=16, local_size=8, num_local=1)

    def batches(path: Path, count: int, start: int, workers: int) -> list:
        loader = Loader(open_source(path), views, seed=3, global_batch=4, device_batch=4, num_workers=workers)
        found = list(itertools.islice(loader.batches(start), count))
        loader.close()
        return found

    expected = batches(photos[0], 7, 0, 1)
    found = batches(photos[1], 7, 0, 1)
    later = batches(photos[1], 2, 5, 1)
    for ours, theirs in zip((*found, *later), (*expected, *expected[5:])):
        assert torch.equal(ours.indices, theirs.indices)
        assert all(torch.equal(a, b) for a, b in zip(ours.crops, theirs.crops))


def test_data_check_reads_them(photos, tmp_path, capsys):
    write(photos[1] / "train-00002-of-00002.parquet", [b"no image", None], [0, 1], names=("a", "b"))
    assert main(["data", "check", str(photos[1]), "--output", str(tmp_path / "bad.txt"), "--workers", "1"]) == 0
    lines = (tmp_path / "bad.txt").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines if "unreadable" in line and not line.startswith("#")] == [
        ["train-00002-of-00002.parquet/0", "unreadable"],
        ["train-00002-of-00002.parquet/1", "unreadable"],
    ]
    assert "22 images: 2 unreadable" in " ".join(capsys.readouterr().out.split())


def test_where_pyarrow_is_missing_a_sentence_says_what_installs_it(two, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"PyArrow does not import .* pip install 'massl-fast\[parquet\]'"):
        open_source(two)
