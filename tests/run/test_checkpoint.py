import errno
import json
import random
import sys

import pytest
import torch
from safetensors import SafetensorError

from massl_fast.models.checkpoint_files import damage_of
from massl_fast.models.published import read_network
from massl_fast.run import checkpoint
from massl_fast.run.checkpoint import CheckpointFolder, load_strictly, read_checkpoint

TENSORS = {"student/weight": torch.arange(6.0).view(2, 3).T, "objective/pointer": torch.tensor([5])}


def test_round_trip_and_pointers(tmp_path):
    folder = CheckpointFolder(tmp_path)
    path = folder.save(3, TENSORS, {"note": "ä"})
    tensors, state = read_checkpoint(path)
    assert state["step"] == 3 and state["note"] == "ä"
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert folder.last() == path and folder.best() is None


def test_last_best_and_every_nth_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_every_steps=20)
    for step in range(0, 60, 10):
        folder.save(step, TENSORS, {}, best=step == 10)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == [f"step_{s:08d}" for s in (0, 10, 20, 40, 50)]
    assert folder.best().name == "step_00000010"


def test_a_write_that_was_cut_off_is_passed_over(tmp_path):
    folder = CheckpointFolder(tmp_path)
    good = folder.save(1, TENSORS, {})
    (tmp_path / ".step_00000002.partial").mkdir()
    (tmp_path / "step_00000003").mkdir()  # renamed by another tool, without its files
    assert folder.last() == good


@pytest.mark.parametrize(
    ("said", "number", "shown"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC, "No space left on device"),
        ("Error while serializing: no number", 0, "Error while serializing: no number"),
    ],
)
def test_a_disk_that_refuses_is_an_error_of_the_system(tmp_path, monkeypatch, said, number, shown):
    def refuse(*_):
        raise SafetensorError(said)

    monkeypatch.setattr(checkpoint, "write_files", refuse)
    with pytest.raises(OSError) as raised:
        CheckpointFolder(tmp_path).save(1, TENSORS, {})
    assert (raised.value.errno, raised.value.strerror) == (number, shown) and not list(tmp_path.iterdir())


