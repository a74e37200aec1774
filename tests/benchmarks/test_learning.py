"""bench/learning.py on toy images: what it holds out, trains, records and writes; and what recorded runs say of the advice."""

import importlib.util
import io
import json
import math
import tarfile
from pathlib import Path

import pytest
import torch

from massl_fast import records
from massl_fast.cli import main
from massl_fast.data.sources import open_source
from massl_fast.engine.trainer import collapse, endless_warmup
from massl_fast.length import Length
from massl_fast.objectives.base import COLLAPSED_SPREAD, Metric, spread
from small_images import write_images

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "cpu" / "learning"
TOY = """
toy:
  base:
    recipe: cifar10_cpu
    crops.global_size: 16
    evaluation.image_size: 16
    model.model_args: {stem_width: 4, channels: [8, 8, 8, 8]}
    model.head_hidden_dim: 16
    model.embedding_dim: 8
    train.global_batch: 16
    train.precision: fp32
  cases:
    massl: {objective.memory_size: 32, objective.block_size: 16}
    lightly_dino: {library: lightly, objective.name: dino, objective.prototypes: 16, objective.freeze_last_layer_epochs: 1}
"""


@pytest.fixture(scope="module")
def learning():
    spec = importlib.util.spec_from_file_location("learning", ROOT / "bench" / "learning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(learning, tmp_path, monkeypatch):
    """Runs cases of the toy suite on 32 images, for next to no time; returns the records."""
    suites, output = tmp_path / "suites.yaml", tmp_path / "toy.jsonl"
    suites.write_text(TOY)
    images = str(write_images(tmp_path / "images", classes=2, per_class=16, size=16))

    def run(*only):
        words = ["learning.py", "run", "toy", "--suites", str(suites), "--minutes", "1e-9", "--train", images, "--test", images]
        words += ["--runs", str(tmp_path / "runs"), "--output", str(output), "--only", *only]
        monkeypatch.setattr("sys.argv", words)
        assert learning.main() == 0
        return records.read(output)

    return run


def test_a_case_leaves_a_record_and_is_not_run_again(run, capsys):
    (row,) = run("massl")
    assert row["case"] == {"suite": "toy", "name": "massl", "seed": 0, "minutes": 1e-9}
    assert {"knn", "linear", "untrained knn", "embedding spread", "images per processor second"} <= row["figures"].keys()
    assert row["details"]["steps"] == 1 and len(row["details"]["curve"]["embedding_spread"]) == 1
    assert run("massl") == [row]


def test_dino_of_lightly_runs_in_the_same_harness(run):
    pytest.importorskip("lightly")
    (row,) = run("lightly_dino")
    assert row["details"]["settings"]["library"] == "lightly" and 0 <= row["figures"]["embedding spread"]["median"] <= 1


def test_lightlys_last_layer_stands_still_at_first_and_its_teacher_follows(learning, tmp_path):
    pytest.importorskip("lightly")
    suites = tmp_path / "suites.yaml"
    suites.write_text(TOY)
    images = str(write_images(tmp_path / "images", classes=2, per_class=8, size=16))
    settings = learning.cases_of(suites, "toy")["lightly_dino"] | {"objective.freeze_last_layer_epochs": 0.5}
    config = learning.config_of(settings, images, tmp_path / "run", 0)
    side = learning.Lightly(config, learning.join_world("cpu"), Length(8, 4, 16, 1, 16))
    crops = [torch.randn(16, 3, 16, 16) for _ in range(2)]
    last, teacher = side.student_head.last_layer.weight_v, next(side.teacher.parameters())
    before, teacher_before = last.clone(), teacher.clone()
    for step in range(2):
        side.step(crops, step)
    assert torch.equal(last, before)
    side.step(crops, 2)
    assert not torch.equal(last, before) and not torch.equal(teacher, teacher_before)
    assert not any(p.requires_grad for p in [*side.teacher.parameters(), *side.teacher_head.parameters()])


def test_samples_are_held_out_evenly_and_once(learning, tmp_path):
    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        for number in range(10):
            for extension, data in (("jpg", b"picture"), ("cls", b"3")):
                member = tarfile.TarInfo(f"{number:06}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    learning.split(str(tmp_path / "train-{000..000}.tar"), tmp_path / "out", 3)
    fit, held = (open_source(str(tmp_path / "out" / f"{name}-000.tar")) for name in ("fit", "held_out"))
    names = [{source.name(i).rpartition("/")[2] for i in range(len(source))} for source in (fit, held)]
    assert len(fit) == 7 and len(held) == 3 and not names[0] & names[1] and held.label(0) == 3
    assert names[1] == {"000000.jpg", "000003.jpg", "000006.jpg"}


def test_every_case_of_the_suites_is_a_configuration(learning):
    for suite in ("search", "search_vit", "tuning", "side_by_side", "tables", "failures"):
        for settings in learning.cases_of(ROOT / "bench" / "learning.yaml", suite).values():
            learning.config_of(settings, "images", Path("run"), 0)


def test_a_suite_or_case_that_is_not_there_is_an_error(learning, tmp_path):
    with pytest.raises(ValueError, match=r"no suite 'sheep'\. It has search"):
        learning.cases_of(ROOT / "bench" / "learning.yaml", "sheep")


def test_tables_hold_means_and_spreads_over_seeds(learning):
    assert learning.mean_of([40.0, 42.0]) == "41 ± 1" and learning.mean_of([40.0]) == "40"
    with pytest.raises(ValueError, match="0 times"):
        learning.with_block("no marks", "search", "")


def test_the_page_is_what_the_records_give(learning):
    assert learning.page(check=True) == 0, "python bench/learning.py page makes it anew"


def recorded(suite):
    path = RESULTS / f"{suite}.jsonl"
    if not path.is_file():
        pytest.skip(f"there are no records of {suite}")
    return records.read(path)


@pytest.mark.parametrize("suite", ["search", "search_vit", "tuning", "side_by_side"])
def test_runs_that_learned_are_not_told_of_collapse(learning, suite):
    for row in recorded(suite):
        if row["figures"]["knn"]["median"] >= row["figures"]["untrained knn"]["median"] + 2:
            assert not any(sentence for _, sentence in told_of_collapse(learning, row)), row["case"]


def metrics_of(learning, settings):
    config = learning.config_of(settings, "", Path("unused"), 0)
    return learning.build_objective(config, learning.precision_of(config, learning.join_world("cpu")), 0).metrics()


def told_of_collapse(learning, row):
    """(step, what the trainer would have said there, or None) of each logged line of a recorded run."""
    settings, curve, length = row["details"]["settings"], row["details"]["curve"], Length(row["details"]["steps"], 1, 1, 1, 1)
    metrics = () if settings.get("library") else metrics_of(learning, settings)
    lines = [dict(zip(curve, values)) for values in zip(*curve.values())]
    return [(line["step"], collapse(line, metrics, line["step"], length, "")) for line in lines]


def test_no_objective_collapses_in_a_thousand_steps_by_its_own_meters(learning):
    """Over the second half of a run, no metric that says what a collapse looks like says so on average, for any objective and seed."""
    seen = set()
    for row in recorded("side_by_side"):
        settings, curve = row["details"]["settings"], row["details"]["curve"]
        if settings.get("library") or row["details"]["steps"] < 1000:
            continue
        metrics = metrics_of(learning, settings)
        for metric in metrics:
            side, limit = metric.collapsed or ("below", -math.inf)
            late = curve[metric.key][len(curve["step"]) // 2 :]
            mean = sum(late) / len(late)  # a meter of 32 images of one step is noisy
            assert mean > limit if side == "below" else mean < limit, (row["case"], metric.key)
        assert any(metric.collapsed for metric in metrics)
        seen.add(learning.config_of(settings, "", Path("unused"), 0).objective.name)
    assert seen == {"massl", "carp", "dino", "ibot", "moco_v3", "mmc"}


def test_runs_that_collapsed_are_told_so_within_their_first_half(learning):
    # The contiguous blocks of docs/demo.md: 300 of 700 steps, spread 0.0003.
    row, declared, length = {"embedding_spread": 0.0003}, [spread("embedding_spread", "Spread")], Length(700, 93, 64, 1, 64)
    assert "embedding_spread is 0.0003" in collapse(row, declared, 300, length, "objective.partition stochastic")
    for row in recorded("failures"):
        if min(row["details"]["curve"]["embedding_spread"]) < COLLAPSED_SPREAD:
            half = [sentence for step, sentence in told_of_collapse(learning, row) if step <= row["details"]["steps"] / 2]
            assert any(half), row["case"]
    # A tenth of the run is not over.
    assert collapse({"embedding_spread": 0.0003}, declared, 69, length, "") is None


def test_any_metric_that_declares_a_collapse_is_a_sign_of_it():
    declared, length = [Metric("own", "Mine", collapsed=("above", 35.0)), Metric("other", "Not a sign")], Length(100, 10, 8, 1, 8)
    assert "own is 40, and" in collapse({"own": 40.0, "other": 0.0}, declared, 50, length, "")
    assert collapse({"own": 30.0, "other": 0.0}, declared, 50, length, "") is collapse({"own": None}, declared, 50, length, "") is None
    assert collapse({"own": 40.0}, declared, 49, length, "") is None, "it may not have begun to learn"


def test_every_failure_was_warned_of():
    for row in recorded("failures"):
        wanted = {"blockwise": "blockwise", "soft teacher": "not below", "large memory": "to fill"}.get(row["case"]["name"], "")
        assert wanted in json.dumps(row["details"]["warnings"]), row["case"]


def test_a_warm_up_longer_than_half_of_the_run_is_told():
    assert endless_warmup(10, Length(300, 20, 64, 1, 64)).startswith("optimizer.warmup_epochs 10 are 200 of this run's 300 steps")
    assert endless_warmup(1, Length(100, 20, 64, 1, 64)) is None and endless_warmup(0, Length(1, 20, 64, 1, 64)) is None


SMALL = ["--crops.global_size=32", "--crops.local_size=16", "--evaluation.image_size=32", "--train.global_batch=8", "--train.steps=2"]
SMALL += ["--model.model_args={depth: 1, embed_dim: 48, num_heads: 4}", "--model.head_hidden_dim=16", "--model.embedding_dim=8"]
SMALL += ["--data.num_workers=0", "--logging.tensorboard=false", "--evaluation.every_epochs=0", "--train.precision=fp32"]
SMALL += ["--optimizer.warmup_epochs=0"]
OWN = {
    "massl": ["--objective.memory_size=32", "--objective.block_size=16", "--objective.teacher_temperature_warmup_epochs=0"],
    "dino": ["--objective.prototypes=32", "--objective.teacher_temperature_warmup_epochs=0"],
    "ibot": ["--objective.prototypes=32", "--objective.teacher_temperature_warmup_epochs=0"],
    "moco_v3": [],
}


@pytest.mark.parametrize("objective", OWN)
def test_every_step_of_the_public_comparison_runs_at_a_small_size(objective, tmp_path, capsys):
    """Training with k-NN before and after, then both probes of the checkpoint, as docs/learning.md lists the commands."""
    train, test = (str(write_images(tmp_path / role, classes=2, per_class=8, size=32, seed=1)) for role in ("train", "val"))
    recipe, folder = f"imagenette_vit_small_{objective}", str(tmp_path / "run")
    words = ["train", "--recipe", recipe, "--run.folder", folder, "--data.train", train, "--evaluation.train", train]
    assert main([*words, "--evaluation.test", test, *SMALL, *OWN[objective]]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["knn_percent"] is not None
    capsys.readouterr()
    for protocol, settings in (("knn", ["--k", "5"]), ("linear", ["--epochs", "1", "--views", "0", "--rates", "0.1"])):
        assert (
            main(["eval", protocol, "--checkpoint", folder, "--train", train, "--test", test, "--no-baselines", "--json", *settings]) == 0
        )
        found = json.loads(capsys.readouterr().out)
        assert 0 <= found["results"]["teacher"][found["headline"]] <= 100
