"""A run from configuration to report: builds the parts, says what was chosen and why, loops over steps, logs, evaluates, saves.

One clock: steps. The state after step s and the configuration decide everything that follows, so a resumed run repeats the one it
continues.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from massl_fast.config import Config, write_config
from massl_fast.data.loaders import build_loader, open_data, views_of
from massl_fast.data.sources import Source
from massl_fast.engine.advice import known_to_fail
from massl_fast.engine.checkpoint import (
    CheckpointFolder,
    load_strictly,
    read_checkpoint,
    with_prefix,
    without_prefix,
)
from massl_fast.engine.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from massl_fast.engine.parallel import World, device_name, rank_map
from massl_fast.engine.precision import DTYPES, choose_precision
from massl_fast.engine.schedules import Schedules
from massl_fast.engine.step import NUM_TEACHER_VIEWS, TrainStep
from massl_fast.engine.telemetry import Telemetry, WindowClock, memory_peaks_gib, versions
from massl_fast.evaluation.knn import KnnEvaluator
from massl_fast.kernels import available_backends
from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.published import start_from
from massl_fast.objectives.massl import MasslObjective
from massl_fast.profiling.flops import peak_flops, step_flops
from massl_fast.report.page import write_report

KNN_HEADLINE_K = 20


class Diverged(RuntimeError):
    """The run met a value that is not finite; the message says where, and which checkpoint is good."""


class Interrupted(RuntimeError):
    """A signal ended the run after a finished step and a checkpoint."""


class Trainer:
    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self.folder = Path(config.run.folder)
        self.step = 0
        self.best_knn = -1.0
        self.knn: dict[str, float] = {}
        self.stop_signal: signal.Signals | None = None

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
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", config.checkpoint.keep_every_steps)

    # Building

    def _prepare_folder(self) -> Path | None:
        """Make the run folder; returns the checkpoint to resume from, if any."""
        mode = self.config.run.resume
        if mode == "never" and self.world.is_main and (self.folder / "config.yaml").is_file():
            number = 1
            while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
                number += 1
            self.folder.rename(aside)
        self.world.barrier()
        self.folder.mkdir(parents=True, exist_ok=True)
        last = CheckpointFolder(self.folder / "checkpoints").last()
        if mode == "must" and last is None:
            raise ValueError(f"run.resume is must, but {self.folder}/checkpoints holds no complete checkpoint. Choose auto to start anew.")
        return last

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
        model, crops = config.model, config.crops
        # Weights come from the CPU's generator, so that they are the same on every device.
        torch.manual_seed(config.run.seed)

        def encoder(drop_path: float) -> Encoder:
            backbone = build_backbone(
                model.architecture,
                image_size=crops.global_size,
                other_sizes=[crops.local_size] if crops.num_local else [],
                drop_path=drop_path,
                model_args=model.model_args,
            )
            head = ProjectionHead(
                backbone.feature_dim, hidden_dim=model.head_hidden_dim, out_dim=model.embedding_dim, num_layers=model.head_layers
            )
            return Encoder(backbone, head, crops_pass=model.crops_pass)

        student = encoder(model.drop_path)
        self.init_notes = start_from(student.backbone, Path(config.run.init_from)) if config.run.init_from else []
        self.pair = StudentTeacher(student, encoder(0.0)).to(world.device, memory_format=torch.channels_last)
        if model.compile:
            student.compile_blocks()
            self.pair.teacher.compile_blocks()
        memory_dtype = self.precision.dtype if config.objective.memory_dtype == "auto" else DTYPES[config.objective.memory_dtype]
        objective = config.objective
        self.objective = MasslObjective(
            objective.memory_size,
            model.embedding_dim,
            block_size=objective.block_size,
            student_temperature=objective.student_temperature,
            block_reduction=objective.block_reduction,
            enqueue_view=objective.enqueue_view,
            partition=objective.partition,
            seed=config.run.seed,
            memory_dtype=memory_dtype,
            backend=objective.backend,
        ).to(world.device)
        self.backend = objective.backend if objective.backend != "auto" else available_backends(world.device, memory_dtype)[0]
        self.optimizer = build_optimizer(self.pair.student, config.optimizer)
        self.train_step = TrainStep(
            self.pair,
            self.objective,
            self.optimizer,
            world=world,
            precision=self.precision,
            clip=config.optimizer.clip,
            clip_mode=config.optimizer.clip_mode,
        )
        self.flops_per_step = step_flops(
            self.pair.student,
            crop_sizes=[view.size for view in self.views],
            num_teacher_views=NUM_TEACHER_VIEWS,
            batch=config.train.global_batch,
            memory_size=objective.memory_size // objective.block_size * objective.block_size,
        )
        self.peak_flops = (
            peak_flops(torch.cuda.get_device_name(world.device), self.precision.dtype) if world.device.type == "cuda" else None
        )

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
        say(f"Precision {self.precision.name} ({self.precision.reason})")
        say(f"Loader    {self.loader.name} ({self.loader.reason})")
        say(f"Model     {config.model.architecture}, crops pass: {self.pair.student.pass_name} ({self.pair.student.pass_reason})")
        say(
            f"Loss      backend {self.backend}; memory {objective.memory_size} × {config.model.embedding_dim}, "
            f"blocks of {objective.block_size}, {objective.partition}"
        )
        say(
            f"Rates     peak learning rate {self.schedules.peak_learning_rate:.3g}; "
            f"{self.flops_per_step / train.global_batch / 1e9:.3g} GFLOP an image"
        )
        for sentence in self.init_notes + (self.evaluator.notes if self.evaluator else []):
            say(sentence)
        for sentence in known_to_fail(config, self.total_steps, len(self.source)):
            self.telemetry.warn(sentence)

    # State

    def _tensors(self) -> dict[str, Tensor]:
        return {
            **with_prefix("student", self.pair.student.state_dict()),
            **with_prefix("teacher", self.pair.teacher.state_dict()),
            **with_prefix("objective", self.objective.state_dict()),
            **optimizer_tensors(self.optimizer, self.pair.student),
            **self.train_step.scaler.tensors(),
        }

    def _save(self, best: bool = False) -> Path | None:
        """Write a checkpoint from the main rank. A disk that fails is told and training goes on; the last good checkpoint stays."""
        self._stop_if_diverged()
        path = None
        if self.world.is_main:
            state = {
                "config": self.config.model_dump(mode="json"),
                "world_size": self.world.size,
                "steps_per_epoch": self.steps_per_epoch,
                "num_images": len(self.source),
                "best_knn_percent": self.best_knn,
                "knn_percent": self.knn,
                "timm_args": self.pair.student.timm_args,
                "mean": self.config.crops.mean,
                "std": self.config.crops.std,
            }
            try:
                path = self.checkpoints.save(self.step, self._tensors(), state, best=best)
            except OSError as error:
                if self.step == 0:
                    raise ValueError(f"The first checkpoint could not be written to {self.checkpoints.folder}: {error.strerror}.") from None
                self.telemetry.warn(f"The checkpoint of step {self.step} could not be written ({error.strerror}); training goes on.")
        self.world.barrier()
        return path

    def _restore(self, path: Path) -> None:
        tensors, state = read_checkpoint(path)
        ours = {"num_images": len(self.source), "train.global_batch": self.config.train.global_batch}
        theirs = {"num_images": state["num_images"], "train.global_batch": state["config"]["train"]["global_batch"]}
        for name, value in ours.items():
            if theirs[name] != value:
                raise ValueError(
                    f"The checkpoint {path} was made with {name} {theirs[name]}, this run has {value}: its place in the data would be "
                    f"lost. Use the same data and batch, or start a new run from its weights with run.init_from."
                )
        with torch.no_grad():
            load_strictly("student", self.pair.student.state_dict(), without_prefix("student", tensors))
            load_strictly("teacher", self.pair.teacher.state_dict(), without_prefix("teacher", tensors))
            load_strictly("memory", self.objective.state_dict(), without_prefix("objective", tensors))
            load_strictly("loss scaler", self.train_step.scaler.tensors(), {n: t for n, t in tensors.items() if n.startswith("scaler/")})
            load_optimizer_tensors(self.optimizer, self.pair.student, {n: t for n, t in tensors.items() if n.startswith("optimizer/")})
        self.step, self.best_knn, self.knn = state["step"], state["best_knn_percent"], state["knn_percent"]

    def _stop_if_diverged(self) -> None:
        sentence = self.train_step.failure()
        if sentence:
            last = self.checkpoints.last()
            raise Diverged(
                f"{sentence} The run has ended; student, teacher and memory were left as they were before that step. Last good "
                f"checkpoint: {last}. What helps most often: a lower optimizer.learning_rate, a longer optimizer.warmup_epochs, "
                f"optimizer.clip, or bf16 or fp32 in place of fp16."
            )

    # Running

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the summary that was written."""
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
            with self._signals():
                self._loop()
            return self._finish()
        finally:
            self.telemetry.close()
            self.loader.close()

    def _check_checkpoint_round_trip(self) -> None:
        """A checkpoint that cannot be written or read back should be known now and not after hours."""
        path = self._save()
        if path:
            tensors, _ = read_checkpoint(path)
            for name, tensor in self._tensors().items():
                if not torch.equal(tensors[name], tensor.cpu()):
                    raise RuntimeError(f"The first checkpoint was written, but {name} did not read back as it was.")

    def _evaluate_untrained(self) -> None:
        if self.evaluator:
            percents = self.evaluator.evaluate(self.pair.teacher.features)
            self.knn = {f"knn_untrained_k{k}_percent": round(value, 3) for k, value in percents.items()}
            self.telemetry.log({"step": 0, "epoch": 0.0, "images_seen": 0, **self.knn})

    def _loop(self) -> None:
        config = self.config
        end = min(self.total_steps, config.train.stop_at_step or self.total_steps)
        batches = self.loader.batches(self.step)
        clock = WindowClock()
        gc.disable()
        try:
            while self.step < end:
                micro_batches = [clock.fetch(batches).crops for _ in range(self.accumulation)]
                settings = self.schedules.at(self.step)
                # Drop path draws from here: the masks of a step depend on (seed, step, rank) alone.
                torch.manual_seed(zlib.crc32(f"{config.run.seed}/{self.step}/{self.world.rank}".encode()))
                result = self.train_step(micro_batches, settings, self.step)
                self.step += 1
                clock.steps += 1
                self.telemetry.advance()

                finished = self.step == end
                evaluating = bool(
                    self.evaluator and (self.step == self.total_steps or (self.evaluate_every and self.step % self.evaluate_every == 0))
                )
                if evaluating or finished or self.step % config.logging.every_steps == 0:
                    self._log(result, settings, clock, evaluating)
                    gc.collect()
                    clock.restart()
                best = evaluating and self._is_best()
                stopping = self._asked_to_stop()
                if best or finished or stopping or self.step % config.checkpoint.every_steps == 0:
                    self._save(best)
                    clock.restart()
                if stopping:
                    raise Interrupted(
                        f"Ended by {self.stop_signal.name} after step {self.step}; a checkpoint was written. "
                        f"The same command continues from it."
                    )
        finally:
            gc.enable()

    def _log(self, result, settings, clock: WindowClock, evaluating: bool) -> None:
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
            "step_seconds": round(seconds, 5),
            "data_wait_percent": round(100 * waited, 2),
            "model_flops_utilization_percent": round(100 * utilization, 2) if utilization else None,
            **memory_peaks_gib(self.world.device),
        }
        self.images_per_second = row["images_per_second"]
        self.loss = loss
        self.telemetry.log(row)

    def _evaluate(self) -> dict[str, float]:
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
        if self.step < self.total_steps:
            self.telemetry.say(
                f"Stopped at step {self.step} of {self.total_steps}, as train.stop_at_step asks; the same command without it continues."
            )
            return {}
        summary = {
            "loss": getattr(self, "loss", None),
            "knn_untrained_percent": self._headline("untrained"),
            "knn_percent": self._headline("teacher"),
            "images_per_second": getattr(self, "images_per_second", None),
            "steps": self.step,
            "bad_files": self.loader.num_bad,
            "device": device_name(self.world.device),
            "world_size": self.world.size,
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
                backbone=self.pair.teacher.backbone,
                train_source=self.evaluation_sources[0] if self.evaluator else None,
                test_source=self.evaluation_sources[1] if self.evaluator else None,
            )
            knn = f", k-NN {summary['knn_untrained_percent']:.1f}% untrained → {summary['knn_percent']:.1f}%" if self.evaluator else ""
            self.telemetry.say(f"Done      loss {summary['loss']:.4f}{knn}; report: {report}")
        self.world.barrier()
        return summary

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and SIGUSR1 (a scheduler's warning) and Ctrl-C let the step finish; a second Ctrl-C ends at once."""

        def note(number, _frame):
            if self.stop_signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = signal.Signals(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked_to_stop(self) -> bool:
        return self.stop_signal is not None
