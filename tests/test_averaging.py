import copy
import io
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchens import averaging
from batchens.averaging import (
    AveragedNetwork,
    assignment,
    average,
    between,
    digest,
    layout,
    load_weights,
    match,
    permute,
    reestimate,
    sinkhorn,
)
from batchens.layers import batch_ensemble
from batchens.models.cnn import cnn
from batchens.models.mlp import mlp
from batchens.models.vgg import vgg, vgg11

SMALL = (6, "P", 8, 8, "P", "P", "P", "P")
NETWORKS = {
    "mlp": (lambda: mlp(64, [12], 5), (1, 8, 8)),
    "deeper mlp": (lambda: mlp(64, [12, 10, 12], 5), (1, 8, 8)),
    "cnn": (lambda: cnn(5, 1, 8), (1, 8, 8)),
    "cnn without BatchNorm": (lambda: cnn(5, 1, 8, batchnorm=False), (1, 8, 8)),
    "vgg": (lambda: vgg(SMALL, 5, 3, 32, hidden=(12,)), (3, 32, 32)),
    "vgg without BatchNorm": (lambda: vgg(SMALL, 5, 3, 32, batchnorm=False, hidden=(12,)), (3, 32, 32)),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.GELU(), nn.AvgPool2d(2)), mlp(54, [12], 5)
        ),
        (1, 8, 8),
    ),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def make(name, count, seed=0):
    """Networks with biases and statistics of their own, and a batch of inputs."""
    build, shape = NETWORKS[name]
    torch.manual_seed(seed)
    networks = [build() for _ in range(count)]
    for network in networks:
        for module in network.modules():
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                own = key != "weight" or isinstance(module, nn.BatchNorm2d)
                if own and tensor.is_floating_point():
                    tensor.data = torch.rand(tensor.shape) + 0.5
        network.eval()
    return networks, torch.randn(6, *shape)


def shuffled(network):
    return [torch.randperm(size) for size in layout(network).sizes]


def learned(networks, spread=0.3, **options):
    """An averaged network whose matrices are not the identity."""
    model = AveragedNetwork(networks, **options)
    for matrices in model.matrices.values():
        matrices.data += spread * torch.randn_like(matrices)
    return model.eval()


# permutations


@every_network
def test_the_order_of_hidden_units_does_not_change_the_outputs(name):
    (network,), x = make(name, 1)
    permuted = permute(network, shuffled(network))
    assert any(not torch.equal(a, b) for a, b in zip(network.parameters(), permuted.parameters(), strict=True))
    torch.testing.assert_close(permuted(x), network(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(permuted.train()(x), network.train()(x), rtol=1e-4, atol=1e-4)


def test_a_channel_is_a_block_of_the_inputs_behind_flattened_convolutions():
    (network,), _ = make("cnn", 1)
    order = shuffled(network)
    before, after = network[-1].weight, permute(network, order)[-1].weight
    for new, old in enumerate(order[1].tolist()):
        assert torch.equal(after[:, 4 * new : 4 * new + 4], before[:, 4 * old : 4 * old + 4])


def test_hidden_layers_are_found_with_their_sizes():
    assert layout(make("vgg", 1)[0][0]).sizes == (6, 8, 8, 12)
    assert layout(make("deeper mlp", 1)[0][0]).sizes == (12, 10, 12)
    for size in (28, 32):
        for batchnorm in (True, False):
            assert layout(cnn(10, 3, size, batchnorm)).sizes == (32, 64)
            assert layout(vgg11(10, 3, size, batchnorm)).sizes == (64, 128, 256, 256, *[512] * 5)


def test_layers_without_weights_may_come_again_and_sequences_may_be_of_other_names():
    class Named(nn.Sequential):
        pass

    activation = nn.ReLU()
    network = Named(nn.Linear(4, 8), activation, Named(nn.Linear(8, 6), activation), nn.BatchNorm1d(6), nn.Linear(6, 2))
    x = torch.randn(5, 4)
    torch.testing.assert_close(permute(network, shuffled(network))(x), network(x))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x).cumsum(-1)


def tied():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    network[2].bias = network[0].bias
    return network


def hidden(*layers):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), *layers, nn.Linear(8, 2))


