import subprocess
import sys
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest

from batchens.data.skafte import GENERATORS, Dataset, load
from batchens.files import ROOT

RANGES = {"dtu": (2.5, 12.5, (5, 7), (11, 12.5)), "john": (0, 10, (2.5, 4.5), (8.5, 10))}


@pytest.mark.parametrize("name", GENERATORS)
def test_targets_have_the_mean_and_the_standard_deviation_they_are_said_to_have(name):
    generator = GENERATORS[name]
    x, y = generator.draw(200_000, "inside", np.random.default_rng(0))
    residual = (y - x * np.sin(x)) / generator.noise_sd(x)
    for low in np.arange(x.min(), x.max(), 1.0):  # everywhere, not on average
        here = residual[(low <= x) & (x < low + 1)]
        if len(here):
            assert abs(here.mean()) < 5 / len(here) ** 0.5
            assert here.std() == pytest.approx(1, abs=5 / (2 * len(here)) ** 0.5)


def test_the_noise_of_each_generator_at_a_point():
    at = np.array([0.0, 4.0, -4.0])
    assert GENERATORS["dtu"].noise_sd(at) == pytest.approx([0.1, 2.1, 2.1])
    # of 0.3 e1 + 0.3 x e2, not 0.3 + 0.3 x
    assert GENERATORS["john"].noise_sd(at) == pytest.approx([0.3, 0.3 * 17**0.5, 0.3 * 17**0.5])


@pytest.mark.parametrize("name", GENERATORS)
def test_regions_are_the_range_without_overlap_and_points_are_uniform_in_theirs(name):
    generator = GENERATORS[name]
    low, high, gap, outside = RANGES[name]
    assert generator.intervals("gap") == [gap] and generator.intervals("outside") == [outside]
    every = sorted(interval for region in ("inside", "gap", "outside") for interval in generator.intervals(region))
    assert (every[0][0], every[-1][1]) == (low, high)
    assert all(one[1] == two[0] for one, two in pairwise(every))
    assert (generator.grid(3) == [low, (low + high) / 2, high]).all()
    for region in ("inside", "gap", "outside"):
        x, _ = generator.draw(20_000, region, np.random.default_rng(1))
        parts = generator.intervals(region)
        length = sum(end - start for start, end in parts)
        for start, end in parts:
            here = x[(start <= x) & (x < end)]
            assert len(here) / len(x) == pytest.approx((end - start) / length, abs=0.02)
            assert here.mean() == pytest.approx((start + end) / 2, abs=0.05)
        assert sum(((start <= x) & (x <= end)).sum() for start, end in parts) == len(x)


def test_a_seed_is_one_data_set_and_its_splits_share_no_point():
    one, again, other = load("john", 50, 100, 3), load("john", 50, 100, 3), load("john", 50, 100, 4)
    seen = set()
    for split in (field.name for field in fields(Dataset)):
        x = getattr(one, split).x
        assert (x == getattr(again, split).x).all() and (getattr(one, split).y == getattr(again, split).y).all()
        assert len(x) == (50 if split == "train" else 100)
        assert not set(x) & seen and not set(x) & set(getattr(other, split).x)
        seen |= set(x)
    # of one seed, both generators put their points at the same place of their range and give them the same noise
    dtu = load("dtu", 50, 100, 3)
    assert dtu.train.x - 2.5 == pytest.approx(one.train.x)


def test_generators_import_no_torch():
    code = "import sys; from batchens.data import skafte; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
