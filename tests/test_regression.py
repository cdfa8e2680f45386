import math

import pytest
import torch
from scipy import integrate, stats

from batchens.regression import (
    coverage,
    gaussian_nll,
    measure,
    mixture_cdf,
    mixture_moments,
    mixture_nll,
    mixture_quantile,
    variance_of,
)
from batchens.results import REGRESSION_METRICS

MEANS = torch.tensor([[-2.0, 0.0], [0.5, 0.1], [3.0, -0.1]], dtype=torch.float64)  # three members, two points
VARIANCES = torch.tensor([[0.25, 1.0], [1.0, 2.0], [4.0, 0.5]], dtype=torch.float64)


def density(y, point):
    members = zip(MEANS[:, point].tolist(), VARIANCES[:, point].tolist(), strict=True)
    return sum(stats.norm.pdf(y, mean, variance**0.5) for mean, variance in members) / 3


def integral(function, low=-40.0, high=40.0):
    return integrate.quad(function, low, high, limit=500, points=[-2, 0, 3] if low < -2 and high > 3 else None)[0]


def test_gaussian_nll_is_that_of_scipy_and_of_torch():
    y = torch.linspace(-3, 3, 7, dtype=torch.float64)
    mean, variance = y.flip(0) / 2, y.abs() + 0.1
    ours = gaussian_nll(y, mean, variance)
    assert ours.tolist() == pytest.approx(-stats.norm.logpdf(y.numpy(), mean.numpy(), variance.sqrt().numpy()))
    theirs = torch.nn.functional.gaussian_nll_loss(mean, y, variance, full=True, reduction="none")
    torch.testing.assert_close(ours, theirs)


def test_the_half_before_the_logarithm_makes_the_true_variance_the_best():
    residual = torch.randn(200_000, dtype=torch.float64) * 3
    variance = torch.tensor([4.5, 8.0, 9.0, 10.0, 18.0])[:, None]
    assert gaussian_nll(residual, torch.zeros(1), variance).mean(1).argmin() == 2


@pytest.mark.parametrize("point", [0, 1])
def test_the_mixture_has_the_density_the_moments_and_the_cdf_of_numerical_integration(point):
    for y in (-2.5, 0.0, 4.0):
        nll = mixture_nll(torch.tensor([y, y], dtype=torch.float64), MEANS, VARIANCES)
        assert nll[point].item() == pytest.approx(-math.log(density(y, point)))
        cdf = mixture_cdf(torch.tensor([y, y], dtype=torch.float64), MEANS, VARIANCES)
        assert cdf[point].item() == pytest.approx(integral(lambda t: density(t, point), high=y), abs=1e-7)
    mean, variance = (moment[point].item() for moment in mixture_moments(MEANS, VARIANCES))
    assert mean == pytest.approx(integral(lambda t: t * density(t, point)))
    assert variance == pytest.approx(integral(lambda t: (t - mean) ** 2 * density(t, point)))


def test_a_mixture_of_equal_members_is_one_gaussian():
    y, mean, variance = torch.randn(3, 20, dtype=torch.float64).unbind()
    variance = variance.square() + 0.1
    torch.testing.assert_close(
        mixture_nll(y, mean.expand(4, -1), variance.expand(4, -1)), gaussian_nll(y, mean, variance)
    )


def test_the_nll_of_a_mixture_is_at_most_the_mean_of_its_members():
    y = torch.randn(1000, 2, dtype=torch.float64) * 4
    for row in y:
        assert (mixture_nll(row, MEANS, VARIANCES) <= gaussian_nll(row, MEANS, VARIANCES).mean(0) + 1e-12).all()


def test_far_from_every_member_the_nll_stays_finite():
    nll = mixture_nll(torch.tensor([1e4]), torch.zeros(3, 1), torch.full((3, 1), 1e-2))
    assert nll.item() == pytest.approx(1e8 / 2e-2, rel=1e-6)


@pytest.mark.parametrize("p", [0.001, 0.025, 0.5, 0.9])
def test_quantiles_undo_the_cdf(p):
    cdf = mixture_cdf(mixture_quantile(p, MEANS, VARIANCES), MEANS, VARIANCES)
    assert cdf.tolist() == pytest.approx([p, p])
    one = mixture_quantile(p, MEANS[:1], VARIANCES[:1])[0].item()
    assert one == pytest.approx(stats.norm.ppf(p, MEANS[0, 0].item(), VARIANCES[0, 0].item() ** 0.5))


@pytest.mark.parametrize("p", [0, 1, math.nan])
def test_a_quantile_needs_a_probability(p):
    with pytest.raises(ValueError, match="p must be between 0 and 1, however"):
        mixture_quantile(p, MEANS, VARIANCES)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_coverage_of_a_calibrated_prediction_is_nominal_and_of_a_too_sure_one_is_lower(level):
    n = 40_000
    members = torch.randint(3, (n,))
    means, variances = MEANS[:, :1].expand(3, n), VARIANCES[:, :1].expand(3, n)
    y = MEANS[members, 0] + VARIANCES[members, 0].sqrt() * torch.randn(n, dtype=torch.float64)
    tolerance = 4 * (level * (1 - level) / n) ** 0.5
    assert coverage(y, means, variances, level) == pytest.approx(level, abs=tolerance)
    low, high = (mixture_quantile(p, means, variances) for p in ((1 - level) / 2, (1 + level) / 2))
    assert coverage(y, means, variances, level) == ((low <= y) & (y <= high)).double().mean().item()

    sure = torch.randn(n, dtype=torch.float64)
    expected = 2 * stats.norm.cdf(stats.norm.ppf((1 + level) / 2) / 2) - 1  # half the true standard deviation
    assert coverage(sure, torch.zeros(1, n), torch.full((1, n), 0.25), level) == pytest.approx(expected, abs=0.01)


def test_measures_are_those_of_each_member_and_of_their_mixture():
    y = torch.tensor([1.0, -1.0])
    rows = measure(y, MEANS, VARIANCES)
    assert [row["member"] for row in rows] == [0, 1, 2, None]
    assert all(set(row) == {"member", *REGRESSION_METRICS} for row in rows)
    for m, row in enumerate(rows[:3]):
        assert row["rmse"] == pytest.approx((((MEANS[m] - y) ** 2).mean() ** 0.5).item())
        assert row["nll"] == pytest.approx(gaussian_nll(y, MEANS[m], VARIANCES[m]).mean().item())
        assert row["spread"] is None
    assert rows[3]["rmse"] == pytest.approx((((MEANS.mean(0) - y) ** 2).mean() ** 0.5).item())
    assert rows[3]["nll"] == pytest.approx(mixture_nll(y.double(), MEANS, VARIANCES).mean().item())
    assert rows[3]["spread"] == pytest.approx(MEANS.numpy().var(0).mean() ** 0.5)
    assert measure(y, MEANS[:1], VARIANCES[:1])[1]["spread"] is None


def test_a_variance_is_positive_whatever_the_network_says():
    raw = torch.tensor([-1e4, 0.0, 30.0])
    assert variance_of(raw).tolist() == pytest.approx([1e-6, math.log(2) + 1e-6, 30.0], rel=1e-5)