TWICE = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Linear(3, 2)), "a network must have a hidden layer"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)),
            "act on each channel alone, however: Softmax",
        ),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), "connected to all units"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), "connected to all units"),
        (nn.TransformerEncoderLayer(8, 2), "act on each channel alone, however: TransformerEncoderLayer"),
        (hidden(Residual(nn.Linear(8, 8), nn.ReLU())), "act on each channel alone, however: Residual"),
        (hidden(Doubled(8, 8)), "act on each channel alone, however: Doubled"),
        (hidden(TWICE, nn.ReLU(), TWICE), "used once and share nothing with others, however 4.weight is 2.weight"),
        (tied(), "share nothing with others, however 2.bias is 0.bias"),
        (hidden(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))), "however: ParametrizedLinear"),
        (hidden(nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))), "however: ParametrizedLinear"),
        (
            hidden(nn.utils.spectral_norm(nn.Linear(8, 8))),
            "weights of plain layers, .* 2.weight_orig is torch.float32, 8 x 8",
        ),
        (hidden(nn.Linear(8, 8, dtype=torch.complex64)), "however 2.weight is torch.complex64, 8 x 8"),
        (batch_ensemble(hidden(), ensemble_size=2, alpha_init=-0.5, gamma_init=-0.5), "however: BatchEnsembleLinear"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(8, 8), nn.Flatten(), nn.Linear(256, 3)),
            "first, then a Flatten, then linear layers, however '2' is Linear.* is given images",
        ),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(36, 3)), "however: Flatten.start_dim=2"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), "connected to all units"),
        (nn.Sequential(nn.Linear(4, 8), nn.Conv2d(8, 3, 3)), "however '1' is Conv2d.* is given units"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 3)),
            "each of the 4 units before is one channel, .* Flatten of images, however 2.weight is 144",
        ),
    ],
)
def test_a_network_whose_units_have_no_order_of_their_own_is_refused(network, message):
    with pytest.raises(ValueError, match=message):
        layout(network)


@pytest.mark.parametrize("of", [average, match, AveragedNetwork])
@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ([mlp(8, [4], 3)], "at least two networks, however: 1"),
        ([], "at least two networks, however: 0"),
        ([mlp(8, [4], 3), mlp(8, [5], 3)], "network 1 is not like network 0: 1.weight is 5 x 8 and not 4 x 8"),
        (
            [mlp(8, [4], 3), mlp(8, [4, 4], 3)],
            "network 1 is not like network 0: 3.weight is 4 x 4 and not 3 x 4, .* absent",
        ),
        ([mlp(8, [4], 3), nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))], "layers differ"),
        ([mlp(8, [4], 3), mlp(8, [4], 3).double()], "they are torch.float32 on cpu and torch.float64 on cpu"),
        ([mlp(8, [4], 3), mlp(8, [4], 3).to("meta")], "they are torch.float32 on cpu and torch.float32 on meta"),
    ],
)
def test_what_cannot_be_averaged_is_refused(of, networks, message):
    with pytest.raises(ValueError, match=message):
        of(networks)


@pytest.mark.parametrize(
    "permutations",
    [
        [],
        [torch.arange(4)] * 2,
        [torch.arange(3)],
        [torch.arange(5)],
        [torch.tensor([0, 1, 2, 2])],
        [torch.arange(1, 5)],
        [torch.arange(-4, 0)],
        [torch.arange(4.0)],
        [torch.tensor([[0, 1], [2, 3]])],
        [torch.tensor(4)],
    ],
)
def test_what_is_no_permutation_is_refused(permutations):
    network = mlp(8, [4], 3)
    with pytest.raises(ValueError, match="permutations must be integers, one vector for each hidden layer"):
        permute(network, permutations)
    with pytest.raises(ValueError, match="permutations must be integers, one vector for each hidden layer"):
        average([network, network], [[torch.arange(4)], permutations])


def test_indices_that_would_be_a_mask_are_no_permutation():
    with pytest.raises(ValueError, match="permutations must be integers"):
        permute(mlp(8, [2], 3), [torch.tensor([False, True])])


def test_permutations_must_be_those_of_all_networks():
    network = mlp(8, [4], 3)
    with pytest.raises(ValueError, match="each of the 2 networks, however of 1"):
        average([network, network], [[torch.arange(4)]])


# averages


def test_the_average_is_of_all_weights_and_of_no_counts():
    networks, _ = make("vgg", 3)
    state, states = average(networks).state_dict(), [network.state_dict() for network in networks]
    for name, tensor in state.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.stack([one[name] for one in states]).mean(0))
    assert all(state[name] == states[0][name] for name in state if name.endswith("num_batches_tracked"))


