"""IBM Spectrum LSF for submitit: a plugin that needs nothing but submitit and the standard library.

    [project.entry-points.submitit]
    executor = "jobs.lsf:LsfExecutor"
    job_environment = "jobs.lsf:LsfJobEnvironment"

    executor = submitit.AutoExecutor("logs", cluster="lsf")
    executor.update_parameters(timeout_min=120, gpus_per_node=1, mem_gb=16, cpus_per_task=4, lsf_queue="gpuv100")
    jobs = executor.map_array(train, configs)

The compute nodes need the plugin too, so install it in the environment that both sides use. `LsfParameters` lists the
parameters. One node and one task per job; an array index counts from 1, so an array's jobs are called `ID_1` ... `ID_n`.

Facts are marked by where they come from: [IBM] the manuals of Spectrum LSF 10.1; [lean] recorded from volclava 2.2, a
descendant of an early LSF that has fewer options; [unverified] neither. The plugin has not been run on an IBM cluster.

- Output: LSF may collect it elsewhere and write the log files at the end only [lean]; `bpeek ID` shows it meanwhile.
- Time limit: at `-W` every process of the job gets SIGUSR2, and is killed ten minutes later [IBM, lean]; submitit's
  handler checkpoints and asks to be requeued under the same id. A queue with a TERMINATE action of its own sends no
  such warning [lean]: set `warning_min` there. `-W` may be normalised by the host's speed [IBM: ABS_RUNLIMIT].
- The end of a job proves nothing: one killed at its time limit may be reported DONE [lean]. The result file does.
"""

import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from submitit.core import core, job_environment, utils

log = logging.getLogger(__name__)
R = TypeVar("R", covariant=True)
T = TypeVar("T")

REQUEUE_CODE = "SUBMITIT_LSF_REQUEUE_EXIT_CODE"  # the script tells the job with which exit code LSF requeues it


