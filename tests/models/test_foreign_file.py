"""Files of strangers: what is read, what is refused and by which name, and that nothing of theirs ever runs."""

import argparse
import io
import os
import pathlib
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from massl_fast.models import plain_pickle
from massl_fast.models.foreign_file import GLOBALS, ForeignFile, tensors_of


def read(path):
    with ForeignFile(path) as file:
        return file.content


def with_program(source, target, change):
    """A copy of an archive whose data.pkl is ``change`` of the former one."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.infolist():
            content = old.read(record)
            new.writestr(record.filename, change(content) if record.filename.endswith("data.pkl") else content)
    return target


def training_checkpoint():
    """What the field's scripts keep beside the weights, made with their own calls."""
    schedule = np.linspace(1e-3, 1e-6, 5)
    return {
        "teacher": OrderedDict(weight=torch.randn(3, 4), transposed=torch.randn(4, 3).T, half=torch.randn(2).half(), none=torch.empty(0)),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": schedule[2], "weight_decay": np.float32(0.04)}]},
        "epoch": np.int64(7),
        "args": argparse.Namespace(arch="vit_small", output_dir=pathlib.Path("/runs/7"), scale=(0.4, 1.0), fp16=np.bool_(True)),
        "counts": Counter("aab"),
        "history": defaultdict(list, a=[1, 2.5, None, True, -3, 10**20]),
        "kept": {1, 2},
        "curve": np.arange(6.0).reshape(2, 3),
        "kind": np.dtype("float64"),
        "raw": b"\x00\xff",
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "text": "größer",
    }


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_training_scripts_save_is_read_without_running_anything(tmp_path, archive, protocol):
    content = training_checkpoint()
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=archive, pickle_protocol=protocol)
    with ForeignFile(tmp_path / "file.pth") as file:
        found = file.content
        for name, tensor in content["teacher"].items():
            assert torch.equal(file.tensor(found["teacher"][name]), tensor) and file.tensor(found["teacher"][name]).dtype == tensor.dtype
        assert torch.equal(file.tensor(found["parameter"]), torch.ones(2))
    assert found.keys() == content.keys() and tensors_of(found["teacher"]).keys() == content["teacher"].keys()
    assert found["optimizer"]["param_groups"] == [{"lr": np.linspace(1e-3, 1e-6, 5)[2], "weight_decay": pytest.approx(0.04)}]
    assert found["args"] == {"arch": "vit_small", "output_dir": "/runs/7", "scale": (0.4, 1.0), "fp16": True}
    assert (found["epoch"], found["text"], found["raw"], found["size"], found["kept"]) == (7, "größer", b"\x00\xff", (2, 3), {1, 2})
    assert found["history"] == {"a": [1, 2.5, None, True, -3, 10**20]} and found["counts"] == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("module", "name"),
    [("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")],
)
def test_numbers_of_every_numpy_are_read(tmp_path, module, name):
    """Up to version 1 the function lay in numpy.core, from 2 on in numpy._core; both names are written here whatever is installed."""
    torch.save({"lr": np.float64(0.125), "w": torch.ones(1)}, tmp_path / "new.pth")
    pattern = b"cnumpy._core.multiarray\nscalar\n" if int(np.__version__[0]) > 1 else b"cnumpy.core.multiarray\nscalar\n"
    renamed = f"c{module}\n{name}\n".encode()
    file = with_program(tmp_path / "new.pth", tmp_path / "file.pth", lambda program: program.replace(pattern, renamed))
    assert renamed in zipfile.ZipFile(file).read("new/data.pkl") and read(file)["lr"] == 0.125


@pytest.mark.parametrize("name", [name for name in sorted(GLOBALS) if name.startswith(("numpy.dtypes.", "pathlib"))])
def test_dtype_classes_and_paths_are_read_by_name(tmp_path, name):
    torch.save({"x": OrderedDict(), "w": torch.ones(1)}, tmp_path / "plain.pth")
    module, _, attribute = name.rpartition(".")
    old, new = b"ccollections\nOrderedDict\n", f"c{module}\n{attribute}\n".encode()
    found = read(with_program(tmp_path / "plain.pth", tmp_path / "file.pth", lambda program: program.replace(old, new, 1)))["x"]
    assert (
        getattr(found, "code", "") in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16") or found == ""
    )


