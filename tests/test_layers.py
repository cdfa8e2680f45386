import copy
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from batchens.layers import (
    BatchEnsembleBatchNorm2d,
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    IdenticalMembersWarning,
    batch_ensemble,
    identical_members,
    init_signed_scalar_,
    member_parameters,
    members,
    repeat,
)

SIGNED = st.sampled_from([-0.5, 0.5, None])


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(output, inputs):
    """The gradients of a sum that weighs every output differently."""
    weighted = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()
    return torch.autograd.grad(weighted, inputs, allow_unused=True)


def random_fast_weights(layer):
    with torch.no_grad():
        for parameter in member_parameters(layer):
            parameter.normal_()
    return layer


def rank_one(layer, m):
    """gamma_m alpha_m^T, an absent one being all ones."""
    ones = torch.ones(1, dtype=layer.weight.dtype)
    alpha = ones if layer.alpha is None else layer.alpha[m]
    gamma = ones if layer.gamma is None else layer.gamma[m]
    return torch.outer(gamma, alpha)


def linear_by_member(layer, x):
    return torch.cat(
        [
            F.linear(part, layer.weight * rank_one(layer, m), None if layer.bias is None else layer.bias[m])
            for m, part in enumerate(x.chunk(layer.ensemble_size))
        ]
    )


