"""Run the templates of docs/slurm in a real Slurm on loopback and disturb them: ``python tests/cluster/trial.py [SCENARIO ...]``.

Prints a table, a line a scenario: what its rows of metrics.jsonl are against those of an undisturbed run (equal but for the clock's keys),
or the sentence that it ended with. Exits with 1 where a promise is broken, with 2 where Slurm is not there. Two gloo ranks on the CPU;
three quarters of an hour in all on a busy machine. ``--list`` names the scenarios.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import slurm
from slurm import Slurm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 40
STEP_SECONDS = 0.15
SETTINGS = f"""
run: {{plugins: ['{HERE / "slow_steps.py"}']}}
data: {{num_workers: 1, loader: torchvision}}
crops: {{global_size: 16, local_size: 8, num_local: 2}}
model:
  architecture: vit_tiny_patch16_224
  model_args: {{patch_size: 4, depth: 2, num_heads: 2, embed_dim: 32}}
  drop_path: 0.2
  head_hidden_dim: 32
  embedding_dim: 16
objective: {{memory_size: 64, block_size: 16, teacher_temperature_warmup_epochs: 1}}
teacher: {{momentum: 0.9}}
train: {{steps: {STEPS + 4}, stop_at_step: {STEPS}, global_batch: 8, device: cpu}}
logging: {{every_steps: 1, tensorboard: false}}
checkpoint: {{every_steps: 10}}
parallel: {{timeout_seconds: 60}}
"""
TWO_TASKS = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10")
"""For two_hosts and torchrun: a rank a host. For one_host both are on one."""
QUOTED = ("--model.model_args", "{patch_size: 4, depth: 2, num_heads: 2, embed_dim: 32}", "--run.plugins", f"['{HERE / 'slow_steps.py'}']")
"""Settings, as in SETTINGS, that a shell would take apart; the folders of these runs have spaces in their names."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}

# A stand-in for python that keeps rank 1 back at its start and at its end.
LATE_PYTHON = """#!/bin/bash
trap : TERM USR1
[ "$SLURM_PROCID" = 1 ] && sleep 4
{python} "$@" &
wait $!; code=$?
while kill -0 $! 2> /dev/null; do wait $!; code=$?; done
[ "$SLURM_PROCID" = 1 ] && sleep 4
exit $code
"""


