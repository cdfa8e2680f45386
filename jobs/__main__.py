"""Arrays of training runs: what there is to do, hand it to a scheduler, watch it, repeat one run here.

    python -m jobs plan   parameter_testing --grid demo
    python -m jobs submit parameter_testing --grid demo --cluster local
    python -m jobs status parameter_testing --grid demo --watch
    python -m jobs logs   parameter_testing digits-cnn-single-m1-lr0.1-e8-s0 --follow
    python -m jobs retry  parameter_testing --state timeout,memory --hours 8 --mem-gb 32
    python -m jobs cancel parameter_testing
    python -m jobs run    parameter_testing digits-cnn-single-m1-lr0.1-e8-s0
    python -m jobs doctor --cluster dtu-a100

A run is submitted unless it has a result or is alive: submitting again repeats nothing and starts what is missing.
No command but `run` imports torch.
"""

import csv
import functools
import json
import shlex
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Annotated

import tyro
from tqdm import tqdm

from batchens.results import differences
from batchens.run import Folders, Run, guarded
from jobs import clusters, experiments, schedulers, states
from jobs.clusters import Cluster
from jobs.logs import show as show_log
from jobs.lsf import ranges
from jobs.schedulers import Job, Unreachable
from jobs.states import ALIVE, RETRIED, STATES, RunState, counts, look
from jobs.submission import cancel as cancel_runs
from jobs.submission import check_site, chunks_of, datasets_of, elements_of, todo_of, unprepared
from jobs.submission import submit as submit_runs

Experiment = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT", help=f"one of {', '.join(experiments.names())}")
]
RunName = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN", help="a run's id, the beginning of it, or its number in plan"),
]
Grid = Annotated[str | None, tyro.conf.arg(metavar="NAME", help="one of the experiment's grids; all when left out")]
FOLDERS = Folders()
PRESETS = f"one of {', '.join(tomllib.loads(clusters.SHIPPED.read_text()))}, or of your own: see jobs/clusters.toml"
Preset = Annotated[str, tyro.conf.arg(metavar="NAME", help=PRESETS)]
Count = Annotated[int | None, tyro.conf.arg(metavar="N")]
Runs = Annotated[int, tyro.conf.arg(metavar="K")]
Hours = Annotated[
    float | None, tyro.conf.arg(metavar="H", help="time limit of a job, at which it is requeued; else the preset's")
]
Memory = Annotated[float | None, tyro.conf.arg(metavar="GB", help="memory of a job; else the preset's")]

MANY = 20  # runs that `cancel` stops without asking
SHOWN = 40  # lines of the table of `status`; --json has all


def plan(experiment: Experiment, /, grid: Grid = None, folders: Folders = FOLDERS) -> None:
    """Show every run of a grid with its number and state; start nothing."""
    found = _look(folders, experiment, grid)
    for number, state in enumerate(found):
        print(f"{number:5} {state.state:9} {state.run.id}")
    print(_summary(experiment, grid, found))


def submit(
    experiment: Experiment,
    /,
    cluster: Preset,
    grid: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME",
            help="one of the experiment's grids; where it has several it must be given, and without it they are listed",
        ),
    ] = None,
    max_parallel: Count = None,
    runs_per_job: Runs = 1,
    hours: Hours = None,
    mem_gb: Memory = None,
    dry_run: bool = False,
    folders: Folders = FOLDERS,
) -> None:
    """Submit the runs of a grid that have no result and are not alive; return when the scheduler has them.

    Args:
        max_parallel: runs of this submission at once; by default as many as a cluster lets, and on this machine one for
            each GPU, else one for each core, at most 4
        runs_per_job: runs that one array element does, one after another in one process
        dry_run: show what would be submitted, to a cluster with the script, and submit nothing
    """
    grids = experiments.script(experiment).GRIDS
    if grid is None and len(grids) > 1:
        raise ValueError(f"{experiment} has several grids, so say which one to submit: --grid {' | '.join(grids)}")
    preset = clusters.load(cluster, hours=hours, mem_gb=mem_gb)
    _hand_over(experiment, grid, preset, max_parallel, runs_per_job, dry_run, folders, None)


