"""The SLURM that other tests use does what they rely on."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("one_node_slurm.py")
SPEC = importlib.util.spec_from_file_location("one_node_slurm", FILE)  # pytest's importlib mode finds no neighbours
one_node_slurm = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = one_node_slurm
SPEC.loader.exec_module(one_node_slurm)

pytestmark = pytest.mark.skipif(
    not one_node_slurm.installed(), reason="SLURM is not installed: make test-slurm does that"
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    slurm = one_node_slurm.up(tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.down()


def submit(slurm, folder, script, *options):
    said = slurm.output("sbatch", "--parsable", f"--chdir={folder}", "--output=%x.log", *options, f"--wrap={script}")
    return said.strip()


def until(done, seconds=20):
    give_up = time.monotonic() + seconds
    while not (value := done()):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    return value


def listening(pid):
    """The addresses on which a process takes TCP connections, as in /proc/net."""
    inodes = {path.readlink().name for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    rows = [line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


def test_an_array_gets_a_gpu_a_job_and_no_more_than_there_are(slurm, tmp_path):
    script = (
        "echo $CUDA_VISIBLE_DEVICES $(date +%s.%N) >$SLURM_ARRAY_TASK_ID; sleep 1; date +%s.%N >>$SLURM_ARRAY_TASK_ID"
    )
    job = submit(slurm, tmp_path, script, "--array=0-3", "--gpus-per-node=1")
    until(lambda: not slurm.output("squeue", "-h", "-j", job))  # sbatch --wait asks every 10 s only
    jobs = [(tmp_path / str(index)).read_text().split() for index in range(4)]
    times = sorted([(float(start), gpu, 1) for gpu, start, _ in jobs] + [(float(end), gpu, -1) for gpu, _, end in jobs])
    used = {"0": 0, "1": 0}
    for _, gpu, change in times:
        used[gpu] += change
        assert used[gpu] in (0, 1)
    assert {gpu for gpu, *_ in jobs} == {"0", "1"}


def test_there_is_no_accounting(slurm):
    with pytest.raises(one_node_slurm.SlurmError, match="accounting storage is disabled"):
        slurm.output("sacct")


def test_a_time_limit_above_the_queues_is_refused(slurm, tmp_path):
    with pytest.raises(one_node_slurm.SlurmError, match="time limit"):
        submit(slurm, tmp_path, "true", "--partition=short", "--time=3")


def test_a_job_outlives_its_controller_and_is_requeued_when_its_node_fails(slurm, tmp_path):
    job = submit(slurm, tmp_path, "echo $SLURM_RESTART_COUNT x >>starts; sleep 60")
    until((tmp_path / "starts").exists)
    slurm.restart_controller()
    assert slurm.output("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING"
    slurm.node("down")
    until(lambda: slurm.output("squeue", "-h", "-j", job, "-o", "%T").strip() == "PENDING")
    slurm.node("resume")
    until(lambda: len((tmp_path / "starts").read_text().splitlines()) == 2)
    assert (tmp_path / "starts").read_text().split() == ["x", "1", "x"]
    slurm.output("scancel", job)


def test_daemons_listen_on_loopback_only_and_none_is_left(tmp_path):
    slurm = one_node_slurm.up(tmp_path / "slurm")
    try:
        if one_node_slurm.named_loopback():
            assert {listening(slurm.pids()[name][0]) <= {"0100007F"} for name in ("slurmctld", "slurmd")} == {True}
            assert listening(slurm.pids()["slurmctld"][0])
        submit(slurm, tmp_path, "trap '' TERM; echo $$ >pid; sleep 60 & wait; sleep 60")
        pid = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        assert one_node_slurm.start_time(pid)
    finally:
        slurm.down()
    assert not one_node_slurm.start_time(pid)
    assert sorted(slurm.pids()) == ["munged", "slurmctld", "slurmd"]
    assert not any(one_node_slurm.start_time(pid) for pid, _ in slurm.pids().values())
