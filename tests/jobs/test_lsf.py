"""The LSF plugin against `lsf_stand_in.py`, which runs what is submitted and answers like IBM's LSF or a lean descendant."""

import multiprocessing
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
import submitit
from submitit.core import plugins
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

from jobs import lsf
from jobs.lsf import LsfExecutor, LsfInfoWatcher, LsfJob, LsfJobEnvironment, LsfParameters

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a job can't import this file


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def looked(job: LsfJob) -> str:
    """The state after a new look at the scheduler."""
    job.get_info(mode="force")
    return job.state


@pytest.fixture(scope="module", autouse=True)
def plugins_found_anew():
    for cached in (plugins._get_plugins, plugins.get_executors, plugins.get_job_environments):
        cached.cache_clear()


def inverse(number: float) -> float:
    print(f"job of {number}")
    return 1 / number


def sleep_unless(answer: int, marker: Path) -> int:
    deadline = time.monotonic() + 30
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer


class Resumes(submitit.helpers.Checkpointable):
    """Takes two attempts: the first waits for its interruption."""

    def __init__(self) -> None:
        self.attempts: list[str] = []

    def __call__(self, folder: Path) -> list[str]:
        environment = submitit.JobEnvironment()
        self.attempts.append(environment.job_id)
        (folder / f"attempt-{environment.job_id}-{len(self.attempts)}").touch()
        if len(self.attempts) == 1:  # with a worker, which gets the signal too
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,), daemon=True).start()
            time.sleep(30)
        return self.attempts


# ------------------------------------------------------------------------------------------------ what is submitted


def test_script():
    asked = LsfParameters(
        timeout_min=24 * 60,
        mem_gb=16.5,
        cpus_per_task=4,
        gpus_per_node=1,
        queue=["gpua100", "gpuv100"],
        gpu_mode="exclusive_process:mps=yes",
        select=["gpu32gb", "sxm2"],
        project="my project",
        job_group="/me/sweep",
        mem_limit=True,
        bsub_lines=["-u me@example.org"],
        setup=["module load cuda"],
        requeue_exit_code=85,
        warning_min=5,
    )
    script = lsf.make_script(
        "python -u", Path("/shared/me/my logs"), asked, lsf.job_name("x[1]; y", "0123456789"), 7, 2
    )
    assert script == (
        """#!/bin/bash
#BSUB -J "x_1_y-01234567[1-7]%2"
#BSUB -q "gpua100 gpuv100"
#BSUB -M 4224MB
#BSUB -n 4
#BSUB -R "select[(gpu32gb) && (sxm2)] rusage[mem=4224MB] span[hosts=1]"
#BSUB -gpu "num=1:mode=exclusive_process:mps=yes"
#BSUB -W 24:00
#BSUB -o "/shared/me/my logs/%J_%I_0_log.out"
#BSUB -e "/shared/me/my logs/%J_%I_0_log.err"
#BSUB -P "my project"
#BSUB -g /me/sweep
#BSUB -Q 85
#BSUB -wa USR2
#BSUB -wt 5
#BSUB -u me@example.org

export SUBMITIT_EXECUTOR=lsf
export SUBMITIT_LSF_REQUEUE_EXIT_CODE=85
module load cuda
exec python -u
"""
    )