def test_pointers_never_lead_out_of_the_folder(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.save(1, TENSORS, {})
    (tmp_path / "outside").mkdir()
    (tmp_path / "checkpoints/best").write_text("../outside")
    assert folder.best() is None


def test_damaged_and_foreign_folders_are_sentences(tmp_path):
    with pytest.raises(ValueError, match=r"has no state\.json"):
        read_checkpoint(tmp_path)
    path = CheckpointFolder(tmp_path).save(1, TENSORS, {})
    (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(path)
    path = CheckpointFolder(tmp_path).save(1, TENSORS, {})
    state = json.loads((path / "state.json").read_text())
    state.pop("checksum")
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        read_checkpoint(path)


def test_strict_loading_names_what_differs():
    into = {"a": torch.zeros(2), "b": torch.zeros(3)}
    for tensors, words in (
        ({"a": torch.ones(2)}, "lacks b"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "has besides c"),
        ({"a": torch.ones(2), "b": torch.ones(4)}, r"b \(4,\) for \(3,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            load_strictly("student", into, tensors)
    load_strictly("student", into, {"a": torch.ones(2), "b": torch.ones(3)})
    assert into["b"].eq(1).all()


def damaged(content: bytes, generator: random.Random) -> bytes:
    """One bit flipped, or cut off anywhere."""
    place = generator.randrange(len(content))
    if generator.random() < 0.2:
        return content[:place]
    return content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]


def count_undetected(trials: int, folder, seed: int = 0) -> dict[str, int]:
    """Damage a checkpoint ``trials`` times, in either file; how often each way of reading takes it for whole, or reads other numbers."""
    generator = random.Random(seed)
    values = torch.randn(5, 7)
    tensors = {
        f"{network}/backbone.weight": values.to(dtype) for network, dtype in (("student", torch.float32), ("teacher", torch.bfloat16))
    }
    tensors |= {"objective/pointer": torch.tensor([5]), "optimizer/weight/step": torch.tensor(3.0)}
    timm_args = {"architecture": "vit_tiny_patch16_224", "model_args": {}, "image_size": 16}
    checkpoints = CheckpointFolder(folder / "checkpoints", keep_last=2)
    good, bad = (checkpoints.save(step, tensors, {"timm_args": timm_args, "note": "ä", "small": 1e-05}) for step in (1, 2))
    whole = {name: (bad / name).read_bytes() for name in ("state.json", "state.safetensors")}
    missed = {"whole": 0, "resumed": 0, "not named": 0, "read": 0, "evaluated": 0}
    for _ in range(trials):
        name = generator.choice(list(whole))
        (bad / name).write_bytes(damaged(whole[name], generator))
        missed["whole"] += damage_of(bad) is None
        missed["resumed"] += checkpoints.last_intact() != good
        missed["not named"] += not any(str(bad) in sentence for sentence in checkpoints.passed_over())
        try:
            read_checkpoint(bad)
            missed["read"] += 1
        except ValueError:
            pass
        network = read_network(folder, "teacher")  # as evaluation and export do; the optimizer's tensors are not theirs to judge
        missed["evaluated"] += not torch.equal(network.backbone["weight"], tensors["teacher/backbone.weight"])
        missed["evaluated"] += network.source == bad and network.notes != []
        (bad / name).write_bytes(whole[name])
    assert damage_of(bad) is None and checkpoints.last_intact() == bad
    return missed


def test_no_damaged_checkpoint_is_taken_for_whole_and_the_one_before_is_taken(tmp_path):
    assert set(count_undetected(150, tmp_path).values()) == {0}


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("instead", ["nothing", "the file of another step", "a folder"])
def test_a_file_that_is_gone_or_exchanged_is_damage_and_the_checkpoint_before_is_taken(tmp_path, name, instead):
    timm_args = {"architecture": "vit_tiny_patch16_224", "model_args": {}, "image_size": 16}
    folder = CheckpointFolder(tmp_path / "checkpoints", keep_last=2)
    good, bad = (folder.save(step, {"teacher/backbone.weight": torch.full((2,), step)}, {"timm_args": timm_args}) for step in (1, 2))
    (bad / name).unlink()
    if instead == "a folder":
        (bad / name).mkdir()
    elif instead != "nothing":
        (bad / name).write_bytes((good / name).read_bytes())
    assert folder.last_intact() == good and str(bad) in folder.passed_over()[0]
    network = read_network(tmp_path, "teacher")
    assert network.backbone["weight"].tolist() == [1, 1] and any(str(bad) in note for note in network.notes)
    with pytest.raises(ValueError, match=bad.name):
        read_network(bad, "teacher")


def test_each_byte_of_a_checkpoint_counts(tmp_path):
    path = CheckpointFolder(tmp_path).save(1, {"a": torch.ones(1)}, {})
    for name in ("state.json", "state.safetensors"):
        whole = (path / name).read_bytes()
        for byte in range(len(whole)):
            bit = 8 * byte + 5 * byte % 8
            (path / name).write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
            assert damage_of(path) is not None, f"bit {bit} of {name}"
        (path / name).write_bytes(whole)


def test_a_damaged_tensor_is_named(tmp_path):
    path = CheckpointFolder(tmp_path).save(1, TENSORS, {})
    content = bytearray((path / "state.safetensors").read_bytes())
    content[-1] ^= 16
    (path / "state.safetensors").write_bytes(content)
    last = list(read_order(path))[-1]
    with pytest.raises(ValueError, match=f"{last} in state.safetensors does not have its checksum"):
        read_checkpoint(path)


def read_order(path) -> list[str]:
    header = (path / "state.safetensors").read_bytes()
    entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    return sorted(entries, key=lambda name: entries[name]["data_offsets"])


def test_a_checkpoint_of_before_checksums_still_loads_and_says_so(tmp_path):
    timm_args = {"architecture": "vit_tiny_patch16_224", "model_args": {}, "image_size": 16}
    path = CheckpointFolder(tmp_path).save(1, {"teacher/backbone.weight": torch.ones(2)}, {"timm_args": timm_args})
    state = json.loads((path / "state.json").read_text())
    for key in ("checksum", "checksums"):
        state.pop(key)
    (path / "state.json").write_text(json.dumps({**state, "format": 1}, indent=1))
    tensors, found = read_checkpoint(path)
    assert found["step"] == 1 and tensors["teacher/backbone.weight"].eq(1).all()
    assert CheckpointFolder(tmp_path).last_intact() == path
    assert any("carries no checksums" in note for note in read_network(path, "teacher").notes)


if __name__ == "__main__":  # python tests/run/test_checkpoint.py [TRIALS]
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as workplace:
        trials = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
        print(f"{trials} damaged checkpoints, undetected: {count_undetected(trials, Path(workplace))}")
