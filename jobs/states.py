"""What has become of each run. The truth is, in this order: the result file, the scheduler, what the last one left."""

import json
import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from batchens import results
from batchens.files import write_text
from batchens.grid import Config
from batchens.run import Folders, Run, owner_alive, read_json
from jobs import schedulers
from jobs.schedulers import Job

STATES = {
    "done": "a complete result is there",
    "running": "a live process works on it",
    "pending": "a live job will come to it",
    "failed": "it ended with an error",
    "timeout": "its job was ended at the time limit",
    "memory": "its job was ended for want of memory",
    "cancelled": "it was cancelled",
    "lost": "it was begun or submitted, is not finished, and nobody works on it: killed, or its node died",
    "damaged": "its result file is cut short or not its own",
    "missing": "nobody has tried it",
}
ALIVE = ("running", "pending")
LOCK = "submit.lock"
RETRIED = ("failed", "timeout", "memory", "lost", "damaged")

Ask = Callable[[str, Mapping[str, float]], dict[str, Job]]


@dataclass
class Submission:
    """A record of what was handed to a scheduler, in `runs/<experiment>/submissions/<name>/record.json`."""

    path: Path
    experiment: str
    cluster: str
    scheduler: str
    host: str
    submitter: dict[str, Any]
    """the process that hands it over: pid, and when that was born"""
    submitted: float
    results: str
    """the folder that its runs write to"""
    elements: list[list[str]]
    """run ids of each array element"""
    jobs: dict[str, str] = field(default_factory=dict)
    """local: process id of each worker -> when it was born; else: the job of each element, in order -> ''"""

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def folder(self) -> Path:
        return self.path.parent

    def write(self) -> None:
        # written after each array: with an indent, or through asdict, 10,000 elements take a third of a second each time
        record = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "path"}
        write_text(self.path, json.dumps(record))

    def run_ids(self) -> set[str]:
        return {run_id for element in self.elements for run_id in element}

    def job_of(self) -> dict[str, str]:
        """Return run id -> the scheduler's id of its job, '' for those that were not handed over."""
        ids = [*self.jobs, *[""] * (len(self.elements) - len(self.jobs))]
        return {run_id: job for job, element in zip(ids, self.elements, strict=False) for run_id in element}

    def being_submitted(self) -> bool:
        """Say whether its submitter is still at it: then it holds the lock, and lives or is on another host."""
        lock = self.path.parents[2] / LOCK
        owner = {"host": self.host, "job_id": "", **self.submitter}
        return len(self.jobs) < len(self.elements) and lock.exists() and owner_alive(owner)

    # of a local one

    def foreign(self) -> bool:
        """Say whether its processes are on another host and can't be asked for from here."""
        return self.scheduler == "local" and self.host != socket.gethostname()

    def takers(self) -> dict[str, dict[str, Any]]:
        """Return run id -> the worker that took its element."""
        taken = self.folder / "taken"
        owners = {number: read_json(taken / str(number)) for number in range(len(self.elements))}
        return {run_id: owner for number, owner in owners.items() if owner for run_id in self.elements[number]}

    def alive(self) -> bool:
        """Say whether any worker still lives; from another host that can't be known: yes."""
        owners = ({"host": self.host, "pid": int(pid), "born": when, "job_id": ""} for pid, when in self.jobs.items())
        return any(owner_alive(owner) for owner in owners)


def submissions(folders: Folders, experiment: str) -> list[Submission]:
    """Return the records of all submissions of an experiment into this results folder, the oldest first."""
    needed = {each.name for each in fields(Submission)} - {"path"}
    records = []
    for path in (folders.runs / experiment / "submissions").glob("*/record.json"):
        record = read_json(path)
        if needed <= record.keys() and record["results"] == str(folders.results):
            records.append(Submission(path=path, **{name: record[name] for name in needed}))
    return sorted(records, key=lambda record: record.submitted)


