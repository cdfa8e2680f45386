"""What is asked of a scheduler, in the same words for SLURM and LSF: submit an array, say what became of jobs, stop some.

A job that is an element of an array is called ARRAY_INDEX, as submitit and SLURM do. One question answers for all jobs.
"""

import itertools
import os
import re
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jobs import lsf
from jobs.clusters import Cluster

YOUNG = 120  # seconds after its submission in which bjobs may leave out a job
FOREVER = 1000  # requeues at the time limit: `Element` ends a run that makes no progress, nothing else has to


class Unreachable(RuntimeError):
    """The scheduler gave no answer. Nothing is known of the jobs then: not that they live, not that they ended."""


@dataclass(frozen=True)
class Job:
    """What a scheduler says of a job."""

    state: str
    """pending, running or ended"""
    end: str = ""
    """of one that ended, the state of its unfinished runs: timeout, memory, cancelled or lost"""
    detail: str = ""
    """for people"""
    node: str = ""
    told: bool = True
    """the scheduler said so; not: it has ended, for the scheduler knows nothing of it"""


class Scheduler(ABC):
    """A scheduler whose commands are on PATH."""

    name: str
    submit_command: str

    def there(self) -> bool:
        return shutil.which(self.submit_command) is not None

    def executor(self, folder: Path, cluster: Cluster, name: str, parallel: int | None = None) -> Any:
        """Return submitit's executor, which refuses options that it doesn't know with a ValueError."""
        import submitit

        if not self.there():
            raise ValueError(
                f"preset {cluster.name} wants {self.submit_command} on PATH, as on a login node of a cluster, however it is not"
            )
        options = {**self.defaults(), **cluster.options}
        if isinstance(more := cluster.options.get("additional_parameters"), dict):
            options["additional_parameters"] = {**self.defaults().get("additional_parameters", {}), **more}
        # on a node without affinity torch would take every core, whatever the job asked for
        options["setup"] = [f"export OMP_NUM_THREADS={cluster.cpus}", *cluster.setup]
        if parallel:
            options["array_parallelism"] = parallel
        try:
            executor = submitit.AutoExecutor(folder, cluster=self.name, **{f"{self.name}_max_num_timeout": FOREVER})
            executor.update_parameters(
                name=name,
                timeout_min=cluster.minutes,
                mem_gb=cluster.mem_gb,
                cpus_per_task=cluster.cpus,
                gpus_per_node=cluster.gpus or None,
                stderr_to_stdout=True,
                **{f"{self.name}_{key}": value for key, value in options.items()},
            )
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"preset {cluster.name}: {error}") from error
        return executor

    @abstractmethod
    def defaults(self) -> dict[str, Any]:
        """Return the executor's options that a preset need not give."""

    @abstractmethod
    def script(self, folder: Path, cluster: Cluster, name: str, count: int, parallel: int | None) -> str:
        """Return what would be submitted for an array of `count` jobs."""

    @abstractmethod
    def array_limit(self) -> int:
        """Return how many jobs one array may have here."""

    @abstractmethod
    def max_minutes(self, cluster: Cluster) -> float | None:
        """Return the longest time limit where the preset's jobs would go, None when there is none or it is not told."""

    @abstractmethod
    def ask(self, jobs: Mapping[str, float]) -> dict[str, Job]:
        """Return what became of each job, given when it was submitted (seconds since 1970).

        Raises:
            Unreachable: the scheduler gave no answer.
        """

    @abstractmethod
    def cancel(self, jobs: Sequence[str]) -> None:
        """Stop jobs; one that has ended already is no error. Raises Unreachable when the scheduler didn't take it."""

    @abstractmethod
    def cancel_named(self, name: str) -> None:
        """Stop the jobs of this name, if there are any."""

    @abstractmethod
    def alive_named(self, name: str) -> bool:
        """Say whether any job of this name has not ended. Raises Unreachable when the scheduler gave no answer."""


