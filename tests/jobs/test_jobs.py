"""The command line of `jobs` with submitit's real LocalExecutor, on a grid of six runs that take a second each."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from batchens.files import ROOT
from batchens.results import damage, read_results
from batchens.run import Run, read_json
from jobs.experiments import runs_of
from jobs.states import look, submissions

EXPERIMENT = "parameter_testing"
SMOKE = runs_of(EXPERIMENT, "smoke")
IDS = list(SMOKE)


@pytest.fixture
def place(tmp_path, new_place):
    there = new_place(tmp_path)
    yield there
    there.jobs("cancel", EXPERIMENT, "--yes")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, new_place):
    """The smoke grid, submitted and done without disturbance."""
    there = new_place(tmp_path_factory.mktemp("finished"))
    said = there.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "2")
    assert "submitted 6 runs" in said and "2 at once" in said
    there.wait()
    deadline = time.monotonic() + 60
    while len(list(there.folders.runs.rglob("*_result.pkl"))) < 2:  # a job's last file, after its last run is done
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return there


def test_every_run_is_done_and_submitting_again_starts_nothing(finished):
    assert finished.states() == {"done": 6}
    files = finished.files()
    assert "nothing to submit" in finished.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local")
    assert finished.files() == files
    assert "6 runs: 6 done" in finished.jobs("status", EXPERIMENT, "--grid", "smoke", "--watch")


def test_no_more_processes_than_asked_for_and_each_run_once(finished):
    (record,) = submissions(finished.folders, EXPERIMENT)
    assert len(record.jobs) == 2
    table = read_results(finished.folders.results, EXPERIMENT)
    assert set(table.job_id.astype(str)) <= set(record.jobs)
    assert finished.written() == sorted(IDS)


def test_logs_are_those_of_the_run_alone(finished):
    said = finished.jobs("logs", EXPERIMENT, IDS[2])
    assert "epoch 2 of 2" in said and f"written: {finished.folders.results}" in said
    assert not any(other in said for other in IDS if other != IDS[2])


def test_logs_can_be_followed_to_the_end_and_a_run_without_any_says_so(place):
    assert f"however {IDS[0]} has none, and is missing" in place.jobs("logs", EXPERIMENT, IDS[0], code=2)
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "1")
    said = place.jobs("logs", EXPERIMENT, IDS[1], "--follow")
    assert said.count("epoch 1 of 2") == 1 and said.count("written: ") == 1


def test_status_as_json(finished):
    told = json.loads(finished.jobs("status", EXPERIMENT, "--grid", "smoke", "--json"))
    assert told["counts"] == {"done": 6} and [run["run"] for run in told["runs"]] == IDS


@pytest.mark.parametrize("names", [(), (IDS[-1],)])
def test_cancel_of_one_or_all_and_retry(place, names):
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "1")
    place.jobs("cancel", EXPERIMENT, *names)
    if names:  # the process that has the others yet to do holds it
        said = place.jobs("retry", EXPERIMENT, "--grid", "smoke", "--state", "cancelled")
        assert "nothing to submit: no other run is cancelled\n1 cancelled run can be submitted when" in said
    place.wait()
    states = place.states()
    assert states["cancelled"] == (1 if names else 6 - states.get("done", 0))
    assert "--state must name some of" in place.jobs("retry", EXPERIMENT, "--state", "done", code=2)
    assert "nothing to submit" in place.jobs("retry", EXPERIMENT, "--grid", "smoke")
    # the process that did the last run is there a moment longer, and holds what was cancelled
    while "can be submitted when" in place.jobs("retry", EXPERIMENT, "--grid", "smoke", "--state", "cancelled"):
        time.sleep(0.2)
    place.wait()
    assert place.states() == {"done": 6}


def test_plan_and_dry_run_write_nothing(place):
    said = place.jobs("plan", EXPERIMENT, "--grid", "smoke")
    assert all(run_id in said for run_id in IDS) and "6 missing" in said
    said = place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--runs-per-job", "4", "--dry-run")
    assert "6 runs in 2 elements" in said
    assert place.files() == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "optimiser"], "must be one of: "),
        (["plan", EXPERIMENT, "--grid", "alpha"], "smoke, cluster, demo, alpha_gamma, ensemble_size"),
        (["submit", EXPERIMENT, "--grid", "smoke", "--cluster", "dtu"], "must be one of: local"),
        (["submit", EXPERIMENT, "--cluster", "local"], "--grid smoke | "),
        (["submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "0"], "at least 1"),
        (["submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--runs-per-job", "0"], "at least 1"),
        (["submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--results", "/proc/x"], "--results"),
        (["run", EXPERIMENT, "nonsense"], "nonsense"),
        (["run", EXPERIMENT, "digits-cnn"], "is the beginning of"),
        (["run", EXPERIMENT, "3"], "say which one: --grid"),
        (["run", EXPERIMENT, "99", "--grid", "smoke"], "is none of them"),
        (["run", EXPERIMENT, IDS[0], "--again"], "leave --again out"),
        (["sumbit"], "sumbit"),
    ],
)
def test_what_cannot_be_is_said_with_exit_code_2_and_nothing_written(place, arguments, says):
    said = place.jobs(*arguments, code=2)
    assert says in said and "Traceback" not in said
    assert not list(place.folders.results.rglob("*.csv")) and not list(place.folders.runs.rglob("record.json"))


def test_images_that_cannot_be_had_are_missed_before_anything_is_submitted(place, tmp_path):
    place.environment |= {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    empty = str(tmp_path / "empty")
    said = place.jobs("submit", EXPERIMENT, "--grid", "cnn", "--cluster", "local", "--data", empty, code=2)
    assert "python -m batchens.data.images cifar10" in said
    assert not list(place.folders.runs.rglob("record.json"))
    said = place.jobs("submit", EXPERIMENT, "--grid", "cnn", "--cluster", "local", "--data", empty, "--dry-run")
    assert "images that would be fetched and decoded first: cifar10\n" in said


def test_only_the_images_of_what_is_submitted_are_wanted(place):
    """Without --grid, of an experiment whose other grids are of other images."""
    place.environment |= {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    run = Run(EXPERIMENT, SMOKE[IDS[0]], place.folders)
    run.folder.mkdir(parents=True)
    run.failure.write_text("RuntimeError: of the time before\n")
    assert "submitted 1 runs" in place.jobs("retry", EXPERIMENT, "--cluster", "local")
    place.wait()
    assert place.states() == {"done": 1, "missing": 5}


def test_run_by_number_and_by_prefix_and_again(place):
    said = place.jobs("run", EXPERIMENT, "0", "--grid", "smoke")
    assert IDS[0] in said and place.states() == {"done": 1, "missing": 5}
    assert "done before" in place.jobs("run", EXPERIMENT, IDS[0][:-4])
    said = place.jobs("run", EXPERIMENT, IDS[0], "--again")
    assert "accuracy 0, nll 0, brier 0, ece 0" in said  # the same machine and threads: the same numbers
    assert len(list(place.folders.results.rglob("*.csv"))) == 1


def test_two_submissions_at_once_start_no_run_twice(place):
    arguments = ["submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "1"]
    both = [place.start(*arguments) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 0]
    assert sorted(text.split()[0] for text in said) == ["nothing", "submitted"]
    place.wait()
    assert place.states() == {"done": 6} and len(submissions(place.folders, EXPERIMENT)) == 1


def test_killed_in_mid_run_is_lost_and_goes_on_to_the_same_numbers(place, finished):
    place.jobs(
        "submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "1", "--runs-per-job", "6"
    )
    place.wait_for("running")
    running = next(state for state in look(place.folders, EXPERIMENT, SMOKE) if state.state == "running")
    deadline = time.monotonic() + 60
    while not running.run.checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(running.owner["pid"], signal.SIGKILL)
    place.wait()
    assert place.states()["lost"] >= 1
    assert "killed" in place.jobs("status", EXPERIMENT, "--grid", "smoke")
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "2")
    place.wait()
    assert place.states() == {"done": 6}
    assert place.metrics() == finished.metrics()


def test_a_failing_run_does_not_stop_its_neighbours_and_says_why(place):
    bad = place.folders.runs / EXPERIMENT / IDS[1] / "checkpoint.pt"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"not a checkpoint")
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "1")
    place.wait()
    assert place.states() == {"done": 5, "failed": 1}
    said = place.jobs("status", EXPERIMENT, "--grid", "smoke", "--watch", code=1)
    assert "5 done, 1 failed" in said and "delete it to start the run again" in said and "jobs retry" in said
    bad.unlink()
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "1")
    place.wait()
    assert place.states() == {"done": 6}


def test_a_result_cut_short_is_repeated_and_kept_aside(place, finished):
    for path in finished.folders.results.rglob("*.csv"):
        copy = place.folders.results / EXPERIMENT / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    cut = place.folders.results / EXPERIMENT / f"{IDS[0]}.csv"
    cut.write_bytes(cut.read_bytes()[:-40])
    assert "5 done, 1 damaged" in place.jobs("status", EXPERIMENT, "--grid", "smoke")
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local")
    place.wait()
    assert place.states() == {"done": 6} and damage(cut) is None
    assert cut.with_name(cut.name + ".damaged1").exists()
    assert place.metrics() == finished.metrics()


def test_cancel_stops_the_workers_and_submit_goes_on(place):
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "1")
    place.wait_for("running")
    assert "stopped" in place.jobs("cancel", EXPERIMENT)
    assert set(place.states()) <= {"done", "cancelled"} and "cancelled" in place.states()
    assert "no job" in place.jobs("cancel", EXPERIMENT)
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "2")
    place.wait()
    assert place.states() == {"done": 6}


SAYS_WHEN_IT_WAITS = """
import runpy, sys, time
sleep = time.sleep
def saying(seconds):
    print("waits", flush=True)
    sleep(seconds)
