import copy
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchens import optimizers
from batchens.layers import IdenticalMembersWarning, repeat
from batchens.models.cnn import cnn
from batchens.models.deep_ensemble import DeepEnsemble
from batchens.models.initialisation import kaiming
from batchens.models.mlp import mlp
from batchens.models.vgg import LAYERS, vgg
from batchens.sharing import PartlyTied, SharedEnsemble, Sharing, plan, share
from batchens.training import fit, member_losses, predict

NINE = (64, 64, "P", 128, "P", 256, 256, "P", 512, 512, "P", 512, 512, "P")
TEN = (64, 64, "P", 128, "P", 256, 256, 256, "P", 512, 512, "P", 512, 512, "P")
ELEVEN = (64, 64, 64, "P", 128, "P", 256, 256, 256, "P", 512, 512, "P", 512, 512, "P")
SMALL = (6, 6, 6, "P", 8, 8, 8, "P", "P", "P", "P")  # ties within: two early convolutions of 6, two deep ones of 8
EARLY = 3


def reachable(model, *shape):
    """The number of parameters, each stored in its own place, that a loss of the outputs depends on; and of all there are."""
    model.zero_grad()
    model(torch.randn(*shape)).square().sum().backward()
    reached = {p.data_ptr(): p for module in model.modules() for p in module._parameters.values() if p is not None}
    assert all(p.grad is not None for p in reached.values())
    return sum(p.numel() for p in reached.values()), sum(p.numel() for p in model.parameters())


def small(members=1, batchnorm=True):
    return [vgg(SMALL, 5, 1, 32, batchnorm) for _ in range(members)]


def shared(regime, intensity, norms=True, same_rows=True, **options):
    networks = small(3, norms)
    sharing = plan(networks[0], regime, intensity, early=EARLY, **options)
    return SharedEnsemble(share(networks, sharing), same_rows=same_rows)


@pytest.fixture
def x():
    return torch.randn(4, 1, 32, 32)


# what is tied


@pytest.mark.parametrize(
    ("intensity", "parameters"),
    [("none", 73_804_880), ("early", 73_275_344), ("deep", 9_791_056), ("all", 9_261_520)],
)
def test_eight_vgg11_between_whom_layers_are_shared_have_the_right_number_of_parameters(intensity, parameters):
    with torch.device("meta"):
        networks = [vgg(LAYERS, 10, batchnorm=False) for _ in range(8)]
        model = SharedEnsemble(share(networks, plan(networks[0], "between", intensity, early=2)))
        reached = {parameter for network in model.networks for parameter in network.parameters()}
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reached) == parameters


def test_eight_vgg11_that_share_everything_are_one_network():
    with torch.device("meta"):
        networks = [vgg(LAYERS, 10, batchnorm=False) for _ in range(8)]
        everything = tuple(name for name, layer in networks[0].named_children() if list(layer.parameters()))
        model = SharedEnsemble(share(networks, Sharing(between=everything)))
        assert sum(p.numel() for p in model.parameters()) == 9_225_610


@pytest.mark.parametrize(
    ("convolutions", "intensity", "parameters"),
    [
        (LAYERS, "none", 9_225_610),
        (NINE, "none", 9_262_538),
        (NINE, "deep", 4_542_922),
        (TEN, "none", 9_852_618),
        (TEN, "deep", 4_542_922),
        (ELEVEN, "none", 9_889_546),
        (ELEVEN, "early", 9_852_618),
        (ELEVEN, "deep", 4_579_850),
        (ELEVEN, "all", 4_542_922),
    ],
)
def test_a_vgg_with_tied_layers_has_the_right_number_of_parameters_that_its_outputs_depend_on(
    convolutions, intensity, parameters
):
    network = vgg(convolutions, 10, batchnorm=False)
    early = convolutions.index(256) - 2
    (network,) = share([network], plan(network, "within", intensity, early=early))
    assert reachable(network, 1, 3, 32, 32) == (parameters, parameters)


