"""Folders and tars as users have them, broken ones included."""

import io
import json
import os
import pickle
import tarfile
import threading
from pathlib import Path

import pytest

from massl_fast.data.sources import expand_braces, open_source

CIFAR = Path(__file__).parents[2] / "../shared/data/cifar10"


def write(path: Path, data: bytes = b"bytes") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def contents(source) -> dict[str, bytes]:
    return {source.name(i): source.read(i) for i in range(len(source))}


def labels(source) -> dict[str, str]:
    return {source.name(i): source.classes[source.label(i)] for i in range(len(source))}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Folders


def test_class_folders(tmp_path):
    root = tmp_path / "data"
    write(root / "zebra/1.jpg", b"z1")
    write(root / "ant/deep/er/2.PNG", b"a2")
    write(root / "ant/notes.txt")
    (root / "moth").mkdir()  # an empty class keeps its number
    source = open_source(root)
    assert source.classes == ("ant", "moth", "zebra")
    assert contents(source) == {"ant/deep/er/2.PNG": b"a2", "zebra/1.jpg": b"z1"}
    assert labels(source) == {"ant/deep/er/2.PNG": "ant", "zebra/1.jpg": "zebra"}
    assert source.notes == ()


def test_flat_folder_has_no_labels(tmp_path):
    for name in ("b.jpeg", "a.webp", "c.tif", "readme.md", ".hidden.jpg"):
        write(tmp_path / "data" / name)
    source = open_source(tmp_path / "data")
    assert names(source) == ["a.webp", "b.jpeg", "c.tif"] and source.classes == () and source.label(0) is None


def test_loose_images_beside_folders_are_said(tmp_path):
    write(tmp_path / "data/a/1.jpg")
    write(tmp_path / "data/2.jpg")
    source = open_source(tmp_path / "data")
    assert names(source) == ["2.jpg", "a/1.jpg"] and source.classes == () and "1 images lie in" in source.notes[0]