time.sleep = saying
runpy.run_module("jobs", run_name="__main__", alter_sys=True)
"""


def test_a_run_that_was_stopped_by_hand_says_so_and_how_it_goes_on(place):
    run = Run(EXPERIMENT, SMOKE[IDS[0]], place.folders)
    command = [sys.executable, "-c", STOPPED_AFTER_AN_EPOCH, "run", EXPERIMENT, IDS[0]]
    ended = subprocess.run(command, cwd=ROOT, env=place.environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 130 and "the same command goes on" in ended.stderr and run.checkpoint.exists()
    said = place.jobs("status", EXPERIMENT, "--grid", "smoke")
    assert f"{IDS[0]}  (stopped by hand; `jobs run` goes on with it)" in said
    (again,) = (line for line in said.splitlines() if "jobs retry" in line)
    assert again.endswith(" --cluster NAME")
    place.jobs("run", EXPERIMENT, IDS[0])
    assert place.states() == {"done": 1, "missing": 5}


STOPPED_AFTER_AN_EPOCH = """
import runpy
from batchens.run import Run
after_epoch = Run.after_epoch
def stopping(*arguments):
    after_epoch(*arguments)
    raise KeyboardInterrupt
Run.after_epoch = stopping
runpy.run_module("jobs", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_of_logs_says_that_runs_go_on(place):
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "1")
    command = [sys.executable, "-c", SAYS_WHEN_IT_WAITS, "logs", EXPERIMENT, IDS[-1], "--follow"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    following = subprocess.Popen(command, cwd=ROOT, env=place.environment, text=True, **pipes)
    assert following.stdout.readline() == "waits\n"
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=30)
    assert following.returncode == 130 and err.strip() == "stopped; runs that were submitted go on"
    place.wait()
    assert place.states() == {"done": 6}


