"""From the members' probabilities to numbers: accuracy, NLL, Brier score, ECE, and how much the members differ.

The ensemble's prediction is the mean of its members' probabilities; its NLL is that of this mixture.
"""

import math
from itertools import combinations
from typing import Any

from torch import Tensor

ECE_BINS = 15


def measure(log_probs: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Return a row of metrics for every member and, with `member=None`, one for the ensemble.

    Args:
        log_probs: (ensemble_size, examples, classes), each member's log probabilities.
        labels: (examples,), int64.
    """
    log_probs = log_probs.double()
    ensemble_size = len(log_probs)
    rows = [{"member": m, **score(log_probs[m], labels)} for m in range(ensemble_size)]
    ensemble: dict[str, Any] = {"member": None, **score(mixture(log_probs), labels)}
    if ensemble_size > 1:
        ensemble["disagreement"] = disagreement(log_probs)
        ensemble["epistemic"] = epistemic(log_probs)
    return [*rows, ensemble]


def score(log_probs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the metrics of one prediction, (examples, classes), those between members being None."""
    return {
        "accuracy": accuracy(log_probs, labels),
        "nll": nll(log_probs, labels),
        "brier": brier(log_probs, labels),
        "ece": ece(log_probs, labels),
        "disagreement": None,
        "epistemic": None,
    }


def mixture(log_probs: Tensor) -> Tensor:
    """Return the log of the members' mean probabilities: (ensemble_size, ..., classes) -> (..., classes)."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def accuracy(log_probs: Tensor, labels: Tensor) -> float:
    """Return the share of examples whose most probable class is the label. (examples, classes), (examples,)."""
    return (log_probs.argmax(-1) == labels).double().mean().item()


def nll(log_probs: Tensor, labels: Tensor) -> float:
    """Return the mean negative log likelihood of the labels, in nats."""
    return -log_probs.gather(-1, labels[:, None]).mean().item()


def brier(log_probs: Tensor, labels: Tensor) -> float:
    """Return the Brier score summed over classes, 0 (best) to 2 (Brier 1950): mean_n sum_c (p_nc - [y_n = c])^2."""
    probabilities = log_probs.exp()
    right = probabilities.gather(-1, labels[:, None]).squeeze(-1)
    return (probabilities.square().sum(-1) - 2 * right + 1).mean().item()


def ece(log_probs: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Return the expected calibration error over equal-width bins of confidence (Guo et al. 2017, arXiv:1706.04599, eq. 3).

    The mean over examples of |accuracy - mean confidence| of the example's bin; confidence is the highest probability.
    """
    confidence, right, bin_of = _binned(log_probs, labels, bins)
    return confidence.new_zeros(bins).index_add_(0, bin_of, right - confidence).abs().sum().item() / len(labels)


def reliability(log_probs: Tensor, labels: Tensor, bins: int = ECE_BINS) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each bin of `ece` the mean confidence, the accuracy and the share of the examples: (bins,) each.

    Confidence and accuracy of a bin without examples are nan.
    """
    confidence, right, bin_of = _binned(log_probs, labels, bins)
    n = bin_of.bincount(minlength=bins).to(confidence)
    sums = (confidence.new_zeros(bins).index_add_(0, bin_of, values) for values in (confidence, right))
    mean_confidence, accuracies = (total / n for total in sums)
    return mean_confidence, accuracies, n / len(labels)


def _binned(log_probs: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each example its confidence, whether it is right, and its bin, k for (k / bins, (k + 1) / bins]."""
    log_confidence, predicted = log_probs.max(-1)
    confidence = log_confidence.exp()
    bin_of = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    return confidence, (predicted == labels).to(confidence), bin_of


def disagreement(log_probs: Tensor) -> float:
    """Return the share of examples on which two members predict different classes, the mean over all pairs of members.

    (ensemble_size, examples, classes), at least two members.
    """
    predicted = log_probs.argmax(-1)
    pairs = [(predicted[a] != predicted[b]).double().mean().item() for a, b in combinations(range(len(predicted)), 2)]
    return sum(pairs) / len(pairs)


def epistemic(log_probs: Tensor) -> float:
    """Return the mutual information of prediction and member, in nats: H[mean_m p_m] - mean_m H[p_m], mean over examples.

    The part of the predictive entropy that members do not share (Depeweg et al. 2018, arXiv:1710.07283); 0 when they agree.
    """
    return (_entropy(mixture(log_probs)) - _entropy(log_probs).mean(0)).mean().item()


def _entropy(log_probs: Tensor) -> Tensor:
    # a probability of 0 has no part in an entropy, and 0 * -inf would be nan
    return -(log_probs.exp() * log_probs.clamp_min(-1e4)).sum(-1)