def test_names_in_any_alphabet_and_any_bytes(tmp_path):
    wanted = ["猫/фото 1.jpg", "猫/tab\there.jpg", "猫/new\nline.jpg", "猫/🦜.png", os.fsdecode(b"\xe7\x8c\xab/latin\xe9.jpg")]
    for name in wanted:
        write(tmp_path / "data" / name, os.fsencode(name))
    source = pickle.loads(pickle.dumps(open_source(tmp_path / "data")))
    assert contents(source) == {name: os.fsencode(name) for name in wanted}
    assert source.classes == ("猫",)


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = tmp_path / "data"
    write(root / "a/1.jpg", b"1")
    write(tmp_path / "elsewhere/2.jpg", b"2")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a/up").symlink_to(root)
    (root / "a/self").symlink_to(root / "a")
    (root / "a/dead.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(root / "a/pipe.jpg")
    source = open_source(root)
    assert contents(source) == {"a/1.jpg": b"1", "b/2.jpg": b"2"} and source.classes == ("a", "b")
    assert "2 folders link back" in source.notes[0] and "2 files are broken links" in source.notes[1]


@pytest.mark.parametrize("what", ["missing", "empty", "no_images", "file"])
def test_nothing_to_open_is_one_sentence(tmp_path, what):
    path = tmp_path / "data"
    if what == "file":
        write(path)
    elif what != "missing":
        path.mkdir()
        if what == "no_images":
            write(path / "notes.txt")
            write(path / ".thumbs/1.jpg")
    with pytest.raises(ValueError, match=str(path)):
        open_source(path)


def test_without_and_the_order_of_another_set(tmp_path):
    for name in ("a/1.jpg", "b/2.jpg", "c/3.jpg", "c/4.jpg"):
        write(tmp_path / "train" / name, name.encode())
    for name in ("b/5.jpg", "c/6.jpg"):
        write(tmp_path / "test" / name)
    train = open_source(tmp_path / "train", exclude={"b/2.jpg", "c/4.jpg", "x.jpg"})
    assert contents(train) == {"a/1.jpg": b"a/1.jpg", "c/3.jpg": b"c/3.jpg"} and train.label(1) == 2
    assert "2 images named in the list of bad files are left out; 1 names in it do not occur here." in train.notes
    test = open_source(tmp_path / "test", classes=train.classes)
    assert labels(test) == {"b/5.jpg": "b", "c/6.jpg": "c"} and test.label(0) == 1
    with pytest.raises(ValueError, match="'b'"):
        open_source(tmp_path / "test", classes=("a", "c"))
    with pytest.raises(ValueError, match="none is left"):
        train.without(["a/1.jpg", "c/3.jpg"])


# Tars


def test_braces():
    assert expand_braces("x-{000..003}.tar") == [f"x-00{n}.tar" for n in range(4)]
    assert expand_braces("x-{9..11}.tar") == ["x-9.tar", "x-10.tar", "x-11.tar"]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("{2..0}") == ["2", "1", "0"]
    assert expand_braces("plain{}.tar") == ["plain{}.tar"]
    for bomb in ("{0..99999999999}", "{0..9999}{0..9999}"):
        with pytest.raises(ValueError, match="1,000,000"):
            expand_braces(bomb)


def test_shards_with_numbered_labels(tmp_path):
    for shard in range(3):
        write_tar(
            tmp_path / f"train-{shard:03d}.tar",
            {f"{n}.{end}": data for n in range(2) for end, data in (("jpg", b"%d/%d" % (shard, n)), ("cls", b"%d\n" % shard))},
        )
    expected = {f"train-00{s}.tar/{n}.jpg": b"%d/%d" % (s, n) for s in range(3) for n in range(2)}
    for path in (tmp_path, tmp_path / "train-{000..002}.tar"):
        source = pickle.loads(pickle.dumps(open_source(path)))
        assert contents(source) == expected and source.classes == ("0", "1", "2")
        assert [source.label(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    one = open_source(tmp_path / "train-001.tar")
    assert one.classes == ("cat", "dog", "owl") and one.label(0) == 1 and names(one)[0] == "train-001.tar/0.jpg"
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"classes\.txt names 2 classes"):
        open_source(tmp_path)


def test_labels_in_json_and_text(tmp_path):
    source = open_source(
        write_tar(
            tmp_path / "a.tar",
            {
                "x/1.jpg": b"1",
                "x/1.json": json.dumps({"label": "wolf", "caption": "…"}).encode(),
                "x/1.txt": b"a grey wolf",
                "x/2.png": b"2",
                "x/2.json": b'"elk"',
            },
        )
    )
    assert labels(source) == {"a.tar/x/1.jpg": "wolf", "a.tar/x/2.png": "elk"} and source.classes == ("elk", "wolf")
    captions = {f"{n}.{end}": data for n in range(6) for end, data in (("jpg", b""), ("txt", b"caption %d" % n))}
    source = open_source(write_tar(tmp_path / "captions.tar", captions))
    assert source.classes == () and "captions" in source.notes[0]
    words = {f"{n}.{end}": data for n in range(6) for end, data in (("jpg", b""), ("txt", b"word %d" % (n % 2)))}
    assert open_source(write_tar(tmp_path / "words.tar", words)).classes == ("word 0", "word 1")
    source = open_source(write_tar(tmp_path / "half.tar", {"1.jpg": b"", "1.cls": b"3", "2.jpg": b"", "2.cls": b"\xff", "3.jpg": b""}))
    assert source.classes == () and "2 of 3 images have no label" in source.notes[0]


def test_members_are_data_and_nothing_else(tmp_path):
    path = tmp_path / "sly.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {"../../out.jpg": b"up", "/etc/abs.jpg": b"root", "same.jpg": b"first", "猫.jpg": b"cat"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("same.jpg")
        info.size = 6
        tar.addfile(info, io.BytesIO(b"second"))
        for kind, name in (
            (tarfile.SYMTYPE, "link.jpg"),
            (tarfile.LNKTYPE, "hard.jpg"),
            (tarfile.FIFOTYPE, "p.jpg"),
            (tarfile.DIRTYPE, "d.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    source = open_source(path)
    assert {k.removeprefix("sly.tar/"): v for k, v in contents(source).items()} == {
        "../../out.jpg": b"up",
        "/etc/abs.jpg": b"root",
        "same.jpg": b"first",
        "same.jpg#2": b"second",
        "猫.jpg": b"cat",
    }
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before] == [tmp_path / "sly.tar.index.json"]


@pytest.mark.parametrize(("cut", "whole"), [(512 + 200, 0), (1024 + 100, 1), (1024 + 512 + 3, 1), (2048, 2), (4096 - 512, 3)])
def test_cut_off_tars_give_what_is_whole(tmp_path, cut, whole):
    path = write_tar(tmp_path / "a.tar", {f"{n}.jpg": b"%d" % n * 300 for n in range(4)})
    os.truncate(path, cut)
    if not whole:
        with pytest.raises(ValueError, match="no images"):
            open_source(path)
        return
    source = open_source(path)
    assert contents(source) == {f"a.tar/{n}.jpg": b"%d" % n * 300 for n in range(whole)}
    assert f"the {whole} images before are used" in source.notes[0]
    assert open_source(path).notes == source.notes  # said again when the index comes from its file


def test_a_damaged_header_is_said(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{n}.jpg": b"x" for n in range(4)})
    data = bytearray(path.read_bytes())
    data[2048 + 20] ^= 255
    path.write_bytes(data)
    source = open_source(path)
    assert len(source) == 2 and "cut off or damaged at byte 2,048" in source.notes[0]


@pytest.mark.parametrize("data", [b"", b"not a tar at all" * 100, b"\0" * 10240])
def test_what_is_no_tar_is_one_sentence(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar"):
        open_source(tmp_path / "a.tar")


def test_missing_and_compressed_tars(tmp_path):
    write_tar(tmp_path / "a-0.tar", {"1.jpg": b"x"})
    with pytest.raises(ValueError, match=r"a-1\.tar \(2 of the 3 tars"):
        open_source(tmp_path / "a-{0..2}.tar")
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="compressed"):
        open_source(tmp_path / "a.tar.gz")


def test_index_is_kept_and_renewed(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.jpg": b"old"})
    index = tmp_path / "a.tar.index.json"
    open_source(path)
    made = index.read_bytes()
    index.write_bytes(made.replace(b"1.jpg", b"9.jpg"))
    assert names(open_source(path)) == ["a.tar/9.jpg"]  # it is the file that is read
    write_tar(path, {"2.jpg": b"new", "3.jpg": b"newer"})
    assert contents(open_source(path)) == {"a.tar/2.jpg": b"new", "a.tar/3.jpg": b"newer"}
    renewed = json.loads(index.read_bytes())
    for sly in ([["2.jpg", -5, 3, "", None]], [["2.jpg", 0, 10**12, "", None]], [[1, 2]], [["x.jpg", 512, 3, "", 7]], None):
        index.write_text(json.dumps(renewed | {"images": sly}))
        assert names(open_source(path)) == ["a.tar/2.jpg", "a.tar/3.jpg"]
    index.write_bytes(b"\xff{")
    assert names(open_source(path)) == ["a.tar/2.jpg", "a.tar/3.jpg"]


def test_index_goes_to_the_cache_beside_read_only_data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    path = write_tar(folder / "a.tar", {"1.jpg": b"x"})
    folder.chmod(0o555)
    try:
        assert names(open_source(path)) == ["a.tar/1.jpg"]
        assert [p.name for p in folder.iterdir()] == ["a.tar"]
        (kept,) = (tmp_path / "cache").rglob("a.tar*.json")
        kept.write_bytes(kept.read_bytes().replace(b"1.jpg", b"9.jpg"))
        assert names(open_source(path)) == ["a.tar/9.jpg"]
    finally:
        folder.chmod(0o755)


def test_more_tars_than_stay_open_and_several_threads(tmp_path):
    for n in range(70):
        write_tar(tmp_path / f"{n:02d}.tar", {"x.jpg": b"%d" % n})
    source = open_source(tmp_path)
    wrong = []

    def read_all():
        wrong.extend(i for _ in range(3) for i in range(70) if source.read(i) != b"%d" % i)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(source._open) <= 64


def test_a_tar_that_shrinks_is_an_os_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 2000})
    source = open_source(path)
    os.truncate(path, 700)
    with pytest.raises(OSError, match="ends before"):
        source.read(0)


def test_cifar_shards():
    if not CIFAR.is_dir():
        pytest.skip("the CIFAR-10 tars are not here")
    source = open_source(CIFAR / "test-000.tar")
    assert len(source) == 10_000 and source.classes[0] == "airplane" and len(source.classes) == 10
    assert [sum(source.label(i) == c for i in range(len(source))) for c in range(10)] == [1000] * 10
    assert source.read(9_999)[:2] == b"\xff\xd8"