# ---------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class LsfParameters:
    """What a job asks for. Through `AutoExecutor` the first eight are shared ones, the others have the prefix `lsf_`.

    Raises:
        ValueError: a value is wrong; its text has the rule and the value.
    """

    name: str = "submitit"
    """-J; characters that LSF refuses become `_`, and eight hex digits are added by which a job is found again"""
    timeout_min: int = 5
    """-W"""
    mem_gb: float | None = None
    """of the whole job; `mem_mode` says how it is asked for"""
    cpus_per_task: int = 1
    """-n, on one host"""
    gpus_per_node: int = 0
    nodes: int = 1
    tasks_per_node: int = 1
    stderr_to_stdout: bool = False
    queue: str | Sequence[str] | None = None
    """-q; of several, LSF picks one"""
    gpu_mode: str | None = "exclusive_process"
    """-gpu "num=N:mode=MODE"; may go on with more of its options, as in `exclusive_process:mps=yes`; None: num only"""
    select: str | Sequence[str] = ()
    """what stands in `select[...]`, such as `gpu32gb`; several must all hold"""
    project: str | None = None
    """-P"""
    job_group: str | None = None
    """-g; `bgadd -L 8 /name` makes a group that runs at most 8 jobs, over several arrays"""
    mem_mode: str = "per_core"
    """`rusage[mem=...]` counts for each core at some sites and for the job (host) at others: per_core or per_job"""
    mem_unit: str = "MB"
    """[IBM] a bare number has the site's unit, so it is written; "" for a descendant that refuses units [lean]"""
    mem_limit: bool = False
    """also limit the memory to what is reserved (-M); sites differ in what they accept here"""
    bsub_lines: Sequence[str] = ()
    """more options, one a line, as in `-u me@example.org`"""
    setup: Sequence[str] = ()
    """lines of shell that are run before Python is started, unchanged"""
    array_parallelism: int | None = None
    """elements of one `map_array` that run at once; None: as many as the site lets run"""
    array_limit: int = 1000
    """the site's MAX_JOB_ARRAY_SIZE [IBM: 1000 by default]; more elements are cut into several arrays"""
    requeue_exit_code: int | None = None
    """-Q: LSF requeues a job that ends so, at the top of its queue [IBM: LSB_REQUEUE_TO_BOTTOM]; seen at the time limit
    of [lean] by a queue's REQUEUE_EXIT_VALUES, elsewhere [unverified]; None: the job calls `brequeue`, which the nodes
    must then have, and waits behind the other jobs of its priority [IBM]"""
    warning_min: int | None = None
    """-wt with -wa: minutes before the limit at which `warning_signal` is sent; None: SIGUSR2 at the limit"""
    warning_signal: str = "USR2"
    python: str | Sequence[str] | None = None
    """the interpreter on the node, or the words of a command that ends in one; None: this one's path"""

    def __post_init__(self) -> None:
        def check(rule: str, ok: Callable[[Any], Any], *names: str) -> None:
            for name in names:
                if not ok(value := getattr(self, name)):
                    raise ValueError(f"{name} must be {rule}, however: {name}={value!r}")

        def whole(least: int, most: int = sys.maxsize) -> Callable[[Any], bool]:
            return lambda value: isinstance(value, int) and least <= value <= most

        def text(pattern: str) -> Callable[[Any], bool]:
            return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None

        def each(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
            return lambda value: all(map(test, _several(value)))

        def none_or(test: Callable[[Any], Any]) -> Callable[[Any], Any]:
            return lambda value: value is None or test(value)

        line, hidden = r"[^\n\r]+", re.compile(r"^\s*#\s*BSUB", re.MULTILINE)
        check("text", lambda v: isinstance(v, str), "name")
        check("True or False", lambda v: isinstance(v, bool), "stderr_to_stdout", "mem_limit")
        check("a list of lines", lambda v: isinstance(v, list | tuple), "setup", "bsub_lines")
        check("a whole number of at least 0", whole(0), "gpus_per_node")
        check("a whole number of at least 1", whole(1), "timeout_min", "cpus_per_task", "array_limit")
        check("a whole number of at least 1, or None", none_or(whole(1)), "array_parallelism", "warning_min")
        check("1: one task on one node is all that is supported", whole(1, 1), "nodes", "tasks_per_node")
        check("from 3 to 125, or None", none_or(whole(3, 125)), "requeue_exit_code")  # 1 and 2 are how failures end
        check("a number above 0, or None", none_or(lambda v: isinstance(v, int | float) and v > 0), "mem_gb")
        check("'per_core' or 'per_job'", text("per_core|per_job"), "mem_mode")
        check("'MB' or ''", text("MB|"), "mem_unit")
        check("the name of a signal without SIG", lambda v: f"SIG{v}" in signal.Signals.__members__, "warning_signal")
        check("like exclusive_process:mps=yes, or None", none_or(text(r"\w+(:[\w.=,-]+)*")), "gpu_mode")
        check("a queue's name, a list of them, or None", each(text(r"[\w.@-]+")), "queue")
        check("what stands inside select[...]", each(text(r"""(?!.*select\[)[^\n\r"']+""")), "select")
        check("one line, or None", none_or(text(line)), "project")
        check("a path from / of letters, digits and _.-, or None", none_or(text(r"(/[\w.-]+)+")), "job_group")
        check("a path or a list of words, or None", none_or(lambda v: v and each(text(line))(v)), "python")
        check("options such as '-u me@example.org'", each(text(rf"-{line}")), "bsub_lines")
        # [lean] bsub reads such lines everywhere in the script, also with a space after the #
        check("shell, free of #BSUB; use bsub_lines", each(lambda v: type(v) is str and not hidden.search(v)), "setup")
        if self.warning_min and self.warning_min >= self.timeout_min:
            raise ValueError(
                f"warning_min must be below timeout_min={self.timeout_min}, however: warning_min={self.warning_min}"
            )


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


# -------------------------------------------------------------------------------------------------------- state


class Ran(NamedTuple):
    """What a command answered; `code` is None when it did not start or did not end in time."""

    code: int | None
    out: str
    err: str

    @property
    def text(self) -> str:
        return "\n".join(filter(None, (self.err.strip(), self.out.strip())))


def run(command: Sequence[str], text: str = "", timeout: float = 120) -> Ran:
    # BSUB_QUIET would keep bsub from printing the job's id
    environment = {name: value for name, value in os.environ.items() if name != "BSUB_QUIET"}
    try:
        ran = subprocess.run(
            command, input=text, capture_output=True, text=True, errors="replace", timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired as late:
        said = late.stderr.decode(errors="replace") if isinstance(late.stderr, bytes) else ""
        return Ran(None, "", f"{command[0]} gave no answer within {timeout:g} s\n{said}".strip())
    except OSError as error:
        return Ran(None, "", f"{command[0]} could not be started: {error}")
    return Ran(ran.returncode, ran.stdout, ran.stderr)


# Suspended jobs live. UNKWN, a host that can't be reached, mostly comes back. ZOMBI was killed on such a host [IBM].
STATES = {
    **dict.fromkeys(("PEND", "PROV", "PSUSP", "WAIT"), "PENDING"),
    **dict.fromkeys(("RUN", "SSUSP", "USUSP", "UNKWN"), "RUNNING"),
    **dict.fromkeys(("DONE", "PDONE"), "COMPLETED"),
    **dict.fromkeys(("EXIT", "ZOMBI"), "FAILED"),
}
ENDED = ("COMPLETED", "FAILED")
_IBM = ("-noheader", "-o", "jobid jobindex stat exit_code exec_host exit_reason delimiter='^'")
_LEAN = ("-json", "-o", "jobid stat exec_host job_name")  # names may hold blanks
_OLDEST = ("-w",)  # the default columns
_REFUSED_FORM = re.compile(r"valid field|invalid option|illegal option|unrecognized|usage:", re.IGNORECASE)
_NOT_THERE = re.compile(r"is not found|no matching job|no (unfinished |matching )?job found", re.IGNORECASE)
_ELEMENT = re.compile(r"\[(\d+)\]$")
_ID = re.compile(r"\d+(\[\d+\])?")  # 12[3] of an element where LSB_BJOBS_DISPLAY_ENH=Y [IBM]
_COLUMNS = re.compile(rf"(?P<job>{_ID.pattern})\s+\S+\s+(?P<stat>[A-Z]+)\s(?:.*\[(?P<index>\d+)\]\s)?")

Info = dict[str, str]


class Answer(NamedTuple):
    """What bjobs said."""

    jobs: dict[str, Info]
    heard: bool
    """it did not fail, so other jobs are probably not there"""
    sure: bool
    """it said that other jobs are not there"""
    problem: str


def lsf_id(job_id: str) -> str:
    """Return a job's name in LSF's commands: `12[3]` for submitit's `12_3`."""
    parent, _, index = job_id.partition("_")
    return f"{parent}[{index}]" if index else parent


def _info(job: str, index: str, stat: str, code: str = "", host: str = "", reason: str = "") -> tuple[str, Info]:
    parent, _, own = job.strip().rstrip("]").partition("[")
    index = own or index.strip()
    host = re.sub(r"^\d+\*|:.*", "", host)  # of several cores: 4*n-62-1, or the host once for each; it is one host
    job_id = f"{parent}_{index}" if index not in ("", "0", "-") else parent
    values = {"JobID": job_id, "Stat": stat, "ExitCode": code, "NodeList": host, "ExitReason": reason}
    return job_id, {name: "" if value.strip() == "-" else value.strip() for name, value in values.items()}


def read_bjobs(text: str) -> dict[str, Info]:
    """Read what bjobs printed in any of the forms that it is asked for; anything else in it is passed over."""
    if text.lstrip().startswith("{"):
        try:
            records = json.loads(text).get("RECORDS", [])
        except ValueError:
            return {}
        rows = [record for record in records if record.keys() >= {"JOBID", "STAT", "JOB_NAME"}]  # not an ERROR
        elements = [(row, _ELEMENT.search(row["JOB_NAME"])) for row in rows]
        return dict(
            _info(one["JOBID"], index.group(1) if index else "", one["STAT"], host=one.get("EXEC_HOST", ""))
            for one, index in elements
        )
    found: dict[str, Info] = {}
    for line in text.splitlines():
        row = line.split("^", 5)
        if len(row) == 6 and _ID.fullmatch(row[0].strip()):
            found.update([_info(*row)])
        elif columns := _COLUMNS.match(line):
            found.update([_info(columns["job"], columns["index"] or "", columns["stat"])])
    return found


def read_history(text: str) -> dict[str, Info]:
    """Read `bhist -l` or `bacct -l`: how each job ended, or Stat RUN when the last that is known of it is a start.

    Lines are wrapped anywhere, even inside words [lean], so all blanks are taken out first.
    """
    flat = re.sub(r"\s+", "", text)
    found: dict[str, Info] = {}
    for name, body in re.findall(r"Job<([\d\[\]]+)>(.*?)(?=Job<[\d\[\]]+>|$)", flat):
        events = list(
            re.finditer(
                r"(Donesuccessfully|Completed<done>)|(Exited|Completed<exit>)|Dispatched|Start|Requeuedjob", body
            )
        )
        if not events:
            continue
        done, exited = events[-1].groups()
        starts = [event.end() for event in events[:-1] if not any(event.groups())]  # of earlier attempts nothing counts
        code = re.search(r"exitcode(\d+)", body[events[-1].start() :])
        number = re.search(r"bysignal(\d+)", body[events[-1].start() :])
        said = body[starts[-1] if starts else 0 :]
        reasons = re.findall(r"TERM_[A-Z_]+|Signal<(?:KILL|TERM|INT)>requestedby", said)
        job_id, info = _info(
            name,
            "",
            "DONE" if done else "EXIT" if exited else "RUN",
            code.group(1) if code else str(128 + int(number.group(1))) if number else "",
            reason=reasons[-1].replace("requestedby", " requested by user or administrator") if reasons else "",
        )
        found[job_id] = info
    return found


@dataclass
class _Gap:
    since: float
    misses: int = 0
    revivals: int = 0


class LsfInfoWatcher(core.InfoWatcher):
    """Asks for all jobs of this process at once.

    States only move forward, but for a requeue. A job that is seen ended is COMPLETING until it is seen so again
    `settle_s` later: one that is requeued shows EXIT or DONE for a second or two [lean]. A job that bjobs leaves out is
    no worse off for `max_misses` answers and `grace_s` seconds; then bhist and bacct are asked, and the job that they
    don't know either is LOST, which is an end. While bjobs itself fails nothing is counted.
    """

    settle_s = 5.0
    max_misses = 3
    grace_s = 120.0
    max_revivals = 3
    query_timeout_s = 60.0

    def __init__(self, delay_s: int = 60) -> None:
        super().__init__(delay_s)
        self._forms = [_IBM, _LEAN, _OLDEST]
        self._ended: dict[str, float] = {}
        self._gaps: dict[str, _Gap] = {}

    def clear(self) -> None:
        super().clear()
        self._ended, self._gaps = {}, {}

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        return self.get_info(job_id, mode=mode).get("State", "UNKNOWN")

    def read_info(self, string: bytes | str) -> dict[str, Info]:
        return read_bjobs(string.decode(errors="replace") if isinstance(string, bytes) else string)

    def query(self, *selection: str) -> Answer:
        """Ask bjobs for jobs, by ids or options; -a, since without it IBM leaves out the finished ones."""
        while True:
            ran = run(["bjobs", "-a", *self._forms[0], *selection], timeout=self.query_timeout_s)
            if ran.code and len(self._forms) > 1 and _REFUSED_FORM.search(ran.err):
                self._forms.pop(0)
                continue
            # 255 is also the code when one job of many is gone; what was printed of the others holds
            sure = _NOT_THERE.search(ran.text) is not None or '"RECORDS"' in ran.out
            heard = ran.code is not None and (sure or ran.code == 0)
            return Answer(self.read_info(ran.out), heard, sure, ran.text or f"exit code {ran.code}, and no word")

    def history(self, job_ids: Sequence[str]) -> dict[str, Info]:
        """Ask bhist, then bacct, how jobs ended. Slow: for jobs that bjobs has forgotten."""
        wanted, found = set(job_ids), dict[str, Info]()
        for command in (["bhist", "-n", "0", "-l"], ["bacct", "-l"]):  # -n 0: all event files
            open_ = [job_id for job_id in job_ids if found.get(job_id, {}).get("Stat", "RUN") == "RUN"]
            of_parent = Counter(job_id.partition("_")[0] for job_id in open_)
            # many elements of one array are asked for by one name
            names = [job_id if of_parent[parent := job_id.partition("_")[0]] < 20 else parent for job_id in open_]
            for batch in batches(list(dict.fromkeys(names)), 50):
                known = read_history(run([*command, *map(lsf_id, batch)], timeout=2 * self.query_timeout_s).out)
                found.update((job_id, info) for job_id, info in known.items() if job_id in wanted)
        return found

    def update(self) -> None:
        jobs = sorted(self._registered - self._finished)
        self._last_status_check = time.time()
        if not jobs:
            return
        self._num_calls += 1
        missing = []
        for batch in batches(sorted({job_id.partition("_")[0] for job_id in jobs}), 200):
            answer = self.query(*batch)
            if not answer.heard:
                log.warning("bjobs: %s", answer.problem)
            for job_id in jobs:
                if job_id in answer.jobs:
                    self._seen(job_id, answer.jobs[job_id])
                elif answer.heard and job_id.partition("_")[0] in batch:
                    missing.append(job_id)
        self._missed(missing)

    def _seen(self, job_id: str, info: Info) -> None:
        self._gaps.pop(job_id, None)
        before = self._info_dict.get(job_id, {}).get("State", "UNKNOWN")
        state = STATES.get(info["Stat"], before)
        if state in ENDED:
            now = time.time()
            if now - self._ended.setdefault(job_id, now) < self.settle_s:
                state = "COMPLETING"
            else:
                self._finished.add(job_id)
        else:
            self._ended.pop(job_id, None)
            if state == "PENDING" and before in ("RUNNING", "COMPLETING", "REQUEUED"):
                state = "REQUEUED"
        self._info_dict[job_id] = {**info, "State": state}

    def _missed(self, job_ids: Iterable[str]) -> None:
        now, overdue = time.time(), []
        for job_id in job_ids:
            gap = self._gaps.setdefault(job_id, _Gap(now))
            gap.misses += 1
            if gap.misses >= self.max_misses and now - gap.since >= self.grace_s:
                overdue.append(job_id)
        past = self.history(overdue)
        for job_id in overdue:
            gap = self._gaps[job_id]
            last = self._info_dict.get(job_id, {})
            info = past.get(job_id) or (last if STATES.get(last.get("Stat", "")) in ENDED else None)
            if info and info["Stat"] == "RUN" and gap.revivals < self.max_revivals:
                self._gaps[job_id] = _Gap(now, revivals=gap.revivals + 1)
                continue
            if info is None or info["Stat"] == "RUN":
                why = "neither bjobs, bhist nor bacct knows how it ended"
                info = {"JobID": job_id, "Stat": "", "ExitCode": "", "NodeList": "", "ExitReason": why}
            self._info_dict[job_id] = {**info, "State": STATES.get(info["Stat"], "LOST")}
            self._finished.add(job_id)


# --------------------------------------------------------------------------------------------------------- a job


class ExitReason(NamedTuple):
    """Why a job ended: `kind` is one of KINDS, `detail` is for people."""

    kind: str
    detail: str


KINDS = ("time limit", "memory", "cancelled", "node lost", "killed", "error", "lost")
_TERMS = {  # [IBM] the words by which LSF says why it ended a job; [lean] has none
    "time limit": ("TERM_RUNLIMIT", "TERM_DEADLINE", "TERM_CPULIMIT", "TERM_WINDOW"),
    "memory": ("TERM_MEMLIMIT", "TERM_SWAP"),
    "cancelled": ("TERM_OWNER", "TERM_FORCE_OWNER", "TERM_ADMIN", "TERM_FORCE_ADMIN", "TERM_REQUEUE_OWNER"),
    "node lost": ("TERM_ZOMBIE",),
}
# submitit's own lines: the log of a requeued job has those of earlier attempts as well, stderr apart from stdout
_ATTEMPT = re.compile(r"submitit \w+ \((?P<when>[\d,:. -]+)\) - (?:Starting with|.*(?P<late>this job is timed-out))")
_REPORT = re.compile(r"(?:\n-{20,}\n)?Sender: LSF System.*?(?:The output \(if any\) follows:|\Z)", re.DOTALL)


def exit_reason(info: Mapping[str, str], text: str = "") -> ExitReason:
    """Tell why a job without a result ended, from what LSF says of it (`LsfJob.get_info()`) and the text of its log.

    LSF's own word counts most, in `info` or in the report that it adds to the log; then the exit code (128 + the
    signal); then what submitit and the shell wrote. `killed` is a word that says less (TERM_PREEMPT, TERM_LOAD), or
    exit code 137 alone: by the node, short of memory, or by the last step of a bkill. An `error` is the program's own,
    and has the end of its log.
    """
    said = info.get("ExitReason", "")
    reports = re.findall(r"^TERM_[A-Z_]+: .*", text, re.MULTILINE)  # one for each attempt
    told = next((words for words in (said, *reports[-1:]) if "TERM_" in words), "")
    term = re.search(r"TERM_[A-Z_]+", told)
    for kind, terms in _TERMS.items():
        if term and term.group() in terms:
            return ExitReason(kind, told)
    stat, code, host = (info.get(name, "") for name in ("Stat", "ExitCode", "NodeList"))
    if info.get("State") == "LOST":
        return ExitReason("lost", said)
    if stat in ("ZOMBI", "UNKWN"):
        return ExitReason("node lost", f"LSF calls the job {stat}: it can't reach the host {host}".rstrip())
    attempts = sorted((line["when"], bool(line["late"])) for line in _ATTEMPT.finditer(text))
    if code == "140" or (attempts and attempts[-1][1]) or "not requeued because: timed-out" in text:
        return ExitReason("time limit", "ended by SIGUSR2, which LSF sends at the time limit")
    if "requested by user" in said or (code in ("130", "143") and not told):  # LSF ends by these signals itself, too
        return ExitReason("cancelled", said or f"exit code {code}: ended by the signals of bkill")
    if stat == "EXIT" and not code and not host and not text:
        return ExitReason("cancelled", "no exit code, no host and no log: killed before it was started")
    if told or code == "137":
        return ExitReason("killed", told or "SIGKILL: by the node, short of memory, or by a bkill that took long")
    tail = "\n".join(_REPORT.sub("", text).rstrip().splitlines()[-20:])
    return ExitReason("error", "\n".join(filter(None, (said, f"exit code {code or 'unknown'} ({stat})", tail))))


def cancel(job_ids: Iterable[str], check: bool = True) -> None:
    """Kill jobs with as few calls of bkill as possible; `12_3` is an element, `12` a job or all of an array.

    Returns when LSF has taken the order, not when the jobs have ended. A job that has ended already, or is forgotten, is
    no error.

    Raises:
        RuntimeError: bkill said something else, and `check` is true.
    """
    elements: dict[str, list[int]] = {}
    for job_id in dict.fromkeys(job_ids):
        parent, _, index = job_id.partition("_")
        elements.setdefault(parent, []).extend([int(index)] if index else [0])
    targets = []
    for parent, indices in elements.items():
        if 0 in indices:
            targets.append(parent)
        else:
            targets += [f"{parent}[{','.join(some)}]" for some in batches(list(ranges(sorted(indices))), 50)]
    for batch in batches(targets, 200):
        _bkill(batch, check)


def cancel_named(name: str) -> None:
    """Kill the jobs of a name, which may end in `*`. There may be none; otherwise as `cancel`."""
    _bkill(["-J", name, "0"])


_HARMLESS = re.compile(rf"already finished|operation is in progress|{_NOT_THERE.pattern}", re.IGNORECASE)


def _bkill(what: Sequence[str], check: bool = True) -> None:
    ran = run(["bkill", *what])
    problems = [line for line in ran.err.splitlines() if line.strip() and not _HARMLESS.search(line)]
    if check and ran.code != 0 and (problems or not ran.err.strip()):
        raise RuntimeError(f"bkill failed for {' '.join(what)}:\n{ran.text or f'exit code {ran.code}'}")


def ranges(indices: Sequence[int]) -> Iterator[str]:
    first = last = indices[0]
    for index in [*indices[1:], None]:
        if index == last + 1:
            last = index
            continue
        yield str(first) if first == last else f"{first}-{last}"
        first = last = index or 0


def _ends(log_file: Path, most: int = 2**16) -> str:
    """Return a log, or of a long one both ends: LSF's report stands at one of them."""
    with log_file.open("rb") as file:
        head = file.read(most)
        skipped = log_file.stat().st_size - 2 * most
        if skipped > 0:
            file.seek(-most, os.SEEK_END)
        return (head + (b"\n[...]\n" if skipped > 0 else b"") + file.read()).decode(errors="replace")


class LsfJob(core.Job[R]):
    """A job or an element of an array; `job_id` is LSF's id, with `_index` for an element."""

    _cancel_command = "bkill"
    watcher = LsfInfoWatcher(delay_s=60)

    def cancel(self, check: bool = True) -> None:
        """Kill this job, and no other element of its array."""
        cancel([self.job_id], check)

    def _interrupt(self, timeout: bool = False) -> None:
        """Send the signal of a time limit (else of a preemption, which submitit passes over); for tests."""
        subprocess.check_call(["bkill", "-s", "USR2" if timeout else "TERM", lsf_id(self.job_id)])

    @property
    def state(self) -> str:
        """PENDING, RUNNING, REQUEUED, COMPLETING, COMPLETED, FAILED or LOST; UNKNOWN before the first answer.

        COMPLETED is said with the result there: while it may still be on its way the job is COMPLETING, then FAILED.
        """
        state = self.watcher.get_state(self.job_id)
        if state == "COMPLETED" and not self.paths.result_pickle.exists():
            ended = self.watcher._ended.get(self.job_id, 0.0)
            return "COMPLETING" if time.time() - ended < self._results_timeout_s else "FAILED"
        return state

    def exit_reason(self) -> ExitReason:
        """Tell why this job ended without a result; asks bhist when bjobs gave neither a code nor a reason."""
        info = self.watcher.get_info(self.job_id, mode="standard")
        if not (info.get("ExitCode") or info.get("ExitReason")):
            info = {**info, **{k: v for k, v in self.watcher.history([self.job_id]).get(self.job_id, {}).items() if v}}
        return exit_reason(
            info, "".join(_ends(path) for path in (self.paths.stdout, self.paths.stderr) if path.exists())
        )

    def _get_outcome_and_result(self) -> tuple[str, Any]:
        try:
            return super()._get_outcome_and_result()
        except utils.UncompletedJobError as error:
            reason = self.exit_reason()
            raise utils.UncompletedJobError(f"{error}\nWhy it ended: {reason.kind}: {reason.detail}") from error


# ---------------------------------------------------------------------------------------------------- submission


def job_name(name: str, uid: str) -> str:
    """Return a name that LSF takes and no other submission has: letters, digits and `._-`, at most 58 of them.

    [IBM, lean] Brackets would make an array, and other characters are answered with `Bad job name`.
    """
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name).strip('-.')[:49] or 'submitit'}-{uid[:8]}"


