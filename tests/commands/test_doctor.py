"""massl-fast doctor: whole, and fit to be pasted into a public issue."""

import getpass
import json
import socket
from pathlib import Path

import pytest

from massl_fast.cli import main
from massl_fast.commands import doctor


def test_the_table_says_what_runs_and_holds_no_names_of_this_machine(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for row in ("massl-fast", "torch", "GPU", "backends, float32", "backend triton", "loader auto", "precision auto", "memory"):
        assert f"| {row}" in told, row
    for secret in (str(Path.home()), str(Path.cwd()), socket.gethostname()):
        assert len(secret) < 3 or secret not in told


def test_json_has_the_same_rows(capsys):
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == doctor.findings().keys()


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ("libnvdali.so: cannot open /home/ada/env/lib/libcuda.so.1: no", "libnvdali.so: cannot open …/libcuda.so.1: no"),
        ("DALI imports, but its CPU backend", "DALI imports, but its CPU backend"),
        ("12 GiB/s and 1/2", "12 GiB/s and 1/2"),
        ("~/x/y\nz", "…/y z"),
    ],
)
def test_paths_are_shortened_and_words_with_slashes_are_not(found, shown):
    assert doctor.without_names(found) == shown


def test_host_and_user_get_stand_ins(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node-17")
    monkeypatch.setattr(getpass, "getuser", lambda: "lovelace")
    assert doctor.without_names("lovelace on node-17, not node-175") == "USER on HOST, not node-175"


def test_a_gpu_without_code_for_it_is_a_row_and_no_error(monkeypatch):
    def refuse(name):
        raise ValueError("PyTorch has no code for Tesla V100.")

    monkeypatch.setattr(doctor, "chosen_device", refuse)
    found = doctor.findings()
    assert found["PyTorch on the GPU"] == "PyTorch has no code for Tesla V100." and "backends, float32" in found
