"""From the members' Gaussians to numbers: RMSE, NLL of the mixture, coverage of its central intervals.

Each member predicts N(mean, variance); the ensemble's prediction is the uniform mixture of these Gaussians, of which all
measures here are exact: it is not replaced by the one Gaussian of its moments (as Lakshminarayanan et al. 2017,
arXiv:1612.01474, section 2.4 do). Means and variances are (ensemble_size, points), targets (points,).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_VARIANCE = 1e-6


def variance_of(raw: Tensor) -> Tensor:
    """Return the variance that an unbounded output of a network means: softplus(raw) + 1e-6, elementwise.

    As Lakshminarayanan et al. 2017, arXiv:1612.01474, section 2.2.1.
    """
    return F.softplus(raw) + LEAST_VARIANCE


def gaussian_nll(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return -log N(y; mean, variance) in nats, elementwise: 0.5 log(2 pi v) + (y - mean)^2 / (2 v).

    Lakshminarayanan et al. 2017, eq. 1, with its constant.
    """
    return 0.5 * (torch.log(2 * math.pi * variance) + (y - mean) ** 2 / variance)


def mixture_nll(y: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Return -log mean_m N(y; mean_m, variance_m) in nats: (points,)."""
    return math.log(len(means)) - torch.logsumexp(-gaussian_nll(y, means, variances), 0)


def mixture_moments(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the mixture, both (points,).

    mean_m(variance_m + mean_m^2) - mean^2 (Lakshminarayanan et al. 2017, section 2.4), without its cancellation.
    """
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


def mixture_cdf(y: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Return P(Y <= y) of the mixture: (points,). Of a calibrated prediction it is uniform (Dawid 1984)."""
    return torch.special.ndtr((y - means) / variances.sqrt()).mean(0)


def mixture_quantile(p: float, means: Tensor, variances: Tensor) -> Tensor:
    """Return the y with P(Y <= y) = p, 0 < p < 1, by bisection to rounding: (points,).

    It lies between the least and the greatest of the members' quantiles.
    """
    if not 0 < p < 1:
        raise ValueError(f"p must be between 0 and 1, however: {p}")
    of_members = means + variances.sqrt() * torch.special.ndtri(torch.tensor(p, dtype=means.dtype))
    low, high = of_members.amin(0), of_members.amax(0)
    for _ in range(60):
        middle = (low + high) / 2
        below = mixture_cdf(middle, means, variances) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def coverage(y: Tensor, means: Tensor, variances: Tensor, level: float) -> float:
    """Return the share of targets inside the mixture's central interval of probability `level`.

    y is inside if and only if its CDF value is within level / 2 of 1/2: the probability integral transform (Gneiting,
    Balabdaoui and Raftery 2007, doi:10.1111/j.1467-9868.2007.00587.x).
    """
    return ((mixture_cdf(y, means, variances) - 0.5).abs() <= level / 2).double().mean().item()


def measure(y: Tensor, means: Tensor, variances: Tensor) -> list[dict[str, Any]]:
    """Return a row of `results.REGRESSION_METRICS` for every member and, with `member=None`, one for the ensemble.

    `spread` is the root of the members' mean variance of means, the part of the ensemble's standard deviation that its
    members do not share; of ensembles only.
    """
    y, means, variances = y.double(), means.double(), variances.double()
    rows = [{"member": m, **_of_one(y, means[m : m + 1], variances[m : m + 1])} for m in range(len(means))]
    ensemble: dict[str, Any] = {"member": None, **_of_one(y, means, variances)}
    if len(means) > 1:
        ensemble["spread"] = means.var(0, correction=0).mean().sqrt().item()
    return [*rows, ensemble]


def _of_one(y: Tensor, means: Tensor, variances: Tensor) -> dict[str, Any]:
    return {
        "rmse": (means.mean(0) - y).square().mean().sqrt().item(),
        "nll": mixture_nll(y, means, variances).mean().item(),
        **{f"coverage_{percent}": coverage(y, means, variances, percent / 100) for percent in (50, 90, 95)},
        "spread": None,
    }
