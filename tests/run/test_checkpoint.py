import json

import pytest
import torch

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
