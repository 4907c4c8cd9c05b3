"""A real Slurm cluster on this machine: munge, a controller and four nodes, two of them with GPUs that do not compute.

Debian's slurmd is built so that several run on one host. Each daemon has process, host name and mount namespaces of its
own: a job sees its node's name, killing the first process of a node is a machine that lost its power, and when this
process ends, however it ends, the kernel kills every daemon and every process of every job. Needs root for that; jobs
belong to an ordinary user. Everything listens on the loopback only.

What is not as on a real cluster: the nodes share cores, network and files, there is no accounting, and Slurm's
patience is cut to seconds.
"""

import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

# Two nodes each. Names that no real host has: with cgroups, nodes of the same name would share one.
CPU_NODES = ("test-cpu1", "test-cpu2")
GPU_NODES = ("test-gpu1", "test-gpu2")
NODES = (*CPU_NODES, *GPU_NODES)
CONTROLLER = "test-controller"
GPUS_PER_NODE = 8
CORES_PER_NODE = 64
MAX_HOURS = {"cpu": 48, "gpu": 24}

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv", "unshare")
# The freezer signals only the first processes of a step, as production clusters do. Tracking by parents would signal
# each descendant, which kills what Apptainer mounts an image with.
FREEZER = Path("/sys/fs/cgroup/freezer")

# The namespace's first process stays to collect orphans, and ends with the daemon.
AS_HOST = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; "$@" & wait $!'


class ClusterError(AssertionError):
    """The cluster did not do what a test waits for; says what its daemons and jobs last wrote."""