@every_network
def test_a_network_and_itself_in_another_order_have_itself_as_average(name):
    (network,), x = make(name, 1)
    order = shuffled(network)
    twin = permute(network, order)
    back = [one.argsort() for one in order]
    both = average([network, twin], [[torch.arange(len(one)) for one in order], back])
    torch.testing.assert_close(both(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_line_ends_in_its_networks():
    (first, second), x = make("cnn", 2)
    assert torch.equal(between(first, second, 0.0)(x), first(x))
    torch.testing.assert_close(between(first, second, 1.0)(x), second(x))
    torch.testing.assert_close(between(first, second, 0.5)(x), average([first, second])(x))


def test_statistics_are_those_of_the_given_inputs_and_nothing_else_changes():
    (network,), x = make("cnn", 1)
    network.train()(x + 10)  # of training there are others, and a count of its batches
    network.eval()
    before = copy.deepcopy(network)
    batches = [x[:2], x[2:4], x[4:]]
    reestimate(network, batches)
    outputs = [network[0](batch) for batch in batches]
    torch.testing.assert_close(network[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0))
    torch.testing.assert_close(network[1].running_var, torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0))
    assert network[1].momentum == before[1].momentum and not network.training
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before.parameters(), strict=True))
    (plain,), x = make("mlp", 1)
    state = digest(plain.state_dict())
    reestimate(plain, [x])
    assert digest(plain.state_dict()) == state


def test_statistics_of_no_inputs_are_refused_and_nothing_changes():
    (network,), _ = make("cnn", 1)
    before = digest(network.state_dict())
    with pytest.raises(ValueError, match="at least one batch, however there is none"):
        reestimate(network, iter([]))
    assert digest(network.state_dict()) == before and not network.training


def test_a_batch_that_fails_leaves_mode_and_momentum_as_they_were():
    (network,), x = make("cnn", 1)
    with pytest.raises(RuntimeError):
        reestimate(network, [x, torch.randn(6, 3, 8, 8)])
    assert network[1].momentum == 0.1 and not any(module.training for module in network.modules())


# matching


def test_what_is_aligned_with_is_the_mean_or_the_first():
    with pytest.raises(ValueError, match="to must be 'mean' or 'first', however: 'meen'"):
        match(make("mlp", 3)[0], "meen")


@every_network
@pytest.mark.parametrize("to", ["mean", "first"])
def test_matching_finds_the_orders_that_a_network_was_put_into(name, to):
    (network,), _ = make(name, 1)
    orders = [shuffled(network) for _ in range(2)]
    found = match([network, *(permute(network, order) for order in orders)], to)
    for own, expected in zip(found, [None, *orders], strict=True):
        for one, size, layer in zip(own, layout(network).sizes, range(9), strict=False):
            back = torch.arange(size) if expected is None else expected[layer].argsort()
            assert torch.equal(one, back)


def test_matching_makes_networks_more_alike_and_matching_with_the_mean_more_so():
    networks, _ = make("deeper mlp", 4)

    def likeness(permutations):
        weights = torch.cat([p.flatten() for p in average(networks, permutations).parameters()])
        return weights.norm().item()

    identity = [[torch.arange(size) for size in layout(networks[0]).sizes]] * 4
    first, mean = match(networks, "first"), match(networks, "mean")
    assert likeness(identity) < likeness(first) < likeness(mean)
    for found in (first, mean):
        assert all(torch.equal(one.sort()[0], torch.arange(len(one))) for own in found for one in own)
        assert all(torch.equal(one, torch.arange(len(one))) for one in found[0])


@every_network
def test_the_likeness_of_two_networks_is_the_inner_product_of_all_their_weights(name):
    (network, other), _ = make(name, 2)
    order = shuffled(other)
    likeness = averaging._Likeness(network.state_dict(), other.state_dict(), layout(network)).total(order)
    pairs = zip(network.named_parameters(), permute(other, order).parameters(), strict=True)
    # but for the outputs' biases, which no order moves
    own = [(one * two).sum() for (key, one), two in pairs if layout(network).axes[key] != averaging.Axes(None)]
    assert likeness == pytest.approx(sum(own).item(), rel=1e-5)


def better(target, network, layer):
    """By how much the best other order of a layer's units would make two networks more alike, as a share."""
    likeness = 0
    for name, axes in layout(target).axes.items():
        one, two = target.state_dict()[name], network.state_dict()[name]
        if "running" not in name and axes.out == layer:
            likeness += one.flatten(1) @ two.flatten(1).T if one.dim() > 1 else one[:, None] * two
        if axes.into == layer:
            size = layout(target).sizes[layer]
            one, two = (t.reshape(len(t), size, -1).transpose(0, 1).flatten(1) for t in (one, two))
            likeness += one @ two.T
    best = likeness[torch.arange(len(likeness)), averaging.assignment(likeness)].sum()
    return ((best - likeness.trace()) / likeness.trace().abs()).item()


