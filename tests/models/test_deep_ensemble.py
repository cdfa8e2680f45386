import pytest
import torch
from torch import nn

from batchens.models.cnn import cnn
from batchens.models.deep_ensemble import DeepEnsemble


@pytest.fixture
def ensemble():
    torch.manual_seed(0)
    return DeepEnsemble([cnn(10, 1, 8) for _ in range(3)])


@pytest.mark.parametrize("training", [True, False])
def test_each_members_output_is_that_of_its_network_alone(ensemble, training):
    x = torch.randn(12, 1, 8, 8)
    ensemble.train(training)
    expected = torch.cat([network(part) for network, part in zip(ensemble.networks, x.chunk(3), strict=True)])
    assert torch.equal(ensemble(x), expected)


def test_networks_share_no_parameter_and_no_member_reaches_another(ensemble):
    storages = [parameter.data_ptr() for parameter in ensemble.parameters()]
    assert len(set(storages)) == len(storages)
    ensemble(torch.randn(6, 1, 8, 8)).chunk(3)[1].sum().backward()
    assert [any(p.grad.any() for p in network.parameters()) for network in ensemble.networks] == [0, 1, 0]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch=5, ensemble_size=2"):
        DeepEnsemble([nn.Identity(), nn.Identity()])(torch.ones(5, 2))
