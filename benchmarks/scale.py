"""How the suite copes with 10,000 runs of one experiment: seconds and peak memory of what a user types.

    python -m benchmarks.scale

Each command runs in a process of its own, as a user's would, from the start of Python. The schedulers are scripts of a line
or two that answer at once, in SLURM's and LSF's words, with arrays of at most 1001 and 1000 elements: what is measured is the
suite, to which a site adds what its own sbatch and squeue take. Beside `jobs submit` stands submitit alone, handed as many
elements in the same arrays, and beside the reading of results the usual loop of `pandas.read_csv` over a part of the
files, scaled up. Files are in the system's temporary folder, in its cache. Seconds of CPU stand beside those that pass,
for they change less where others use the machine too.
"""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from batchens.files import ROOT
from batchens.run import Folders, Run

EXPERIMENT = "parameter_testing"
ARRAY = {"slurm": 1001, "lsf": 1000}
TARGETS = {"submit": 10.0, "status": 2.0, "read": 15.0}
ASKED = "hours = 4\ncpus = 4\nmem_gb = 16\n"
SAMPLE = 1000  # files that the usual loop reads

CHILD = "import sys; from benchmarks import scale; sys.exit(getattr(scale, sys.argv[1])(*sys.argv[2:]))"

NUMBER = 'read -r n < "$SCALE/next"; echo $((n + 1)) > "$SCALE/next"'
COMMANDS = {
    "sbatch": f'{NUMBER}; echo "Submitted batch job $n"',
    "squeue": 'cat "$SCALE/squeue"',
    "scontrol": f'echo "MaxArraySize            = {ARRAY["slurm"]}"',
    "sinfo": 'echo "batch*|infinite"',
    "srun": "exit 1",
    "bsub": f'cat > /dev/null; {NUMBER}; echo "Job <$n> is submitted to queue <normal>."',
    "bjobs": 'cat "$SCALE/bjobs"',
    "bparams": f'echo "MAX_JOB_ARRAY_SIZE = {ARRAY["lsf"]}"',
    "bqueues": "exit 0",
}

# ------------------------------------------------------------------------------- what the measured processes do


def jobs(runs: str, *arguments: str) -> int:
    """Be `python -m jobs`, with one more grid."""
    from jobs.__main__ import main
    from scripts.parameter_testing import GRIDS, Config

    GRIDS["scale"] = _configs(Config, int(runs))
    sys.argv = ["jobs", *arguments]
    return main()


def _configs(config: type, runs: int) -> list:
    from batchens.grid import grid

    values = [round(-1 + step / 10, 1) for step in range(20)]
    seeds = range(math.ceil(runs / len(values) ** 2))
    return grid(config(epochs=4), alpha_init=values, gamma_init=values, seed=seeds)[:runs]


def submitit_alone(runs: str, folder: str) -> None:
    import submitit

    elements = [[f"digits-cnn-batchensemble-m4-an0.5-gn0.5-lr0.1-e4-s0-{number:08x}"] for number in range(int(runs))]
    executor = submitit.AutoExecutor(folder, cluster="slurm")
    executor.update_parameters(timeout_min=240, mem_gb=16, cpus_per_task=4, stderr_to_stdout=True)
    for first in range(0, len(elements), ARRAY["slurm"]):
        executor.map_array(len, elements[first : first + ARRAY["slurm"]])


def read(folder: str) -> None:
    from batchens.results import read_results

    read_results(Path(folder), EXPERIMENT)


def read_for_plots(folder: str) -> None:
    from plots.parameter_testing import CONFIG
    from plots.reading import usable_results

    usable_results(Path(folder), EXPERIMENT, CONFIG)


def read_one_by_one(folder: str, sample: str) -> None:
    """Print the seconds and the CPU seconds of the loop alone, for these are what grows with the number of files."""
    import pandas as pd

    paths = sorted((Path(folder) / EXPERIMENT).glob("*.csv"))[: int(sample)]
    before = time.perf_counter(), time.process_time()
    pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)
    print(time.perf_counter() - before[0], time.process_time() - before[1])


# ------------------------------------------------------------------------ what is there when they are measured


