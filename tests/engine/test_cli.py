"""What a user sees of the program: help, and mistakes as one sentence with exit code 2."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from massl_fast.cli import COMMANDS, main
from massl_fast.commands.train import kept_of
from massl_fast.config import Config
from massl_fast.engine.trainer import Trainer
from massl_fast.run.checkpoint import CheckpointFolder
from small_images import write_images
from small_runs import train


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"massl-fast {command}" in capsys.readouterr().out


def test_overview_and_unknown_command(capsys):
    assert main([]) == 0 and main(["--help"]) == 0 and main(["bench"]) == 0
    assert "massl-fast train" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_print_config(capsys):
    assert main(["train", "--recipe", "vit_small_in1k", "--print-config", "--train.epochs", "3"]) == 0
    assert "epochs: 3.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--data.train", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--data.train", ""], ["data.train", "empty"]),
        (["--train.global_batch", "17"], ["17", "16 images"]),
        (["--crops.local_size", "10"], ["10", "4"]),
        (["--objective.block_size", "64"], ["objective.block_size", "64", "32"]),
        (["--objective.memory_size", "4", "--objective.block_size", "4"], ["objective.memory_size", "4", "train.global_batch", "8"]),
        (["--recipe", "imagenet"], ["imagenet", "vit_small_in1k"]),
        (["--train.bacth", "4"], ["train.bacth"]),
        (["--train.epochs", "long"], ["train.epochs", "'long'"]),
        (["--model.architecture", "vit_tinny"], ["vit_tinny"]),
        (["--train.micro_batch", "3"], ["train.micro_batch", "3", "8"]),
        (["--run.resume", "must"], ["run.resume", "no complete checkpoint"]),
        (["--objective.backend", "triton"], ["triton"]),
        (["--optimizer.warmup_epochs", "9"], ["warmup_epochs"]),
        (["--train.cuda_graph", "true"], ["train.cuda_graph", "CPU"]),
        (["--model.residual", "bf16"], ["model.residual", "precision is fp32", "train.precision bf16"]),
        (["--model.recompute", "pointwise", "--model.crops_pass", "separate"], ["model.recompute", "packed pass", "Choose blocks"]),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(settings, words, images, tmp_path, capsys):
    assert train(tmp_path, images, *settings) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("massl-fast train: ") and "Traceback" not in complaint
    for word in words:
        assert word in complaint


def test_empty_folder_and_one_image(images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train(tmp_path, tmp_path / "empty") == 2
    assert "empty" in capsys.readouterr().err
    one = write_images(tmp_path / "one", classes=1, per_class=1)
    assert train(tmp_path, images, "--data.train", str(one)) == 2
    assert "1 image" in capsys.readouterr().err


def test_a_place_that_refuses_writing(images, tmp_path, capsys):
    # Root may write into read-only folders, but nobody may make a folder under a file.
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file", images) == 2
    complaint = capsys.readouterr().err
    assert str(tmp_path / "file") in complaint and "Traceback" not in complaint


def test_a_run_completes_and_another_architecture_or_seed_is_refused(images, tmp_path, capsys):
    assert train(tmp_path, images) == 0
    folder = tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "checkpoints/last", "checkpoints/best"):
        assert (folder / name).exists(), name
    assert train(tmp_path, images) == 0
    assert "is complete" in capsys.readouterr().out
    changed = ["--model.model_args", "{patch_size: 4, depth: 2, num_heads: 2, embed_dim: 32}"]
    assert train(tmp_path, images, *changed, "--run.seed", "7") == 2
    said = capsys.readouterr().err
    assert "is of another run. It was made with run.seed 0 (here 7); model.model_args {" in said, said
    assert main(["eval", "knn", "--checkpoint", str(folder), "--train", str(images), "--test", str(images), "--k", "3"]) == 0
    assert main(["export", "--checkpoint", str(folder), "--to", str(tmp_path / "exported")]) == 0
    assert train(tmp_path, images, "--run.resume", "never") == 0
    assert (tmp_path / "run.1/summary.json").exists(), "an old run is moved aside, not lost"


def test_out_of_memory_leaves_a_report_and_a_sentence(images, tmp_path, capsys, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Trainer, "_loop", refuse)
    assert train(tmp_path, images) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told and "out of memory" in told.lower() and "train.micro_batch" in told and "continues from it" in told
    assert "activations" in (tmp_path / "run" / "out_of_memory.txt").read_text()


def test_a_full_disk_is_a_sentence(images, tmp_path, capsys, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "run" / "summary.json"))

    monkeypatch.setattr(Trainer, "_loop", refuse)
    assert train(tmp_path, images) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and "summary.json could not be written: No space left" in told and "continues from it" in told


def test_a_run_without_a_checkpoint_promises_none(tmp_path):
    config = Config.model_validate({"run": {"folder": str(tmp_path)}})
    assert "nothing to continue from" in kept_of(config)
    CheckpointFolder(tmp_path / "checkpoints").save(1, {"weight": torch.ones(2)}, {})
    assert "continues from it" in kept_of(config)


def test_other_errors_keep_their_traceback(images, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("an error of ours")

    monkeypatch.setattr(Trainer, "_loop", fail)
    with pytest.raises(RuntimeError, match="an error of ours"):
        train(tmp_path, images)


def test_a_pipe_that_closes_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "massl_fast", "train", "--recipe", "demo", "--print-config"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and not done.stderr
