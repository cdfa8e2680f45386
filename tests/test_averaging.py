import copy
import io

import pytest
import torch
from torch import nn
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
from batchens.models.cnn import cnn
from batchens.models.mlp import mlp
from batchens.models.vgg import vgg

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
        (nn.TransformerEncoderLayer(8, 2), "must have a hidden layer"),
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
    ],
)
def test_what_cannot_be_averaged_is_refused(of, networks, message):
    with pytest.raises(ValueError, match=message):
        of(networks)


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


# matching


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


@pytest.mark.parametrize("scale", [3.0, 30.0, 3000.0])
def test_entries_that_would_overflow_do_not(scale):
    # exp(scale / 0.1) is far above the largest number; with a column that every row wants, scalings leave the safe range
    matrices = scale * torch.eye(12).flip(0)
    matrices[:, 3] += 2 * scale * torch.rand(12)
    matrices.requires_grad_()
    matrix = sinkhorn(matrices, 0.1)
    (gradient,) = torch.autograd.grad((matrix * torch.randn(12, 12)).sum(), matrices)
    assert matrix.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(matrix.sum(-2), torch.ones(12), rtol=0, atol=5e-3)  # 30,000 has steps of 0.002
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


# files


@every_network
def test_weights_of_other_names_are_read_by_order_and_shape(name, tmp_path):
    (network, other), x = make(name, 2)
    state = {f"layer{n}": t for n, (key, t) in enumerate(network.state_dict().items()) if "num_batches" not in key}
    torch.save(state, tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt")
    assert torch.equal(other(x), network(x))


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved(mlp(64, [12], 5).state_dict())[:-200], "must be a state_dict that torch.save wrote, however: "),
        (b"", "must be a state_dict that torch.save wrote, however: "),
        (saved([1, 2]), "must be a state_dict, tensors by name, however it holds a list"),
        (saved({"model": {}, "epoch": 3}), "however it holds 'model': dict, 'epoch': int"),
        (saved(mlp(64, [13], 5).state_dict()), "however 1.weight is 13 x 64 where 1.weight is 12 x 64"),
        (saved(mlp(64, [12, 5], 5).state_dict()), "they are 6 tensors where it has 4"),
        (saved({"a": torch.randn(12, 64)}), "they are 1 tensors where it has 4"),
        (saved({"a": torch.full((12, 64), torch.nan)}), "finite numbers, however a of "),
    ],
)
def test_a_file_that_does_not_fit_is_refused(content, message, tmp_path):
    network, path = mlp(64, [12], 5), tmp_path / "weights.pt"
    before = digest(network.state_dict())
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_weights(network, path)
    assert digest(network.state_dict()) == before


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_a_file_runs_no_code(tmp_path, capsys):
    torch.save({"a": Harmful()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="however: UnpicklingError"):
        load_weights(mlp(64, [12], 5), tmp_path / "weights.pt")
    assert "run" not in capsys.readouterr().out


def test_a_digest_is_of_values_and_shapes():
    state = mlp(8, [4], 3).state_dict()
    same, other = copy.deepcopy(state), copy.deepcopy(state)
    other["1.bias"][0] += 1
    assert digest(state) == digest(same) != digest(other)
    assert digest({"a": torch.zeros(2, 3)}) != digest({"a": torch.zeros(3, 2)})