def retry(
    experiment: Experiment,
    /,
    grid: Grid = None,
    state: Annotated[str, tyro.conf.arg(metavar="STATE,...")] = ",".join(RETRIED),
    cluster: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    max_parallel: Count = None,
    runs_per_job: Runs = 1,
    hours: Hours = None,
    mem_gb: Memory = None,
    dry_run: bool = False,
    folders: Folders = FOLDERS,
) -> None:
    """Submit again what did not end well, to go on from its last checkpoint; with more time or memory where asked.

    What is not given is the preset's again, not the last submission's.

    Args:
        state: what to submit again, of failed, timeout, memory, cancelled, lost and damaged
        cluster: where to; by default where it was last
        max_parallel: runs of this submission at once
        runs_per_job: runs that one array element does, one after another in one process
        dry_run: show what would be submitted, to a cluster with the script, and submit nothing
    """
    chosen = [name.strip() for name in state.split(",")]
    allowed = [*RETRIED, "cancelled"]
    if unknown := [name for name in chosen if name not in allowed]:
        raise ValueError(f"--state must name some of {', '.join(allowed)}; however: {', '.join(unknown)}")
    every = [one for one in _look(folders, experiment, grid) if one.state in chosen]
    found = [one for one in every if not one.held]
    if not found:
        print(f"nothing to submit: no {'other ' * bool(every)}run is {' or '.join(chosen)}")
        _mention_held(every)
        return
    before = sorted({one.submission.cluster for one in found if one.submission})
    if cluster is None and len(before) > 1:
        raise ValueError(f"these runs were on {' and '.join(before)}, so say where they go now: --cluster NAME")
    if cluster is None and not before:
        raise ValueError("these runs were never submitted, so say where they go now: --cluster NAME")
    preset = clusters.load(cluster or before[0], hours=hours, mem_gb=mem_gb)
    _hand_over(experiment, grid, preset, max_parallel, runs_per_job, dry_run, folders, chosen)


