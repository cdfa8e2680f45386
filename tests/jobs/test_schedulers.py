"""What schedulers say of jobs, in one language; and arrays of `jobs` on the LSF stand-in, with what goes wrong there."""

import json
import os
import signal
import socket
import subprocess
import time

import pytest

from batchens.run import Run
from jobs import clusters, logs, schedulers, states, submission
from jobs.__main__ import _Patient, _ranges
from jobs.clusters import Cluster
from jobs.doctor import Report, ask_submission
from jobs.element import BEGIN
from jobs.schedulers import Job, Lsf, Slurm, Unreachable, slurm_minutes
from jobs.states import RunState, Submission, look

EXPERIMENT = "parameter_testing"


# --------------------------------------------------------------------------------------------------------- SLURM


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Write what SLURM's commands answer: `slurm(squeue="...", sacct=("...", 1))`."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")

    def answers(**commands):
        for name, answer in commands.items():
            text, code = answer if isinstance(answer, tuple) else (answer, 0)
            (tmp_path / name).write_text(text)
            (bin_ / name).write_text(f"#!/bin/sh\ncat {tmp_path / name} {'>&2' if code else ''}\nexit {code}\n")
            (bin_ / name).chmod(0o755)
        return Slurm()

    return answers


OFF = ("Slurm accounting storage is disabled\n", 1)


def test_squeue_tells_the_states(slurm):
    said = {
        "1_0": ("PENDING||JobArrayTaskLimit", "pending", ""),
        "1_1": ("RUNNING|n1|None", "running", ""),
        "1_2": ("COMPLETING|n1|None", "running", ""),
        "1_3": ("SUSPENDED|n1|None", "running", ""),
        "1_4": ("PENDING||BeginTime", "pending", ""),
        "1_5": ("COMPLETED|n1|None", "ended", "lost"),
        "1_6": ("FAILED|n1|NonZeroExitCode", "ended", "lost"),
        "1_7": ("TIMEOUT|n1|TimeLimit", "ended", "timeout"),
        "1_8": ("OUT_OF_MEMORY|n1|OutOfMemory", "ended", "memory"),
        "1_9": ("CANCELLED|n1|None", "ended", "cancelled"),
        "2": ("NODE_FAIL|n1|NodeDown", "ended", "lost"),
    }
    lines = [f"{job}|{line}" for job, (line, _, _) in said.items()]
    found = slurm(squeue="\n".join(lines) + "\n1_77|RUNNING|n1|None\n", sacct=OFF).ask(dict.fromkeys(said, 0.0))
    assert {job: (one.state, one.end) for job, one in found.items()} == {job: one[1:] for job, one in said.items()}
    assert found["1_1"].node == "n1" and "OutOfMemory" in found["1_8"].detail


def test_what_squeue_forgot_is_looked_up_where_there_are_accounts_and_has_ended_where_there_are_none(slurm):
    gone = ("slurm_load_jobs error: Invalid job id specified\n", 1)
    jobs = {"1_0": 0.0, "1_1": 0.0}
    found = slurm(squeue=gone, sacct="1_0|OUT_OF_MEMORY|n1|None\n1_1|CANCELLED by 1000|n1|None\n").ask(jobs)
    assert [(one.state, one.end) for one in found.values()] == [("ended", "memory"), ("ended", "cancelled")]
    found = slurm(squeue=gone, sacct=OFF).ask(jobs)
    assert [(one.state, one.end) for one in found.values()] == [("ended", "lost"), ("ended", "lost")]


def test_no_answer_is_no_knowledge(slurm):
    site = slurm(squeue=("slurm_load_jobs error: Unable to contact slurm controller\n", 1), sinfo=("down", 1))
    with pytest.raises(Unreachable, match="Unable to contact"):
        site.ask({"1_0": 0.0})
    with pytest.raises(Unreachable):
        site.max_minutes(clusters.load("slurm"))


def test_the_limits_of_a_partition(slurm):
    site = slurm(sinfo="gpu*|1-00:00:00\nshort|2:00\nfree|infinite\n", scontrol="MaxArraySize            = 501\n")
    assert site.array_limit() == 501
    assert site.max_minutes(Cluster("x", "slurm", 1)) == 1440
    assert site.max_minutes(Cluster("x", "slurm", 1, options={"partition": "short,gpu"})) == 1440
    assert site.max_minutes(Cluster("x", "slurm", 1, options={"partition": "free"})) is None
    with pytest.raises(ValueError, match="partition must be one of gpu, short, free"):
        site.max_minutes(Cluster("x", "slurm", 1, options={"partition": "nosuch"}))
    assert [slurm_minutes(text) for text in ("30:00", "2:00:00", "2-01:00:00", "UNLIMITED")] == [30, 120, 2940, None]


