import os
import pickle
import pickletools
import struct

import numpy as np
import pytest
from PIL import Image

from massl_fast.evaluation.layouts.revisited import load_plain, read_distractors, read_landmarks


def annotation(**changes):
    gnd = [
        {"bbx": [0.0, 1.0, 5.0, 6.0], "easy": [0, 2], "hard": [1], "junk": []},
        {"bbx": np.array([0, 0, 3, 3.5]), "easy": np.array([], np.int64), "hard": np.array([2], np.int32), "junk": np.array([0])},
    ]
    return {"imlist": ["one", "ünd zwei", "three"], "qimlist": ["q1", "q2"], "gnd": gnd} | changes


def write_set(root, content, protocol=4):
    (root / "jpg").mkdir(parents=True, exist_ok=True)
    for name in ("one", "ünd zwei", "three", "q1", "q2"):
        Image.new("RGB", (8, 8)).save(root / "jpg" / f"{name}.jpg")
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    (root / f"gnd_{root.name}.pkl").write_bytes(data)
    return root


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_lists_and_arrays_of_every_pickle_protocol_are_read(tmp_path, protocol):
    found = read_landmarks(write_set(tmp_path / "rsmall", annotation(), protocol))
    assert found.database == ("one.jpg", "ünd zwei.jpg", "three.jpg") and found.queries == ("q1.jpg", "q2.jpg")
    assert found.boxes == ((0, 1, 5, 6), (0, 0, 3, 3.5))
    assert [part.easy.tolist() for part in found.judgements] == [[0, 2], []]
    assert [part.hard.tolist() for part in found.judgements] == [[1], [2]]
    assert [part.junk.tolist() for part in found.judgements] == [[], [0]]


def test_numbers_of_numpy_and_a_folder_with_a_slash_are_read(tmp_path):
    content = annotation()
    content["gnd"][0]["easy"] = [np.int64(2), np.int32(0)]
    root = write_set(tmp_path / "rsmall", content)
    assert read_landmarks(root / "." / "").judgements[0].easy.tolist() == [0, 2]


class Harmful:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize(
    "thing",
    [
        Harmful(os.system, "touch {marker}"),
        Harmful(eval, "open({marker!r}, 'w')"),
        Harmful(np.load, "{marker}"),
        Harmful(np.fromfile, "{marker}"),
        Harmful(getattr, os, "system"),
        Harmful(bytearray, 10),
        np.array([Harmful(os.system, "touch {marker}")], object),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.array(["2020-01-01"], "datetime64[D]"),
        1 + 2j,
        range(3),
    ],
    ids=lambda thing: type(thing).__name__,
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_anything_else_is_refused_and_runs_nothing(tmp_path, thing, protocol):
    marker = tmp_path / "ran"
    if isinstance(thing, Harmful):
        function, arguments = thing.parts
        if function is getattr:
            arguments = ("", "join")
        thing = Harmful(function, *(a.format(marker=str(marker)) if isinstance(a, str) else a for a in arguments))
    root = write_set(tmp_path / "rsmall", annotation(extra=thing), protocol)
    with pytest.raises(ValueError, match=r"could run code|no annotation|cannot be read"):
        read_landmarks(root)
    assert not marker.exists()


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    "stream",
    [
        RECONSTRUCT + b"}S'__defaults__'\nI1\nsb.",  # BUILD on a function: would change it for good
        RECONSTRUCT + b"(N}S'_function'\nI1\nstb.",  # the same through the slots
        b"cnumpy\nndarray\n(I1000000000000\ntR.",  # an array of 8 TB
        RECONSTRUCT + b"(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I9\ntcnumpy\ndtype\n(S'i8'\nI0\nI1\ntRI00\nS'abc'\ntb.",
        RECONSTRUCT + b"(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\ntcnumpy\ndtype\n(S'O8'\nI0\nI1\ntRI00\n(lI1\natb.",  # objects
        b"\x80\x02cnumpy\ndtype\nU\x02i8\x85R(K\x03U\x01%tb.",  # a byte order that there is none of
        b"Pnowhere\n.",  # a persistent id
        b"c_codecs\nencode\n(Vabc\nVbz2\ntR.",  # a codec other than the one that NumPy's pickles use
        b"\x80\x04" + b"r" + struct.pack("<I", 2**31 - 1) + b".",  # a memo of 2³¹ entries
        b"cos\nsystem\n.",
        b"\x80\x02\x82\x01.",  # the extension registry
        b"garbage",
        b"",
    ],
)
def test_streams_written_by_hand_are_refused(tmp_path, stream):
    file = tmp_path / "gnd.pkl"
    file.write_bytes(stream)
    with pytest.raises(ValueError, match=r"could run code|cannot be read"):
        load_plain(file)


