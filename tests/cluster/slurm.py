"""A real Slurm on loopback: slurmctld, two slurmd ("node1", "node2") and munged, in namespaces of their own.

``enter()`` starts this very program again in a mount, network and process namespace whose only interface is loopback and whose /etc/hosts
names the nodes; everything in it ends when the program does, and nothing outside it is changed. Needs root and Debian's slurm-wlm.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "scontrol", "sinfo", "munged", "unshare", "mount", "ip")
NODES = ("node1", "node2")
INSIDE = "MASSL_FAST_IN_SLURM_NAMESPACE"
KILL_WAIT = 30  # seconds from SIGTERM to SIGKILL, Slurm's default
GRACE = 60
# Seconds for which a job's credential is valid; a requeued job starts only after that (Slurm's default is 120).
CREDENTIAL = 20

CONFIGURATION = """
ClusterName=trial
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge/socket,cred_expire={credential}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
ReturnToService=2
KillWait={kill_wait}
MinJobAge=3600
SlurmdTimeout=20
SlurmctldTimeout=20
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17001 CPUs=8 RealMemory=8000 Gres=gpu:2
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17002 CPUs=8 RealMemory=8000 Gres=gpu:2
PartitionName=low   Nodes=ALL Default=YES PriorityTier=1 MaxTime=7-0
PartitionName=grace Nodes=ALL PriorityTier=1 MaxTime=7-0 GraceTime={grace}
PartitionName=high  Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=7-0
"""


def obstacle() -> str | None:
    """Why a Slurm cannot be started here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None and not Path("/usr/sbin", program).exists()]
    if missing:
        return f"{', '.join(missing)} not found. On Debian: apt-get install slurm-wlm munge. This program installs nothing by itself."
    if os.geteuid() != 0:
        return "The daemons and their namespace need root."
    return None


def enter() -> None:
    """Go on in namespaces of our own; returns there, and never returns outside."""
    if os.environ.get(INSIDE):
        _raise_loopback()
        return
    arguments = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, *sys.argv]
    os.execvpe(arguments[0], arguments, os.environ | {INSIDE: "1"})


def _raise_loopback() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # A second address of loopback: where 127.0.0.1 is the only one, the C library takes a host to have no IPv4 and resolves no name for it.
    subprocess.run(["ip", "address", "add", "127.0.0.2/8", "dev", "lo"], check=True)


class Slurm:
    """The daemons, started by ``start`` with their files under ``base``."""

    def __init__(self, base: Path):
        self.base = base
        os.environ["SLURM_CONF"] = str(base / "slurm.conf")
        os.environ["PATH"] += ":/usr/sbin"

    def start(self) -> None:
        for name in ("munge", "state", *(f"spool.{node}" for node in NODES)):
            (self.base / name).mkdir(parents=True)
        self.base.chmod(0o755)
        hosts = self.base / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {' '.join(NODES)} {socket.gethostname()}\n")
        subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)
        values = {"base": self.base, "credential": CREDENTIAL, "kill_wait": KILL_WAIT, "grace": GRACE}
        (self.base / "slurm.conf").write_text(CONFIGURATION.format(**values))
        for number in range(2):  # Slurm wants a device file of each GPU: further names of /dev/null
            os.mknod(self.base / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.base / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={self.base}/gpu[0-1]\n")
        (self.base / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = self.base / "munge/key"
        key.touch(0o400)
        key.write_bytes(os.urandom(1024))
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        # --force: it would refuse to run as root.
        subprocess.run(["munged", "--force", *(f"--{name}={self.base}/munge/{file}" for name, file in munge.items())], check=True)
        subprocess.run(["slurmctld", "-f", str(self.base / "slurm.conf"), "-c"], check=True)
        for node in NODES:
            self.node_up(node)
        self.wait(lambda: len(self.ask("sinfo", "-h", "-N", "-p", "high", "-t", "idle").splitlines()) == 2, 60, "both nodes to be idle")

    def node_up(self, node: str) -> None:
        subprocess.run(["slurmd", "-N", node, "-f", str(self.base / "slurm.conf")], check=True)

    def node_down(self, node: str) -> None:
        """What a host that dies leaves: its slurmd, its step daemons and all that they started are gone at once."""
        os.kill(int((self.base / f"{node}.pid").read_text()), signal.SIGKILL)
        doomed = [process for process in processes() if node in self._nodes_of(process)]
        # Stopped first, so that nobody sees a child die and reports it.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in doomed:
                try:
                    os.kill(process, number)
                except ProcessLookupError:
                    continue
        (self.base / f"{node}.pid").unlink()

    def _nodes_of(self, process: int) -> set[str]:
        """The nodes that a process of a job step belongs to: of a step daemon by its files, of a task by its environment."""
        try:
            environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            names = {entry.decode().partition("=")[2] for entry in environment if entry.startswith(b"SLURMD_NODENAME=")}
            if "slurmstepd" in Path(f"/proc/{process}/comm").read_text():
                links = [os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()]
                names |= {node for node in NODES if any(f"{node}" in link for link in links)}
            return names
        except OSError:
            return set()

    def ask(self, *arguments: str) -> str:
        return subprocess.run(arguments, capture_output=True, text=True).stdout

    def submit(self, *arguments: str) -> int:
        answer = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True)
        if answer.returncode:
            raise RuntimeError(f"sbatch {' '.join(arguments)}: {answer.stderr}")
        return int(answer.stdout)

    def state(self, job: int) -> dict[str, str]:
        """What scontrol knows of a job: JobState, ExitCode, Restarts and so on."""
        words = self.ask("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, condition, seconds: float, what: str):
        """The first true answer of ``condition``; RuntimeError where there is none within ``seconds``."""
        deadline = time.monotonic() + seconds
        while not (answer := condition()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {seconds:g} s for {what}")
            time.sleep(0.1)
        return answer

    def stop(self) -> None:
        """End all jobs and daemons; their files are whole, and may be removed, when this returns."""
        self.ask("scancel", "--full", "--signal=KILL", "--user=root")
        stopped = []
        for file in (*(f"{node}.pid" for node in NODES), "slurmctld.pid", "munge/pid"):
            if (self.base / file).is_file():
                stopped.append(int((self.base / file).read_text()))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stopped[-1], signal.SIGTERM)
        self.wait(lambda: not any(map(runs, stopped)), 60, "Slurm's daemons to end")


def runs(process: int) -> bool:
    """Whether it is there and is more than an entry that nobody has asked for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
