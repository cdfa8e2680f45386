"""A stand-in for LSF: bsub, bjobs, bkill, bhist, bacct, brequeue and bpeek, which really run what is submitted.

Called as `lsf_stand_in.py COMMAND ARGUMENT...` with a folder in LSF_STAND_IN. It answers as IBM's manuals say or, with the
fault `lean`, as was recorded from a descendant of an early LSF. Faults are files in FOLDER/faults; a number in one says how
many times it strikes. Every call is a line in FOLDER/calls. A file FOLDER/stop ends everything.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(os.environ["LSF_STAND_IN"])


def fault(name: str) -> bool:
    path = ROOT / "faults" / name
    left = path.read_text() if path.exists() else "0"
    if left.isdigit() and int(left):
        path.write_text(str(int(left) - 1))
    return left != "0"


def say(error: str, code: int = 255) -> int:
    print(error, file=sys.stderr)
    return code


def write(path: Path, value: object) -> None:
    path.with_suffix(".tmp").write_text(str(value))
    path.with_suffix(".tmp").replace(path)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def element(name: str) -> Path:
    """The folder of `12` or `12[3]`."""
    job, _, index = name.rstrip("]").partition("[")
    return ROOT / job / (index or "0")


def elements(job: Path) -> list[Path]:
    return sorted((path for path in job.glob("[0-9]*") if path.is_dir()), key=lambda path: int(path.name))


def label(one: Path) -> str:
    return one.parent.name if one.name == "0" else f"{one.parent.name}[{one.name}]"


def bsub(arguments: list[str]) -> int:
    script = sys.stdin.read()
    lines = [shlex.split(line[6:]) for line in script.splitlines() if line.startswith("#BSUB ")]
    options = {line[0]: " ".join(line[1:]) for line in lines}
    name, indices, parallel = re.fullmatch(r"(.*?)(?:\[(.*)\](?:%(\d+))?)?", options["-J"]).groups()
    if not re.fullmatch(r"[\w.-]+", name) or (indices and not re.fullmatch(r"1-\d+", indices)) or fault("bad_name"):
        return say("Bad job name. Job not submitted.")
    if fault("esub"):
        return say("This queue wants a project; see the user guide.\nRequest aborted by esub. Job not submitted.")
    if fault("down"):
        return say("Failed in an LSF library call: Communication time out. Job not submitted.")
    count = int(indices[2:]) if indices else 1
    if count > 1000:
        return say("Job array index too large. Job not submitted.")
    number = 1
    while True:
        try:
            (job := ROOT / str(number)).mkdir()
            break
        except FileExistsError:
            number += 1
    for index in range(1, count + 1) if indices else [0]:
        (job / str(index)).mkdir()
        write(job / str(index) / "stat", "PEND")
    write(job / "script", script)
    write(job / "options", json.dumps(options | {"name": name, "parallel": int(parallel or 2)}))
    if not fault("nothing_runs"):
        command = [sys.executable, __file__, "serve", str(job)]
        nothing = subprocess.DEVNULL
        subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    if fault("hang"):
        until = time.monotonic() + 60
        while time.monotonic() < until and not (ROOT / "stop").exists():
            time.sleep(0.1)
    if "BSUB_QUIET" not in os.environ:
        print(f"Job <{job.name}> is submitted to queue <{options.get('-q', 'normal').split()[0]}>.")
    return 0


def serve(job: Path) -> None:
    """Run a job's elements: what mbatchd and sbatchd do."""
    options = json.loads(read(job / "options"))
    running: dict[Path, subprocess.Popen] = {}
    requeued: dict[Path, float] = {}
    while not (ROOT / "stop").exists():
        for one, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[one]
            code = code if code >= 0 else 128 - code
            write(one / "code", code)
            if (one / "output").exists():
                with open(path_of("-o", one, options), "a") as log:
                    log.write(f"Sender: LSF System\nThe output (if any) follows:\n\n{read(one / 'output')}")
            again = (one / "requeue").exists() or str(code) == options.get("-Q")
            write(one / "stat", "EXIT" if code else "DONE")
            if again:
                (one / "requeue").unlink(missing_ok=True)
                requeued[one] = time.time() + 1
        for one, when in list(requeued.items()):
            if time.time() > when:
                del requeued[one]
                write(one / "stat", "PEND")
        for one in elements(job):
            if read(one / "stat") != "PEND":
                continue
            if not (one / "killed").exists() and len(running) < options["parallel"]:
                running[one] = start(job, one, options)
        if not running and not requeued and all(read(one / "stat") in ("DONE", "EXIT") for one in elements(job)):
            return
        time.sleep(0.05)
    for process in running.values():
        os.killpg(process.pid, signal.SIGKILL)


