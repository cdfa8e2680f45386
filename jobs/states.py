"""What has become of each run. The truth is, in this order: the result file, the scheduler, what the last one left."""

import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
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
        record = {name: value for name, value in asdict(self).items() if name != "path"}
        write_text(self.path, json.dumps(record, indent=1))

    def run_ids(self) -> set[str]:
        return {run_id for element in self.elements for run_id in element}

    def element_of(self, run_id: str) -> list[str]:
        return next(element for element in self.elements if run_id in element)

    def job_of(self) -> dict[str, str]:
        """Return run id -> the scheduler's id of its job, '' for those that were not handed over."""
        ids = [*self.jobs, *[""] * (len(self.elements) - len(self.jobs))]
        return {run_id: job for job, element in zip(ids, self.elements, strict=False) for run_id in element}

    def being_submitted(self) -> bool:
        """Say whether its submitter still lives; on another host that can't be known: yes."""
        return len(self.jobs) < len(self.elements) and owner_alive({"host": self.host, "job_id": "", **self.submitter})

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
        damage = results.damage(run.result) if run.result.name in written else None
        done = run.result.name in written and damage is None
        state = RunState(run, "done" if done else "damaged" if damage else "missing", damage or "")
        state.submission = last.get(run_id)
        states.append(state)
        if not done and (state.submission or run_id in begun):
            open_.append(state)
    if open_:
        _look_closer(open_, records, ask)
    return states


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return set()


def _look_closer(states: list[RunState], records: list[Submission], ask: Ask) -> None:
    """Find out what became of runs that were begun or submitted and have no result."""
    local = {record.path: record for state in states if (record := state.submission) and record.scheduler == "local"}
    alive = {path: record.alive() for path, record in local.items()}
    takers = {path: record.takers() if alive[path] else {} for path, record in local.items()}
    job_of = {record.path: record.job_of() for record in records if record.scheduler != "local"}
    home = {job: record for record in records if record.scheduler != "local" for job in record.jobs}
    claims = {state.run.id: read_json(state.run.claim) for state in states}

    wanted: dict[str, None] = {}
    for state in states:
        if (record := state.submission) and record.scheduler != "local":
            state.job_id = job_of[record.path][state.run.id]
        wanted |= dict.fromkeys([state.job_id, claims[state.run.id].get("job_id", "")])
    seen = _ask(records, {job: home[job] for job in wanted if job in home}, ask)

    for state in states:
        run, record, claim = state.run, state.submission, claims[state.run.id]
        state.progress, state.owner = read_json(run.progress), claim
        job = seen.get(state.job_id)
        if claim and _alive(claim, seen):
            state.state, state.reason = "running", ""
            state.job_id, state.node = claim["job_id"] or state.job_id, claim["host"]
            continue
        if record is None:
            waits = False
        elif record.scheduler == "local":
            taker = takers[record.path].get(run.id)
            waits = alive[record.path] and (taker is None or owner_alive(taker))
        elif state.job_id:
            waits = job is not None and job.state != "ended"
        else:
            waits = record.being_submitted()
        failed, reason = _failure(run)
        cancelled = run.cancelled.exists()
        if waits and record is not None and failed < record.submitted and not cancelled:
            state.state, state.reason = "pending", job.detail if job else ""
        elif state.state == "damaged":
            pass
        elif cancelled:
            state.state = "cancelled"
        elif failed:
            state.state, state.reason = (
                "timeout" if reason.startswith(("OutOfTime", "Uncompleted")) else "failed",
                reason,
            )
        elif job is not None:
            state.state, state.reason, state.node = job.end, job.detail, job.node
        elif claim or run.checkpoint.exists() or (record is not None and record.scheduler == "local"):
            state.state, state.reason = "lost", "its process is gone: killed, or out of memory"


def _alive(claim: dict[str, Any], seen: Mapping[str, Job]) -> bool:
    job = seen.get(claim.get("job_id", ""))
    if claim["host"] == socket.gethostname() or job is None:
        return owner_alive(claim)
    return job.state == "running"  # a pending one was put back into the queue: its process is dead


def _ask(records: Iterable[Submission], jobs: Mapping[str, Submission], ask: Ask) -> dict[str, Job]:
    """Ask the schedulers for jobs. How a job ended is noted beside its record, for schedulers forget."""
    known: dict[str, Job] = {}
    for path in {record.folder / "ended.json" for record in jobs.values()}:
        known |= {job: Job("ended", *said) for job, said in read_json(path).items()}
    for scheduler in {record.scheduler for record in jobs.values()}:
        asked = {job: one.submitted for job, one in jobs.items() if one.scheduler == scheduler and job not in known}
        if not asked:
            continue
        seen = ask(scheduler, asked)
        known |= seen
        for record in {jobs[job].path: jobs[job] for job, answer in seen.items() if answer.state == "ended"}.values():
            path = record.folder / "ended.json"
            new = {
                job: [answer.end, answer.detail, answer.node]
                for job, answer in seen.items()
                if answer.state == "ended" and jobs[job].path == record.path
            }
            write_text(path, json.dumps(read_json(path) | new))
    return known


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