def conv_by_member(layer, plain, x):
    """The plain layer with each member's weight, written out output by output."""
    per_group = layer.in_channels // layer.groups

    def weight_of(m):
        scale = rank_one(layer, m).expand(layer.out_channels, layer.in_channels)
        group_of = [out * layer.groups // layer.out_channels for out in range(layer.out_channels)]
        rows = [scale[out, group * per_group :][:per_group] for out, group in enumerate(group_of)]
        return layer.weight * torch.stack(rows)[:, :, None, None]

    def convolve(m, part):
        own = {"weight": weight_of(m)} | ({} if layer.bias is None else {"bias": layer.bias[m]})
        return functional_call(plain, own, part)

    return torch.cat([convolve(m, part) for m, part in enumerate(x.chunk(layer.ensemble_size))])


# one layer


@given(
    ensemble_size=st.integers(1, 4),
    batch=st.integers(1, 3),
    between=st.lists(st.integers(1, 3), max_size=2),
    features=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    alpha_init=SIGNED,
    gamma_init=SIGNED,
    bias=st.booleans(),
)
def test_linear_is_a_loop_over_members(ensemble_size, batch, between, features, alpha_init, gamma_init, bias):
    layer = BatchEnsembleLinear(
        *features,
        ensemble_size=ensemble_size,
        alpha_init=alpha_init,
        gamma_init=gamma_init,
        bias=bias,
        dtype=torch.float64,
    )
    random_fast_weights(layer)
    x = torch.randn(ensemble_size * batch, *between, features[0], dtype=torch.float64, requires_grad=True)
    expected = linear_by_member(layer, x)
    inputs = [x, *layer.parameters()]
    close(layer(x), expected)
    for ours, theirs in zip(gradients(layer(x), inputs), gradients(expected, inputs), strict=True):
        close(ours, theirs)


@st.composite
def convolutions(draw):
    groups = draw(st.integers(1, 3))
    padding = draw(st.sampled_from(["same", "valid", 0, 1, (2, 1)]))
    return {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": draw(st.sampled_from([1, 2, 3, (3, 1), (2, 3)])),
        "stride": 1 if padding == "same" else draw(st.sampled_from([1, 2, (1, 2)])),
        "padding": padding,
        "dilation": draw(st.sampled_from([1, 2, (1, 2)])),
        "groups": groups,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        "bias": draw(st.booleans()),
        "dtype": torch.float64,
    }


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(
    arguments=convolutions(),
    ensemble_size=st.integers(1, 3),
    alpha_init=SIGNED,
    gamma_init=SIGNED,
    batch=st.integers(1, 2),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_convolution_is_a_loop_over_members_folded_and_scaled(
    arguments, ensemble_size, alpha_init, gamma_init, batch, memory_format
):
    fast = {"ensemble_size": ensemble_size, "alpha_init": alpha_init, "gamma_init": gamma_init}
    layer = random_fast_weights(BatchEnsembleConv2d(**arguments, **fast)).to(memory_format=memory_format)
    x = torch.randn(ensemble_size * batch, layer.in_channels, 6, 7, dtype=torch.float64)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    inputs = [x, *layer.parameters()]
    expected = conv_by_member(layer, nn.Conv2d(**arguments), x)
    expected_gradients = gradients(expected, inputs)
    for form in (layer, layer.forward_folded, layer.forward_scaled):
        output = form(x)
        close(output, expected)
        for ours, theirs in zip(gradients(output, inputs), expected_gradients, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_folded_and_scaled_agree_to_float32_rounding(memory_format):
    layer = BatchEnsembleConv2d(16, 32, 3, padding=1, ensemble_size=4, alpha_init=-0.5, gamma_init=0.5)
    x = torch.randn(8, 16, 12, 12).contiguous(memory_format=memory_format)
    close(layer.to(memory_format=memory_format).forward_folded(x), layer.forward_scaled(x), 1e-5)


@pytest.mark.parametrize(("batch", "size", "folded"), [(64, 32, True), (2, 4, False)])
def test_folds_where_activations_outweigh_the_members_weights_by_far(batch, size, folded):
    layer = BatchEnsembleConv2d(8, 16, 3, stride=2, ensemble_size=2, alpha_init=0.5, gamma_init=0.5)
    x = torch.zeros(2 * batch, 8, size, size)
    assert layer.folds(x) == folded
    called = []
    layer.forward_folded = lambda x: called.append("folded")
    layer.forward_scaled = lambda x: called.append("scaled")
    layer(x)
    assert called == ["folded" if folded else "scaled"]


@pytest.mark.parametrize("batch", [64, 2])
def test_under_autocast_activations_stay_in_its_number_format(batch):
    conv = BatchEnsembleConv2d(8, 16, 3, ensemble_size=2, alpha_init=0.5, gamma_init=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        for layer, x in ((linear(), torch.ones(2 * batch, 3)), (conv, torch.ones(2 * batch, 8, 12, 12))):
            assert layer(x).dtype == torch.bfloat16


def test_off_the_cpu_a_convolution_always_scales():
    layer = BatchEnsembleConv2d(1, 1, 1, ensemble_size=2, alpha_init=0.5, gamma_init=0.5, device="meta")
    assert not layer.folds(torch.empty(2, 1, 64, 64, device="meta"))


def test_one_member_of_ones_is_the_plain_layer():
    for plain, x in [
        (nn.Linear(5, 3), torch.randn(4, 5)),
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2, padding_mode="reflect"), torch.randn(4, 4, 8, 8)),
    ]:
        layer = batch_ensemble(plain, ensemble_size=1, alpha_init=1, gamma_init=1)
        close(layer(x), plain(x), 1e-6)


def test_slow_weights_are_initialised_as_the_plain_layers():
    options = {"ensemble_size": 3, "alpha_init": 0.5, "gamma_init": 0.5}
    for ours, plain, sizes in [
        (BatchEnsembleLinear, nn.Linear, (5, 3)),
        (BatchEnsembleConv2d, nn.Conv2d, (4, 6, 3)),
    ]:
        torch.manual_seed(1)
        layer = ours(*sizes, **options)
        torch.manual_seed(1)
        assert torch.equal(layer.weight, plain(*sizes, bias=False).weight)
        assert torch.equal(layer.bias, torch.zeros(3, sizes[1]))


# the signed scalar


@pytest.mark.parametrize("value", [-0.1, -0.5, -2.0])
def test_a_negative_init_is_a_normal_around_1_with_that_standard_deviation(value):
    drawn = init_signed_scalar_(torch.empty(4, 50_000), value)
    assert drawn.mean().item() == pytest.approx(1, abs=5 * -value / 200_000**0.5)
    assert drawn.std().item() == pytest.approx(-value, rel=0.01)
    kurtosis = ((drawn - 1) / value).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("value", [0.0, -0.0, 0.2, 0.5, 1.0])
def test_an_init_from_0_to_1_is_the_probability_of_plus_one_else_minus_one(value):
    drawn = init_signed_scalar_(torch.empty(4, 50_000), value)
    assert set(drawn.unique().tolist()) == {1.0, -1.0} - ({1.0} if value == 0 else {-1.0} if value == 1 else set())
    assert (drawn == 1).double().mean().item() == pytest.approx(value, abs=0.006)


def test_no_init_leaves_the_factor_out():
    layer = BatchEnsembleLinear(3, 2, ensemble_size=2, alpha_init=None, gamma_init=None, bias=False)
    assert layer.alpha is None and layer.gamma is None and [name for name, _ in layer.named_parameters()] == ["weight"]


def test_fast_weights_are_drawn_once_for_each_member_and_layer():
    layer = BatchEnsembleLinear(64, 64, ensemble_size=4, alpha_init=0.5, gamma_init=0.5)
    rows = torch.cat([layer.alpha, layer.gamma])
    assert len(rows.unique(dim=0)) == 8


@pytest.mark.parametrize("value", [1.01, math.inf, -math.inf, math.nan])
def test_no_value_out_of_the_scalars_range_is_drawn_from(value):
    with pytest.raises(ValueError, match="init must be None"):
        init_signed_scalar_(torch.empty(2, 3), value)


def linear(**changed):
    return BatchEnsembleLinear(3, 2, **{"ensemble_size": 2, "alpha_init": 0.5, "gamma_init": 0.5} | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha_init": 1.1}, "alpha_init must be None .* however: 1.1"),
        ({"gamma_init": float("nan")}, "gamma_init must be None .* however: nan"),
        ({"gamma_init": float("-inf")}, "gamma_init must be None .* however: -inf"),
        ({"ensemble_size": 0}, "ensemble_size must be at least 1, however: 0"),
    ],
)
def test_an_impossible_setting_is_refused_by_name_and_value(changed, message):
    with pytest.raises(ValueError, match=message):
        linear(**changed)


def test_a_batch_that_does_not_divide_is_refused_with_the_way_out():
    norm = BatchEnsembleBatchNorm2d(3, ensemble_size=3, affine="member")
    conv = BatchEnsembleConv2d(3, 2, 3, ensemble_size=3, alpha_init=0.5, gamma_init=0.5)
    for layer, x in [
        (linear(ensemble_size=3), torch.ones(7, 3)),
        (conv, torch.ones(7, 3, 4, 4)),
        (norm, torch.ones(7, 3, 2, 2)),
    ]:
        with pytest.raises(ValueError, match=r"batch=7, ensemble_size=3; repeat .* batchens\.layers\.repeat"):
            layer(x)
    with pytest.raises(ValueError, match="batch=7, ensemble_size=3"):
        conv.forward_folded(torch.ones(7, 3, 4, 4))


def test_repeat_and_members_are_member_major():
    x = torch.arange(6).view(3, 2)
    assert torch.equal(repeat(x, 2), torch.cat([x, x]))
    assert torch.equal(members(repeat(x, 2), 2), torch.stack([x, x]))


def test_repeat_keeps_channels_last_where_that_is_the_fast_layout():
    x = torch.empty(2, 3, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    assert repeat(x, 2).shape == (4, 3, 4, 4) and repeat(x, 2).is_contiguous(memory_format=torch.channels_last)
    assert repeat(x, 1) is x


# identical members


@pytest.mark.parametrize(
    ("arguments", "identical"),
    [
        ({"alpha_init": 1.0, "gamma_init": 0.0}, True),
        ({"alpha_init": None, "gamma_init": 1.0}, True),
        ({"alpha_init": None, "gamma_init": None}, True),
        ({"alpha_init": 0.5, "gamma_init": 1.0}, False),
        ({"alpha_init": None, "gamma_init": -0.5}, False),
        ({"alpha_init": -0.5, "gamma_init": 0.5}, False),
        ({"alpha_init": 1.0, "gamma_init": 1.0, "ensemble_size": 1}, False),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batchnorm", ["shared", "member"])
def test_warns_of_identical_members_exactly_when_they_are(arguments, identical, bias, batchnorm):
    network = nn.Sequential(nn.Conv2d(3, 16, 3, bias=bias), nn.BatchNorm2d(16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = batch_ensemble(network, **{"ensemble_size": 4} | arguments, batchnorm=batchnorm)
    assert [warning.category for warning in caught] == [IdenticalMembersWarning] * identical
    assert all(warning.filename == __file__ for warning in caught)
    assert identical_members(converted) == identical


def test_warns_of_identical_members_where_nothing_is_a_members_own():
    with pytest.warns(IdenticalMembersWarning):
        batch_ensemble(nn.Linear(3, 2, bias=False), ensemble_size=4, alpha_init=None, gamma_init=None)


def network_on_images():
    """Two convolutions, of which a batch of 3 x 6 folds the first and scales the second."""
    first = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*first, nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


def train_under_repeat(model, ensemble_size, steps=5):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.randn(6, 3, 8, 8), torch.randint(4, (6,))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(repeat(x, ensemble_size)), repeat(y, ensemble_size)).backward()
        optimizer.step()
    return members(model(repeat(x, ensemble_size)), ensemble_size)


@pytest.mark.filterwarnings("ignore::batchens.layers.IdenticalMembersWarning")
@pytest.mark.parametrize("batchnorm", ["shared", "member_affine", "member"])
@pytest.mark.parametrize(
    ("alpha_init", "gamma_init", "identical"), [(1, 0, True), (0.5, 1, False), (None, -0.1, False)]
)
def test_identical_members_stay_identical_under_repeat_and_others_do_not(batchnorm, alpha_init, gamma_init, identical):
    options = {"ensemble_size": 3, "alpha_init": alpha_init, "gamma_init": gamma_init, "batchnorm": batchnorm}
    model = batch_ensemble(network_on_images(), **options)
    outputs = train_under_repeat(model, 3)
    for m in (1, 2):
        assert torch.equal(outputs[0], outputs[m]) == identical
    assert identical_members(model) == identical


# conversion


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3), "norm": nn.BatchNorm2d(8)})])
        self.again = self.blocks[0]["conv"]
        self.tied = nn.Conv2d(8, 8, 3, bias=False)
        self.tied.weight = self.again.weight
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8, 4, bias=False))
        self.none = None


