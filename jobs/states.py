"""What has become of each run. The truth is, in this order: the result file, who works on it, what the last one left."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
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

    def alive(self) -> bool:
        """Say whether any worker of this local submission still lives; from another host that can't be known: yes."""
        owners = ({"host": self.host, "pid": int(pid), "born": when, "job_id": ""} for pid, when in self.jobs.items())
        return any(owner_alive(owner) for owner in owners)


def submissions(folders: Folders, experiment: str) -> list[Submission]:
    """Return the records of all submissions of an experiment, the oldest first."""
    paths = (folders.runs / experiment / "submissions").glob("*/record.json")
    records = (Submission(path=path, **record) for path in paths if (record := read_json(path)))
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
    alive = {path: one.alive() for path, one in {one.path: one for one in last.values()}.items()}
    states = []
    for config in configs.values():
        run = Run(experiment, config, folders)
        submitted = last.get(run.id)
        states.append(_state(run, submitted, submitted is not None and alive[submitted.path]))
    return states


def _state(run: Run, submission: Submission | None, alive: bool) -> RunState:
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
    failed = run.failure.exists()
    if submission is not None and alive:
        failed = failed and run.failure.stat().st_mtime >= submission.submitted
    if submission is not None and alive and not failed:
        return RunState(run, "pending", progress=progress)
    if damage is not None:
        return RunState(run, "damaged", damage)
    if failed:
        reason = run.failure.read_text(errors="replace").partition("\n")[0]
        return RunState(run, "failed", reason, progress)
    if submission is not None and submission.cancelled:
        return RunState(run, "cancelled", progress=progress)
    if run.claim.exists() or run.checkpoint.exists() or submission is not None:
        return RunState(run, "lost", progress=progress)
    return RunState(run, "missing")


def counts(states: Iterable[RunState]) -> dict[str, int]:
    """Return how many runs are in each state, the states that occur only."""
    found = [state.state for state in states]
    return {name: found.count(name) for name in STATES if name in found}
