import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings

from batchens.files import ROOT

if "BATCHENS_TEST_GPU" not in os.environ:  # tests are of a CPU's numbers; those of a GPU run when that is set
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# in a script's `make test &` it is ignored, and so by the children that tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Place:
    """A workplace of its own for a test: folders, and `jobs` run in them as a user would, on one grid."""

    experiment = "parameter_testing"

    def __init__(self, folder: Path, data: Path, grid: str = "smoke", **environment: str):
        from batchens.run import Folders
        from jobs.experiments import runs_of

        self.grid, self.configs = grid, runs_of(self.experiment, grid)
        self.folders = Folders(data, folder / "runs", folder / "results")
        self.environment = os.environ | {
            "BATCHENS_DATA": str(data),
            "BATCHENS_RUNS": str(self.folders.runs),
            "BATCHENS_RESULTS": str(self.folders.results),
            "OMP_NUM_THREADS": "1",
            **environment,
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, text=True, **pipes)

    def jobs(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        return out + err

    def states(self) -> dict[str, int]:
        from jobs.states import counts, look

        return counts(look(self.folders, self.experiment, self.configs))

    def wait_for(self, condition: str, seconds: float = 60) -> None:
        """Wait until a state occurs."""
        deadline = time.monotonic() + seconds
        while condition not in self.states():
            assert time.monotonic() < deadline, self.states()
            time.sleep(0.01)

    def wait(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while {"running", "pending"} & set(self.states()):
            assert time.monotonic() < deadline, self.states()
            time.sleep(0.05 if seconds <= 120 else 0.5)

    def written(self) -> list[str]:
        """Return the runs whose results were written, as the logs of all jobs tell: one written twice is there twice."""
        logs = self.folders.runs.glob(f"{self.experiment}/submissions/*/logs/*_log.out")
        lines = [line for path in logs for line in path.read_text().splitlines() if line.startswith("written: ")]
        return sorted(Path(line).stem for line in lines)

    def files(self) -> list[Path]:
        return [path for folder in (self.folders.runs, self.folders.results) for path in folder.rglob("*")]

    def table(self):
        from batchens.results import read_results

        return read_results(self.folders.results, self.experiment).sort_values(["run_id", "epoch", "split", "member"])

    def metrics(self) -> list[object]:
        from batchens.results import METRICS

        table = self.table()
        return table[["run_id", "epoch", "split", "member", *METRICS]].astype(str).to_numpy().tolist()


@pytest.fixture(scope="session")
def new_place(digits_folder):
    """Make a workplace in a folder: `new_place(folder, grid="smoke", VARIABLE="value")`."""
    return lambda folder, **options: Place(folder, digits_folder, **options)


settings.register_profile("suite", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def folders_of_their_own(tmp_path, monkeypatch):
    """No test reads or writes the folders of whoever runs the tests, nor takes itself for a scheduler's job."""
    for name in ("DATA", "RUNS", "RESULTS"):
        monkeypatch.setenv(f"BATCHENS_{name}", str(tmp_path / name.lower()))
    for name in os.environ:
        if name.startswith(("SLURM_", "LSB_", "SUBMITIT_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def seeded_and_single_threaded():
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)  # tests are small: threads would wait for one another


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    from batchens.data.images import prepare

    folder = tmp_path_factory.mktemp("data")
    prepare("digits", folder)
    return folder


@pytest.fixture
def python(tmp_path):
    """Run a few lines in a new process, from the root of the repository."""

    def run(code, *arguments, **environment):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        environment = os.environ | environment
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def tiny_images():
    """A data set of blurred class patterns that a small network learns in a few epochs."""
    import torch

    from batchens.data.catalog import DATASETS
    from batchens.data.images import Images, Split

    def make(name="digits", *, train=64, validation=30, test=20, classes=4, size=8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        channels = DATASETS[name].shape[0]
        patterns = torch.randint(40, 216, (classes, channels, size, size), generator=generator)

        def split(count):
            labels = torch.randint(classes, (count,), generator=generator)
            noise = torch.randint(-40, 40, (count, channels, size, size), generator=generator)
            return Split((patterns[labels] + noise).to(torch.uint8), labels)

        return Images(
            name=name,
            train=split(train),
            validation=split(validation),
            test=split(test),
            num_classes=classes,
            shape=(channels, size, size),
            mean=(0.5,) * channels,
            std=(0.25,) * channels,
            classes=tuple(map(str, range(classes))),
            source="made by the tests",
        )

    return make


@pytest.fixture
def link_asked_twice(monkeypatch):
    """NFS loses the answer to a link and asks again: it is made, and said to be there already."""
    link = os.link

    def repeated(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeated)