def make_script(
    command: str, folder: Path, parameters: LsfParameters, name: str, count: int = 1, parallel: int | None = None
) -> str:
    """Return what `bsub` gets on its standard input: the options, the setup and, in the shell's place, the command.

    `exec` matters: a shell that waits for a child ends at the first SIGUSR2, before the child has saved anything.
    Everything goes into one -R: a second one is refused by [lean] and merged by [IBM].
    """
    ask = parameters
    paths = utils.JobPaths(folder, job_id="%J" if count == 1 else "%J_%I")
    options = [("-J", name if count == 1 else f"{name}[1-{count}]" + (f"%{parallel}" if parallel else ""))]
    if ask.queue:
        options.append(("-q", " ".join(_several(ask.queue))))
    select = _several(ask.select)
    both = " && ".join(f"({each})" for each in select) if len(select) > 1 else "".join(select)
    resources = [f"select[{both}]"] if both else []
    if ask.mem_gb is not None:
        shares = ask.cpus_per_task if ask.mem_mode == "per_core" else 1
        memory = f"{math.ceil(ask.mem_gb * 1024 / shares)}{ask.mem_unit}"
        resources.append(f"rusage[mem={memory}]")
        if ask.mem_limit:
            options.append(("-M", memory))
    options.append(("-n", str(ask.cpus_per_task)))
    options.append(("-R", " ".join([*resources, "span[hosts=1]"])))
    if ask.gpus_per_node:
        options.append(("-gpu", f"num={ask.gpus_per_node}" + (f":mode={ask.gpu_mode}" if ask.gpu_mode else "")))
    options.append(("-W", f"{ask.timeout_min // 60}:{ask.timeout_min % 60:02}"))
    options.append(("-o", str(paths.stdout)))
    if not ask.stderr_to_stdout:
        options.append(("-e", str(paths.stderr)))
    if ask.project:
        options.append(("-P", ask.project))
    if ask.job_group:
        options.append(("-g", ask.job_group))
    if ask.requeue_exit_code:
        options.append(("-Q", str(ask.requeue_exit_code)))
    if ask.warning_min:
        options += [("-wa", ask.warning_signal), ("-wt", str(ask.warning_min))]
    lines = ["#!/bin/bash"]
    lines += [f"#BSUB {option} {_quoted(value)}" for option, value in options]
    lines += [f"#BSUB {line}" for line in ask.bsub_lines]
    lines += ["", "export SUBMITIT_EXECUTOR=lsf"]
    lines.append(f"export {REQUEUE_CODE}={ask.requeue_exit_code}" if ask.requeue_exit_code else f"unset {REQUEUE_CODE}")
    return "\n".join([*lines, *ask.setup, f"exec {command}", ""])


