"""`jobs doctor` against recorded answers of schedulers, and its probe against the stand-in for LSF."""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from submitit.core import plugins

from batchens.files import ROOT
from batchens.run import Folders
from jobs import clusters, doctor, schedulers
from jobs.clusters import Cluster
from jobs.schedulers import Job, Unreachable

# as IBM's reference of bqueues has them: default limits stand before the maximum ones, several limits in one table
IBM_QUEUES = """
QUEUE: gpua100
  -- GPU nodes with A100

PARAMETERS/STATISTICS
PRIO NICE STATUS          MAX JL/U JL/P JL/H NJOBS  PEND   RUN SSUSP USUSP  RSV PJOBS
 50    0  Open:Active       -    -    -    -   112    80    32     0     0    0     0

DEFAULT LIMITS:
 RUNLIMIT
 15.0 min

MAXIMUM LIMITS:
 CPULIMIT                 RUNLIMIT
 600.0 min of HostA       1440.0 min of HostA

 CORELIMIT MEMLIMIT
      0 M      5 G

SCHEDULING PARAMETERS
           r15s   r1m  r15m   ut      pg    io   ls    it    tmp    swp    mem
 loadSched   -     -     -     -       -     -    -     -     -      -      -

USERS: all
RES_REQ:  select[type==any]
JOB_CONTROLS:
    TERMINATE:    [SIGTERM]
TERMINATE_WHEN: LOAD
------------------------------------------------------------------------------

QUEUE: hpc
  -- the default

PARAMETERS/STATISTICS
PRIO NICE STATUS          MAX JL/U JL/P JL/H NJOBS  PEND   RUN SSUSP USUSP  RSV
 30   20  Closed:Inact      -    -    -    -     0     0     0     0     0    0
"""
LEAN_QUEUE = """
QUEUE: normal
  -- 24 h at most; exit 99 is requeued  This is the default queue.

PARAMETERS/STATISTICS
PRIO NICE STATUS          MAX JL/U JL/P JL/H NJOBS  PEND   RUN SSUSP USUSP  RSV\x20
 30   10  Open:Active       -    -    -    -     1     0     1     0     0    0
Interval for a host to accept two jobs is 0 seconds

 RUNLIMIT               \x20
 1440.0 min             \x20

SCHEDULING PARAMETERS

USERS:  all
HOSTS:  all
REQUEUE_EXIT_VALUES:  99\x20
"""
IBM_PARAMS = """
        ABS_RUNLIMIT = Y
        CLEAN_PERIOD = 3600
        JOB_TERMINATE_INTERVAL = 10
        MAX_JOB_ARRAY_SIZE = 10000
        RESOURCE_RESERVE_PER_TASK = Y
"""
LEAN_PARAMS = """
The amount of time during which finished jobs are kept in core:
    CLEAN_PERIOD = 3600 (seconds)

The interval to terminate a job.
    JOB_TERMINATE_INTERVAL = 10\x20

The maximum number of jobs in a job array.
    MAX_JOB_ARRAY_SIZE = 500

Mbatchd reserves resources based on job tasks:
    RESOURCE_RESERVE_PER_TASK = N
"""
SLURM_CONFIG = """
Configuration data as of 2026-11-21T11:49:26
AccountingStorageType   = accounting_storage/none
JobRequeue              = 0
KillWait                = 30 sec
MaxArraySize            = 1001
MinJobAge               = 300 sec
OverTimeLimit           = 0 min
Prolog                  = (null)
SelectType              = select/cons_tres
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at vm is UP
"""
SINFO = "gpu*|1-00:00:00|up|1|gpu:2|64000|8\nshort|2:00|up|1|(null)|64000|8\n"