def ensemble_of(module, **changed):
    return batch_ensemble(module, **{"ensemble_size": 2, "alpha_init": 0.5, "gamma_init": -0.5} | changed)


def test_conversion_reaches_every_layer_and_keeps_what_is_tied_tied():
    converted = ensemble_of(Nested(), batchnorm="member")
    assert isinstance(converted, Nested)
    kinds = {name: type(module) for name, module in converted.named_modules()}
    assert kinds["stem"] is kinds["blocks.0.conv"] is kinds["tied"] is BatchEnsembleConv2d
    assert kinds["blocks.0.norm"] is BatchEnsembleBatchNorm2d and kinds["head.1"] is BatchEnsembleLinear
    assert converted.again is converted.blocks[0]["conv"]
    assert converted.tied.weight is converted.again.weight
    assert converted.tied.alpha is not converted.again.alpha


def test_conversion_keeps_slow_values_and_gives_every_member_a_copy_of_the_bias():
    plain = Nested()
    converted = ensemble_of(plain, ensemble_size=3)
    for name in ("stem", "again", "tied", "head.1"):
        before, after = plain.get_submodule(name), converted.get_submodule(name)
        assert torch.equal(before.weight, after.weight)
        assert (after.bias is None) == (before.bias is None)
        if before.bias is not None:
            assert torch.equal(after.bias, before.bias.expand(3, -1))


