"""Presets of clusters, and a user's own over them."""

import os
import subprocess

import pytest

from jobs import clusters
from jobs.lsf import LsfParameters


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a file of the user's own presets."""
    file = tmp_path / "clusters.toml"
    monkeypatch.setenv("BATCHENS_CLUSTERS", str(file))
    file.touch()
    return file.write_text


def test_every_preset_is_whole_and_asks_lsf_for_what_its_plugin_knows(own):
    for name in clusters.presets():
        cluster = clusters.load(name)
        if cluster.scheduler == "lsf":
            LsfParameters(timeout_min=cluster.minutes, mem_gb=cluster.mem_gb, **cluster.options)
            assert cluster.max_hours is not None


def test_a_file_of_ones_own_changes_single_values_and_adds_presets(own):
    own(
        '[dtu-a100]\nmem_gb = 64\n[dtu-a100.options]\nproject = "x"\n'
        '[mine]\nlike = "dtu-a100-80"\nhours = 1\n[slurm.options]\npartition = "p"\n'
    )
    a100, mine = clusters.load("dtu-a100"), clusters.load("mine", mem_gb=8)
    assert (a100.mem_gb, a100.hours, a100.options) == (64, 4, {"queue": "gpua100", "project": "x"})
    assert (mine.mem_gb, mine.hours, mine.cpus) == (8, 1, 4)
    assert mine.options == {"queue": "gpua100", "select": "gpu80gb", "project": "x"}
    assert clusters.load("slurm").options == {"partition": "p"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[x]\nhours = 1", "must say its scheduler"),
        ('[x]\nlike = "y"', "like must be the name of another preset"),
        ('[x]\nlike = "y"\n[y]\nlike = "x"', "like must be the name of another preset"),
        ("x = 1", "a preset must be a table"),
        ("[x", "must be readable TOML"),
        ('[x]\nlike = "local"\nhours = "1"', "hours must be a number above 0"),
        ('[x]\nlike = "local"\ngpus = -1', "gpus must be a whole number"),
        ('[x]\nlike = "dtu-p1"\nhours = 100', "hours must be at most 72"),
        ('[x]\nlike = "local"\nsetup = "module load"', "setup must be a list of lines"),
        ('[x]\nlike = "local"\nqueue = "q"', "a key must be one of"),
    ],
)
def test_what_cannot_be_is_said(own, text, says):
    own(text)
    with pytest.raises(ValueError, match=says):
        clusters.load("x")


def test_a_named_file_must_be_there(own, tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHENS_CLUSTERS", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="there is none"):
        clusters.load("local")
    with pytest.raises(ValueError, match="a cluster must be one of: local, slurm, dtu-a100"):
        monkeypatch.delenv("BATCHENS_CLUSTERS")
        clusters.load("nosuch")


def test_gpus_are_those_that_the_process_may_use(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: a'\necho 'GPU 1: b'\necho '  MIG 1g.10gb Device 0:'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for visible, gpus in (("2, 3", ["2", "3"]), ("", []), ("-1", []), ("MIG-8f1b", ["MIG-8f1b"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert clusters.local_gpus() == gpus
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert clusters.local_gpus() == ["0", "1"]

    def hangs(*command, **options):
        raise subprocess.TimeoutExpired("nvidia-smi", 60)

    monkeypatch.setattr(clusters.subprocess, "run", hangs)
    with pytest.raises(ValueError, match="however it hangs"):
        clusters.local_gpus()