def path_of(option: str, one: Path, options: dict[str, str]) -> str:
    return options[option].replace("%J", one.parent.name).replace("%I", one.name)


def start(job: Path, one: Path, options: dict[str, str]) -> subprocess.Popen:
    def opened(option: str):
        return open(path_of(option, one, options), "a") if option in options else None

    environment = os.environ | {"LSB_JOBID": job.name, "LSB_JOBINDEX": one.name, "LSB_HOSTS": "here"}
    late = (ROOT / "faults" / "late_output").exists()  # as without LSB_STDOUT_DIRECT
    out, err = open(one / "output", "w") if late else opened("-o"), opened("-e")
    process = subprocess.Popen(
        ["bash", str(job / "script")],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err or subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    write(one / "pid", process.pid)
    write(one / "stat", "RUN")
    return process


def shown(one: Path) -> str:
    """The state that bjobs prints; nothing for a job that it has forgotten."""
    stat = read(one / "stat")
    forgets = read(ROOT / "faults" / "forgets")
    if forgets == "all" or (forgets and stat in ("DONE", "EXIT")):
        return ""
    return read(ROOT / "faults" / "shows") if stat == "RUN" and (ROOT / "faults" / "shows").exists() else stat


def bjobs(arguments: list[str]) -> int:
    lean = (ROOT / "faults" / "lean").exists()
    if lean and "-noheader" in arguments:
        return say(
            "bjobs: invalid option -- 'n'\nUsage: bjobs [-h] [-V] [-w |-l |-UF] [-a] [-d] [-p] [-s] [-r] [-o] [-json]"
        )
    if (ROOT / "faults" / "bjobs_down").exists():
        return say("LSF is down. Please wait ...")
    if fault("empty"):
        return 0
    assert "-a" in arguments, "IBM leaves out finished jobs"
    rest = [one for one in arguments if one not in ("-a", "-noheader", "-json")]
    form = rest[rest.index("-o") + 1]
    if "-J" in rest:
        name = rest[rest.index("-J") + 1]
        jobs = [] if fault("stale") else named(name)
        rows = [(one, shown(one)) for job in jobs for one in elements(job) if shown(one)]
        lost = [] if jobs or lean else [f"Job <{name}> is not found"]
    else:
        names = [name for name in rest if re.fullmatch(r"\d+(\[\d+\])?", name)]
        asked = {name: elements(ROOT / name) if name.isdigit() else [element(name)] for name in names}
        rows = [(one, shown(one)) for ones in asked.values() for one in ones if shown(one)]
        lost = [f"Job <{name}> is not found" for name, ones in asked.items() if not any(map(shown, ones))]
    enhanced = (ROOT / "faults" / "enhanced").exists()  # LSB_BJOBS_DISPLAY_ENH=Y
    if lean:
        assert form == "jobid stat exec_host job_name"
        names = [json.loads(read(one.parent / "options"))["name"] for one, _ in rows]
        records = [
            {
                "JOBID": label(one) if enhanced else one.parent.name,
                "STAT": stat,
                "EXEC_HOST": "here" if (one / "pid").exists() else "-",
                "JOB_NAME": name + (f"[{one.name}]" if one.name != "0" else ""),
            }
            for (one, stat), name in zip(rows, names, strict=True)
        ]
        records += [{"JOBID": "0", "ERROR": text} for text in lost]
        print(json.dumps({"COMMAND": "bjobs", "JOBS": len(records), "RECORDS": records}))
        return 255 if lost else 0
    for one, stat in rows:
        code, host = read(one / "code") if stat == "EXIT" else "", "here" if (one / "pid").exists() else ""
        term = "TERM_OWNER: job killed by owner" if stat == "EXIT" and (one / "killed").exists() else ""
        name = label(one) if enhanced else one.parent.name
        print("^".join(value or "-" for value in (name, one.name, stat, code, host, term)))
    for text in lost:
        print(text, file=sys.stderr)
    return 255 if lost else 0


def bhist(arguments: list[str]) -> int:
    if fault("no_history"):
        return say("No matching job found")
    for name in arguments[arguments.index("-l") + 1 :]:
        one = element(name)
        stat, code = read(one / "stat"), read(one / "code")
        end = {"DONE": "Done successfully.", "EXIT": f"Exited with exit code {code}." if code else "Exited"}.get(
            stat, ""
        )
        text = (
            f"Sat Nov 21 07:36:34: Dispatched to <here>; Sat Nov 21 07:36:39: {end} The CPU time used is 0.0 seconds."
        )
        print(f"Job <{name}>, Job Name <x[1-5]>, User <me>, Command <exec it>")
        print(textwrap.fill(text, 30, subsequent_indent=" " * 21) + "\n" + "-" * 78)
    return 0


def bacct(arguments: list[str]) -> int:
    for name in arguments[arguments.index("-l") + 1 :]:
        end = {"DONE": "done", "EXIT": "exit"}.get(read(element(name) / "stat"))
        if end and not (ROOT / "faults" / "no_accounting").exists():
            print(f"Job <{name}>, User <me>\nSat Nov 21 07:36:39: Completed <{end}>; TERM_RUNLIMIT: job killed after")
    return 0


def named(pattern: str) -> list[Path]:
    """The jobs of a name, in which a * stands for anything."""
    return [p.parent for p in ROOT.glob("*/options") if fnmatchcase(json.loads(read(p))["name"], pattern)]


def chosen(names: list[str]) -> list[Path]:
    found = []
    for name in names:
        job, _, indices = name.rstrip("]").partition("[")
        for part in indices.split(",") if indices else []:
            first, _, last = part.partition("-")
            found += [ROOT / job / str(index) for index in range(int(first), int(last or first) + 1)]
        found += elements(ROOT / job) if not indices else []
    return found


def send(one: Path, number: int) -> None:
    os.killpg(int(read(one / "pid")), number)


def bkill(arguments: list[str]) -> int:
    if (ROOT / "faults" / "bkill_down").exists():
        return say("LSF is down. Please wait ...")
    wanted = "INT"
    if arguments[0] == "-s":
        wanted, arguments = arguments[1], arguments[2:]
    if arguments[0] == "-J":
        assert arguments[2:] == ["0"], "without the 0 IBM kills the last job of this name alone"
        arguments = [job.name for job in named(arguments[1])]
        if not arguments:
            return say("No matching job found")
    code = 0
    for name in arguments:
        if not chosen([name]):
            code = say(f"Job <{name}>: No matching job found")
        elif len(chosen([name])) > 1 and "[" not in name:
            code = say(f"Job <{name}>: Operation is in progress")
    for one in chosen(arguments):
        if read(one / "stat") in ("DONE", "EXIT"):
            code = say(f"Job <{label(one)}>: Job has already finished")
            continue
        if wanted == "INT":
            write(one / "killed", "")
            if read(one / "stat") == "PEND":
                write(one / "stat", "EXIT")
        if read(one / "stat") == "RUN":
            send(one, getattr(signal, f"SIG{wanted}"))
        print(f"Job <{label(one)}> is being {'terminated' if wanted == 'INT' else 'signaled'}")
    return code


def brequeue(arguments: list[str]) -> int:
    for one in chosen(arguments):
        write(one / "requeue", "")
        print(f"Job <{label(one)}> is being requeued", flush=True)
        send(one, signal.SIGINT)
    return 0


def bpeek(arguments: list[str]) -> int:
    (one,) = chosen(arguments)
    if read(one / "stat") != "RUN":
        return say(f"Job <{label(one)}> : Not yet started.")
    print("<< output from stdout >>\n" + read(one / "output"), end="")
    return 0


if __name__ == "__main__":
    command, *given = sys.argv[1:]
    if command == "serve":
        serve(Path(given[0]))
    else:
        with open(ROOT / "calls", "a") as calls:
            calls.write(json.dumps([command, *given]) + "\n")
        sys.exit(globals()[command](given))