def test_ctrl_c_ends_the_watching_and_not_the_runs(place):
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "1")
    command = [sys.executable, "-c", SAYS_WHEN_IT_WAITS, "status", EXPERIMENT, "--grid", "smoke", "--watch"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    watching = subprocess.Popen(command, cwd=ROOT, env=place.environment, text=True, **pipes)
    assert watching.stdout.readline() == "waits\n"
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=30)
    assert watching.returncode == 130 and "the runs go on" in err and "Traceback" not in err
    place.wait()
    assert place.states() == {"done": 6}


def test_a_submitter_killed_while_it_holds_the_lock_does_not_block_the_next(place):
    holder = (
        "import os, sys; from jobs.submission import alone; from batchens.run import Folders\n"
        f"with alone(Folders(), {EXPERIMENT!r}): print('held', flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", holder], cwd=ROOT, env=place.environment, capture_output=True, text=True
    )
    assert ended.stdout == "held\n" and ended.returncode == -signal.SIGKILL
    started = time.monotonic()
    place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "1")
    assert time.monotonic() - started < 20


def test_a_killed_workers_run_is_lost_though_another_worker_lives(place):
    place.jobs(
        "submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "2", "--runs-per-job", "3"
    )
    place.wait_for("running")
    owner = next(state.owner for state in look(place.folders, EXPERIMENT, SMOKE) if state.state == "running")
    (record,) = submissions(place.folders, EXPERIMENT)
    os.kill(owner["pid"], signal.SIGKILL)
    place.wait_for("lost")
    lost = {state.run.id for state in look(place.folders, EXPERIMENT, SMOKE) if state.state == "lost"}
    assert lost and any(lost <= set(element) for element in record.elements)


