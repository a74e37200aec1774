"""Several heartbeats in one process, at one store: who is gone, who is late."""

import time

import pytest
import torch
import torch.distributed as dist

from massl_fast.distributed import heartbeat
from massl_fast.distributed.heartbeat import Heartbeat
from massl_fast.distributed.world import World

CPU = torch.device("cpu")


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    store, losses = dist.HashStore(), []
    beats = [Heartbeat(World(rank, 3, rank, CPU), 0.4, store, on_loss=lambda s, r=rank: losses.append((r, s))) for rank in range(3)]
    for rank in beats:
        rank.__enter__()
    yield beats, losses
    for rank in beats:
        rank.__exit__(None, None, None)


def until(condition) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def killed(rank: Heartbeat) -> None:
    rank.__exit__(KeyboardInterrupt, None, None)  # without a last word


def test_a_rank_that_is_gone_is_named_with_where_it_was_last_seen(ranks):
    beats, _ = ranks
    assert beats[0].diagnose() is None
    beats[2].note(17, "waiting for data")
    time.sleep(0.2)
    killed(beats[2])
    assert beats[0].diagnose() == "Rank 2 of 3 does not answer (last seen waiting for data, step 17)"
    assert beats[1].diagnose() == beats[0].diagnose()


@pytest.mark.parametrize("gone", [0, 2])
def test_the_others_learn_of_a_silent_rank_by_themselves(ranks, gone):
    beats, losses = ranks
    killed(beats[gone])
    others = {0, 1, 2} - {gone}
    assert until(lambda: {rank for rank, _ in losses} >= others), losses
    for rank, sentence in losses:
        assert rank == gone or (f"Rank {gone} of 3 does not answer" in sentence and "for 0.4 s (parallel.timeout_seconds)" in sentence)


class Gone:
    """A store that nobody serves any more."""

    def __getattr__(self, name):
        def fail(*_):
            raise dist.DistNetworkError("Connection reset by peer")

        return fail


@pytest.mark.parametrize(
    ("by_torchrun", "sentence"),
    [
        (False, "Rank 0 does not answer, and with it went the store at which the ranks met"),
        (True, "The torchrun that served the store at which the ranks met has ended"),
    ],
)
def test_a_store_that_went_is_told_at_once_and_nobody_claims_to_have_waited(ranks, monkeypatch, by_torchrun, sentence):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(by_torchrun))
    beats, losses = ranks
    beats[1].store = Gone()
    assert until(lambda: (1, f"{sentence}.") in losses), losses
    assert beats[1].diagnose() == sentence


def test_a_rank_that_has_finished_is_not_missed(ranks):
    beats, losses = ranks
    beats[0].__exit__(None, None, None)
    time.sleep(0.8)
    assert not losses


def test_whereabouts_name_the_late_rank_first(ranks):
    beats, _ = ranks
    for rank, (step, doing) in zip(beats, [(8, "training"), (8, "waiting for data"), (8, "training")]):
        rank.note(step, doing)
    expected = "rank 1: waiting for data, step 8; ranks 0, 2: training, step 8"
    assert until(lambda: beats[0].whereabouts() == expected)