@pytest.mark.parametrize("convolutions", [LAYERS, NINE, TEN])
def test_early_within_a_network_without_two_early_layers_of_one_shape_is_refused(convolutions):
    network = vgg(convolutions, 10)
    for regime in ("within", "both"):
        for intensity in ("early", "all"):
            with pytest.raises(ValueError, match=r'".*" must tie at least two layers, however .* 0 \(64, 3, 3, 3\)'):
                plan(network, regime, intensity, early=2)


# weights and bias: first 1x6, tied 6x6; 6x8, tied 8x8; head
C1, C6, C68, C8, HEAD = 6 * 9 + 6, 36 * 9 + 6, 48 * 9 + 8, 64 * 9 + 8, 8 * 5 + 5
NETWORK = C1 + 2 * C6 + C68 + 2 * C8 + HEAD


@pytest.mark.parametrize(
    ("regime", "intensity", "options", "parameters"),
    [
        ("between", "none", {}, 3 * NETWORK),
        ("both", "none", {}, 3 * NETWORK),
        ("between", "early", {}, 3 * NETWORK - 2 * (C1 + 2 * C6)),
        ("between", "deep", {}, 3 * NETWORK - 2 * (C68 + 2 * C8)),
        ("between", "all", {}, NETWORK + 2 * HEAD),
        ("both", "early", {}, 3 * NETWORK - 2 * (C1 + 2 * C6) - C6),
        ("both", "deep", {}, 3 * NETWORK - 2 * (C68 + 2 * C8) - C8),
        ("both", "all", {}, NETWORK + 2 * HEAD - C6 - C8),
        ("within", "all", {}, 3 * (NETWORK - C6 - C8)),
        # half of the outputs of each layer
        ("between", "all", {"fraction": 0.5}, NETWORK + 2 * HEAD + (NETWORK - HEAD)),
        ("within", "early", {"fraction": 0.5}, 3 * (NETWORK - C6 // 2)),
        ("both", "early", {"fraction": 0.5}, 3 * NETWORK - 2 * (C1 + 2 * C6) // 2 - C6 // 2),
        # an alpha and gamma for each use of each member, and a bias beyond the one there is
        ("within", "early", {"alpha_init": 1, "gamma_init": 1}, 3 * (NETWORK - C6 + 2 * 12 + 6)),
        ("between", "early", {"alpha_init": -0.5}, 3 * NETWORK - 2 * (C1 + 2 * C6) + 3 * (1 + 6 + 6) + 2 * 3 * 6),
    ],
)  # fmt: skip
def test_the_number_of_parameters_that_outputs_depend_on_is_that_of_the_plan(regime, intensity, options, parameters):
    model = shared(regime, intensity, norms=False, **options)
    assert reachable(model, 6, 1, 32, 32) == (parameters, parameters)


@pytest.mark.parametrize(("batchnorm", "pairs"), [("shared", 1), ("member", 3)])
def test_a_batchnorm_after_a_shared_layer_is_one_or_one_for_each_member(batchnorm, pairs):
    model = shared("between", "early", batchnorm=batchnorm)
    norms = [{id(network[place]) for network in model.networks} for place in (1, 4, 7)]
    assert [len(ids) for ids in norms] == [pairs] * 3
    own = [{id(network[place]) for network in model.networks} for place in (11, 14, 17)]
    assert [len(ids) for ids in own] == [3] * 3  # of layers that are not shared


def test_layers_tied_within_a_network_keep_a_batchnorm_for_each_use():
    (network,) = share(small(), Sharing(within=(("3", "6"),)))
    assert network[3].weight is network[6].weight and network[3].bias is network[6].bias
    assert network[4].weight is not network[7].weight and network[4].running_mean is not network[7].running_mean


@pytest.mark.parametrize("build", [DeepEnsemble, lambda networks: SharedEnsemble(share(networks, Sharing()))])
def test_members_that_share_nothing_have_storages_of_their_own_and_no_member_reaches_another(build):
    model = build(small(3))
    storages = [{p.untyped_storage().data_ptr() for p in network.parameters()} for network in model.networks]
    assert all(not one & other for one, other in combinations(storages, 2))
    model(torch.randn(6, 1, 32, 32)).chunk(3)[1].sum().backward()
    assert [any(p.grad is not None and p.grad.any() for p in net.parameters()) for net in model.networks] == [0, 1, 0]


@pytest.mark.parametrize("regime", ["between", "both"])
@pytest.mark.parametrize("intensity", ["none", "early", "deep", "all"])
@pytest.mark.parametrize("options", [{}, {"alpha_init": 0.5, "gamma_init": -0.5}, {"fraction": 0.5}])
def test_members_give_different_outputs(regime, intensity, options, x):
    model = shared(regime, intensity, **options).eval()
    with torch.no_grad():
        outputs = model(repeat(x, 3)).chunk(3)
    for one, other in combinations(outputs, 2):
        assert (one - other).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("network", [mlp(64, [8] * 4, 5), cnn(5, 1, 8), vgg(LAYERS, 5, 1)])
def test_the_head_is_never_shared(network):
    head = list(network.named_modules())[-1][0]
    names = plan(network, "between", "all", early=1).between
    assert head not in names
    others = {name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)} - {head}
    assert others <= set(names)


def test_layers_deep_in_a_module_tree_are_tied_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})

        def forward(self, x):
            return self.layers["b"](self.layers["a"](x))

    one, other = (nn.Sequential(Block(), nn.ReLU(), Block(), nn.Linear(3, 2)) for _ in range(2))
    sharing = plan(one, "both", "deep", early=2)
    assert sharing == Sharing((("2.layers.a", "2.layers.b"),), ("2.layers.a", "2.layers.b"))
    model = SharedEnsemble(share([one, other], sharing))
    assert one[2].layers["a"].weight is other[2].layers["b"].weight
    assert reachable(model, 4, 3) == (2 * (12 + 12) + 12 + 2 * 8,) * 2


