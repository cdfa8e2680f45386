"""A deep ensemble: independent networks behind the interface of a BatchEnsemble."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from batchens.layers import members


class DeepEnsemble(nn.Module):
    """Networks that share nothing (Lakshminarayanan et al. 2017, arXiv:1612.01474), trained side by side.

    Shape: member-major, `(ensemble_size * batch, ...) -> (ensemble_size * batch, out)`: each network sees its own rows.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        parts = members(x, len(self.networks)).unbind()
        return torch.cat([network(part) for network, part in zip(self.networks, parts, strict=True)])
