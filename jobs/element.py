"""What an array element does: its runs, one after another, in one process."""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import FrameType, ModuleType

from submitit.core.utils import DelayedSubmission, UncompletedJobError

from batchens.run import Cancelled, Folders, InUse, Run, born
from jobs import experiments

BEGIN = "=== run "  # begins a run's part of its element's log


class Stopped(BaseException):
    """This process is asked to end."""


class OutOfTime(UncompletedJobError):
    """A job's whole time was too short for one epoch, so another would be as well."""


class Element:
    """The element of an array on a cluster, as submitit calls it.

    At the time limit, and when preempted, submitit calls `checkpoint` from its signal handler and has the job requeued,
    under the same id. Nothing is saved there: a run goes on from the end of its last whole epoch.
    """

    def __init__(self, experiment: str, folders: Folders, minutes: int):
        self.experiment, self.folders, self.minutes = experiment, folders, minutes
        self.started = 0.0

    def __call__(self, runs: list[str]) -> int:
        self.started = time.time()
        return work(self.experiment, [runs], None, self.folders, until=self.started + 60 * self.minutes)

    def checkpoint(self, runs: list[str]) -> DelayedSubmission:
        elapsed = time.time() - self.started
        known = experiments.runs_of(self.experiment)
        marks = (
            path
            for run in (Run(self.experiment, known[run_id], self.folders) for run_id in runs if run_id in known)
            for path in (run.result, run.checkpoint)
        )
        # half of the time, since a limit of a minute or two is warned of up to a minute before
        if elapsed > 30 * self.minutes and not any(p.exists() and p.stat().st_mtime > self.started for p in marks):
            raise OutOfTime(f"not one epoch was finished in the job's {self.minutes} minutes; retry with more: --hours")
        return DelayedSubmission(Element(self.experiment, self.folders, self.minutes), runs)


def work(experiment: str, elements: list[list[str]], queue: Path | None, folders: Folders, until: float = 0) -> int:
    """Do the elements' runs and return how many ended well; a failing run does not stop the next one.

    `queue` is a folder that several workers on one machine share: each takes an element there before it starts on it.
    `until` is the job's time limit (seconds since 1970): a run that would take as long as the longest of those before it
    is not started when that is too long; the job is requeued instead, as at its limit.

    Raises:
        RuntimeError: at the end, when a run failed, so that the scheduler calls the job failed too.
    """
    if queue is not None:  # elsewhere submitit passes over SIGTERM, which also announces a preemption
        signal.signal(signal.SIGTERM, _stop)
    script, known = experiments.script(experiment), experiments.runs_of(experiment)
    done, failed, longest = 0, [], 0.0
    for number, element in enumerate(elements):
        if queue is not None and not _take(queue / str(number)):
            continue
        for run_id in element:
            began = time.time()
            if until and longest and began + longest > until:
                print(f"the {until - began:.0f} s left may not hold a run of {longest:.0f} s: requeued", flush=True)
                signal.raise_signal(signal.SIGUSR2)
            try:
                if run_id not in known:
                    raise ValueError(
                        f"{run_id} is no run of {experiment} any more: its grid changed after the submission"
                    )
                _one(script, Run(experiment, known[run_id], folders, run_id))
                done += 1
                longest = max(longest, time.time() - began)
            except InUse as elsewhere:
                print(elsewhere, flush=True)
            except UncompletedJobError:  # from the handler of the time limit: no time is left for others
                raise
            except Exception:
                traceback.print_exc()
                sys.stderr.flush()
                failed.append(run_id)
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {done + len(failed)} runs failed: {', '.join(failed)}; their logs are above"
        )
    return done


def _one(script: ModuleType, run: Run) -> None:
    """Do a run, unless it is cancelled, or until it is."""
    try:
        if run.cancelled.exists():
            raise Cancelled(run.id)
        print(f"{BEGIN}{run.id}, {time.strftime('%Y-%m-%d %H:%M:%S')}, {socket.gethostname()}", flush=True)
        script.main(run.config, run.folders)
    except Cancelled as cancelled:
        print(f"cancelled: {cancelled}", flush=True)


def _take(ticket: Path) -> bool:
    """Take an element for this worker, or say that another has; the ticket names who."""
    pid = os.getpid()
    ours = ticket.with_name(f".{ticket.name}.{pid}.tmp")
    ours.write_text(json.dumps({"host": socket.gethostname(), "pid": pid, "born": born(pid), "job_id": ""}))
    try:
        os.link(ours, ticket)
    except FileExistsError:
        return False
    finally:
        ours.unlink()
    return True


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(f"signal {number}")