class Site:
    """Commands of a scheduler that say what they are told to."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.folders = Folders(folder / "data", folder / "runs", folder / "results")
        self.bin.mkdir()
        (folder / "faults").mkdir()

    def says(self, command: str, text: str, code: int = 0) -> None:
        self._script(command, f"cat <<'END'\n{text}\nEND\nexit {code}")

    def refuses(self, command: str, text: str, code: int = 255, *, but: str = "", then: str = "") -> None:
        """Say `text` on stderr, but on one argument something else."""
        known = f"[ \"$1\" = '{but}' ] && cat <<'END' && exit 0\n{then}\nEND\n" if but else ""
        self._script(command, f"{known}cat >&2 <<'END'\n{text}\nEND\nexit {code}")

    def stand_in(self, *commands: str) -> None:
        for command in commands:
            words = [sys.executable, "-S", "-E", str(Path(__file__).with_name("lsf_stand_in.py")), command]
            self._script(command, f'exec {shlex.join(words)} "$@"')

    def _script(self, command: str, text: str) -> None:
        (self.bin / command).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / command).chmod(0o755)

    def calls(self, command: str) -> list[list[str]]:
        lines = map(json.loads, (self.folder / "calls").read_text().splitlines())
        return [arguments for name, *arguments in lines if name == command]


@pytest.fixture
def site(tmp_path, monkeypatch):
    for cached in (plugins._get_plugins, plugins.get_executors, plugins.get_job_environments):
        cached.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("LSF_STAND_IN", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BATCHENS_CLUSTERS", "")
    monkeypatch.setattr(doctor, "WRITE_MB", 1)
    monkeypatch.setattr(doctor, "POLL_S", 0.1)
    monkeypatch.setattr(schedulers.Lsf, "SETTLE", 1.2)  # the stand-in requeues within a second
    yield Site(tmp_path)
    (tmp_path / "stop").touch()


def proposed(out: str, preset: Cluster) -> dict:
    """The snippet that was printed, read as the user's own file would be."""
    _, _, snippet = out.partition("your own file, ")
    changes = tomllib.loads(snippet.partition("\n")[2].partition("\nhow signals")[0])[preset.name]
    clusters.Cluster(preset.name, **clusters._over({"scheduler": preset.scheduler, "hours": preset.hours}, changes))
    return changes


# ------------------------------------------------------------------------------------------------------------ readers


def test_queues_are_read():
    queues = schedulers.read_queues(IBM_QUEUES)
    assert queues["gpua100"] == {
        "is": "Open:Active",
        "CPULIMIT": "600.0 min of HostA",
        "RUNLIMIT": "1440.0 min of HostA",
        "CORELIMIT": "0 M",
        "MEMLIMIT": "5 G",
        "TERMINATE": "[SIGTERM]",
    }
    assert queues["hpc"] == {"is": "Closed:Inact"}
    assert schedulers.read_queues(LEAN_QUEUE) == {
        "normal": {"is": "Open:Active", "RUNLIMIT": "1440.0 min", "REQUEUE_EXIT_VALUES": "99"}
    }
    assert schedulers.read_queues("nosuch: No such queue") == {}


def test_configurations_are_read():
    assert schedulers.read_config(SLURM_CONFIG)["MinJobAge"] == "300 sec"
    assert schedulers.read_config(IBM_PARAMS)["RESOURCE_RESERVE_PER_TASK"] == "Y"
    assert schedulers.read_config(LEAN_PARAMS)["CLEAN_PERIOD"] == "3600 (seconds)"
    assert schedulers.read_config(
        "MBD configuration at Fri Jun 8 10:27:52 2011\n\tLSF_UNIT_FOR_LIMITS=MB\n\tX=\nY=1"
    ) == {
        "LSF_UNIT_FOR_LIMITS": "MB",
        "X": "",
        "Y": "1",
    }


# ------------------------------------------------------------------------------------------------------------ reports