class Burglar:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
def test_pickled_code_is_not_run_and_is_named(tmp_path, archive):
    torch.save({"args": Burglar(tmp_path / "opened")}, tmp_path / "file.pth", _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match=r"file\.pth holds posix\.system, which is not read") as caught:
        read(tmp_path / "file.pth")
    assert not (tmp_path / "opened").exists()
    assert not any(word in str(caught.value) for word in ("weights_only", "safe_globals", "add_safe"))


NAMES = ["argparse Namespace", "pathlib PosixPath", "numpy dtype", "numpy._core.multiarray scalar", "collections OrderedDict"]
NAMES += ["torch._utils _rebuild_tensor_v2", "torch FloatStorage", "_codecs encode"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("culprit", ["os system", "builtins eval", "builtins getattr", "subprocess Popen", "torch load", "numpy load"])
def test_each_known_name_swapped_for_a_program_is_refused(tmp_path, name, culprit):
    torch.save(training_checkpoint(), tmp_path / "good.pth")
    old, new = (f"c{text}\n".replace(" ", "\n").encode() for text in (name, culprit))
    file = with_program(tmp_path / "good.pth", tmp_path / "file.pth", lambda program: program.replace(old, new))
    with pytest.raises(ValueError, match=f"holds {culprit.replace(' ', r'[.]')}, which is not read"):
        read(file)


def test_a_whole_module_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"holds torch\.nn\.modules\.linear\.Linear, which is not read.* save its state dict alone"):
        read(tmp_path / "file.pth")


def test_numpy_arrays_of_objects_are_refused(tmp_path):
    torch.save({"x": np.array([1, Burglar(tmp_path / "opened")], dtype=object)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"holds (a NumPy type that is no number \(O8\)|posix\.system)"):
        read(tmp_path / "file.pth")
    torch.save({"x": np.array([1, "two"], dtype=object)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"holds a NumPy type that is no number \(O8\)"):
        read(tmp_path / "file.pth")
    assert not (tmp_path / "opened").exists()


def huge(program):
    """The program with a first dimension of 2^31 - 1 where a tensor or an array of 7 rows was."""
    return program.replace(b"K\x07", b"J\xff\xff\xff\x7f")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (torch.ones(7, 3), r"a tensor of (the declared shape \(2147483647, 3\)|)"),
        (np.ones((7, 3)), r"a NumPy array of the declared shape \(2147483647, 3\) in 168 bytes"),
        (torch.ones(7), "a tensor of 8589934588 bytes in a record of 28"),
        (torch.ones(1).expand(7), r"a tensor of the declared shape \(2147483647,\), for which its storage of 1 numbers is too small"),
    ],
)
def test_huge_declared_shapes_are_refused(tmp_path, content, sentence):
    torch.save({"x": content}, tmp_path / "good.pth")
    with pytest.raises(ValueError, match=f"holds {sentence}"):
        read(with_program(tmp_path / "good.pth", tmp_path / "file.pth", huge))


def test_huge_shapes_are_refused_in_older_files(tmp_path):
    torch.save({"x": torch.ones(7)}, tmp_path / "good.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "file.pth").write_bytes(huge((tmp_path / "good.pth").read_bytes()))
    with pytest.raises(ValueError, match="holds a tensor of 8589934588 bytes in a file of"):
        read(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        # Deeply nested keys, which Python would hash until its stack is full.
        (b"\x80\x02}" + b"K\x01" + b"\x85" * 100_000 + b"K\x01s.", "a dictionary with a tuple as a key"),
        (b"\x80\x02cargparse\nNamespace\n(cargparse\nNamespace\nK\x01tR.", "cannot be read"),
        (b"\x80\x02cbuiltins\nset\nX\x01\x00\x00\x00ab.", "a state given to a Global"),
        (b"\x80\x02(iposix\nsystem\n.", "the pickle instruction INST"),
        (b"\x80\x02\x82\x01.", "the pickle instruction EXT1"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "a call of torch.FloatStorage"),
        (b"\x80\x02" + b"K\x01" * 3 + b"R.", "a call of a int"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "cannot be read"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "cannot be read"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "cannot be read"),
        (b"\x80\x02]q\x00h\x00a.", None),
    ],
)
def test_programs_made_by_hand_end_in_sentences(tmp_path, program, sentence):
    torch.save({"x": torch.ones(1)}, tmp_path / "good.pth")
    file = with_program(tmp_path / "good.pth", tmp_path / "file.pth", lambda _: program)
    if sentence is None:
        assert isinstance(read(file), list)
    else:
        with pytest.raises(ValueError, match=f"file.pth .*{sentence}"):
            read(file)