def test_nothing_of_the_allocation_that_one_submits_from_gets_into_the_array(slurm, new_place, tmp_path, monkeypatch):
    slurm(srun="", sinfo="gpu*|infinite\n", scontrol="MaxArraySize = 1001\n")
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nenv >> {tmp_path / 'passed_on'}\necho Submitted batch job 1\n")
    sbatch.chmod(0o755)
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURM_CPU_BIND", "SLURM_CONF", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "x")
    place = new_place(tmp_path / "place")
    assert "submitted 6 runs" in place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "slurm")
    ask_submission(Report(clusters.load("slurm")), Slurm(), place.folders)
    passed_on = sorted(line for line in (tmp_path / "passed_on").read_text().splitlines() if line.endswith("=x"))
    assert passed_on == ["SBATCH_ACCOUNT=x", "SBATCH_ACCOUNT=x", "SLURM_CONF=x", "SLURM_CONF=x"]
    assert os.environ["SLURM_JOB_ID"] == "x"


# ------------------------------------------------------------------------------------------------------------- both


def test_a_scheduler_that_is_down_is_told_of_once_and_asked_again_after_a_while(monkeypatch, capsys):
    asked = []

    def down(scheduler, jobs):
        asked.append(scheduler)
        raise Unreachable("LSF is down")

    monkeypatch.setattr(states, "ask", down)
    patient = _Patient()
    for _ in range(3):
        assert patient("lsf", {"1_1": 0.0}) == {"1_1": Job("running", told=False)}
    assert len(asked) == 1
    patient.seconds = -1.0
    patient("lsf", {"1_1": 0.0})
    assert len(asked) == 2 and capsys.readouterr().err.count("can't be asked") == 1


def test_jobs_in_short():
    assert _ranges({"12_10", "12_2", "12_7", "12_8", "9_1", "100"}) == "9_1, 12_2,7-8,10, 100"


# ----------------------------------------------------------------------------------------------------------- LSF


@pytest.fixture
def lsf(either, monkeypatch):
    monkeypatch.setattr(Lsf, "SETTLE", 0.1)
    return either


def test_bjobs_tells_the_states_and_history_the_rest(lsf):
    jobs = lsf.idle(count=6)
    for job, stat, code in zip(
        jobs, ("PEND", "RUN", "USUSP", "DONE", "EXIT", "EXIT"), ("", "", "", "", "140", "1"), strict=True
    ):
        lsf.shows(job, stat, code)
    asked = {job.job_id: 0.0 for job in jobs}
    alive = [("pending", ""), ("running", ""), ("running", "")]
    expected = [*alive, ("ended", "lost"), ("ended", "timeout"), ("ended", "lost")]
    assert [(one.state, one.end) for one in Lsf().ask(asked).values()] == expected
    lsf.fault(forgets=True)
    found = Lsf().ask(asked)
    assert sorted((one.state, one.end) for one in found.values()) == sorted(expected)
    lsf.fault(no_history=True, no_accounting=True)
    found = Lsf().ask(asked)
    assert [found[job.job_id].state for job in jobs] == ["pending", "running", "running", "ended", "ended", "ended"]
    assert "forgotten" in found[jobs[3].job_id].detail
    lsf.fault(bjobs_down=True)
    with pytest.raises(Unreachable):
        Lsf().ask(asked)


def test_a_job_that_bjobs_is_sure_is_gone_does_not_run_for_ever_by_what_bhist_last_heard(lsf):
    (job,) = lsf.idle()
    lsf.shows(job, "RUN")
    lsf.fault(forgets="all")
    assert Lsf().ask({job.job_id: 0.0})[job.job_id].state == "ended"
    assert Lsf().ask({job.job_id: time.time()})[job.job_id].state == "pending"  # bjobs may not know it yet


@pytest.fixture
def place(stand_in, new_place, tmp_path, monkeypatch):
    """A workplace on the stand-in, whose preset is called `site`."""
    monkeypatch.setattr(Lsf, "SETTLE", 0.5)
    own = tmp_path / "clusters.toml"
    own.write_text('[site]\nscheduler = "lsf"\nhours = 1\n')
    monkeypatch.setenv("BATCHENS_CLUSTERS", str(own))
    monkeypatch.setenv("LSF_STAND_IN", str(tmp_path))
    there = new_place(tmp_path / "place")
    yield there
    (tmp_path / "stop").touch()


