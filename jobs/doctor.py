"""What a site allows and whether a preset fits it, by asking its scheduler's own commands and, if wanted, by two short jobs.

Every question is one command with a time-out. What is refused, absent or silent is reported as not told.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

from batchens.files import write_text
from batchens.run import Folders
from jobs import clusters, lsf, schedulers
from jobs.clusters import Cluster
from jobs.schedulers import Job, Scheduler, Unreachable

ASK_S = 30.0  # bacct reads years of accounting at some sites
PROBE_S = 900.0
POLL_S = 5.0
WRITE_MB = 64
EXIT_CODE = 7
WATCHED = ("SIGUSR2", "SIGTERM", "SIGINT", "SIGCONT", "SIGXCPU")
NODE_COMMANDS = {"slurm": ("scontrol", "srun"), "lsf": ("brequeue", "bsub")}


@dataclass
class Report:
    """Prints what is told as it comes and keeps what follows from it for the end."""

    cluster: Cluster
    changes: dict[str, tuple[Any, str]] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    relative: bool = False
    """of LSF, and not IBM's: it misreads or refuses options that IBM added"""

    def tell(self, topic: str, text: object) -> None:
        print(f"  {topic:20} " + f"\n  {'':20} ".join(str(text).rstrip().splitlines() or [""]), flush=True)

    def change(self, key: str, value: object, why: str) -> None:
        """Propose another value; `options.NAME` is an option of the executor's."""
        self.changes.setdefault(key, (value, why))

    def fit(self, kind: str, chosen: Sequence[str], minutes: Mapping[str, float | None]) -> None:
        """Compare the preset's queues or partitions and its time with what was told: name -> time limit."""
        if unknown := [name for name in chosen if minutes and name not in minutes]:
            self.doubts.append(f"{kind} must be one of {', '.join(minutes)}; however: {', '.join(unknown)}")
        known = [limit for name in chosen if (limit := minutes.get(name)) is not None]
        if not known or len(known) < len(chosen):
            return
        most, where = round(max(known) / 60, 2), f"{kind} {' or '.join(chosen)}"
        if self.cluster.hours > most:
            self.change("hours", most, f"the limit of {where}")
        if self.cluster.max_hours not in (None, most):
            self.change("max_hours", most, f"the limit of {where}; the preset says {self.cluster.max_hours:g}")

    def conclude(self) -> None:
        print("\nwhat this comes to:" if self.doubts or self.changes else f"\nthe preset {self.cluster.name} fits")
        print(*(f"  - {doubt}\n" for doubt in self.doubts), sep="", end="")
        if not self.changes:
            print("nothing to change")
            return
        print(f"\nwhat to put into your own file, {clusters.own_file()}:\n\n[{self.cluster.name}]")
        for key in sorted(self.changes, key=lambda key: key.startswith("options.")):  # a table of a table comes last
            value, why = self.changes[key]
            print(f"{key} = {_toml(value)}    # {why}")


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def examine(cluster: Cluster, folders: Folders, *, probe: bool, consent: bool) -> None:
    """Print what the site allows, submit the probe if it is wanted, and say what the preset should change.

    Raises:
        ValueError: the scheduler is not there, or the probe is not agreed to.
        Unreachable: the scheduler is there and gives no answer.
    """
    scheduler = schedulers.ALL.get(cluster.scheduler)
    if scheduler and not scheduler.there():
        raise ValueError(
            f"preset {cluster.name} wants {scheduler.submit_command} on PATH, as on a cluster's login node, however it is not"
        )
    if probe and not scheduler:
        raise ValueError(f"--probe must go to slurm or lsf, however preset {cluster.name} is {cluster.scheduler}")
    if probe and not consent and not sys.stdin.isatty():
        raise ValueError("--yes must be given to submit the probe unasked, however no terminal is there to ask at")
    report = Report(cluster)
    print(f"preset {cluster.name}: {cluster.scheduler}, asked on {socket.gethostname()}")
    {"local": ask_local, "slurm": ask_slurm, "lsf": ask_lsf}[cluster.scheduler](report)
    ask_here(report, folders)
    if scheduler:
        ask_submission(report, scheduler, folders)
    if probe and scheduler:
        run_probe(report, scheduler, folders, consent)
    report.conclude()
    if scheduler and not probe:
        print(f"\nhow signals and requeueing behave there: python -m jobs doctor --cluster {cluster.name} --probe")