def test_conversion_does_not_touch_the_original():
    plain = Nested()
    before = copy.deepcopy(plain.state_dict())
    converted = ensemble_of(plain, batchnorm="member")
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.fill_(7)
    assert [type(module) for module in plain.modules()] == [type(module) for module in Nested().modules()]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.filterwarnings("ignore::batchens.layers.IdenticalMembersWarning")
@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(3)])
def test_a_module_that_is_itself_a_layer_is_converted(layer):
    assert type(ensemble_of(layer, batchnorm="member")).__name__ == f"BatchEnsemble{type(layer).__name__}"


def test_attention_and_subclasses_are_left_intact():
    attention = nn.MultiheadAttention(8, 2)
    converted = ensemble_of(nn.Sequential(attention, nn.Linear(8, 8)))[0]
    x = torch.randn(5, 2, 8)
    assert torch.equal(converted(x, x, x)[0], attention(x, x, x)[0])


def test_mode_dtype_and_device_are_kept():
    plain = nn.Sequential(nn.Linear(3, 2), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).double()
    plain[0].eval()
    plain[2].eval()
    converted = ensemble_of(plain, batchnorm="member")
    assert [layer.training for layer in converted] == [False, True, False]
    assert {value.dtype for value in converted.state_dict().values()} == {torch.float64, torch.int64}
    if torch.cuda.is_available():
        converted = ensemble_of(plain.cuda(), batchnorm="member")
        assert {value.device.type for value in converted.state_dict().values()} == {"cuda"}