@pytest.mark.parametrize("to", ["mean", "first"])
@pytest.mark.parametrize("name", ["deep", "vgg"])
@torch.no_grad()
def test_where_matching_ends_no_layer_can_be_put_into_a_better_order(name, to):
    torch.manual_seed(0)
    networks = [mlp(64, [48] * 4, 10) for _ in range(4)] if name == "deep" else make(name, 4)[0]
    matched = [permute(network, own) for network, own in zip(networks, match(networks, to), strict=True)]
    for m, network in enumerate(matched):
        others = [other for n, other in enumerate(matched) if n != m]
        target = average(others) if to == "mean" else matched[0]
        if network is not target:
            assert max(better(target, network, layer) for layer in range(len(layout(network).sizes))) < 1e-5


@pytest.mark.parametrize(("case", "succeeds"), [("a copy in another order", 1), ("inputs of other units", 0)])
def test_matching_goes_on_from_both_of_its_starts_and_takes_the_better_end(case, succeeds):
    torch.manual_seed(0)
    network = mlp(2, [40, 40, 40], 2)
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter)
    for parameter in network[1].parameters():
        parameter.data *= 0.3  # of little weight, though it is all that the start from the inputs begins with
    where, identity = layout(network), [torch.arange(40)] * 3
    if case == "a copy in another order":
        order = shuffled(network)
        other, expected = permute(network, order), [one.argsort() for one in order]
    else:
        other, expected = copy.deepcopy(network), identity
        for parameter in other[1].parameters():
            parameter.data = parameter.data.roll(1, 0)
    likeness = averaging._Likeness(network.state_dict(), other.state_dict(), where)
    with torch.no_grad():
        ends = [
            averaging._align(likeness, start, torch.Generator().manual_seed(0))
            for start in (identity, averaging._from_the_inputs(likeness))
        ]
    right = [all(torch.equal(one, two) for one, two in zip(end, expected, strict=True)) for end in ends]
    assert [start for start in (0, 1) if right[start]] == [succeeds]
    assert all(torch.equal(one, two) for one, two in zip(match([network, other])[1], expected, strict=True))