def test_plain_script():
    asked = LsfParameters(mem_gb=3, cpus_per_task=2, mem_mode="per_job", mem_unit="", stderr_to_stdout=True)
    script = lsf.make_script("python -u", Path("/logs"), asked, "x")
    assert script == (
        """#!/bin/bash
#BSUB -J x
#BSUB -n 2
#BSUB -R "rusage[mem=3072] span[hosts=1]"
#BSUB -W 0:05
#BSUB -o /logs/%J_0_log.out

export SUBMITIT_EXECUTOR=lsf
unset SUBMITIT_LSF_REQUEUE_EXIT_CODE
exec python -u
"""
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"mem_gb": 0},
        {"nodes": 2},
        {"queue": "a b"},
        {"queue": ["a", "b; rm"]},
        {"gpu_mode": 'shared" -x'},
        {"select": "select[gpu32gb]"},
        {"project": "a\n#BSUB -x"},
        {"job_group": "sweep"},
        {"mem_mode": "per_node"},
        {"setup": "module load cuda"},
        {"setup": ["# BSUB -x"]},
        {"bsub_lines": ["u me"]},
        {"requeue_exit_code": 1},  # with which any failure ends, and would be requeued for ever
        {"warning_min": 5, "timeout_min": 5},
        {"warning_signal": "SIGUSR2"},
        {"array_parallelism": 0},
    ],
)
def test_wrong_parameters_are_answered_with_the_rule(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be .*however: "):
        LsfParameters(**wrong)


def test_unknown_parameters_are_answered_with_the_known_ones(stand_in):
    with pytest.raises(ValueError, match=r"partition(.|\n)*- queue \(default: None\)"):
        LsfExecutor(stand_in.logs).update_parameters(partition="gpu")
    with pytest.raises(NameError, match=r"partition.*queue|queue.*partition"):
        stand_in.executor(lsf_partition="gpu")


def test_chunks(stand_in):
    stand_in.fault(nothing_runs=True)
    jobs = stand_in.executor(name="many", lsf_array_limit=2, lsf_array_parallelism=4).map_array(abs, range(5))
    assert [job.job_id for job in jobs] == ["1_1", "1_2", "2_1", "2_2", "3"]
    assert [job.submission().args for job in jobs] == [(number,) for number in range(5)]
    first, second, third = [
        (stand_in.logs / f"{number}_submission.sh").read_text().split("\n")[1] for number in (1, 2, 3)
    ]
    assert first.endswith('[1-2]%1"') and second.endswith('[1-2]%1"') and "[" not in third
    assert jobs[0].paths.submission_file.exists() and jobs[4].paths.submission_file.exists()
    with pytest.raises(ValueError, match=r"array_parallelism must be at least .* however: 2 for 3 arrays"):
        stand_in.executor(lsf_array_limit=2, lsf_array_parallelism=2).map_array(abs, range(5))


@pytest.mark.parametrize(
    "refusal, words", [("esub", "wants a project; see(.|\n)*by esub"), ("bad_name", "Bad job name")]
)
def test_a_refusal_is_told_word_for_word_and_not_repeated(stand_in, refusal, words):
    stand_in.fault(**{refusal: True})
    with pytest.raises(FailedSubmissionError, match=words):
        stand_in.executor().submit(abs, 1)
    assert len(stand_in.calls("bsub")) == 1
    assert not list(stand_in.logs.glob("*.pkl"))


def test_a_scheduler_out_of_reach_is_tried_again(either):
    either.fault(down=2, nothing_runs=True)
    assert either.executor().submit(abs, 1).job_id == "1"
    assert len(either.calls("bsub")) == 3 and all("-J" in call for call in either.calls("bjobs"))
    either.fault(down=True, bjobs_down=True)  # then nothing is risked
    with pytest.raises(
        FailedSubmissionError, match=r"Communication time out(.|\n)*could not be found out:\nLSF is down"
    ):
        either.executor().submit(abs, 1)
    assert len(either.calls("bsub")) == 4


def test_a_bsub_given_up_that_did_submit_is_not_repeated(either, monkeypatch):
    monkeypatch.setattr(LsfExecutor, "bsub_timeout_s", 1.0)
    either.fault(hang=True, nothing_runs=True, empty=1)
    jobs = either.executor().map_array(abs, range(2))
    assert [job.job_id for job in jobs] == ["1_1", "1_2"] and len(either.calls("bsub")) == 1


def test_a_bsub_given_up_whose_job_bjobs_does_not_see_yet_leaves_no_job_behind(either, monkeypatch):
    monkeypatch.setattr(LsfExecutor, "bsub_timeout_s", 1.0)
    either.fault(hang=1, nothing_runs=True, stale=True)
    jobs = either.executor().map_array(abs, range(2))
    assert [job.job_id for job in jobs] == ["2_1", "2_2"]
    assert sorted(path.parent.parent.name for path in either.folder.glob("*/*/killed")) == ["1", "1"]
    either.fault(hang=1, bkill_down=True)  # then nothing is risked
    with pytest.raises(FailedSubmissionError, match=r"could not be found out:\nbkill failed"):
        either.executor().submit(abs, 1)
    assert len(either.calls("bsub")) == 3


# ------------------------------------------------------------------------------------------------------- whole runs


def test_map_array(either):
    either.fault(empty=1)
    jobs = either.executor(lsf_array_parallelism=3).map_array(inverse, [1, 0, 4])
    assert [jobs[0].result(), jobs[2].result()] == [1, 0.25]
    with pytest.raises(FailedJobError, match="ZeroDivisionError"):
        jobs[1].result()
    wait_for(lambda: [looked(job) for job in jobs] == ["COMPLETED", "FAILED", "COMPLETED"])
    assert "job of 4" in jobs[2].stdout()
    assert all(len(set(call[call.index("-o") + 2 :])) == 1 for call in either.calls("bjobs"))  # one id for the array


def test_an_end_without_a_result_is_a_failure_with_its_log(either):
    job = either.executor(lsf_setup=["echo the disk is full; exit 0"]).submit(abs, 1)
    wait_for(lambda: job.done(force_check=True))
    with pytest.raises(UncompletedJobError, match=r"Why it ended: error: (.|\n)*the disk is full"):
        job.result()
    time.sleep(LsfJob._results_timeout_s)
    assert job.state == "FAILED" and job.exit_reason().kind == "error"


def test_cancel_one_element(either):
    marker = either.folder / "go"
    jobs = either.executor(lsf_array_parallelism=3).map_array(sleep_unless, range(3), [marker] * 3)
    wait_for(lambda: {looked(job) for job in jobs} == {"RUNNING"})
    jobs[1].cancel()
    wait_for(lambda: looked(jobs[1]) == "FAILED")
    jobs[1].cancel()  # it has ended already: no error
    marker.touch()
    assert [jobs[0].result(), jobs[2].result()] == [0, 2]
    assert either.calls("bkill") == [["1[2]"], ["1[2]"]]
    assert jobs[1].exit_reason().kind == "cancelled"


def test_cancel_many(stand_in, monkeypatch):
    jobs = stand_in.idle(count=6)
    lsf.cancel([job.job_id for job in jobs if job.job_id != "1_4"] + ["7", "7_3"])
    assert stand_in.calls("bkill") == [["1[1-3,5-6]", "7"]]
    lsf.cancel(["1"])  # "Operation is in progress", with 255, is how a whole array is answered
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="bkill failed for 1"):
        lsf.cancel(["1"])