def test_every_option_of_a_convolution_is_kept():
    plain = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, padding_mode="circular")
    converted = random_fast_weights(ensemble_of(plain, ensemble_size=3))
    x = torch.randn(6, 4, 9, 9)
    close(converted(x), conv_by_member(converted, plain, x), 1e-5)


@pytest.mark.filterwarnings("ignore::batchens.layers.IdenticalMembersWarning")
def test_batchnorm_becomes_what_was_asked_for_and_starts_where_it_was():
    plain = nn.BatchNorm2d(3, eps=1e-3, momentum=0.3)
    plain(torch.randn(5, 3, 2, 2))
    nn.init.normal_(plain.weight)
    x = torch.randn(4, 3, 2, 2)
    kept = {}
    for kind, statistics in [("member_affine", "shared"), ("member", "member")]:
        kept[kind] = ensemble_of(plain, batchnorm=kind)
        assert (kept[kind].statistics, kept[kind].affine_of) == (statistics, "member")
    kept["shared"] = ensemble_of(plain, batchnorm="shared")
    assert type(kept["shared"]) is nn.BatchNorm2d
    for converted in kept.values():
        assert (converted.eps, converted.momentum, converted.num_batches_tracked) == (1e-3, 0.3, 1)
        close(converted.eval()(x), plain.eval()(x), 1e-6)
    with pytest.raises(ValueError, match='"shared", "member_affine" or "member", however: \'none\''):
        ensemble_of(plain, batchnorm="none")


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_a_batchnorm_that_has_no_member_form_is_refused_or_left(options):
    plain = nn.BatchNorm2d(3, **options)
    with pytest.raises(ValueError, match='batchnorm="shared" leaves it as it is'):
        ensemble_of(plain, batchnorm="member")
    assert type(ensemble_of(plain, batchnorm="shared")) is nn.BatchNorm2d


# batch normalisation


def moved(x, norm):
    """A few batches through `norm`, so that running statistics count."""
    for shift in (0, 1):
        norm(x + shift)
    return norm


@pytest.mark.parametrize("affine", ["shared", "member"])
def test_member_statistics_are_a_batchnorm_for_each_member(affine):
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64) * torch.arange(1, 7).view(6, 1, 1, 1)
    norm = BatchEnsembleBatchNorm2d(4, ensemble_size=3, statistics="member", affine=affine, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    separate = [nn.BatchNorm2d(4, dtype=torch.float64) for _ in range(3)]
    for m, one in enumerate(separate):
        one.weight.data.copy_(norm.weight if affine == "shared" else norm.weight[m])
        one.bias.data.copy_(norm.bias if affine == "shared" else norm.bias[m])
        moved(x.chunk(3)[m], one)
    moved(x, norm)

    def together(x):
        return torch.cat([one(part) for one, part in zip(separate, x.chunk(3), strict=True)])

    x.requires_grad_()
    ours, theirs = norm(x), together(x)
    close(ours, theirs)
    close(gradients(ours, [x]), gradients(theirs, [x]))
    for name in ("weight", "bias"):
        of_each = torch.stack(gradients(together(x), [getattr(one, name) for one in separate]))
        close(gradients(norm(x), [getattr(norm, name)])[0], of_each.sum(0) if affine == "shared" else of_each)
    for name in ("running_mean", "running_var"):
        close(getattr(norm, name), torch.stack([getattr(one, name) for one in separate]))
    assert norm.num_batches_tracked == separate[0].num_batches_tracked
    norm.eval()
    for one in separate:
        one.eval()
    close(norm(x), together(x))


def test_shared_statistics_and_affine_are_a_plain_batchnorm():
    x = torch.randn(6, 4, 3, 3)
    plain = nn.BatchNorm2d(4)
    nn.init.normal_(plain.weight)
    norm = BatchEnsembleBatchNorm2d(4, ensemble_size=3)
    norm.load_state_dict(plain.state_dict())
    assert torch.equal(norm(x), plain(x))
    for name, value in plain.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value)
    assert torch.equal(norm.eval()(x), plain.eval()(x))


