"""The LSF stand-in on PATH, for the tests of the plugin and of `jobs` on top of it."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import submitit

from jobs.lsf import LsfExecutor, LsfInfoWatcher, LsfJob

COMMANDS = ("bsub", "bjobs", "bkill", "bhist", "bacct", "brequeue", "bpeek")


class StandIn:
    """The scheduler of one test."""

    def __init__(self, folder: Path):
        self.folder, self.logs = folder, folder / "logs"
        (folder / "faults").mkdir()

    def fault(self, **values: object) -> None:
        """Switch faults on (True), for some times (a number), with a word, or off (0)."""
        for name, value in values.items():
            path = self.folder / "faults" / name
            path.unlink(missing_ok=True)
            if value:
                path.write_text("always" if value is True else str(value))

    def calls(self, command: str) -> list[list[str]]:
        lines = map(json.loads, (self.folder / "calls").read_text().splitlines())
        return [arguments for name, *arguments in lines if name == command]

    def executor(self, folder: Path | None = None, **parameters: object) -> submitit.AutoExecutor:
        executor = submitit.AutoExecutor(folder or self.logs, cluster="lsf")
        executor.update_parameters(**{"timeout_min": 5, "stderr_to_stdout": True, **parameters})
        return executor

    def idle(self, *, count: int = 1) -> list[LsfJob]:
        """Submit jobs that never start."""
        self.fault(nothing_runs=True)
        return self.executor().map_array(abs, range(count))

    def shows(self, job: LsfJob, stat: str, code: str = "") -> None:
        folder = self.folder / job.job_id.replace("_", "/") / ("" if "_" in job.job_id else "0")
        (folder / "stat").write_text(stat)
        (folder / "code").write_text(code)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for command in COMMANDS:
        words = [sys.executable, "-S", "-E", str(Path(__file__).with_name("lsf_stand_in.py")), command]
        (bin_ / command).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (bin_ / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setenv("LSF_STAND_IN", str(tmp_path))
    monkeypatch.setenv("BSUB_QUIET", "1")
    monkeypatch.setattr(LsfJob, "watcher", LsfInfoWatcher())
    monkeypatch.setattr(LsfJob, "_results_timeout_s", 0.3)
    monkeypatch.setattr(LsfExecutor, "bsub_retry_s", (0.05, 0.05))
    monkeypatch.setattr(LsfInfoWatcher, "settle_s", 0.5)
    monkeypatch.setattr(LsfInfoWatcher, "grace_s", 0.0)
    yield StandIn(tmp_path)
    (tmp_path / "stop").touch()


@pytest.fixture(params=["ibm", "lean"])
def either(request, stand_in):
    stand_in.fault(lean=request.param == "lean")
    return stand_in
