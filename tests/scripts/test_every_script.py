"""What is true of every script in scripts/, a new one too."""

import subprocess
import sys
from dataclasses import fields

import pytest

from batchens.files import ROOT
from batchens.grid import run_id
from jobs.experiments import names, script


@pytest.mark.parametrize("start", ["scripts/{}.py", "-m scripts.{}"])
@pytest.mark.parametrize("name", names())
def test_help_has_every_field_both_ways_of_starting(name, start):
    command = [sys.executable, *start.format(name).split(), "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.returncode == 0, ran.stderr
    options = {field.name: field.init for field in fields(script(name).Config)}
    for option, expected in (options | dict.fromkeys(("data", "runs", "results"), True)).items():
        assert (f"--{option.replace('_', '-')}" in ran.stdout) == expected, option


def test_settings_and_grids_need_no_torch(python):
    code = """
import sys
from jobs.experiments import names, script
print([name for name in names() if script(name).GRIDS and "torch" in sys.modules])
"""
    ran = python(code)  # one process for all, as starting one is what takes long; the first that is named is to blame
    assert ran.stdout == "[]\n", ran.stderr


@pytest.mark.parametrize(("name", "grid"), [(name, grid) for name in names() for grid in script(name).GRIDS])
def test_every_run_of_a_grid_has_its_own_id(name, grid):
    ids = [run_id(config) for config in script(name).GRIDS[grid]]
    assert len(set(ids)) == len(ids)
