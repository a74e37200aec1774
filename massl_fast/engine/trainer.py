"""A run from configuration to report: builds the parts, says what was chosen and why, loops over steps, logs, evaluates, saves.

One clock: steps. The state after step s and the configuration decide everything that follows, so a resumed run repeats the one it
continues.
"""

from __future__ import annotations

import contextlib
import gc
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from massl_fast.config import Config, write_config
from massl_fast.data.loaders import build_loader, open_together, views_of
from massl_fast.distributed.heartbeat import Heartbeat, end_process
from massl_fast.distributed.integrity import find_drift
from massl_fast.distributed.signals import StopRequest
from massl_fast.distributed.stragglers import StragglerClock
from massl_fast.distributed.world import World, choose_exchange, choose_strategy, device_name
from massl_fast.engine.banner import banner
from massl_fast.engine.build import build_objective, build_pair, build_step, demand_residual
from massl_fast.engine.flops import step_flops
from massl_fast.engine.graphed_step import GraphedStep
from massl_fast.engine.placement import place
from massl_fast.engine.schedules import Schedules, StepSettings
from massl_fast.engine.state import demand_equal, restore, tensors_of
from massl_fast.engine.step import StepResult
from massl_fast.hardware import peak_flops, versions
from massl_fast.length import Length, divided, length_of
from massl_fast.models.precision import choose_precision
from massl_fast.objectives.base import Metric
from massl_fast.run.checkpoint import CheckpointFolder, read_state
from massl_fast.run.evaluation import RunEvaluation
from massl_fast.run.exits import Diverged, Drifted, Ended, Interrupted, RankLost
from massl_fast.run.folder import prepare_folder
from massl_fast.run.outputs import Telemetry, WindowClock, memory_peaks_gib, rows_up_to
from massl_fast.run.rank_measures import RankMeasures
from massl_fast.run.rows import clock_row, learning_row, write_json
from massl_fast.run.same_run import demand_same_run
from massl_fast.run.saving import BackgroundSaver

STORE_SECONDS = 10


