"""What goes wrong on a cluster, made to go wrong on a real SLURM of one node that keeps no accounts."""

import json
import os
import signal
import subprocess
import time

import pytest

from jobs.states import look, submissions

EXPERIMENT = "parameter_testing"
SUBMIT = ("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "slurm")


@pytest.fixture
def place(own_site, new_place, tmp_path):
    there = new_place(tmp_path)
    yield there
    own_site.slurm.output("scancel", "--state=PENDING")
    own_site.slurm.output("scancel", "--full", "--signal=KILL", "--state=RUNNING")


@pytest.fixture
def long(own_site, new_place, tmp_path):
    """A place where the first two runs last a minute."""
    return new_place(tmp_path, grid="cluster")


def assert_all_done_once(place, site):
    """Every run is done, and its result was written by one job alone."""
    site.empty()  # a log may be some milliseconds behind the result
    assert place.states() == {"done": 6}
    assert place.written() == sorted(place.configs)


def test_the_controller_restarts_in_mid_array(place, own_site):
    place.jobs(*SUBMIT, "--max-parallel", "2")
    place.wait_for("running")
    own_site.slurm.restart_controller()
    place.wait()
    assert_all_done_once(place, own_site)


def test_without_a_controller_nothing_hangs_is_called_lost_or_is_submitted(place, own_site):
    place.jobs(*SUBMIT, "--max-parallel", "1")
    place.wait_for("running")
    place.jobs("cancel", EXPERIMENT)
    own_site.empty()
    own_site.slurm.stop_controller()
    try:
        started = time.monotonic()
        said = place.jobs("status", EXPERIMENT, "--grid", "smoke")
        assert "can't be asked" in said and "lost" not in said
        said = place.jobs(*SUBMIT, code=1)
        assert "Traceback" not in said and "squeue" in said
        assert time.monotonic() - started < 60
    finally:
        own_site.slurm.start_controller()
    assert len(submissions(place.folders, EXPERIMENT)) == 1
    place.jobs(*SUBMIT)
    place.wait()
    assert_all_done_once(place, own_site)


def test_what_sbatch_refuses_leaves_no_trace(place, tmp_path):
    refusing = tmp_path / "bin" / "sbatch"
    refusing.parent.mkdir()
    refusing.write_text("#!/bin/sh\necho sbatch: error: Socket timed out on send/recv operation >&2\nexit 1\n")
    refusing.chmod(0o755)
    path = place.environment["PATH"]
    place.environment["PATH"] = f"{refusing.parent}:{path}"
    said = place.jobs(*SUBMIT, code=1)
    assert "Socket timed out" in said and "Traceback" not in said
    assert place.states() == {"missing": 6} and submissions(place.folders, EXPERIMENT) == []


def test_the_node_goes_down_and_comes_back(place, own_site):
    place.jobs(*SUBMIT, "--max-parallel", "2")
    place.wait_for("running")
    own_site.slurm.node("down")
    place.wait_for("pending")
    assert "lost" not in place.states()
    own_site.slurm.node("resume")
    place.wait()
    assert_all_done_once(place, own_site)


def test_a_job_cancelled_behind_our_back_ends_though_nobody_keeps_accounts(place, own_site):
    place.jobs(*SUBMIT, "--max-parallel", "1")
    place.wait_for("running")
    (record,) = submissions(place.folders, EXPERIMENT)
    own_site.slurm.output("scancel", next(iter(record.jobs)).partition("_")[0])
    place.wait()
    states = place.states()
    assert states.pop("cancelled") + states.pop("done", 0) == 6 and not states
    place.jobs("retry", EXPERIMENT, "--grid", "smoke", "--state", "cancelled")
    place.wait()
    assert_all_done_once(place, own_site)


def test_jobs_that_slurm_has_forgotten_are_lost_and_start_again(place, own_site):
    place.jobs(*SUBMIT, "--max-parallel", "1")
    (record,) = submissions(place.folders, EXPERIMENT)
    place.wait_for("running")
    place.jobs("cancel", EXPERIMENT)
    place.wait()
    for run_id in record.run_ids():
        (place.folders.runs / EXPERIMENT / run_id / "cancelled").unlink(missing_ok=True)
    # as it would be written an hour and a controller's lifetime ago
    text = record.path.read_text().replace(
        f'"submitted": {record.submitted}', f'"submitted": {record.submitted - 3600}'
    )
    first = next(iter(record.jobs)).partition("_")[0]
    record.path.write_text(text.replace(f'"{first}_', '"99999_'))
    (record.folder / "ended.json").unlink(missing_ok=True)
    states = place.states()
    assert states.pop("lost") + states.pop("done", 0) == 6 and not states
    place.jobs("retry", EXPERIMENT, "--grid", "smoke", "--max-parallel", "2")
    place.wait()
    assert place.states() == {"done": 6}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_the_disk_of_the_results_is_full(place, own_site, tmp_path):
    place.folders.results.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place.folders.results], check=True)
    try:
        stuff = place.folders.results / "stuff"
        stuff.write_bytes(b"x" * 50_000)
        place.jobs(*SUBMIT, "--max-parallel", "2")
        place.wait()
        states = place.states()
        assert states["failed"] >= 3 and not list(place.folders.results.rglob("*.tmp"))
        assert "No space left" in place.jobs("status", EXPERIMENT, "--grid", "smoke")
        stuff.unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", place.folders.results], check=True)
        place.jobs("retry", EXPERIMENT, "--grid", "smoke", "--max-parallel", "2")
        place.wait()
        assert_all_done_once(place, own_site)
    finally:
        subprocess.run(["umount", place.folders.results], check=True)