def _quoted(value: str) -> str:
    """Quote a value of a #BSUB line, which bsub reads by itself: $ and ` mean nothing there."""
    if re.fullmatch(r"[\w.:/%+@-]+", value):
        return value
    for quote in ('"', "'"):
        if quote not in value and "\n" not in value:
            return f"{quote}{value}{quote}"
    raise ValueError(f"a value for LSF must do without newlines and without one kind of quotes, however: {value!r}")


_SUBMITTED = re.compile(r"Job <(\d+)> is submitted")
# A refusal is final unless it speaks of the connection to the scheduler; the words are [unverified] but for the first two.
_REFUSED = re.compile(r"not submitted|illegal option|invalid option|usage:|aborted by esub", re.IGNORECASE)
_CONNECTION = re.compile(
    r"library call|timed? ?out|socket|connect|communicat|not ready|try again|LSF is down", re.IGNORECASE
)


class LsfExecutor(core.PicklingExecutor):
    """Submits to LSF with `bsub`; see `LsfParameters` for what `update_parameters` takes.

    Args:
        folder: for pickles, scripts and logs, on a disk that the nodes share
        python: the same as the parameter `python`
    """

    job_class = LsfJob
    bsub_timeout_s = 120.0
    bsub_retry_s: Sequence[float] = (5.0, 20.0)

    def __init__(
        self,
        folder: str | Path,
        max_num_timeout: int = 3,
        max_pickle_size_gb: float = 1.0,
        python: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(folder, max_num_timeout=max_num_timeout, max_pickle_size_gb=max_pickle_size_gb)
        if self.affinity() <= 0:
            raise RuntimeError(
                "`bsub` must be on PATH to submit to LSF, however it is not; is this a login node of a cluster?"
            )
        if re.search(r"%[jtAaJI]", str(self.folder)):
            # LSF opens the logs where their folder exists already, and the id is known only later
            raise ValueError(f"the folder must be free of %j, %t, %A, %a, %J and %I, however: {self.folder}")
        if python is not None:
            self._internal_update_parameters(python=python)

    @classmethod
    def affinity(cls) -> int:
        return 2 if shutil.which("bsub") else -1

    @classmethod
    def _valid_parameters(cls) -> set[str]:
        return {field.name for field in fields(LsfParameters)}

    def _internal_update_parameters(self, **kwargs: Any) -> None:
        defaults = asdict(LsfParameters())
        if unknown := sorted(kwargs.keys() - defaults.keys()):
            valid = "\n  - ".join(f"{name} (default: {value!r})" for name, value in defaults.items())
            raise ValueError(f"Unavailable parameter(s): {unknown}\nValid parameters are:\n  - {valid}")
        asked = LsfParameters(**{**self.parameters, **kwargs})
        make_script("", self.folder, asked, "check")
        super()._internal_update_parameters(**kwargs)

    @property
    def _submitit_command_str(self) -> str:
        python = _several(self.parameters.get("python")) or [sys.executable]
        return shlex.join([*python, "-u", "-m", "submitit.core._submit", str(self.folder)])

    def _internal_process_submissions(self, delayed_submissions: list[utils.DelayedSubmission]) -> list[core.Job[Any]]:
        asked = LsfParameters(**self.parameters)
        chunks = list(batches(delayed_submissions, asked.array_limit))
        parallel = asked.array_parallelism
        if parallel and parallel < len(chunks):
            raise ValueError(
                f"array_parallelism must be at least the number of arrays, for LSF limits each by itself, however: {parallel} "
                f"for {len(chunks)} arrays of up to {asked.array_limit} jobs; a job group's limit holds over all (bgadd -L)"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs: list[core.Job[Any]] = []
        for number, chunk in enumerate(chunks):
            share = (parallel + number) // len(chunks) if parallel else None
            try:
                jobs += self._submit_chunk(chunk, share, len(delayed_submissions))
            except Exception as error:
                if not jobs:
                    raise
                before = ", ".join(sorted({job.job_id.partition("_")[0] for job in jobs}))
                raise utils.FailedSubmissionError(
                    f"{error}\nThe first {len(jobs)} of {len(delayed_submissions)} jobs are submitted, as {before}."
                ) from error
        return jobs

    def _submit_chunk(
        self, chunk: Sequence[utils.DelayedSubmission], parallel: int | None, total: int
    ) -> list[core.Job[Any]]:
        pickles = [self.folder / f"{uuid.uuid4().hex}.pkl" for _ in chunk]
        try:
            for path, delayed in zip(pickles, chunk, strict=True):
                delayed.set_timeout(self.parameters.get("timeout_min", 5), self.max_num_timeout)
                delayed.dump(path)
                size = total * path.stat().st_size / 1024**3
                if path is pickles[0] and size > self.max_pickle_size_gb:
                    raise RuntimeError(
                        f"pickles must stay below max_pickle_size_gb={self.max_pickle_size_gb}, however these {total} "
                        f"come to about {size:.2f} GB; pass names of files rather than data"
                    )
            job_id = self._submit_script(self._submitit_command_str, len(chunk), parallel)
        except BaseException:
            for path in pickles:
                path.unlink(missing_ok=True)
            raise
        ids = [job_id] if len(chunk) == 1 else [f"{job_id}_{index}" for index in range(1, len(chunk) + 1)]
        jobs: list[core.Job[Any]] = [LsfJob(self.folder, name) for name in ids]
        for job, path in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(path, "submitted_pickle")
        return jobs

    def _submit_command(self, command: str) -> core.Job[Any]:
        return LsfJob(self.folder, self._submit_script(command))

    def _submit_script(self, command: str, count: int = 1, parallel: int | None = None) -> str:
        uid = uuid.uuid4().hex
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".submission_file_{uid}.sh"
        path.write_text(self._make_submission_file_text(command, uid, count, parallel))
        self._throttle()
        self._last_job_submitted = time.time()
        job_id = self._bsub(path, job_name(self.parameters.get("name", LsfParameters.name), uid))
        path.rename(self.folder / f"{job_id}_submission.sh")
        return job_id

    def _bsub(self, script: Path, name: str) -> str:
        """Return the id of the submitted job.

        A bsub that failed or was given up may have done its work [lean], so before another try the scheduler is asked.
        """
        text, problem = script.read_text(), ""
        for wait in (*self.bsub_retry_s, 0.0):
            ran = run(self._make_submission_command(script), text, self.bsub_timeout_s)
            if ran.code == 0 and (found := _SUBMITTED.search(ran.out)):
                return found.group(1)
            problem = ran.text or f"no word about a job, exit code {ran.code}"
            if ran.code is not None and _REFUSED.search(problem) and not _CONNECTION.search(problem):
                break
            log.warning("bsub: %s", problem)
            time.sleep(wait)
            if job_id := self._find(name, problem):
                return job_id
        raise utils.FailedSubmissionError(f"bsub did not take {script}:\n{problem}")

    def _find(self, name: str, problem: str) -> str | None:
        """Return the id of the job with this name, or None when there is none.

        bjobs may be answered from a copy that is some minutes old [IBM: MBD_REFRESH_TIME], so its no is made sure by
        bkill, which mbatchd itself answers.
        """
        for wait in (*self.bsub_retry_s, 0.0):
            answer = LsfJob.watcher.query("-J", name)
            if answer.jobs:
                return next(iter(answer.jobs)).partition("_")[0]
            why = answer.problem
            if answer.sure:
                try:
                    cancel_named(name)
                    return None
                except RuntimeError as error:
                    why = str(error)
            time.sleep(wait)
        raise utils.FailedSubmissionError(
            f"bsub failed:\n{problem}\nWhether the job {name} is there nevertheless could not be found out:\n{why}"
        )

    def _num_tasks(self) -> int:
        return 1

    def _make_submission_file_text(self, command: str, uid: str, count: int = 1, parallel: int | None = None) -> str:
        asked = LsfParameters(**self.parameters)
        return make_script(command, self.folder, asked, job_name(asked.name, uid), count, parallel)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["bsub"]  # [IBM] options in a script count only when it comes on standard input

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        text = string.decode() if isinstance(string, bytes) else string
        if found := _SUBMITTED.search(text):
            return found.group(1)
        raise utils.FailedSubmissionError(f"bsub must name the job it submitted, however it said: {text!r}")


# --------------------------------------------------------------------------------------------- inside of the job


class LsfJobEnvironment(job_environment.JobEnvironment):
    """What a running job knows of itself. Outside arrays LSB_JOBINDEX is 0 [IBM, lean]."""

    _env: ClassVar[dict[str, str]] = {
        "job_id": "LSB_JOBID",
        "array_job_id": "LSB_JOBID",
        "array_task_id": "LSB_JOBINDEX",
        # not set by anyone: one task on one node
        **{
            name: f"SUBMITIT_LSF_{name.upper()}"
            for name in ("num_tasks", "num_nodes", "node", "global_rank", "local_rank")
        },
    }

    @property
    def array_job_id(self) -> str | None:
        return super().array_job_id if self.array_task_id else None

    @property
    def array_task_id(self) -> str | None:
        index = super().array_task_id
        return index if index not in (None, "", "0") else None

    def _handle_signals(self, paths: utils.JobPaths, submission: utils.DelayedSubmission) -> None:
        """Let this process alone answer the time limit: LSF signals forked workers too, which would checkpoint as well."""
        super()._handle_signals(paths, submission)

        def worker() -> None:
            signal.signal(self._usr_sig(), signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which submitit passes over, and by which workers are ended

        os.register_at_fork(after_in_child=worker)

    def _requeue(self, countdown: int) -> None:
        """Put this job back into the queue under its id and index, as the last thing that it does.

        `brequeue` works from inside a job [lean], and kills it with SIGINT, SIGTERM, SIGKILL, ten seconds apart.
        """
        if code := os.environ.get(REQUEUE_CODE):
            sys.exit(int(code))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ran = run(["brequeue", lsf_id(self.job_id)], timeout=60)
        if ran.code != 0 and "being requeued" not in ran.text:
            raise utils.UncompletedJobError(
                f"Job not requeued because brequeue failed; lsf_requeue_exit_code does without it:\n{ran.text}"
            )