@pytest.mark.parametrize("code, lean", [(85, False), (None, True)])
def test_a_job_at_its_time_limit_goes_on_under_its_id(stand_in, code, lean, monkeypatch):
    stand_in.fault(lean=lean)
    monkeypatch.setattr(LsfInfoWatcher, "settle_s", 5.0)
    jobs = stand_in.executor(lsf_requeue_exit_code=code).map_array(Resumes(), [stand_in.folder] * 2)
    wait_for(lambda: (stand_in.folder / "attempt-1_2-1").exists())
    jobs[1]._interrupt(timeout=True)
    seen = set()
    wait_for(lambda: seen.add(looked(jobs[1])) or jobs[1].paths.result_pickle.exists())
    assert jobs[1].result() == ["1_2", "1_2"]
    assert seen <= {"RUNNING", "REQUEUED", "COMPLETING", "COMPLETED"}  # its short EXIT was not taken for the end
    assert len(stand_in.calls("brequeue")) == (code is None)
    assert not (stand_in.folder / "attempt-1_1-2").exists()


def test_strange_names_do_no_harm(stand_in):
    folder = stand_in.folder / "lo gs; touch it's $HOME [1]"
    job = stand_in.executor(folder, name='a"; touch b [1-3]%2 #').submit(inverse, 2)
    assert job.result() == 0.5 and "job of 2" in job.stdout()
    assert {path.name for path in stand_in.folder.iterdir()} == {"bin", "faults", "calls", "1", folder.name}
    with pytest.raises(ValueError, match="one kind of quotes"):
        stand_in.executor(stand_in.folder / "both\"'")
    with pytest.raises(ValueError, match="must be free of %j"):
        stand_in.executor(stand_in.folder / "%j")


# ------------------------------------------------------------------------------------------------------------ states


def test_the_oldest_form_of_bjobs_is_read():
    text = """\
JOBID   USER    STAT  QUEUE      FROM_HOST   EXEC_HOST   JOB_NAME   SUBMIT_TIME
22      lsfuser DONE  normal     vm          vm          st[1]      Nov 21 07:34
22      lsfuser PEND  normal     vm                      st[12]     Nov 21 07:34
23      lsfuser EXIT  normal     vm          -           plain      Nov 21 07:34
"""
    assert {name: info["Stat"] for name, info in lsf.read_bjobs(text).items()} == {
        "22_1": "DONE",
        "22_12": "PEND",
        "23": "EXIT",
    }


def test_ids_may_have_the_index_in_them(either):
    either.fault(enhanced=True)
    jobs = either.idle(count=2)
    assert [looked(job) for job in jobs] == ["PENDING", "PENDING"]
    columns = (
        "22[3]   me      RUN   normal     vm          vm          st[3]      Nov 21 07:34\n23 me PEND normal vm - x Nov"
    )
    assert {name: info["Stat"] for name, info in lsf.read_bjobs(columns).items()} == {"22_3": "RUN", "23": "PEND"}