def ask(*command: str, text: str = "") -> lsf.Ran:
    if not shutil.which(command[0]):
        return lsf.Ran(127, "", f"{command[0]} is not on PATH")
    return lsf.run(command, text, timeout=ASK_S)


def ask_first(*command: str) -> lsf.Ran:
    """Ask, and raise when no answer comes: the other questions would not be answered either, after a time-out each."""
    if (ran := ask(*command)).code is None:
        raise Unreachable(f"a scheduler must answer to be examined, however: {ran.text}")
    return ran


def not_told(command: str, ran: lsf.Ran) -> str:
    said = next((line.strip() for line in ran.text.splitlines() if ran.code != 0), "")
    return "not told: " + (said if said.startswith(command.split()[0]) else f"{command}: {said}" if said else command)


# ---------------------------------------------------------------------------------------------------------- here

WRITE = """
import shutil, sys, pathlib
from batchens.files import check_writable
try:
    check_writable(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
except ValueError as error:
    sys.exit(str(error))
print(f"{shutil.disk_usage(sys.argv[1]).free / 2**30:.1f} GB free")
"""


def ask_local(report: Report) -> None:
    report.tell("cores", clusters.cores())
    ran = ask("nvidia-smi", "-L")
    report.tell("GPUs", ran.out if ran.code == 0 else not_told("nvidia-smi", ran))
    for topic, name in (("memory", "SC_PHYS_PAGES"), ("free memory", "SC_AVPHYS_PAGES")):
        if name in os.sysconf_names:
            report.tell(topic, f"{os.sysconf(name) * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GB")


