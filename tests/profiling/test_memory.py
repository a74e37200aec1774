"""The estimate against what PyTorch itself counts, and leaks that were planted."""

from pathlib import Path

import pytest
import torch

from massl_fast.cli import main
from massl_fast.config import Config, load_config
from massl_fast.models.precision import choose_precision
from massl_fast.profiling import ledger, memory, memory_report
from massl_fast.profiling.estimate import WayOut, estimate_step, largest_batch, ways_out
from massl_fast.profiling.ledger import Change, Piece, find_peak, highest_by_section, part_of, timeline
from massl_fast.profiling.synthetic import SyntheticRun, micro_batches_of, synthetic_run
from small_encoders import ONE_CPU

VIT = ["--model.architecture", "vit_tiny_patch16_224", "--model.model_args", "{patch_size: 8, depth: 2, embed_dim: 48}"]
SMALL = ["--objective.memory_size", "512", "--objective.block_size", "128", "--train.global_batch", "8", "--model.head_hidden_dim", "64"]


pytestmark = pytest.mark.usefixtures("one_thread")


def settings(*more: str) -> Config:
    return load_config("demo", [*VIT, *SMALL, *more])


def real_run(config: Config) -> SyntheticRun:
    accumulation, batch = micro_batches_of(config)
    precision = choose_precision(config.train.precision, ONE_CPU.device)
    return synthetic_run(config, ONE_CPU, precision, device_batch=batch, accumulation=accumulation, crop_sets=1)


@pytest.mark.parametrize(
    "changes",
    [
        ["--train.global_batch", "24"],
        ["--train.precision", "bf16", "--train.micro_batch", "4"],
        ["--model.architecture", "test_resnet", "--model.model_args", "{}", "--optimizer.name", "lars"],
    ],
    ids=["more images", "bf16 in micro-batches", "convolutions"],
)
def test_the_estimate_is_the_measured_peak(changes):
    config = settings(*changes)
    accumulation, batch = micro_batches_of(config)
    estimate = estimate_step(config, device_type="cpu", device_batch=batch, accumulation=accumulation)
    measured = memory.measure_run(real_run(config))
    assert estimate.bytes == pytest.approx(measured.peak_bytes, rel=0.08)
    # What shapes tell, the measurement repeats to the byte; workspace and loss also hold what operators keep inside.
    for category, size in measured.peak.by_category.items():
        if category not in (ledger.WORKSPACE, ledger.LOSS, ledger.GRADIENTS, ledger.ACTIVATIONS):
            assert estimate.peak.by_category[category] == size, category
    assert measured.growth == [0] * memory.LEAK_STEPS
    assert not measured.leaks


def test_activations_are_what_autograd_saves():
    config = settings()
    estimate = estimate_step(config, device_type="cpu", device_batch=8)
    run = real_run(config)
    run.step()
    weights = {p.untyped_storage()._cdata for p in run.train_step.pair.parameters()}
    memory_ring = {b.untyped_storage()._cdata for b in run.train_step.objective.buffers()}
    crops = {c.untyped_storage()._cdata for crops in run.crop_sets for micro_batch in crops for c in micro_batch}
    saved: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    student = run.train_step.pair.student
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kept = student(run.crop_sets[0][0])
    truth = sum(size for key, size in saved.items() if key not in weights | memory_ring | crops)
    held = {}
    for change in estimate.changes:
        if change.piece.category == ledger.ACTIVATIONS and change.sign > 0:
            held[id(change.piece)] = change.piece.bytes
    # Drop path, off here, and nothing else would make the two differ; saved by the loss are the normalised embeddings at most.
    assert sum(held.values()) == pytest.approx(truth, rel=0.02)
    del kept


def test_micro_batches_beyond_the_second_add_crops_alone():
    config = settings()
    two, five = (estimate_step(config, device_type="cpu", device_batch=4, accumulation=n) for n in (2, 5))
    crops = two.peak.by_category[ledger.CROPS] // 2
    assert five.bytes - two.bytes == 3 * crops


def test_a_gpu_that_is_not_here_is_estimated():
    config = settings("--train.device", "cuda")
    on_gpu = estimate_step(config, device_type="cuda", device_batch=8)
    on_cpu = estimate_step(config, device_type="cpu", device_batch=8)
    assert on_gpu.peak.by_category[ledger.MEMORY] < on_cpu.peak.by_category[ledger.MEMORY]  # bf16
    assert on_gpu.extras["cuBLAS workspace"] > 0
    assert set(on_gpu.beside) and all(size > 0 for size in on_gpu.beside.values()) and not on_cpu.beside
    # A GPU's attention keeps no probabilities, whatever the format; a ONE_CPU's in 16 bits does.
    config.train.precision = "bf16"
    for device_type, kept in (("cuda", False), ("cpu", True)):
        shapes = {change.piece.shape for change in estimate_step(config, device_type=device_type, device_batch=8).changes}
        assert any(len(shape) == 4 and shape[-1] == shape[-2] == 17 for shape in shapes) == kept  # 4 × 4 patches and the class token


def test_recomputed_blocks_are_told_from_activations():
    config = settings()
    whole = estimate_step(config, device_type="cpu", device_batch=8)
    config.model.recompute = "blocks"
    less = estimate_step(config, device_type="cpu", device_batch=8)
    assert less.peak.by_category[ledger.ACTIVATIONS] < 0.6 * whole.peak.by_category[ledger.ACTIVATIONS]
    measured = memory.measure_run(real_run(config))
    assert less.bytes == pytest.approx(measured.peak_bytes, rel=0.08)


