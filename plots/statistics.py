"""What may be said of two methods from their runs of equal seeds."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


def paired_difference(runs: pd.DataFrame, others: pd.DataFrame, measure: str) -> tuple[float, float, int]:
    """Return the mean difference over equal seeds, its standard error (nan for fewer than 3 pairs), and how many pairs."""
    for each in (runs, others):
        if each["seed"].duplicated().any():
            raise ValueError(
                "a seed must stand once on each side of a paired difference, however one stands more often"
            )
    pairs = runs.set_index("seed")[measure] - others.set_index("seed")[measure]
    pairs = pairs.dropna()
    error = pairs.std() / np.sqrt(len(pairs)) if len(pairs) >= 3 else np.nan
    return float(pairs.mean()), float(error), len(pairs)


def half_width(error: float, pairs: int) -> float:
    """Return half the width of the 95 % interval of a mean with this standard error, by Student's t over the pairs."""
    return float(stats.t.ppf(0.975, pairs - 1)) * error


class Difference(NamedTuple):
    """A mean over seeds, most often of paired differences: half of its 95 % t interval (nan for fewer than 3), how many."""

    mean: float
    half: float
    pairs: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves 0 out; one of no width, of seeds that happen to differ alike, shows nothing."""
        return bool(abs(self.mean) > self.half > 0)


def difference(runs: pd.DataFrame, others: pd.DataFrame, measure: str) -> Difference:
    """Return the mean difference over equal seeds with its 95 % interval."""
    mean, error, pairs = paired_difference(runs, others, measure)
    return Difference(mean, half_width(error, pairs) if pairs >= 3 else np.nan, pairs)


def interval_of(values: pd.Series) -> Difference:
    """Return the mean over seeds with its 95 % interval."""
    values = values.dropna()
    error = values.std() / np.sqrt(len(values))
    return Difference(float(values.mean()), half_width(error, len(values)) if len(values) >= 3 else np.nan, len(values))