def _run(command: Sequence[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired as late:
        raise Unreachable(f"{command[0]} gave no answer within {timeout:g} s") from late
    except OSError as error:
        raise Unreachable(f"{command[0]} could not be started: {error}") from error


# --------------------------------------------------------------------------------------------------------- SLURM


@contextmanager
def outside() -> Iterator[None]:
    """Hide the job that this process may be in: sbatch would hand its SLURM_* on to the new one, whose srun then fails.

    submitit's clean_env also takes away SLURM_CONF and SBATCH_*, which are the user's.
    """
    own = ("SLURM_CONF", "SLURM_JWT")
    hidden = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith("SLURM_") and name not in own}
    try:
        yield
    finally:
        os.environ.update(hidden)


class Slurm(Scheduler):
    """SLURM, with accounting or without: squeue knows what lives and, for MinJobAge (300 s), how the others ended; sacct
    is asked for older ones where it answers. A job that neither knows has ended."""

    name, submit_command = "slurm", "sbatch"

    LIVE: ClassVar[dict[str, str]] = {
        "PENDING": "pending", "CONFIGURING": "pending", "REQUEUED": "pending", "REQUEUE_HOLD": "pending",
        "REQUEUE_FED": "pending", "RESV_DEL_HOLD": "pending", "SPECIAL_EXIT": "pending",
        "RUNNING": "running", "COMPLETING": "running", "SUSPENDED": "running", "STOPPED": "running",
        "RESIZING": "running", "SIGNALING": "running", "STAGE_OUT": "running",
    }  # fmt: skip
    ENDS: ClassVar[dict[str, str]] = {
        "TIMEOUT": "timeout",
        "DEADLINE": "timeout",
        "OUT_OF_MEMORY": "memory",
        "CANCELLED": "cancelled",
    }

    def executor(self, folder: Path, cluster: Cluster, name: str, parallel: int | None = None) -> Any:
        executor = super().executor(folder, cluster, name, parallel)
        if "srun_args" not in cluster.options:  # which from 22.05 on does not inherit it from sbatch
            executor._executor.parameters["srun_args"] = [f"--cpus-per-task={cluster.cpus}"]
        if "wckey" not in cluster.options:
            executor._executor.parameters["wckey"] = None  # submitit's own key is refused by sites that track such keys
        return executor

    def defaults(self) -> dict[str, Any]:
        return {
            "array_parallelism": 100_000,  # submitit's own is 256
            "additional_parameters": {"requeue": True},  # where JobRequeue=0 a job can't be requeued without it
        }

    def script(self, folder: Path, cluster: Cluster, name: str, count: int, parallel: int | None) -> str:
        executor = self.executor(folder, cluster, name, parallel or count)._executor
        if count > 1:
            executor.parameters["map_count"] = count
        return str(executor._make_submission_file_text(executor._submitit_command_str, ""))

    def array_limit(self) -> int:
        size = read_config(_run(["scontrol", "show", "config"]).stdout).get("MaxArraySize", "")
        # The largest index is one less, and the first is 0. A started job waits 60 s for its pickle, which submitit puts in
        # place after the submission: with 10,000 of them that holds on a slow disk too.
        return min(int(size), 10_000) if size.isdecimal() else 1000

    def max_minutes(self, cluster: Cluster) -> float | None:
        wanted = cluster.options.get("partition")
        limits = {}
        ran = _run(["sinfo", "--all", "--noheader", "--format=%P|%l"])
        if ran.returncode:
            raise Unreachable(f"sinfo failed: {ran.stderr.strip()}")
        for line in ran.stdout.splitlines():
            partition, _, limit = line.partition("|")
            limits[partition.rstrip("*")] = limit
            if partition.endswith("*") and wanted is None:
                wanted = partition.rstrip("*")
        if wanted is None or not limits:
            return None
        chosen = str(wanted).split(",")
        if unknown := [one for one in chosen if one not in limits]:
            raise ValueError(
                f"preset {cluster.name}: partition must be one of {', '.join(limits)}; however: {', '.join(unknown)}"
            )
        minutes = [slurm_minutes(limits[one]) for one in chosen]
        known = [one for one in minutes if one is not None]
        return max(known) if len(known) == len(minutes) else None

    def ask(self, jobs: Mapping[str, float]) -> dict[str, Job]:
        seen: dict[str, Job] = {}
        parents = sorted({job.partition("_")[0] for job in jobs})
        for batch in lsf.batches(parents, 200):
            ran = _run(
                ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r", f"--jobs={','.join(batch)}"]
            )
            if ran.returncode and "Invalid job id" not in ran.stderr:
                raise Unreachable(f"squeue failed: {ran.stderr.strip() or f'exit code {ran.returncode}'}")
            for line in ran.stdout.splitlines():
                job, state, node, reason = [*line.split("|", 3), "", "", ""][:4]
                if job in jobs:
                    seen[job] = self._job(state, node, reason)
        if forgotten := [
            job for job in jobs if job not in seen
        ]:  # the controller that gave a job its id knows it while it lives
            past = self._accounted(forgotten)
            gone = Job("ended", "lost", "SLURM has forgotten how it ended", told=False)
            seen |= {job: past.get(job, gone) for job in forgotten}
        return seen

    def _job(self, state: str, node: str, reason: str) -> Job:
        word = state.split()[0].rstrip("+") if state else ""
        why = f"SLURM says {word}" + (f", {reason}" if reason not in ("", "None") else "")
        if word in self.LIVE:
            return Job(self.LIVE[word], detail=why if word != "RUNNING" else "", node=node)
        return Job("ended", self.ENDS.get(word, "lost"), why, node)

    def _accounted(self, jobs: Sequence[str]) -> dict[str, Job]:
        seen = {}
        for batch in lsf.batches(sorted({job.partition("_")[0] for job in jobs}), 200):
            ran = _run(
                [
                    "sacct",
                    "--noheader",
                    "--allocations",
                    "--parsable2",
                    "--format=JobID,State,NodeList,Reason",
                    f"--jobs={','.join(batch)}",
                ]
            )
            for line in ran.stdout.splitlines():  # nothing where accounting is off
                job, state, node, reason = [*line.split("|", 3), "", "", ""][:4]
                seen[job] = self._job(state, node, reason)
        return seen

    def cancel(self, jobs: Sequence[str]) -> None:
        for batch in lsf.batches(list(jobs), 500):
            ran = _run(["scancel", *batch])
            if ran.returncode and "Invalid job id" not in ran.stderr:
                raise Unreachable(f"scancel failed: {ran.stderr.strip() or f'exit code {ran.returncode}'}")

    def cancel_named(self, name: str) -> None:
        if (ran := _run(["scancel", f"--jobname={name}"])).returncode:
            raise Unreachable(f"scancel failed: {ran.stderr.strip()}")

    def alive_named(self, name: str) -> bool:
        if (ran := _run(["squeue", "--noheader", f"--name={name}"])).returncode:
            raise Unreachable(f"squeue failed: {ran.stderr.strip()}")
        return bool(ran.stdout.strip())


def read_config(text: str) -> dict[str, str]:
    """Read lines of NAME = VALUE, as `scontrol show config`, `bparams` and `badmin showconf` print them."""
    return dict(re.findall(r"^\s*(\w+)\s*=[ \t]*(.*?)\s*$", text, re.MULTILINE))


def slurm_minutes(limit: str) -> float | None:
    """Read a time limit as sinfo writes it, such as 1-00:00:00, 2:00 or infinite (None)."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit.strip())
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 1440 * days + 60 * hours + minutes + seconds / 60


# ----------------------------------------------------------------------------------------------------------- LSF


class Lsf(Scheduler):
    """IBM LSF and its relatives, by `jobs/lsf.py`."""

    name, submit_command = "lsf", "bsub"

    ENDS: ClassVar[dict[str, str]] = {"time limit": "timeout", "memory": "memory", "cancelled": "cancelled"}
    SETTLE = 5.0
    """seconds after which a job that was seen ended is looked at again: one that is requeued shows EXIT or DONE for a
    second or two"""

    def __init__(self) -> None:
        self._watcher = lsf.LsfInfoWatcher()

    def defaults(self) -> dict[str, Any]:
        return {}

    def script(self, folder: Path, cluster: Cluster, name: str, count: int, parallel: int | None) -> str:
        executor = self.executor(folder, cluster, name)._executor
        return str(
            executor._make_submission_file_text(
                executor._submitit_command_str, "00000000", count, parallel if count > 1 else None
            )
        )

    def array_limit(self) -> int:
        for option in ("-a", "-l"):  # the second is all that a descendant of an early LSF knows
            size = re.match(r"\d+", read_config(self._try("bparams", option)).get("MAX_JOB_ARRAY_SIZE", ""))
            if size:
                return min(int(size.group()), 1000)
        return 1000

    def max_minutes(self, cluster: Cluster) -> float | None:
        queues = cluster.options.get("queue")
        chosen = [queues] if isinstance(queues, str) else list(queues or [])
        if not chosen:
            return None
        told = read_queues(self._try("bqueues", "-l"))
        if told and (unknown := [one for one in chosen if one not in told]):
            raise ValueError(
                f"preset {cluster.name}: queue must be one of {', '.join(told)}; however: {', '.join(unknown)}"
            )
        limits = [re.match(r"[\d.]+", told.get(one, {}).get("RUNLIMIT", "")) for one in chosen]
        minutes = [float(limit.group()) for limit in limits if limit]
        return max(minutes) if len(minutes) == len(chosen) else None

    def _try(self, *command: str) -> str:
        if not shutil.which(command[0]):
            return ""
        ran = lsf.run(command, timeout=30)
        if ran.code is None:
            raise Unreachable(ran.err)
        return ran.out + ran.err

    def ask(self, jobs: Mapping[str, float]) -> dict[str, Job]:
        infos = self._infos(list(jobs))
        if ended := [job for job, info in infos.items() if lsf.STATES.get(info["Stat"]) in lsf.ENDED]:
            time.sleep(self.SETTLE)
            infos |= self._infos(ended)
        unexplained = [
            job
            for job, info in infos.items()
            if lsf.STATES.get(info["Stat"]) in lsf.ENDED and not (info["ExitCode"] or info["ExitReason"])
        ]
        for job, info in self._watcher.history(unexplained).items() if unexplained else ():
            infos[job] = {**infos[job], **{name: value for name, value in info.items() if value}}
        seen = {job: self._job(info) for job, info in infos.items()}
        forgotten = [job for job in jobs if job not in seen]
        old = [job for job in forgotten if time.time() - jobs[job] > YOUNG]
        past = self._watcher.history(old) if old else {}
        gone: dict[str, bool] = {}
        for job in old:
            if job in past:
                seen[job] = self._job(past[job])
                if seen[job].state == "ended":
                    continue
            parent = job.partition("_")[0]
            if parent not in gone:
                answer = self._watcher.query(parent)
                gone[parent] = answer.sure and not answer.jobs
            # of an array that is still there bjobs leaves single elements out without a word, unless asked for each
            if gone[parent] or self._watcher.query(lsf.lsf_id(job)).sure:
                seen[job] = Job("ended", "lost", "LSF has forgotten how it ended", told=False)
        return seen | {job: Job("pending") for job in forgotten if job not in seen}

    def _infos(self, jobs: Sequence[str]) -> dict[str, lsf.Info]:
        wanted, found = set(jobs), dict[str, lsf.Info]()
        for batch in lsf.batches(sorted({job.partition("_")[0] for job in jobs}), 200):
            answer = self._watcher.query(*batch)
            if not answer.heard:
                raise Unreachable(f"bjobs failed: {answer.problem}")
            found.update((job, info) for job, info in answer.jobs.items() if job in wanted)
        return found

    def _job(self, info: lsf.Info) -> Job:
        state = lsf.STATES.get(info["Stat"], "RUNNING")
        if state in lsf.ENDED:
            reason = lsf.exit_reason(info)
            return Job("ended", self.ENDS.get(reason.kind, "lost"), " ".join(reason.detail.split()), info["NodeList"])
        return Job(
            state.lower(), detail="" if info["Stat"] == "RUN" else f"LSF says {info['Stat']}", node=info["NodeList"]
        )

    def cancel(self, jobs: Sequence[str]) -> None:
        try:
            lsf.cancel(jobs)
        except RuntimeError as error:
            raise Unreachable(str(error)) from error

    def cancel_named(self, name: str) -> None:
        try:
            lsf.cancel_named(f"{name}*")
        except RuntimeError as error:
            raise Unreachable(str(error)) from error

    def alive_named(self, name: str) -> bool:
        answer = self._watcher.query("-J", f"{name}*")
        if not answer.heard:
            raise Unreachable(f"bjobs failed: {answer.problem}")
        return any(lsf.STATES.get(info["Stat"]) not in lsf.ENDED for info in answer.jobs.values())


def read_queues(text: str) -> dict[str, dict[str, str]]:
    """Read `bqueues -l`: of each queue its status, its limits by name, REQUEUE_EXIT_VALUES and TERMINATE action."""
    queues = {}
    for name, body in re.findall(r"^QUEUE: +(\S+)(.*?)(?=^QUEUE: |\Z)", text, re.MULTILINE | re.DOTALL):
        found = {"is": status.group()} if (status := re.search(r"(Open|Closed):\w+", body)) else {}
        limits = body.partition("SCHEDULING PARAMETERS")[0].rpartition("MAXIMUM LIMITS")[2]  # default ones stand before
        for names, values in itertools.pairwise(limits.splitlines()):
            words = names.split()
            each = re.findall(r"[\d.]+(?: (?:min|[KMGTPE]B?)\b)?(?: of \S+)?", values)
            if words and len(each) == len(words) and all(word.endswith("LIMIT") for word in words):
                found |= zip(words, each, strict=True)
        found |= re.findall(r"^\s*(REQUEUE_EXIT_VALUES|TERMINATE): *(\S.*?)\s*$", body, re.MULTILINE)
        queues[name] = found
    return queues


ALL: dict[str, Scheduler] = {"slurm": Slurm(), "lsf": Lsf()}
