"""Toy regression with noise that grows with x and a gap in the training inputs. Imports no torch.

Both generators are y = x sin(x) + noise, noise from N(0, noise_sd(x)^2), x uniform over a range of length 10:

| generator | range     | noise_sd(x)        | gap      | outside  | from                                              |
|-----------|-----------|--------------------|----------|----------|---------------------------------------------------|
| dtu       | 2.5..12.5 | 0.1 + 0.5 abs(x)   | 5..7     | 11..12.5 | lauritsf/parameter-sharing-project-starting-point |
| john      | 0..10     | 0.3 sqrt(1 + x^2)  | 2.5..4.5 | 8.5..10  | Detlefsen et al. 2019, arXiv:1906.03260           |

"john" was written as the sum 0.3 e1 + 0.3 x e2 of two independent standard normal numbers, which has that standard
deviation. It had no gap: it gets that of "dtu", at the same place of its range. Training points lie in neither.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
GeneratorName = Literal["dtu", "john"]
Region = Literal["inside", "gap", "outside"]


class Points(NamedTuple):
    """Inputs and noisy targets, both (points,)."""

    x: Array
    y: Array


@dataclass(frozen=True)
class Generator:
    """A distribution of inputs and targets; `start` is where its range of length 10 begins."""

    start: float
    noise: tuple[float, float]
    """(a, b) of the noise's standard deviation: a + b |x|, or in quadrature sqrt(a^2 + b^2 x^2)"""
    quadrature: bool

    def target(self, x: Array) -> Array:
        """Return the mean of y at x. (points,) -> (points,)."""
        return x * np.sin(x)

    def noise_sd(self, x: Array) -> Array:
        """Return the standard deviation of y at x. (points,) -> (points,)."""
        a, b = self.noise
        return np.hypot(a, b * x) if self.quadrature else a + b * np.abs(x)

    def intervals(self, region: Region) -> list[tuple[float, float]]:
        """Return the parts of the range that a region is made of."""
        parts = {"inside": [(0.0, 2.5), (4.5, 8.5)], "gap": [(2.5, 4.5)], "outside": [(8.5, 10.0)]}
        return [(self.start + low, self.start + high) for low, high in parts[region]]

    def draw(self, points: int, region: Region, rng: np.random.Generator) -> Points:
        """Draw points whose x is uniform over a region."""
        low, high = np.array(self.intervals(region)).T
        ends = np.cumsum(high - low)
        along = rng.uniform(0, ends[-1], points)  # along the region with its holes closed
        part = np.searchsorted(ends, along, side="right")
        x = high[part] - (ends[part] - along)
        return Points(x, self.target(x) + self.noise_sd(x) * rng.standard_normal(points))

    def grid(self, points: int) -> Array:
        """Return evenly spaced inputs over the whole range, gap and outside included."""
        return np.linspace(self.start, self.start + 10, points)


GENERATORS: dict[GeneratorName, Generator] = {
    "dtu": Generator(start=2.5, noise=(0.1, 0.5), quadrature=False),
    "john": Generator(start=0.0, noise=(0.3, 0.3), quadrature=True),
}


@dataclass(frozen=True)
class Dataset:
    """Points of each split; training and validation are inside, test is in one region each."""

    train: Points
    validation: Points
    test: Points
    test_gap: Points
    test_outside: Points


def load(name: GeneratorName, train_points: int, evaluation_points: int, seed: int) -> Dataset:
    """Draw a data set; every method of one seed gets the same."""
    generator, rng = GENERATORS[name], np.random.default_rng(seed)
    return Dataset(
        train=generator.draw(train_points, "inside", rng),
        validation=generator.draw(evaluation_points, "inside", rng),
        test=generator.draw(evaluation_points, "inside", rng),
        test_gap=generator.draw(evaluation_points, "gap", rng),
        test_outside=generator.draw(evaluation_points, "outside", rng),
    )
