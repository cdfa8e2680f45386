"""A scheduler for these tests: the preset that $BATCHENS_TEST_CLUSTER names, else a SLURM of one node on this machine."""

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest


def load(name):
    """Import a neighbour of this file, which pytest's importlib mode does not."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Site:
    """Where a test submits to: a preset, and the SLURM behind it if that is the tests' own."""

    def __init__(self, cluster, environment, slurm=None):
        self.cluster, self.environment, self.slurm = cluster, environment, slurm

    def empty(self):
        """Wait until no job is left: one that is COMPLETING keeps its GPU, and outlives a restart for a minute or more."""
        give_up = time.monotonic() + 90
        while self.slurm.output("squeue", "--noheader"):
            assert time.monotonic() < give_up
            time.sleep(0.1)


@pytest.fixture(scope="session")
def one_node_slurm():
    """The module that starts one."""
    module = load("one_node_slurm")
    if not module.installed():
        pytest.skip("SLURM is not installed: make test-slurm does that")
    return module


@pytest.fixture(scope="session")
def own_slurm(one_node_slurm, tmp_path_factory):
    slurm = one_node_slurm.up(tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.down()


@pytest.fixture
def site(request, monkeypatch):
    """A site where faults can't be made; `own_site` is one where they can."""
    if cluster := os.environ.get("BATCHENS_TEST_CLUSTER"):
        return Site(cluster, {})
    return request.getfixturevalue("own_site")


@pytest.fixture
def own_site(own_slurm, monkeypatch, tmp_path):
    for name, value in own_slurm.environment.items():
        monkeypatch.setenv(name, value)
    presets = tmp_path / "one-node.toml"
    # one thread, as in the local runs: the same numbers; no GPU, as one that only pretends to be there is no use to torch
    presets.write_text("[slurm]\ncpus = 1\nmem_gb = 1\ngpus = 0\n")
    monkeypatch.setenv("BATCHENS_CLUSTERS", str(presets))
    there = Site("slurm", own_slurm.environment, own_slurm)
    there.empty()
    return there