# what is computed


@pytest.mark.parametrize("same_rows", [True, False])
@pytest.mark.parametrize("batchnorm", ["shared", "member"])
@pytest.mark.parametrize(("regime", "intensity"), [("between", "early"), ("between", "deep"), ("both", "all")])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_each_members_output_is_that_of_its_network_alone(regime, intensity, batchnorm, fraction, same_rows, x):
    model = shared(regime, intensity, batchnorm=batchnorm, fraction=fraction, same_rows=same_rows)
    model(torch.randn(12, 1, 32, 32))  # statistics of their own
    model.eval()
    x = repeat(x, 3) if same_rows else torch.randn(12, 1, 32, 32)
    with torch.no_grad():
        expected = torch.cat([network(part) for network, part in zip(model.networks, x.chunk(3), strict=True)])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batchnorm", ["shared", "member", None])
@pytest.mark.parametrize("intensity", ["none", "early", "all"])
@pytest.mark.parametrize("scale", [{}, {"alpha_init": 0.5, "gamma_init": 0.5}])
def test_a_trunk_run_once_gives_the_outputs_gradients_and_statistics_of_one_run_for_each_member(
    intensity, batchnorm, scale, x
):
    norms = {} if batchnorm is None else {"batchnorm": batchnorm}
    networks = [vgg(SMALL, 5, 1, 32, batchnorm is not None) for _ in range(3)]
    share(networks, plan(networks[0], "between", intensity, early=EARLY, **norms, **scale))
    once = SharedEnsemble(networks)
    each = copy.deepcopy(once)
    each.same_rows = False
    x, labels = repeat(x, 3), torch.arange(12) % 5
    outputs = []
    for model in (once, each):
        outputs.append(model(x))
        member_losses(outputs[-1], labels, 3).mean().backward()
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for (name, one), other in zip(once.named_parameters(), each.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-3, atol=2e-4, msg=name)
    for (name, one), other in zip(once.named_buffers(), each.buffers(), strict=True):
        if "running_mean" in name:
            torch.testing.assert_close(one, other, msg=name)
        elif "running_var" in name:  # n / (n - 1) of four rows, or of twelve
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05, msg=name)


