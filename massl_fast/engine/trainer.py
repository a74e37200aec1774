"""A run from configuration to report: builds the parts, says what was chosen and why, loops over steps, logs, evaluates, saves.

One clock: steps. The state after step s and the configuration decide everything that follows, so a resumed run repeats the one it
continues.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from massl_fast.config import Config, write_config
from massl_fast.data.loaders import build_loader, open_data, views_of
from massl_fast.data.sources import Source
from massl_fast.engine.advice import known_to_fail
from massl_fast.engine.build import build_objective, build_pair
from massl_fast.engine.checkpoint import CheckpointFolder, read_state
from massl_fast.engine.ended import Diverged, Drifted, Ended, Interrupted, RankLost
from massl_fast.engine.graphed_step import GraphedStep
from massl_fast.engine.heartbeat import Heartbeat, end_process
from massl_fast.engine.integrity import find_drift
from massl_fast.engine.optimizer import build_optimizer
from massl_fast.engine.parallel import World, choose_strategy, device_name, meet, rank_map, restarted, synchronise_batch_norms
from massl_fast.engine.precision import choose_precision
from massl_fast.engine.run_state import demand_equal, restore, tensors_of
from massl_fast.engine.saving import BackgroundSaver
from massl_fast.engine.schedules import Schedules
from massl_fast.engine.sharding import shard_
from massl_fast.engine.signals import StopRequest
from massl_fast.engine.step import NUM_TEACHER_VIEWS, TrainStep
from massl_fast.engine.stragglers import StragglerClock
from massl_fast.engine.telemetry import Telemetry, WindowClock, memory_peaks_gib, versions
from massl_fast.evaluation.knn import KnnEvaluator
from massl_fast.kernels import available_backends
from massl_fast.profiling.flops import peak_flops, step_flops
from massl_fast.report.page import write_report

KNN_HEADLINE_K = 20
SHARED_FOLDER_SECONDS = 10
STORE_SECONDS = 10


class Trainer:
    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self.folder = Path(config.run.folder)
        self.step = 0
        self.best_knn = -1.0
        self.knn: dict[str, float] = {}
        self.strategy, self.strategy_reason = choose_strategy(config.parallel.strategy, world.size)
        self.stop = StopRequest(world)
        self.heartbeat = None
        if world.size > 1:
            self.heartbeat = Heartbeat(world, config.parallel.timeout_seconds, meet(STORE_SECONDS), on_loss=self._end_without)

        checkpoint = config.checkpoint
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", checkpoint.keep_every_steps, checkpoint.keep_last)
        self.saver = BackgroundSaver(self.checkpoints, world)
        self.resume_from = self._prepare_folder()
        self.telemetry = Telemetry(
            self.folder,
            total_steps=0,
            tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb,
            config=config.model_dump(mode="json"),
            active=world.is_main,
        )
        self.precision = choose_precision(config.train.precision, world.device)
        self._build_data()
        self._build_model()
        self._build_evaluation()

    # Building

    def _prepare_folder(self) -> Path | None:
        """Make the run folder; returns the checkpoint to resume from, if any. Rank 0 decides, so that all ranks start from the same one."""
        mode = self.config.run.resume
        last = None
        if self.world.is_main:
            # Started again by torchrun or Slurm, the run goes on: only a person starts over.
            if mode == "never" and not restarted() and (self.folder / "config.yaml").is_file():
                number = 1
                while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
                    number += 1
                self.folder.rename(aside)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"run.folder {self.folder} cannot be made: {error.strerror}. Name a place that can be written.") from None
            last = self.checkpoints.last()
        last = self.world.from_main(last)
        self._demand_shared(last or self.folder)
        if mode == "must" and last is None:
            raise ValueError(f"run.resume is must, but {self.folder}/checkpoints holds no complete checkpoint. Choose auto to start anew.")
        return last

    def _demand_shared(self, path: Path) -> None:
        """What rank 0 has made must be there for all ranks; network file systems may show it a little later."""
        deadline = time.monotonic() + SHARED_FOLDER_SECONDS
        while not path.is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        absent = torch.tensor(0.0 if path.is_dir() else 1.0, device=self.world.device)
        if self.world.sum(absent).item():
            raise ValueError(
                f"{path}, which rank 0 has made, is not there for every rank. Put run.folder on a file system that all hosts share."
            )

    def _open(self, path: str, setting: str, role: str) -> Source:
        """The source that a setting names."""
        if self.world.is_main:
            source = open_data(path, setting, role)
        self.world.barrier()  # what is made on first use (generated images, tar indices) is made once
        return source if self.world.is_main else open_data(path, setting, role)

    def _build_data(self) -> None:
        config, world = self.config, self.world
        self.source = self._open(config.data.train, "data.train", "train")
        self.views = views_of(config.crops)
        if config.train.global_batch % world.size:
            raise ValueError(
                f"train.global_batch {config.train.global_batch} does not divide among {world.size} processes. "
                f"Choose a multiple of {world.size}."
            )
        per_rank = config.train.global_batch // world.size
        self.accumulation = -(-per_rank // (config.train.device_batch or per_rank))
        if per_rank % self.accumulation:
            raise ValueError(
                f"{per_rank} images a process (train.global_batch / processes) do not split into {self.accumulation} equal micro-batches "
                f"of at most train.device_batch {config.train.device_batch}. Choose a train.device_batch that divides {per_rank}."
            )
        self.device_batch = per_rank // self.accumulation
        self.loader = build_loader(
            config,
            self.source,
            self.views,
            device_batch=self.device_batch,
            accumulation=self.accumulation,
            world=world,
            bad_files_path=self.folder / "bad_files.txt",
        )
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = config.train.steps or max(1, round(config.train.epochs * self.steps_per_epoch))
        self.schedules = Schedules(config, self.total_steps, self.steps_per_epoch)

    def _build_model(self) -> None:
        config, world = self.config, self.world
        if config.model.residual == "bf16" and self.precision.name != "bf16":
            raise ValueError(
                f"model.residual is bf16, but the step's precision is {self.precision.name} ({self.precision.reason}). Choose "
                f"train.precision bf16, or model.residual fp32."
            )
        self.pair, self.build_notes = build_pair(config)
        self.flops_per_step = step_flops(
            self.pair.student,
            crop_sizes=[view.size for view in self.views],
            num_teacher_views=NUM_TEACHER_VIEWS,
            batch=config.train.global_batch,
            memory_size=config.objective.memory_size // config.objective.block_size * config.objective.block_size,
        )
        self.peak_flops = (
            peak_flops(torch.cuda.get_device_name(world.device), self.precision.dtype) if world.device.type == "cuda" else None
        )
        self.pair, note = synchronise_batch_norms(self.pair, world)
        self.build_notes += [note] if note else []
        self.pair.to(world.device, memory_format=torch.channels_last)
        if config.model.compile:
            self.pair.student.compile_blocks()
            self.pair.teacher.compile_blocks()
        if self.strategy == "fsdp2":
            if config.optimizer.name != "adamw":
                raise ValueError(
                    f"parallel.strategy is fsdp2, which PyTorch's fused AdamW steps on shards; {config.optimizer.name} it cannot. "
                    f"Choose optimizer.name adamw, or parallel.strategy ddp."
                )
            shard_(self.pair, world, self.precision)
        self.objective = build_objective(config, self.precision, world.rank).to(world.device)
        asked = config.objective.backend
        self.backend = asked if asked != "auto" else available_backends(world.device, self.objective.memory.dtype)[0]
        self.train_step = TrainStep(
            self.pair,
            self.objective,
            build_optimizer(self.pair.student, config.optimizer),
            world=world,
            precision=self.precision,
            clip=config.optimizer.clip,
            clip_mode=config.optimizer.clip_mode,
        )
        self.take_step = GraphedStep(self.train_step) if config.train.cuda_graph else self.train_step

    def _build_evaluation(self) -> None:
        config, evaluation = self.config, self.config.evaluation
        self.evaluator = None
        if not evaluation.train:
            return
        self.evaluation_sources = (
            self._open(evaluation.train, "evaluation.train", "train"),
            self._open(evaluation.test, "evaluation.test", "test"),
        )
        self.evaluator = KnnEvaluator(
            *self.evaluation_sources,
            image_size=evaluation.image_size or config.crops.global_size,
            device=self.world.device,
            mean=config.crops.mean,
            std=config.crops.std,
            ks=evaluation.ks,
            temperature=evaluation.temperature,
            num_workers=self.loader.num_workers,
            amp_dtype=None if self.precision.name == "fp32" else self.precision.dtype,
            max_train_images=evaluation.max_train_images,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.evaluate_every = round(evaluation.every_epochs * self.steps_per_epoch)

    # Telling

    def _announce(self) -> None:
        config, say = self.config, self.telemetry.say
        train, objective = config.train, config.objective
        say(
            f"Run       {self.folder}: {self.total_steps} steps, {self.total_steps / self.steps_per_epoch:.1f} epochs of "
            f"{self.steps_per_epoch} steps over {len(self.source)} images"
        )
        for line in rank_map(self.world):
            say(f"Device    {line}")
        say(
            f"Batch     {train.global_batch} images = {self.world.size} process{'es' if self.world.size > 1 else ''} × "
            f"{self.accumulation} micro-batch{'es' if self.accumulation > 1 else ''} × {self.device_batch}"
        )
        say(f"Strategy  {self.strategy} ({self.strategy_reason})")
        say(f"Precision {self.precision.name} ({self.precision.reason})")
        say(f"Loader    {self.loader.name} ({self.loader.reason})")
        say(f"Model     {config.model.architecture}, crops pass: {self.pair.student.pass_name} ({self.pair.student.pass_reason})")
        blocks = "compiled" if config.model.compile else "as PyTorch's own kernels"
        taken = "recorded once as a CUDA graph" if config.train.cuda_graph else "launched from Python"
        kept = "" if config.model.recompute == "nothing" else f"; the backward pass recomputes {config.model.recompute}"
        tokens = ", bf16 tokens between blocks" if config.model.residual == "bf16" else ""
        say(f"Step      blocks {blocks}, {taken}; optimizer {config.optimizer.name}{kept}{tokens}")
        scope = f", the same on all {self.world.size} ranks" if objective.partition_scope == "shared" else ", another on each rank"
        say(
            f"Loss      backend {self.backend}; memory {objective.memory_size} × {config.model.embedding_dim}, "
            f"blocks of {objective.block_size}, {objective.partition}{scope if self.world.size > 1 else ''}"
        )
        say(
            f"Rates     peak learning rate {self.schedules.peak_learning_rate:.3g}; "
            f"{self.flops_per_step / train.global_batch / 1e9:.3g} GFLOP an image"
        )
        notes = [*self.source.notes, *self.loader.notes, *self.build_notes]
        for sentence in notes + (self.evaluator.notes if self.evaluator else []):
            say(sentence)
        for sentence in known_to_fail(config, self.total_steps, len(self.source)) + self.checkpoints.passed_over():
            self.telemetry.warn(sentence)

    def _doing(self, what: str) -> None:
        if self.heartbeat:
            self.heartbeat.note(self.step, what)

    # State

    def _save(self, best: bool = False) -> None:
        """Begin to write a checkpoint. A disk that fails is told and training goes on; the last good checkpoint stays."""
        self._stop_if_diverged()
        self._stop_if_drifted()
        self._doing("saving")
        state = {
            "config": self.config.model_dump(mode="json"),
            "world_size": self.world.size,
            "strategy": self.strategy,
            "steps_per_epoch": self.steps_per_epoch,
            "num_images": len(self.source),
            "best_knn_percent": self.best_knn,
            "knn_percent": self.knn,
            "timm_args": self.pair.student.timm_args,
            "mean": self.config.crops.mean,
            "std": self.config.crops.std,
        }
        self._tell_unwritten(self.saver.save(self.step, tensors_of(self.train_step), state, best=best))

    def _tell_unwritten(self, problem: str | None) -> None:
        if problem:
            self.telemetry.warn(f"{problem}; training goes on. Last good checkpoint: {self.checkpoints.last()}.")

    def _restore(self, path: Path) -> None:
        state = read_state(path)
        ours = {"num_images": len(self.source), "train.global_batch": self.config.train.global_batch}
        theirs = {"num_images": state["num_images"], "train.global_batch": state["config"]["train"]["global_batch"]}
        for name, value in ours.items():
            if theirs[name] != value:
                raise ValueError(
                    f"The checkpoint {path} was made with {name} {theirs[name]}, this run has {value}: its place in the data would be "
                    f"lost. Use the same data and batch, or start a new run from its weights with run.init_from."
                )
        restore(self.train_step, path)
        self.step, self.best_knn, self.knn = state["step"], state["best_knn_percent"], state["knn_percent"]
        if state["world_size"] != self.world.size:
            per_rank = ["drop path masks"] * (self.config.model.drop_path > 0)
            per_rank += ["partitions"] * (self.config.objective.partition_scope == "rank")
            self.build_notes.append(
                f"The checkpoint is of {state['world_size']} processes, this run has {self.world.size}: images and their order go on as "
                f"they were" + (f", {' and '.join(per_rank)} are drawn per process and will differ." if per_rank else ".")
            )

    def _stop_if_diverged(self) -> None:
        sentence = self.train_step.failure()
        if sentence:
            self._settle()
            raise Diverged(
                f"{sentence} The run has ended; student, teacher and memory were left as they were before that step. Last good "
                f"checkpoint: {self.checkpoints.last()}. What helps most often: a lower optimizer.learning_rate, a longer "
                f"optimizer.warmup_epochs, optimizer.clip, or bf16 or fp32 in place of fp16."
            )

    def _stop_if_drifted(self) -> None:
        groups = {"memory": [self.objective.memory, self.objective.pointer]}
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

    # Running

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the summary that was written.

        Raises an ``Ended`` where it stops before.
        """
        # Signals are noted to the very end: torchrun sends SIGTERM to those who are still finding out who is gone.
        with self.stop.listening(), self.heartbeat or contextlib.nullcontext():
            try:
                return self._run()
            except RuntimeError as error:
                if isinstance(error, Ended) or self.heartbeat is None:
                    raise
                self._name_lost_rank(error)
                raise
            finally:
                self.saver.close()

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

    def _run(self) -> dict[str, Any]:
        config = self.config
        self.telemetry.total_steps = self.total_steps
        if self.resume_from:
            self._restore(self.resume_from)
            if self.step >= self.total_steps and (self.folder / "summary.json").is_file():
                self.telemetry.say(
                    f"The run in {self.folder} is complete ({self.step} steps); its report is {self.folder / 'report.html'}. "
                    f"To train again, name another --run.folder, or say --run.resume never to move this one aside."
                )
                return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        self._announce()
        if self.world.is_main:
            write_config(config, self.folder / "config.yaml")
        if self.resume_from:
            self.telemetry.say(f"Resumed   {self.resume_from}, step {self.step}")
        self.telemetry.start(self.step)
        try:
            if self.step == 0:
                self._check_checkpoint_round_trip()
                self._evaluate_untrained()
            self._loop()
            return self._finish()
        finally:
            self.telemetry.close()
            self.loader.close()

    def _check_checkpoint_round_trip(self) -> None:
        """A checkpoint that cannot be written or read back should be known now and not after hours."""
        self._save()
        problem = self._settle()
        if problem:
            raise ValueError(f"{problem}. Make room in {self.checkpoints.folder} or name another run.folder.")
        demand_equal(self.train_step, self.checkpoints.last())

    def _evaluate_untrained(self) -> None:
        if self.evaluator:
            self._doing("evaluating")
            percents = self.evaluator.evaluate(self.pair.teacher.features)
            self.knn = {f"knn_untrained_k{k}_percent": round(value, 3) for k, value in percents.items()}
            self.telemetry.log({"step": 0, "epoch": 0.0, "images_seen": 0, **self.knn})

    def _loop(self) -> None:
        config = self.config
        end = min(self.total_steps, config.train.stop_at_step or self.total_steps)
        batches = self.loader.batches(self.step)
        clock, stragglers = WindowClock(), StragglerClock(self.world)
        if self.world.size > 1:
            self.train_step.before_exchange = stragglers.reached
        # Collections in the midst of steps would let other ranks wait; those at logged lines skip all that was there before the loop, which
        # is nearly everything (a tenth of a second and more to look through).
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            while self.step < end:
                stragglers.start()
                self._doing("waiting for data")
                micro_batches = [clock.fetch(batches).crops for _ in range(self.accumulation)]
                self._doing("training")
                settings = self.schedules.at(self.step)
                # Drop path draws from here: the masks of a step depend on (seed, step, rank) alone.
                torch.manual_seed(zlib.crc32(f"{config.run.seed}/{self.step}/{self.world.rank}".encode()))
                result = self.take_step(micro_batches, settings, self.step, self.stop.vote())
                self.step += 1
                clock.steps += 1
                self.telemetry.advance()

                finished = self.step == end
                evaluating = bool(
                    self.evaluator and (self.step == self.total_steps or (self.evaluate_every and self.step % self.evaluate_every == 0))
                )
                if self.step % config.parallel.checksum_every_steps == 0:
                    self._stop_if_drifted()
                if evaluating or finished or self.step % config.logging.every_steps == 0:
                    self._log(result, settings, clock, stragglers, evaluating)
                    self._tell_unwritten(self.saver.problem())
                    gc.collect()
                    clock.restart()
                best = evaluating and self._is_best()
                stopping = self.stop.granted(self.train_step.stop_votes)
                if best or finished or stopping or self.step % config.checkpoint.every_steps == 0:
                    self._save(best)
                    clock.restart()
                if stopping:
                    self._interrupt()
        finally:
            gc.unfreeze()
            gc.enable()

    def _settle(self) -> str | None:
        """Until what is being written is on the disk, on every rank: a launcher that sees one rank leave may kill the one that writes."""
        return self.world.from_main(self.saver.wait())

    def _interrupt(self) -> None:
        problem = self._settle()
        saved = f"{problem}; the last good one is {self.checkpoints.last()}." if problem else "A checkpoint was written."
        raise Interrupted(f"Ended by {self.stop.name} after step {self.step}. {saved} The same command continues from it.")

    def _log(self, result, settings, clock: WindowClock, stragglers: StragglerClock, evaluating: bool) -> None:
        loss, student_entropy, teacher_entropy, kl, gradient_norm, embedding_spread = self.world.mean(torch.stack(list(result))).tolist()
        seconds, waited = clock.read()
        self._stop_if_diverged()
        batch = self.config.train.global_batch
        utilization = self.flops_per_step / (seconds * self.world.size * self.peak_flops) if self.peak_flops else None
        row = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "images_seen": self.step * batch,
            "loss": loss,
            "student_entropy_nats": student_entropy,
            "teacher_entropy_nats": teacher_entropy,
            "kl_nats": kl,
            "gradient_norm": gradient_norm,
            "embedding_spread": embedding_spread,
            "memory_spread": self.objective.spread().item(),
            "memory_age_steps": round(self.objective.oldest_entry_steps(self.step, batch), 2),
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "teacher_momentum": settings.teacher_momentum,
            "teacher_temperature": settings.teacher_temperature,
        }
        if self.train_step.scaler.enabled:
            row["loss_scale"] = self.train_step.scaler.scale.item()
        if evaluating:
            self.knn |= self._evaluate()
            row |= {key: value for key, value in self.knn.items() if "untrained" not in key}
        row |= {
            "images_per_second": round(batch / seconds, 2),
            "images_per_second_per_device": round(batch / seconds / self.world.size, 2),
            "step_seconds": round(seconds, 5),
            **(stragglers.spread(seconds) if self.world.size > 1 else {}),
            "data_wait_percent": round(100 * waited, 2),
            "model_flops_utilization_percent": round(100 * utilization, 2) if utilization else None,
            **memory_peaks_gib(self.world.device),
        }
        self.images_per_second = row["images_per_second"]
        self.loss = loss
        self.telemetry.log(row)

    def _evaluate(self) -> dict[str, float]:
        self._doing("evaluating")
        networks = {"teacher": self.pair.teacher.features, "student": self.pair.student.features}
        percents = self.evaluator.evaluate_all(networks)
        return {f"knn_{name}_k{k}_percent": round(value, 3) for name, of_k in percents.items() for k, value in of_k.items()}

    def _headline(self, network: str) -> float | None:
        """k-NN of a network at k = 20, or at the k that comes first where 20 was not asked for."""
        ks = self.config.evaluation.ks
        return self.knn.get(f"knn_{network}_k{KNN_HEADLINE_K if KNN_HEADLINE_K in ks else ks[0]}_percent")

    def _is_best(self) -> bool:
        value = self._headline("teacher")
        if value is None or value <= self.best_knn:
            return False
        self.best_knn = value
        return True

    def _finish(self) -> dict[str, Any]:
        self._tell_unwritten(self._settle())
        if self.step < self.total_steps:
            self.telemetry.say(
                f"Stopped at step {self.step} of {self.total_steps}, as train.stop_at_step asks; the same command without it continues."
            )
            return {}
        self._doing("writing the report")
        summary = {
            "loss": getattr(self, "loss", None),
            "knn_untrained_percent": self._headline("untrained"),
            "knn_percent": self._headline("teacher"),
            "images_per_second": getattr(self, "images_per_second", None),
            "steps": self.step,
            "bad_files": self.loader.num_bad,
            "device": device_name(self.world.device),
            "world_size": self.world.size,
            "strategy": self.strategy,
            "precision": self.precision.name,
            "backend": self.backend,
            "loader": self.loader.name,
            "crops_pass": self.pair.student.pass_name,
            "warnings": self.telemetry.warnings,
            "versions": versions(),
        }
        if self.world.is_main:
            temporary = self.folder / ".summary.json.partial"
            temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.folder / "summary.json")
            report = write_report(
                self.folder,
                # Of a sharded network rank 0 has a part only; the report then draws from the last checkpoint.
                backbone=None if self.strategy == "fsdp2" else self.pair.teacher.backbone,
                train_source=self.evaluation_sources[0] if self.evaluator else None,
                test_source=self.evaluation_sources[1] if self.evaluator else None,
            )
            knn = f", k-NN {summary['knn_untrained_percent']:.1f}% untrained → {summary['knn_percent']:.1f}%" if self.evaluator else ""
            self.telemetry.say(f"Done      loss {summary['loss']:.4f}{knn}; report: {report}")
        self.world.barrier()
        return summary