SUBMIT = ("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "site")


def test_an_array_on_lsf(place, stand_in):
    said = place.jobs(*SUBMIT, "--max-parallel", "2")
    assert "submitted 6 runs" in said and "jobs 1_1-6" in said
    assert "nothing to submit" in place.jobs(*SUBMIT)
    place.wait()
    assert place.states() == {"done": 6}
    assert set(place.table().job_id) == {f"1_{index}" for index in range(1, 7)}
    assert "epoch 2 of 2" in place.jobs("logs", EXPERIMENT, "0", "--grid", "smoke")


def test_killed_cancelled_and_forgotten_on_lsf(place, stand_in):
    place.jobs(*SUBMIT, "--max-parallel", "1")
    ids = list(place.configs)
    place.wait_for("running")
    running = next(one for one in look(place.folders, EXPERIMENT, place.configs) if one.state == "running")
    os.kill(running.owner["pid"], signal.SIGKILL)
    place.jobs("cancel", EXPERIMENT, ids[-1])
    place.wait()
    assert place.states() == {"lost": 1, "cancelled": 1, "done": 4}
    stand_in.fault(forgets=True, no_history=True, no_accounting=True)
    assert place.states() == {"lost": 1, "cancelled": 1, "done": 4}  # it was written down how they ended
    stand_in.fault(forgets=0, no_history=0, no_accounting=0)
    assert "submitted 1 runs" in place.jobs("retry", EXPERIMENT, "--grid", "smoke")
    assert "submitted 1 runs" in place.jobs("retry", EXPERIMENT, "--grid", "smoke", "--state", "cancelled")
    place.wait()
    assert place.states() == {"done": 6}


def test_an_lsf_that_does_not_answer_is_waited_for(place, stand_in):
    place.jobs(*SUBMIT)
    stand_in.fault(bjobs_down=True)
    said = place.jobs("status", EXPERIMENT, "--grid", "smoke")
    assert "can't be asked" in said and "lost" not in said
    stand_in.fault(bjobs_down=0)
    place.wait()
    assert place.states() == {"done": 6}


def test_what_the_site_refuses_is_said_in_its_words(place, stand_in):
    stand_in.fault(esub=True)
    said = place.jobs(*SUBMIT, code=1)
    assert "This queue wants a project" in said and place.states() == {"missing": 6}
    assert schedulers.ALL["lsf"].array_limit() == 1000


def test_an_array_whose_submitter_was_killed_before_it_knew_the_ids_is_ended_by_the_next(place, stand_in):
    stand_in.fault(hang=1, nothing_runs=True)
    submitter = place.start(*SUBMIT)
    deadline = time.monotonic() + 60
    while not (stand_in.folder / "1" / "options").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    submitter.kill()
    submitter.communicate()
    stand_in.fault(nothing_runs=0)
    assert "submitted 6 runs" in place.jobs(*SUBMIT)
    assert all((stand_in.folder / "1" / str(index) / "killed").exists() for index in range(1, 7))
    place.wait()
    assert place.states() == {"done": 6} and set(place.table().job_id) == {f"2_{index}" for index in range(1, 7)}


def test_runs_of_an_array_whose_submitter_was_killed_start_anew_though_they_had_begun_on_another_host(
    place, stand_in, capsys
):
    """It died when the array was taken and its ids were not written down; the run's process is out of sight from here."""
    begun, *_ = [Run(EXPERIMENT, config, place.folders) for config in place.configs.values()]
    path = place.folders.runs / EXPERIMENT / "submissions" / "x" / "record.json"
    path.parent.mkdir(parents=True)
    results, dead = str(place.folders.results), {"pid": 1, "born": "never"}
    record = Submission(
        path, EXPERIMENT, "site", "lsf", socket.gethostname(), dead, time.time(), results, [[i] for i in place.configs]
    )
    record.write()
    stand_in.executor(name=submission.job_name(record, 0)).map_array(time.sleep, [60, 60])
    begun.folder.mkdir(parents=True)
    begun.claim.write_text(
        json.dumps({"host": "n-7", "pid": 1, "born": "1", "job_id": "1_1", "since": 0, "token": "x"})
    )
    begun.claim.with_name(".failure.txt.before").write_text("RuntimeError: of the time before\n")
    place.wait_for("running")  # its job may pend a moment, and then a claim is that of a process before it was requeued
    assert place.states() == {"running": 1, "missing": 5}
    said = place.jobs("submit", EXPERIMENT, "--grid", "demo", "--cluster", "site", "--dry-run")
    assert "cancelled" not in said  # a dry run changes nothing
    with submission.alone(place.folders, EXPERIMENT):
        submission._mend(place.folders, EXPERIMENT)
    assert f"cancelled: 6 runs of {path.parent}" in capsys.readouterr().out
    assert all((stand_in.folder / "1" / str(index) / "killed").exists() for index in (1, 2))
    assert place.states() == {"failed": 1, "missing": 5}
    assert "submitted 6 runs" in place.jobs(*SUBMIT)
    place.wait()
    assert place.states() == {"done": 6}


def test_a_refused_submission_leaves_the_marks_of_how_runs_ended(place, stand_in):
    failed, cancelled, *_ = [Run(EXPERIMENT, config, place.folders) for config in place.configs.values()]
    for run in (failed, cancelled):
        run.folder.mkdir(parents=True)
    failed.failure.write_text("OutOfMemoryError: too large\n")
    cancelled.cancelled.touch()
    before = {"failed": 1, "cancelled": 1, "missing": 4}
    assert place.states() == before
    stand_in.fault(esub=True)
    place.jobs(*SUBMIT, code=1)
    place.jobs("retry", EXPERIMENT, "--grid", "smoke", "--state", "failed", "--cluster", "site", code=1)
    assert place.states() == before
    assert [path.name for path in failed.folder.iterdir()] == ["failure.txt"]
    assert "OutOfMemoryError: too large" in place.jobs("status", EXPERIMENT, "--grid", "smoke")
    stand_in.fault(esub=0)
    place.jobs(*SUBMIT)
    place.wait()
    assert place.states() == {"done": 6}
    assert not list(failed.folder.iterdir()) and not list(cancelled.folder.iterdir())


def test_a_failure_before_the_submission_by_a_clock_that_is_ahead_is_no_failure_after_it(place, stand_in):
    run = Run(EXPERIMENT, next(iter(place.configs.values())), place.folders)
    run.folder.mkdir(parents=True)
    run.failure.write_text("RuntimeError: of last time\n")
    os.utime(run.failure, (time.time() + 3600, time.time() + 3600))
    place.jobs(*SUBMIT)
    place.wait()
    assert place.states() == {"done": 6}


@pytest.fixture
def first(place):
    """The first run of a place, handed over as job 1: its state, and the folder of its logs."""
    run_id, config = next(iter(place.configs.items()))
    path = place.folders.runs / EXPERIMENT / "submissions" / "x" / "record.json"
    (path.parent / "logs").mkdir(parents=True)
    host, results = socket.gethostname(), str(place.folders.results)
    record = Submission(path, EXPERIMENT, "site", "lsf", host, {}, 0.0, results, [[run_id]], {"1": ""})
    record.write()
    run = Run(EXPERIMENT, config, place.folders)
    return RunState(run, "running", submission=record, job_id="1"), path.parent / "logs"


def test_a_run_whose_host_cannot_be_reached_is_running_and_says_so(first, place, stand_in, monkeypatch):
    state, _ = first
    (job,) = stand_in.idle()
    stand_in.shows(job, "UNKWN")
    monkeypatch.setenv("LSB_JOBID", "1")
    with state.run.taken():
        (found,) = look(place.folders, EXPERIMENT, {state.run.id: state.run.config})
    assert (found.state, found.reason) == ("running", "LSF says UNKWN")


def test_the_log_of_a_requeued_run_is_that_of_its_present_attempt(first, stand_in, monkeypatch, capsys):
    state, folder = first
    stand_in.fault(late_output=True)
    line = f"echo '{BEGIN}{state.run.id}0, of another'; echo \"{BEGIN}{state.run.id}, $(date '+%F %T'), here\""
    (job,) = [stand_in.executor(folder, lsf_setup=[line]).submit(time.sleep, 30)]
    monkeypatch.setattr(logs, "PEEK_S", 0)

    def begun_after(before: str) -> str:
        deadline = time.monotonic() + 60
        while (text := logs.of_run(state)).partition("\n")[0] <= before:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return text.partition("\n")[0]

    one = begun_after("")
    subprocess.run(["brequeue", "1"], check=True)
    two = begun_after(one)
    assert one in job.paths.stdout.read_text() and two not in job.paths.stdout.read_text()
    monkeypatch.setattr(logs, "PEEK_S", 30)
    asked = len(stand_in.calls("bpeek"))
    done = RunState(state.run, "done", submission=state.submission, job_id="1")
    looks = iter([state, state, done, done])
    logs.show(
        lambda: next(looks), follow=True
    )  # of one whose job goes on with other runs: the file is still the first's
    out = capsys.readouterr().out
    assert out.count(two) == 1 and one not in out
    assert len(stand_in.calls("bpeek")) == asked
