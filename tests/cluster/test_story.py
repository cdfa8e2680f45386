"""The life of an array on a real scheduler, with all that happens to one. On a cluster: make test-cluster CLUSTER=dtu-cpu"""

import json
import os
import signal
import socket
import subprocess
import time

import pytest

from jobs import clusters
from jobs.lsf import lsf_id

EXPERIMENT = "parameter_testing"
PATIENCE = 1500 if "BATCHENS_TEST_CLUSTER" in os.environ else 420  # seconds; a site's queue is nobody's to hurry


class Story:
    """The array of the grid `cluster`, as `jobs status --json` tells of it."""

    def __init__(self, place):
        self.place = place
        self.most_at_once = 0
        self.epochs = {name: [] for name in place.configs}
        self.jobs = {name: set() for name in place.configs}

    def look(self):
        told = json.loads(self.place.jobs("status", EXPERIMENT, "--grid", "cluster", "--json"))
        states = {run["run"]: run for run in told["runs"]}
        assert sum(told["counts"].values()) == len(states) == 22
        self.most_at_once = max(self.most_at_once, told["counts"].get("running", 0))
        for name, run in states.items():
            if run["state"] in ("running", "pending"):
                self.epochs[name].append(run["epoch"] or 0)
                self.jobs[name].add(run["job"])
        return states

    def until(self, happened, seconds=PATIENCE):
        give_up = time.monotonic() + seconds
        while not happened(states := self.look()):
            assert time.monotonic() < give_up, [(one["state"], one["reason"], name) for name, one in states.items()]
            time.sleep(0.5)
        return states

    def ended(self, states):
        return not {"running", "pending"} & {one["state"] for one in states.values()}


def test_an_array_through_thick_and_thin_equals_an_undisturbed_one(site, new_place, tmp_path):
    place = new_place(tmp_path / "cluster", grid="cluster")
    story = Story(place)
    runs = list(place.configs)
    killed, timed_out, cancelled, raising = runs[0], runs[1], runs[-1], runs[10]
    bad = place.folders.runs / EXPERIMENT / raising / "checkpoint.pt"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"not a checkpoint")

    # SLURM warns 90 s before the limit, so at the beginning of the second minute at the latest; LSF at the limit
    limit = str((2 if clusters.load(site.cluster).scheduler == "slurm" else 1) / 60)
    said = place.jobs(
        "submit", EXPERIMENT, "--grid", "cluster", "--cluster", site.cluster, "--max-parallel", "2", "--hours", limit
    )
    assert "submitted 22 runs" in said
    assert story.look()[cancelled]["state"] == "pending"
    assert "nothing to submit" in place.jobs("submit", EXPERIMENT, "--grid", "cluster", "--cluster", site.cluster)

    place.jobs("cancel", EXPERIMENT, cancelled)
    assert story.look()[cancelled]["state"] == "cancelled"

    states = story.until(lambda states: states[killed]["state"] == "running" and states[killed]["epoch"])
    (claim,) = place.folders.runs.glob(f"{EXPERIMENT}/{killed}/claim.json")
    owner = json.loads(claim.read_text())
    if owner["host"] == socket.gethostname():
        os.kill(owner["pid"], signal.SIGKILL)
    else:
        slurm = clusters.load(site.cluster).scheduler == "slurm"
        command = ["scancel", "--signal=KILL"] if slurm else ["bkill", "-s", "KILL"]
        subprocess.run([*command, owner["job_id"] if slurm else lsf_id(owner["job_id"])], check=True)
    states = story.until(lambda states: states[killed]["state"] != "running", seconds=60)
    assert states[killed]["state"] == "lost" and states[killed]["reason"]

    states = story.until(story.ended)
    # the other long run is longer than its job may be: it came back under the same id, and went on from where it was
    assert len(story.jobs[timed_out]) == 1 and story.epochs[timed_out] == sorted(story.epochs[timed_out])
    (log,) = place.folders.runs.glob(f"{EXPERIMENT}/submissions/*/logs/{story.jobs[timed_out].pop()}_0_log.out")
    assert log.read_text().count(f"=== run {timed_out}") >= 2
    assert log.read_text().count(f"{timed_out}: epoch 1 of 800") == 1
    others = {name for name, one in states.items() if one["state"] != "done"}
    assert others == {killed, cancelled, raising}, [(one["state"], name) for name, one in states.items()]
    assert states[raising]["state"] == "failed" and "checkpoint" in states[raising]["reason"]
    assert "delete it to start the run again" in place.jobs("logs", EXPERIMENT, raising)
    assert "epoch 2 of 2" in place.jobs("logs", EXPERIMENT, runs[5])
    assert story.most_at_once <= 2

    bad.unlink()
    assert "submitted 2 runs" in place.jobs("retry", EXPERIMENT, "--grid", "cluster", "--max-parallel", "2")
    assert "submitted 1 runs" in place.jobs("retry", EXPERIMENT, "--grid", "cluster", "--state", "cancelled")
    states = story.until(story.ended)
    assert {one["state"] for one in states.values()} == {"done"}

    give_up = time.monotonic() + 60  # a run's last lines come after its result, and on a shared disk later still
    while len(written := place.written()) < len(runs):
        assert time.monotonic() < give_up, written
        time.sleep(0.5)
    assert written == sorted(runs)

    undisturbed = new_place(tmp_path / "local", grid="cluster")
    undisturbed.jobs("submit", EXPERIMENT, "--grid", "cluster", "--cluster", "local", "--max-parallel", "2")
    undisturbed.wait(PATIENCE)
    if set(place.table().host) == {socket.gethostname()}:
        assert place.metrics() == undisturbed.metrics()
    else:  # another processor rounds otherwise
        assert place.table().accuracy.tolist() == pytest.approx(undisturbed.table().accuracy.tolist(), abs=0.05)


def test_one_process_does_several_runs_and_hands_on_those_that_no_time_is_left_for(site, new_place, tmp_path):
    place = new_place(tmp_path)
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", site.cluster, "--runs-per-job", "6")
    place.wait(PATIENCE)
    assert place.states() == {"done": 6}
    (log,) = place.folders.runs.glob(f"{EXPERIMENT}/submissions/*/logs/*_log.out")
    assert log.read_text().count("=== run ") == 6
