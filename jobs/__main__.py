"""Arrays of training runs: what there is to do, hand it to a scheduler, watch it, repeat one run here.

    python -m jobs plan   parameter_testing --grid demo
    python -m jobs submit parameter_testing --grid demo --cluster local
    python -m jobs status parameter_testing --watch
    python -m jobs run    parameter_testing digits-cnn-single-m1-lr0.1-e8-s0

A run is submitted unless it has a result or is alive: submitting again repeats nothing and starts what is missing.
No command but `run` imports torch.
"""

import csv
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Annotated

import tyro
from tqdm import tqdm

from batchens.results import differences
from batchens.run import Folders, Run, guarded
from jobs import clusters, experiments
from jobs.states import ALIVE, STATES, RunState, counts, look, submissions
from jobs.submission import cancel as cancel_runs
from jobs.submission import elements_of, todo_of
from jobs.submission import submit as submit_runs

Experiment = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT", help="name of a script")]
RunName = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN", help="a run's id, the beginning of it, or its number in plan"),
]
Grid = Annotated[str | None, tyro.conf.arg(metavar="NAME", help="one of the script's grids; all of them when left out")]
FOLDERS = Folders()
Count = Annotated[int | None, tyro.conf.arg(metavar="N")]


def plan(experiment: Experiment, /, grid: Grid = None, folders: Folders = FOLDERS) -> None:
    """Show every run of a grid with its number and state; write nothing."""
    states = look(folders, experiment, experiments.runs_of(experiment, grid))
    for number, state in enumerate(states):
        print(f"{number:5} {state.state:9} {state.run.id}")
    print(_summary(experiment, grid, states))