def test_what_another_host_or_another_results_folder_holds_is_no_business_of_this_one(place, finished):
    (record,) = submissions(finished.folders, EXPERIMENT)
    folder = place.folders.runs / EXPERIMENT / "submissions" / "20260101T000000-1"
    folder.mkdir(parents=True)
    text = json.loads(record.path.read_text())
    (folder / "record.json").write_text(json.dumps(text))  # it wrote to the other place's results
    assert place.states() == {"missing": 6}
    (folder / "record.json").write_text(json.dumps(text | {"results": str(place.folders.results), "host": "elsewhere"}))
    assert place.states() == {"pending": 6}
    said = place.jobs("submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local")
    assert "nothing to submit" in said and f"if dead, delete {folder}" in said
    assert "cancel it there" in place.jobs("cancel", EXPERIMENT)
    (folder / "record.json").write_text('{"a": 1}')
    assert place.states() == {"missing": 6}


def test_of_a_run_that_was_begun_by_hand_on_another_host_it_is_said_how_to_free_it(place):
    run = Run(EXPERIMENT, next(iter(SMOKE.values())), place.folders)
    run.folder.mkdir(parents=True)
    run.claim.write_text(json.dumps({"host": "n-7", "pid": 4, "born": "1", "job_id": "12", "since": 0, "token": "x"}))
    for command in ("status", "cancel"):
        said = place.jobs(command, EXPERIMENT, "--grid", "smoke")
        assert "process 4 on n-7" in said and f"delete {run.claim}" in said
    assert place.states() == {"missing": 5, "running": 1}


def test_a_record_cut_short_by_a_crash_is_not_read_as_a_submission(place):
    folder = place.folders.runs / EXPERIMENT / "submissions" / "20260101T000000-1"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text('{"experiment": "param')
    assert place.states() == {"missing": 6}
    assert read_json(folder / "record.json") == {}


def test_no_command_but_run_imports_torch(place):
    program = (
        "import sys, runpy\n"
        "sys.argv = ['jobs', *sys.argv[1:]]\n"
        "try: runpy.run_module('jobs', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import json; print(json.dumps([m for m in ('torch', 'pandas', 'matplotlib', 'sklearn') if m in sys.modules]))"
    )
    for command in (
        ["plan", EXPERIMENT],
        ["status", EXPERIMENT],
        ["cancel", EXPERIMENT],
        ["retry", EXPERIMENT],
        ["doctor", "--cluster", "local"],
        ["submit", EXPERIMENT, "--grid", "smoke", "--cluster", "local", "--max-parallel", "1"],
        ["logs", EXPERIMENT, IDS[0], "--follow"],
    ):
        ended = subprocess.run(
            [sys.executable, "-c", program, *command],
            cwd=ROOT,
            env=place.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert json.loads(ended.stdout.splitlines()[-1]) == [], ended.stderr
