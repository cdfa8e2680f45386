"""One run: its name, its folder, who works on it, and how it ends. Imports no torch.

`runs/<experiment>/<run_id>/` holds, while the run is not done:

| file            | written                             | says                                                        |
|-----------------|-------------------------------------|-------------------------------------------------------------|
| claim.json      | when a process takes up the run     | host, process and scheduler job: nobody else starts it      |
| checkpoint.pt   | after each epoch                    | everything to go on from                                    |
| progress.json   | after each epoch                    | epoch k of K, last validation accuracy, seconds             |
| failure.txt     | when the run fails                  | the reason in one line, then the traceback                  |
| cancelled       | by `jobs cancel`                    | no job is to take it up; gone when it is submitted again    |

The result, `results/<experiment>/<run_id>.csv`, is what makes a run done; the checkpoint and the claim are then removed.
"""

import errno
import json
import os
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from batchens import results
from batchens.data.catalog import DataError
from batchens.files import check_writable, data_folder, results_folder, runs_folder, write_text
from batchens.grid import Config, run_id


@dataclass(frozen=True)
class Folders:
    """Where files live; relative paths are made absolute, so that a job started elsewhere means the same ones."""

    data: Path = field(default_factory=data_folder)
    """images (or $BATCHENS_DATA)"""
    runs: Path = field(default_factory=runs_folder)
    """checkpoints, logs and submission records (or $BATCHENS_RUNS)"""
    results: Path = field(default_factory=results_folder)
    """CSV files, one a run (or $BATCHENS_RESULTS)"""

    def __post_init__(self) -> None:
        for name in ("data", "runs", "results"):
            object.__setattr__(self, name, Path(getattr(self, name)).absolute())


class InUse(RuntimeError):
    """Another live process works on this run."""


class Cancelled(BaseException):
    """The run was cancelled while this process was at it."""