def _hand_over(
    experiment: str,
    grid: str | None,
    cluster: Cluster,
    max_parallel: int | None,
    runs_per_job: int,
    dry_run: bool,
    folders: Folders,
    only: list[str] | None,
) -> None:
    for name, value in (("--runs-per-job", runs_per_job), ("--max-parallel", max_parallel)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, however: {value}")
    configs = experiments.runs_of(experiment, grid)
    if dry_run:
        if cluster.scheduler == "local" or schedulers.ALL[cluster.scheduler].there():
            check_site(experiment, cluster, folders)
        found = look(folders, experiment, configs)
        print(_summary(experiment, grid, found))
        _show_plan(experiment, grid, cluster, max_parallel, runs_per_job, folders, todo_of(found, only))
        return
    record = submit_runs(experiment, configs, cluster, folders, max_parallel, runs_per_job, only)
    if record is None:
        found = look(folders, experiment, configs)
        print(f"nothing to submit: {_summary(experiment, grid, found)}")
        _mention_held(found)
        _mention_foreign(found)
        return
    where = f"{len(record.jobs)} at once" if cluster.scheduler == "local" else f"jobs {_ranges(record.jobs)}"
    print(
        f"submitted {len(record.run_ids())} runs of {experiment} to {cluster.name}, {where}; logs: {record.folder / 'logs'}\n"
        f"watch them: python -m jobs status {experiment}{_options(grid, folders)} --watch"
    )


def _mention_held(states: list[RunState]) -> None:
    if held := [state for state in states if state.held]:
        jobs = _ranges({one.job_id for one in held})
        runs = f"{len(held)} cancelled run{'s' * (len(held) != 1)}"
        print(f"{runs} can be submitted when what they were in has ended: {jobs}")


def _show_plan(
    experiment: str,
    grid: str | None,
    cluster: Cluster,
    max_parallel: int | None,
    runs_per_job: int,
    folders: Folders,
    todo: list[RunState],
) -> None:
    if not todo:
        print("nothing would be submitted")
        return
    elements = elements_of(todo, runs_per_job)
    print(f"would submit {len(todo)} runs in {len(elements)} elements to {cluster.name}: ", end="")
    if cluster.scheduler == "local":
        workers = clusters.local_workers(max_parallel, len(elements))
        print(f"{workers} processes of submitit's LocalExecutor, each doing one element after another")
    else:
        print(f"{cluster.gpus} GPUs, {cluster.cpus} cores, {cluster.mem_gb or '?'} GB and {cluster.hours:g} hours each")
    print(f"folders: {folders.data}, {folders.runs}, {folders.results}")
    if absent := unprepared(datasets_of(todo), folders):
        print(f"images that would be fetched and decoded first: {', '.join(absent)}")
    for state in todo[:10]:
        print(f"  python -m jobs run {experiment} {state.run.id}{_options(None, folders)}")
    if len(todo) > 10:
        print(f"  and {len(todo) - 10} more: python -m jobs plan {experiment}{_options(grid, folders)}")
    if cluster.scheduler == "local":
        return
    scheduler = schedulers.ALL[cluster.scheduler]
    if not scheduler.there():
        print(f"the script is shown where {scheduler.submit_command} is on PATH")
        return
    logs = folders.runs / experiment / "submissions" / "NAME" / "logs"
    chunks = chunks_of(elements, scheduler.array_limit(), max_parallel)
    for number, (chunk, parallel) in enumerate(chunks):
        if number in (0, len(chunks) - 1):
            print(f"\narray {number + 1} of {len(chunks)}:")
            print(scheduler.script(logs, cluster, f"{experiment[:20]}-NAME-{number}", len(chunk), parallel))


def status(
    experiment: Experiment,
    /,
    grid: Grid = None,
    watch: bool = False,
    json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    folders: Folders = FOLDERS,
) -> None:
    """Show how many runs are in each state, and those at work or in trouble.

    Args:
        watch: stay until nothing is alive; exit with 1 if a run is then not done
        json: print everything that is known of every run, for other programs
    """
    found = _look(folders, experiment, grid)
    if watch and any(state.state in ALIVE for state in found):
        found = _watch(folders, experiment, grid)
    if json:
        _print_json(experiment, grid, found)
    else:
        _print_table(experiment, grid, found, folders)
    if watch and any(state.state != "done" for state in found):
        raise SystemExit(1)


def logs(
    experiment: Experiment, name: RunName, /, grid: Grid = None, follow: bool = False, folders: Folders = FOLDERS
) -> None:
    """Show what a run has printed, and the error that it ended with.

    Args:
        follow: go on until the run is no longer alive
    """
    run_id, config = experiments.find(experiment, name, grid)
    patient = _Patient()
    show_log(lambda: look(folders, experiment, {run_id: config}, patient)[0], follow)


def run(
    experiment: Experiment, name: RunName, /, grid: Grid = None, again: bool = False, folders: Folders = FOLDERS
) -> None:
    """Do one run here, in this process.

    Args:
        again: repeat a run that is done, in a folder of its own, and say how far its numbers are from the first ones
    """
    run_id, config = experiments.find(experiment, name, grid)
    main = experiments.script(experiment).main
    first = Run(experiment, config, folders)
    if not again:
        main(config, folders)
        return
    if not first.done():
        raise ValueError(f"--again repeats a run that is done, however {run_id} is not: leave --again out")
    place = folders.runs / "again" / f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
    repeated = main(config, replace(folders, runs=place, results=place))
    with open(first.result) as one, open(repeated) as other:
        largest = differences(list(csv.DictReader(other)), list(csv.DictReader(one)))
    print(f"largest difference from {first.result}:")
    print("  " + ", ".join(f"{metric} {value:.3g}" for metric, value in largest.items()))


def cancel(
    experiment: Experiment,
    names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...", help="all when left out")
    ] = (),
    /,
    grid: Grid = None,
    yes: bool = False,
    folders: Folders = FOLDERS,
) -> None:
    """Stop runs that are alive. What was trained so far is kept and gone on with by submitting again.

    Args:
        yes: do not ask before many runs are stopped
    """
    chosen = dict(experiments.find(experiment, name, grid) for name in names) or experiments.runs_of(experiment, grid)
    configs = experiments.runs_of(experiment)
    alive = [state for state in look(folders, experiment, configs) if state.state in ALIVE and state.run.id in chosen]
    if len(alive) > MANY and not yes:
        if not sys.stdin.isatty():
            raise ValueError(
                f"--yes must be given to stop more than {MANY} runs unasked, however {len(alive)} are alive"
            )
        if input(f"stop {len(alive)} runs of {experiment}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was stopped")
            return
    local = {one.run.id for one in alive if one.submission and one.submission.scheduler == "local"}
    stopped = cancel_runs(experiment, configs, chosen.keys(), folders)
    deadline = time.monotonic() + 30
    while waiting := local & set(stopped.now):
        found = look(folders, experiment, configs)
        still = [one for one in found if one.state in ALIVE]
        # workers that have other runs to do live on
        if not any(one.run.id in waiting and (one.state in ALIVE or (one.held and not still)) for one in found):
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"some of these runs were told to stop and have not within 30 s: {', '.join(waiting)}")
        time.sleep(0.1)
    if stopped.now:
        print(f"stopped {len(stopped.now)} runs")
    elif not stopped.later and not stopped.alone:
        print(f"no job of {experiment} is alive")
    if stopped.later:
        print(f"{len(stopped.later)} stop at the end of their epoch, for their jobs have more to do")
    for why in sorted(stopped.alone):
        print(f"left alone: {why}")


