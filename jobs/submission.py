"""Handing runs to a scheduler through submitit, so that no run is ever started twice."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import SoftFileLock, Timeout
from submitit.core.utils import FailedJobError, FailedSubmissionError

from batchens.files import check_writable
from batchens.run import Folders, Run, born, read_json
from jobs import clusters, experiments, schedulers
from jobs.clusters import Cluster
from jobs.element import Element, work
from jobs.schedulers import Unreachable
from jobs.states import ALIVE, LOCK, RunState, Submission, look, submissions

ENDING = 90  # seconds that killed jobs get to end: SLURM sends SIGKILL after 30, LSF after 20
ROOM = 64 * 2**20  # bytes that must fit: a VGG11's checkpoint with an optimizer's state has up to 110 MB, most have few
LOCK_WAIT = 120  # seconds; a submission holds the lock for as long as the scheduler takes to answer


@contextmanager
def alone(folders: Folders, experiment: str) -> Iterator[None]:
    """Let one process at a time submit or cancel runs of an experiment; a dead one's lock on this host is taken over."""
    folder = folders.runs / experiment
    check_writable(folder)
    lock = SoftFileLock(folder / LOCK)  # a file made with O_EXCL: holds on NFS, where flock may not
    try:
        lock.acquire(timeout=LOCK_WAIT, poll_interval=0.2)
    except Timeout:
        raise ValueError(
            f"one submission of {experiment} goes on at a time, however another has held {lock.lock_file} for {LOCK_WAIT} s; "
            "if it died on another host, delete that file"
        ) from None
    try:
        yield
    finally:
        lock.release()


def elements_of(todo: list[RunState], runs_per_job: int) -> list[list[str]]:
    ids = [state.run.id for state in todo]
    return [ids[first : first + runs_per_job] for first in range(0, len(ids), runs_per_job)]


def todo_of(states: list[RunState], only: Collection[str] | None = None) -> list[RunState]:
    """Return the runs to submit: those without a result and without a live process or job; with `only`, in these states."""
    open_ = [state for state in states if state.state not in ("done", *ALIVE) and not state.held]
    return [state for state in open_ if only is None or state.state in only]


def datasets_of(todo: Iterable[RunState]) -> set[str]:
    """Return the data sets of images that these runs learn."""
    return {state.run.config.dataset for state in todo if hasattr(state.run.config, "dataset")}


def unprepared(datasets: Iterable[str], folders: Folders) -> list[str]:
    """Return those whose images are not there decoded."""
    return sorted(name for name in datasets if not (folders.data / f"{name}.pt").exists())


def prepare_data(datasets: Iterable[str], folders: Folders) -> None:
    """Fetch and decode the images once, before many processes want them; in a process of its own, for it imports torch.

    Raises:
        ValueError: they can't be had; its text says what was tried and what to do.
    """
    for dataset in unprepared(datasets, folders):
        command = [sys.executable, "-m", "batchens.data.images", dataset, "--data", str(folders.data)]
        if subprocess.run(command).returncode:
            raise ValueError(
                f"the images of {dataset} must be there before an array is submitted; what hinders is said above"
            )


def submit(
    experiment: str,
    configs: dict[str, Any],
    cluster: Cluster,
    folders: Folders,
    max_parallel: int | None = None,
    runs_per_job: int = 1,
    only: Collection[str] | None = None,
) -> Submission | None:
    """Submit every run that has no result and is not alive; return the record, or None when there is nothing to do.

    With `only`, runs in these states alone. The record is on the disk before the scheduler hears of it, and has the job
    ids before the lock is given up: whoever submits next sees what is alive.
    """
    todo = todo_of(look(folders, experiment, configs), only)
    if not todo:
        return None
    check(experiment, cluster, folders)
    prepare_data(datasets_of(todo), folders)
    with alone(folders, experiment):
        _mend(folders, experiment)
        todo = todo_of(look(folders, experiment, configs), only)
        if not todo:
            return None
        elements = elements_of(todo, runs_per_job)
        arrays = []
        if cluster.scheduler != "local":
            arrays = chunks_of(elements, schedulers.ALL[cluster.scheduler].array_limit(), max_parallel)
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
        record = Submission(
            folders.runs / experiment / "submissions" / name / "record.json",
            experiment,
            cluster.name,
            cluster.scheduler,
            socket.gethostname(),
            {"pid": os.getpid(), "born": born(os.getpid())},
            time.time(),
            str(folders.results),
            elements,
        )
        record.folder.mkdir(parents=True)
        record.write()
        released = {state.run.id: _release(state) for state in todo}
        try:
            if cluster.scheduler == "local":
                _start_local(record, cluster, folders, clusters.local_workers(max_parallel, len(elements)))
            else:
                _submit_arrays(record, cluster, folders, arrays)
        finally:
            _settle(record, released)
        return record


