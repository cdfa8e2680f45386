"""A real SLURM of one node on the loopback interface, from Debian's packages, for tests. Standard library only.

    python tests/cluster/one_node_slurm.py install               # apt-get; nothing to do where it is installed
    python tests/cluster/one_node_slurm.py with FOLDER -- sinfo  # up, the command with SLURM_CONF set, down
    python tests/cluster/one_node_slurm.py up FOLDER             # until `down FOLDER`

Everything but the packages is in FOLDER, so instances can run side by side, as root or as a plain user, whose jobs alone it
then runs. The node claims 8 CPUs, 64 GB and two GPUs that are links to /dev/null: jobs are given different
CUDA_VISIBLE_DEVICES, nothing is enforced. Queues: `gpu` (default, 1 day at most) and `short` (2 minutes at most). There is
no accounting, which is the harder case: sacct knows nothing.

Measured with SLURM 22.05.8 on two cores: up in 0.2 to 0.4 s, down in 0.2 to 0.4 s (6 s with a job that ignores SIGTERM,
whatever KillWait says); a job starts within 1 s of its submission, one that is requeued 6 to 7 s later (with the default
cred_expire=120: two minutes). Time limits are whole minutes, checked every 30 s; EnforcePartLimits=ALL, so those above the
queue's are refused, where SLURM's default lets such jobs wait for ever. Without a controller, SLURM's commands fail after 9 s.
"""

import argparse
import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # a plain user's often lacks these
HARMLESS = "mpi/pmix|MPI|state file|NOTE: Trying backup"  # errors in the logs of every start
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")

INSTALL = """set -e
policy=/usr/sbin/policy-rc.d
trap 'exit 130' INT TERM
if [ ! -e $policy ]; then  # keeps the packages from starting their services
    trap "rm -f $policy" EXIT
    printf '#!/bin/sh\\nexit 101\\n' >$policy
    chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o DPkg::Lock::Timeout=300 update
apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install -y --no-install-recommends \
    slurmctld slurmd slurm-client munge
"""

# config_overrides lets the node claim more than the machine has; without the SchedulerParameters a job of an array starts 3 s
# after the one before it ended, instead of 1.
LOOPBACK_ONLY = "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny"
CONFIGURATION = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
{listen}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CredType=cred/munge
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=1
JobRequeue=1
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
KillWait=1
MinJobAge={min_job_age}
MaxArraySize={max_array_size}
InactiveLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=gpu Nodes={host} Default=YES MaxTime=1-00:00:00 State=UP
PartitionName=short Nodes={host} MaxTime=2 State=UP
"""


class SlurmError(RuntimeError):
    pass


def installed() -> bool:
    return all(shutil.which(program, path=PATH) for program in PROGRAMS)


def install() -> None:
    """Install the packages, 3.5 MB, if they are not there.

    Raises:
        SlurmError: there is no apt-get, neither root nor sudo, or apt-get failed.
    """
    if installed():
        return
    if not shutil.which("apt-get"):
        raise SlurmError(
            "no apt-get here: install slurmctld, slurmd, the SLURM client commands and munge by other means"
        )
    if os.geteuid() and not shutil.which("sudo"):
        raise SlurmError("installing SLURM takes root or sudo")
    sudo = ["sudo"] if os.geteuid() else []
    if code := subprocess.run([*sudo, "sh", "-c", INSTALL], stdin=subprocess.DEVNULL).returncode:
        raise SlurmError(f"apt-get ended with exit code {code}")
    if not installed():
        raise SlurmError(f"apt-get succeeded, but not all of {', '.join(PROGRAMS)} are there")


def up(
    folder: str | Path, *, gpus: int = 2, port: int | None = None, min_job_age: int = 300, max_array_size: int = 1001
) -> "Slurm":
    """Configure and start a SLURM in a folder, with no jobs, and wait until its node is idle.

    Args:
        folder: of its own; what an earlier SLURM left in it is removed.
        gpus: how many the node pretends to have.
        port: the controller's; the node's is the next one. None: two that are free.
        min_job_age: how many seconds squeue and scontrol know a finished job; the default is SLURM's own.
        max_array_size: one more than the highest index of an array; the default is SLURM's own.

    Raises:
        SlurmError: something is not installed, it runs already, or it did not start within 60 s; with lines of the logs.
    """
    slurm = Slurm(Path(folder).resolve(), socket.gethostname().partition(".")[0])
    if not installed():
        raise SlurmError(f"not all of {', '.join(PROGRAMS)} are installed; `install` does that")
    if len(f"{slurm.folder}/spool/{slurm.host}_1234567.4294967291") > 107:
        raise SlurmError(f"{slurm.folder} is too long a name for the sockets in it")
    if running := [name for name in slurm.pids() if slurm.alive(name)]:
        raise SlurmError(f"{', '.join(running)} already running in {slurm.folder}; `down` ends that")
    for name in ("log", "state", "spool", "gpu", "munge"):
        shutil.rmtree(slurm.folder / name, ignore_errors=True)
        (slurm.folder / name).mkdir(parents=True)
    for number in range(gpus):
        (slurm.folder / f"gpu/fake{number}").symlink_to("/dev/null")
    files = "\n".join(f"Name=gpu File={slurm.folder}/gpu/fake{number}" for number in range(gpus))
    (slurm.folder / "gres.conf").write_text(files + "\n")
    (slurm.folder / "munge/key").touch(mode=0o600)
    (slurm.folder / "munge/key").write_bytes(secrets.token_bytes(1024))
    port = port or free_ports()
    (slurm.folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=slurm.host,
            port=port,
            node_port=port + 1,
            listen=LOOPBACK_ONLY if named_loopback() else "",
            user=slurm.output("id", "-un").strip(),
            folder=slurm.folder,
            gpus=gpus,
            min_job_age=min_job_age,
            max_array_size=max_array_size,
        )
    )
    (slurm.folder / "pids.json").write_text("{}")
    try:
        slurm.start_munge()
        slurm.start_controller()
        slurm.start_node()
    except BaseException:
        slurm.down()
        raise
    return slurm


def named_loopback() -> bool:
    """Whether the host's name means 127.0.0.1. With LOOPBACK_ONLY, SLURM listens on the address of that name, and with
    another one, 127.0.1.1 too, srun waits in vain for its tasks. Then the daemons listen on all interfaces."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
    return False