def submit(
    experiment: Experiment,
    /,
    cluster: Annotated[str, tyro.conf.arg(metavar="NAME", help="a preset of jobs/clusters.toml")],
    grid: Annotated[str | None, tyro.conf.arg(metavar="NAME", help="one of the script's grids")] = None,
    max_parallel: Count = None,
    runs_per_job: int = 1,
    dry_run: bool = False,
    folders: Folders = FOLDERS,
) -> None:
    """Submit the runs of a grid that have no result and are not alive; return when the scheduler has them.

    Args:
        max_parallel: runs at once; on this machine by default one for each GPU, else one for each core, at most 4
        runs_per_job: runs that one array element does, one after another in one process
        dry_run: show what would be submitted and write nothing
    """
    configs, preset = experiments.runs_of(experiment, grid), clusters.load(cluster)
    for name, value in (("--runs-per-job", runs_per_job), ("--max-parallel", max_parallel)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, however: {value}")
    grids = experiments.script(experiment).GRIDS
    if grid is None and len(grids) > 1:
        raise ValueError(f"{experiment} has several grids, so say which one to submit: --grid {' | '.join(grids)}")
    if dry_run:
        states = look(folders, experiment, configs)
        todo = todo_of(states)
        print(_summary(experiment, grid, states))
        elements = elements_of(todo, runs_per_job)
        workers = clusters.local_workers(max_parallel, len(elements))
        print(
            f"would submit {len(todo)} runs in {len(elements)} elements to {cluster}: {workers} processes of submitit's "
            f"LocalExecutor, each doing one element after another; folders: {folders.runs}, {folders.results}"
        )
        for run_id in todo[:10]:
            print(f"  python -m jobs run {experiment} {run_id}")
        if len(todo) > 10:
            print(f"  and {len(todo) - 10} more: python -m jobs plan {experiment}{_options(grid, folders)}")
        return
    record = submit_runs(experiment, configs, preset, folders, max_parallel, runs_per_job)
    if record is None:
        states = look(folders, experiment, configs)
        print(f"nothing to submit: {_summary(experiment, grid, states)}")
        _mention_foreign(experiment, folders, states)
        return
    print(
        f"submitted {len(record.run_ids())} runs of {experiment} to {cluster}, {len(record.jobs)} at once; "
        f"logs: {record.path.parent / 'logs'}\nwatch them: python -m jobs status {experiment}{_options(grid, folders)} --watch"
    )


def status(experiment: Experiment, /, grid: Grid = None, watch: bool = False, folders: Folders = FOLDERS) -> None:
    """Show how many runs are in each state, and those at work or in trouble.

    Args:
        watch: stay until nothing is alive; exit with 1 if a run is then not done
    """
    configs = experiments.runs_of(experiment, grid)
    states = look(folders, experiment, configs)
    if watch and (any(state.state in ALIVE for state in states)):
        states = _watch(lambda: look(folders, experiment, configs))
    print(_summary(experiment, grid, states))
    shown = [state for state in states if state.state not in ("done", "pending", "missing")]
    if shown:
        print(f"{'state':9} {'epoch':>7} {'accuracy':>8} {'elapsed':>8} {'left':>8}  run")
    for state in shown:
        print(_line(state))
    if any(state.state == "failed" for state in states):
        print(f"the whole of an error: {folders.runs / experiment}/RUN/failure.txt")
    if any(state.state in ("failed", "cancelled", "lost", "damaged") for state in states):
        again = f"python -m jobs submit {experiment}{_options(grid, folders)} --cluster NAME"
        print(f"what did not end well starts again, from its last checkpoint, with: {again}")
    _mention_foreign(experiment, folders, states)
    if watch and any(state.state != "done" for state in states):
        raise SystemExit(1)


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


def cancel(experiment: Experiment, /, grid: Grid = None, folders: Folders = FOLDERS) -> None:
    """Stop the live submissions of an experiment; what was trained so far is kept and gone on with by submitting again."""
    stopped = cancel_runs(experiment, experiments.runs_of(experiment, grid), folders)
    print(f"stopped {len(stopped)} runs" if stopped else f"no submission of {experiment} is alive")


def _watch(states_now: Callable[[], list[RunState]]) -> list[RunState]:
    states = states_now()
    try:
        with tqdm(total=len(states), unit="run", disable=None) as bar:
            while any(state.state in ALIVE for state in states):
                found = counts(states)
                bar.n = found.get("done", 0)
                bar.set_postfix({name: n for name, n in found.items() if name != "done"})
                time.sleep(0.5 if bar.disable is False and len(states) < 1000 else 5)
                states = states_now()
            bar.n = counts(states).get("done", 0)
            bar.refresh()
    except KeyboardInterrupt:
        print("\nstopped watching; the runs go on (python -m jobs cancel EXPERIMENT stops them)", file=sys.stderr)
        raise SystemExit(130) from None
    return states


def _mention_foreign(experiment: str, folders: Folders, states: list[RunState]) -> None:
    open_runs = {state.run.id for state in states if state.state in ALIVE}
    for submission in submissions(folders, experiment):
        if submission.foreign() and open_runs & submission.run_ids():
            print(
                f"submitted on {submission.host}, which can't be asked from here: if dead, delete {submission.path.parent}"
            )


def _summary(experiment: str, grid: str | None, states: list[RunState]) -> str:
    found = counts(states)
    listed = ", ".join(f"{found[name]} {name}" for name in STATES if name in found)
    return f"{experiment}{f', grid {grid}' if grid else ''}: {len(states)} runs: {listed}"


def _line(state: RunState) -> str:
    progress = state.progress
    epoch = f"{progress['epoch']}/{progress['epochs']}" if progress else ""
    accuracy = f"{progress['accuracy']:.4f}" if progress else ""
    elapsed = left = ""
    if state.state == "running":
        elapsed = _duration(time.time() - state.owner.get("since", time.time()))
        left = _duration((progress["epochs"] - progress["epoch"]) * progress["seconds"]) if progress else ""
    reason = f"  ({state.reason})" if state.reason else f"  ({STATES['lost']})" if state.state == "lost" else ""
    return f"{state.state:9} {epoch:>7} {accuracy:>8} {elapsed:>8} {left:>8}  {state.run.id}{reason}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _options(grid: str | None, folders: Folders) -> str:
    """Return the options with which another command means the same runs."""
    moved = [f" --{name} {path}" for name, path in asdict(folders).items() if path != getattr(FOLDERS, name)]
    return (f" --grid {grid}" if grid else "") + "".join(moved)


def main() -> int:
    commands: dict[str, Callable[..., None]] = {
        "plan": plan,
        "submit": submit,
        "status": status,
        "run": run,
        "cancel": cancel,
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
        return lambda: command(*args, **options)

    return bound


if __name__ == "__main__":
    sys.exit(main())
