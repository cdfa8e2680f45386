"""What the tests of every script use: the data set that they train on, and the script's command line."""

import signal
import subprocess
import sys

import pytest

from batchens.files import ROOT
from batchens.run import command_line
from jobs.experiments import script


@pytest.fixture(autouse=True)
def digits(digits_folder, monkeypatch):
    monkeypatch.setenv("BATCHENS_DATA", str(digits_folder))


@pytest.fixture
def experiment(request):
    """The script that the test's file is named after."""
    return request.path.stem.removeprefix("test_")


@pytest.fixture
def command(experiment, monkeypatch, capsys):
    """The command line of the script: (exit code, what it said on stderr)."""
    module = script(experiment)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [experiment, *map(str, arguments)])
        try:
            code = command_line(experiment, module.Config, module.main, module.__doc__)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def stopped(command, monkeypatch):
    """The command line of the script, ended by Ctrl-C in its step number `at`; of 9 an epoch, so in mid-epoch."""
    from batchens import optimizers

    def run(*arguments, at=14):
        step, steps = optimizers.step, []

        def stopping(*of_step):
            steps.append(1)
            if len(steps) == at:
                raise KeyboardInterrupt
            step(*of_step)

        with monkeypatch.context() as patched:
            patched.setattr(optimizers, "step", stopping)
            assert command(*arguments)[0] == 130
        assert len(steps) == at

    return run


@pytest.fixture
def refused(command, tmp_path):
    """The command line of the script, which must refuse and write nothing: what it said on stderr, in one line."""

    def files():
        # of a run that was begun before it was refused, the reason and locks remain
        kept = ("failure.txt", "*.lock")
        return {path for path in tmp_path.rglob("*") if path.is_file() and not any(map(path.match, kept))}

    def run(*arguments):
        before = files()
        code, said = command(*arguments)
        assert code == 2 and "Traceback" not in said
        assert files() == before
        return " ".join(said.replace("│", " ").split())

    return run


PAUSED = """
import runpy, sys, time
from batchens import optimizers
step, steps = optimizers.step, []
def pausing(*arguments):
    steps.append(1)
    if len(steps) == 14:  # of 9 an epoch
        print("paused", flush=True)
        time.sleep(60)
    step(*arguments)
optimizers.step = pausing
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def paused(experiment):
    """The script in a process of its own, which stands within the epoch that follows `after` of 4."""
    processes = []

    def start(*arguments, after=1):
        process = subprocess.Popen(
            [sys.executable, "-c", PAUSED, f"scripts.{experiment}", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        processes.append(process)
        said = [process.stdout.readline() for _ in range(2)]
        assert f"epoch {after} of 4, validation accuracy" in said[0] and said[1] == "paused\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()
