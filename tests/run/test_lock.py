"""The lock on a run's folder: who gets it, who is refused, and what becomes of a dead holder's."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from massl_fast.run import lock
from massl_fast.run.checkpoint import CheckpointFolder
from massl_fast.run.folder import prepare_folder
from massl_fast.run.lock import FolderLock
from small_encoders import ONE_CPU


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.02)


def held_by(folder, **changes) -> dict:
    """A lock of some other process, written by hand."""
    holder = {**lock._identity("", 1), "host": "node7", "process": 4711, "process_started": 1, "since": "then", **changes}
    (folder / lock.NAME).write_text(json.dumps(holder))
    return holder


def locked(folder, meeting: str = "", round_number: int = 1) -> FolderLock:
    made = FolderLock(folder, meeting, round_number, on_loss=pytest.fail)
    made.acquire()
    return made


def other_process(folder) -> subprocess.Popen:
    """Holds the lock until its input closes."""
    code = f"from pathlib import Path; from massl_fast.run.lock import FolderLock; held = FolderLock(Path({str(folder)!r}), '', 1, print)"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}; held.acquire(); print('held', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "held\n"
    return child


def test_a_live_holder_is_named_and_its_lock_kept_and_a_dead_ones_taken_over_with_a_sentence(tmp_path, capsys):
    child = other_process(tmp_path)
    try:
        with pytest.raises(ValueError, match=rf"in use by process {child.pid} on .*, which is alive.*name another run\.folder"):
            locked(tmp_path)
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == child.pid
    finally:
        child.kill()
        child.communicate()
    held = locked(tmp_path)
    assert f"was held by process {child.pid}" in (said := capsys.readouterr().err) and "has ended without releasing it" in said
    assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    held.release()
    assert not list(tmp_path.iterdir())


def test_a_program_that_ends_in_an_error_releases_its_lock(tmp_path):
    child = other_process(tmp_path)
    child.communicate()  # input() meets the end of its input
    assert child.returncode == 1 and not list(tmp_path.iterdir())


def test_a_number_that_was_given_to_another_process_since_is_no_holder(tmp_path):
    held_by(tmp_path, process=os.getppid())
    locked(tmp_path).release()


def test_an_earlier_attempt_of_the_same_job_is_over_wherever_it_ran(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held_by(tmp_path, namespace="elsewhere", restarts=0, round=3)
    locked(tmp_path).release()
    assert "Slurm job 12 of its cluster, since then, which is an earlier attempt of this job" in capsys.readouterr().err


def test_ranks_that_torchrun_started_again_take_over_from_those_before_them(tmp_path, capsys):
    held_by(tmp_path, namespace="elsewhere", meeting="m", round=1)
    locked(tmp_path, "m", 2).release()
    assert "which is an earlier attempt of this job" in capsys.readouterr().err


@pytest.mark.parametrize("namespace", ["elsewhere", lock._namespace()])
def test_another_torchrun_of_the_same_name_is_another_job_however_often_it_starts_again(tmp_path, monkeypatch, namespace):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    process = os.getppid()
    held_by(tmp_path, namespace=namespace, meeting="m", process=process, process_started=lock._started(process))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(locked, tmp_path, "n", 2)
        time.sleep(0.3)
        os.utime(tmp_path / lock.NAME, (1, 1))
        with pytest.raises(ValueError, match=r"on node7, torchrun 7.*alive"):
            answer.result()


def test_a_holder_that_is_stopped_lives(tmp_path):
    child = other_process(tmp_path)
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(ValueError, match=rf"in use by process {child.pid}"):
        locked(tmp_path)
    child.send_signal(signal.SIGCONT)
    child.communicate()


def test_another_users_process_that_proc_hides_is_not_taken_for_dead(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    holder = held_by(tmp_path)
    assert lock.why_ended(holder, lock._identity("", 1)) == "has ended without releasing it"
    monkeypatch.setattr(os, "kill", refuse)
    assert lock.why_ended(holder, lock._identity("", 1)) is None


def test_a_disk_that_is_full_leaves_no_lock_behind(tmp_path, monkeypatch):
    def full(descriptor, *_, **__):
        os.close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(ValueError, match=r"cannot be made or locked: No space left on device\. Name a place"):
        prepare_folder(tmp_path, "auto", CheckpointFolder(tmp_path / "checkpoints"), ONE_CPU)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_the_lock_is_named(tmp_path):
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(ValueError, match=r"cannot be made or locked: Is a directory \(.*lock\.json\)"):
        prepare_folder(tmp_path, "auto", CheckpointFolder(tmp_path / "checkpoints"), ONE_CPU)


def test_a_holder_elsewhere_is_taken_for_dead_once_it_gives_no_sign_of_life(tmp_path, capsys):
    held_by(tmp_path, namespace="elsewhere")
    locked(tmp_path).release()
    said = capsys.readouterr().err
    assert "Watching its lock for 1 s" in said and "has given no sign of life for 1 s" in said


def test_a_holder_elsewhere_that_gives_a_sign_of_life_is_left_alone(tmp_path):
    held_by(tmp_path, namespace="elsewhere")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(locked, tmp_path)
        time.sleep(0.3)
        os.utime(tmp_path / lock.NAME, (1, 1))  # its clock may be anywhere
        with pytest.raises(ValueError, match=r"process 4711 on node7.*alive"):
            answer.result()


def test_a_holder_that_ends_while_it_is_watched_makes_room(tmp_path):
    held_by(tmp_path, namespace="elsewhere")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(locked, tmp_path)
        time.sleep(0.3)
        (tmp_path / lock.NAME).unlink()
        answer.result().release()


NONSENSE = b'{"host": "x", "process": "1/../1", "process_started": [], "namespace": 3, "job": {}, "restarts": "0", "meeting": null}'


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"host": "x"}', b"\xff\xfe\x00", b"[" * 10**5, NONSENSE])
def test_a_lock_that_says_nothing_is_watched_as_well(tmp_path, content):
    (tmp_path / lock.NAME).write_bytes(content)
    assert not lock.sign_of_life(tmp_path) or lock.sign_of_life(tmp_path)[0]
    locked(tmp_path).release()


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path):
    """Threads stand for processes: each with an identity of its own, all of them alive."""
    held_by(tmp_path)

    def contender(number: int) -> str:
        made = FolderLock(tmp_path, "", 1, on_loss=pytest.fail)
        made.path = tmp_path / "." / lock.NAME
        made.own = json.dumps({**json.loads(made.own), "since": str(number)})
        while not made._make() and not made._succeed():
            pass
        return made.own

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(contender, number) for number in range(8)]
    winners = [answer.result() for answer in answers if answer.exception() is None]
    assert len(winners) == 1 and (tmp_path / lock.NAME).read_text() == winners[0]
    assert all("in use by" in str(answer.exception()) for answer in answers if answer.exception())
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]


def test_who_was_asleep_and_lost_its_lock_is_told_and_leaves_the_other_ones(tmp_path):
    told = []
    held = FolderLock(tmp_path, "", 1, on_loss=told.append)
    held.acquire()
    taker = held_by(tmp_path)
    deadline = time.monotonic() + 20
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "was taken over by process 4711 on node7" in told[0]
    held.release()
    assert json.loads((tmp_path / lock.NAME).read_text()) == taker


def test_who_was_asleep_looks_at_the_lock_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 3600)  # the thread that beats was asleep as well
    told = []
    held = FolderLock(tmp_path, "", 1, on_loss=told.append)
    held.acquire()
    held_by(tmp_path)
    held.confirm()
    assert not told, "nobody can have taken over yet, and nothing is read"
    awake = lock._now() + lock.SILENT_SECONDS
    monkeypatch.setattr(lock, "_now", lambda: awake)
    held.confirm()
    assert "was taken over by process 4711 on node7" in told[0]
    held.release()


def test_a_lock_that_was_deleted_comes_back(tmp_path):
    held = locked(tmp_path)
    (tmp_path / lock.NAME).unlink()
    deadline = time.monotonic() + 20
    while not (tmp_path / lock.NAME).is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    held.release()
    assert not list(tmp_path.iterdir())


def test_starting_over_does_not_move_a_folder_that_is_in_use(tmp_path):
    folder = tmp_path / "run"
    checkpoints = CheckpointFolder(folder / "checkpoints")
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    child = other_process(folder)
    with pytest.raises(ValueError, match="in use"):
        prepare_folder(folder, "never", checkpoints, ONE_CPU)
    child.communicate()
    _, held = prepare_folder(folder, "never", checkpoints, ONE_CPU)
    assert [path.name for path in folder.iterdir()] == [lock.NAME]
    assert [path.name for path in (tmp_path / "run.1").iterdir()] == ["config.yaml"]
    with held:
        pass
    assert not list(folder.iterdir())
