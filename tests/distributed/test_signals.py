"""Signals to a whole run, as a scheduler sends them: to every process that belongs to it, at any time."""

import io
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest

from kill_and_resume import SETTINGS
from massl_fast.cli import _patient
from massl_fast.data.torchvision_loader import worker_arguments
from massl_fast.distributed import listening
from massl_fast.distributed.listening import LISTENER, WARNINGS
from massl_fast.engine.trainer import Trainer
from small_images import write_images
from small_runs import train


def test_what_was_noted_early_is_kept_by_who_listens_later_and_forgotten_at_the_end():
    with LISTENER.listening(signal.SIGTERM, signal.SIGUSR1):
        assert LISTENER.noted is None
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: LISTENER.noted)
        with LISTENER.listening(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            assert LISTENER.noted == signal.SIGUSR1
        assert LISTENER.noted == signal.SIGUSR1
    assert LISTENER.noted is None


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_children_do_not_see_the_warning(number):
    with LISTENER.listening(number):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child.send_signal(number)
    time.sleep(0.1)
    assert child.poll() is None
    child.communicate(b"\n")
    assert child.returncode == 0


@pytest.fixture
def hang_up():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup runs the tests
    yield lambda: os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_is_a_warning_unless_nohup_says_otherwise(hang_up):
    with LISTENER.listening(*WARNINGS):
        hang_up()
        until(lambda: LISTENER.noted == signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with LISTENER.listening(*WARNINGS):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_signal_that_comes_while_the_process_ends_does_not_replace_its_exit_code(hang_up):
    with LISTENER.listening(signal.SIGHUP, to_the_end=True):
        pass
    hang_up()


def test_a_ctrl_c_that_a_launcher_passes_on_is_no_second_one(monkeypatch):
    with LISTENER.listening(signal.SIGTERM, signal.SIGINT):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
            until(lambda number=number: LISTENER.noted == number)
        monkeypatch.setattr(listening, "RELAYED_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda: False)


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_run_goes_on_where_nobody_hears_it_any_more(unbuffered):
    """As with `massl-fast train | tee log`, where Ctrl-C ends tee first."""
    reader, writer = os.pipe()
    stream = io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="utf-8", line_buffering=True, write_through=unbuffered)
    heard = _patient(stream)
    print("before", file=heard, flush=True)
    assert os.read(reader, 100) == b"before\n"
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"nobody reads")
    for _ in range(3):
        print("after", file=heard, flush=True)
    stream.close()


def test_what_pytorch_reads_from_the_environment_is_there_before_it_is_imported():
    code = """
import sys
from massl_fast import cli
cli.parser_of = lambda *_: sys.exit(0 if "torch" not in sys.modules and cli.os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR" else 1)
cli.main(["train"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_what_fails_after_a_signal_asks_to_be_run_again(tmp_path, monkeypatch, capsys):
    """A scheduler's SIGTERM ends compilers and other processes that the run waits for."""
    write_images(tmp_path / "images", classes=2, per_class=8)

    def fail(_):
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: LISTENER.noted)
        raise RuntimeError("the compiler ended with -15")

    monkeypatch.setattr(Trainer, "_loop", fail)
    assert train(tmp_path, tmp_path / "images") == 75
    said = capsys.readouterr().err
    assert "Ended by SIGTERM and by what followed from it" in said and "RuntimeError: the compiler ended with -15" in said
    assert "Traceback" not in said and "continues from it" in said


def test_the_server_of_workers_is_deaf_to_signals_from_its_first_moment():
    arguments = worker_arguments()
    server = forkserver._forkserver._forkserver_pid
    blocked = of_status(f"/proc/{server}/status", "SigBlk")
    assert all(blocked & 1 << number - 1 for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, set()), "this process hears them again"
    assert arguments["multiprocessing_context"].get_start_method() == "forkserver"


def until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    write_images(folder / "images", classes=2, per_class=14)
    (folder / "recipe.yaml").write_text(SETTINGS.replace("num_workers: 1", "num_workers: 2"))
    return folder


def started(workplace, folder: str, *settings: str) -> subprocess.Popen:
    arguments = ["--recipe", str(workplace / "recipe.yaml"), "--data.train", str(workplace / "images"), "--evaluation.every_epochs", "0"]
    command = [sys.executable, "-m", "massl_fast", "train", *arguments, "--run.folder", str(workplace / folder), *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


@pytest.mark.timeout(300)
def test_a_warning_to_every_process_of_a_run_with_workers_saves_and_asks_to_be_run_again(workplace):
    run = started(workplace, "warned", "--train.stop_at_step", "30")
    metrics = workplace / "warned/metrics.jsonl"
    until(lambda: run.poll() is not None or (metrics.is_file() and metrics.read_text().count("\n") > 2))
    os.killpg(run.pid, signal.SIGUSR1)  # workers, their server and the resource tracker are of the same group
    said, _ = run.communicate(timeout=150)
    assert run.returncode == 75, said
    assert "Ended by SIGUSR1 after step" in said and "Traceback" not in said and "KeyError" not in said, said


@pytest.mark.timeout(300)
def test_a_signal_while_the_program_still_imports_ends_with_a_sentence_and_75(workplace):
    run = started(workplace, "early")
    mask = f"/proc/{run.pid}/status"
    until(lambda: of_status(mask, "SigCgt") & 1 << signal.SIGTERM - 1)
    run.terminate()
    said, _ = run.communicate(timeout=150)
    assert run.returncode == 75 and "Ended by SIGTERM before its first step" in said, said
    assert not (workplace / "early").exists()


def of_status(path: str, name: str) -> int:
    with open(path) as lines:
        return next(int(line.split()[1], 16) for line in lines if line.startswith(f"{name}:"))