def test_two_submissions_at_once_make_one_array(place, own_site):
    both = [place.start(*SUBMIT) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert sorted(text.split()[0] for text in said) == ["nothing", "submitted"]
    place.wait()
    assert_all_done_once(place, own_site)


def test_a_submitter_killed_in_mid_submission_leaves_nothing_that_is_done_twice(place, own_site, tmp_path):
    """sbatch has the array, and its id was not written down."""
    slow = tmp_path / "bin" / "sbatch"
    slow.parent.mkdir()
    slow.write_text('#!/bin/sh\n/usr/bin/env -u PATH /usr/bin/sbatch "$@"\nsleep 30\n')
    slow.chmod(0o755)
    path = place.environment["PATH"]
    place.environment["PATH"] = f"{slow.parent}:{path}"
    submitter = place.start(*SUBMIT, "--max-parallel", "1")
    give_up = time.monotonic() + 20
    while not own_site.slurm.output("squeue", "-h"):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    assert place.states() == {"pending": 6}
    submitter.send_signal(signal.SIGKILL)
    submitter.communicate()
    assert place.states() == {"missing": 6}
    place.environment["PATH"] = path
    assert "submitted 6 runs" in place.jobs(*SUBMIT)
    first, second = submissions(place.folders, EXPERIMENT)
    assert first.elements == [] and len(second.jobs) == 6
    place.wait()
    assert_all_done_once(place, own_site)


def test_cancel_leaves_the_other_runs_of_a_job_alone(long):
    ids = list(long.configs)
    long.jobs(
        "submit", EXPERIMENT, "--grid", "cluster", "--cluster", "slurm", "--runs-per-job", "11", "--max-parallel", "2"
    )
    running = {}
    give_up = time.monotonic() + 60
    while ids[0] not in running:
        assert time.monotonic() < give_up
        running = {one.run.id for one in look(long.folders, EXPERIMENT, long.configs) if one.state == "running"}
    said = long.jobs("cancel", EXPERIMENT, ids[0], ids[1], ids[5])  # the two long ones, and one that waits behind them
    assert "stopped 2 runs" in said and "1 stop at the end of their epoch" in said
    long.wait()
    states = {one.run.id: (one.state, one.reason) for one in look(long.folders, EXPERIMENT, long.configs)}
    assert {name for name, (state, _) in states.items() if state != "done"} == {ids[0], ids[1], ids[5]}, states
    assert all(states[one][0] == "cancelled" for one in (ids[0], ids[1], ids[5]))


def test_cancelling_many_asks_first(long):
    long.jobs("submit", EXPERIMENT, "--grid", "cluster", "--cluster", "slurm", "--max-parallel", "1")
    assert "--yes" in long.jobs("cancel", EXPERIMENT, code=2)
    assert "stopped 2" in long.jobs("cancel", EXPERIMENT, "--yes")
    assert set(long.states()) <= {"cancelled", "running", "done"}


@pytest.mark.parametrize(
    ("preset", "options", "says"),
    [
        ('options = { partition = "short" }\nhours = 1', [], "--hours must be at most 0.0333"),
        ('options = { partition = "nosuch" }', [], "partition must be one of gpu, short"),
        ('options = { colour = "red" }', [], "colour"),
        ("hours = 0", [], "hours must be a number above 0"),
        ("max_hours = 2", ["--hours", "3"], "hours must be at most 2"),
        ("cpu = 2", [], "a key must be one of"),
        ('scheduler = "pbs"', [], "one of local, slurm, lsf"),
        ('like = "odd"', [], "like must be the name of another preset"),
        ('options = { constraint = "nosuch" }', [], "sbatch"),
    ],
)
def test_a_preset_that_cannot_be_is_refused_before_anything_is_submitted(place, tmp_path, preset, options, says):
    own = tmp_path / "clusters.toml"
    base = "" if "like" in preset else 'like = "slurm"'
    own.write_text(f"[odd]\n{base}\n{preset}\n")
    place.environment["BATCHENS_CLUSTERS"] = str(own)
    code = 1 if says == "sbatch" else 2
    said = place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "odd", *options, code=code)
    assert says in said and "Traceback" not in said
    assert not [one for one in submissions(place.folders, EXPERIMENT) if one.elements]


def test_json_and_dry_run_of_an_array(place):
    said = place.jobs(
        *SUBMIT, "--max-parallel", "2", "--runs-per-job", "2", "--hours", "0.5", "--mem-gb", "2", "--dry-run"
    )
    assert "#SBATCH --array=0-2%2" in said and "#SBATCH --time=30" in said and "#SBATCH --mem=2GB" in said
    assert "wckey" not in said and place.files() == []
    told = json.loads(place.jobs("status", EXPERIMENT, "--grid", "smoke", "--json"))
    assert told["counts"] == {"missing": 6} and len(told["runs"]) == 6
