"""bench kernels and bench correctness: what they record, what they find wrong, and what they say to a mistake."""

import pytest
import torch

from massl_fast import hardware, records
from massl_fast.benchmarks import beside, kernels
from massl_fast.cli import main
from massl_fast.hardware import chosen_device
from massl_fast.kernels import fused

SMALL = ["--images", "2", "--entries", "64", "--block", "32", "--width", "8", "--rounds", "2", "--device", "cpu"]


def test_no_time_without_its_error(tmp_path, monkeypatch):
    measured = beside.extra_bytes  # in a process of its own, which takes seconds to start: once is enough
    monkeypatch.setattr(beside, "extra_bytes", lambda call, device: measured(call, device) if "streaming" in call.args else (0, 0))
    output = tmp_path / "records.jsonl"
    arguments = ["bench", "kernels", "--cases", "readout", "enqueue", "partition", "--variants", "streaming", "_", "plain", "rand", *SMALL]
    assert main([*arguments, "--output", str(output)]) == 0
    rows = {(row["case"]["operation"], row["case"]["variant"]): row for row in records.read(output)}
    assert {("readout", "reference"), ("readout", "streaming"), ("enqueue", "enqueue_"), ("partition", "partition_indices")} <= set(rows)
    for row in rows.values():
        assert len(row["figures"]["time"]["samples"]) == len(row["figures"]["time ratio"]["samples"]) == 2
        assert row["figures"]["error"]["median"] <= 1e-6
    ours = rows["readout", "streaming"]["figures"]
    assert ours["extra memory"]["median"] >= 0
    shares, floors = (ours[name]["samples"] for name in ("share of the matrix rate", "time, of the floor"))
    assert [share * floor for share, floor in zip(shares, floors, strict=True)] == pytest.approx([100, 100], rel=1e-3)


def test_what_is_wrong_gets_no_time(monkeypatch, capsys):
    right = kernels.kernels.memory_readout

    def wrong(*args, backend="auto", **kwargs):
        readout, logsumexp = right(*args, backend=backend, **kwargs)
        return (readout * 1.001, logsumexp) if backend == "streaming" else (readout, logsumexp)

    monkeypatch.setattr(kernels.kernels, "memory_readout", wrong)
    monkeypatch.setattr(beside, "extra_bytes", lambda *_: (0, 0))  # of no matter here, and slow
    assert main(["bench", "kernels", "--cases", "readout", "--variants", "streaming", "--output", "none", *SMALL]) == 1
    told = capsys.readouterr().out
    assert "streaming                      WRONG: errors" in told
    assert "1 results are wrong; they have no time." in told
    assert sum(line.startswith("  streaming") for line in told.splitlines()) == 1


def test_a_graph_is_timed_beside_its_call_where_it_gives_the_same(monkeypatch):
    """CUDA graphs need a GPU; here the recording is replaced."""
    case = kernels.Case("loss", 3, 2, 1, 8, 64, 32, "float32")
    device = torch.device("cpu")
    call = kernels.variants(case, device, compiled=False)[0]["streaming"]
    calls, copies = {"triton": call}, [kernels.make_inputs(case, seed, device) for seed in range(2)]
    monkeypatch.setattr(beside, "graphed", lambda call, copies: call)
    replays, differing = beside.graphs(calls, copies)
    assert list(replays) == ["triton, graph"] and not differing
    stale = call(copies[0])
    monkeypatch.setattr(beside, "graphed", lambda call, copies: lambda inputs: stale)
    replays, differing = beside.graphs(calls, copies)
    assert not replays and list(differing) == ["triton, graph"]


def test_a_reference_that_is_right_by_luck_fails_nobody():
    case = kernels.Case("readout", 3, 2, 1, 8, 64, 32, "float32")
    eps = torch.finfo(torch.float32).eps
    assert not kernels.excess(case, {"reference": (0.0, 0.0), "streaming": (2 * eps, 3 * eps)})
    assert set(kernels.excess(case, {"reference": (0.0, 0.0), "streaming": (0.0, 6 * eps)})) == {"streaming"}


def test_correctness_finds_a_wrong_partition(monkeypatch, capsys):
    monkeypatch.setattr(
        "massl_fast.benchmarks.correctness.cases", lambda device, quick: [kernels.Case("partition", 3, 2, 1, 8, 64, 1, "float32")]
    )
    assert main(["bench", "correctness", "--device", "cpu"]) == 0
    monkeypatch.setattr(kernels, "partition_of_step_one", lambda entries, device: torch.arange(entries, device=device).int())
    assert main(["bench", "correctness", "--device", "cpu"]) == 1
    assert "WRONG  partition_indices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--variants", "flashy"], "no variant has flashy in its name; there are reference, loss only; reference; streaming"),
        (["--variants", "triton"], "triton cannot be measured: it needs a GPU"),
        (["--device", "abacus"], "--device is abacus; it can be auto, cpu, cuda"),
        (["--device", "meta"], "--device is meta; it can be auto, cpu, cuda"),
        (["--device", "cpu:3"], "--device is cpu:3"),
        (["--images", "65"], "--images is 65, more than the 64 entries of the memory"),
        (["--block", "65"], "--block is 65, more than the 64 entries of the memory"),
        (["--student-views", "1"], "--student-views is 1; it takes at least 2"),
        (["--rounds", "-1"], "--rounds is -1; it takes at least 0"),
        (["--width", "0"], "--width is 0; it takes at least 1"),
    ],
)
def test_mistakes_get_a_sentence_before_anything_is_measured(capsys, monkeypatch, arguments, sentence):
    monkeypatch.setattr(beside, "measure", lambda *_: pytest.fail("measured"))
    assert main(["bench", "kernels", "--output", "none", *SMALL, *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_what_the_gpu_is_not_to_compute_is_missing_and_not_a_mistake(monkeypatch):
    """Float32 at PyTorch's default precision: exit code 1 would keep ``bench everything`` from timing anything."""
    monkeypatch.setattr(fused, "_cached_limits", lambda index: ((9, 0), 227 * 1024, 132, "a described GPU"))
    for dtype, there in (("bfloat16", True), ("float32", False)):
        for operation in ("loss", "readout"):
            calls, missing = kernels.variants(kernels.Case(operation, 3, 2, 1, 8, 64, 1, dtype), torch.device("cuda", 0), compiled=False)
            assert ("triton" in calls) is there and ("triton" in missing) is not there
    assert "TF32" in missing["triton"]


@pytest.mark.parametrize("command", ["kernels", "correctness", "loader", "step", "train"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capsys, command):
    (tmp_path / "file").write_text("")
    assert main(["bench", command, "--output", str(tmp_path / "file" / "records.jsonl")]) == 2
    captured = capsys.readouterr()
    assert "Records cannot be written to" in captured.err
    assert captured.out == ""


def test_trying_to_write_leaves_nothing_behind(tmp_path):
    records.check_writable(tmp_path / "new" / "records.jsonl")
    assert not (tmp_path / "new" / "records.jsonl").exists()
    (tmp_path / "old.jsonl").write_text("kept")
    records.check_writable(tmp_path / "old.jsonl")
    assert (tmp_path / "old.jsonl").read_text() == "kept"


def test_a_device_that_is_not_here_gets_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("") == chosen_device("cpu") == torch.device("cpu")
    for command in ("kernels", "correctness"):
        assert main(["bench", command, "--device", "cuda"]) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(hardware, "demand_code", lambda device: None)
    assert chosen_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="there are 2 GPUs here"):
        chosen_device("cuda:2")