def test_running_statistics_do_not_count_in_matching():
    networks, _ = make("cnn", 3)
    expected = [match(networks, to) for to in ("mean", "first")]
    for network in networks:
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer.data = 1000 * torch.rand_like(buffer)
    for to, before in zip(("mean", "first"), expected, strict=True):
        for one, other in zip(match(networks, to), before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# doubly stochastic matrices


def normalised_in_turn(matrices, temperature, iterations=100):
    kernel = torch.exp(matrices / temperature) + 0.001
    for _ in range(iterations):
        kernel = kernel / kernel.sum(-1, keepdim=True)
        kernel = kernel / kernel.sum(-2, keepdim=True)
    return kernel


@pytest.mark.parametrize(("temperature", "diagonal"), [(1.0, 0.00529), (0.2, 0.225), (0.1, 0.977)])
def test_an_identity_of_512_units_starts_where_the_thesis_put_it(temperature, diagonal):
    matrix = sinkhorn(torch.eye(512), temperature)
    torch.testing.assert_close(matrix.diagonal(), torch.full((512,), diagonal), rtol=2e-3, atol=0)
    torch.testing.assert_close(matrix[0, 1:], torch.full((511,), (1 - matrix[0, 0].item()) / 511), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [20, 100])
@pytest.mark.parametrize(("temperature", "spread"), [(1.0, 1.0), (0.1, 0.3), (0.1, 1.0), (0.02, 0.5)])
def test_matrices_and_gradients_are_those_of_normalising_one_by_one(size, temperature, spread):
    matrices = (torch.eye(size) + spread * torch.randn(2, 2, size, size)).double().requires_grad_()
    weights = torch.randn_like(matrices)
    expected = normalised_in_turn(matrices, temperature)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), matrices)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        mine = matrices.detach().to(dtype).requires_grad_()
        found = sinkhorn(mine, temperature, tolerance=0.0)
        torch.testing.assert_close(found.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        (own,) = torch.autograd.grad((found * weights.to(dtype)).sum(), mine)
        largest = gradient.abs().max()
        torch.testing.assert_close(own.double() / largest, gradient / largest, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("iterations", [1, 3, 30])
def test_the_gradient_passes_gradcheck(iterations):
    matrices = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: sinkhorn(a, 0.3, iterations=iterations, tolerance=0.0), (matrices,))


def test_rows_and_columns_sum_to_1():
    matrix = sinkhorn(torch.randn(3, 50, 50), 0.5)
    assert (matrix >= 0).all()
    for axis in (-1, -2):
        torch.testing.assert_close(matrix.sum(axis), torch.ones(3, 50), rtol=0, atol=2e-5)


@pytest.mark.parametrize("wanted", ["one column", "by rank"])
@pytest.mark.parametrize("size", [12, 64])
@pytest.mark.parametrize("scale", [3.0, 30.0, 3000.0])
def test_entries_that_would_overflow_do_not(scale, size, wanted):
    torch.manual_seed(0)
    matrices = scale * torch.eye(size).flip(0)  # exp(scale / 0.1) is far above the largest number
    if wanted == "one column":
        matrices[:, 3] += 2 * scale * torch.rand(size)
    else:  # whose scalings would leave the range of float32, if it were not for the safe one
        matrices = scale * torch.randn(size, 1) * torch.randn(1, size)
    matrices.requires_grad_()
    matrix = sinkhorn(matrices, 0.1)
    (gradient,) = torch.autograd.grad((matrix * torch.randn(size, size)).sum(), matrices)
    assert matrix.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(matrix.sum(-2), torch.ones(size), rtol=0, atol=5e-3)  # 30,000 has steps of 0.002
    expected = matrices.detach().double() / 0.1
    expected = torch.logaddexp(expected, torch.tensor(0.001).double().log())
    for _ in range(100):
        expected = expected - expected.logsumexp(-1, keepdim=True)
        expected = expected - expected.logsumexp(-2, keepdim=True)
    torch.testing.assert_close(matrix.detach().double(), expected.exp(), rtol=0, atol=5e-3)


# learned matrices


def ensemble_form(model, networks, x):
    """The thesis' own forward pass: each layer is the mean over the networks of their permuted layers."""
    by_layer, size = model.by_layer(), len(networks)
    hidden = [torch.eye(n).expand(1, n, n) for n in model.layout.sizes]
    matrices = [torch.cat(pair) for pair in zip(hidden, by_layer, strict=True)]
    averaged = model.state()

    def mix(matrix, h):  # of channels
        return torch.einsum("ij,bj...->bi...", matrix, h)

    layers = [[layer for layer in network.modules() if not isinstance(layer, nn.Sequential)] for network in networks]
    names = [name for name, layer in networks[0].named_modules() if not isinstance(layer, nn.Sequential)]
    at, h, inputs = 0, x, None
    for name, *places in zip(names, *layers, strict=True):
        if isinstance(places[0], nn.Linear | nn.Conv2d):
            outputs = []
            for m, layer in enumerate(places):
                own = h
                if inputs is not None:
                    shape = h.shape
                    own = h if h.dim() == 4 else h.reshape(len(h), model.layout.sizes[inputs], -1)
                    own = mix(matrices[inputs][m].T, own).reshape(shape)
                z = layer(own)
                outputs.append(mix(matrices[at][m], z) if at < len(matrices) else z)
            h, inputs, at = sum(outputs) / size, at, at + 1
        elif isinstance(places[0], nn.BatchNorm2d):
            own = [averaged[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
            h = F.batch_norm(h, *own)
        else:
            h = places[0](h)
    return h


@every_network
@pytest.mark.parametrize("kind", ["doubly_stochastic", "free"])
def test_the_exported_network_computes_the_mean_of_permuted_layers(name, kind):
    networks, x = make(name, 3)
    model = learned(networks, matrices=kind)
    with torch.no_grad():
        expected = ensemble_form(model, networks, x)
        exported = model.export().eval()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(x), exported(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert type(exported) is type(networks[0]) and repr(exported) == repr(networks[0])
    assert [p.shape for p in exported.parameters()] == [p.shape for p in networks[0].parameters()]


@every_network
def test_it_starts_as_the_average_where_its_matrices_are_the_identity(name):
    networks, x = make(name, 3)
    free = AveragedNetwork(networks, matrices="free").eval()
    cold = AveragedNetwork(networks, temperature=0.02).eval()
    with torch.no_grad():
        expected = average(networks)(x)
        torch.testing.assert_close(free(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cold(x), expected, rtol=1e-3, atol=1e-3)


def test_only_matrices_are_parameters_and_all_of_them_learn():
    networks, x = make("vgg", 3)
    model = AveragedNetwork(networks)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "matrices.6": (1, 2, 6, 6),
        "matrices.8": (2, 2, 8, 8),
        "matrices.12": (1, 2, 12, 12),
    }
    before = [digest(network.state_dict()) for network in networks]
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(x), torch.arange(6) % 5)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum((-1, -2)).min() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert before == [digest(network.state_dict()) for network in networks]


def test_in_evaluation_the_average_is_made_once_and_anew_when_something_changes(monkeypatch):
    networks, x = make("cnn", 2)
    model, calls = learned(networks), []
    averaged = model.averaged
    monkeypatch.setattr(model, "averaged", lambda: calls.append(1) or averaged())
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first) and len(calls) == 1
        model.matrices["32"][0, 0, 0] += 1
        second = model(x)
        assert not torch.equal(second, first) and len(calls) == 2
        model.load_state_dict(learned(make("cnn", 2, seed=1)[0]).state_dict())
        assert not torch.equal(model(x), second) and len(calls) == 3
        model.double()
        torch.testing.assert_close(model(x.double()), model.export().eval()(x.double()))


def test_changes_that_no_version_counts_are_seen():
    networks, x = make("cnn", 2)
    model = learned(networks)
    with torch.no_grad():
        first = model(x)
        model.matrices["32"].data += torch.randn(32, 32)
        second = model(x)
        assert not torch.equal(second, first) and torch.equal(second, model.export()(x))
        model.matrices["64"].data = torch.randn(1, 1, 64, 64)
        assert torch.equal(model(x), model.export()(x))


def test_changes_of_the_networks_weights_alone_are_seen():
    networks, x = make("mlp", 2)
    model, other = (AveragedNetwork(each).eval() for each in (networks, make("mlp", 2, seed=1)[0]))
    with torch.no_grad():
        first = model(x)
        model._apply(lambda t: t if t.requires_grad else [t, t.data.mul_(2)][0])  # moved to where the old ones were
        assert torch.equal(model(x), model.export()(x)) and not torch.equal(model(x), first)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), other(x))