def test_records_are_checked(tmp_path):
    torch.save({"x": torch.arange(64.0)}, tmp_path / "good.pth")
    data = bytearray((tmp_path / "good.pth").read_bytes())
    place = data.index(struct.pack("<3f", 5, 6, 7))
    data[place] ^= 1
    (tmp_path / "flipped.pth").write_bytes(data)
    with ForeignFile(tmp_path / "flipped.pth") as file, pytest.raises(ValueError, match=r"cannot be read as a PyTorch checkpoint.*CRC"):
        file.tensor(file.content["x"])
    with zipfile.ZipFile(tmp_path / "good.pth") as old, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    with pytest.raises(ValueError, match="holds compressed records"):
        read(tmp_path / "packed.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pth"))
    with pytest.raises(ValueError, match=r"script\.pth holds (a TorchScript program|compressed records)"):
        read(tmp_path / "script.pth")


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
def test_damage_anywhere_is_a_sentence(tmp_path, archive):
    torch.save(training_checkpoint(), tmp_path / "good.pth", _use_new_zipfile_serialization=archive)
    good = (tmp_path / "good.pth").read_bytes()
    draw = random.Random(0)
    refused = 0
    for attempt in range(600):
        data = bytearray(good)
        if attempt % 3 == 0:
            data = data[: draw.randrange(len(data))]
        else:
            for _ in range(1 + attempt % 3 * 4):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "file.pth").write_bytes(data)
        try:
            with ForeignFile(tmp_path / "file.pth") as file:
                for stored in (tensors_of(file.content) or tensors_of(file.content.get("teacher")) or {}).values():
                    file.tensor(stored)
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path / 'file.pth'} ") and str(error).endswith(".")
            refused += 1
        except AttributeError:
            assert not isinstance(file.content, dict)
    assert refused > 200


def test_damage_in_the_program_alone_is_a_sentence(tmp_path):
    """Inside an archive a checksum finds most damage; here the checksum is that of the damaged program."""
    torch.save(training_checkpoint(), tmp_path / "good.pth")
    program = zipfile.ZipFile(tmp_path / "good.pth").read("good/data.pkl")
    draw = random.Random(1)
    for _ in range(300):
        data = bytearray(program)
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        file = with_program(tmp_path / "good.pth", tmp_path / "file.pth", lambda _, data=data: bytes(data))
        try:
            read(file)
        except ValueError as error:
            assert str(error).startswith(f"{file} ")


def test_reading_imports_nothing_that_a_file_names(tmp_path):
    """A module on the path whose import would be noticed; the file names it."""
    (tmp_path / "noticed.py").write_text(f"open({str(tmp_path / 'opened')!r}, 'w')\nclass Thing: ...\n")
    program = b"\x80\x02cnoticed\nThing\n)\x81."
    torch.save({"x": torch.ones(1)}, tmp_path / "good.pth")
    with_program(tmp_path / "good.pth", tmp_path / "file.pth", lambda _: program)
    code = "import sys, pathlib; from massl_fast.models.foreign_file import ForeignFile; ForeignFile(pathlib.Path(sys.argv[1]))"
    answer = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "file.pth"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert "holds noticed.Thing, which is not read" in answer.stderr and not (tmp_path / "opened").exists()


def test_every_instruction_of_the_field_is_known():
    """Whatever torch.save writes with any protocol is made of instructions that the machine has."""
    content = {key: value for key, value in training_checkpoint().items() if key not in ("teacher", "optimizer", "parameter")}
    for protocol in range(2, 5):
        for opcode, _, _ in pickletools.genops(io.BytesIO(pickle.dumps(content, protocol))):
            known = {*plain_pickle._ARGUMENTS, *plain_pickle._CONSTANTS, *plain_pickle._EMPTY, "STOP"}
            assert opcode.name in known or hasattr(plain_pickle.Machine, f"_op_{opcode.name.lower()}"), opcode.name