def check(experiment: str, cluster: Cluster, folders: Folders) -> None:
    """See that what jobs will need is there.

    Raises:
        ValueError: a folder can't be written or is full; or see `check_site`.
    """
    check_writable(folders.results / experiment)
    check_writable(folders.runs / experiment, ROOM)  # a quota is not told by the file system's free space
    check_site(experiment, cluster, folders)


def check_site(experiment: str, cluster: Cluster, folders: Folders) -> None:
    """See that the scheduler can take a preset's jobs, and write nothing.

    Raises:
        ValueError: it is not there, has no such queue, a lower time limit, or an option can't be.
    """
    if cluster.scheduler == "local":
        return
    for name in ("data", "runs", "results"):
        if "%" in (path := str(getattr(folders, name))):  # schedulers put job ids for %j, %A and the like
            raise ValueError(f"--{name} must be a path without %, however: {path}")
    scheduler = schedulers.ALL[cluster.scheduler]
    scheduler.executor(folders.runs, cluster, experiment)  # refuses options that can't be
    most = scheduler.max_minutes(cluster)
    if most is not None and cluster.minutes > most:
        raise ValueError(
            f"--hours must be at most {most / 60:g}, the limit where preset {cluster.name} sends its jobs, however: "
            f"{cluster.hours:g}"
        )


