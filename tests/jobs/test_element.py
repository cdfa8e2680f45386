"""What a job does in its time: several runs, none that no time is left for, none that was cancelled."""

import os
import signal
import subprocess
import sys
import time

import pytest
from submitit.core.utils import UncompletedJobError

from batchens.files import ROOT
from batchens.run import Run
from jobs import element
from jobs.element import Element, OutOfTime, _take, work

EXPERIMENT = "parameter_testing"


@pytest.fixture
def place(new_place, tmp_path):
    return new_place(tmp_path)


@pytest.fixture
def requeued():
    """SIGUSR2, by which a job has itself requeued, ends the work with this."""

    class Requeued(BaseException):
        pass

    def handler(number, frame):
        raise Requeued

    before = signal.signal(signal.SIGUSR2, handler)
    yield Requeued
    signal.signal(signal.SIGUSR2, before)


def test_runs_that_the_remaining_time_may_not_hold_are_handed_on(place, requeued):
    ids = list(place.configs)[:2]
    assert work(EXPERIMENT, [ids[:1]], None, place.folders, until=time.time()) == 1  # a first run has no measure
    for run_id in ids[:1]:
        Run(EXPERIMENT, place.configs[run_id], place.folders).result.unlink()
    with pytest.raises(requeued):
        work(EXPERIMENT, [ids], None, place.folders, until=time.time() + 0.1)
    assert place.states() == {"done": 1, "missing": 5}
    assert work(EXPERIMENT, [ids], None, place.folders, until=time.time() + 600) == 2
    assert place.states() == {"done": 2, "missing": 4}


def test_where_a_job_cannot_be_requeued_it_goes_on_with_the_time_it_has(place, capsys):
    def refused(number, frame):  # as of LSF where nodes have no brequeue
        raise UncompletedJobError("Job not requeued because brequeue failed")

    before = signal.signal(signal.SIGUSR2, refused)
    try:
        assert work(EXPERIMENT, [list(place.configs)[:3]], None, place.folders, until=time.time() + 0.1) == 3
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert "not requeued: Job not requeued because brequeue failed" in capsys.readouterr().out
    assert place.states() == {"done": 3, "missing": 3}


def test_a_cancelled_run_is_passed_over(place, capsys):
    ids = list(place.configs)[:2]
    run = Run(EXPERIMENT, place.configs[ids[0]], place.folders)
    run.folder.mkdir(parents=True)
    run.cancelled.touch()
    work(EXPERIMENT, [ids], None, place.folders)
    assert f"cancelled: {ids[0]}" in capsys.readouterr().out
    assert place.states() == {"done": 1, "cancelled": 1, "missing": 4}


def test_a_job_whose_time_holds_no_epoch_is_not_requeued_for_ever(place):
    ids = list(place.configs)[:1]
    run = Run(EXPERIMENT, place.configs[ids[0]], place.folders)
    element = Element(EXPERIMENT, place.folders, minutes=10)
    element.started = time.time() - 590
    with pytest.raises(OutOfTime, match="--hours"):
        element.checkpoint(ids)
    run.folder.mkdir(parents=True)
    run.progress.touch()  # an epoch was finished
    again = element.checkpoint(ids)
    assert again.args == (ids,) and isinstance(again.function, Element)
    run.progress.unlink()
    element.started = time.time() - 60  # preempted, long before its time was up
    assert element.checkpoint(ids).args == (ids,)


@pytest.mark.parametrize("began", [0.0, -30.0])
def test_a_signal_before_a_job_has_imported_its_script_requeues_it(place, monkeypatch, began):
    """Or even before the job has looked at the clock."""

    def half_imported(*arguments):
        raise AttributeError("partially initialized module has no attribute 'GRIDS'")

    monkeypatch.setattr(element.experiments, "script", half_imported)
    early = Element(EXPERIMENT, place.folders, minutes=10)
    early.started = time.time() + began if began else 0.0
    assert early.checkpoint(["a", "b"]).args == (["a", "b"],)


def test_a_run_that_is_no_longer_in_a_grid_fails_alone(place, capsys):
    ids = list(place.configs)
    with pytest.raises(RuntimeError, match="1 of 2 runs failed: gone"):
        work(EXPERIMENT, [["gone", ids[0]]], None, place.folders)
    assert "its grid changed" in capsys.readouterr().err and place.states() == {"done": 1, "missing": 5}


def test_a_link_of_which_nfs_lost_the_answer_takes_an_element(tmp_path, link_asked_twice):
    assert _take(tmp_path / "0")
    code = f"import pathlib; from jobs.element import _take; print(_take(pathlib.Path({str(tmp_path / '0')!r})))"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert other.stdout == "False\n"


@pytest.mark.parametrize("gpu", ["3", "GPU-8f1b", "", None])
def test_a_worker_sees_the_gpu_that_it_was_given_and_not_submitits(gpu, place, tmp_path, monkeypatch):
    seen = []
    script = element.experiments.script(EXPERIMENT)
    monkeypatch.setattr(script, "main", lambda config, folders: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    before = signal.getsignal(signal.SIGTERM)
    try:
        work(EXPERIMENT, [list(place.configs)[:1]], tmp_path, place.folders, gpu=gpu)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [gpu]


def test_after_the_gpu_failed_nothing_more_is_begun_in_that_process(place, monkeypatch):
    class AcceleratorError(RuntimeError):
        pass

    begun = []

    def main(config, folders):
        begun.append(config)
        raise AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(element.experiments.script(EXPERIMENT), "main", main)
    ids = list(place.configs)[:3]
    with pytest.raises(RuntimeError, match=f"the GPU failed in {ids[0]}"):
        work(EXPERIMENT, [ids[:2], ids[2:]], None, place.folders)
    assert len(begun) == 1