class Run:
    """A run of an experiment in these folders."""

    def __init__(self, experiment: str, config: Config, folders: Folders, known_id: str | None = None):
        """`known_id` is the run's id, for who has it already: making it is the slow part of listing many runs."""
        self.experiment, self.config, self.folders = experiment, config, folders
        self.id = known_id or run_id(config)
        self.since = 0.0
        self.code: list[tuple[str, bool | None]] = []

    # made when asked for: of ten thousand listed runs most paths are not wanted

    @cached_property
    def folder(self) -> Path:
        return self.folders.runs / self.experiment / self.id

    @cached_property
    def result(self) -> Path:
        return results.result_path(self.folders.results, self.experiment, self.id)

    @cached_property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @cached_property
    def claim(self) -> Path:
        return self.folder / "claim.json"

    @cached_property
    def progress(self) -> Path:
        return self.folder / "progress.json"

    @cached_property
    def failure(self) -> Path:
        return self.folder / "failure.txt"

    @cached_property
    def cancelled(self) -> Path:
        return self.folder / "cancelled"

    def done(self) -> bool:
        return self.result.exists() and results.damage(self.result) is None

    def once(self, train: Callable[[], Path]) -> Path:
        """Call `train` while holding the run (see `taken`), unless it is done; return the path of its result."""
        if self.done():
            print(f"done before: {self.result}")
            return self.result
        with self.taken():
            return self.result if self.done() else train()  # done: by a process that held it until now

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the run for this process; on leaving with an error, note the reason in `failure.txt`.

        Raises:
            InUse: a live process holds it, here or, as far as can be known, on another host.
            ValueError: no file can be written where the run or its result belongs; known before any training.
        """
        check_writable(self.folder)
        check_writable(self.result.parent)
        owner = self._claim()
        self.since = owner["since"]
        try:
            self.code = attempts(self.progress, self.checkpoint)
            self.failure.unlink(missing_ok=True)
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            with suppress(OSError):  # a full disk is one of the reasons to fail
                write_text(self.failure, f"{reason}\n\n{traceback.format_exc()}")
            raise
        finally:
            if read_json(self.claim) == owner:
                self.claim.unlink(missing_ok=True)

    def _claim(self) -> dict[str, Any]:
        """Put our name on the run, or raise InUse; return what was written."""
        host, pid = socket.gethostname(), os.getpid()
        owner: dict[str, Any] = {
            "host": host,
            "pid": pid,
            "born": born(pid),
            "job_id": results.scheduler_job_id(),
            "since": time.time(),
            "token": secrets.token_hex(8),
        }
        ours, stale = (self.folder / f".{name}.{owner['token']}.tmp" for name in ("claim", "stale"))
        ours.write_text(json.dumps(owner))
        try:
            for _ in range(3):
                with suppress(FileExistsError):
                    os.link(ours, self.claim)  # at once and whole, or not at all; on NFS too
                    return owner
                other = read_json(self.claim)
                if other == owner:
                    return owner  # NFS lost the answer to our link and asked again
                if not other:
                    continue  # its holder has just finished
                if owner_alive(other, for_job=owner["job_id"]):
                    raise InUse(
                        f"a run is worked on by one process at a time, however {self.id} is held by process {other['pid']} on "
                        f"{other['host']}"
                        + (f" (job {other['job_id']})" if other["job_id"] else "")
                        + f"; if that one is surely dead, delete {self.claim}"
                    )
                with suppress(FileNotFoundError):
                    os.rename(self.claim, stale)
                    if read_json(stale) != other:  # between our two looks somebody else took over: give it back
                        with suppress(FileExistsError):
                            os.link(stale, self.claim)
                    stale.unlink()
            raise InUse(f"a run is worked on by one process at a time, however others are just taking up {self.id}")
        finally:
            ours.unlink(missing_ok=True)

    def after_epoch(self, rows: Sequence[dict[str, Any]], epochs: int) -> None:
        """Say how far the run is: a line in its log, and `progress.json` for `jobs status`.

        Raises:
            Cancelled: `jobs cancel` has marked the run. Asked for here alone: an exception out of a signal's handler may
                hit an `import`, after which torch can't be used by the next run in this process.
        """
        row = next(row for row in rows if row["split"] == "validation" and row["member"] is None)
        write_text(
            self.progress,
            json.dumps(
                {
                    "epoch": row["epoch"],
                    "epochs": epochs,
                    "accuracy": row["accuracy"],
                    "seconds": row["seconds"],
                    "updated": time.time(),
                    "code": self.code,
                }
            ),
        )
        tqdm.write(  # which leaves a progress bar on the terminal whole
            f"{self.id}: epoch {row['epoch']} of {epochs}, validation accuracy {row['accuracy']:.4f}, NLL {row['nll']:.4f}, "
            f"{row['seconds']:.1f} s"
        )
        sys.stdout.flush()
        with suppress(FileNotFoundError):
            if self.cancelled.stat().st_mtime > self.since:
                raise Cancelled(self.id)

    def write(self, rows: Sequence[dict[str, Any]], *, measured: Sequence[str] = results.METRICS, **facts: Any) -> Path:
        """Write the result of the run: each row with the configuration, `facts` and the provenance; clear its folder.

        `measured` names the columns of what was measured; a row that lacks one has an empty cell there. Of a run that went on
        with other code `commit` names all, joined by +.
        """
        incidental = self.config.INCIDENTAL
        config = {name: value for name, value in asdict(self.config).items() if name not in incidental}
        head = {"run_id": self.id, "experiment": self.experiment, **config}
        tail = {**facts, **results.provenance(), **(code_of(self.code) if self.code else {})}
        columns = ("epoch", "split", "member", *measured, "seconds", "images_per_second", "peak_memory_mb")
        results.write_run(self.result, [{**head, **{name: row.get(name) for name in columns}, **tail} for row in rows])
        for path in (self.checkpoint, self.progress):
            path.unlink(missing_ok=True)
        return self.result


def attempts(note: Path, checkpoint: Path) -> list[tuple[str, bool | None]]:
    """Return commit and whether it was changed since, of each attempt that a checkpoint holds epochs of, and of ours.

    Those before ours are under `code` in `note`, a JSON file that each attempt writes after an epoch.
    """
    before = read_json(note).get("code", []) if checkpoint.exists() else []
    return list(dict.fromkeys([*map(tuple, before), results.code_version()]))


def code_of(attempts: Sequence[tuple[str, bool | None]]) -> dict[str, Any]:
    """Return `commit`, of all attempts, joined by +, and `dirty`, of any of them; None where that is not known of the last."""
    commits, dirty = zip(*attempts, strict=True)
    return {"commit": " + ".join(dict.fromkeys(commits)), "dirty": any(dirty) or dirty[-1]}


def owner_alive(owner: dict[str, Any], for_job: str = "") -> bool:
    """Say whether the process that wrote a claim may still be at work.

    On this host the process table knows. Of another host nothing is known here, so its process counts as alive (`jobs`,
    which asks the scheduler, removes the claim if it is not), unless it was of the asking job itself: that was requeued.
    """
    if owner["host"] == socket.gethostname():
        return bool(owner["born"]) and born(owner["pid"]) == owner["born"]
    return not (for_job and owner["job_id"] == for_job)


def born(pid: int) -> str:
    """Return when a process started, '' when there is none: with it, a reused process id is not taken for the old one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]  # a zombie is dead; in containers it may stay for long
    except OSError:
        pass
    if sys.platform == "linux":
        return ""
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "alive"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file; {} when it is absent or was never finished."""
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def command_line(experiment: str, config_type: type[Any], main: Callable[[Any, Folders], Path], doc: str) -> int:
    """Run a script from its command line: the fields of its Config and the three folders as options; return the exit code.

    0: done, or done before. 1: the run failed. 2: nothing was trained, because something asked for is not possible. 130:
    stopped by Ctrl-C; the same command goes on. 141: nobody reads what it prints any more.
    """
    import tyro

    def script(config: config_type, folders: Folders) -> int:  # type: ignore[valid-type]
        return guarded(lambda: main(config, folders))

    return tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(script), description=doc, prog=f"python -m scripts.{experiment}"
    )


def guarded(work: Callable[[], Any]) -> int:
    """Call `work`, turn what it raises into one line on stderr, and return the exit code (see `command_line`)."""
    try:
        work()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on after the last whole epoch", file=sys.stderr)
        return 130
    except (ValueError, InUse, DataError) as error:
        return _say(2, error)
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if SIGPIPE had ended it
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return _say(
            1,
            f"{error.strerror or error}{where}; what was measured up to the last whole epoch is kept"
            + (": free some space, then the same command goes on from there" if full else ""),
        )
    except RuntimeError as error:
        return _say(1, error)
    return 0


def _say(code: int, message: object) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
