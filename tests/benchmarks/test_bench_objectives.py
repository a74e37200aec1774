"""bench objectives: what it records, what it finds wrong, and what pages make of its records."""

import pytest
import torch

from massl_fast import records
from massl_fast.benchmarks import beside, objectives
from massl_fast.benchmarks.page import page_of
from massl_fast.cli import main

QUICK = ["bench", "objectives", "--quick", "--rounds", "1", "--device", "cpu"]
LOSSES = [case.loss for case in objectives.CASES]


@pytest.fixture
def no_products(monkeypatch):
    """A small product and a small copy in place of the machine's rates, whose size is of no matter here."""
    a = torch.ones(8, 8)
    calls = {beside.MATRIX: lambda inputs: (a @ a,), beside.COPY: lambda inputs: (a.clone(),)}
    monkeypatch.setattr(beside, "machine_calls", lambda *_: (calls, {beside.MATRIX: 1024.0, beside.COPY: 512.0}))


def test_every_loss_is_timed_beside_the_published_way_and_drawn(tmp_path, monkeypatch, no_products):
    measured = beside.extra_bytes  # in a process of its own, which takes seconds to start: once is enough
    once = ("moco_v3", "streaming")
    monkeypatch.setattr(
        beside,
        "extra_bytes",
        lambda call, device: measured(call, device) if (call.args[2].loss, call.args[3]) == once else (2**20, 2**10),
    )
    output = tmp_path / "records.jsonl"
    assert main([*QUICK, "--output", str(output)]) == 0
    rows = records.read(output)
    assert {(row["case"]["loss"], row["case"]["variant"]) for row in rows} == {
        (loss, way) for loss in LOSSES for way in ("published way", "reference", "streaming")
    }
    for row in rows:
        figures = row["figures"]
        assert figures["error"]["median"] < 1e-5 and figures.get("error of gradients", figures["error"])["median"] < 1e-5
        assert (
            figures["time"]["median"] > 0 and figures["extra memory"]["median"] >= 0 and figures["share of the matrix rate"]["median"] > 0
        )
    assert next(row for row in rows if row["case"]["variant"] == "published way")["figures"]["time ratio"]["median"] == 1
    page = page_of(rows)
    assert "Losses beside the published way</h" in page and "K 65536" not in page and "sinkhorn" in page


def test_what_is_wrong_gets_no_time(monkeypatch, capsys, no_products):
    right = objectives.kernels.sinkhorn_bias

    def wrong(*args, backend="auto", **kwargs):
        found = right(*args, backend=backend, **kwargs)
        return found + torch.linspace(0, 0.01, len(found)) if backend == "streaming" else found

    monkeypatch.setattr(objectives.kernels, "sinkhorn_bias", wrong)
    monkeypatch.setattr(beside, "extra_bytes", lambda *_: (0, 0))
    assert main([*QUICK, "--losses", "sinkhorn", "--output", "none"]) == 1
    told = capsys.readouterr().out
    assert "streaming                      WRONG: errors" in told and "1 results are wrong; they have no time." in told
    assert sum(line.startswith("  streaming") for line in told.splitlines()) == 1


def test_mistakes_are_sentences(capsys):
    assert main([*QUICK, "--rounds", "-1"]) == 2
    assert "take no negative number" in capsys.readouterr().err