class Leaky(torch.nn.Module):
    """An objective that keeps something of every step."""

    def __init__(self, inner, keep):
        super().__init__()
        self.inner, self.keep, self.kept = inner, keep, []

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("inner", "keep", "kept") else getattr(super().__getattr__("inner"), name)

    def forward(self, student, teacher, at):
        outcome = self.inner(student, teacher, at)
        self.kept.append(self.keep(student, outcome))
        return outcome


def test_a_planted_leak_is_found():
    run = real_run(settings("--crops.num_local", "4"))
    run.train_step.objective = Leaky(run.train_step.objective, lambda student, outcome: student * 2)
    measured = memory.measure_run(run)
    assert min(measured.growth) >= 6 * 8 * 64 * 4
    sentences = memory_report.leak_sentences(measured)
    assert sentences[0].startswith("Leak: each step ends with about")
    (place,) = [sentence for sentence in sentences[1:] if "aten.mul" in sentence and "in 'loss', outlive their step" in sentence]
    file, _, line = place.partition(" at ")[2].partition(",")[0].rpartition(":")
    assert Path(__file__).name == Path(file).name
    assert "lambda student, outcome: student * 2" in Path(__file__).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert sentences[sentences.index(place) + 1].strip() == "Kept by a list of 6 in kept of a Leaky."


def test_a_list_that_keeps_activations_is_found():
    run = real_run(settings())
    block = run.train_step.pair.student.backbone.blocks[0]
    block.album = []
    block.mlp.register_forward_hook(lambda module, arguments, output: block.album.append(output))
    measured = memory.measure_run(run)
    text = "\n".join(memory_report.leak_sentences(measured))
    assert "aten.addmm at timm/layers/mlp.py" in text and "in 'student forward'" in text
    assert "Kept by a list of 6 in album of a Block." in text


def test_the_largest_batch_fits_and_the_next_does_not():
    config = settings()
    budget = estimate_step(config, device_type="cpu", device_batch=40).bytes + 1000
    batch, estimate = largest_batch(config, device_type="cpu", budget=budget)
    assert estimate.bytes <= budget
    assert batch in range(38, 41)  # a line between two estimates may miss the last image
    assert largest_batch(config, device_type="cpu", budget=1000) == (0, None)
    assert largest_batch(config, device_type="cpu", budget=2**50)[0] == config.objective.memory_size


def test_ways_out_lower_the_estimate_and_fit():
    config = settings("--train.global_batch", "64", "--objective.backend", "reference")
    now = estimate_step(config, device_type="cpu", device_batch=64)
    budget = int(0.6 * now.bytes)
    ways = ways_out(config, device_type="cpu", world_size=1, budget=budget)
    assert len(ways) == 3
    assert all(isinstance(way, WayOut) and way.bytes < now.bytes for way in ways)
    assert [way.settings.split()[0] for way in ways] == ["--objective.backend", "--train.micro_batch", "--model.recompute"]
    assert all(way.saved == now.bytes - way.bytes and way.time for way in ways)
    sharded = ways_out(settings("--optimizer.name", "adamw"), device_type="cpu", world_size=4, budget=budget, most=6)
    assert any("fsdp2" in way.settings for way in sharded)


def test_peak_and_timeline_of_a_book():
    a, b, c = (Piece(size, "loss", "", "op", "", (size,)) for size in (10, 20, 5))
    b.saved, b.section, b.part = True, "student forward", "block 3"
    book = [Change(0.0, "loss", a, 1), Change(1.0, "loss", b, 1), Change(2.0, "loss", a, -1), Change(3.0, "rest", c, 1)]
    peak = find_peak(book)
    assert (peak.bytes, peak.seconds) == (30, 1.0)
    assert peak.by_owner == {"loss": 10, "activations: block 3": 20}
    line = timeline(book)
    assert line["bytes"][ledger.ACTIVATIONS] == [0, 20, 20, 20]
    assert [sum(column) for column in zip(*line["bytes"].values())] == [10, 30, 20, 25]
    assert find_peak([]).bytes == 0
    assert peak.last is b
    assert list(highest_by_section(book).items()) == [("loss", 30), ("rest", 25)]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("backbone.blocks.11.attn.qkv", "block 11"),
        ("backbone.layer2.1.conv1", "layer2.1"),
        ("backbone.patch_embed.proj", "embedding"),
        ("backbone.norm", "pooling"),
        ("head.mlp.0", "head"),
        ("backbone", ""),
        ("", ""),
    ],
)
def test_part_of_a_network(name, part):
    assert part_of(name) == part


def test_the_command_tells_and_records(tmp_path, capsys):
    output = tmp_path / "memory.jsonl"
    # The rest of the process counts as taken, so the device is larger than what pytest holds after other tests.
    assert main(["profile", "memory", "--output", str(output), "--device-gib", "64", *VIT, *SMALL]) == 0
    told = capsys.readouterr().out
    for part in ("At the peak, MiB", "block 1", "off the measured peak", "No leak", "Largest micro-batch predicted"):
        assert part in told
    from massl_fast import records

    assert "Highest in each part of a step" in told and max(len(line) for line in told.splitlines() if str(tmp_path) not in line) <= 120
    (row,) = records.read(output)
    assert row["kind"] == "memory"
    assert abs(row["figures"]["estimate_error"]["median"]) < 8
    assert sum(row["details"]["estimated"].values()) / 2**20 == pytest.approx(row["figures"]["estimated_peak"]["median"], rel=1e-4)


def test_no_gpu_gets_a_sentence(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["profile", "memory", "--train.device", "cuda"]) == 2
    assert "Add --estimate" in capsys.readouterr().err
    assert main(["profile", "memory", "--train.device", "cuda", "--estimate", "--device-gib", "1", *VIT, *SMALL]) == 0
    assert "cuBLAS workspace" in capsys.readouterr().out
