"""A multi-layer perceptron."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from batchens.models.initialisation import kaiming


def mlp(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    """Return linear layers of these widths with ReLU between them, over flattened inputs: `(batch, *) -> (batch, out)`."""
    widths = [in_features, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return kaiming(nn.Sequential(*layers, nn.Linear(widths[-1], out_features)))
