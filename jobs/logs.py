"""The log of one run: its part of what its array element, or its worker here, has printed."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from submitit.core.utils import JobPaths

from jobs import lsf
from jobs.element import BEGIN
from jobs.states import ALIVE, RunState, submissions


def show(look: Callable[[], RunState], follow: bool) -> None:
    """Print the log of a run, and the error that it ended with; with `follow`, until it is no longer alive.

    Raises:
        ValueError: it has none; the text says why.
    """
    state = look()
    shown, head = 0, ""
    while True:
        text = of_run(state)
        if text.partition("\n")[0] != head:  # a requeued run begins a new part
            shown, head = 0, text.partition("\n")[0]
        print(text[shown:], end="", flush=True)
        shown = len(text)
        if not follow or state.state not in ALIVE:
            break
        time.sleep(1)
        state = look()
    if state.run.failure.exists():
        print(f"\n{state.run.failure}:\n{state.run.failure.read_text(errors='replace')}", end="")
    elif not shown:
        raise ValueError(f"{state.run.id} must have begun to have a log, however it is {state.state}")
    if state.reason and state.state != "failed":
        print(f"\n{state.state}: {state.reason}", file=sys.stderr)


def of_run(state: RunState) -> str:
    """Return the last part of the newest log that is about this run; '' when there is none yet."""
    for path in reversed(_files(state)):
        parts = path.read_text(errors="replace").split(BEGIN)
        for part in reversed(parts[1:]):
            if part.startswith(state.run.id):
                return BEGIN + part
    record = state.submission
    if record and record.scheduler == "lsf" and state.state == "running":  # LSF may keep it until the job ends
        said = lsf.run(["bpeek", lsf.lsf_id(state.job_id)]).out
        return BEGIN + said.rpartition(BEGIN)[2] if BEGIN + state.run.id in said else said
    return ""


def _files(state: RunState) -> list[Path]:
    """Return the logs in which the run may be, the oldest first."""
    paths = []
    for record in submissions(state.run.folders, state.run.experiment):
        if state.run.id in record.run_ids():
            jobs = list(record.jobs) if record.scheduler == "local" else [record.job_of()[state.run.id]]
            paths += [JobPaths(record.folder / "logs", job_id=job, task_id=0).stdout for job in jobs if job]
    return sorted((path for path in paths if path.exists()), key=lambda path: path.stat().st_mtime)