@pytest.mark.parametrize("host", ["n-62-1", "4*n-62-1", "n-62-1:n-62-1"])
def test_the_host_of_a_job_with_several_cores(host):
    assert lsf.read_bjobs(f"22^3^RUN^-^{host}^-\n")["22_3"]["NodeList"] == "n-62-1"


def test_lines_count_whatever_the_exit_code(either):
    job = either.idle()[0]
    unknown = LsfJob(either.logs, "99")
    assert looked(job) == "PENDING" and unknown.state == "UNKNOWN"
    assert len(either.calls("bjobs")) == (2 if (either.folder / "faults" / "lean").exists() else 1)


def test_alive(stand_in):
    stats = ["UNKWN", "SSUSP", "USUSP", "PSUSP", "PROV", "NEWWORD"]
    jobs = stand_in.idle(count=len(stats))
    for job, stat in zip(jobs, stats, strict=True):
        stand_in.shows(job, stat)
    for _ in range(2):
        assert not any(job.done(force_check=True) for job in jobs)
        time.sleep(0.5)
    assert [job.state for job in jobs] == ["RUNNING"] * 3 + ["PENDING"] * 2 + ["UNKNOWN"]


def test_an_exit_is_an_end_when_it_lasts(stand_in):
    job = stand_in.idle()[0]
    states = []
    for stat in ("PEND", "RUN", "EXIT", "PEND", "RUN", "EXIT", "EXIT"):
        stand_in.shows(job, stat, code="1" if stat == "EXIT" else "")
        states.append(looked(job))
    assert states == ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "RUNNING", "COMPLETING", "COMPLETING"]
    time.sleep(0.5)
    assert looked(job) == "FAILED"
    stand_in.shows(job, "RUN")
    assert looked(job) == "FAILED"  # and then it stays


def test_bjobs_may_be_silent_for_a_while(stand_in, monkeypatch):
    job = stand_in.idle()[0]
    monkeypatch.setattr(LsfInfoWatcher, "grace_s", 3600.0)
    assert looked(job) == "PENDING"
    stand_in.fault(empty=5)
    assert {looked(job) for _ in range(5)} == {"PENDING"} and looked(job) == "PENDING"
    monkeypatch.setattr(LsfInfoWatcher, "grace_s", 0.0)
    stand_in.fault(bjobs_down=True, no_history=True)
    assert {looked(job) for _ in range(5)} == {"PENDING"}  # nothing is counted while the scheduler is away


@pytest.mark.parametrize(
    "faults, state, code",
    [
        ({}, "FAILED", "3"),
        ({"no_history": True}, "FAILED", ""),
        ({"no_history": True, "no_accounting": True}, "LOST", ""),
    ],
)
def test_forgotten_jobs_end(stand_in, faults, state, code):
    jobs = stand_in.idle(count=2)
    stand_in.shows(jobs[0], "EXIT", "3")
    stand_in.fault(forgets=True, **faults)
    assert [looked(jobs[0]) for _ in range(3)] == ["UNKNOWN", "UNKNOWN", state]
    assert jobs[0].get_info()["ExitCode"] == code and jobs[1].state == "PENDING"
    assert jobs[0].done()
    assert len(stand_in.calls("bhist")) == 1  # slow, so asked once


def test_an_end_seen_once_is_remembered(stand_in):
    job = stand_in.idle()[0]
    stand_in.shows(job, "EXIT", "3")
    assert looked(job) == "COMPLETING"
    stand_in.fault(forgets=True, no_history=True, no_accounting=True)
    assert [looked(job) for _ in range(3)] == ["COMPLETING", "COMPLETING", "FAILED"]
    assert job.get_info()["ExitCode"] == "3"


def test_a_job_that_history_calls_running_gets_time_but_not_for_ever(stand_in):
    job = stand_in.idle()[0]
    stand_in.fault(empty=True)
    states = [looked(job) for _ in range(12)]
    assert states[:11] == ["UNKNOWN"] * 11 and states[11] == "LOST"


def test_history_is_read_over_its_line_breaks():
    text = """
Job <3[1]>, Job Name <x[1-2]>, User <me>, Command <exec python>
Sat Nov 21 07:36:35: Dispatched to <here>;
Sat Nov 21 07:36:36: Exited with exit code 85. The CPU time used is 0.
                     0 seconds;
Sat Nov 21 07:36:37: Pending: Requeued job is waiting for rescheduling;
Sat Nov 21 07:36:39: Starting (Pid 12);
------------------------------------------------------------------------------
Job <3[2]>, Job Name <x[1-2]>, User <me>, Command <exec python>
Sat Nov 21 07:36:39: Exited by sig
                     nal 9. The CPU time used is 1.0 seconds;
"""
    found = lsf.read_history(text)
    assert {name: (info["Stat"], info["ExitCode"]) for name, info in found.items()} == {
        "3_1": ("RUN", ""),
        "3_2": ("EXIT", "137"),
    }