@dataclass
class RunState:
    """A run and what is known of it."""

    run: Run
    state: str
    reason: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    owner: dict[str, Any] = field(default_factory=dict)
    """who works on it, or did and is dead: host, process, scheduler's job, since when (seconds since 1970)"""
    submission: Submission | None = None
    """the last one that it was in"""
    job_id: str = ""
    node: str = ""
    unasked: bool = False
    """it is taken for alive, as its process is on another host and no scheduler is known to have started it"""
    held: bool = False
    """it was cancelled, and its job still lives: until that has ended, nobody else may take it up"""


def ask(scheduler: str, jobs: Mapping[str, float]) -> dict[str, Job]:
    return schedulers.ALL[scheduler].ask(jobs)


def look(folders: Folders, experiment: str, configs: Mapping[str, Config], ask: Ask = ask) -> list[RunState]:
    """Return the state of every run. Each scheduler is asked once, for the jobs of unfinished runs only.

    Raises:
        Unreachable: a scheduler that has to be asked gave no answer.
    """
    records = submissions(folders, experiment)
    last = {run_id: record for record in records for run_id in record.run_ids()}
    written, begun = _names(folders.results / experiment), _names(folders.runs / experiment)
    states, open_ = [], []
    for run_id, config in configs.items():
        run = Run(experiment, config, folders, run_id)
        there = f"{run_id}.csv" in written
        damage = _damage(run.result) if there else None
        done = there and damage is None
        state = RunState(run, "done" if done else "damaged" if damage else "missing", damage or "")
        state.submission = last.get(run_id)
        states.append(state)
        if not done and (state.submission or run_id in begun):
            open_.append(state)
    if open_:
        _look_closer(open_, begun, records, ask)
    for state in open_:  # of those that nobody works on some may have been finished since we began to look
        if state.state not in (*ALIVE, "damaged") and state.run.done():
            state.state, state.reason = "done", ""
    return states


_whole: dict[Path, tuple[int, int]] = {}


def _damage(path: Path) -> str | None:
    """Return why a file is no complete result; one that was found complete is read again when it has changed only."""
    status = path.stat()
    if _whole.get(path) == (status.st_mtime_ns, status.st_size):
        return None
    damage = results.damage(path)
    if damage is None:
        _whole[path] = (status.st_mtime_ns, status.st_size)
    return damage


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return set()


def _look_closer(states: list[RunState], begun: set[str], records: list[Submission], ask: Ask) -> None:
    """Find out what became of runs that were begun (have a folder) or submitted, and have no result."""
    local = {record.path: record for state in states if (record := state.submission) and record.scheduler == "local"}
    alive = {path: record.alive() or record.being_submitted() for path, record in local.items()}
    takers = {path: record.takers() if alive[path] else {} for path, record in local.items()}
    job_of = {record.path: record.job_of() for record in records if record.scheduler != "local"}
    home = {job: record for record in records if record.scheduler != "local" for job in record.jobs}

    wanted: dict[str, None] = {}
    for state in states:
        state.owner = read_json(state.run.claim) if state.run.id in begun else {}
        holder = state.owner.get("job_id", "")
        if (record := state.submission) and record.scheduler != "local":
            state.job_id = job_of[record.path][state.run.id]
            if holder:  # of a job whose id its submitter did not live to write down
                home.setdefault(holder, record)
        wanted |= dict.fromkeys([state.job_id, holder])
    # what holds a run on another host is asked for again, though it was seen to end: it may have been put back by hand
    elsewhere = {one.owner["job_id"] for one in states if one.owner and one.owner["host"] != socket.gethostname()}
    seen = _ask({job: home[job] for job in wanted if job in home}, elsewhere, ask)
    for state in states:
        record, there = state.submission, state.run.id in begun
        if there:
            state.progress = read_json(state.run.progress)
        if state.owner and _alive(state.owner, seen):
            job = seen.get(state.owner["job_id"])
            state.state, state.reason = "running", job.detail if job else ""  # such as: its host can't be reached
            state.unasked = job is None and state.owner["host"] != socket.gethostname()
            state.job_id, state.node = state.owner["job_id"] or state.job_id, state.owner["host"]
            continue
        if record is None:
            waits = False
        elif record.scheduler == "local":
            taker = takers[record.path].get(state.run.id)
            waits = alive[record.path] and (taker is None or owner_alive(taker))
        elif state.job_id:
            waits = seen[state.job_id].state != "ended"
        else:
            waits = record.being_submitted()
        _judge(state, there, waits, seen.get(state.job_id))