def ask_here(report: Report, folders: Folders) -> None:
    """Tell of the folders and of Python."""
    away = report.cluster.scheduler != "local"
    for name, folder in (("data", folders.data), ("runs", folders.runs), ("results", folders.results)):
        ran = ask(sys.executable, "-c", WRITE, str(folder), str(WRITE_MB * 2**20))  # a disk of the network may hang
        if ran.code == 0:
            report.tell(f"{name} folder", f"{folder}: {WRITE_MB} MB written, {ran.out}")
        else:
            report.tell(f"{name} folder", ran.text or f"{folder}: exit code {ran.code}")
            fine = ", which is fine if the images are there" if name == "data" else ""
            report.doubts.append(f"{name} can't be written to{fine}")
    for command in ("getquota_zhome.sh", "getquota_work3.sh"):
        if shutil.which(command):
            report.tell(command, ask(command).text)
    if away and folders.runs.resolve().is_relative_to(Path.home().resolve()):
        report.doubts.append("runs is in your home, whose quota is small at most sites; $BATCHENS_RUNS moves it")
    where = "; whether the nodes see it can't be known from here" if away else ""
    report.tell("Python", f"{platform.python_version()}, {sys.executable}{where}")
    try:
        report.tell("torch", importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        report.tell("torch", "not installed")
        report.doubts.append("torch must be installed in this environment, however it is not")


def ask_submission(report: Report, scheduler: Scheduler, folders: Folders) -> None:
    """Say whether the preset's options are accepted, as far as that is known without a submission."""
    try:
        script = scheduler.script(folders.runs / "doctor", report.cluster, "doctor", 2, None)
    except ValueError as error:
        report.tell("options", error)
        report.doubts.append("the preset's options are refused")
        return
    if scheduler.name != "slurm":
        report.tell("options", "all known; whether the site takes them only a submission shows")
        return
    with schedulers.outside():
        ran = ask("sbatch", "--test-only", text=script)
    report.tell("options", "accepted by sbatch --test-only" if ran.code == 0 else ran.text)
    if ran.code != 0:
        report.doubts.append("sbatch does not take the preset")


# --------------------------------------------------------------------------------------------------------- SLURM


def ask_slurm(report: Report) -> None:
    options = report.cluster.options
    ran = ask_first("scontrol", "show", "config")
    config = schedulers.read_config(ran.out)

    def told(*names: str) -> str:
        known = [f"{name} {config[name]}" for name in names if name in config]
        return ", ".join(known) or not_told(f"scontrol show config: {' and '.join(names)}", ran)

    report.tell("version", told("SLURM_VERSION"))
    limits, default = dict[str, float | None](), ""
    listed = ask("sinfo", "--noheader", "--format=%P|%l|%a|%D|%G|%m|%c")
    for line in listed.out.splitlines():
        name, limit, state, nodes, gpus, memory, cores = (line.split("|") + [""] * 7)[:7]
        default = name.rstrip("*") if name.endswith("*") else default
        limits[name.rstrip("*")] = schedulers.slurm_minutes(limit)
        report.tell(f"partition {name}", f"{limit}, {state}, {nodes} nodes of {cores} cores, {memory} MB, GPUs: {gpus}")
    if not limits:
        report.tell("partitions", not_told("sinfo", listed))
    report.fit("partition", [name for name in str(options.get("partition") or default).split(",") if name], limits)
    report.tell("array", told("MaxArraySize"))
    report.tell("ended jobs are kept", told("MinJobAge"))
    past = ask("sacct", "--noheader", "--allocations", "--starttime=now", "--format=JobID")
    off = "accounting is off" if "accounting storage is disabled" in past.text else not_told("sacct", past)
    report.tell("history", "sacct answers" if past.code == 0 else f"sacct: {off}")
    report.tell("requeue", told("JobRequeue"))
    more = options.get("additional_parameters") or {}
    if config.get("JobRequeue") == "0" and "requeue" not in more:
        report.change("options.additional_parameters", {**more, "requeue": True}, "JobRequeue is 0 at this site")
    delay = options.get("signal_delay_s", 90)
    report.tell("at the time limit", f"SIGUSR2 {delay} s before; {told('KillWait', 'OverTimeLimit')}")
    report.tell("memory", told("SelectType", "SelectTypeParameters", "DefMemPerNode", "DefMemPerCPU", "MaxMemPerNode"))
    who = f"user={os.environ.get('USER') or os.getuid()}"
    mine = ask("sacctmgr", "--noheader", "--parsable2", "show", "assoc", who, "format=Account,QOS,GrpTRES,MaxJobs")
    report.tell("your limits", mine.out.strip() or "not told: sacctmgr has nothing of you")


# ----------------------------------------------------------------------------------------------------------- LSF


def ask_lsf(report: Report) -> None:
    cluster, options = report.cluster, report.cluster.options
    listed = ask_first("bqueues", "-l")
    identity = ask("lsid")
    version = identity.out.strip().partition("\n")[0] if identity.code == 0 else ""
    report.tell("version", version or not_told("lsid", identity))
    report.relative = bool(version) and not re.search("IBM|Spectrum|Platform", identity.out)
    queues = schedulers.read_queues(listed.out)
    for name, queue in queues.items():
        report.tell(
            f"queue {name}", ", ".join(f"{key} {value}" for key, value in queue.items()) or "nothing is told of it"
        )
    if not queues:
        report.tell("queues", not_told("bqueues -l", listed))
    chosen = [wanted] if isinstance(wanted := options.get("queue"), str) else list(wanted or [])
    limits = {name: re.match(r"[\d.]+", queue.get("RUNLIMIT", "")) for name, queue in queues.items()}
    report.fit("queue", chosen, {name: float(found.group()) if found else None for name, found in limits.items()})
    for name in chosen:
        if (action := queues.get(name, {}).get("TERMINATE")) and "warning_min" not in options and not report.relative:
            report.change("options.warning_min", 5, f"{name} ends jobs by {action}, with no SIGUSR2 before it")

    daemon, params = ask("badmin", "showconf", "mbd"), ask("bparams", "-a")
    params = params if params.code == 0 else ask("bparams", "-l")  # all that a descendant of an early LSF knows
    config = schedulers.read_config(daemon.out) | schedulers.read_config(params.out)

    def told(name: str, command: str = "bparams", ran: lsf.Ran = params) -> str:
        return f"{name} {config[name]}" if name in config else not_told(f"{command}: {name}", ran)

    report.tell("array", told("MAX_JOB_ARRAY_SIZE"))
    report.tell("ended jobs are kept", told("CLEAN_PERIOD"))
    for command in ("bhist", "bacct"):
        ran = ask(command, "-l", "1")
        answers = ran.code == 0 or re.search("no matching job", ran.text, re.IGNORECASE)
        report.tell("history", f"{command} answers" if answers else not_told(command, ran))
    there = shutil.which("brequeue")
    report.tell("requeue", f"brequeue is {there}" if there else "brequeue is not on PATH")
    if not (there or options.get("requeue_exit_code") or report.relative):
        report.change("options.requeue_exit_code", 85, "brequeue is not on PATH, and bsub -Q does without it")
    report.tell("at the time limit", f"SIGUSR2; {told('JOB_TERMINATE_INTERVAL')}; {told('ABS_RUNLIMIT')}")
    report.tell("memory unit", told("LSF_UNIT_FOR_LIMITS", "badmin showconf", daemon))
    task, slot = "RESOURCE_RESERVE_PER_TASK", "RESOURCE_RESERVE_PER_SLOT"  # the second is its name in older versions
    name = slot if slot in config and task not in config else task
    report.tell("memory per core", f"{told(name)} (Y: of a core, N: of a job)")
    mode = {"Y": "per_core", "N": "per_job"}.get(config.get(name, "")[:1].upper())
    if mode and cluster.mem_gb and cluster.cpus > 1 and mode != options.get("mem_mode", "per_core"):
        report.change("options.mem_mode", mode, told(name))
    mine = ask("busers")
    report.tell("your limits", mine.out if mine.code == 0 else not_told("busers", mine))
    if report.relative:
        refused = [key for key in ("warning_min", "requeue_exit_code", "job_group") if options.get(key)]
        report.doubts += [f"{version} is not IBM's, and may not take what {key} adds to bsub" for key in refused]
        if cluster.mem_gb and options.get("mem_unit", "MB"):
            report.change("options.mem_unit", "", "no LSF of IBM's: a unit of memory is refused")
        if cluster.gpus:
            report.change("gpus", 0, "no LSF of IBM's: -gpu is refused")


# --------------------------------------------------------------------------------------------------- inside a job


def facts(scheduler: str) -> dict[str, Any]:
    """Return what can be seen from inside a job."""
    ran = lsf.run(["nvidia-smi", "-L"], timeout=20)
    return {
        "time": time.time(),
        "job": JobEnvironment().job_id,
        "host": socket.gethostname(),
        "python": f"{platform.python_version()}, {sys.executable}",
        "cores": clusters.cores(),
        "gpus": ran.out.splitlines() if ran.code == 0 else [],
        "torch": _torch_on_gpu() if ran.code == 0 else "",
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "commands": {command: shutil.which(command) for command in NODE_COMMANDS[scheduler]},
        "variables": {k: v for k, v in os.environ.items() if k.startswith(("LSB_", "LSF_", "SLURM_", "SUBMITIT_"))},
    }


def _torch_on_gpu() -> str:
    """Return what is wrong with the GPU by torch, which a driver can be too old for; '' if nothing is."""
    ran = lsf.run([sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"], timeout=300)
    return "" if ran.code == 0 else (ran.text.strip().splitlines() or ["it does not answer"])[-1]


@dataclass
class Waits:
    """Waits for its time limit and writes down the signals; started again, it says so and ends."""

    scheduler: str
    folder: Path
    seconds: float

    def __call__(self) -> None:
        number = 1 + len(list(self.folder.glob("start-*.json")))
        for name in WATCHED:
            self._watch(name)
        write_text(self.folder / f"start-{number}.json", json.dumps(facts(self.scheduler), indent=1))
        until = time.time() + self.seconds
        while number == 1 and time.time() < until:
            time.sleep(0.2)

    def _watch(self, name: str) -> None:
        before = signal.getsignal(getattr(signal, name))

        def note(number: int, frame: FrameType | None) -> None:
            with open(self.folder / "signals.jsonl", "a") as file:
                file.write(json.dumps({"signal": name, "time": time.time()}) + "\n")
            if name == "SIGUSR2" and callable(before):
                before(number, frame)  # submitit's, which has the job requeued

        signal.signal(getattr(signal, name), note)

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)


@dataclass
class Exits:
    """Ends with an exit code of its own, to see what the scheduler makes of it."""

    scheduler: str
    folder: Path

    def __call__(self) -> None:
        write_text(self.folder / "exits.json", json.dumps(facts(self.scheduler), indent=1))
        os._exit(EXIT_CODE)


# --------------------------------------------------------------------------------------------------------- probe


def probe_minutes(cluster: Cluster) -> int:
    """Return the probe's time limit: long enough that no warning falls into the start of Python."""
    if cluster.scheduler == "slurm":  # which may warn up to a minute early
        return 1 + math.ceil(cluster.options.get("signal_delay_s", 90) / 60)
    return 2 + (cluster.options.get("warning_min") or 0)


def run_probe(report: Report, scheduler: Scheduler, folders: Folders, consent: bool) -> None:
    minutes = probe_minutes(report.cluster)
    cluster = replace(report.cluster, hours=minutes / 60, max_hours=None)
    place = folders.runs / "doctor" / f"{datetime.now():%Y%m%dT%H%M%S}"
    print(
        f"\nthe probe: an array of two jobs to {cluster.name}, each of {minutes} minutes, {cluster.gpus} GPUs, {cluster.cpus} "
        f"cores, {cluster.mem_gb or '?'} GB.\nThe first waits for its time limit and is requeued once; the second ends at once "
        f"with exit code {EXIT_CODE}.\nThey write to {place}."
    )
    if not consent and input("submit it? [y/N] ").strip().lower() not in ("y", "yes"):
        print("nothing was submitted")
        return
    place.mkdir(parents=True)
    name, names, told = f"doctor-{place.name}", list[str](), dict[str, Job]()
    executor = scheduler.executor(place, cluster, name)
    try:
        with schedulers.outside(), executor.batch():
            waits = executor.submit(Waits(scheduler.name, place, 60 * minutes + 180))
            exits = executor.submit(Exits(scheduler.name, place))
        names = [waits.job_id, exits.job_id]
        wait(scheduler, names, place, told)
    except (FailedSubmissionError, FailedJobError) as error:  # the second is how submitit tells of sbatch's
        report.tell("submission", error)
        report.doubts.append("the submission was refused")
    finally:  # also on Ctrl-C
        if len(told) < 2 or any(one.state != "ended" for one in told.values()):
            print(f"  cancelling {' and '.join(names) or f'what may be there of {name}'}", flush=True)
            try:
                scheduler.cancel(names) if names else scheduler.cancel_named(name)
            except Unreachable as error:
                print(f"jobs named {name} may be left, for they can't be cancelled: {error}", file=sys.stderr)
    if told:
        draw(report, place, minutes, names, told)


def wait(scheduler: Scheduler, names: Sequence[str], place: Path, told: dict[str, Job]) -> None:
    """Note in `told` what becomes of the jobs, until both have ended: seen twice, for a requeued one may look so at first."""
    began, before, ends = time.time(), "", 0
    while ends < 2 and time.time() - began < PROBE_S:
        time.sleep(POLL_S)
        try:
            told |= scheduler.ask(dict.fromkeys(names, began))
            said = ", ".join(f"{name} {told[name].state} {told[name].node}".rstrip() for name in names)
        except Unreachable as error:
            said = str(error)
        ends = ends + 1 if len(told) == 2 and all(one.state == "ended" for one in told.values()) else 0
        if (line := f"{said}, the first started {len(list(place.glob('start-*.json')))} times") != before:
            print(f"  {time.time() - began:4.0f} s: {line}", flush=True)
        before = line


def draw(report: Report, place: Path, minutes: int, names: Sequence[str], told: Mapping[str, Job]) -> None:
    """Draw the conclusions from what the probe's jobs recorded and what the scheduler says of them."""
    starts = [json.loads(path.read_text()) for path in sorted(place.glob("start-*.json"))]
    waits, exits, log = told[names[0]], told[names[1]], place / f"{names[0]}_0_log.out"
    if not starts:
        report.tell("first job", f"{waits.state}, {waits.detail}")
        report.doubts.append(
            f"the first job did not start within {PROBE_S / 60:.0f} minutes and was cancelled"
            if waits.state == "pending"
            else f"the first job recorded nothing: does the node see {sys.executable} and {place}? Its log may tell: {log}"
        )
        return
    first, again = starts[0], starts[1:]
    ibm = report.cluster.scheduler == "lsf" and not report.relative
    report.tell("node", f"{first['host']}, {first['cores']} cores, Python {first['python']}; it sees the runs folder")
    report.tell("GPUs", "\n".join([f"CUDA_VISIBLE_DEVICES is {first['visible']}", *first["gpus"]]))
    if first["torch"]:
        report.doubts.append(f"torch can't use the GPU: {first['torch']}")
    if report.cluster.gpus and not (first["visible"] or first["gpus"]):
        report.doubts.append("the job asked for a GPU and sees none")
    for command, path in first["commands"].items():
        report.tell("PATH", f"{command} is {path or 'not there'}")
    lines = (place / "signals.jsonl").read_text().splitlines() if (place / "signals.jsonl").exists() else []
    for one in map(json.loads, lines):
        age = one["time"] - first["time"]
        when = f"{abs(late):.0f} s {'before' if late < 0 else 'after'}" if (late := age - 60 * minutes) else "at"
        report.tell(one["signal"], f"came {age:.0f} s after the start, {when} the limit of {minutes} minutes")
    if not any("SIGUSR2" in line for line in lines):
        report.tell("SIGUSR2", "did not come")
        report.doubts.append("no warning came before the end: a run is not requeued, only submitted again")
        if ibm:
            report.change("options.warning_min", 5, "no SIGUSR2 came at the limit")
    if again:
        same = again[0]["job"] == first["job"] == names[0]
        words = f"works, under {'the same' if same else 'another'} id and index, {again[0]['job']}"
        report.tell("requeue", f"{words}, {again[0]['time'] - first['time']:.0f} s after the first start")
        marks = {k: v for k, v in again[0]["variables"].items() if first["variables"].get(k) != v and "START" in k}
        report.tell("second start", f"told by {marks}" if marks else "no variable tells that it is one")
        if not same:
            report.doubts.append("a requeued job has another id here, under which it will not be found")
    else:
        report.tell("requeue", f"not seen; the first job {waits.state}, {waits.detail}")
        report.doubts.append(f"the first job was not requeued at its time limit; its log: {log}")
        if ibm and lines:
            report.change("options.requeue_exit_code", 85, "brequeue failed on the node, and bsub -Q does without it")
    recorded = "" if (place / "exits.json").exists() else "; it recorded nothing"
    report.tell(f"exit code {EXIT_CODE}", f"told as: {exits.state}, {exits.end}, {exits.detail}{recorded}")
    if exits.state == "ended" and exits.end != "lost":
        report.doubts.append(f"a job's own exit code {EXIT_CODE} is told as {exits.end}: states may mislead here")