def test_a_killed_attempt_is_no_reason_for_the_end_of_the_next_one():
    text = (
        "Job <42>, User <u>, Project <default>\nnow: Submitted from host <h>;\nnow: Dispatched to <h>;\n"
        "now: Signal <KILL> requested by user or administrator <u>;\nnow: Exited with exit code 130.\n"
        "now: Pending: Requeued job is waiting for rescheduling;\nnow: Dispatched to <h>;\nnow: Exited with exit code 1.\n"
    )
    (info,) = lsf.read_history(text).values()
    assert info["ExitReason"] == "" and info["ExitCode"] == "1"
    assert lsf.exit_reason(info).kind == "error"


START = "submitit INFO (2026-11-21 {},385) - Starting with JobEnvironment(job_id=8)\n"
LATE = "submitit WARNING (2026-11-21 {},385) - Caught signal SIGUSR2 on node: this job is timed-out.\n"
REPORT = (
    "Sender: LSF System <u@h>\nSubject: Job 38: <n> Exited\n"
    + "\n".join("abcdefghijklmnopqrstuvwxyz")
    + "\nThe output (if any) "
)


@pytest.mark.parametrize(
    "kind, info, text",
    [
        ("time limit", {"ExitCode": "140"}, ""),
        ("time limit", {"ExitReason": "TERM_RUNLIMIT: job killed after", "ExitCode": "137"}, ""),
        ("time limit", {"Stat": "DONE"}, START.format("10:00:00") + LATE.format("10:05:00")),
        ("time limit", {"Stat": "EXIT"}, START.format("10:00:00") + START.format("10:06:00") + LATE.format("10:11:00")),
        ("memory", {"ExitReason": "TERM_MEMLIMIT: job killed after", "ExitCode": "130"}, ""),
        ("memory", {"ExitCode": "137"}, "Killed\nTERM_MEMLIMIT: job killed after reaching LSF memory usage limit.\n"),
        ("cancelled", {"ExitCode": "130"}, "KeyboardInterrupt"),
        ("cancelled", {"ExitReason": "TERM_OWNER: job killed by owner"}, ""),
        ("cancelled", {"Stat": "EXIT"}, ""),
        ("node lost", {"Stat": "ZOMBI", "NodeList": "n-1"}, ""),
        ("killed", {"ExitCode": "137"}, ""),
        (
            "killed",
            {"ExitReason": "TERM_EXTERNAL_SIGNAL: job killed by a signal external to LSF", "ExitCode": "130"},
            "",
        ),
        ("killed", {"ExitCode": "143"}, "TERM_PREEMPT: job killed after preemption\n"),
        ("lost", {"State": "LOST", "ExitReason": "nobody knows"}, ""),
        ("error", {"Stat": "EXIT", "ExitCode": "1"}, "a\nRuntimeError: CUDA out of memory"),
        # an earlier attempt's time limit, here in stderr, which follows stdout, is not the last one's end
        (
            "error",
            {"Stat": "EXIT", "ExitCode": "1"},
            START.format("10:00:00") + START.format("10:06:00") + LATE.format("10:05:00") + "CUDA out of memory",
        ),
        (
            "error",
            {"Stat": "EXIT", "ExitCode": "3"},
            f"CUDA out of memory\n\n{'-' * 60}\n{REPORT}is above this job summary.\n",
        ),
        ("error", {"Stat": "EXIT", "ExitCode": "3"}, f"{REPORT}follows:\n\nCUDA out of memory\n"),
    ],
)
def test_exit_reason(kind, info, text):
    reason = lsf.exit_reason(info, text)
    assert reason.kind == kind and kind in lsf.KINDS
    assert kind != "error" or reason.detail.endswith("CUDA out of memory")


def test_environment(monkeypatch):
    monkeypatch.setenv("LSB_JOBID", "12")
    monkeypatch.setenv("LSB_JOBINDEX", "0")
    assert LsfJobEnvironment().job_id == "12" and "node=0(1)" in repr(LsfJobEnvironment())
    monkeypatch.setenv("LSB_JOBINDEX", "3")
    assert LsfJobEnvironment().job_id == "12_3"