def _judge(state: RunState, there: bool, waits: bool, job: Job | None) -> None:
    """Set the state of a run that nobody works on just now; `there`: it has a folder; `waits`: its job lives."""
    run, since = state.run, state.submission.submitted if state.submission else 0.0
    failed, reason = _failure(run) if there else (0.0, "")
    cancelled = there and run.cancelled.exists()
    state.held = cancelled and waits
    if waits and not cancelled and failed < since:
        state.state, state.reason = "pending", job.detail if job else ""
    elif state.state == "damaged":
        pass
    elif cancelled:
        state.state = "cancelled"
    elif failed and (job is None or failed >= since):
        late = reason.startswith(("OutOfTime", "UncompletedJobError"))
        state.state, state.reason = "timeout" if late else "failed", reason
    elif job is not None:
        state.state, state.reason, state.node = job.end or "lost", job.detail, job.node
    elif (
        state.owner
        or (there and run.checkpoint.exists())
        or (state.submission and state.submission.scheduler == "local")
    ):
        by_hand = not state.owner and state.submission is None  # its process gave the run up in order
        state.state = "lost"
        state.reason = (
            "stopped by hand; `jobs run` goes on with it"
            if by_hand
            else "its process is gone: killed, or out of memory"
        )


def _alive(claim: dict[str, Any], seen: Mapping[str, Job]) -> bool:
    job = seen.get(claim.get("job_id", ""))
    if claim["host"] == socket.gethostname() or job is None:
        return owner_alive(claim)
    return job.state == "running"  # a pending one was put back into the queue: its process is dead


def _ask(jobs: Mapping[str, Submission], fresh: Collection[str], ask: Ask) -> dict[str, Job]:
    """Ask the schedulers for jobs. How a job ended is noted beside its record and asked once, for schedulers forget."""
    known: dict[str, Job] = {}
    for record in {one.path: one for one in jobs.values()}.values():
        path = record.folder / "ended.json"
        known |= {job: Job("ended", *said) for job, said in read_json(path).items()}
    for scheduler in {record.scheduler for record in jobs.values()}:
        asked = {
            job: one.submitted
            for job, one in jobs.items()
            if one.scheduler == scheduler and (job in fresh or job not in known)
        }
        seen = ask(scheduler, asked) if asked else {}
        ended: dict[Path, dict[str, list[str]]] = {}
        for job, answer in seen.items():
            if answer.told or job not in known:
                known[job] = answer
            if answer.state == "ended" and answer.told:
                path = jobs[job].folder / "ended.json"
                ended.setdefault(path, {})[job] = [answer.end, answer.detail, answer.node]
        for path, new in ended.items():
            with suppress(OSError):  # a full or read-only disk must not hide what was found out
                write_text(path, json.dumps(read_json(path) | new))
    return {job: answer for job, answer in known.items() if job in jobs}


def _failure(run: Run) -> tuple[float, str]:
    """Return when the run failed, 0 if it did not, and the reason in a line."""
    try:
        return run.failure.stat().st_mtime, run.failure.read_text(errors="replace").partition("\n")[0]
    except FileNotFoundError:  # or just removed by who takes the run up again
        return 0.0, ""


def counts(states: Iterable[RunState]) -> dict[str, int]:
    """Return how many runs are in each state, the states that occur only."""
    found = [state.state for state in states]
    return {name: found.count(name) for name in STATES if name in found}