def prepare(runs: str, stage: str, *folders: str) -> None:
    """Bring the runs as far as `stage` says (submitted, half or done) and let the schedulers answer accordingly.

    Half: 5 of 10 runs are done, 3 are running, 2 are pending.
    """
    from jobs.states import submissions
    from scripts.parameter_testing import Config

    os.fsync = lambda _: None  # type: ignore[assignment]  # thousands of small files that need not outlive a power cut
    where = Folders(*map(Path, folders))
    every = [Run(EXPERIMENT, config, where) for config in _configs(Config, int(runs))]
    record = submissions(where, EXPERIMENT)[-1]
    job_of = record.job_of()
    done = {"submitted": 0, "half": len(every) // 2, "done": len(every)}[stage]
    running = min(len(every), done + 3 * len(every) // 10)
    for run in every[:done]:
        if not run.result.exists():
            _finish(run)
    for run in every[done:running] if stage == "half" else ():
        run.folder.mkdir(parents=True, exist_ok=True)
        owner = {
            "host": "node1",
            "pid": 4242,
            "born": "1",
            "job_id": job_of[run.id],
            "since": time.time(),
            "token": "0",
        }
        run.claim.write_text(json.dumps(owner))
        progress = {"epoch": 2, "epochs": 4, "accuracy": 0.9, "seconds": 60.0, "updated": time.time()}
        run.progress.write_text(json.dumps(progress))
    lines = []
    for number, run in enumerate(every[done:], start=done):
        works, job = number < running, job_of[run.id]
        if record.scheduler == "slurm":
            lines.append(f"{job}|RUNNING|node1|None" if works else f"{job}|PENDING||Resources")
        else:
            lines.append(f"{job.replace('_', '^')}^{'RUN^-^node1' if works else 'PEND^-^-'}^-")
    answer = {"slurm": "squeue", "lsf": "bjobs"}[record.scheduler]
    Path(os.environ["SCALE"], answer).write_text("".join(f"{line}\n" for line in lines))


def _finish(run: Run) -> None:
    """Write a result as training would, of the size that a BatchEnsemble of 4 has after 4 epochs: 41 rows."""
    draw = random.Random(run.id).random
    keys = [(epoch, split) for epoch in range(1, 5) for split in ("train", "validation")] + [(4, "test")]
    rows = []
    for epoch, split in keys:
        for member in [*range(4), *([] if split == "train" else [None])]:
            row = {"epoch": epoch, "split": split, "member": member, "accuracy": draw(), "nll": draw()}
            row |= {} if split == "train" else {"brier": draw(), "ece": draw()}
            row |= {"disagreement": draw(), "epistemic": draw()} if member is None else {}
            rows.append({**row, "seconds": draw(), "images_per_second": draw(), "peak_memory_mb": 512.5})
    run.folder.mkdir(parents=True, exist_ok=True)
    for path in (run.claim, run.progress):
        path.unlink(missing_ok=True)
    facts = {"device_name": "NVIDIA A100-SXM4-40GB", "number_format": "bfloat16", "torch": "2.13.0+cu130"}
    run.write(rows, parameters=77820, **facts, data_source="scikit-learn digits (1297 train, 500 test)")


# ---------------------------------------------------------------------------------------------------- measuring


@dataclass
class Measured:
    name: str
    target: float | None = None
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def line(self) -> str:
        times = sorted(self.seconds)
        middle = statistics.median(times)
        aim = verdict = ""
        if self.target is not None:
            aim, verdict = f"{self.target:.0f} s", "held" if middle <= self.target else "MISSED"
        spread = f"({times[0]:.2f} to {times[-1]:.2f})"
        cpu, peak = statistics.median(self.cpu), max(self.megabytes)
        return f"  {self.name:46} {middle:6.2f} s  {spread:17} {cpu:6.2f} s {peak:5.0f} MB  {aim:>5} {verdict}".rstrip()


class Bench:
    """Runs commands in processes of their own, with the stand-ins on PATH and the files in `folder`."""

    def __init__(self, folder: Path, runs: int):
        self.folder, self.runs = folder, str(runs)
        programs = folder / "bin"
        programs.mkdir()
        for name, body in COMMANDS.items():
            (programs / name).write_text(f"#!/bin/sh\n{body}\n")
            (programs / name).chmod(0o755)
        (folder / "next").write_text("100\n")
        presets = folder / "clusters.toml"
        presets.write_text("".join(f'[scale-{name}]\nscheduler = "{name}"\n{ASKED}' for name in ARRAY))
        (folder / "data").mkdir()
        (folder / "data" / "digits.pt").touch()  # images that are there already are not looked into
        self.environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "SCALE": str(folder),
            "BATCHENS_CLUSTERS": str(presets),
        }

    def child(self, *arguments: str, into: Measured | None = None) -> str:
        """Call a function of this module in a process of its own; return what it printed."""
        with tempfile.TemporaryFile("w+") as output:
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-c", CHILD, *arguments], cwd=ROOT, env=self.environment, stdout=output, stderr=output
            )
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            said = output.read()
        if process.returncode:
            raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{said[-2000:]}")
        if into is not None:
            into.seconds.append(seconds)
            into.cpu.append(used.ru_utime + used.ru_stime)
            into.megabytes.append(used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
        return said

    def places(self, runs: str) -> list[str]:
        return [str(self.folder / name) for name in ("data", runs, f"results-{runs}")]

    def jobs(self, into: Measured, command: str, runs: str, *options: str) -> None:
        named = zip(("--data", "--runs", "--results"), self.places(runs), strict=True)
        moved = [word for pair in named for word in pair]
        self.child("jobs", self.runs, command, EXPERIMENT, "--grid", "scale", *moved, *options, into=into)

    def statuses(self, name: str, stage: str, runs: str, rounds: int) -> Measured:
        self.child("prepare", self.runs, stage, *self.places(runs))
        measured = Measured(name, TARGETS["status"])
        for _ in range(rounds):
            self.jobs(measured, "status", runs)
        return measured


def main(runs: int = 10_000, rounds: int = 3) -> None:
    """Time plan, submit, status and the reading of results.

    Args:
        runs: runs of the experiment
        rounds: timed repetitions of each
    """
    print(f"{runs:,} runs, {rounds} rounds: median (range) of seconds, CPU seconds, peak memory, target\n")
    with tempfile.TemporaryDirectory(prefix="scale") as folder:
        bench = Bench(Path(folder), runs)
        planned = Measured("plan, nothing there")
        slurm, lsf = (Measured(f"submit --cluster {name}", TARGETS["submit"]) for name in ARRAY)
        alone = Measured("  submitit alone, the same arrays on slurm")
        for number in range(rounds):
            bench.jobs(planned, "plan", "slurm0")
            bench.jobs(slurm, "submit", f"slurm{number + 1}", "--cluster", "scale-slurm")
            bench.child("submitit_alone", str(runs), str(Path(folder) / f"alone{number}"), into=alone)
            bench.jobs(lsf, "submit", f"lsf{number + 1}", "--cluster", "scale-lsf")
        print(*(one.line() for one in (planned, slurm, alone, lsf)), sep="\n", flush=True)

        found = []
        for name, stage, at in (
            ("status, all pending or running, slurm", "submitted", "slurm1"),
            ("status, all pending or running, lsf", "submitted", "lsf1"),
            ("status, 5/10 done, 3/10 running, slurm", "half", "slurm1"),
            ("status, all done", "done", "slurm1"),
        ):
            found.append(bench.statuses(name, stage, at, rounds))
            print(found[-1].line(), flush=True)

        results = bench.places("slurm1")[2]
        whole, plots = (
            Measured("read_results", TARGETS["read"]),
            Measured("  as plots does, with its checks", TARGETS["read"]),
        )
        sample = min(SAMPLE, runs)
        loop = Measured(f"  pandas.read_csv one by one, from {sample:,} files")
        for _ in range(rounds):
            bench.child("read", results, into=whole)
            bench.child("read_for_plots", results, into=plots)
            passed, worked = map(float, bench.child("read_one_by_one", results, str(sample), into=loop).split())
            loop.seconds[-1] += passed * (runs / sample - 1)
            loop.cpu[-1] += worked * (runs / sample - 1)
        print(*(one.line() for one in (whole, plots, loop)), sep="\n")

    over_alone, over_ours = (
        statistics.median(a / b for a, b in zip(one.cpu, other.cpu, strict=True))
        for one, other in ((slurm, alone), (loop, whole))
    )
    print(f"\nCPU: submit over submitit alone {over_alone:.2f}, one by one over read_results {over_ours:.2f}")
    every = [planned, slurm, lsf, *found, whole, plots]
    missed = [one.name.strip() for one in every if one.target and statistics.median(one.seconds) > one.target]
    print(f"missed: {'; '.join(missed)}" if missed else "every target is held")


if __name__ == "__main__":
    tyro.cli(main)
