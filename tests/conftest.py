import os
import subprocess
import sys

import pytest
from hypothesis import settings

from batchens.files import ROOT

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
