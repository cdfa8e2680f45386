import numpy as np
import pandas as pd
import pytest
from scipy import stats

from plots.statistics import Difference, difference, interval_of


def runs(*values: float) -> pd.DataFrame:
    return pd.DataFrame({"seed": range(len(values)), "accuracy": values})


def test_a_difference_is_that_of_equal_seeds_with_students_interval() -> None:
    ours, other = runs(3.0, 5.0, 4.0), runs(1.0, 2.0, 3.0).iloc[[2, 0, 1]]  # in another order
    found = difference(ours, other, "accuracy")
    reference = stats.ttest_rel([3.0, 5.0, 4.0], [1.0, 2.0, 3.0]).confidence_interval(0.95)
    assert found.pairs == 3
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((reference.low, reference.high))
    assert found.shown == bool(reference.low > 0)


def test_fewer_than_three_pairs_have_no_interval_and_show_nothing() -> None:
    found = difference(runs(1.0, 2.0), runs(5.0, 9.0), "accuracy")
    assert found.pairs == 2 and np.isnan(found.half) and not found.shown


def test_an_interval_of_no_width_shows_nothing() -> None:
    assert not Difference(0.28, 0.0, 3).shown
    assert Difference(0.28, 0.2, 3).shown


def test_a_seed_that_stands_twice_is_refused_and_not_counted_as_another_pair() -> None:
    with pytest.raises(ValueError, match="a seed must stand once"):
        difference(runs(1.0, 2.0, 3.0), pd.concat([runs(1.0, 2.0, 3.0)] * 2), "accuracy")


def test_the_interval_of_a_mean_leaves_absent_values_out() -> None:
    found = interval_of(pd.Series([1.0, np.nan, 2.0, 6.0]))
    low, high = stats.t.interval(0.95, 2, loc=3.0, scale=stats.sem([1.0, 2.0, 6.0]))
    assert (found.mean, found.pairs) == (3.0, 3) and found.half == pytest.approx((high - low) / 2)