def free_ports() -> int:
    """A port that is free and whose successor is, below those that the system hands out to clients."""
    while True:
        port = random.randrange(20000, 32000, 2)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 1))
            return port


@dataclass(frozen=True)
class Slurm:
    """A SLURM that `up` has started in a folder; the object for one that another process has started is the same."""

    folder: Path
    host: str

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need in their environment."""
        return {"SLURM_CONF": f"{self.folder}/slurm.conf"}

    def output(self, *command: str, timeout: float = 10) -> str:
        """What a command prints.

        Raises:
            SlurmError: it failed, with what it said, or did not end in time: without a controller they retry for long.
        """
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment |= {"PATH": PATH} | self.environment
        try:
            ended = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise SlurmError(f"{' '.join(command)} took more than {timeout} s") from None
        if ended.returncode:
            raise SlurmError(f"{' '.join(command)}: {(ended.stderr or ended.stdout).strip()}")
        return ended.stdout

    def start_munge(self) -> None:
        files = [f"--{file}-file={self.folder}/munge/{file}" for file in ("key", "pid", "seed", "log")]
        # Without --force it wants every folder above its socket to be open to all, which those of pytest are not.
        self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge/sock", *files)
        self._wait("munged", (self.folder / "munge/sock").exists)

    def start_controller(self) -> None:
        """Start the controller, with the state it had when it was stopped, and wait until it answers."""
        self._start("slurmctld", "-D", "-f", f"{self.folder}/slurm.conf")
        self._wait("slurmctld", lambda: "UP" in self.output("scontrol", "ping", timeout=2))

    def stop_controller(self) -> None:
        self._stop("slurmctld")

    def restart_controller(self) -> None:
        self.stop_controller()
        self.start_controller()

    def start_node(self) -> None:
        self._start("slurmd", "-D", "-f", f"{self.folder}/slurm.conf")
        self._wait("slurmd", lambda: self.output("sinfo", "-h", "-p", "gpu", "-o", "%T").strip() in ("idle", "mixed"))

    def node(self, state: str) -> None:
        """Set the state of the node: `down`, whereupon its jobs are requeued or fail, or `resume`."""
        self.output("scontrol", "update", f"NodeName={self.host}", f"State={state.upper()}", "Reason=test")

    def down(self) -> None:
        """Cancel all jobs and stop the daemons. What is not running is no error."""
        try:
            if self.alive("munged") and {"slurmctld", "slurmd"} <= self.pids().keys():
                if not self.alive("slurmctld"):
                    self.start_controller()  # else its jobs would stay
                if not self.alive("slurmd"):
                    self._start("slurmd", "-D", "-f", f"{self.folder}/slurm.conf")
                self.output("scancel", "--state=PENDING")
                self.output("scancel", "--full", "--signal=KILL", "--state=RUNNING")
                self._wait("slurmctld", lambda: not self.output("squeue", "-h"), seconds=20)
        except SlurmError as error:
            print(f"jobs may be left: {error}", file=sys.stderr)
        finally:
            for name in ("slurmctld", "slurmd", "munged"):
                self._stop(name)
            self._kill_scripts()

    def _kill_scripts(self) -> None:
        """End the jobs that a controller killed with SIGKILL has forgotten: it saves its state every few seconds only."""
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                pid = int(file.parent.name)
                if f"\0{self.folder}/spool/job".encode() in file.read_bytes() and os.getpgid(pid) == pid:
                    os.killpg(pid, signal.SIGKILL)

    def pids(self) -> dict[str, tuple[int, int]]:
        """The daemons' process ids and times of start, by name."""
        try:
            return json.loads((self.folder / "pids.json").read_text())
        except FileNotFoundError:
            return {}

    def alive(self, name: str) -> bool:
        pid, started = self.pids().get(name, (0, 0))
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG) if pid else None  # a child that ended is a zombie until it is waited for
        return pid > 0 and start_time(pid) == started

    def _start(self, name: str, *options: str) -> None:
        if self.alive(name):
            raise SlurmError(f"{name} is running already")
        program = shutil.which(name, path=PATH)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        with (self.folder / f"log/{name}.out").open("a") as log:
            process = subprocess.Popen(
                [str(program), *options],
                env=environment | {"PATH": PATH} | self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt from the keyboard is for the tests; `down` comes after
            )
        (self.folder / "pids.json").write_text(json.dumps(self.pids() | {name: (process.pid, start_time(process.pid))}))

    def _stop(self, name: str) -> None:
        pid = self.pids().get(name, (0, 0))[0]
        for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
            until = time.monotonic() + seconds
            if self.alive(name):
                os.kill(pid, number)
            while self.alive(name) and time.monotonic() < until:
                time.sleep(0.02)

    def _wait(self, name: str, ready: Callable[[], object], seconds: float = 60) -> None:
        until, said = time.monotonic() + seconds, ""
        while True:
            try:
                if ready():
                    return
            except SlurmError as error:
                said = f"; {error}"
            if not self.alive(name) or time.monotonic() > until:
                happened = f"not ready after {seconds} s" if self.alive(name) else "ended"
                raise SlurmError(f"{name}: {happened}{said}\n{self._log_lines()}")
            time.sleep(0.05)

    def _log_lines(self) -> str:
        lines = []
        for path in sorted(self.folder.glob("log/*.out")):
            every = path.read_text(errors="replace").splitlines()
            bad = [line for line in every if re.search("error|fatal", line, re.I) and not re.search(HARMLESS, line)]
            lines += [f"{path.name}: {line}" for line in bad[-8:] or every[-3:]]
        return "\n".join(lines)


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none or it is a zombie."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state in "ZX" else int(others[18])