def test_predictions_without_values_need_none():
    model = learned(make("cnn", 2)[0], matrices="free").to("meta")
    with torch.no_grad():
        assert [model(torch.randn(2, 1, 8, 8, device="meta")).shape for _ in range(2)] == [(2, 5)] * 2


def test_it_is_in_training_mode_at_first_and_exports_in_its_own_mode():
    networks, x = make("cnn", 2)
    assert not networks[0].training
    model = AveragedNetwork(networks, matrices="free")
    torch.testing.assert_close(model(x), average(networks).train()(x), rtol=1e-4, atol=1e-4)
    for mode in (True, False):
        exported = model.train(mode).export()
        assert {module.training for module in exported.modules()} == {mode} == {model.training}


@every_network
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_networks_of_other_precision_are_averaged_in_no_less_than_float32(name, dtype):
    networks, x = make(name, 3)
    networks = [network.to(dtype) for network in networks]
    model = learned(networks)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in model.parameters()} == {full} == {m.dtype for m in model.by_layer()}
    loss = model(x.to(dtype))
    assert loss.dtype == dtype
    loss.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    reference = AveragedNetwork([copy.deepcopy(network).to(full) for network in networks])
    reference.matrices.load_state_dict(model.matrices.state_dict())
    exact = reference.averaged()
    for key, tensor in model.averaged().items():
        assert tensor.dtype == dtype and torch.equal(tensor, exact[key].to(dtype))
    assert all(t.dtype == dtype for t in model.export().state_dict().values() if t.is_floating_point())


def test_a_model_that_was_made_less_precise_averages_in_float32_still():
    networks, x = make("mlp", 2)
    model = learned(networks, spread=0.03).half()
    assert {m.dtype for m in model.by_layer()} == {torch.float32}
    torch.testing.assert_close(model.by_layer()[0].sum(1), torch.ones(1, 12), rtol=0, atol=1e-5)
    assert model(x.half()).dtype == torch.float16


def test_what_was_made_in_inference_mode_learns_outside_of_it():
    with torch.inference_mode():
        networks, x = make("cnn", 2)
        model = AveragedNetwork(networks)
        outputs = [model.eval()(x) for _ in range(2)]
    x = x.clone()
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], model(x))
    model.train()(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_layers_of_any_names_keep_their_own_weights():
    def named(first, second):
        torch.manual_seed(0)
        layers = [(first, nn.Linear(4, 4)), ("act", nn.ReLU()), (second, nn.Linear(4, 4))]
        nested = [nn.Sequential(OrderedDict([(k.split(".")[1], v)])) if "." in k else v for k, v in layers]
        return nn.Sequential(OrderedDict(zip([k.split(".")[0] for k, _ in layers], nested, strict=True)))

    x = torch.randn(3, 4)
    for first, second in (("a.b", "a__b"), ("a.b", "a/b"), ("a/b", "a~1b")):
        networks = [named(first, second), named(first, second)]
        model = AveragedNetwork(networks, matrices="free")
        torch.testing.assert_close(model(x), networks[0](x))


def test_statistics_are_gathered_in_training_and_exported():
    networks, x = make("cnn", 2)
    model, plain = AveragedNetwork(networks, matrices="free"), average(networks).train()
    for _ in range(3):
        model.train()(x)
        plain(x)
    for one, other in zip(model.export().buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_network
def test_states_survive_a_file_and_go_into_other_networks(name, tmp_path):
    networks, x = make(name, 3)
    model = learned(networks)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(model.export().state_dict(), tmp_path / "network.pt")
    other = AveragedNetwork(make(name, 3, seed=1)[0])
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    plain = NETWORKS[name][0]()
    plain.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model(x))
        torch.testing.assert_close(plain.eval()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [{"temperature": 0.2}, {"matrices": "free"}])
def test_a_state_of_another_temperature_or_kind_is_refused(other):
    networks, _ = make("mlp", 2)
    state = AveragedNetwork(networks).state_dict()
    model = AveragedNetwork(networks, **other)
    with pytest.raises(ValueError, match=r"must be of a model of .*, however: .*0\.1.*doubly_stochastic"):
        model.load_state_dict(state)
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        model.load_state_dict(state)


def test_it_moves_to_another_device_whole():
    model = learned(make("cnn", 2)[0], matrices="free")
    assert {tensor.device.type for tensor in model.to("meta").state().values()} == {"meta"}
    assert model(torch.randn(2, 1, 8, 8, device="meta")).shape == (2, 5)


def test_a_copy_learns_on_its_own():
    networks, x = make("mlp", 2)
    model = learned(networks)
    with torch.no_grad():
        other = copy.deepcopy(model)
        assert torch.equal(other(x), model(x))
        other.matrices["12"] += torch.randn(12, 12)
        assert not torch.equal(other(x), model(x))


def test_weights_are_averaged_in_full_precision_under_autocast():
    model = learned(make("cnn", 2)[0])
    with torch.autocast("cpu", torch.bfloat16):
        state = model.averaged()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.averaged().items())