def test_arrays_of_python_2_are_read(tmp_path):
    """Protocol 0 of Python 2 writes bytes as quoted text with escapes, its binary protocols as short strings; both beyond ASCII."""
    kind = b"cnumpy\ndtype\n(S'i2'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    for text in (rb"S'\xc8\x00\xff\x00'" + b"\n", b"U\x04\xc8\x00\xff\x00"):
        file = tmp_path / "gnd.pkl"
        file.write_bytes(RECONSTRUCT + b"(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt" + kind + b"I00\n" + text + b"tb.")
        assert load_plain(file).numbers().tolist() == [200, 255]


def test_no_stream_changed_what_the_next_one_meets(tmp_path):
    test_lists_and_arrays_of_every_pickle_protocol_are_read(tmp_path, 2)
    assert "GLOBAL" in {op.name for op, _, _ in pickletools.genops(pickle.dumps(annotation(), 2))}  # arrays did take part


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"imlist": ["../jpg/one", "ünd zwei", "three"]}, "no file inside"),
        ({"imlist": ["/etc/passwd", "ünd zwei", "three"]}, "no file inside"),
        ({"imlist": ["one", "ünd zwei", "four"]}, "holds no four.jpg"),
        ({"imlist": ["one", 2, "three"]}, "lists of names"),
        ({"qimlist": ["q1"]}, "an entry for each query"),
        ({"gnd": [{}, {}]}, "needs bbx"),
        ({"gnd": [{"bbx": [0, 0, 1], "easy": [], "hard": [], "junk": []}] * 2}, "four numbers"),
        ({"gnd": [{"bbx": [0, 0, 1, np.nan], "easy": [], "hard": [], "junk": []}] * 2}, "four numbers"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": [3], "hard": [], "junk": []}] * 2}, "points beyond"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": [-1], "hard": [], "junk": []}] * 2}, "points beyond"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": [0.5], "hard": [], "junk": []}] * 2}, "whole numbers"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": ["0"], "hard": [], "junk": []}] * 2}, "whole numbers"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": [10**400], "hard": [], "junk": []}] * 2}, "whole numbers"),
    ],
)
def test_an_annotation_that_does_not_fit_is_refused_in_a_sentence(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        read_landmarks(write_set(tmp_path / "rsmall", annotation(**changes)))


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    root = write_set(tmp_path / "rsmall", annotation())
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.jpg")
    (root / "jpg/one.jpg").unlink()
    (root / "jpg/one.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ValueError, match="leads out of"):
        read_landmarks(root)


def test_distractors_are_those_of_the_list(tmp_path):
    root = tmp_path / "revisitop1m"
    (root / "jpg").mkdir(parents=True)
    (root / "revisitop1m.txt").write_text("0/12/a.jpg\nb.jpg\n")
    assert read_distractors(root) == (root / "jpg", ["0/12/a.jpg", "b.jpg"])
    (root / "revisitop1m.txt").write_text("../b.jpg\n")
    with pytest.raises(ValueError, match="no file inside"):
        read_distractors(root)
