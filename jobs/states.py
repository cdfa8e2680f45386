"""What has become of each run. The truth is, in this order: the result file, who works on it, what the last one left."""

import json
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from batchens import results
from batchens.files import write_text
from batchens.grid import Config
from batchens.run import Folders, Run, owner_alive, read_json

STATES = {
    "done": "a complete result is there",
    "running": "a live process works on it",
    "pending": "a live submission will come to it",
    "failed": "it ended with an error",
    "cancelled": "its submission was cancelled",
    "lost": "it was begun, is not finished, and nobody works on it: killed, out of memory, stopped",
    "damaged": "its result file is cut short or not its own",
    "missing": "nobody has tried it",
}
ALIVE = ("running", "pending")


@dataclass
class Submission:
    """A record of what was handed to a scheduler, in `runs/<experiment>/submissions/<name>/record.json`."""

    path: Path
    experiment: str
    cluster: str
    host: str
    submitted: float
    results: str
    """the folder that its runs write to"""
    elements: list[list[str]]
    """run ids of each array element"""
    jobs: dict[str, str] = field(default_factory=dict)
    """of each worker or array element: scheduler's id -> when the process was born, for a local one"""
    cancelled: bool = False

    def write(self) -> None:
        record = {name: value for name, value in asdict(self).items() if name != "path"}
        write_text(self.path, json.dumps(record, indent=1))

    def run_ids(self) -> set[str]:
        return {run_id for element in self.elements for run_id in element}

    def foreign(self) -> bool:
        """Say whether it was made on another host, whose processes can't be asked for from here."""
        return self.host != socket.gethostname()

    def dead_runs(self) -> set[str]:
        """Return the runs of elements that a worker took and died on."""
        dead = set()
        for number, element in enumerate(self.elements):
            taker = read_json(self.path.parent / "taken" / str(number))
            if taker and not owner_alive(taker):
                dead |= set(element)
        return dead

    def alive(self) -> bool:
        """Say whether any worker of this local submission still lives; from another host that can't be known: yes."""
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


def look(folders: Folders, experiment: str, configs: Mapping[str, Config]) -> list[RunState]:
    """Return the state of every run."""
    last: dict[str, Submission] = {}
    for submission in submissions(folders, experiment):
        last |= dict.fromkeys(submission.run_ids(), submission)
    current = {one.path: one for one in last.values()}
    alive = {path: one.alive() for path, one in current.items()}
    dead = {path: one.dead_runs() if alive[path] else set() for path, one in current.items()}
    states = []
    for config in configs.values():
        run = Run(experiment, config, folders)
        submitted = last.get(run.id)
        waits = submitted is not None and alive[submitted.path] and run.id not in dead[submitted.path]
        states.append(_state(run, submitted, waits))
    return states


def _state(run: Run, submission: Submission | None, waits: bool) -> RunState:
    damage = None
    if run.result.exists():
        damage = results.damage(run.result)
        if damage is None:
            return RunState(run, "done")
    progress = read_json(run.progress)
    if run.claim.exists():
        owner = read_json(run.claim)
        if owner and owner_alive(owner):
            return RunState(run, "running", progress=progress, owner=owner)
    failed, reason = _failure(run)
    if submission is not None and waits and failed < submission.submitted:
        return RunState(run, "pending", progress=progress)
    if damage is not None:
        return RunState(run, "damaged", damage)
    if failed:
        return RunState(run, "failed", reason, progress)
    if submission is not None and submission.cancelled:
        return RunState(run, "cancelled", progress=progress)
    if run.claim.exists() or run.checkpoint.exists() or submission is not None:
        return RunState(run, "lost", progress=progress)
    return RunState(run, "missing")


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
