"""What the tests of every script use: the data set that they train on, and the script's command line."""

import importlib
import sys

import pytest

from batchens.run import command_line


@pytest.fixture(autouse=True)
def digits(digits_folder, monkeypatch):
    monkeypatch.setenv("BATCHENS_DATA", str(digits_folder))


@pytest.fixture
def command(request, monkeypatch, capsys):
    """The command line of the script that the test's file is named after: (exit code, what it said on stderr)."""
    name = request.path.stem.removeprefix("test_")
    script = importlib.import_module(f"scripts.{name}")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            code = command_line(name, script.Config, script.main, script.__doc__)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run