class Trainer:
    """A run. ``write_report(folder, backbone=…, train_source=…, test_source=…)`` draws its report at the end and returns where it lies."""

    def __init__(self, config: Config, world: World, write_report: Callable[..., Path] | None = None):
        self.config, self.world, self.write_report = config, world, write_report
        self.folder = Path(config.run.folder)
        self.step = 0
        self.last_row: dict[str, Any] = {}
        self.told_of_collapse = False
        self.strategy, self.strategy_reason = choose_strategy(config.parallel.strategy, world.size)
        self.stop = StopRequest(world)
        self.heartbeat = None
        if world.size > 1:
            self.heartbeat = Heartbeat(world, config.parallel.timeout_seconds, world.store(STORE_SECONDS), on_loss=self._end_without)

        checkpoint = config.checkpoint
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", checkpoint.keep_every_steps, checkpoint.keep_last)
        self.saver = BackgroundSaver(self.checkpoints, world)
        self.resume_from, self.lock = prepare_folder(self.folder, config.run.resume, self.checkpoints, world)
        self.precision = choose_precision(config.train.precision, world.device)
        self.objective = build_objective(config, self.precision, world.rank)
        self._build_data()
        self._build_model()
        self.evaluation = RunEvaluation(
            config,
            world,
            self.precision,
            self.length,
            num_workers=self.loader.num_workers,
            rank_measures=self.rank_measures,
        )
        self.telemetry = Telemetry(
            self.folder,
            total_steps=self.length.total_steps,
            metrics=(*self.objective.metrics(), *self.evaluation.metrics()),
            tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb,
            config=config.model_dump(mode="json"),
            active=world.is_main,
            headlines=self.evaluation.headlines(),
        )

    # Running

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the summary that was written.

        Raises an ``Ended`` where it stops before.
        """
        # Signals are noted to the very end: torchrun sends SIGTERM to those who are still finding out who is gone.
        with self.stop.listening(), self.lock or contextlib.nullcontext(), self.heartbeat or contextlib.nullcontext():
            try:
                return self._run()
            except RuntimeError as error:
                if isinstance(error, Ended) or self.heartbeat is None:
                    raise
                self._name_lost_rank(error)
                raise
            finally:
                self.saver.close()

    def _run(self) -> dict[str, Any]:
        if self.resume_from:
            self._restore(self.resume_from)
            if self.step >= self.length.total_steps and self.world.from_main(self._has_its_end()):
                self.telemetry.say(
                    f"The run in {self.folder} is complete ({self.step} steps); its report is {self.folder / 'report.html'}. "
                    f"To train again, name another --run.folder, or set --run.resume never to move this one aside."
                )
                return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        self._announce()
        if self.world.is_main:
            write_config(self.config, self.folder / "config.yaml")
        if self.resume_from:
            self.telemetry.say(f"Resumed   {self.resume_from}, step {self.step}")
        self.telemetry.start(self.step)
        try:
            if self.step == 0:
                self._check_checkpoint_round_trip()
            if self.stop.at_start(self.world):
                self._interrupt()
            if self.step == 0:
                self._evaluate_untrained()
            self._loop()
            return self._finish()
        finally:
            self.telemetry.close()
            self.loader.close()

    def _announce(self) -> None:
        """Say what was chosen, what is worth knowing and what is likely to go wrong. A collective call."""
        lines = banner(
            self.config,
            self.world,
            self.length,
            num_images=len(self.source),
            strategy=f"{self.strategy} ({self.strategy_reason}){self._exchange()}",
            precision=self.precision,
            loader=self.loader,
            student=self.pair.student,
            objective=self.objective.line(self.world.size),
            peak_learning_rate=self.schedules.peak_learning_rate,
            flops_per_image=self.flops_per_step / self.length.global_batch,
        )
        for sentence in [*lines, *self.source.notes, *self.loader.notes, *self.build_notes, *self.evaluation.notes]:
            self.telemetry.say(sentence)
        advice = [slow_teacher(self.config.teacher.momentum, self.length.total_steps)]
        advice += [endless_warmup(self.config.optimizer.warmup_epochs, self.length)]
        for sentence in filter(None, advice + self.objective.warnings(self.length, len(self.source))):
            self.telemetry.warn(sentence, advice=True)
        for sentence in self.checkpoints.passed_over():
            self.telemetry.warn(sentence)

    def _exchange(self) -> str:
        """How gradients are exchanged and why, for the line on the strategy."""
        config, sharded = self.config, self.strategy == "fsdp2"
        if self.world.size == 1 or sharded:
            return ""
        name, reason = choose_exchange(
            config.parallel.gradients, recorded=config.train.cuda_graph, sharded=sharded, world_size=self.world.size
        )
        return f"; gradients {name} ({reason})"

    def _loop(self) -> None:
        config = self.config
        total_steps = self.length.total_steps
        end = min(total_steps, config.train.stop_at_step or total_steps)
        batches = self.loader.batches(self.step)
        clock, stragglers = WindowClock(), self.stragglers
        # Collections in the midst of steps would let other ranks wait; those at logged lines skip all that was there before the loop, which
        # is nearly everything (a tenth of a second and more to look through).
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            while self.step < end:
                stragglers.start()
                self._doing("waiting for data")
                with clock.waiting():
                    micro_batches = [next(batches).crops for _ in range(self.length.accumulation)]
                self._doing("training")
                settings = self.schedules.at(self.step)
                # Drop path draws from here: the masks of a step depend on (seed, step, rank) alone.
                torch.manual_seed(zlib.crc32(f"{config.run.seed}/{self.step}/{self.world.rank}".encode()))
                result = self.take_step(micro_batches, settings, self.step, self.stop.vote())
                self.step += 1
                clock.step_done()
                self.telemetry.advance()

                finished = self.step == end
                evaluating = self.evaluation.due(self.step)
                if self.step % config.parallel.checksum_every_steps == 0:
                    self._stop_if_drifted()
                if evaluating or finished or self.step % config.logging.every_steps == 0:
                    self._log(result, settings, clock, evaluating)
                    self._tell_unwritten(self.saver.problem())
                    gc.collect()
                    clock.restart()
                best = evaluating and self.evaluation.is_best()
                stopping = self.stop.granted(self.train_step.stop_votes)
                if best or finished or stopping or self.step % config.checkpoint.every_steps == 0:
                    self._save(best)
                    clock.restart()
                if stopping:
                    self._interrupt()
        finally:
            gc.unfreeze()
            gc.enable()

    def _log(self, result: StepResult, settings: StepSettings, clock: WindowClock, evaluating: bool) -> None:
        self._confirm_lock()
        means = result.means(self.world)
        seconds, waited = clock.read()
        self._stop_if_diverged()
        used = {key: getattr(settings, key) for key in ("learning_rate", "weight_decay", "teacher_momentum")} | settings.own
        row = learning_row(self.step, self.length, means | self.objective.readings(self.step, self.length), used)
        if not self.told_of_collapse:
            sentence = collapse(row, self.objective.metrics(), self.step, self.length, self.objective.REMEDY)
            self.told_of_collapse = sentence is not None
            self._warn(sentence, advice=True)
        if self.train_step.scaler.enabled:
            row["loss_scale"] = self.train_step.scaler.scale.item()
        row |= self.evaluation.readings()
        if evaluating:
            self._doing("evaluating")
            row |= self.evaluation.of_both(self.pair)
            self._warn(self.evaluation.unreadable())
        row |= clock_row(
            seconds,
            waited,
            length=self.length,
            world_size=self.world.size,
            flops_per_step=self.flops_per_step,
            peak_flops=self.peak_flops,
        )
        row |= self.stragglers.spread(seconds) if self.world.size > 1 else {}
        self.last_row = row | memory_peaks_gib(self.world.device)
        self.telemetry.log(self.last_row)

    def _has_its_end(self) -> bool:
        """Whether the folder has what a run leaves at its end; one that was killed meanwhile writes it again."""
        return (self.folder / "summary.json").is_file() and (not self.write_report or (self.folder / "report.html").is_file())

    def _finish(self) -> dict[str, Any]:
        self._tell_unwritten(self._settle())
        if self.step < self.length.total_steps:
            self.telemetry.say(
                f"Stopped at step {self.step} of {self.length.total_steps}, as train.stop_at_step says; the same command without it "
                f"continues."
            )
            return {}
        self._doing("writing the report")
        summary = self._summary()
        if self.world.is_main:
            write_json(summary, self.folder / "summary.json")
            percents = summary["knn_untrained_percent"], summary["knn_percent"]
            done = [] if summary["loss"] is None else [f"loss {summary['loss']:.4f}"]
            done += [] if None in percents else [f"k-NN {percents[0]:.1f}% untrained → {percents[1]:.1f}%"]
            if self.write_report:
                train_source, test_source = self.evaluation.sources
                # Of a sharded network rank 0 has a part only; the report then draws from the last checkpoint.
                backbone = None if self.strategy == "fsdp2" else self.pair.teacher.backbone
                report = self.write_report(self.folder, backbone=backbone, train_source=train_source, test_source=test_source)
                done.append(f"report: {report}")
            self.telemetry.say(f"Done      {'; '.join(done)}")
        self.world.barrier()
        return summary

    def _summary(self) -> dict[str, Any]:
        """What a run that has come to its end was and used."""
        # A run that was killed between its last checkpoint and its summary has no row of its own.
        last = self.last_row or next(reversed(rows_up_to(self.folder / "metrics.jsonl", self.step)), {})
        return {
            "objective": self.config.objective.name,
            "loss": last.get("loss"),
            "knn_untrained_percent": self.evaluation.headline("untrained"),
            "knn_percent": self.evaluation.headline("teacher"),
            "images_per_second": last.get("images_per_second"),
            "steps": self.step,
            "bad_files": self.loader.num_bad,
            "device": device_name(self.world.device),
            "world_size": self.world.size,
            "strategy": self.strategy,
            "precision": self.precision.name,
            "backend": self.objective.backend,
            "loader": self.loader.name,
            "crops_pass": self.pair.student.pass_name,
            "warnings": self.telemetry.warnings,
            "advice": self.telemetry.advice,
            "versions": versions(),
        }

    def _doing(self, what: str) -> None:
        if self.heartbeat:
            self.heartbeat.note(self.step, what)

    # Building

    def _build_data(self) -> None:
        config, world = self.config, self.world
        self.source = open_together(world, config.data.train, "data.train", "train")
        accumulation, device_batch = divided(config.train.global_batch, config.train.micro_batch, world.size)
        self.loader = build_loader(
            config,
            self.source,
            device_batch=device_batch,
            accumulation=accumulation,
            world=world,
            bad_files_path=self.folder / "bad_files.txt",
        )
        self.length = length_of(config, self.loader.steps_per_epoch, world.size)
        self.schedules = Schedules(config, self.length, self.objective)

    def _build_model(self) -> None:
        config, world = self.config, self.world
        demand_residual(config, self.precision)
        pair, self.build_notes = build_pair(config, self.objective)
        sizes = [view.size for view in views_of(config.crops)]
        self.flops_per_step = step_flops(pair, self.objective, crop_sizes=sizes, batch=self.length.global_batch)
        self.peak_flops = (
            peak_flops(torch.cuda.get_device_name(world.device), self.precision.dtype) if world.device.type == "cuda" else None
        )
        self.pair, notes = place(pair, config, world, self.precision, self.strategy)
        self.build_notes += notes
        self.objective.to(world.device)
        self.stragglers = StragglerClock(world)
        self.train_step = build_step(config, self.pair, self.objective, world, self.precision, self.stragglers.reached)
        self.rank_measures = self._watched_ranks() if config.evaluation.rank_measures else None
        self.take_step = GraphedStep(self.train_step) if config.train.cuda_graph else self.train_step

    def _watched_ranks(self) -> RankMeasures:
        if self.config.train.cuda_graph:
            raise ValueError(
                "evaluation.rank_measures is set, but the features of a recorded step (train.cuda_graph) cannot be looked at. Choose one."
            )
        return RankMeasures(self.pair.student.head, len(views_of(self.config.crops)), self.objective.teacher_views)

    # State

    def _check_checkpoint_round_trip(self) -> None:
        """A checkpoint that cannot be written or read back should be known now and not after hours."""
        self._save()
        problem = self._settle()
        if problem:
            raise ValueError(f"{problem}. Make room in {self.checkpoints.folder} or name another run.folder.")
        demand_equal(self.train_step, self.checkpoints.last())

    def _evaluate_untrained(self) -> None:
        if self.evaluation.active:
            self._doing("evaluating")
            self.telemetry.log({"step": 0, "epoch": 0.0, "images_seen": 0, **self.evaluation.of_untrained(self.pair)})
            self._warn(self.evaluation.unreadable())

    def _save(self, best: bool = False) -> None:
        """Begin to write a checkpoint. Where the disk fails, training goes on with a warning; the last good checkpoint stays."""
        self._confirm_lock()
        self._stop_if_diverged()
        self._stop_if_drifted()
        self._doing("saving")
        state = {
            "config": self.config.model_dump(mode="json"),
            "world_size": self.world.size,
            "strategy": self.strategy,
            "steps_per_epoch": self.length.steps_per_epoch,
            "num_images": len(self.source),
            "images": self.loader.source.names_checksum(),
            **self.evaluation.state(),
            "timm_args": self.pair.student.timm_args,
            "mean": self.config.crops.mean,
            "std": self.config.crops.std,
        }
        self._tell_unwritten(self.saver.save(self.step, tensors_of(self.train_step), state, best=best))

    def _confirm_lock(self) -> None:
        if self.lock:
            self.lock.confirm()

    def _tell_unwritten(self, problem: str | None) -> None:
        self._warn(f"{problem}; training goes on. Last good checkpoint: {self.checkpoints.last()}." if problem else None)

    def _warn(self, sentence: str | None, *, advice: bool = False) -> None:
        if sentence:
            self.telemetry.warn(sentence, self.step, advice=advice)

    def _restore(self, path: Path) -> None:
        state = read_state(path)
        settings, images = self.config.model_dump(mode="json"), self.loader.source.names_checksum()
        self.build_notes += demand_same_run(path, state, settings, len(self.source), images)
        restore(self.train_step, path)
        self.step = state["step"]
        self.evaluation.restore(state)
        if state["world_size"] != self.world.size:
            per_rank = ["drop path masks"] * (self.config.model.drop_path > 0)
            per_rank += self.objective.drawn_per_rank()
            self.build_notes.append(
                f"The checkpoint is of {state['world_size']} processes, this run has {self.world.size}: images and their order go on as "
                f"they were" + (f", {' and '.join(per_rank)} are drawn per process and will differ." if per_rank else ".")
            )

    def _settle(self) -> str | None:
        """Until what is being written is on the disk, on every rank: a launcher that sees one rank leave may kill the one that writes."""
        return self.world.from_main(self.saver.wait())

    # Ending early

    def _interrupt(self) -> None:
        problem = self._settle()
        saved = f"{problem}; the last good one is {self.checkpoints.last()}." if problem else "A checkpoint was written."
        raise Interrupted(f"Ended by {self.stop.name} after step {self.step}. {saved} The same command continues from it.")

    def _stop_if_diverged(self) -> None:
        sentence = self.train_step.failure()
        if sentence:
            self._settle()
            held = ["student", "teacher", self.objective.REMEMBERS] if self.objective.REMEMBERS else ["student", "teacher"]
            raise Diverged(
                f"{sentence} The run has ended; {', '.join(held[:-1])} and {held[-1]} were left as they were before that step. Last good "
                f"checkpoint: {self.checkpoints.last()}. What helps most often: a lower optimizer.learning_rate, a longer "
                f"optimizer.warmup_epochs, optimizer.clip, or bf16 or fp32 in place of fp16."
            )

    def _stop_if_drifted(self) -> None:
        remembered = self.objective.remembered()
        groups = {self.objective.REMEMBERS: remembered} if remembered else {}
        if self.strategy == "ddp":  # shards differ from rank to rank
            groups["student weights"] = list(self.pair.student.parameters())
            groups["teacher weights"] = list(self.pair.teacher.parameters())
        sentence = find_drift(self.world, groups)
        if sentence:
            self._settle()
            raise Drifted(
                f"{sentence} Found after step {self.step}; the run has ended. Last good checkpoint: {self.checkpoints.last()}. A device or "
                f"link that computes wrongly is the likely cause: look at its error counters before continuing."
            )

    def _name_lost_rank(self, error: RuntimeError) -> None:
        """Raise RankLost where an exchange failed because somebody is gone or late."""
        sentence = self.heartbeat.diagnose()
        if sentence is None and any(word in str(error).lower() for word in ("timed out", "timeout")):
            sentence = (
                f"An exchange between ranks took longer than {self.config.parallel.timeout_seconds:g} s (parallel.timeout_seconds), though "
                f"every rank is alive ({self.heartbeat.whereabouts()})"
            )
        if sentence:
            self.saver.wait()
            raise RankLost(self._without(f"{sentence}.")) from error

    def _without(self, sentence: str) -> str:
        return (
            f"{sentence} The run has ended on rank {self.world.rank} in step {self.step}; the same command continues from "
            f"{self.checkpoints.last()}."
        )

    def _end_without(self, sentence: str) -> None:
        end_process(self._without(sentence))


def slow_teacher(momentum: float, total_steps: int) -> str | None:
    """A sentence where the teacher averages over so many steps that it will hardly move.

    It is the cause most often found for flat losses of this family on small data and batches (threads dino#61, dino#246, dinov2#298).
    """
    remembered = 1 / (1 - momentum) if momentum < 1 else float("inf")
    if remembered <= total_steps / 4:
        return None
    return (
        f"teacher.momentum {momentum} averages over about {remembered:.0f} steps, a large part of this run's {total_steps}: the teacher "
        f"will hardly move. Small batches and short runs need a lower momentum."
    )


def endless_warmup(warmup_epochs: float, length: Length) -> str | None:
    """A sentence where the learning rate rises for half of the run or longer."""
    steps = length.steps(warmup_epochs)
    if steps <= length.total_steps / 2:
        return None
    return (
        f"optimizer.warmup_epochs {warmup_epochs:g} are {steps} of this run's {length.total_steps} steps: the learning rate still rises "
        f"when half of the run is over. Choose a shorter warm-up or a longer run."
    )


def collapse(row: Mapping[str, float | None], metrics: Sequence[Metric], step: int, length: Length, remedy: str) -> str | None:
    """A sentence where a row of metrics.jsonl shows by the objective's own declarations that all images get nearly the same representation.

    Each metric counts from its ``collapsed_from`` on: of the recorded runs (docs/learning.md) only one looked so then, which was made to
    collapse.
    """
    signs = [metric for metric in metrics if metric.shows_collapse(row.get(metric.key), step / length.total_steps)]
    if not signs:
        return None
    said = " and ".join(f"{metric.key} is {row[metric.key]:.2g}" for metric in signs)
    return (
        f"All images look alike at step {step}: {said}, and from there the loss has next to nothing to teach. End it and start again "
        f"with {remedy}."
    )