def chunks_of(
    elements: list[list[str]], limit: int, max_parallel: int | None
) -> list[tuple[list[list[str]], int | None]]:
    """Cut elements into arrays that the site takes, each with its share of the runs at once."""
    chunks = [elements[first : first + limit] for first in range(0, len(elements), limit)]
    if max_parallel and max_parallel < len(chunks):
        raise ValueError(
            f"--max-parallel must be at least {len(chunks)}, for this site takes arrays of {limit} and limits each by itself, "
            f"however: {max_parallel}; --runs-per-job makes fewer elements"
        )
    return [
        (chunk, (max_parallel + number) // len(chunks) if max_parallel else None) for number, chunk in enumerate(chunks)
    ]


def job_name(record: Submission, chunk: int) -> str:
    """Return a name that no other array has, by which one is found again whose id was never written down."""
    return f"{record.experiment[:20]}-{record.name}-{chunk}"


def _submit_arrays(
    record: Submission, cluster: Cluster, folders: Folders, arrays: list[tuple[list[list[str]], int | None]]
) -> None:
    scheduler = schedulers.ALL[cluster.scheduler]
    logs = record.folder / "logs"
    logs.mkdir()
    element = Element(record.experiment, folders, cluster.minutes)
    try:
        for number, (chunk, parallel) in enumerate(arrays):
            executor = scheduler.executor(logs, cluster, job_name(record, number), parallel)
            try:
                with schedulers.outside():
                    jobs = executor.map_array(element, chunk)
            except BaseException:
                with suppress(Unreachable):  # what it took in spite of all ends by itself, for want of its pickle
                    scheduler.cancel_named(job_name(record, number))
                raise
            record.jobs |= dict.fromkeys((job.job_id for job in jobs), "")
            record.write()
    except BaseException as error:
        submitted = len(record.jobs)
        refused = isinstance(error, subprocess.SubprocessError | FailedSubmissionError | FailedJobError)
        if refused:  # else some of it may have begun: `_mend`
            record.elements = record.elements[:submitted]
            record.write()
            if not submitted:
                shutil.rmtree(record.folder, ignore_errors=True)
        if refused or isinstance(error, OSError):
            raise RuntimeError(
                f"{submitted} array elements were submitted, then {scheduler.submit_command} failed; the same command "
                f"submits the rest: {' '.join(str(error).split())}"
            ) from error
        raise


def _mend(folders: Folders, experiment: str) -> None:
    """Bring records to an end whose submitter died: cancel the array whose ids it could not write down, and see it end.

    A live one would hold the lock that we hold. Runs of that array may have begun, on hosts whose processes can't be seen
    from here; once they are in no record, no scheduler would be asked about them any more.

    Raises:
        Unreachable: the scheduler does not answer, or jobs have not ended yet; the record is left as it was.
    """
    for record in submissions(folders, experiment):
        if len(record.jobs) >= len(record.elements) or record.scheduler == "local":
            continue
        name = job_name(record, len({job.partition("_")[0] for job in record.jobs}))
        scheduler = schedulers.ALL[record.scheduler]
        scheduler.cancel_named(name)
        known = experiments.runs_of(experiment)
        cut = [run_id for element in record.elements[len(record.jobs) :] for run_id in element]
        runs = [Run(experiment, known[run_id], folders, run_id) for run_id in cut if run_id in known]
        until = time.monotonic() + ENDING
        while True:
            claims = {run.claim: read_json(run.claim).get("job_id", "") for run in runs}
            claims = {path: job for path, job in claims.items() if "_" in job}  # an element's, not of a run by hand
            asked = scheduler.ask(dict.fromkeys(claims.values(), record.submitted)) if claims else {}
            if not scheduler.alive_named(name) and all(job.state == "ended" for job in asked.values()):
                break
            if time.monotonic() > until:
                raise Unreachable(
                    f"a submission was cut short and its jobs are cancelled, but {ENDING} s later not all have ended: {name}; "
                    "submit again when they have"
                )
            time.sleep(1)
        for path in claims:
            path.unlink(missing_ok=True)
        for run in runs:
            for path in (run.cancelled, run.failure, run.claim):
                _put_back(path)
        record.elements = record.elements[: len(record.jobs)]
        record.write()
        print(
            f"cancelled: {len(cut)} runs of {record.folder}, a submission that was cut short; they can be submitted anew"
        )


def _release(state: RunState) -> list[Path]:
    """Put aside what a dead job left: its claim, which other hosts can't see to be dead, and the marks of how it ended.

    By a disk's clock that is ahead of ours, an old failure would pass for one of the new job, which then skips the run.
    Return what was there: it is put back if the scheduler does not take the run.
    """
    run, there = state.run, []
    for path in (run.cancelled, run.failure, run.claim):
        if path != run.claim or (state.owner and read_json(path) == state.owner):
            with suppress(FileNotFoundError):
                path.rename(_aside(path))
                there.append(path)
    return there


def _settle(record: Submission, released: Mapping[str, list[Path]]) -> None:
    """Delete what `_release` put aside of runs that were handed over, and put back what it did of those that were refused."""
    job_of = dict.fromkeys(record.run_ids(), "local") if record.scheduler == "local" else record.job_of()
    for run_id, paths in released.items():
        for path in paths:
            if run_id not in job_of:
                _put_back(path)
            elif job_of[run_id]:  # else nobody knows yet: `_mend` puts it back
                _aside(path).unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.before")


def _put_back(path: Path) -> None:
    with suppress(FileNotFoundError, FileExistsError):
        os.link(_aside(path), path)
    _aside(path).unlink(missing_ok=True)


def _start_local(record: Submission, cluster: Cluster, folders: Folders, workers: int) -> None:
    """Start workers that share the elements. submitit's LocalExecutor would start every element at once."""
    import submitit

    queue = record.folder / "taken"
    queue.mkdir()
    gpus = clusters.local_gpus()  # submitit's own choice takes numbers alone, and counts from the machine's first
    threads = str(max(1, clusters.cores() // workers))
    executor = submitit.LocalExecutor(folder=record.folder / "logs")
    with (
        _environment(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", threads)),
        _detached(record.folder / "workers.log"),
    ):
        for worker in range(workers):
            executor.update_parameters(
                timeout_min=cluster.minutes,
                stderr_to_stdout=True,
            )
            gpu = gpus[worker % len(gpus)] if gpus else os.environ.get("CUDA_VISIBLE_DEVICES")
            job = executor.submit(work, record.experiment, record.elements, queue, folders, gpu=gpu)
            record.jobs[job.job_id] = born(int(job.job_id))
            record.write()


@dataclass
class Stopped:
    """What `cancel` did, as run ids; `alone` says why others that are alive go on."""

    now: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    """at the end of their epoch, for their job has other runs to do"""
    alone: set[str] = field(default_factory=set)


def cancel(experiment: str, configs: Mapping[str, Any], chosen: Collection[str], folders: Folders) -> Stopped:
    """Stop those of the chosen runs that are alive. What was trained up to the last whole epoch is kept.

    `configs` are all runs of the experiment. A run is marked as cancelled, so that no job takes it up and the one that is at
    it leaves it at the end of its epoch; a job with nothing else to do is ended at once.
    """
    stopped, ended = Stopped(), dict[str, set[str]]()
    with alone(folders, experiment):
        states = look(folders, experiment, configs)
        records = submissions(folders, experiment)
        job_of = {record.path: record.job_of() for record in records}
        home = {job: record for record in records for job in record.jobs}
        stopping = []
        for state in states:
            record = state.submission
            # a run may be in a newer job than the one that holds it
            holder = home.get(state.job_id) if state.state == "running" else record
            if state.state not in ALIVE or state.run.id not in chosen:
                continue
            if record is not None and record.foreign():
                stopped.alone.add(f"{record.folder} was submitted on {record.host}; cancel it there")
            elif holder is None:
                process = f"process {state.owner.get('pid')} on {state.node}"
                dead = f"; if that is dead, delete {state.run.claim}" if state.unasked else ""
                stopped.alone.add(f"{state.run.id} was started by hand, as {process}{dead}")
            else:
                state.run.folder.mkdir(parents=True, exist_ok=True)
                state.run.cancelled.touch()
                stopping.append((state, holder))
        going_on = {state.run.id for state in states if state.state in ALIVE} - {one.run.id for one, _ in stopping}
        mates = {record.path: _mates(record) for record in records}
        for state, holder in stopping:
            at_once = going_on.isdisjoint(mates[holder.path][state.run.id])
            (stopped.now if at_once or state.state == "pending" else stopped.later).append(state.run.id)
            jobs = {state.job_id} if at_once else set()
            last = state.submission
            if last and last.scheduler != "local" and going_on.isdisjoint(mates[last.path][state.run.id]):
                jobs.add(job_of[last.path][state.run.id])
            for job in jobs - {""}:
                ended.setdefault(home[job].scheduler, set()).add(job)
        for name, jobs in ended.items():
            if name == "local":
                for pid in jobs:
                    if born(int(pid)) == home[pid].jobs[pid]:
                        os.kill(int(pid), signal.SIGTERM)
            else:
                schedulers.ALL[name].cancel(sorted(jobs))
    return stopped


def _mates(record: Submission) -> dict[str, set[str]]:
    """Return run id -> the runs that the same job will come to; a local worker may come to all of them."""
    groups = [record.run_ids()] if record.scheduler == "local" else [set(element) for element in record.elements]
    return {run_id: group for group in groups for run_id in group}


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _detached(log: Path) -> Iterator[None]:
    """Let processes started meanwhile outlive this terminal and hold nothing of it.

    They ignore Ctrl-C and hang-up, and write to `log`: with our own output inherited, a pipe behind `jobs submit` would
    stay open, and its reader wait, until the last worker ends.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    kept = {stream: os.dup(stream) for stream in (0, 1, 2)}
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull, "rb") as nothing, open(log, "ab") as output:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
        for number, handler in before.items():
            signal.signal(number, handler)