def run_with(folder: Path, command: list[str], **options: int | None) -> int:
    """Run a command with a SLURM that is there as long as it; SIGINT, SIGTERM and SIGHUP end both. Its exit code."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        signal.signal(number, stop)
    slurm = up(folder, **options)  # type: ignore[arg-type]
    try:
        process = subprocess.Popen(command, env=os.environ | slurm.environment)
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
    except OSError as error:
        raise SlurmError(f"{command[0]}: {error.strerror}") from error
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        slurm.down()


def main() -> int:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command = sys.argv[split + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("install", help="install the packages, unless they are there")
    for action, text in (("up", "start"), ("down", "stop"), ("with", "start, run what follows `--`, stop")):
        options = actions.add_parser(action, help=text)
        options.add_argument("folder", type=Path)
        if action != "down":
            options.add_argument("--gpus", type=int, default=2)
            options.add_argument("--port", type=int, help="of the controller; the node takes the next one")
            options.add_argument("--min-job-age", type=int, default=300, help="seconds a finished job stays in squeue")
            options.add_argument("--max-array-size", type=int, default=1001)
    given = vars(parser.parse_args(sys.argv[1:split]))
    action = given.pop("action")
    if (action == "with") != bool(command):
        parser.error("`with FOLDER -- COMMAND...` takes a command, and nothing else does")
    try:
        if action == "install":
            install()
        elif action == "down":
            Slurm(given["folder"].resolve(), socket.gethostname().partition(".")[0]).down()
        elif action == "up":
            print(f"export SLURM_CONF={up(**given).folder}/slurm.conf")
        else:
            return run_with(given.pop("folder"), command, **given)
    except (SlurmError, OSError) as error:
        print(f"one_node_slurm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