def test_a_projection_is_a_permutation_for_each_layer_and_the_nearest():
    networks, _ = make("vgg", 3)
    model = learned(networks, spread=1.0)
    for m, own in enumerate(model.project()):
        for layer, (one, size) in enumerate(zip(own, model.layout.sizes, strict=True)):
            assert torch.equal(one.sort()[0], torch.arange(size))
            if m:
                matrix = model.by_layer()[layer][m - 1]
                chosen = matrix[torch.arange(size), one].sum()
                assert all(chosen >= matrix[torch.arange(size), torch.randperm(size)].sum() for _ in range(50))


def test_a_matrix_that_is_a_permutation_is_projected_on_it():
    order = torch.randperm(9)
    matrix = torch.zeros(9, 9)
    matrix[torch.arange(9), order] = 1
    assert torch.equal(assignment(matrix), order)
    networks, x = make("mlp", 2)
    model = AveragedNetwork(networks, temperature=0.01)
    order = torch.randperm(12)
    with torch.no_grad():
        model.matrices["12"].zero_()[0, 0, torch.arange(12), order] = 1
        assert torch.equal(model.project()[1][0], order)
        torch.testing.assert_close(model.eval()(x), average(networks, model.project())(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be positive, however: "):
        AveragedNetwork(make("mlp", 2)[0], temperature=temperature)


def test_matrices_are_of_a_known_kind():
    with pytest.raises(ValueError, match="matrices must be 'doubly_stochastic' or 'free', however: 'sinkhorn'"):
        AveragedNetwork(make("mlp", 2)[0], matrices="sinkhorn")


# files


@every_network
def test_weights_of_other_names_are_read_by_order_and_shape(name, tmp_path):
    (network, other), x = make(name, 2)
    state = {f"layer{n}": t for n, (key, t) in enumerate(network.state_dict().items()) if "num_batches" not in key}
    torch.save(state, tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt")
    assert torch.equal(other(x), network(x))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_of_the_networks_names_are_read_by_name_in_whatever_order(prefix, tmp_path):
    for build, shape in ((lambda: mlp(12, [12, 12], 12), (12,)), NETWORKS["cnn"]):
        network, other, x = build(), build(), torch.randn(4, *shape)
        for at, tensor in enumerate(network.buffers()):
            tensor.fill_(at + 1)
        torch.save({prefix + name: t for name, t in reversed(network.state_dict().items())}, tmp_path / "weights.pt")
        load_weights(other, tmp_path / "weights.pt")
        assert torch.equal(other.eval()(x), network.eval()(x))


def test_weights_of_other_names_must_be_in_the_order_of_the_network(tmp_path):
    network, path = cnn(5, 1, 8), tmp_path / "weights.pt"
    before = digest(network.state_dict())
    names = ["0.weight", "0.bias"]
    for layer in ("1", "5"):
        names += [f"{layer}.{key}" for key in ("running_mean", "running_var", "weight", "bias")]
        names += ["4.weight", "4.bias"] if layer == "1" else ["9.weight", "9.bias"]
    torch.save({f"their.{name}": network.state_dict()[name] for name in names}, path)
    with pytest.raises(ValueError, match=r"have other names, however their.1.running_mean is where 1.weight is"):
        load_weights(network, path)
    assert digest(network.state_dict()) == before


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def changed(change):
    return saved({name: change(tensor) for name, tensor in mlp(64, [12], 5).state_dict().items()})


UNREADABLE = r"however it is no file that torch.save wrote, or it is cut short \(\w+\)$"
MODULE = (
    r"however it holds a whole module or object, torch\.nn\.modules\.container\.Sequential; save its state_dict\(\)$"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved(mlp(64, [12], 5).state_dict())[:-200], UNREADABLE),
        (saved(mlp(64, [12], 5).state_dict())[:-60], UNREADABLE),
        (saved(mlp(64, [12], 5).state_dict())[:1000], UNREADABLE),
        (b"", UNREADABLE),
        (b"epoch,accuracy", UNREADABLE),
        (saved(mlp(64, [12], 5)), MODULE),
        (saved(mlp(64, [12], 5), _use_new_zipfile_serialization=False), MODULE),
        (saved([1, 2]), "must be a state_dict, tensors by name, however it holds a list$"),
        (saved({"1.weight": torch.ones(2), "epoch": 3}), "tensors by name, however it holds 'epoch': int$"),
        (saved({"model": {}, "epoch": 3}), "however it holds 'model': dict, 'epoch': int$"),
        (
            saved({"epoch": 3, "optimizer": {"state": {}}, "state_dict": mlp(64, [12], 5).state_dict()}),
            "'state_dict': OrderedDict; take its entry 'state_dict'$",
        ),
        (saved({0: torch.randn(12, 64)}), "tensors by name, however it holds 0: Tensor$"),
        (saved(mlp(64, [13], 5).state_dict()), "however 1.weight is 13 x 64 where 1.weight is 12 x 64"),
        (saved(mlp(64, [12, 5], 5).state_dict()), "they are 6 tensors where it has 4"),
        (saved({"a": torch.randn(12, 64)}), "they are 1 tensors where it has 4"),
        (saved({"a": torch.tensor(3)}), "they are 0 tensors where it has 4"),
        (
            saved({name: t for name, t in mlp(64, [12], 5).state_dict().items() if name != "1.bias"}),
            "however the file has its names but for 1.bias$",
        ),
        (saved({"a": torch.full((12, 64), torch.nan)}), "finite numbers, however a of "),
        (changed(lambda t: (t + 3).double() * 1e300), "finite numbers, however 1.weight of "),  # not in float32
        (changed(Tensor.int), "weights must be floating point, .* 1.weight of .* is torch.int32"),
        (changed(lambda t: t.to(torch.complex64)), "weights must be floating point, .* is torch.complex64"),
        (changed(Tensor.to_sparse), "must be floating point, dense .* is torch.float32, torch.sparse_coo"),
        (changed(lambda t: t.to("meta")), "in the file, .* is torch.float32, torch.strided, meta"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(content, message, tmp_path):
    network, path = mlp(64, [12], 5), tmp_path / "weights.pt"
    before = digest(network.state_dict())
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(network, path)
    assert digest(network.state_dict()) == before
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_file_of_nested_tensors_is_refused(tmp_path):
    torch.save({"a": torch.nested.nested_tensor([torch.ones(2)])}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights must be floating point, dense and in the file, however a of "):
        load_weights(mlp(64, [12], 5), tmp_path / "weights.pt")


def test_a_tensor_that_a_file_holds_twice_is_not_taken_by_name(tmp_path):
    state = mlp(64, [12], 5).state_dict()
    torch.save(state | {f"module.{name}": t + 1 for name, t in state.items()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="they are 8 tensors where it has 4"):
        load_weights(mlp(64, [12], 5), tmp_path / "weights.pt")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path, reason in ((tmp_path / "none.pt", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"however it can't be read: {reason}$"):
            load_weights(mlp(64, [12], 5), path)


@pytest.mark.parametrize(("theirs", "side"), [(True, "file"), (False, "network")])
def test_a_file_with_or_without_batchnorm_is_named_so(theirs, side, tmp_path):
    torch.save(cnn(5, 1, 8, batchnorm=theirs).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"however only the {side} has BatchNorm"):
        load_weights(cnn(5, 1, 8, batchnorm=not theirs), tmp_path / "weights.pt")


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_a_file_runs_no_code(tmp_path, capsys):
    torch.save({"a": Harmful()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="holds a whole module or object, print"):
        load_weights(mlp(64, [12], 5), tmp_path / "weights.pt")
    assert "run" not in capsys.readouterr().out


def test_a_digest_is_of_values_and_shapes():
    state = mlp(8, [4], 3).state_dict()
    same, other = copy.deepcopy(state), copy.deepcopy(state)
    other["1.bias"][0] += 1
    assert digest(state) == digest(same) != digest(other)
    assert digest({"a": torch.zeros(2, 3)}) != digest({"a": torch.zeros(3, 2)})
