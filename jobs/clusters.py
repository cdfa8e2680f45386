"""Presets of clusters, from `clusters.toml`."""

import os
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cluster:
    """Where an array of runs goes and what each of its elements asks for."""

    name: str
    scheduler: str
    timeout_hours: float


def load(name: str) -> Cluster:
    presets = tomllib.loads((Path(__file__).parent / "clusters.toml").read_text())
    if name not in presets:
        raise ValueError(f"a cluster must be one of: {', '.join(presets)}; however: {name!r}")
    return Cluster(name=name, **presets[name])


def local_gpus() -> int:
    """Return the number of GPUs of this machine, as nvidia-smi lists them: torch would take seconds to say."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def local_workers(max_parallel: int | None, todo: int) -> int:
    """Return how many runs to train at once here: as many as asked for, else one a GPU, else one a core but at most 4."""
    return max(1, min(max_parallel or local_gpus() or min(cores(), 4), todo))


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
