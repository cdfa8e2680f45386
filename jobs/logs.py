"""The log of one run: its part of what its array element, or its worker here, has printed."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from submitit.core.utils import JobPaths

from jobs import lsf
from jobs.element import BEGIN
from jobs.states import ALIVE, RunState, submissions

PEEK_S = 30  # between two calls of bpeek, which asks the job's node
_peeked: dict[str, tuple[float, str]] = {}


def show(look: Callable[[], RunState], follow: bool) -> None:
    """Print the log of a run, and the error that it ended with; with `follow`, until it is no longer alive.

    Raises:
        ValueError: it has none; the text says why.
    """
    state = look()
    shown, head, over = 0, "", False
    while True:
        text = of_run(state)
        begin = text.partition("\n")[0]
        if begin > head:  # a requeued run begins a new part; the line has the time
            shown, head = 0, begin
        if begin == head:
            print(text[shown:], end="", flush=True)
            shown = len(text)
        if not follow or over:
            break
        over = state.state not in ALIVE  # then once more: a run's last lines come after its result
        time.sleep(1)
        state = look()
    if state.run.failure.exists():
        print(f"\n{state.run.failure}:\n{state.run.failure.read_text(errors='replace')}", end="")
    elif not shown:
        raise ValueError(
            f"a run has a log here once it has begun in a job that was submitted from here, however {state.run.id} has none, "
            f"and is {state.state}"
        )
    if state.reason and state.state != "failed":
        print(f"\n{state.state}: {state.reason}", file=sys.stderr)


def of_run(state: RunState) -> str:
    """Return the last part of the newest log that is about this run; '' when there is none yet."""
    parts = (_part(path.read_text(errors="replace"), state.run.id) for path in reversed(_files(state)))
    text = next(filter(None, parts), "")
    record = state.submission
    if record and record.scheduler == "lsf" and state.state == "running":
        # LSF may write logs only when a job ends or is requeued; of two attempts the later begins with the greater line
        text = max(text, _part(_peek(state.job_id), state.run.id))
    return text


def _part(text: str, run_id: str) -> str:
    return next((BEGIN + part for part in reversed(text.split(BEGIN)[1:]) if part.startswith(f"{run_id},")), "")


def _peek(job_id: str) -> str:
    when, said = _peeked.get(job_id, (-math.inf, ""))
    if time.monotonic() - when > PEEK_S:
        said = lsf.run(["bpeek", lsf.lsf_id(job_id)]).out
        _peeked[job_id] = time.monotonic(), said
    return said


def _files(state: RunState) -> list[Path]:
    """Return the logs in which the run may be, the oldest first."""
    paths = []
    for record in submissions(state.run.folders, state.run.experiment):
        if state.run.id in record.run_ids():
            jobs = list(record.jobs) if record.scheduler == "local" else [record.job_of()[state.run.id]]
            paths += [JobPaths(record.folder / "logs", job_id=job, task_id=0).stdout for job in jobs if job]
    return sorted((path for path in paths if path.exists()), key=lambda path: path.stat().st_mtime)