def test_a_shared_trunk_sees_the_rows_of_one_member_and_what_follows_an_own_layer_those_of_all():
    rows = []
    model = shared("between", "all", batchnorm="member")
    for place in (0, 3):
        model.networks[0][place].register_forward_hook(lambda layer, inputs, output: rows.append(len(inputs[0])))
    model(torch.randn(12, 1, 32, 32))
    assert rows == [4, 12]  # the members part at the first BatchNorm
    model.same_rows = False
    model(torch.randn(12, 1, 32, 32))
    assert rows == [4, 12, 12, 12]


def test_members_that_share_everything_give_one_output_for_all(x):
    networks = small(3)
    everything = tuple(name for name, layer in networks[0].named_children() if list(layer.parameters()))
    model = SharedEnsemble(share(networks, Sharing(between=everything)))
    assert torch.equal(model(repeat(x, 3)), repeat(model.networks[0](x), 3))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch=5, ensemble_size=3"):
        shared("between", "early")(torch.ones(5, 1, 32, 32))


@pytest.mark.parametrize("scale", [{}, {"alpha_init": 1, "gamma_init": 1}])
def test_a_network_with_tied_layers_computes_what_equal_layers_do(scale, x):
    plain, tied = small()[0], small()[0]
    tied.load_state_dict(plain.state_dict())
    for name in ("6.weight", "6.bias"):
        plain.state_dict()[name].copy_(plain.state_dict()[name.replace("6", "3")])
    share([tied], Sharing(within=(("3", "6"),), **scale))
    torch.testing.assert_close(tied(x), plain(x), rtol=1e-4, atol=1e-5)


def test_each_use_of_a_scaled_layer_has_weights_and_bias_of_its_own_around_one():
    (network,) = share([mlp(4, [4, 4], 2)], Sharing(within=(("1", "3"),), alpha_init=-0.5, gamma_init=-0.5))
    for place in (1, 3):
        nn.init.normal_(network[place].bias)
    x = torch.randn(5, 4)
    y = x
    for place in (1, 3):
        layer = network[place]
        assert layer.weight is network[1].weight
        y = F.relu(F.linear(y, layer.weight * torch.outer(layer.gamma[0], layer.alpha[0]), layer.bias[0]))
    assert not torch.equal(network[1].alpha, network[3].alpha)
    torch.testing.assert_close(network(x), network[5](y))


def test_each_use_of_each_member_has_a_scale_of_its_own(x):
    model = shared("both", "early", norms=False, alpha_init=0.5, gamma_init=0.5)
    first, second = model.networks[0][2], model.networks[0][4]
    assert first.weight is second.weight and first.alpha.shape == second.gamma.shape == (3, 6)
    assert not torch.equal(first.gamma, second.gamma)
    assert model.networks[1][2] is first
    for member in range(3):  # alone, from weights made for it
        own = vgg(SMALL, 5, 1, 32, False)
        for place in range(len(own)):
            layer = model.networks[member][place]
            if hasattr(layer, "alpha"):
                own[place].weight.data = layer.member_weights()[member].detach()
                own[place].bias.data = layer.bias[member].detach()
            elif list(layer.parameters()):
                own[place].load_state_dict(layer.state_dict())
        torch.testing.assert_close(model(repeat(x, 3)).chunk(3)[member], own(x), rtol=1e-4, atol=1e-5)


def test_members_scaled_alike_are_warned_of():
    networks = small(2)
    with pytest.warns(IdenticalMembersWarning):
        share(networks, Sharing(between=("0",), alpha_init=1, gamma_init=1))


