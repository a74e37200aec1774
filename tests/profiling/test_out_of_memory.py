"""Out of memory, planted: how it is recognised, what is written and told; and other mistakes, one sentence each."""

import pytest
import torch

from massl_fast.cli import main
from massl_fast.commands import profile_memory, profile_trace
from massl_fast.config import Config, load_config
from massl_fast.distributed.world import World
from massl_fast.profiling import estimate, memory, out_of_memory
from massl_fast.profiling.out_of_memory import is_out_of_memory, write_out_of_memory_report
from massl_fast.profiling.synthetic import synthetic_run
from small_encoders import ONE_CPU

TINY = ["--model.architecture", "vit_tiny_patch16_224", "--model.model_args", "{patch_size: 8, depth: 2, embed_dim: 24, num_heads: 2}"]
TINY += ["--objective.memory_size", "64", "--objective.block_size", "32", "--train.global_batch", "16", "--model.head_hidden_dim", "16"]
COMMANDS = {"memory": memory, "trace": profile_trace}
"""What takes a step of its own, by command."""


def tiny() -> Config:
    return load_config("demo", TINY)


def error_of_a_full_host() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)  # a pebibyte: more than an address space holds
    return caught.value


def test_what_is_out_of_memory():
    assert is_out_of_memory(error_of_a_full_host())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere"))
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_a_step_that_runs_out_leaves_a_report(tmp_path):
    config = tiny()
    run = synthetic_run(config, ONE_CPU, estimate.precision_on(config, "cpu"), device_batch=16)
    run.train_step.objective.register_forward_hook(lambda *_: torch.empty(2**50, dtype=torch.uint8))
    try:
        run.step()
    except RuntimeError as error:
        assert is_out_of_memory(error)
        sentence = write_out_of_memory_report(config, ONE_CPU, tmp_path / "run")
    path = tmp_path / "run" / "out_of_memory.txt"
    assert sentence.startswith("Out of memory: a step with micro-batches of 16 images needs about")
    assert "Cheapest way out: --train.micro_batch 8, which saves" in sentence and str(path) in sentence and "\n" not in sentence
    text = path.read_text(encoding="utf-8")
    assert [number for number in "1234" if f"\n  {number}. --" in text] == list("123")
    assert text.count(" saves ") == text.count("Time: ") == 3
    assert "--model.recompute pointwise" in text and "% more operations" in text
    for part in ("activations: block 1", "student weights", "peak", "The peak comes in", "Highest in each part of a step"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_each_rank_writes_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "capacity", lambda device: (2**20, 2**10))
    sentence = write_out_of_memory_report(tiny(), World(2, 4, 0, torch.device("cpu")), tmp_path)
    assert "micro-batches of 4 images" in sentence and "the host has 1.0 MiB, 1.0 KiB of it free now" in sentence
    assert "not enough alone" in (tmp_path / "out_of_memory_rank_2.txt").read_text(encoding="utf-8")


def test_a_gpu_is_asked_what_others_hold(monkeypatch):
    monkeypatch.setattr(estimate, "ways_out", lambda *_, **__: [])  # takes seconds, tested elsewhere
    monkeypatch.setattr(estimate, "capacity", lambda device: (2**30, 2**28))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**28)
    found = estimate.explain(tiny(), World(0, 1, 0, torch.device("cuda", 0)))
    assert "Beside PyTorch, 0.50 GiB of the device are taken" in found.text
    assert "cuBLAS workspace" in found.text


def test_a_report_that_cannot_be_written_or_made_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "could not be written to" in write_out_of_memory_report(tiny(), ONE_CPU, tmp_path / "file" / "run")

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(out_of_memory, "explain", fails)
    assert "the report on it could not be made: MemoryError" in write_out_of_memory_report(tiny(), ONE_CPU, tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["device", "host"])
def test_the_commands_explain_it(command, kind, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(estimate, "ways_out", lambda *_, **__: [])  # takes seconds, tested elsewhere
    error = torch.OutOfMemoryError("CUDA out of memory.") if kind == "device" else error_of_a_full_host()

    def full(*_, **__):
        raise error

    monkeypatch.setattr(COMMANDS[command], "synthetic_run", full)
    to = ["--to", str(tmp_path)] if command == "trace" else []
    assert main(["profile", command, *to, *TINY]) == 2
    assert "Out of memory: a step with micro-batches of 16 images needs about" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_host_has_not_free_is_not_begun(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(estimate, "ways_out", lambda *_, **__: [])  # takes seconds, tested elsewhere
    for module in (estimate, out_of_memory):
        monkeypatch.setattr(module, "capacity", lambda device: (2**30, 2**10))
    monkeypatch.setattr(COMMANDS[command], "synthetic_run", None)
    to = ["--to", str(tmp_path)] if command == "trace" else []
    assert main(["profile", command, *to, *TINY]) == 2
    told = capsys.readouterr().err
    assert "1.0 KiB of it free now. By this estimate it would fit the empty machine" in told


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "vit_small_in1"], "There is no recipe 'vit_small_in1'. Did you mean vit_small_in1k?"),
        (["--train.bacth", "3"], "There is no setting train.bacth."),
        (["--train.global_batch", "-4"], "train.global_batch is -4"),
        (["--train.global_batch"], "--train.global_batch has no value."),
        (["nonsense"], "'nonsense' is not a setting."),
        (["--train.precision", "fp16"], "train.precision is fp16, which trains on GPUs only."),
        (["--model.architecture", "nonsense"], "timm has no architecture named 'nonsense'."),
    ],
)
def test_mistakes_get_a_sentence(command, arguments, words, capsys, tmp_path):
    to = ["--to", str(tmp_path)] if command == "trace" else []
    assert main(["profile", command, *to, *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["memory", "--device-gib", "-1"], "--device-gib is -1"),
        (["memory", "--device-gib", "nan"], "--device-gib is nan"),
        (["trace", "--steps", "0"], "--steps and --top take at least 1."),
        (["trace", "--steps", "-3"], "--steps and --top take at least 1."),
        (["trace", "--top", "0"], "--steps and --top take at least 1."),
    ],
)
def test_numbers_out_of_range(arguments, words, capsys):
    assert main(["profile", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_record_that_could_not_be_written_is_told_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile_memory, "estimate_step", None)
    (tmp_path / "file").write_text("")
    assert main(["profile", "memory", "--output", str(tmp_path / "file" / "records.jsonl"), *TINY]) == 2
    assert "Records cannot be written to" in capsys.readouterr().err


def test_a_gpu_that_is_not_here_cannot_be_traced(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["profile", "trace", "--to", str(tmp_path), "--train.device", "cuda", *TINY]) == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err