def test_slurm(site, capsys):
    site.says("scontrol", SLURM_CONFIG)
    site.says("sinfo", SINFO)
    site.refuses("sacct", "Slurm accounting storage is disabled", 1)
    site.refuses("sacctmgr", "You are not running a supported accounting_storage plugin", 1)
    site.refuses("sbatch", "allocation failure: Invalid account", 1)
    site.says("srun", "")  # submitit looks for it
    preset = Cluster("x", "slurm", hours=48, max_hours=72, gpus=1, options={"partition": "gpu,short"})
    doctor.examine(preset, site.folders, probe=False, consent=False)
    out = capsys.readouterr().out
    for words in (
        "SLURM_VERSION 22.05.8",
        "1-00:00:00, up",
        "MaxArraySize 1001",
        "MinJobAge 300 sec",
        "accounting is off",
    ):
        assert words in out
    assert (
        "options              allocation failure: Invalid account" in out and "sbatch does not take the preset" in out
    )
    assert "runs is in your home" in out
    assert proposed(out, preset) == {
        "hours": 24,
        "max_hours": 24,
        "options": {"additional_parameters": {"requeue": True}},
    }


def test_lsf(site, capsys):
    site.stand_in("bsub", "bhist")
    site.says("lsid", "IBM Spectrum LSF Standard 10.1.0.14, Jun 01 2023\nMy cluster name is c")
    site.says("bqueues", IBM_QUEUES)
    site.says("bparams", IBM_PARAMS)
    site.refuses("badmin", "User permission denied")
    site.says("busers", "USER/GROUP  JL/P  MAX\nme  -  16")
    site.says("getquota_work3.sh", "80 of 100 GiB")
    preset = Cluster(
        "x", "lsf", hours=30, cpus=4, mem_gb=16, gpus=1, options={"queue": "gpua100", "mem_mode": "per_job"}
    )
    doctor.examine(preset, site.folders, probe=False, consent=False)
    out = capsys.readouterr().out
    for words in (
        "RUNLIMIT 1440.0 min of HostA",
        "MEMLIMIT 5 G",
        "MAX_JOB_ARRAY_SIZE 10000",
        "80 of 100 GiB",
        "bhist answers",
    ):
        assert words in out
    assert "badmin showconf: LSF_UNIT_FOR_LIMITS: User permission denied" in out and "bacct is not on PATH" in out
    assert "me  -  16" in out and "ABS_RUNLIMIT Y" in out
    assert proposed(out, preset) == {
        "hours": 24,
        "options": {"warning_min": 5, "requeue_exit_code": 85, "mem_mode": "per_core"},
    }


def test_a_relative_of_lsf(site, capsys):
    site.stand_in("bsub", "bhist", "bacct", "brequeue")
    site.says("lsid", "volclava project 2.2, Nov 21 2026\n\nMy cluster name is volclava")
    site.says("bqueues", LEAN_QUEUE)
    site.refuses("bparams", "bparams: invalid option -- 'a'\nUsage: bparams", but="-l", then=LEAN_PARAMS)
    preset = Cluster("x", "lsf", hours=4, cpus=4, mem_gb=16, gpus=1, options={"queue": "short", "warning_min": 5})
    doctor.examine(preset, site.folders, probe=False, consent=False)
    out = capsys.readouterr().out
    assert "queue must be one of normal; however: short" in out and "may not take what warning_min adds" in out
    assert "badmin is not on PATH" in out
    assert proposed(out, preset) == {"gpus": 0, "options": {"mem_mode": "per_job", "mem_unit": ""}}


def test_local_needs_nothing(site, capsys):
    preset = Cluster("local", "local", hours=1)
    doctor.examine(preset, site.folders, probe=False, consent=False)
    out = capsys.readouterr().out
    assert "nothing to change" in out and "1 MB written" in out and "free memory" in out
    with pytest.raises(ValueError, match="--probe must go to slurm or lsf, however"):
        doctor.examine(preset, site.folders, probe=True, consent=True)


def test_a_scheduler_that_is_silent_is_asked_once(site, monkeypatch):
    site.stand_in("bsub")
    site._script("bqueues", "sleep 10")
    monkeypatch.setattr(doctor, "ASK_S", 0.2)
    with pytest.raises(Unreachable, match=r"must answer to be examined, however: bqueues gave no answer within 0.2 s"):
        doctor.examine(Cluster("x", "lsf", hours=1), site.folders, probe=False, consent=False)