@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 7), nn.Linear(5, 7, bias=False), nn.Conv2d(5, 7, 3, stride=2, padding=1)]
)
def test_of_a_layer_tied_in_part_the_first_outputs_are_one_and_the_others_each_uses_own(layer):
    layers = [copy.deepcopy(kaiming(layer)) for _ in range(3)]
    other = nn.init.normal_(layers[1].weight.data)
    one, two, three = share([nn.Sequential(layer) for layer in layers], Sharing(between=("0",), fraction=0.4))
    assert one[0].tied is two[0].tied is three[0].tied and len(one[0].tied.weight) == 3 and len(one[0].own.weight) == 4
    x = torch.randn(2, 5, *[8, 8][: other.ndim - 2])
    apart = copy.deepcopy(layer)
    apart.weight.data = torch.cat([layers[0].weight[:3], other[3:]]).detach()
    if layer.bias is not None:
        apart.bias.data = torch.cat([layers[0].bias[:3], layers[1].bias[3:]]).detach()
    torch.testing.assert_close(two(x), apart(x))
    torch.testing.assert_close(one(x), layers[0](x))
    assert torch.equal(one(x)[:, :3], three(x)[:, :3])


# training


CASES = [
    ("between", "early", {}),
    ("both", "all", {}),
    ("both", "all", {"alpha_init": 0.5, "gamma_init": 0.5}),
    ("both", "deep", {"fraction": 0.5}),
]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "ivon"])
@pytest.mark.parametrize(("regime", "intensity", "options"), CASES)
def test_training_keeps_tied_layers_equal_and_steps_each_parameter_once(regime, intensity, options, optimizer, x):
    model = shared(regime, intensity, **options)
    tied = [(name, p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)]
    stepper = optimizers.build(optimizer, model, learning_rate=0.01, weight_decay=0.1, training_examples=4)
    stepped = [id(p) for group in stepper.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted({id(p) for p in model.parameters()})
    decayed = {id(p) for p in stepper.param_groups[0]["params"]}
    assert decayed == {id(p) for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1}
    before = [p.detach().clone() for p in model.parameters()]
    labels = torch.arange(12) % 5
    optimizers.step(stepper, lambda: member_losses(model(repeat(x, 3)), labels, 3).mean())
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True) if p.ndim > 1)
    for (name, storage), (_, p) in zip(tied, model.named_parameters(remove_duplicate=False), strict=True):
        assert optimizer == "ivon" or p.data_ptr() == storage, name  # it puts new tensors in place
    if regime == "both" and intensity == "all" and not options:
        for network in model.networks:
            assert torch.equal(network[3].weight, model.networks[0][6].weight)


def test_a_tied_weight_learns_from_all_its_uses():
    tied, apart = mlp(4, [4, 4], 2), mlp(4, [4, 4], 2)
    share([tied], Sharing(within=(("1", "3"),)))
    apart.load_state_dict(tied.state_dict())
    x = torch.randn(5, 4)
    for network in (tied, apart):
        network(x).square().sum().backward()
    torch.testing.assert_close(tied[1].weight.grad, apart[1].weight.grad + apart[3].weight.grad)


@pytest.mark.parametrize("copied", [False, True])
def test_what_a_member_owns_learns_from_its_loss_and_what_is_shared_from_the_mean(copied, x):
    model = shared("between", "deep", norms=False)
    model = copy.deepcopy(model) if copied else model
    labels = torch.arange(4)
    member_losses(model(repeat(x, 3)), labels.repeat(3), 3).mean().backward()
    of_mean = 0
    for network in model.networks:
        alone = copy.deepcopy(network)
        alone.zero_grad()
        F.cross_entropy(alone(x), labels).backward()
        for place in (0, 2, 4, -1):
            torch.testing.assert_close(network[place].weight.grad, alone[place].weight.grad, rtol=1e-4, atol=1e-6)
        of_mean += alone[7].weight.grad / 3
    torch.testing.assert_close(model.networks[0][7].weight.grad, of_mean, rtol=1e-4, atol=1e-6)


def test_members_that_share_nothing_train_as_a_deep_ensemble(tiny_images):
    networks = [mlp(64, [8, 8], 4) for _ in range(2)]
    settings = dict(ensemble_size=2, regime="repeat", epochs=2, warmup_epochs=0, batch_size=16, augmented=False, seed=0)
    images, rows = tiny_images(), []
    for model in (DeepEnsemble(copy.deepcopy(networks)), SharedEnsemble(share(networks, Sharing()))):
        optimizer = optimizers.build("sgd", model, learning_rate=0.1, weight_decay=5e-4, training_examples=64)
        rows.append([row["nll"] for row in fit(model, images, optimizer, **settings) if row["split"] != "reliability"])
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