def test_a_members_affine_is_its_own_scale_and_shift_of_the_shared_normalisation():
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    norm = BatchEnsembleBatchNorm2d(4, ensemble_size=3, affine="member", dtype=torch.float64)
    random_fast_weights(norm)
    plain = nn.BatchNorm2d(4, affine=False, dtype=torch.float64)

    def by_member():
        parts = zip(plain(x).chunk(3), norm.weight, norm.bias, strict=True)
        return torch.cat([part * w.view(-1, 1, 1) + b.view(-1, 1, 1) for part, w, b in parts])

    inputs = [x, norm.weight, norm.bias]
    for _ in ("training", "evaluation"):
        ours, theirs = norm(x), by_member()
        close(ours, theirs)
        close(gradients(ours, inputs), gradients(theirs, inputs))
        close(norm.running_var, plain.running_var)
        norm.eval()
        plain.eval()


@pytest.mark.parametrize("name", ["statistics", "affine"])
def test_an_unknown_kind_of_batchnorm_is_refused(name):
    with pytest.raises(ValueError, match=f'{name} must be "shared" or "member", however: \'own\''):
        BatchEnsembleBatchNorm2d(3, ensemble_size=2, **{name: "own"})


# a whole network


@pytest.mark.parametrize("batchnorm", ["shared", "member_affine", "member"])
def test_in_evaluation_a_members_output_depends_on_no_other_members_parameters_or_rows(batchnorm):
    model = ensemble_of(network_on_images(), ensemble_size=3, batchnorm=batchnorm)
    x = torch.randn(6, 3, 8, 8)
    model(x)
    model.eval()
    before = members(model(x), 3)
    with torch.no_grad():
        for parameter in member_parameters(model):
            parameter[1].normal_(5)
        x[2:4] = 9
    after = members(model(x), 3)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("batchnorm", ["shared", "member_affine", "member"])
def test_state_dict_and_deepcopy_carry_everything(batchnorm):
    model = random_fast_weights(ensemble_of(network_on_images(), batchnorm=batchnorm))
    x = torch.randn(4, 3, 8, 8)
    model(x)
    other = ensemble_of(network_on_images(), batchnorm=batchnorm)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model)):
        assert torch.equal(twin.eval()(x), model.eval()(x))


def test_an_input_of_another_shape_is_an_error_whatever_the_batch():
    fast = dict(ensemble_size=2, alpha_init=-0.5, gamma_init=-0.5)
    for shape in ((6, 1), (3,), (6, 4)):
        with pytest.raises(ValueError, match="in_features=3"):
            BatchEnsembleLinear(3, 4, **fast)(torch.randn(shape))
    for batch in (2, 256):
        with pytest.raises(ValueError, match="in_channels=3"):
            BatchEnsembleConv2d(3, 64, 3, padding=1, **fast)(torch.randn(batch, 1, 32, 32))


def test_resetting_a_layer_draws_its_fast_weights_by_their_inits():
    layer = BatchEnsembleLinear(300, 4, ensemble_size=2, alpha_init=0.5, gamma_init=1.0)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert set(layer.alpha.unique().tolist()) == {-1.0, 1.0} and bool((layer.gamma == 1).all())
    assert bool((layer.bias == 0).all())


def test_the_benchmark_of_layers_can_time_its_matrix_product():
    from benchmarks.layers import matmul_peak

    assert matmul_peak(torch.device("meta"), torch.bfloat16) > 0
