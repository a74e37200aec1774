"""What training teaches a network in equal processor minutes, on real images: runs, records, and the tables made of them.

    T=path/cifar10                                                                             40,000 training images in 4 tars, 10,000 test
    python bench/learning.py split --train "$T/train-{000..003}.tar" --out runs/split          hold 5,000 training images out
    python bench/learning.py run search --minutes 2.5 --train 'runs/split/fit-{000..003}.tar' --test 'runs/split/held_out-{000..003}.tar'
    python bench/learning.py run side_by_side --minutes 3 --seeds 0 1 --train "$T/train-{000..003}.tar" --test $T/test-000.tar
    python bench/learning.py run tables …                                                      the paper's tables 11, 12, 13 in trend
    python bench/learning.py keep runs/cifar10_cpu knn.json linear.json                        a run of massl-fast train, and its results
    python bench/learning.py page                                                              docs/learning.md from the records

``learning.yaml`` beside this file says what each suite runs. A run is as many steps as fit into its processor minutes: loading and step are
timed alone first, in processor time, which other work on the machine hardly changes. After it k-NN (k = 20) and a linear probe judge the
teacher. A case that has a record is skipped, so a suite that was cut off goes on where it was.

``lightly_dino`` is DINO of the library lightly (``pip install lightly``): its loss, head, moving average and documented order of calls, on
our crops, with the optimizer settings of our DINO, one pass per view.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from massl_fast import records
from massl_fast.config import Config, load_config
from massl_fast.data.loaders import loader_without_run, open_data
from massl_fast.data.sources import expand_braces
from massl_fast.distributed.world import World, join_world
from massl_fast.engine.build import build_objective, build_pair
from massl_fast.engine.schedules import Schedules
from massl_fast.engine.trainer import Trainer
from massl_fast.evaluation.base import checked_settings
from massl_fast.evaluation.registry import protocol_named
from massl_fast.evaluation.store import FeatureStore
from massl_fast.evaluation.subject import Subject
from massl_fast.length import Length, length_of
from massl_fast.models.backbone import Encoder
from massl_fast.models.precision import choose_precision
from massl_fast.objectives.massl import unit_row_spread
from massl_fast.profiling.synthetic import synthetic_run
from massl_fast.report.figures import Curve, Level, curve_figure

sys.path.insert(0, str(Path(__file__).parent))
from make_docs import alone, same, table, taken

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE, PLOTS = ROOT / "docs" / "learning.md", ROOT / "docs" / "learning"
RESULTS = HERE / "results" / "cpu" / "learning"
HELD_OUT = 5000
WARM_UP_SHARE = 0.05
"""Of a run's steps, in which the learning rate rises: runs of other lengths keep their shape."""
LOGGED_LINES = 30
TIMED_STEPS = 6
CURVES = ("step", "loss", "embedding_spread", "knn_untrained_k20_percent", "knn_teacher_k20_percent", "knn_student_k20_percent")
COLOURS = ("--blue", "--orange", "--green", "--violet", "--muted")
LINEAR = {"views": "0", "epochs": 20, "head_batch": 256, "rates": [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3]}
"""A probe on cached centre crops that takes seconds; the same for all."""


