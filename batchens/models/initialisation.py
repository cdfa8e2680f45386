"""The one initialisation of slow weights that all models here use."""

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def kaiming(model: M) -> M:
    """Draw every linear and convolutional weight from N(0, 2 / fan_in) (He et al. 2015, arXiv:1502.01852), set biases to 0.

    A bias of 0 is the same for every member after conversion, so only alpha and gamma decide how members differ.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model