def doctor(
    cluster: Preset,
    probe: bool = False,
    yes: bool = False,
    folders: Folders = FOLDERS,
) -> None:
    """Ask a site what it allows and whether a preset fits; with --probe, also how signals and requeueing behave there.

    Args:
        probe: submit an array of two short jobs that find out
        yes: do not ask before that
    """
    from jobs.doctor import examine

    examine(clusters.load(cluster), folders, probe=probe, consent=yes)


class _Patient:
    """Asks a scheduler at most every 30 s, however often the files are looked at.

    Where it does not answer, says so once and takes its jobs for alive.
    """

    seconds = 30.0

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, dict[str, Job]]] = {}
        self._said = ""

    def __call__(self, scheduler: str, jobs: Mapping[str, float]) -> dict[str, Job]:
        when, answers = self._answers.get(scheduler, (0.0, {}))
        if time.monotonic() - when > self.seconds or not jobs.keys() <= answers.keys():
            try:
                answers = states.ask(scheduler, jobs)
            except Unreachable as error:
                answers = dict.fromkeys(jobs, Job("running", told=False))
                if (said := f"the scheduler can't be asked, so its jobs are taken for alive: {error}") != self._said:
                    print(said, file=sys.stderr)
                self._said = said
            self._answers[scheduler] = (time.monotonic(), answers)
        return {job: answers[job] for job in jobs}


def _look(folders: Folders, experiment: str, grid: str | None, patient: _Patient | None = None) -> list[RunState]:
    return look(folders, experiment, experiments.runs_of(experiment, grid), patient or _Patient())


def _watch(folders: Folders, experiment: str, grid: str | None) -> list[RunState]:
    patient = _Patient()
    try:
        found = _look(folders, experiment, grid, patient)
        with tqdm(total=len(found), unit="run", disable=None) as bar:
            while any(state.state in ALIVE for state in found):
                by_state = counts(found)
                bar.n = by_state.get("done", 0)
                bar.set_postfix({name: n for name, n in by_state.items() if name != "done"})
                local = all(one.submission is None or one.submission.scheduler == "local" for one in found)
                time.sleep(0.5 if local and bar.disable is False and len(found) < 1000 else 5)
                found = _look(folders, experiment, grid, patient)
            by_state = counts(found)
            bar.n = by_state.pop("done", 0)
            bar.set_postfix(by_state)
    except KeyboardInterrupt:
        print(f"\nstopped watching; the runs go on (python -m jobs cancel {experiment} stops them)", file=sys.stderr)
        raise SystemExit(130) from None
    return found


def _print_table(experiment: str, grid: str | None, found: list[RunState], folders: Folders) -> None:
    print(_summary(experiment, grid, found))
    if waiting := Counter(one.reason for one in found if one.state == "pending" and one.reason):
        print("pending: " + ", ".join(f"{number} {reason}" for reason, number in waiting.most_common(5)))
    order = list(STATES)
    shown = [state for state in found if state.state not in ("done", "pending", "missing")]
    shown.sort(key=lambda state: order.index(state.state))
    if shown:
        jobs = max(3, *(len(state.job_id) for state in shown))
        nodes = max(4, *(len(state.node) for state in shown))
        print(
            f"{'state':9} {'job':{jobs}} {'node':{nodes}} {'epoch':>7} {'accuracy':>8} {'elapsed':>8} {'end':>12}  run"
        )
        for state in shown[:SHOWN]:
            print(_line(state, jobs, nodes))
    if len(shown) > SHOWN:
        print(f"and {len(shown) - SHOWN} more: --json has them all")
    if any(state.state == "failed" for state in found):
        print(f"the whole of an error: python -m jobs logs {experiment} RUN{_options(None, folders)}")
    if bad := [state for state in found if state.state in RETRIED]:
        where = "" if any(state.submission for state in bad) else " --cluster NAME"
        again = f"python -m jobs retry {experiment}{_options(grid, folders)}{where}"
        print(f"what did not end well starts again, from its last checkpoint, with: {again}")
    _mention_foreign(found)