def main() -> int:
    args = parser().parse_args()
    try:
        return args.function(args) or 0
    except ValueError as error:
        print(f"learning.py: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = found.add_subparsers(required=True)
    one = commands.add_parser("split", help="hold training images out for choices")
    one.add_argument("--train", required=True, help="tars of labelled images")
    one.add_argument("--out", required=True, type=Path, help="folder for fit-NNN.tar and held_out-NNN.tar")
    one.add_argument("--held-out", type=int, default=HELD_OUT, help="images, drawn evenly from all tars (default: %(default)s)")
    one.set_defaults(function=lambda args: split(args.train, args.out, args.held_out))
    one = commands.add_parser("run", help="run a suite of learning.yaml")
    one.add_argument("suite")
    one.add_argument("--suites", type=Path, default=HERE / "learning.yaml", help="file of suites (default: %(default)s)")
    one.add_argument("--minutes", type=float, required=True, help="processor minutes of training per run")
    one.add_argument("--train", required=True, help="labelled images: trained on without labels, compared with in k-NN")
    one.add_argument("--test", required=True, help="labelled images that are classified")
    one.add_argument("--max-train-images", type=int, default=10_000, help="labelled images compared with; 0: all (default: %(default)s)")
    one.add_argument("--seeds", type=int, nargs="+", default=[0])
    one.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cases alone")
    one.add_argument("--runs", type=Path, default=Path("runs/learning"), help="where run folders go (default: %(default)s)")
    one.add_argument("--output", type=Path, help="file of records (default: bench/results/cpu/learning/SUITE.jsonl)")
    one.set_defaults(function=run_suite)
    one = commands.add_parser("keep", help="record a run of massl-fast train")
    one.add_argument("run_folder", type=Path, metavar="RUN")
    one.add_argument("results", type=Path, nargs="+", metavar="FILE", help="what massl-fast eval --json printed")
    one.add_argument("--name", default="", help="what the record is called (default: the folder's name)")
    one.add_argument("--minutes", type=float, required=True, help="processor minutes of the whole run, as the shell's time reports them")
    one.add_argument("--output", type=Path, default=RESULTS / "runs.jsonl", help="file of records (default: %(default)s)")
    one.set_defaults(function=keep)
    one = commands.add_parser("page", help="write tables and curves into docs/learning.md")
    one.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something differs")
    one.set_defaults(function=lambda args: page(args.check))
    return found


# Data


def split(train: str, out: Path, held_out: int) -> None:
    """Every tar of ``train`` as two: an even share of ``held_out`` samples of it in ``held_out-NNN.tar``, the others in ``fit-NNN.tar``.

    Which samples is decided by their place alone: of n samples in a tar the held-out ones are spread evenly.
    """
    tars = [Path(name) for name in expand_braces(train)]
    out.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(tars):
        if not path.is_file():
            raise ValueError(f"There is no tar {path}. Name tars of labelled images, for instance train-{{000..003}}.tar.")
        wanted = held_out // len(tars) + (number < held_out % len(tars))
        with tarfile.open(path) as whole:
            members = whole.getmembers()
            keys = list(dict.fromkeys(member.name.split(".")[0] for member in members))
            if wanted >= len(keys):
                raise ValueError(f"{path} holds {len(keys)} samples; {wanted} cannot be held out of it. Set a smaller --held-out.")
            chosen = {keys[place * len(keys) // wanted] for place in range(wanted)} if wanted else set()
            with tarfile.open(out / f"fit-{number:03}.tar", "w") as fit, tarfile.open(out / f"held_out-{number:03}.tar", "w") as held:
                for member in members:
                    (held if member.name.split(".")[0] in chosen else fit).addfile(member, whole.extractfile(member))
        classes = path.with_name("classes.txt")
        if classes.is_file():
            shutil.copy(classes, out)


# Suites


def run_suite(args: argparse.Namespace) -> None:
    """Every case of a suite with every seed, one after the other; each leaves a record as soon as it is done."""
    output = args.output or RESULTS / f"{args.suite}.jsonl"
    records.check_writable(output)
    cases = cases_of(args.suites, args.suite)
    for name in args.only:
        if name not in cases:
            raise ValueError(f"The suite {args.suite} has no case {name!r}. It has {', '.join(cases)}.")
    done = [row["case"] for row in records.read(output)] if output.is_file() and output.stat().st_size else []
    world = join_world("cpu")
    with tempfile.TemporaryDirectory(prefix="massl_fast_learning_") as features:
        judge = Judge(args.train, args.test, args.max_train_images, world, Path(features))
        for seed, (name, settings) in itertools.product(args.seeds, cases.items()):
            case = {"suite": args.suite, "name": name, "seed": seed, "minutes": args.minutes}
            if case in done or (args.only and name not in args.only):
                continue
            print(f"{name}, seed {seed}", flush=True)
            row = records.record("learning", case, *learned(name, settings, args, seed, world, judge))
            records.append(output, [row])
            print("  " + ", ".join(f"{key} {value['median']:g} {value['unit']}" for key, value in row["figures"].items()), flush=True)


def cases_of(path: Path, suite: str) -> dict[str, dict[str, Any]]:
    """{case: settings by dotted name} of a suite, with the suite's own base below each; ``recipe`` is among them."""
    suites = yaml.safe_load(path.read_text(encoding="utf-8"))
    if suite not in suites:
        raise ValueError(f"{path} has no suite {suite!r}. It has {', '.join(suites)}.")
    base = suites[suite]["base"]
    return {name: base | (settings or {}) for name, settings in suites[suite]["cases"].items()}


def config_of(settings: dict[str, Any], train: str, folder: Path, seed: int) -> Config:
    """The configuration of a case: no evaluation of its own, no worker process, so that all work is this process's."""
    fixed = {
        "run.folder": str(folder),
        "run.seed": seed,
        "run.resume": "never",
        "data.train": train,
        "data.num_workers": 0,
        "evaluation.train": "",
        "evaluation.test": "",
        "logging.tensorboard": "false",
        "train.device": "cpu",
    }
    given = {key: value for key, value in settings.items() if key not in ("recipe", "library")}
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in (given | fixed).items()]
    return load_config(settings["recipe"], words)


def learned(
    name: str, settings: dict[str, Any], args: argparse.Namespace, seed: int, world: World, judge: Judge
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures, details) of one run."""
    torch.manual_seed(seed)
    folder = args.runs / re.sub(r"[^a-zA-Z0-9.]+", "_", f"{args.suite} {name} {seed}")
    config = config_of(settings, args.train, folder, seed)
    by_lightly = settings.get("library") == "lightly"
    seconds = lightly_seconds_per_step(config, world) if by_lightly else seconds_per_step(config, world)
    config.train.steps = max(1, round(60 * args.minutes / seconds))
    length = length_of(config, len(judge.images) // config.train.global_batch, world.size)
    config.optimizer.warmup_epochs = WARM_UP_SHARE * length.epoch(length.total_steps)
    config.logging.every_steps = max(1, length.total_steps // LOGGED_LINES)
    config.checkpoint.every_steps = 10**9
    objective = build_objective(config, precision_of(config, world), 0)
    untrained = judge.figures(build_pair(config, objective)[0].teacher, config)
    started = time.process_time()
    if by_lightly:
        network, rows, warnings = train_with_lightly(config, world, length)
    else:
        trainer = Trainer(config, world)
        summary = trainer.run()
        network, warnings = trainer.pair.teacher, summary["warnings"]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    used = time.process_time() - started
    found = judge.figures(network, config)
    images = length.total_steps * length.global_batch
    figures = {key: records.figure(value, "%", "higher") for key, value in found.items()}
    figures |= {f"untrained {key}": records.figure(value, "%") for key, value in untrained.items()}
    figures |= {
        "embedding spread": records.figure(rows[-1]["embedding_spread"], "of 1"),
        "images per processor second": records.figure(images / used, "images/s", "higher"),
        "processor minutes": records.figure(used / 60, "min"),
        "epochs": records.figure(length.epoch(length.total_steps), "passes"),
    }
    keys = ("step", "loss", "gradient_norm", *(metric.key for metric in objective.metrics()))
    curve = {key: [round(row[key], 4) for row in rows if key in row and "loss" in row] for key in keys}
    return figures, {"settings": settings, "steps": length.total_steps, "curve": curve, "warnings": warnings}


class Judge:
    """k-NN and linear probe of networks on one pair of labelled sets."""

    def __init__(self, train: str, test: str, max_train_images: int, world: World, folder: Path) -> None:
        self.images = open_data(train, "--train", "train")
        self.world, self.folder, self.subjects = world, folder, {}
        given = {"train": train, "test": test, "max_train_images": max_train_images}
        self.protocols = [
            kind(checked_settings(given | more, kind.Settings, "{}".format))
            for kind, more in ((protocol_named("knn"), {}), (protocol_named("linear"), LINEAR))
        ]

    def figures(self, network: nn.Module, config: Config) -> dict[str, float]:
        """Percentages of the test images. Features are kept while the judge lives, so equal weights are asked once."""
        size = config.evaluation.image_size or config.crops.global_size
        subject = Subject(
            networks={"network": network},
            image_size=size,
            mean=config.crops.mean,
            std=config.crops.std,
            device=self.world.device,
            precision=precision_of(config, self.world).name,
            raw_pixels=False,
            store=FeatureStore(self.folder, quiet=True),
            opened=self.subjects.setdefault(size, {}),
        )
        found = {}
        for protocol in self.protocols:
            protocol.prepare(subject)
            results = protocol.run(subject).results["network"]
            found[protocol.name] = results[protocol.headline.key]
        return found


def precision_of(config: Config, world: World):
    return choose_precision(config.train.precision, world.device)


# Processor time


def seconds_per_step(config: Config, world: World) -> float:
    """Processor seconds of one step of ours, with its share of loading."""
    run = synthetic_run(config, world, precision_of(config, world), device_batch=config.train.global_batch)
    batches = crops_of(config, world)
    return least_seconds(run.step) + least_seconds(lambda: next(batches))


def lightly_seconds_per_step(config: Config, world: World) -> float:
    """The same of lightly's."""
    length = Length(10**6, 10**3, config.train.global_batch, 1, config.train.global_batch)
    side = Lightly(config, world, length)
    batches = crops_of(config, world)
    return least_seconds(lambda: side.step(next(batches), length.total_steps // 2))


def least_seconds(call) -> float:
    """Processor seconds of a call: the median of a few after two that are not counted."""
    times = []
    for _ in range(2 + TIMED_STEPS):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return sorted(times[2:])[TIMED_STEPS // 2]


def crops_of(config: Config, world: World) -> Iterator[list[torch.Tensor]]:
    """Batches of crops as the run has them, without end."""
    source = open_data(config.data.train, "data.train", "train")
    with loader_without_run(config, source, world, device_batch=config.train.global_batch, accumulation=1) as loader:
        for batch in loader.batches(0):
            yield batch.crops


# DINO of lightly


class Lightly:
    """DINO as lightly's documentation puts it together: its head, loss, moving average and freezing, in its order of calls."""

    def __init__(self, config: Config, world: World, length: Length) -> None:
        try:
            from lightly.loss import DINOLoss
            from lightly.models.modules import DINOProjectionHead
            from lightly.models.utils import deactivate_requires_grad, update_momentum
            from lightly.utils.scheduler import cosine_schedule
        except ImportError as error:
            raise ValueError(f"lightly does not import ({error}). Install it: pip install lightly.") from None
        self.update_momentum, self.cosine_schedule = update_momentum, cosine_schedule
        self.config, self.length = config, length
        self.precision, self.device = precision_of(config, world), world.device
        objective, model = config.objective, config.model
        dino = build_objective(config, self.precision, 0)
        self.schedules = Schedules(config, length, dino)
        self.student = build_pair(config, dino)[0].student.backbone.to(memory_format=torch.channels_last)
        self.teacher = copy.deepcopy(self.student)
        sizes = (self.student.feature_dim, model.head_hidden_dim, model.embedding_dim, objective.prototypes)
        self.student_head = DINOProjectionHead(*sizes, freeze_last_layer=1, norm_last_layer=objective.freeze_norm)
        self.teacher_head = DINOProjectionHead(*sizes, norm_last_layer=objective.freeze_norm)
        # The documented example leaves the teacher's head as it was drawn; a moving average wants the student's weights to start from.
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        for network in (self.teacher, self.teacher_head):
            deactivate_requires_grad(network)
        self.criterion = DINOLoss(
            output_dim=objective.prototypes,
            teacher_temp=objective.teacher_temperature,
            student_temp=objective.student_temperature,
            center_momentum=objective.center_momentum,
        )
        parameters = [p for network in (self.student, self.student_head) for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, betas=config.optimizer.betas)

    def step(self, crops: Sequence[torch.Tensor], step: int) -> tuple[float, torch.Tensor]:
        """(loss, the teacher's embeddings before the last layer of the second view, [N, D])."""
        at, objective = self.schedules.at(step), self.config.objective
        for group in self.optimizer.param_groups:
            group.update(lr=at.learning_rate, weight_decay=at.weight_decay)
        momentum = self.cosine_schedule(step, self.length.total_steps, self.config.teacher.momentum, self.config.teacher.momentum_end)
        self.update_momentum(self.student, self.teacher, m=momentum)
        self.update_momentum(self.student_head, self.teacher_head, m=momentum)
        with self.precision.autocast(self.device):
            with torch.no_grad():
                features = [self.teacher(view) for view in crops[:2]]
                teacher_out = [self.teacher_head(feature) for feature in features]
                embedded = self.teacher_head.layers(features[1])
            student_out = [self.student_head(self.student(view)) for view in crops]
        loss = self.criterion(
            [out.float() for out in teacher_out],
            [out.float() for out in student_out],
            teacher_temp=at.own["teacher_temperature"],
        )
        loss.backward()
        # It counts epochs; here the share of the run that our DINO freezes.
        self.student_head.cancel_last_layer_gradients(int(self.length.epoch(step) >= objective.freeze_last_layer_epochs))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), nn.functional.normalize(embedded.float(), dim=1)


def train_with_lightly(config: Config, world: World, length: Length) -> tuple[nn.Module, list[dict[str, float]], list[str]]:
    """(teacher, logged lines, sentences about it)."""
    side, rows, batches = Lightly(config, world, length), [], crops_of(config, world)
    for step in range(length.total_steps):
        loss, embedded = side.step(next(batches), step)
        if (step + 1) % config.logging.every_steps == 0 or step + 1 == length.total_steps:
            rows.append({"step": step + 1, "loss": loss, "embedding_spread": unit_row_spread(embedded).item()})
    return Encoder(side.teacher, nn.Identity()), rows, []


# Records and page


def keep(args: argparse.Namespace) -> None:
    """A record of a run folder and of evaluations of its end."""
    rows = [json.loads(line) for line in (args.run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    config = yaml.safe_load((args.run_folder / "config.yaml").read_text(encoding="utf-8"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    figures = {
        f"{result['protocol']} {network} {figure['key']}": records.figure(found[figure["key"]], figure["unit"], "higher")
        for result in results
        for network, found in result["results"].items()
        for figure in result["figures"]
        if found.get(figure["key"]) is not None
    }
    figures["processor minutes"] = records.figure(args.minutes, "min")
    curve = {key: [row.get(key) for row in rows] for key in CURVES}
    case = {"suite": "runs", "name": args.name or args.run_folder.resolve().name, "seed": config["run"]["seed"]}
    details = {"curve": curve, "steps": rows[-1]["step"], "epochs": rows[-1]["epoch"], "departures": [r["departures"] for r in results]}
    records.append(args.output, [records.record("learning", case, figures, details)])


def page(check: bool) -> int:
    """docs/learning.md with its tables and curves made anew; with ``check`` 1 where that changes something, and nothing is written."""
    found = dict(files_of_page())
    stale = [path for path, text in found.items() if not path.is_file() or not same(path, text)]
    for path in stale:
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found[path], encoding="utf-8")
    return int(check and bool(stale))


def files_of_page() -> Iterator[tuple[Path, str]]:
    """(path, text) of the page and of its drawings, from the records."""
    text = PAGE.read_text(encoding="utf-8")
    for suite in ("search", "search_vit", "tuning", "side_by_side", "tables", "failures", "runs"):
        path = RESULTS / f"{suite}.jsonl"
        rows = records.latest(records.read(path)) if path.is_file() else []
        parts = [taken(rows), table(*of_suite(rows, suite))] if rows else ["Not run."]
        for name, svg in drawings(rows, suite):
            yield PLOTS / f"{name}.svg", alone(svg)
            parts.append(f"![{name}](learning/{name}.svg)")
        text = with_block(text, suite, "\n\n".join(parts))
    yield PAGE, text


def of_suite(rows: list[dict[str, Any]], suite: str) -> tuple[list[str], list[list[str]]]:
    """(head, lines) of a suite's table: a line per case, means over seeds and, of several seeds, ± half the distance of the extremes."""
    if suite == "runs":
        return by_network(rows)
    cases: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["case"]["name"], row["case"]["minutes"]), []).append(row)
    names = ["knn", "untrained knn", "linear", "untrained linear"]
    names += ["embedding spread", "images per processor second", "epochs", "processor minutes"]
    head = ["case", "seeds", *(f"{name}, %" if "knn" in name or "linear" in name else name for name in names)]
    lines = []
    for (name, _), group in cases.items():
        figures = [[row["figures"][key]["median"] for row in group] for key in names]
        lines.append([name, str(len(group)), *(mean_of(values) for values in figures)])
    return head, lines


def by_network(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(head, lines) of kept runs: a line per network, a column per figure that was found for any; over seeds as in the other tables."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        for key, figure in row["figures"].items():
            protocol, *network, name = key.split()
            if network:
                title = f"{protocol} {name.removesuffix('_percent').replace('_', ' ')}, %"
                found.setdefault((row["case"]["name"], " ".join(network)), {}).setdefault(title, []).append(figure["median"])
    titles = list(dict.fromkeys(title for line in found.values() for title in line))
    lines = [
        [*names, str(max(map(len, line.values()))), *(mean_of(line[title]) if title in line else "–" for title in titles)]
        for names, line in found.items()
    ]
    return ["run", "features of", "seeds", *titles], lines


def mean_of(values: list[float]) -> str:
    """A mean to three digits, and half the distance of the extremes where there are several."""
    half = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3g}{half}"


def drawings(rows: list[dict[str, Any]], suite: str) -> Iterator[tuple[str, str]]:
    """(name, SVG): k-NN over a kept run; spread of the embeddings over the runs of a suite, of the first seed."""
    if suite == "runs":
        names = [row["case"]["name"] for row in rows]
        for row in (row for place, row in enumerate(rows) if names.index(names[place]) == place and " on " not in names[place]):
            # The first seed of each run; "RUN on IMAGES" is the same run on other images.
            curve = row["details"]["curve"]
            curves = [
                Curve(network, curve["step"], [number(value) for value in curve[f"knn_{network}_k20_percent"]], colour, markers=True)
                for network, colour in (("teacher", "--blue"), ("student", "--orange"))
            ]
            start = [value for value in curve["knn_untrained_k20_percent"] if value is not None]
            yield f"{row['case']['name']}-knn", curve_figure(curves, unit="%", levels=[Level("untrained", value) for value in start])
    elif suite == "side_by_side":
        first = [row for row in rows if row["case"]["seed"] == rows[0]["case"]["seed"]]
        on_vit = [row["case"]["name"].startswith("vit_") for row in first]
        for name, wanted in (("spread-network", False), ("spread-vit", True)):
            members = [row for row, vit in zip(first, on_vit) if vit is wanted]
            if members:
                yield name, curve_figure([spread_of(row, colour) for row, colour in zip(members, COLOURS)], unit="spread", from_zero=True)


def spread_of(row: dict[str, Any], colour: str) -> Curve:
    """The spread of the embeddings; in the same minutes runs have different numbers of steps."""
    curve = row["details"]["curve"]
    return Curve(row["case"]["name"], curve["step"], curve["embedding_spread"], colour)


def number(value: float | None) -> float:
    return math.nan if value is None else value


def with_block(text: str, name: str, block: str) -> str:
    """``text`` with what stands between the marks of that name replaced."""
    begin, end = f"<!-- {name}: made by bench/learning.py page -->", f"<!-- /{name} -->"
    text, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n\n{block}\n\n{end}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{PAGE.name} holds the marks {begin} … {end} {count} times; they show, once, where the records go.")
    return text


if __name__ == "__main__":
    sys.exit(main())
