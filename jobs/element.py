"""What an array element does: its runs, one after another, in one process."""

import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, cast

from submitit.core.utils import DelayedSubmission, UncompletedJobError

from batchens.run import Cancelled, Folders, InUse, Run, born, read_json
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
        self.submitted = time.time()
        self.started = 0.0

    def __call__(self, runs: list[str]) -> int:
        self.started = time.time()
        until = self.started + 60 * self.minutes
        return work(self.experiment, [runs], None, self.folders, since=self.submitted, until=until)

    def checkpoint(self, runs: list[str]) -> DelayedSubmission:
        elapsed = time.time() - self.started if self.started else 0.0
        # no Config, of which their files' names do not need one: the signal may come while the script is being imported
        known = (Run(self.experiment, cast(Any, None), self.folders, run_id) for run_id in runs)
        marks = (path for run in known for path in (run.result, run.progress))  # of whatever it trains an epoch of
        # half of the time, since a limit of a minute or two is warned of up to a minute before
        if elapsed > 30 * self.minutes and not any(p.exists() and p.stat().st_mtime > self.started for p in marks):
            raise OutOfTime(f"not one epoch was finished in the job's {self.minutes} minutes; retry with more: --hours")
        return DelayedSubmission(self, runs)


def work(
    experiment: str,
    elements: list[list[str]],
    queue: Path | None,
    folders: Folders,
    since: float = math.inf,
    until: float = math.inf,
    gpu: str | None = None,
) -> int:
    """Do the elements' runs and return how many ended well; a failing run does not stop the next one.

    `queue` is a folder that several workers on one machine share: each takes an element there before it starts on it. `gpu`
    is what CUDA_VISIBLE_DEVICES is there; None: not set.
    A run that has failed since the submission (`since`, seconds since 1970), before the job was requeued, is not repeated.
    `until` is the job's time limit: a run that would take as long as the longest of those before it is not started when
    that is too long; the job is requeued instead, as at its limit.

    Raises:
        RuntimeError: at the end, when a run failed, so that the scheduler calls the job failed too; at once when the GPU did,
            which no process can use after that.
    """
    if queue is not None:  # elsewhere submitit passes over SIGTERM, which also announces a preemption
        signal.signal(signal.SIGTERM, _stop)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # submitit set it
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    script, known = experiments.script(experiment), experiments.runs_of(experiment)
    done, failed, longest = 0, [], 0.0
    for number, element in enumerate(elements):
        if queue is not None and not _take(queue / str(number)):
            continue
        for run_id in element:
            began = time.time()
            try:
                if longest and began + longest > until:
                    print(f"the {until - began:.0f} s left may not hold a run of {longest:.0f} s: requeued", flush=True)
                    _requeue()
                if run_id not in known:
                    raise ValueError(
                        f"{run_id} is no run of {experiment} any more: its grid changed after the submission"
                    )
                run = Run(experiment, known[run_id], folders, run_id)
                if run.failure.exists() and run.failure.stat().st_mtime > since:
                    failed.append(run_id)
                    continue
                _one(script, run)
                done += 1
                longest = max(longest, time.time() - began)
            except InUse as elsewhere:
                print(elsewhere, flush=True)
            except UncompletedJobError:  # from the handler of the time limit: no time is left for others
                raise
            except Exception as error:
                traceback.print_exc()
                sys.stderr.flush()
                failed.append(run_id)
                if type(error).__name__ == "AcceleratorError":  # torch's, which is not imported here
                    raise RuntimeError(
                        f"the GPU failed in {run_id}; what was to be done after it was not begun"
                    ) from error
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {done + len(failed)} runs failed: {', '.join(failed)}; their logs are above"
        )
    return done


def _requeue() -> None:
    """Have this job put back into the queue, as submitit does at the time limit; where that is refused, go on."""
    try:
        signal.raise_signal(signal.SIGUSR2)
    except OutOfTime:
        raise
    except Exception as refused:
        print(f"not requeued: {refused}", flush=True)


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
    owner = {"host": socket.gethostname(), "pid": pid, "born": born(pid), "job_id": ""}
    ours.write_text(json.dumps(owner))
    try:
        os.link(ours, ticket)
    except FileExistsError:
        return read_json(ticket) == owner  # it is ours when NFS lost its first answer and asked again
    finally:
        ours.unlink()
    return True


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(f"signal {number}")