def _print_json(experiment: str, grid: str | None, found: list[RunState]) -> None:
    runs = []
    for state in found:
        progress, running = state.progress, state.state == "running"
        runs.append(
            {
                "run": state.run.id,
                "state": state.state,
                "reason": state.reason,
                "cluster": state.submission.cluster if state.submission else "",
                "job": state.job_id,
                "node": state.node,
                "epoch": progress.get("epoch"),
                "epochs": progress.get("epochs"),
                "accuracy": progress.get("accuracy"),
                "elapsed_s": round(_elapsed(state)) if running else None,
                "left_s": round(_left(state)) if running and progress else None,
            }
        )
    print(json.dumps({"experiment": experiment, "grid": grid, "counts": counts(found), "runs": runs}, indent=1))


def _mention_foreign(found: list[RunState]) -> None:
    """Say what keeps runs pending or running on hosts that can't be asked from here."""
    alive = [one for one in found if one.state in ALIVE]
    for record in {one.submission.path: one.submission for one in alive if one.submission}.values():
        if record.foreign():
            print(
                f"submitted on {record.host}, which can't be asked from here: if dead, delete {record.folder} and, in the "
                "folders of its runs, claim.json"
            )
    for one in alive:
        if one.unasked and not (one.submission and one.submission.foreign()):
            print(
                f"{one.run.id} is held by process {one.owner['pid']} on {one.node}, which can't be asked from here: if dead, "
                f"delete {one.run.claim}"
            )


def _summary(experiment: str, grid: str | None, states: list[RunState]) -> str:
    found = counts(states)
    listed = ", ".join(f"{found[name]} {name}" for name in STATES if name in found)
    return f"{experiment}{f', grid {grid}' if grid else ''}: {len(states)} runs: {listed}"


def _elapsed(state: RunState) -> float:
    return time.time() - float(state.owner.get("since", time.time()))


def _left(state: RunState) -> float:
    """Return the seconds to the end of a run, if its epochs go on as the last one did."""
    progress = state.progress
    since_epoch = time.time() - float(progress["updated"])
    return max(0.0, float((progress["epochs"] - progress["epoch"]) * progress["seconds"]) - since_epoch)


def _line(state: RunState, jobs: int, nodes: int) -> str:
    progress = state.progress
    epoch = f"{progress['epoch']}/{progress['epochs']}" if progress else ""
    accuracy = f"{progress['accuracy']:.4f}" if progress else ""
    elapsed = end = ""
    if state.state == "running":
        elapsed = _duration(_elapsed(state))
        end = f"{datetime.now() + timedelta(seconds=_left(state)):%b %d %H:%M}" if progress else ""
    reason = f"  ({state.reason})" if state.reason else ""
    return (
        f"{state.state:9} {state.job_id:{jobs}} {state.node:{nodes}} {epoch:>7} {accuracy:>8} {elapsed:>8} {end:>12}  "
        f"{state.run.id}{reason}"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _ranges(jobs: Iterable[str]) -> str:
    """Return jobs in short: `12_0-99, 13_2,7-9`."""
    arrays: dict[str, list[int]] = {}
    for job in jobs:
        parent, _, index = job.partition("_")
        arrays.setdefault(parent, []).extend([int(index)] if index else [])
    return ", ".join(
        f"{array}_{','.join(ranges(sorted(arrays[array])))}" if arrays[array] else array
        for array in sorted(arrays, key=lambda array: (len(array), array))  # a local run's may have no id yet
    )


def _options(grid: str | None, folders: Folders) -> str:
    """Return the options with which another command means the same runs."""
    moved = [
        f" --{name} {shlex.quote(str(path))}"
        for name, path in asdict(folders).items()
        if path != getattr(FOLDERS, name)
    ]
    return (f" --grid {grid}" if grid else "") + "".join(moved)


def main() -> int:
    commands: dict[str, Callable[..., None]] = {
        "plan": plan,
        "submit": submit,
        "status": status,
        "logs": logs,
        "run": run,
        "retry": retry,
        "cancel": cancel,
        "doctor": doctor,
    }
    chosen = tyro.extras.subcommand_cli_from_dict(
        {name: _later(command) for name, command in commands.items()},
        prog="python -m jobs",
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return guarded(chosen)


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    # tyro takes a ValueError for a fault of its own options; the commands' are for `guarded`
    @functools.wraps(command)
    def bound(*args: object, **options: object) -> Callable[[], None]:
        def chosen() -> None:
            try:
                command(*args, **options)
            except KeyboardInterrupt:
                if command is run:
                    raise
                print("\nstopped; runs that were submitted go on", file=sys.stderr)
                raise SystemExit(130) from None

        return chosen

    return bound


if __name__ == "__main__":
    sys.exit(main())
