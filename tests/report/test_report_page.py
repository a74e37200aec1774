import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from massl_fast.config import Config, write_config
from massl_fast.data.sources import open_source
from massl_fast.report import pictures
from massl_fast.report.page import page_of, write_report
from massl_fast.report.pictures import NeighbourSheet, Pictures, collect_pictures, one_of_each_class
from massl_fast.run.checkpoint import CheckpointFolder
from massl_fast.run.reading import read_run

NONE = Pictures(attention_note="No attention here.", neighbours_note="No neighbours here.")
VIT = dict(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=0)
NORMALISATION = dict(image_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
VOID = {"meta", "img", "path", "use", "rect", "line", "br", "link", "input", "wbr"}


class Page(HTMLParser):
    """Text, images, and whether every element that opens also closes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.images, self.references = [], "", [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [attributes[name] for name in ("src", "href", "xlink:href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def rows_of(steps, evaluated=(), **changes):
    rows = (
        [{"step": 0, "epoch": 0.0, "images_seen": 0, "knn_untrained_k10_percent": 29.0, "knn_untrained_k20_percent": 30.0}]
        if evaluated
        else []
    )
    for step in steps:
        row = {
            "step": step,
            "epoch": step / 10,
            "images_seen": step * 32,
            "loss": 5.0 - step / 100,
            "student_entropy_nats": 4.0,
            "teacher_entropy_nats": 3.0,
            "kl_nats": 1.0,
            "gradient_norm": 0.7,
            "embedding_spread": 0.5,
            "memory_spread": 0.9,
            "memory_age_steps": float(step),
            "learning_rate": 1e-3,
            "weight_decay": 0.04,
            "teacher_momentum": 0.99,
            "teacher_temperature": 0.04,
            "images_per_second": 1234.0,
            "data_wait_percent": 7.0,
            "model_flops_utilization_percent": None,
            "memory_allocated_peak_gib": None,
            "memory_reserved_peak_gib": None,
            "host_memory_peak_gib": 1.5,
        }
        if step in evaluated:
            row |= {f"knn_{network}_k{k}_percent": 40.0 + k + step / 10 for network in ("teacher", "student") for k in (10, 20)}
        rows.append(row | changes)
    return rows


def write_run(folder, rows=None, config=None, summary=None):
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config or Config(), folder / "config.yaml")
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_images(folder, classes=("ant", "bee"), per_class=5, seed=0):
    """Class folders of images, each class of its own brightness."""
    random = np.random.default_rng(seed)
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = random.integers(100 * c, 100 * c + 60, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_a_complete_run_tells_everything(tmp_path):
    summary = {
        "loss": 4.5,
        "steps": 50,
        "device": "one <GPU>",
        "loader": "dali",
        "versions": {"torch": "2.15"},
        "warnings": ["Small memory."],
    }
    run = write_run(tmp_path / "first-run", rows_of(range(5, 55, 5), evaluated=(25, 50)), summary=summary)
    page = Page(page_of(read_run(run), NONE))
    for part in (
        "first-run",
        "complete",
        "65.0 %",  # teacher, k = 20, step 50
        "untrained 30.0 %, +35.0 points",
        "4.500",
        "from 4.950 at step 5",
        "1\u202f234",  # images/s
        "waiting for data 7 % of the time",
        "ln(block size) = 9.70",
        "one <GPU>",
        "versions · torch",
        "Small memory.",
        "No attention here.",
        "No neighbours here.",
        "teacher_temperature_warmup_epochs",
        "Loss",
        "KL divergence, teacher to student",
        "Spread of unit vectors",
        "Gradient norm",
        "Learning rate",
        "Peak memory",
    ):
        assert part in page.text, part
    assert "not complete" not in page.text


def test_the_page_needs_nothing_but_itself(tmp_path):
    run = write_run(tmp_path / "r", rows_of([5, 10], evaluated=(10,)))
    html = page_of(read_run(run), pictures_of_noise())
    assert all(reference.startswith(("data:image/", "#")) for reference in Page(html).references)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe", html)
    # Addresses occur as names of XML languages only.
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def pictures_of_noise(classes=("ant", "bee")):
    def noise(*shape):
        return torch.randint(256, (*shape, 3, 8, 8), dtype=torch.uint8)

    sheet = NeighbourSheet(
        noise(2), classes, noise(2, 3), [[classes[0]] * 3, [classes[0], classes[1], classes[1]]], torch.rand(2, 3), "all 9 training images"
    )
    return Pictures(images=noise(2), attention=torch.rand(2, 4, 2, 2), neighbours=sheet)


def test_pictures_are_shown_and_judged(tmp_path):
    html = page_of(read_run(write_run(tmp_path / "r", [])), pictures_of_noise())
    page = Page(html)
    # Attention: 2 × (image, mean, 4 heads); neighbours: 2 × (query, 3).
    assert len(page.images) == 12 + 8 and all(image["alt"] for image in page.images)
    assert html.count('class="right"') == 5 and html.count('class="wrong"') == 1
    assert "same class (5 of 6)" in page.text and "all 9 training images" in page.text and "head 4" in page.text


def test_similarities_are_shown_where_there_is_no_attention(tmp_path):
    maps = Pictures(images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8), attention=torch.rand(2, 1, 3, 3) - 0.5, similarity=True)
    page = Page(page_of(read_run(write_run(tmp_path / "r", [])), maps))
    assert "Similarity of places to their image" in page.text and "Attention of" not in page.text and "head 1" not in page.text
    assert [image["alt"] for image in page.images] == ["held-out image", "similarity"] * 2


def test_what_an_objective_declares_is_drawn_by_its_declaration(tmp_path):
    declared = [
        {"key": "queue_fill", "title": "Fill <of> the queue", "unit": "%", "note": "Below 50 it starves.", "level": ["starved", 50.0]},
        {"key": "norm_of_a", "title": "a", "figure": "Norms"},
        {"key": "norm_of_b", "title": "b", "figure": "Norms"},
        {"key": "never_logged", "title": "Never"},
    ]
    rows = [{"step": step, "loss": 1.0, "queue_fill": 10.0 * step, "norm_of_a": 1.0, "norm_of_b": 2.0, "kl_nats": 1.0} for step in (1, 2)]
    run = write_run(tmp_path / "r", rows)
    (run / "metrics.schema.json").write_text(json.dumps(declared))
    text = Page(page_of(read_run(run), NONE)).text
    assert text.count("Norms") == 1
    for part in ("Fill <of> the queue", "Below 50 it starves.", "starved", "Loss"):
        assert part in text
    assert "Never" not in text and "KL divergence" not in text
    (run / "metrics.schema.json").write_text('[{"title": "no key"}]')
    assert "metrics.schema.json cannot be read" in Page(page_of(read_run(run), NONE)).text


def test_names_from_outside_are_text_and_not_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    config = Config()
    config.data.train = config.evaluation.train = config.evaluation.test = config.model.architecture = evil
    config.model.model_args = {evil: f'"{evil}'}
    rows = rows_of([5], evaluated=(5,))
    run = write_run(tmp_path / "<b>run&", rows, config, summary={"device": evil, evil: evil, "warnings": [evil]})
    (run / "bad_files.txt").write_text(f"{evil}\n" * 30)
    html = page_of(read_run(run), pictures_of_noise((evil, 'x" onerror="alert(1)')))
    assert "<script" not in html and 'x" onerror' not in html and "<b>" not in html
    page = Page(html)
    assert evil in page.text and "30 images were unreadable" in page.text and "and 10 more in bad_files.txt" in page.text


@pytest.mark.parametrize(
    "rows", [None, [], rows_of([5])[:1], [{"step": 0, "knn_untrained_k10_percent": 31.0}]], ids=["none", "empty", "one", "step 0"]
)
def test_runs_cut_off_early_have_a_shorter_page(tmp_path, rows):
    page = Page(page_of(read_run(write_run(tmp_path / "r", rows)), NONE))
    assert "not complete" in page.text and "the run has not reached its end" in page.text
    assert ("This run has not been evaluated." in page.text) == (not rows or "loss" in rows[0])


def test_a_run_that_stopped_as_asked_is_not_called_incomplete(tmp_path):
    config = Config()
    config.train.stop_at_step, config.train.steps = 5, 40
    run = write_run(tmp_path / "r", rows_of([5]), config)
    CheckpointFolder(run / "checkpoints").save(5, {"objective/pointer": torch.zeros(1)}, {})
    html = page_of(read_run(run), NONE)
    assert '<span class="state good">stopped at step 5 of 40, as set</span>' in html and "not complete" not in html


def test_runs_with_nulls_only_have_no_empty_charts(tmp_path):
    rows = [{"step": 5, "loss": None, "gradient_norm": None, "data_wait_percent": None}]
    page = Page(page_of(read_run(write_run(tmp_path / "r", rows)), NONE))
    assert "Gradient norm" not in page.text and "Learning" not in page.text


def test_the_loss_scale_of_fp16_is_drawn(tmp_path):
    assert "Loss scale" in Page(page_of(read_run(write_run(tmp_path / "r", [{"step": 5, "loss_scale": 65536.0}])), NONE)).text


def test_other_ks_than_20_are_shown(tmp_path):
    rows = [{"step": 5, "knn_teacher_k3_percent": 50.0, "knn_teacher_k7_percent": 60.0}]
    page = Page(page_of(read_run(write_run(tmp_path / "r", rows)), NONE))
    assert "k = 3, step 5" in page.text and "k = 7" in page.text


class TestPictures:
    @pytest.fixture
    def sources(self, tmp_path):
        train, test = write_images(tmp_path / "train"), write_images(tmp_path / "test", seed=1)
        return open_source(train), open_source(test)

    @staticmethod
    def brightness():
        """A network that sees brightness alone; its features tell the two classes apart."""

        class Brightness(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = torch.nn.Parameter(torch.ones(()))

            def forward(self, images):
                mean = self.scale * images.mean((1, 2, 3))[:, None]
                return torch.cat([mean, torch.ones_like(mean)], 1)

        return Brightness()

    def test_neighbours_of_a_network_that_sees_the_class(self, sources):
        found = collect_pictures(self.brightness(), *sources, **NORMALISATION)
        sheet = found.neighbours
        assert sheet.queries.shape == (10, 3, 16, 16) and sheet.neighbours.shape == (10, 8, 3, 16, 16)
        assert sheet.query_classes[:2] == ["ant", "bee"] and sheet.gallery == "all 10 training images"
        # 5 training images per class: the first five neighbours are of the query's class, the rest cannot be.
        for name, names in zip(sheet.query_classes, sheet.neighbour_classes):
            assert names[:5] == [name] * 5 and name not in names[5:]
        means = sheet.neighbours[:2, 0].float().mean((1, 2, 3))
        assert means[0] < 60 and means[1] > 100
        assert found.attention is None and "does not end in a transformer block" in found.attention_note

    def test_attention_of_a_transformer(self, sources):
        network = timm.create_model("vit_tiny_patch16_224", **VIT).train()
        found = collect_pictures(network, *sources, **NORMALISATION)
        assert found.attention.shape == (6, 3, 2, 2) and found.images.shape == (6, 3, 16, 16) and network.training

    def test_few_and_unreadable_images(self, tmp_path):
        train, test = write_images(tmp_path / "train", per_class=1), write_images(tmp_path / "test", per_class=2)
        (test / "ant" / "0.png").write_bytes(b"no image")
        (train / "bee" / "0.png").write_bytes(b"no image")
        sheet = collect_pictures(self.brightness(), open_source(train), open_source(test), **NORMALISATION).neighbours
        assert sheet.queries.shape[0] == 3 and sheet.neighbour_classes == [["ant"]] * 3
        assert sheet.gallery == "1 of the 2 training images"

    def test_queries_take_turns_over_the_classes(self, sources):
        positions = one_of_each_class(sources[1], 7)
        assert [sources[1].label(int(i)) for i in positions] == [0, 1, 0, 1, 0, 1, 0] and len(set(positions)) == 7

    def test_a_report_from_the_folder_alone(self, tmp_path, sources, monkeypatch):
        config = Config()
        config.crops.global_size = 16
        config.evaluation.train, config.evaluation.test = sources[0].path, sources[1].path
        run = write_run(tmp_path / "r", [], config)
        checkpoint = CheckpointFolder(run / "checkpoints").save(5, {"weight": torch.ones(1)}, {})
        asked = []
        network = timm.create_model("vit_tiny_patch16_224", **VIT)
        monkeypatch.setattr(pictures, "load_backbone", lambda path, **which: asked.append((path, which)) or (network, {}))
        page = Page(write_report(run, device="cpu").read_text(encoding="utf-8"))
        assert asked == [(checkpoint, {"which": "teacher"})]
        assert len(page.images) == 6 * 5 + 10 * 9 and "head 3" in page.text
        assert not list(run.glob(".*partial"))

    def test_what_is_missing_is_told(self, tmp_path, sources):
        run = write_run(tmp_path / "r", [])
        assert "evaluation.train is empty. Name a folder" in write_report(run).read_text()
        config = Config()
        config.evaluation.train, config.evaluation.test = sources[0].path, sources[1].path
        write_run(run, config=config)
        assert "The run has no complete checkpoint" in write_report(run).read_text()
        config.evaluation.test = str(tmp_path / "gone")
        write_run(run, config=config)
        assert "There is no folder or file" in write_report(run).read_text()
