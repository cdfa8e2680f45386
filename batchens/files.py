"""Where things live, and writing a file so that it is whole or absent.

Three folders, each movable by an environment variable (on a cluster: data and runs belong on the scratch disk, the few
small CSV files of results anywhere):

| folder     | variable           | what is in it                                            |
|------------|--------------------|----------------------------------------------------------|
| `data/`    | `BATCHENS_DATA`    | images, decoded once into one tensor file a dataset      |
| `runs/`    | `BATCHENS_RUNS`    | checkpoints, logs, submission records; safe to delete    |
| `results/` | `BATCHENS_RESULTS` | one CSV a run: what was measured                         |
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def data_folder() -> Path:
    return Path(os.environ.get("BATCHENS_DATA") or ROOT / "data").absolute()


def runs_folder() -> Path:
    return Path(os.environ.get("BATCHENS_RUNS") or ROOT / "runs").absolute()


def results_folder() -> Path:
    return Path(os.environ.get("BATCHENS_RESULTS") or ROOT / "results").absolute()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends without an error it becomes `path`, at once and for good.

    A reader sees the old file or the new one, never half of either, whatever kills the writer: the data is on the disk
    (`fsync`) before the name is. What a killed writer leaves behind is a hidden `.NAME.HOST.PID.tmp` that no reader
    looks at. The host is in the name because nodes that share a disk share process ids too.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(OSError):  # not every network file system lets a directory be synced
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_tensors(path: Path, content: Any) -> None:
    """Write to `path` what `torch.load` reads again, whole or not at all.

    Raises:
        OSError: it could not be written. torch makes a RuntimeError of a full disk, which says nothing of one.
    """
    import torch

    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # a GPU's, say, which is no fault of the file
                raise
            raise OSError(errno.ENOSPC, "the file could not be written", str(path)) from error


def check_writable(folder: Path, probe_bytes: int = 4096) -> None:
    """Make `folder` and see that a file can be written there: now, not after hours of training.

    Raises:
        ValueError: it can't; the message says why.
    """
    probe = folder / f".write-test.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                for _ in range(0, probe_bytes, 2**20):
                    file.write(b"x" * min(probe_bytes, 2**20))
                file.flush()
                os.fsync(file.fileno())  # a quota or a full disk may only speak up here
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} must be a folder that can be written to, however: {error.strerror}; free some space there or make it "
            "writable, or choose another with --data, --runs or --results"
        ) from error
