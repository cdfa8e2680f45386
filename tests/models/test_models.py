import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchens.layers import batch_ensemble, member_parameters, repeat
from batchens.models.cnn import cnn
from batchens.models.initialisation import kaiming
from batchens.models.mlp import mlp
from batchens.models.vgg import vgg11
from batchens.optimizers import slow_weights


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: cnn(10), 60_554),
        (lambda: vgg11(10, batchnorm=False), 9_488_266),
        (lambda: vgg11(10), 9_488_266 + 2 * (64 + 128 + 2 * 256 + 4 * 512)),
        (lambda: mlp(3072, [512], 10), 3072 * 512 + 512 + 512 * 10 + 10),
        (lambda: mlp(1, [50, 50], 1), 2_701),
    ],
)
def test_parameter_counts_are_the_published_ones(build, parameters):
    assert count(build().parameters()) == parameters


@pytest.mark.parametrize(("ensemble_size", "parameters"), [(2, 9_515_630), (4, 9_546_268), (8, 9_607_544)])
def test_a_batchensemble_vgg11_has_the_published_number_of_parameters(ensemble_size, parameters):
    factors = {"alpha_init": 0.5, "gamma_init": 0.5}
    model = batch_ensemble(vgg11(10), ensemble_size=ensemble_size, **factors, batchnorm="member_affine")
    assert count(model.parameters()) == parameters
    assert count(slow_weights(model)) == 9_484_992
    assert count(member_parameters(model)) == parameters - 9_484_992


def test_a_batchensemble_mlp_of_ten_members_has_the_published_number_of_parameters():
    model = batch_ensemble(mlp(1, [50, 50], 1), ensemble_size=10, alpha_init=0.5, gamma_init=0.5)
    assert count(model.parameters()) == 5_630
    assert count(slow_weights(model)) == 2_600


def test_vgg11_pads_28x28_with_zeros_to_32x32():
    small, large = vgg11(10, 1, 28).eval(), vgg11(10, 1, 32).eval()
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        b.data = a.data
    x = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(small(x), large(F.pad(x, (2, 2, 2, 2))))


@pytest.mark.parametrize("size", [8, 27, 31, 64])
def test_vgg11_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=f"32x32, or of 28x28 and pads them, however: {size}x{size}"):
        vgg11(10, 3, size)


@pytest.mark.parametrize("size", [8, 28, 32])
def test_the_cnn_and_the_mlp_take_images_of_every_data_set(size):
    x = torch.randn(2, 1, size, size)
    assert cnn(7, 1, size)(x).shape == mlp(size * size, [5], 7)(x).shape == (2, 7)


def test_without_batchnorm_there_is_none():
    for model in (cnn(10, batchnorm=False), vgg11(10, batchnorm=False)):
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def test_kaiming_draws_weights_of_variance_2_over_fan_in_and_sets_biases_to_0():
    model = kaiming(nn.Sequential(nn.Linear(200, 400), nn.Conv2d(64, 128, 3), nn.Conv2d(64, 128, 3, groups=4)))
    for layer, fan_in in zip(model, (200, 64 * 9, 16 * 9), strict=True):
        assert layer.weight.mean().abs() < 5 * (2 / fan_in / layer.weight.numel()) ** 0.5
        assert layer.weight.var().item() == pytest.approx(2 / fan_in, rel=0.05)
        assert not layer.bias.any()


@pytest.mark.filterwarnings("ignore::batchens.layers.IdenticalMembersWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("plain", "size", "batchnorm"),
    [
        (cnn(10, 1, 8), 8, "shared"),
        (cnn(10, 1, 8), 8, "member_affine"),
        (cnn(10, 1, 8), 8, "member"),
        (mlp(64, [9], 10), 8, "shared"),
        (vgg11(10, 1, 28), 28, "member"),
    ],
)
def test_converted_with_factors_of_1_each_member_gives_the_plain_networks_outputs(plain, size, batchnorm, training):
    x = torch.randn(2, 1, size, size)
    plain.train()(x)
    model = batch_ensemble(plain, ensemble_size=3, alpha_init=1, gamma_init=1, batchnorm=batchnorm).train(training)
    with torch.no_grad():
        outputs, expected = model(repeat(x, 3)), plain.train(training)(x)
    for part in outputs.chunk(3):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)
