"""Handing runs to a scheduler through submitit, so that no run is ever started twice."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import SoftFileLock, Timeout

from batchens.files import check_writable
from batchens.run import Folders, born
from jobs import clusters
from jobs.clusters import Cluster
from jobs.element import work
from jobs.states import ALIVE, RunState, Submission, look, submissions

LOCK_WAIT = 120  # seconds; a submission holds the lock for as long as the scheduler takes to answer


@contextmanager
def alone(folders: Folders, experiment: str) -> Iterator[None]:
    """Let one process at a time submit or cancel runs of an experiment; a dead one's lock on this host is taken over."""
    folder = folders.runs / experiment
    check_writable(folder)
    lock = SoftFileLock(folder / "submit.lock")  # a file made with O_EXCL: holds on NFS, where flock may not
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


def elements_of(todo: list[str], runs_per_job: int) -> list[list[str]]:
    return [todo[first : first + runs_per_job] for first in range(0, len(todo), runs_per_job)]


def todo_of(states: list[RunState]) -> list[str]:
    """Return the runs to submit: those without a result and without a live process or submission."""
    return [state.run.id for state in states if state.state not in ("done", "running", "pending")]


def prepare_data(datasets: set[str], folders: Folders) -> None:
    """Fetch and decode the images once, before many processes want them; in a process of its own, for it imports torch.

    Raises:
        ValueError: they can't be had; its text says what was tried and what to do.
    """
    for dataset in sorted(name for name in datasets if not (folders.data / f"{name}.pt").exists()):
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
    max_parallel: int | None,
    runs_per_job: int,
) -> Submission | None:
    """Submit every run that has no result and is not alive; return the record, or None when there is nothing to do.

    The record is on the disk before the scheduler hears of it, and has the job ids before the lock is given up: whoever
    submits next sees what is alive.
    """
    if not todo_of(look(folders, experiment, configs)):
        return None
    prepare_data({config.dataset for config in configs.values() if hasattr(config, "dataset")}, folders)
    check_writable(folders.results / experiment)
    with alone(folders, experiment):
        todo = todo_of(look(folders, experiment, configs))
        if not todo:
            return None
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
        folder = folders.runs / experiment / "submissions" / name
        folder.mkdir(parents=True)
        elements = elements_of(todo, runs_per_job)
        record = Submission(
            folder / "record.json",
            experiment,
            cluster.name,
            socket.gethostname(),
            time.time(),
            str(folders.results),
            elements,
        )
        record.write()
        _start_local(record, cluster, folders, clusters.local_workers(max_parallel, len(elements)))
        return record


def _start_local(record: Submission, cluster: Cluster, folders: Folders, workers: int) -> None:
    """Start workers that share the elements. submitit's LocalExecutor would start every element at once."""
    import submitit

    folder = record.path.parent
    queue = folder / "taken"
    queue.mkdir()
    gpus = clusters.local_gpus()
    threads = str(max(1, clusters.cores() // workers))
    executor = submitit.LocalExecutor(folder=folder / "logs")
    with (
        _environment(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", threads)),
        _detached(folder / "workers.log"),
    ):
        for worker in range(workers):
            executor.update_parameters(
                timeout_min=60 * cluster.timeout_hours,
                stderr_to_stdout=True,
                gpus_per_node=min(gpus, 1),
                visible_gpus=[worker % gpus] if gpus else (),
            )
            job = executor.submit(work, record.experiment, record.elements, queue, folders)
            record.jobs[job.job_id] = born(int(job.job_id))
            record.write()


def cancel(experiment: str, configs: dict[str, Any], folders: Folders) -> list[str]:
    """Stop the live submissions that hold any of these runs; return the ids of the unfinished runs that were stopped.

    A worker is told by SIGTERM, ends at once, and is waited for; its runs keep their last checkpoint.
    """
    stopped: list[str] = []
    with alone(folders, experiment):
        for submission in submissions(folders, experiment):
            if not submission.alive() or not configs.keys() & submission.run_ids():
                continue
            if submission.foreign():
                print(f"left alone: {submission.path.parent} was submitted on {submission.host}; cancel it there")
                continue
            unfinished = {state.run.id for state in look(folders, experiment, configs) if state.state in ALIVE}
            for pid, when in submission.jobs.items():
                if born(int(pid)) == when:
                    os.kill(int(pid), signal.SIGTERM)
            deadline = time.monotonic() + 30
            while submission.alive() and time.monotonic() < deadline:
                time.sleep(0.1)
            if submission.alive():
                raise RuntimeError(
                    f"the workers {', '.join(submission.jobs)} of {submission.path.parent} do not end; kill them"
                )
            submission.cancelled = True
            submission.write()
            stopped += sorted(submission.run_ids() & unfinished)
        return stopped


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
