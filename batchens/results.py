"""The CSV contract: one file a run, written once and whole; many files read as one table. Imports no torch.

`results/<experiment>/<run_id>.csv`, long format: a row per epoch, split (train, validation, test) and member. `member` is
empty in the row of the ensemble's averaged prediction. Every row carries the whole configuration, and its last column,
`rows`, says how many rows the file has: a file cut short anywhere is seen to be so.

| columns                                    | meaning                                                                    |
|--------------------------------------------|----------------------------------------------------------------------------|
| run_id, experiment, <config ...>           | what was run                                                               |
| parameters                                 | number of trained parameters                                               |
| epoch, split, member                       | epoch from 1; test only at the last one                                    |
| x, y, n                                    | what a figure draws, in rows of split reliability and weights              |
| accuracy, nll, brier, ece                  | of this member or the ensemble (`batchens.metrics`); train: running means  |
| disagreement, epistemic                    | between members, ensemble rows only                                        |
| rmse ... spread                            | in place of these six in regression (`batchens.regression`)                |
| seconds, images_per_second, peak_memory_mb | of training in this epoch, without validation, checkpoint and start-up     |
| commit ... finished                        | provenance                                                                 |
| rows                                       | rows in this file                                                          |
"""

import csv
import io
import itertools
import math
import os
import platform
import socket
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from batchens.files import ROOT, write_text

METRICS = ("accuracy", "nll", "brier", "ece", "disagreement", "epistemic")
REGRESSION_METRICS = ("rmse", "nll", "coverage_50", "coverage_90", "coverage_95", "spread")


# in a row of split reliability: mean confidence, accuracy and share of the test images in each of the 15 bins of ECE, of the
# ensemble's prediction; in one of split weights: centre and density of each bin of a histogram of the slow weights
CURVE = ("x", "y", "n")


def numbers(values: Iterable[float]) -> str:
    """Return the cell of a curve: its numbers, to 5 digits, separated by spaces."""
    return " ".join(f"{float(value):.5g}" for value in values)


def result_path(folder: Path, experiment: str, run_id: str) -> Path:
    """Return where the result of a run belongs: it exists if and only if the run is done."""
    return folder / experiment / f"{run_id}.csv"


def write_run(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of one run, all with the same keys, whole or not at all.

    A file that is already there is never overwritten: a complete one raises FileExistsError, a damaged one is kept
    beside the new one as `<name>.damaged1`, 2 and so on.
    """
    if path.exists():
        if damage(path) is None:
            raise FileExistsError(f"a result is written once, however {path} is there and complete")
        aside = (path.with_name(f"{path.name}.damaged{number}") for number in itertools.count(1))
        os.replace(path, next(one for one in aside if not one.exists()))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], "rows"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "rows": len(rows)} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def damage(path: Path) -> str | None:
    """Return why the file is not a complete result, or None when it is one."""
    return _damage(path, path.read_bytes())


def _damage(path: Path, content: bytes) -> str | None:
    if not content.startswith(b"run_id,experiment,") or not content.partition(b"\n")[0].endswith(b",rows"):
        return "not a result of this suite: its first line is not our header"
    if not content.endswith(b"\n"):
        return "cut short: its last line has no end"
    rows = content.count(b"\n") - 1
    stated = content[content.rindex(b",") + 1 : -1]
    if rows == 0 or stated != str(rows).encode():
        return f"cut short: {rows} rows, and the last says there are {stated.decode(errors='replace')}"
    if len({line.count(b",") for line in content.splitlines()[1:]}) > 1:  # text with a comma is in all rows or in none
        return "no table: its rows differ in length"
    stated_id = content.split(b"\n", 2)[1].partition(b",")[0].decode(errors="replace")
    if stated_id != path.stem:
        return f"renamed: its rows are of the run {stated_id}"
    return None


def read_results(folder: Path, experiment: str) -> Any:
    """Read every complete result of an experiment into one pandas.DataFrame; warn of each file that is not one.

    The files of one header are joined as text and parsed once: ten thousand small files in seconds, not minutes.
    """
    import pandas as pd

    bodies: dict[bytes, list[bytes]] = defaultdict(list)
    for path in sorted((folder / experiment).glob("*.csv")):
        content = path.read_bytes()
        if reason := _damage(path, content):
            warnings.warn(f"left out {path}: {reason}; move it away, and submit again to repeat the run", stacklevel=2)
            continue
        header, _, body = content.partition(b"\n")
        bodies[header].append(body)
    frames = []
    for header, parts in bodies.items():
        joined = io.BytesIO(b"".join([header, b"\n", *parts]))
        parts.clear()  # of ten thousand files these are 200 MB
        frames.append(pd.read_csv(joined, dtype={"member": "Int64"}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


@cache
def code_version() -> tuple[str, bool | None]:
    """Return the commit of this code and whether it was changed since, as they were when this process first asked.

    Asked when a run is taken up: what is committed or edited while it trains is not what it runs.
    """

    # only the code that makes numbers counts as dirty: a new result file or an edited README changes none
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "batchens", "scripts"))
    except (OSError, subprocess.SubprocessError):
        return "", None


def provenance() -> dict[str, Any]:
    """Return where and by what code a run was made: commit, dirty, host, job_id, python, finished (UTC)."""
    commit, dirty = code_version()
    return {
        "commit": commit,
        "dirty": dirty,
        "host": socket.gethostname(),
        "job_id": scheduler_job_id(),
        "python": platform.python_version(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def scheduler_job_id() -> str:
    """Return the id of the scheduler's job that this process runs in, an array's element as ID_INDEX; else ''."""
    environment = os.environ
    if environment.get("SUBMITIT_EXECUTOR") == "local":  # also within an interactive job of a scheduler
        return environment.get("SUBMITIT_LOCAL_JOB_ID", "")
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    if environment.get("LSB_JOBINDEX", "0") != "0":
        return f"{environment['LSB_JOBID']}_{environment['LSB_JOBINDEX']}"
    for name in ("SLURM_JOB_ID", "LSB_JOBID", "SUBMITIT_LOCAL_JOB_ID"):
        if environment.get(name):
            return environment[name]
    return ""


def differences(rows: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the largest absolute difference of each metric between two runs' CSV rows, matched by epoch, split, member.

    The metrics are those that the rows have columns for; rows of a curve, without any, are not compared. Infinite where only
    one of the two has a number. Raises ValueError when they have not the same rows.
    """
    known = (*METRICS, *REGRESSION_METRICS)

    def by_key(table: Iterable[Mapping[str, Any]]) -> dict[tuple[str, ...], Mapping[str, Any]]:
        measured = (row for row in table if any(row.get(name) not in ("", None) for name in known))
        return {tuple(str(row[name]) for name in ("epoch", "split", "member")): row for row in measured}

    one, two = by_key(rows), by_key(others)
    if one.keys() != two.keys():
        raise ValueError(f"two results must have the same rows to be compared, however: {len(one)} and {len(two)}")

    def difference(first: Any, second: Any) -> float:
        absent = [value in ("", None) or value != value for value in (first, second)]
        return 0.0 if all(absent) else math.inf if any(absent) else abs(float(first) - float(second))

    columns = set().union(*one.values(), *two.values())
    metrics = [name for name in dict.fromkeys(known) if name in columns]
    return {name: max(difference(row[name], two[key][name]) for key, row in one.items()) for name in metrics}
