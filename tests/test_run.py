import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from batchens import results
from batchens import run as module
from batchens.files import ROOT
from batchens.results import METRICS, damage, read_results
from batchens.run import Folders, InUse, Run, guarded, read_json
from scripts.parameter_testing import Config

HOLD = """
import time
from batchens.run import Folders, Run
from scripts.parameter_testing import Config
try:
    with Run("e", Config(), Folders()).taken():
        print("taken", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(130)
"""


@pytest.fixture
def run():
    return Run("e", Config(), Folders())


@pytest.fixture
def holder():
    """Another process that has taken the run."""
    interruptible = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, cwd=ROOT, **interruptible) as process:
        assert process.stdout.readline() == b"taken\n"
        yield process
        process.kill()


def claimed_by(run, **owner):
    run.folder.mkdir(parents=True, exist_ok=True)
    run.claim.write_text(json.dumps({"host": socket.gethostname(), "pid": 1, "born": "0", "job_id": ""} | owner))


def can_be_taken(run):
    try:
        with run.taken():
            return read_json(run.claim)["pid"] == os.getpid()
    except InUse:
        return False


# one process at a time


def test_a_run_that_a_live_process_holds_is_in_use_and_the_message_says_by_whom(run, holder):
    before = run.claim.read_bytes()
    with pytest.raises(
        InUse, match=rf"{run.id} is held by process {holder.pid} on {socket.gethostname()}; .*claim\.json"
    ):
        with run.taken():
            pass
    assert run.claim.read_bytes() == before
    assert not run.failure.exists()


