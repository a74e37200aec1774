"""Two gloo processes whose steps are recorded around their exchanges, beside DistributedDataParallel: equal to the last bit.

Gradients are halved before they are summed, here as there, and of two numbers it does not matter which comes first.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from recorded_ranks import STEPS
from test_two_ranks import rows

from massl_fast.distributed.world import choose_exchange
from massl_fast.run.checkpoint import read_checkpoint
from rank_processes import run_two_ranks
from small_images import write_images


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    write_images(folder / "images", classes=2, per_class=14)
    (folder / "output").write_text(run_two_ranks(Path(__file__).with_name("recorded_ranks.py"), folder, seconds=570))
    return folder


@pytest.fixture(scope="module")
def outcomes(workplace) -> list[dict]:
    return [json.loads((workplace / f"outcomes.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["flat", "recorded"])
def test_one_flat_exchange_is_ddp_to_the_last_bit(workplace, outcomes, way):
    """With micro-batches, drop path, evaluation and checkpoints among the steps; the recorded run stops among replays and is resumed."""
    for rank in outcomes:
        assert all(rank[scene] == ["finished", ""] for scene in ("ddp", "flat", "recorded", "recorded on"))
    expected = rows(workplace / "ddp")
    assert [row["step"] for row in expected] == list(range(STEPS + 1)) and expected[1]["loss"] != expected[-1]["loss"]
    assert sum("knn_teacher_k5_percent" in row for row in expected) >= 2
    assert rows(workplace / way) == expected
    checkpoint = f"checkpoints/step_{STEPS:08d}"
    ours, theirs = (read_checkpoint(workplace / folder / checkpoint)[0] for folder in (way, "ddp"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_a_recording_pauses_at_each_exchange_and_the_start_says_which(workplace, outcomes):
    """Two recordings, before and after the run was resumed: gradients with the votes, and the rows that enter the memory."""
    assert outcomes[0]["pauses"] == outcomes[1]["pauses"] == [2, 2]
    output = (workplace / "output").read_text()
    assert "gradients overlapped (DistributedDataParallel exchanges while the backward pass computes)" in output
    assert "gradients flat (as set)" in output and "gradients flat (train.cuda_graph: one buffer between two recordings" in output


def test_votes_that_ride_with_the_gradients_count(outcomes):
    for rank in outcomes:
        kind, sentence = rank["nan"]
        assert kind == "Diverged 1" and sentence.startswith("Step 5 was not finite, beginning with the student's embeddings (rank 1).")
    ends = []
    for rank, sender in zip(outcomes, ("a signal to another rank", "SIGUSR1")):
        kind, sentence = rank["signal"]
        ended = re.match(rf"Ended by {sender} after step (\d)\.", sentence)
        assert kind == "Interrupted 75" and ended, sentence
        ends.append(ended[1])
    assert ends[0] == ends[1] and ends[0] in ("6", "7")


@pytest.mark.parametrize(
    "asked, recorded, sharded, size, name, sentence",
    [
        ("auto", True, False, 1, "none", "one process"),
        ("auto", False, False, 2, "overlapped", "while the backward pass computes"),
        ("auto", True, False, 2, "flat", "where the network between hosts is slow"),
        ("flat", False, False, 2, "flat", "as set"),
        ("auto", False, True, 2, "sharded", "fsdp2"),
    ],
)
def test_which_exchange_and_why(asked, recorded, sharded, size, name, sentence):
    found, reason = choose_exchange(asked, recorded=recorded, sharded=sharded, world_size=size)
    assert found == name and sentence in reason


@pytest.mark.parametrize(
    "asked, recorded, sharded, sentence",
    [("overlapped", True, False, "hooks that are not recorded"), ("flat", False, True, "reduces gradients to shards")],
)
def test_exchanges_that_cannot_be(asked, recorded, sharded, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose_exchange(asked, recorded=recorded, sharded=sharded, world_size=2)