@pytest.mark.parametrize(("regime", "intensity", "options"), CASES)
def test_a_state_dict_saved_and_loaded_gives_the_same_outputs_and_leaves_tied_layers_tied(
    regime, intensity, options, x, tmp_path
):
    model, other = (shared(regime, intensity, **options) for _ in range(2))
    model(repeat(x, 3))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(model.eval()(repeat(x, 3)), other.eval()(repeat(x, 3)))
    parameters = list(other.parameters())
    assert list(other.to(torch.float64, memory_format=torch.channels_last).parameters()) == parameters
    assert len({p.data_ptr() for p in other.parameters()}) == len(parameters)
    assert len({p.data_ptr() for _, p in other.named_parameters(remove_duplicate=False)}) == len(parameters)
    # a tied weight is in the file once
    sizes = sum(p.numel() * p.element_size() for p in model.parameters())
    names = len(model.state_dict())
    assert (tmp_path / "state.pt").stat().st_size < sizes + 700 * names


@pytest.mark.parametrize("regime", ["between", "both"])
def test_an_ensemble_learns_and_its_predictions_are_by_member(regime, tiny_images):
    networks = [mlp(64, [16] * 4, 4) for _ in range(3)]
    model = SharedEnsemble(share(networks, plan(networks[0], regime, "deep", early=2)))
    optimizer = optimizers.build("adam", model, learning_rate=0.01, weight_decay=0, training_examples=64)
    settings = dict(
        ensemble_size=3, regime="repeat", epochs=15, warmup_epochs=0, batch_size=16, augmented=False, seed=0
    )
    images = tiny_images()
    rows = fit(model, images, optimizer, **settings)
    test = {row["member"]: row["accuracy"] for row in rows if row["split"] == "test"}
    assert set(test) == {None, 0, 1, 2} and min(test.values()) > 0.9
    log_probs = predict(model, images, "test", 3)
    x = (images.test.images.float() / 255 - 0.5) / 0.25
    for network, part in zip(networks, log_probs, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(part, network(x).log_softmax(-1), rtol=1e-4, atol=1e-4)


# what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"within": (("3",),)}, "at least two layers"),
        ({"within": (("3", "6"), ("6", "11"))}, "must not overlap"),
        ({"within": (("3", "6"),), "between": ("3",)}, "as a whole or not at all"),
        ({"fraction": 0}, "fraction must be above 0 and at most 1, however: 0"),
        ({"fraction": 0.5, "alpha_init": 1}, "must be of whole layers"),
    ],
)
def test_a_sharing_that_contradicts_itself_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sharing(**settings)


@pytest.mark.parametrize(
    ("sharing", "message"),
    [
        (Sharing(between=("99",)), "there is no '99'"),
        (Sharing(within=(("0", "3"),)), "of one shape, however '3' is Conv2d"),
        (Sharing(within=(("1", "4"),)), "linear or convolutional"),
        (Sharing(between=("3",), fraction=0.01), "0 of 6 would be tied"),
    ],
)
def test_what_cannot_be_tied_is_refused(sharing, message):
    with pytest.raises(ValueError, match=message):
        share(small(2), sharing)


def test_unknown_words_and_networks_of_two_kinds_are_refused():
    network = small()[0]
    for regime, intensity in (("between", "most"), ("across", "early")):
        with pytest.raises(ValueError, match=f"however: '{regime}', '{intensity}'"):
            plan(network, regime, intensity, early=1)
    for networks in ([], [network, nn.Linear(1, 1)], [network, nn.Sequential()]):
        with pytest.raises(ValueError, match=r"must be nn.Sequential of one length"):
            SharedEnsemble(networks)
    assert isinstance(share([network], Sharing(between=("3",), fraction=0.5))[0][3], PartlyTied)
