"""Who this process is and how the run is spread: what is chosen, and the sentences where it cannot be."""

import resource
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import yaml

from massl_fast.config import validated
from massl_fast.distributed.sharding import blocks_of
from massl_fast.distributed.stragglers import spread_of
from massl_fast.distributed.world import (
    OF_MPIRUN,
    OF_SRUN,
    RanksDidNotMeet,
    World,
    agree_on_round,
    choose_strategy,
    join_world,
    restarted,
    share_of,
    synchronise_batch_norms,
)
from massl_fast.engine.build import build_objective, build_pair
from massl_fast.hardware import keep_freed_memory
from massl_fast.models.backbone import build_backbone
from massl_fast.objectives.base import At
from small_encoders import FP32, ONE_CPU

CPU = torch.device("cpu")


def test_the_allocator_keeps_what_is_freed():
    """A tensor of 24 MB that comes and goes touches new pages until it has a place in the heap, and not each time."""
    kept = keep_freed_memory()
    if not kept:
        pytest.skip("this allocator is not glibc's")
    torch.ones(6 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(6 * 2**20)
    # What lies in the heap from before decides how soon: once to three times in ten, and all ten of them in glibc's own way.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before <= 5 * 6144, "ten times would be 61,440 pages"


@pytest.mark.parametrize(
    ("asked", "size", "chosen"),
    [("auto", 1, "none"), ("auto", 4, "ddp"), ("ddp", 4, "ddp"), ("fsdp2", 4, "fsdp2"), ("fsdp2", 1, "none"), ("none", 1, "none")],
)
def test_strategy(asked, size, chosen):
    strategy, reason = choose_strategy(asked, size)
    assert strategy == chosen and reason


def test_several_processes_without_a_strategy_are_an_error():
    with pytest.raises(ValueError, match="each would train alone"):
        choose_strategy("none", 2)


def test_srun_without_a_meeting_point_is_a_sentence(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        join_world("cpu")


OF_A_LAUNCHER = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
OF_A_BATCH_SCRIPT = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "0"}, "RANK is set in the environment, but WORLD_SIZE is not"),
        *(({**OF_A_LAUNCHER, name: ""}, f"but {name} is not") for name in OF_A_LAUNCHER if name != "RANK"),
        ({**OF_A_LAUNCHER, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
        ({**OF_A_LAUNCHER, "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({**OF_A_LAUNCHER, "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2 in the environment; ranks count from 0 to 1"),
        (OF_A_BATCH_SCRIPT, "has 8 tasks, but srun did not start this process"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
    ],
)
def test_what_a_launcher_left_out_or_got_wrong_is_named(monkeypatch, environment, sentence):
    for name in (*OF_A_LAUNCHER, *OF_SRUN, *OF_MPIRUN, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        join_world("cpu", timeout_seconds=0.2)


@pytest.mark.parametrize("environment", [{}, {"OMPI_COMM_WORLD_SIZE": "1"}, {**OF_A_BATCH_SCRIPT, "SLURM_NTASKS": "1"}])
def test_one_process_is_one_process(monkeypatch, environment):
    for name in (*OF_A_LAUNCHER, *OF_SRUN, *OF_MPIRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert join_world("cpu") == ONE_CPU


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_is_known(monkeypatch, name):
    assert not restarted(ONE_CPU) and restarted(World(0, 2, 0, CPU, round=2))
    monkeypatch.setenv(name, "1")
    assert restarted(ONE_CPU)


def meeting(store, ranks, timeout: float = 20) -> list:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [answer.result() for answer in [pool.submit(agree_on_round, store, rank, 3, timeout) for rank in ranks]]


def test_ranks_that_meet_again_at_one_store_agree_on_a_new_round():
    store = dist.HashStore()
    assert meeting(store, [0, 1, 2]) == [1, 1, 1]
    (again,) = set(meeting(store, [2, 1, 0]))
    assert again > 1


def test_a_rank_that_begins_later_is_not_taken_for_the_one_before_it():
    store = dist.HashStore()
    meeting(store, [0, 1, 2])
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(agree_on_round, store, rank, 3, 20) for rank in (0, 1)]
        time.sleep(0.3)  # they find the name that rank 2 left the time before, and nobody answers to it
        assert not any(answer.done() for answer in early)
        late = pool.submit(agree_on_round, store, 2, 3, 20)
        assert late.result() == early[0].result() == early[1].result() > 1


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(RanksDidNotMeet, match="rank 2 of 3 did not come, for as long as"):
        meeting(dist.HashStore(), [0, 1], timeout=0.3)


def test_a_store_out_of_reach_is_a_sentence(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksDidNotMeet, match=r"store at 127\.0\.0\.1:1 .* is out of reach: .*refused"):
        join_world("cpu", timeout_seconds=0.2)


@pytest.mark.parametrize(
    ("own", "of_all", "share"),
    [
        ([0, 1, 2, 3], [[0, 1, 2, 3]] * 2, 2),  # as torchrun starts them
        ([4, 5], [[0, 1], [4, 5], [2, 3]], 2),  # bound to each task by srun
        ([0, 1, 2, 3], [[0, 1, 2, 3], [0, 1]], 3),
    ],
)
def test_cores_that_are_bound_already_are_not_divided_once_more(own, of_all, share):
    assert share_of(own, of_all) == share


def settings(**sections) -> dict:
    text = """
    crops: {global_size: 16, local_size: 8, num_local: 1}
    model: {model_args: {patch_size: 4, depth: 1, num_heads: 2, embed_dim: 32}, head_hidden_dim: 32, embedding_dim: 16}
    objective: {memory_size: 64, block_size: 16}
    train: {global_batch: 8}
    """
    return validated({**yaml.safe_load(text), **sections}, "test")


@pytest.mark.parametrize(("scope", "equal"), [("shared", True), ("rank", False)])
def test_partitions_are_shared_or_of_each_rank_and_the_memory_always_the_same(scope, equal):
    config = settings(objective={"memory_size": 64, "block_size": 16, "partition_scope": scope})
    one, other = (build_objective(config, FP32, rank) for rank in (0, 1))
    assert torch.equal(one.memory, other.memory)
    student, teacher = (torch.nn.functional.normalize(torch.randn(v * 3, 16), dim=-1) for v in (3, 2))
    at = At(1, {"teacher_temperature": 0.05}, 3, 0, (), ONE_CPU)
    losses = [objective(student, teacher, at).loss for objective in (one, other)]
    assert torch.equal(*losses) == equal


def test_batch_norms_are_synchronised_on_gpus_and_named_on_cpus():
    config = settings(model={"architecture": "resnet10t", "drop_path": 0, "head_hidden_dim": 32, "embedding_dim": 16})
    pair, _ = build_pair(config, build_objective(config, FP32, 0))
    names = list(pair.state_dict())
    same, note = synchronise_batch_norms(pair, World(0, 2, 0, CPU))
    assert same is pair and "on GPUs only" in note
    assert synchronise_batch_norms(pair, World(0, 1, 0, torch.device("cuda", 0))) == (pair, None)
    converted, note = synchronise_batch_norms(pair, World(0, 2, 0, torch.device("cuda", 0)))
    norms = [m for m in converted.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert note is None and norms and all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)
    assert list(converted.state_dict()) == names
    # The mode of the teacher's norms is kept: they normalise with the batch's statistics.
    assert all(m.training for m in norms)


def test_a_network_without_blocks_is_not_sharded():
    encoder = torch.nn.Module()
    encoder.backbone = build_backbone("resnet10t", image_size=32)
    with pytest.raises(ValueError, match="no list of blocks"):
        blocks_of(encoder)


def test_the_fastest_rank_is_faster_by_what_it_waits():
    spread = spread_of(torch.tensor([0.10, 0.25, 0.15]), 0.4)
    assert spread == {"step_seconds_slowest": 0.4, "step_seconds_fastest": 0.25, "slowest_rank": 1}
