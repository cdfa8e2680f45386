"""What may be said of two methods from their runs of equal seeds."""

import numpy as np
import pandas as pd
from scipy import stats


def paired_difference(runs: pd.DataFrame, others: pd.DataFrame, measure: str) -> tuple[float, float, int]:
    """Return the mean difference over equal seeds, its standard error (nan for fewer than 3 pairs), and how many pairs."""
    pairs = runs.set_index("seed")[measure] - others.set_index("seed")[measure]
    pairs = pairs.dropna()
    error = pairs.std() / np.sqrt(len(pairs)) if len(pairs) >= 3 else np.nan
    return float(pairs.mean()), float(error), len(pairs)


def half_width(error: float, pairs: int) -> float:
    """Return half the width of the 95 % interval of a mean with this standard error, by Student's t over the pairs."""
    return float(stats.t.ppf(0.975, pairs - 1)) * error
