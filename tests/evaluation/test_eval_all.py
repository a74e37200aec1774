"""A plan of protocols: what has data is evaluated on shared features, what has none is named; checkpoints side by side; pages."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from massl_fast.cli import main
from massl_fast.commands.eval_all import planned_in, shipped_plans
from massl_fast.models.backbone import build_backbone
from massl_fast.report.evaluations import blocks_of, evaluations_page, results_in
from massl_fast.run.checkpoint import CheckpointFolder
from small_images import write_images

ARGUMENTS = dict(patch_size=8, embed_dim=24, depth=1, num_heads=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_images(folder / "train", classes=2, per_class=8), write_images(folder / "test", classes=2, per_class=3, seed=0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = CheckpointFolder(tmp_path_factory.mktemp("c"), keep_last=5)
    timm_args = dict(architecture="vit_tiny_patch16_224", model_args=ARGUMENTS, image_size=16)
    paths = []
    for step in (10, 20):
        torch.manual_seed(step)
        network = build_backbone("vit_tiny_patch16_224", image_size=16, model_args=ARGUMENTS)
        tensors = {f"teacher/backbone.{name}": tensor for name, tensor in network.state_dict().items()}
        paths.append(folder.save(step, tensors, {"timm_args": timm_args}))
    return paths


def write_plan(path, data, **more):
    both = dict(train=str(data[0]), test=str(data[1]))
    plan = {
        "knn": {**both, "k": [1, 3]},
        "linear": [{**both, "epochs": 2, "views": "0", "rates": [0.1, 1.0]}, {**both, "test": "/nowhere/at/all"}],
        "logistic": {**both, "lambdas": [1e-3, 1e-1]},
    }
    path.write_text(yaml.safe_dump({**plan, **more}))
    return path


def test_a_plan_runs_what_has_data_and_names_the_rest(data, checkpoints, tmp_path, capsys):
    plan = write_plan(tmp_path / "plan.yaml", data)
    cache, out = tmp_path / "kept", tmp_path / "out"
    command = ["eval", "all", "--plan", str(plan), "--checkpoint", str(checkpoints[0]), "--cache", str(cache), "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (
        "k-NN accuracy" in printed and "Linear probe" in printed and "Skipped: linear needs /nowhere/at/all, which is not there." in printed
    )
    # Teacher, untrained network and raw pixels, training and test images: one extraction serves all three protocols.
    assert len(list(cache.iterdir())) == 6
    whole = json.loads((out / "result.json").read_text())
    assert [one["protocol"] for one in whole["results"]] == ["knn", "linear", "logistic"] and len(whole["unfinished"]) == 1
    page = (out / "report.html").read_text()
    assert "<script" not in page and "Not as published" in page and "/nowhere/at/all" in page and "Accuracy over learning rate" in page
    assert results_in(out)[0] == whole["results"] and results_in(out / "gone") == ([], "")


def test_checkpoints_side_by_side_are_curves_over_steps(data, checkpoints, tmp_path, capsys):
    both = ["--train", str(data[0]), "--test", str(data[1]), "--k", "1"]
    paths = [str(path) for path in checkpoints]
    assert main(["eval", "knn", "--checkpoint", *paths, *both, "--json", "--out", str(tmp_path / "out")]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in whole["results"]] == [10, 20]
    (block,) = blocks_of(whole["results"])
    assert block.drawings[0].title == "Over training: k = 1" and len(block.rows) == 6 and block.rows[0][0] == "step_00000010, teacher"
    assert "Over training" in (tmp_path / "out/report.html").read_text()


def test_few_shots_are_drawn_with_every_draw(data, checkpoints, tmp_path, capsys):
    both = ["--train", str(data[0]), "--test", str(data[1]), "--no-baselines", "--draws", "2", "--per-class", "1", "2", "--heads", "knn"]
    assert main(["eval", "fewshot", "--checkpoint", str(checkpoints[0]), *both, "--out", str(tmp_path / "out")]) == 0
    assert "knn: mean of draws, and every draw" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("knn: [1]", "it must be a mapping of settings"),
        ("kn: {train: a}", "Did you mean knn"),
        ("knn: {train: demo, test: demo, kk: 3}", "There is no setting knn.kk"),
        ("knn: {train: demo}", "knn.test is missing: Labelled images that are classified."),
        ("- knn", "must be a mapping from protocols"),
        ("a: b: c", "is not valid YAML"),
    ],
)
def test_mistakes_in_a_plan_are_sentences(text, message, tmp_path):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        planned_in(str(tmp_path / "plan.yaml"))


def test_shipped_plans_fit_their_protocols():
    for name in shipped_plans():
        planned, skipped = planned_in(name)
        assert len(planned) >= 2 and not skipped
    with pytest.raises(ValueError, match="There is no plan gone"):
        planned_in("gone")


def test_a_page_escapes_what_files_say_and_a_damaged_result_is_a_sentence(tmp_path):
    (tmp_path / "result.json").write_text('{"results": [{"protocol": 3}]}')
    found, damage = results_in(tmp_path)
    assert found == [] and "cannot be read" in damage
    one = dict(
        protocol="knn",
        title="<script>",
        figures=[dict(key="k", title="<b>", unit="%")],
        headline="k",
        checkpoint="<i>",
        step=None,
        architecture="a",
        features="cls",
        image_size=8,
        settings={},
        about="",
        departures=[],
        notes=["<script>"],
        results={"teacher": {"k": 1.0}},
        published=[],
        pictures=[],
        seconds=1.0,
    )
    page = evaluations_page([one])
    assert "<script>" not in page and "<b>" not in page and "&lt;script&gt;" in page


def test_two_processes_of_torchrun_give_the_figures_of_one(data, checkpoints, tmp_path, capsys):
    plan = write_plan(tmp_path / "plan.yaml", data)
    options = ["eval", "all", "--plan", str(plan), "--checkpoint", str(checkpoints[0]), "--device", "cpu", "--json"]
    assert main(options) == 0
    alone = json.loads(capsys.readouterr().out)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "massl_fast"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [*torchrun, *options, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=200, env=environment
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    shared = json.loads(answer.stdout)  # of the first rank alone
    assert [one["protocol"] for one in shared["results"]] == [one["protocol"] for one in alone["results"]] == ["knn", "linear", "logistic"]
    assert [one["results"] for one in shared["results"]] == [one["results"] for one in alone["results"]]
    assert shared["unfinished"] == alone["unfinished"] and (tmp_path / "out/report.html").is_file()


def one_result(protocol, figures, results, **more):
    common = dict(title="T", architecture="vit", image_size=32, features="cls", about="", checkpoint="c", step=None, seconds=1)
    said = dict(departures=[], notes=[], published=[], pictures=[], settings={})
    figures = [dict(key=key, title=title, unit="%", higher_is_better=True) for key, title in figures]
    return {**common, **said, "protocol": protocol, "figures": figures, "headline": figures[0]["key"], "results": results, **more}


def test_classes_variants_sets_and_similarities_are_drawn():
    multilabel = one_result(
        "multilabel", [("map", "mAP")], {"a": {"map": 50.0}}, average_precision_percent={"a": {"cat": 30.0, "äpfel": 70.0}}
    )
    variants = [("original_percent", "original"), ("no_fg_percent", "no fg"), ("background_gap_percent", "BG-gap")]
    backgrounds = one_result("backgrounds", variants, {"a": {"original_percent": 80.0, "background_gap_percent": 5.0}})
    transfer = one_result("transfer", [("mean_k20_percent", "mean"), ("pets_k20_percent", "pets")], {"a": {"pets_k20_percent": 12.0}})
    histograms = {"a": {"intra": [0, 1, 3, 9], "inter": [5, 5, 0, 0]}, "b": {"intra": [0] * 4, "inter": [0] * 4}}
    similarity = one_result("similarity", [("overlap", "overlap")], {"a": {"overlap": 0.25}, "b": {"overlap": None}}, histograms=histograms)
    for one, titles, words in (
        (multilabel, ["Average precision of every class"], ["cat", "äpfel"]),
        (backgrounds, ["Accuracy on every variant"], ["original"]),
        (transfer, ["Accuracy on every set"], ["pets"]),
        (similarity, ["a: overlap 0.25", "b: overlap –"], ["cosine similarity"]),
    ):
        (block,) = blocks_of([one])
        assert [drawing.title for drawing in block.drawings] == titles
        page = evaluations_page([one])
        assert all(word in page for word in words) and "BG-gap</text>" not in page
