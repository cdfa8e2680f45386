"""What an array element does: its runs, one after another, in one process."""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import FrameType

from batchens.run import Folders, InUse, born
from jobs import experiments


class Stopped(BaseException):
    """The scheduler, or `jobs cancel`, asks this process to end."""


def work(experiment: str, elements: list[list[str]], queue: Path | None, folders: Folders) -> int:
    """Do the elements' runs and return how many ended well; a failing run does not stop the next one.

    `queue` is a folder that several workers on one machine share: each takes an element there before it starts on it.

    Raises:
        RuntimeError: at the end, when a run failed, so that the scheduler calls the job failed too.
    """
    signal.signal(signal.SIGTERM, _stop)
    script, known = experiments.script(experiment), experiments.runs_of(experiment)
    done, failed = 0, []
    for number, element in enumerate(elements):
        if queue is not None and not _take(queue / str(number)):
            continue
        for run_id in element:
            try:
                if run_id not in known:
                    raise ValueError(
                        f"{run_id} is no run of {experiment} any more: its grid changed after the submission"
                    )
                script.main(known[run_id], folders)
                done += 1
            except InUse as elsewhere:
                print(elsewhere, flush=True)
            except Exception:
                traceback.print_exc()
                sys.stderr.flush()
                failed.append(run_id)
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {done + len(failed)} runs failed: {', '.join(failed)}; their logs are above"
        )
    return done


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
