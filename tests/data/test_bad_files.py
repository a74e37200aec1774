"""The list of images with problems, written and read."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_fast.data.bad_files import BadFiles, format_line, read_bad_files

file_names = st.binary(min_size=1).filter(lambda b: b"\0" not in b).map(os.fsdecode)


@settings(max_examples=60)
@given(st.lists(file_names, unique=True), st.text())
def test_any_name_survives(tmp_path_factory, names, detail):
    path = tmp_path_factory.getbasetemp() / "list_of_any_names.txt"
    lines = [format_line(name, "unreadable", detail) for name in names]
    path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    assert path.read_bytes().count(b"\n") == len(names)
    assert read_bad_files(path) == set(names)


def test_what_is_left_out(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_text("# a comment\na.jpg\tunreadable\ttruncated\nb.jpg\tnot_rgb\tL\nc.jpg\r\n\n\\#d.jpg\n e f.jpg\nb.jpg\ttiny\t3 × 3\n")
    assert read_bad_files(path) == {"a.jpg", "c.jpg", "#d.jpg", " e f.jpg"}
    with pytest.raises(ValueError, match="nowhere"):
        read_bad_files(tmp_path / "nowhere")


def test_named_once_even_by_several_runs(tmp_path):
    path = tmp_path / "run/bad_files.txt"
    for _ in range(2):
        bad = BadFiles("data", path, 50, 10)
        bad.count(10, [("a.jpg", "truncated"), ("ß\n.jpg", "empty")])
        bad.count(10, [("a.jpg", "truncated")])
        assert bad.names == {"a.jpg", "ß\n.jpg"}
    assert path.read_text() == "a.jpg\tunreadable\ttruncated\nß\\n.jpg\tunreadable\tempty\n"


def test_the_share_is_watched_from_some_images_on():
    bad = BadFiles("data", None, 5, 100)
    bad.count(50, [("a.jpg", "empty")] * 10)
    bad.count(200, [("a.jpg", "empty")])  # 11 of 250: 4.4 %
    with pytest.raises(ValueError, match=r"14 of the 255 images drawn so far from data cannot be read.*5 %.*b\.jpg: broken"):
        bad.count(5, [("a.jpg", "empty"), ("a.jpg", "empty"), ("b.jpg", "broken")])
