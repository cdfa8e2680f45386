"""Experiments, their grids and their runs by name. What can't be found is an error that says what there is."""

import importlib
from types import ModuleType

from batchens.files import ROOT
from batchens.grid import Config, run_id


def names() -> list[str]:
    """Return the experiments there are: the scripts."""
    return sorted(path.stem for path in (ROOT / "scripts").glob("[a-z]*.py"))


def script(experiment: str) -> ModuleType:
    """Return the module of an experiment: its Config, its GRIDS and its main. It imports no torch until main is called."""
    if experiment not in names():
        raise ValueError(f"an experiment must be one of: {', '.join(names())}; however: {experiment!r}")
    return importlib.import_module(f"scripts.{experiment}")


def runs_of(experiment: str, grid: str | None = None) -> dict[str, Config]:
    """Return run id -> Config of one grid, or of all grids of the experiment."""
    grids: dict[str, list[Config]] = script(experiment).GRIDS
    if grid is not None and grid not in grids:
        raise ValueError(f"a grid of {experiment} must be one of: {', '.join(grids)}; however: {grid!r}")
    chosen = grids.values() if grid is None else [grids[grid]]
    return {run_id(config): config for configs in chosen for config in configs}


def find(experiment: str, name: str, grid: str | None = None) -> tuple[str, Config]:
    """Return the run that `name` means: a run id, the beginning of exactly one, or a position in `jobs plan`, from 0."""
    runs = runs_of(experiment, grid)
    if name in runs:
        return name, runs[name]
    if name.isdecimal() and grid is None and len(script(experiment).GRIDS) > 1:
        raise ValueError(
            f"a number is a run's position in the plan of one grid, so say which one: --grid NAME; however: {name}"
        )
    if name.isdecimal() and int(name) < len(runs):
        return list(runs.items())[int(name)]
    matching = [known for known in runs if known.startswith(name)]
    if len(matching) == 1:
        return matching[0], runs[matching[0]]
    fits = f"is the beginning of {len(matching)} runs" if matching else "is none of them"
    own = "" if matching else f" (a run of your own that is in no grid is repeated with python -m scripts.{experiment})"
    shown = "".join(f"\n  {known}" for known in (matching or list(runs))[:8])
    more = max(0, len(matching or runs) - 8)
    raise ValueError(
        f"a run of {experiment} must be named by its id, by the beginning of just one, or with --grid by its number there, "
        f"however {name!r} {fits}{own}; among them:{shown}"
        + (f"\n  and {more} more: python -m jobs plan {experiment}{f' --grid {grid}' if grid else ''}" if more else "")
    )