@dataclass
class SlurmCluster:
    """A running cluster.

    Attributes:
        folder: configuration, state and logs.
        user: whose jobs run on it.
    """

    folder: Path
    user: str
    _daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start(self) -> None:
        """Start every daemon, and wait until the nodes are idle."""
        self._write_configuration()
        key = self.folder / "munge.key"
        key.write_bytes(random.randbytes(128))
        key.chmod(0o400)
        munge = [f"--{name}={self.folder / f'munge.{end}'}" for name, end in MUNGE_FILES.items()]
        self._start("munged", CONTROLLER, "munged", "--foreground", "--force", *munge)
        self.wait_until((self.folder / "munge.sock").is_socket, "munged made its socket", seconds=20)
        self.start_controller()
        for node in NODES:
            self.boot(node)
        self.wait_for_nodes()

    def start_controller(self) -> None:
        """Start slurmctld, which remembers the jobs that it knew, and learns again how its nodes are."""
        self._start("slurmctld", CONTROLLER, "slurmctld", "-D")
        self.wait_until(lambda: self._ask("scontrol", "ping").returncode == 0, "slurmctld answers", seconds=60)

    def wait_for_nodes(self) -> None:
        """Wait until every node is idle. Until then `sbatch` may say that it does not have what is asked for."""
        self.wait_until(lambda: self.states() == dict.fromkeys(NODES, "idle"), "every node is idle", seconds=60)

    def stop_controller(self) -> None:
        """End slurmctld at once. Jobs run on."""
        self._kill("slurmctld")

    def boot(self, node: str) -> None:
        """Start a node."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._start(node, node, "slurmd", "-D", "-N", node)

    def crash(self, node: str) -> None:
        """Take a node's power away: it and all processes of its jobs are gone."""
        self._kill(node)

    def stop(self) -> None:
        """End everything."""
        for name in reversed(list(self._daemons)):
            self._kill(name)
        for node in NODES:
            for group in sorted((FREEZER / f"slurm_{node}").glob("**/"), reverse=True):
                with suppress(OSError):
                    group.rmdir()

    # What a person does on the login node.

    def run(
        self, *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command as the user, in the environment of a fresh login."""
        account = pwd.getpwnam(self.user)
        login = {
            "HOME": account.pw_dir,
            "USER": self.user,
            "LOGNAME": self.user,
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        return subprocess.run(
            list(map(str, command)),
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
            umask=0o022,
            cwd=cwd or account.pw_dir,
            env={**login, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def states(self) -> dict[str, str]:
        """The state of each node, as sinfo names it."""
        listed = self._ask("sinfo", "--noheader", "--Node", "--format=%N %t").stdout
        return {line.split()[0]: line.split()[1] for line in listed.splitlines()}

    def jobs(self) -> list[str]:
        """The ids of all jobs that wait or run."""
        return self._ask("squeue", "--noheader", "--array", "--format=%i").stdout.split()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, also when it has ended."""
        shown = self._ask("scontrol", "--oneliner", "show", "job", job).stdout
        # Values hold blanks at times, in paths; none of those that tests read does.
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def next_job(self) -> int:
        """The id that the next job will get."""
        shown = self._ask("scontrol", "show", "config").stdout
        (number,) = re.findall(r"^NEXT_JOB_ID\s*=\s*(\d+)", shown, re.MULTILINE)
        return int(number)

    def restarts(self, job: str) -> int:
        """How often a job was requeued."""
        return int(self.job(job).get("Restarts", 0))

    def cancel_all(self) -> None:
        """Cancel every job, at once, and wait until none is left."""
        if jobs := self.jobs():
            self._ask("scancel", "--signal=KILL", "--full", *jobs)
            self._ask("scancel", *jobs)
            self.wait_until(lambda: not self.jobs(), "cancelled jobs are gone", seconds=60)

    def wait_until(self, condition: Callable[[], object], what: str, *, seconds: float) -> None:
        """Look every 0.2 s whether something is so.

        Raises:
            ClusterError: it is not after so many seconds, or a daemon ended.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                why = f"{', '.join(ended)} ended" if ended else f"not within {seconds:.0f} s"
                raise ClusterError(f"{what}: {why}\n{self.describe()}")
            time.sleep(0.2)

    def wait_for_state(self, job: str, *states: str, seconds: float) -> None:
        """Wait until a job is in one of these states, and no longer than until it ends in another.

        Raises:
            ClusterError: it ended otherwise, or is not there in time.
        """

        def arrived() -> bool:
            state = self.job(job).get("JobState", "UNKNOWN")
            if state not in states and state in FINAL_STATES:
                raise ClusterError(f"job {job} is {state} and not {' or '.join(states)}\n{self.describe()}")
            return state in states

        self.wait_until(arrived, f"job {job} is {' or '.join(states)}", seconds=seconds)

    def describe(self) -> str:
        """Jobs, nodes and the ends of all logs."""
        parts = [self._ask("scontrol", "show", "job").stdout, self._ask("sinfo", "--Node", "--long").stdout]
        for log in sorted((self.folder / "log").iterdir()):
            end = log.read_text(errors="replace")[-1500:]
            parts.append(f"--- {log.name}\n{end}")
        return "\n".join(parts)

    def _ask(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run one of Slurm's own commands as root."""
        env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)

    def _start(self, name: str, host: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.log").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig=KILL"),
                    *("unshare", "--pid", "--uts", "--mount", "--propagation=private"),
                    *("--fork", "--kill-child", "--mount-proc"),
                    *("bash", "-c", AS_HOST, "host", host, str(self.folder / f"hosts-{host}"), *command),
                ],
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SLURM_CONF": str(self.folder / "slurm.conf")},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C is for pytest, which then stops the daemons in order.
                start_new_session=True,
            )

    def _kill(self, name: str) -> None:
        """Kill a namespace's first process; that it is gone means that all in it are."""
        daemon = self._daemons.pop(name)
        with suppress(OSError):
            for first in Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split():
                os.kill(int(first), signal.SIGKILL)
        try:
            daemon.wait(timeout=30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _write_configuration(self) -> None:
        self.folder.chmod(0o755)
        for name in ("log", "state"):
            (self.folder / name).mkdir()
        system_hosts = Path("/etc/hosts").read_text()
        for host in (CONTROLLER, *NODES):
            # Every host has the loopback address for itself, as the first line, so that its name is found for the
            # address; the others have another one, as torch and launchers ask whether an address is their own.
            others = [f"127.0.0.{10 + n} {name}" for n, name in enumerate((CONTROLLER, *NODES)) if name != host]
            lines = [f"127.0.0.1 {host}", *others, system_hosts]
            (self.folder / f"hosts-{host}").write_text("\n".join(lines))
        tracking = "cgroup" if os.access(FREEZER / "cgroup.procs", os.W_OK) else "pgid"
        ports = free_ports(1 + len(NODES))
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{CONTROLLER}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            # The second setting is also how long a requeued job waits: two minutes as installed, 5 s at least.
            "AuthInfo": f"socket={self.folder / 'munge.sock'},cred_expire=5",
            "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool-%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd-%n.pid",
            "ProctrackType": f"proctrack/{tracking}",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerParameters": "bf_interval=2,sched_interval=2,batch_sched_delay=1",
            # Nodes have the cores that the configuration says, whatever the machine has.
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 2,
            "SlurmdTimeout": 5,
            "KillWait": 5,
            "MinJobAge": 86400,
            # As installed: what asks for too much waits for ever. A wrapper must not rely on Slurm's refusal.
            "EnforcePartLimits": "NO",
            "GresTypes": "gpu",
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for port, node in zip(ports[1:], NODES):
            gres = f"Gres=gpu:h100:{GPUS_PER_NODE} " if node in GPU_NODES else ""
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs={CORES_PER_NODE} Sockets=2 "
                f"CoresPerSocket={CORES_PER_NODE // 2} ThreadsPerCore=1 RealMemory=512000 {gres}State=UNKNOWN"
            )
        for partition, nodes, default in (("cpu", CPU_NODES, "YES"), ("gpu", GPU_NODES, "NO")):
            lines.append(
                f"PartitionName={partition} Nodes={','.join(nodes)} Default={default} State=UP "
                f"DefaultTime=01:00:00 MaxTime={MAX_HOURS[partition]}:00:00"
            )
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        devices = self.folder / "devices"
        devices.mkdir()
        for number in range(GPUS_PER_NODE):
            (devices / f"nvidia{number}").symlink_to(os.devnull)
        (self.folder / "gres.conf").write_text(
            f"NodeName={','.join(GPU_NODES)} Name=gpu Type=h100 File={devices}/nvidia[0-{GPUS_PER_NODE - 1}]\n"
        )
        if tracking == "cgroup":
            limits = [f"Constrain{what}=no" for what in ("Cores", "RAMSpace", "Devices")]
            lines = ["CgroupPlugin=cgroup/v1", "CgroupMountpoint=/sys/fs/cgroup", *limits]
            (self.folder / "cgroup.conf").write_text("\n".join(lines) + "\n")


MUNGE_FILES = {"socket": "sock", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}


def missing() -> str | None:
    """What a cluster needs and this machine has not, with the command that mends it; None if nothing is."""
    if os.geteuid() != 0:
        return "the cluster's daemons need root — sudo env PATH=$PATH nox -s cluster"
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not found — on Debian or Ubuntu: apt-get install slurm-wlm munge"
    return None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system gives to clients."""
    found: list[int] = []
    for port in random.sample(range(10_000, 20_000), 1000):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise ClusterError("no free ports")


@contextmanager
def running_cluster(user: str) -> Iterator[SlurmCluster]:
    """A cluster whose jobs are this user's, stopped and removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="nanochat-slurm-"))
    cluster = SlurmCluster(folder, user)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
