"""Saving in the background, by one process: what is written is what was there, and what a crash or a full disk leaves."""

import json
import resource
import shutil

import pytest
import torch

from massl_fast.run.checkpoint import CheckpointFolder, read_checkpoint, read_into, shapes_of
from massl_fast.run.outputs import Telemetry, rows_up_to
from massl_fast.run.saving import BackgroundSaver
from small_encoders import ONE_CPU


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"student/weight": torch.randn(300, 400), "objective/pointer": torch.tensor([7]), "optimizer/weight/step": torch.tensor(3.0)}


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep_last=2)


def test_training_may_go_on_while_a_checkpoint_is_written(folder, tensors):
    saver = BackgroundSaver(folder, ONE_CPU)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    assert saver.save(1, tensors, {}) is None
    tensors["student/weight"].zero_()  # the next step
    assert saver.save(2, tensors, {}, best=True) is None
    assert saver.wait() is None and saver.problem() is None
    saver.close()
    first, _ = read_checkpoint(folder.folder / "step_00000001")
    assert all(torch.equal(first[name], tensor) for name, tensor in before.items())
    second, state = read_checkpoint(folder.last())
    assert state["step"] == 2 and second["student/weight"].eq(0).all() and folder.best() == folder.last()


def test_tensors_are_read_in_place_with_their_own_dtype(folder, tensors):
    path = folder.save(1, tensors, {})
    assert shapes_of(path) == {name: tensor.shape for name, tensor in tensors.items()}
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    targets["student/weight"] = torch.zeros(300, 400, dtype=torch.bfloat16)
    read_into(path, targets)
    assert torch.equal(targets["student/weight"], tensors["student/weight"].bfloat16())
    assert torch.equal(targets["objective/pointer"], tensors["objective/pointer"]) and targets["optimizer/weight/step"] == 3


def test_a_disk_that_refuses_leaves_the_last_good_checkpoint_and_no_debris(folder, tensors):
    saver = BackgroundSaver(folder, ONE_CPU)
    saver.save(1, tensors, {})
    assert saver.wait() is None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # the system refuses to let a file grow beyond
    try:
        saver.save(2, tensors, {})
        problem = saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert problem.startswith("The checkpoint of step 2 could not be written (") and "too large" in problem
    assert sorted(path.name for path in folder.folder.iterdir()) == ["last", "step_00000001"]
    assert saver.save(3, tensors, {}) is None and saver.wait() is None
    assert folder.last().name == "step_00000003"
    saver.close()


@pytest.mark.parametrize("cut", ["tensors", "state", "tensors missing"])
def test_a_checkpoint_that_was_cut_off_is_passed_over_for_the_one_before(folder, tensors, cut):
    good = folder.save(1, tensors, {})
    bad = folder.save(2, tensors, {})
    file = bad / ("state.json" if cut == "state" else "state.safetensors")
    if cut == "tensors missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert folder.last() == folder.last_intact() == good
    (sentence,) = folder.passed_over()
    assert str(bad) in sentence and "passed over" in sentence


def test_the_newest_are_kept(folder, tensors):
    for step in range(5):
        folder.save(step, tensors, {})
    assert sorted(path.name for path in folder.folder.glob("step_*")) == ["step_00000003", "step_00000004"]
    shutil.rmtree(folder.last())
    assert json.loads((folder.last() / "state.json").read_text())["step"] == 3


def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path, capsys):
    telemetry = Telemetry(tmp_path, total_steps=9, metrics=(), tensorboard=False, wandb_project="", config={}, active=True)
    telemetry.start(0)
    telemetry.log({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (18, before[1]))  # room for a row and a half
    try:
        telemetry.log({"step": 2})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
        telemetry.log({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    telemetry.log({"step": 4})
    telemetry.close()
    assert [row["step"] for row in rows_up_to(tmp_path / "metrics.jsonl", 9)] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("could not be written") == 1