def test_other_runs_are_free(run, holder):
    assert can_be_taken(Run("e", Config(seed=1), run.folders))


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_holds_nothing(reaped, run, holder):
    holder.send_signal(signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert run.claim.exists()
    assert can_be_taken(run)
    assert not run.claim.exists()


def test_ctrl_c_leaves_no_claim_and_is_no_failure(run, holder):
    holder.send_signal(signal.SIGINT)
    assert holder.wait(10) == 130
    assert list(run.folder.iterdir()) == []


def test_a_process_that_has_the_number_of_a_dead_one_does_not_hold_its_run(run):
    claimed_by(run, pid=os.getpid(), born="1")
    assert can_be_taken(run)


def test_a_process_does_not_take_a_run_twice(run):
    with run.taken():
        assert not can_be_taken(Run("e", Config(), run.folders))


def test_what_another_host_holds_is_in_use_for_all_that_is_known_here(run):
    claimed_by(run, host="elsewhere", job_id="12_3")
    with pytest.raises(InUse, match=r"process 1 on elsewhere \(job 12_3\)"):
        with run.taken():
            pass


@pytest.mark.parametrize(("job", "index", "taken"), [("12", "3", True), ("12", "4", False), ("13", "3", False)])
def test_a_requeued_job_takes_over_what_it_held_on_another_host(job, index, taken, run, monkeypatch):
    monkeypatch.setenv("LSB_JOBID", job)
    monkeypatch.setenv("LSB_JOBINDEX", index)
    claimed_by(run, host="elsewhere", job_id="12_3")
    assert can_be_taken(run) == taken


def test_a_requeued_job_takes_over_also_when_it_has_the_same_process_number_there(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    claimed_by(run, host="elsewhere", pid=os.getpid(), job_id="12")
    assert can_be_taken(run)


def test_two_live_processes_of_one_job_on_this_host_do_not_take_one_run(run, monkeypatch, request):
    monkeypatch.setenv("LSB_JOBID", "12")  # an interactive session, say
    request.getfixturevalue("holder")
    assert read_json(run.claim)["job_id"] == "12"
    assert not can_be_taken(run)


def test_of_two_that_find_a_dead_claim_one_takes_the_run(run, monkeypatch):
    claimed_by(run, born="dead")
    rival = Run("e", Config(), run.folders)
    look = module.owner_alive

    def rival_is_faster(owner, **options):
        alive = look(owner, **options)
        monkeypatch.setattr(module, "owner_alive", look)
        stack.enter_context(rival.taken())  # between our look at the claim and what we do about it
        return alive

    monkeypatch.setattr(module, "owner_alive", rival_is_faster)
    with ExitStack() as stack:
        assert not can_be_taken(run)
        assert rival.claim.exists()


def test_of_two_that_claim_at_once_one_takes_the_run(run, monkeypatch):
    rival, dumps = Run("e", Config(), run.folders), json.dumps
    holders = []

    def take(one):
        with suppress(InUse):
            stack.enter_context(one.taken())
            holders.append(one)

    def rival_is_faster(*arguments):
        monkeypatch.setattr(json, "dumps", dumps)
        take(rival)  # while our claim is being written
        return dumps(*arguments)

    monkeypatch.setattr(json, "dumps", rival_is_faster)
    with ExitStack() as stack:
        take(run)
    assert len(holders) == 1


def test_a_link_of_which_nfs_lost_the_answer_is_no_claim_of_another(run, link_asked_twice):
    assert can_be_taken(run)
    assert not run.claim.exists()


def test_leaving_removes_no_claim_of_another(run):
    with run.taken():
        claimed_by(run, host="elsewhere", pid=7)  # which has deleted ours, as the message allows
    assert read_json(run.claim)["pid"] == 7


# how a run ends


def test_a_failure_says_why_in_one_line_and_then_where(run):
    with pytest.raises(ZeroDivisionError):
        with run.taken():
            run.checkpoint.write_text("kept")
            raise ZeroDivisionError("the reason\nand more")
    first, empty, *rest = run.failure.read_text().splitlines()
    assert (first, empty) == ("ZeroDivisionError: the reason", "")
    assert rest[0].startswith("Traceback") and any("test_run.py" in line for line in rest)
    assert run.checkpoint.exists() and not run.claim.exists()


def test_the_next_attempt_removes_the_failure_of_the_last(run):
    with pytest.raises(RuntimeError):
        with run.taken():
            raise RuntimeError
    with run.taken():
        assert not run.failure.exists()
    assert not run.failure.exists()


def test_a_disk_too_full_for_the_reason_does_not_hide_it(run, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RuntimeError, match="the reason"):
        with run.taken():
            monkeypatch.setattr(module, "write_text", full)
            raise RuntimeError("the reason")
    assert not run.claim.exists()


def test_folders_that_cannot_be_written_are_known_before_the_run_is_taken(run):
    run.result.parent.parent.mkdir()
    run.result.parent.write_text("a file where a folder belongs")
    with pytest.raises(ValueError, match="must be a folder that can be written to"):
        with run.taken():
            raise AssertionError
    assert not run.claim.exists()


ROW = {"epoch": 1, "seconds": 0.5, "images_per_second": 2.0, "peak_memory_mb": None}


def test_a_result_has_the_configuration_the_measurements_and_the_provenance_and_ends_the_run(run):
    rows = [
        {**ROW, "split": "train", "member": 0, "accuracy": 0.1, "nll": 2.5},
        {**ROW, "split": "test", "member": None, **dict.fromkeys(METRICS, 1 / 3)},
    ]
    with run.taken():
        run.after_epoch([rows[1] | {"split": "validation"}], epochs=5)
        assert read_json(run.progress).items() >= {"epoch": 1, "epochs": 5, "accuracy": 1 / 3, "seconds": 0.5}.items()
        run.checkpoint.write_text("")
        assert not run.done()
        path = run.write(rows, parameters=60_554, data_source="x")
    assert run.done() and path == run.result and damage(path) is None
    assert list(run.folder.iterdir()) == []
    read = read_results(run.folders.results, "e").astype(object)
    for name in ("dataset", "alpha_init", "learning_rate", "seed", "augment"):
        assert (read[name] == getattr(run.config, name)).all()
    assert not {"device", "threads", "compile"} & set(read.columns)
    assert read["nll"].tolist() == [2.5, 1 / 3] and read["brier"].isna().tolist() == [True, False]
    assert read["parameters"].tolist() == [60_554] * 2 and set(read["host"]) == {socket.gethostname()}


def test_a_result_names_the_code_that_its_run_began_with_and_went_on_with(run, tmp_path, monkeypatch):
    def commit() -> str:
        words = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run([*words, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
        return subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()

    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    row = {**ROW, "split": "validation", "member": None, "accuracy": 0.5, "nll": 1.0}
    results.code_version.cache_clear()
    try:
        first = commit()
        with run.taken():
            second = commit()
            run.after_epoch([row], 2)
            run.checkpoint.write_text("")
        results.code_version.cache_clear()  # another process, which goes on
        with run.taken():
            run.write([row])
        assert set(read_results(run.folders.results, "e")["commit"]) == {f"{first} + {second}"}
        run.result.unlink()
        with run.taken():  # from the beginning
            run.write([row])
        assert set(read_results(run.folders.results, "e")["commit"]) == {second}
    finally:
        results.code_version.cache_clear()


def test_half_a_result_is_not_done(run):
    run.result.parent.mkdir(parents=True)
    run.result.write_text("run_id,experiment,rows\n")
    assert not run.done()


# exit codes


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (KeyboardInterrupt(), 130, "the same command goes on after the last whole epoch"),
        (ValueError("no such thing"), 2, "error: no such thing\n"),
        (InUse("taken"), 2, "error: taken\n"),
        (RuntimeError("diverged"), 1, "error: diverged\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/c.pt"),
            1,
            "No space left on device (/x/c.pt); what was measured",
        ),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(error, code, said, capsys):
    def work():
        if error:
            raise error

    assert guarded(work) == code
    output = capsys.readouterr()
    assert output.out == "" and said in output.err
    assert "Traceback" not in output.err


def test_an_unforeseen_error_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)


# folders


def test_folders_are_absolute_and_those_given_go_before_those_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = Folders(results=Path("here"))
    assert folders == Folders(tmp_path / "data", tmp_path / "runs", tmp_path / "here")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_claim_that_was_never_finished_reads_as_empty(content, tmp_path):
    (tmp_path / "claim.json").write_text(content)
    assert read_json(tmp_path / "claim.json") == read_json(tmp_path / "absent.json") == {}


def test_a_reader_that_has_enough_ends_a_command_quietly():
    code = "import sys; from batchens.run import guarded; sys.exit(guarded(lambda: [print('x' * 999) for _ in range(999)]))"
    command = f"{sys.executable} -c {shlex.quote(code)} | head -1; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["x" * 999, "141"] and ran.stderr == ""