@dataclass
class Job:
    slurm: Slurm
    number: int
    folder: Path
    log: Path

    def said(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def state(self) -> dict[str, str]:
        return self.slurm.state(self.number)

    def reached(self, step: int) -> None:
        self.slurm.wait(lambda: last_step(self.folder) >= step or self._over(), 180, f"step {step} of job {self.number}")

    def ended(self, seconds: float = 600) -> str:
        """The state that the job stays in; one that is queued again passes through others."""
        self.slurm.wait(self._over, seconds, f"job {self.number} to end, which is {self.state().get('JobState')}")
        return self.state()["JobState"]

    def _over(self) -> bool:
        if self.state().get("JobState") not in ENDED:
            return False
        time.sleep(3)
        return self.state()["JobState"] in ENDED

    def ranks(self) -> dict[int, int]:
        """{rank: process} of the trainers."""
        found = {}
        for process in slurm.processes():
            try:
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                entries = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
            except OSError:
                continue
            environment = dict(entry.partition("=")[::2] for entry in entries)
            is_trainer = b"massl_fast" in words and b"torch.distributed.run" not in words and b"python" in words[0]
            if is_trainer and environment.get("SLURM_JOB_ID") == str(self.number):
                rank = environment.get("RANK") or environment.get("SLURM_PROCID")
                if rank is not None:
                    found.setdefault(int(rank), process)
        return found


def last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return json.loads(lines[-1])["step"] if lines else -1
    except json.JSONDecodeError:
        return -1


@dataclass
class Trial:
    slurm: Slurm
    workplace: Path
    reference: list[dict] = field(default_factory=list)

    def start(self, name: str, template: str, *options: str, settings: tuple[str, ...] = (), **environment: str) -> Job:
        """Submit a template as it is; ``options`` are sbatch's."""
        log = self.workplace / f"{name}.log"
        number = self.slurm.submit(
            f"--output={log}",
            f"--export=ALL,{','.join(f'{key}={value}' for key, value in environment.items())}" if environment else "--export=ALL",
            *(("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", *TWO_TASKS[2:]) if template == "one_host" else TWO_TASKS),
            *options,
            str(ROOT / f"docs/slurm/{template}.sbatch"),
            *("--recipe", str(self.workplace / "recipe.yaml"), "--data.train", str(self.workplace / "images")),
            *("--run.folder", str(self.workplace / name)),
            *settings,
        )
        return Job(self.slurm, number, self.workplace / name, log)

    def equal(self, job: Job, *words: str) -> str:
        """Wait for the end; demands a complete run whose rows are those of the undisturbed one, and that ``words`` were said."""
        state = job.ended()
        found = rows(job.folder)
        assert state == "COMPLETED", f"ended as {state}"
        assert len(found) == len(self.reference), f"{len(found)} rows, not {len(self.reference)}"
        for one, other in zip(self.reference, found):
            assert one == other, f"step {one['step']} differs: {one} and {other}"
        for sentence in words:
            assert sentence in job.said(), f"did not say: {sentence}"
        restarts = int(job.state().get("Restarts", 0))
        times = {0: "", 1: ", queued again once"}.get(restarts, f", queued again {restarts} times")
        return f"all {len(found)} rows equal{times}"

    def refused(self, job: Job, state: str, sentence: str) -> str:
        found = job.ended()
        assert found == state, f"ended as {found}, not {state}"
        (line,) = {line for line in job.said().splitlines() if sentence in line} or {None}
        assert line, f"did not say: {sentence}"
        return f"{state}: {line.removeprefix('massl-fast train: ')}"


def rows(folder: Path) -> list[dict]:
    from massl_fast.run.outputs import CLOCK_KEYS

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK_KEYS} for line in lines]


# Scenarios


def completion_one_host(trial: Trial) -> str:
    return trial.equal(trial.start("on one host", "one_host", settings=QUOTED))


def completion_torchrun(trial: Trial) -> str:
    return trial.equal(trial.start("under torchrun", "torchrun", settings=QUOTED))


def term(trial: Trial) -> str:
    return _signalled(trial, "term", "two_hosts", "--signal=TERM")


def usr1(trial: Trial) -> str:
    return _signalled(trial, "usr1", "two_hosts", "--signal=USR1")


def term_one_host(trial: Trial) -> str:
    return _signalled(trial, "term-one-host", "one_host", "--signal=TERM")


def term_torchrun(trial: Trial) -> str:
    return _signalled(trial, "term-torchrun", "torchrun", "--signal=TERM")


def _signalled(trial: Trial, name: str, template: str, *how: str) -> str:
    job = trial.start(name, template)
    job.reached(12)
    trial.slurm.ask("scancel", *how, str(job.number))
    return trial.equal(job, "A checkpoint was written. The same command continues from it.")


def term_while_importing(trial: Trial) -> str:
    job = trial.start("importing", "two_hosts")
    trial.slurm.wait(lambda: len(job.ranks()) == 2, 60, "both ranks to start")
    trial.slurm.ask("scancel", "--signal=TERM", str(job.number))
    found = trial.equal(job)
    assert job.state()["Restarts"] == "1", "the signal was not heeded"
    return found


def time_limit(trial: Trial) -> str:
    return trial.equal(trial.start("limit", "two_hosts", "--time=2", "--signal=TERM@20", SLOW_STEP_SECONDS="3"), "Ended by SIGTERM")


def time_limit_torchrun(trial: Trial) -> str:
    return trial.equal(trial.start("limit-torchrun", "torchrun", "--time=2", "--signal=TERM@20", SLOW_STEP_SECONDS="3"))


