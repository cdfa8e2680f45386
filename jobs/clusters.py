"""Presets of clusters, from `clusters.toml` and a file of the user's own."""

import os
import shutil
import subprocess
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "clusters.toml"
SCHEDULERS = ("local", "slurm", "lsf")


@dataclass(frozen=True)
class Cluster:
    """Where an array of runs goes and what each of its elements asks for; `clusters.toml` explains the fields.

    Raises:
        ValueError: a value is wrong; its text has the preset, the rule and the value.
    """

    name: str
    scheduler: str
    hours: float
    max_hours: float | None = None
    gpus: int = 0
    cpus: int = 1
    mem_gb: float | None = None
    setup: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def check(name: str, rule: str, ok: bool) -> None:
            if not ok:
                raise ValueError(f"preset {self.name}: {name} must be {rule}, however: {getattr(self, name)!r}")

        def number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and value > 0

        check("scheduler", f"one of {', '.join(SCHEDULERS)}", self.scheduler in SCHEDULERS)
        check("hours", "a number above 0", number(self.hours))
        check("max_hours", "a number above 0", self.max_hours is None or number(self.max_hours))
        check("mem_gb", "a number above 0", self.mem_gb is None or number(self.mem_gb))
        check("gpus", "a whole number of at least 0", isinstance(self.gpus, int) and self.gpus >= 0)
        check("cpus", "a whole number of at least 1", isinstance(self.cpus, int) and self.cpus >= 1)
        check("setup", "a list of lines", isinstance(self.setup, list) and all(isinstance(e, str) for e in self.setup))
        check("options", "a table", isinstance(self.options, dict))
        if self.max_hours and self.hours > self.max_hours:
            raise ValueError(
                f"preset {self.name}: hours must be at most {self.max_hours:g}, the queue's limit, however: {self.hours:g}"
            )

    @property
    def minutes(self) -> int:
        return max(1, round(60 * self.hours))


def own_file() -> Path:
    """Return where the user's presets are looked for."""
    return Path(os.environ.get("BATCHENS_CLUSTERS") or "~/.config/batchens/clusters.toml").expanduser()


def presets() -> dict[str, dict[str, Any]]:
    """Return name -> values: those that came with the project, and the user's over them, value by value."""
    tables = tomllib.loads(SHIPPED.read_text())
    own = own_file()
    if not own.exists() and os.environ.get("BATCHENS_CLUSTERS"):
        raise ValueError(f"$BATCHENS_CLUSTERS must name a file of presets, however there is none: {own}")
    if own.exists():
        try:
            changes = tomllib.loads(own.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"presets must be readable TOML, however {own}: {error}") from error
        for name, table in changes.items():
            if not isinstance(table, dict):
                raise ValueError(f"a preset must be a table, as in [{name}], however {own} has: {name} = {table!r}")
            tables[name] = _over(tables.get(name, {}), table)
    return {name: _resolved(name, tables) for name in tables}


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the values of two tables, the second's first; options are put together one by one."""
    both = below | above
    if isinstance(below.get("options"), dict) and isinstance(above.get("options"), dict):
        both["options"] = below["options"] | above["options"]
    return both


def _resolved(name: str, tables: dict[str, dict[str, Any]], seen: tuple[str, ...] = ()) -> dict[str, Any]:
    table = dict(tables[name])
    base = table.pop("like", None)
    if base is None:
        return table
    if base not in tables or base in (name, *seen):
        raise ValueError(f"preset {name}: like must be the name of another preset, however: {base!r}")
    return _over(_resolved(base, tables, (name, *seen)), table)


def load(name: str, **changes: Any) -> Cluster:
    """Return a preset, with the changes that are not None.

    Raises:
        ValueError: there is none of this name, or it has a key or value that can't be.
    """
    known = presets()
    if name not in known:
        raise ValueError(
            f"a cluster must be one of: {', '.join(known)}; or of your own, in {own_file()}; however: {name!r}"
        )
    values = known[name] | {key: value for key, value in changes.items() if value is not None}
    keys = [each.name for each in fields(Cluster) if each.name != "name"]
    if unknown := sorted(values.keys() - set(keys)):
        raise ValueError(f"preset {name}: a key must be one of {', '.join(keys)}; however: {', '.join(unknown)}")
    if absent := [key for key in ("scheduler", "hours") if key not in values]:
        raise ValueError(f"preset {name} must say its {' and '.join(absent)}; an example is in {SHIPPED}")
    return Cluster(name=name, **values)


def local_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, else as nvidia-smi lists them.

    torch would take seconds to say.

    Raises:
        ValueError: nvidia-smi does not answer.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in map(str.strip, visible.split(",")) if gpu not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            "nvidia-smi must list the GPUs within a minute, however it hangs; set CUDA_VISIBLE_DEVICES to those to use, or to "
            "nothing for none"
        ) from error
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


def local_workers(max_parallel: int | None, todo: int) -> int:
    """Return how many runs to train at once here: as many as asked for, else one a GPU, else one a core but at most 4."""
    return max(1, min(max_parallel or len(local_gpus()) or min(cores(), 4), todo))


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