def test_an_absent_scheduler_is_exit_code_2(site):
    command = [sys.executable, "-m", "jobs", "doctor", "--cluster", "dtu-a100"]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": str(site.bin)}, capture_output=True, text=True)
    assert ran.returncode == 2 and "wants bsub on PATH, as on a cluster's login node, however it is not" in ran.stderr


# -------------------------------------------------------------------------------------------------------------- probe


def test_the_probe_wants_consent(site, monkeypatch, capsys):
    site.stand_in("bsub")
    preset = Cluster("x", "lsf", hours=1)
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    with pytest.raises(ValueError, match=r"--yes must be given .* however"):
        doctor.examine(preset, site.folders, probe=True, consent=False)
    monkeypatch.setattr("builtins.input", lambda question: "")
    doctor.run_probe(doctor.Report(preset), schedulers.ALL["lsf"], site.folders, False)
    assert "nothing was submitted" in capsys.readouterr().out and not (site.folder / "calls").exists()


def test_the_probe(site, capsys):
    site.stand_in("bsub", "bjobs", "bkill", "bhist", "bacct", "brequeue")
    report = doctor.Report(Cluster("x", "lsf", hours=8))

    def limit() -> None:
        until = time.monotonic() + 20
        while not list(site.folders.runs.glob("doctor/*/start-1.json")) and time.monotonic() < until:
            time.sleep(0.05)
        subprocess.run(["bkill", "-s", "USR2", "1[1]"], check=True)

    thread = threading.Thread(target=limit)
    thread.start()
    doctor.run_probe(report, schedulers.ALL["lsf"], site.folders, True)
    thread.join()
    out = capsys.readouterr().out
    assert "each of 2 minutes" in out and "came 0 s after the start, 120 s before the limit of 2 minutes" in out
    assert "works, under the same id and index, 1_1" in out and "no variable tells" in out
    assert "told as: ended, lost, exit code 7 (EXIT)" in out
    assert not report.doubts and not report.changes
    assert site.calls("bkill") == [["-s", "USR2", "1[1]"]]


def test_an_interrupted_probe_leaves_no_job(site, monkeypatch):
    site.stand_in("bsub", "bkill")
    (site.folder / "faults" / "nothing_runs").write_text("always")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        doctor.run_probe(doctor.Report(Cluster("x", "lsf", hours=8)), schedulers.ALL["lsf"], site.folders, True)
    assert site.calls("bkill") == [["1[1-2]"]]


def test_conclusions(tmp_path, capsys):
    preset = Cluster("x", "lsf", hours=8, gpus=1)
    pending = {"1_1": Job("pending"), "1_2": Job("pending")}
    report = doctor.Report(preset)
    doctor.draw(report, tmp_path, 2, ["1_1", "1_2"], pending)
    assert report.doubts == ["the first job did not start within 15 minutes and was cancelled"]
    first = {
        "time": 1000.0,
        "job": "1_1",
        "host": "n1",
        "python": "3.11",
        "cores": 4,
        "gpus": [],
        "visible": None,
        "torch": "too old",
    }
    (tmp_path / "start-1.json").write_text(json.dumps({**first, "commands": {"brequeue": None}, "variables": {}}))
    (tmp_path / "signals.jsonl").write_text('{"signal": "SIGTERM", "time": 1130.0}\n')
    ended = {"1_1": Job("ended", "timeout", "TERM_RUNLIMIT"), "1_2": Job("ended", "cancelled", "killed")}
    report = doctor.Report(preset)
    doctor.draw(report, tmp_path, 2, ["1_1", "1_2"], ended)
    out = capsys.readouterr().out
    assert "SIGTERM" in out and "10 s after the limit of 2 minutes" in out and "brequeue is not there" in out
    assert report.changes.keys() == {"options.warning_min", "options.requeue_exit_code"}
    assert any("sees none" in doubt for doubt in report.doubts)
    assert "torch can't use the GPU: too old" in report.doubts
    assert any("told as cancelled: states may mislead" in doubt for doubt in report.doubts)


def test_torch_is_asked_for_the_gpu_itself(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor._torch_on_gpu().startswith(("RuntimeError: ", "AssertionError: "))