def preempted_without_grace(trial: Trial) -> str:
    return _preempted(trial, "low")


def preempted_with_grace(trial: Trial) -> str:
    return _preempted(trial, "grace")


def _preempted(trial: Trial, partition: str) -> str:
    job = trial.start(f"preempted-{partition}", "two_hosts", f"--partition={partition}")
    job.reached(12)
    other = trial.slurm.submit(
        *("--partition=high", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", f"--output={trial.workplace}/other.log"),
        "--wrap=sleep 3",
    )
    found = trial.equal(job, "Ended by SIGTERM")
    assert trial.slurm.state(other)["JobState"] == "COMPLETED"
    return found


def killed_rank_0(trial: Trial) -> str:
    return _killed(trial, 0)


def killed_rank_1(trial: Trial) -> str:
    return _killed(trial, 1)


def _killed(trial: Trial, rank: int) -> str:
    job = trial.start(f"killed-{rank}", "two_hosts")
    job.reached(12)
    os.kill(job.ranks()[rank], signal.SIGKILL)
    said = trial.refused(job, "FAILED", f"Rank {rank} {'does not answer, and with it went' if rank == 0 else 'of 2 does not answer'}")
    assert "frame #" not in job.said() and "Traceback" not in job.said(), "a page of addresses"
    again = trial.start(f"killed-{rank}", "two_hosts")
    return f"{said} Submitted again: {trial.equal(again)}"


def killed_rank_0_torchrun(trial: Trial) -> str:
    return _killed_torchrun(trial, 0)


def killed_rank_1_torchrun(trial: Trial) -> str:
    return _killed_torchrun(trial, 1)


def _killed_torchrun(trial: Trial, rank: int) -> str:
    job = trial.start(f"killed-torchrun-{rank}", "torchrun")
    job.reached(12)
    os.kill(job.ranks()[rank], signal.SIGKILL)
    return trial.equal(job) + ", started again by torchrun"


def dead_node(trial: Trial) -> str:
    job = trial.start("dead-node", "two_hosts")
    job.reached(12)
    trial.slurm.node_down("node2")
    trial.slurm.wait(lambda: job.state()["JobState"] == "PENDING", 120, "Slurm to miss the node")
    trial.slurm.node_up("node2")
    return trial.equal(job)


def two_jobs_on_one_folder(trial: Trial) -> str:
    job = trial.start("shared", "two_hosts", SLOW_STEP_SECONDS="4")
    job.reached(2)
    others = []
    for name, settings in (("second", ()), ("third", ("--run.resume", "never", "--run.seed", "3"))):
        log = trial.workplace / f"{name}.log"
        started = trial.start("shared", "two_hosts", f"--output={log}", settings=settings)
        others.append(Job(trial.slurm, started.number, job.folder, log))
    said = [trial.refused(other, "FAILED", "is in use by process") for other in others]
    return f"the first: {trial.equal(job)}; the second: {said[0]}"


def another_seed(trial: Trial) -> str:
    job = trial.start("seed", "two_hosts", settings=("--train.stop_at_step", "5"))
    assert job.ended() == "COMPLETED"
    other = trial.start("seed", "two_hosts", settings=("--run.seed", "3"))
    return trial.refused(other, "FAILED", "is of another run. It was made with run.seed 0 (here 3)")


def late_rank(trial: Trial) -> str:
    late = trial.workplace / "late"
    late.mkdir()
    python = late / "python"
    python.write_text(LATE_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    job = trial.start("late-rank", "two_hosts", PATH=f"{late}:{os.environ['PATH']}")
    job.reached(12)
    trial.slurm.ask("scancel", "--signal=TERM", str(job.number))
    return trial.equal(job, "Ended by SIGTERM")


def cancelled(trial: Trial) -> str:
    job = trial.start("cancelled", "two_hosts")
    job.reached(12)
    trial.slurm.ask("scancel", str(job.number))
    state = job.ended()
    time.sleep(slurm.CREDENTIAL)
    assert state == job.state()["JobState"] == "CANCELLED", f"{state}, then {job.state()['JobState']}"
    assert last_saved(job.folder) > 10, "nothing was saved"
    return f"CANCELLED and stays so, saved at step {last_saved(job.folder)}"


def last_saved(folder: Path) -> int:
    return max(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


SCENARIOS = {
    "completion, one_host": completion_one_host,
    "completion, torchrun": completion_torchrun,
    "TERM to every process": term,
    "TERM to every process, one_host": term_one_host,
    "USR1 to every process": usr1,
    "TERM while ranks import": term_while_importing,
    "TERM to every process, torchrun": term_torchrun,
    "time limit": time_limit,
    "time limit, torchrun": time_limit_torchrun,
    "preemption without grace": preempted_without_grace,
    "preemption with grace": preempted_with_grace,
    "rank 0 killed": killed_rank_0,
    "rank 1 killed": killed_rank_1,
    "rank 0 killed, torchrun": killed_rank_0_torchrun,
    "rank 1 killed, torchrun": killed_rank_1_torchrun,
    "dead node": dead_node,
    "two jobs on one folder": two_jobs_on_one_folder,
    "another seed on one folder": another_seed,
    "a rank 4 s late, at both ends": late_rank,
    "scancel": cancelled,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="names or parts of names; all by default")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave runs, job logs and the daemons' logs there")
    args = parser.parse_args()
    chosen = [
        name
        for name in SCENARIOS
        if not args.scenarios or any(part == name or (part in name and part not in SCENARIOS) for part in args.scenarios)
    ]
    if args.list or not chosen:
        print("\n".join(SCENARIOS))
        return 0 if args.list else 2
    if problem := slurm.obstacle():
        print(f"There is no Slurm to try: {problem}")
        return 2
    slurm.enter()
    with tempfile.TemporaryDirectory(prefix="massl_fast_slurm_") as folder:
        return run(Path(args.keep or folder), chosen)


def run(workplace: Path, chosen: list[str]) -> int:
    sys.path.append(str(HERE.parent))
    from small_images import write_images

    workplace = workplace.absolute()
    write_images(workplace / "images", classes=2, per_class=14)
    (workplace / "recipe.yaml").write_text(SETTINGS)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the templates say python
    os.environ["SLOW_STEP_SECONDS"] = str(STEP_SECONDS)
    os.environ["OMP_NUM_THREADS"] = "1"
    trial = Trial(Slurm(workplace / "slurm"), workplace)
    failures = 0
    try:
        trial.slurm.start()
        print(f"{trial.slurm.ask('sbatch', '--version').strip()}, {time.strftime('%d %B %Y')}", flush=True)
        undisturbed = trial.start("left alone", "two_hosts", settings=QUOTED)
        assert undisturbed.ended() == "COMPLETED", undisturbed.said()
        trial.reference = rows(undisturbed.folder)
        assert len(trial.reference) == STEPS
        print("| what happens | what comes of it | s |\n| --- | --- | --- |", flush=True)
        for name in chosen:
            begun = time.monotonic()
            try:
                outcome = SCENARIOS[name](trial)
            except Exception as error:  # whatever it was, the next scenario is tried
                failures += 1
                outcome = f"BROKEN: {error}"
                traceback.print_exc()
                for log in sorted(workplace.glob("*.log")):
                    if log.stat().st_mtime > time.time() - (time.monotonic() - begun):
                        print(f"--- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
                trial.slurm.ask("scancel", "--full", "--signal=KILL", "--user=root")
                trial.slurm.ask("scancel", "--user=root")
            print(f"| {name} | {outcome} | {time.monotonic() - begun:.0f} |", flush=True)
    finally:
        trial.slurm.stop()
    print(f"{len(chosen) - failures} of {len(chosen)} as promised")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
