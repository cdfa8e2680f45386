import copy

import pytest
import torch
from ivon import IVON
from torch import nn

from batchens import optimizers
from batchens.layers import batch_ensemble, repeat
from batchens.models.deep_ensemble import DeepEnsemble
from batchens.optimizers import build, load_state, parameter_groups, sampled, slow_weights, state_of

NAMES = ("sgd", "adam", "ivon")


def plain():
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return nn.Sequential(*layers)


def ensemble():
    return batch_ensemble(plain(), ensemble_size=2, alpha_init=-0.5, gamma_init=-0.5, batchnorm="member_affine")


def deep():
    return DeepEnsemble([plain(), plain()])


MODELS = pytest.mark.parametrize("model", [plain(), ensemble(), deep()], ids=["plain", "batchensemble", "deep"])


def built(name, model, **changed):
    options = {"learning_rate": 0.1, "weight_decay": 0.01, "training_examples": 100}
    return build(name, model, **options | changed)


def loss_on(model, x):
    return lambda: model(repeat(x, 2)).square().mean()


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.AdamW), ("ivon", IVON)])
def test_the_optimizer_is_of_the_type_that_its_name_says(name, kind):
    assert type(built(name, plain())) is kind


def test_the_settings_reach_the_optimizer():
    sgd, adam, ivon = (built(name, plain(), momentum=0.8, hess_init=0.3) for name in NAMES)
    assert all(group["lr"] == 0.1 for optimizer in (sgd, adam, ivon) for group in optimizer.param_groups)
    assert sgd.defaults["momentum"] == 0.8 and sgd.defaults["nesterov"]
    assert adam.defaults["betas"] == (0.8, 0.999)
    assert [ivon.defaults[name] for name in ("beta1", "ess", "hess_init")] == [0.8, 100, 0.3]
    assert not built("sgd", plain(), momentum=0.0).defaults["nesterov"]


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match='"sgd", "adam" or "ivon", however: \'lion\''):
        built("lion", plain())


@MODELS
def test_every_parameter_is_in_one_group_and_only_slow_weights_decay(model):
    slow, others = parameter_groups(model, 0.01)
    assert (slow["weight_decay"], others["weight_decay"]) == (0.01, 0)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [id(p) for p in slow["params"]] == [id(p) for p in weights]
    ids = [id(p) for p in slow["params"] + others["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_a_tied_weight_is_in_one_group_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    (group,) = parameter_groups(model, 0.01)
    assert len(group["params"]) == 1


@MODELS
@pytest.mark.parametrize("name", NAMES)
def test_without_a_gradient_only_slow_weights_shrink(model, name):
    model = copy.deepcopy(model)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    nothing = lambda: sum(p.sum() for p in model.parameters()) * 0.0  # noqa: E731
    optimizers.step(built(name, model), nothing)
    slow = {id(p) for p in slow_weights(model)}
    for p in model.parameters():
        if id(p) in slow:
            steps = 1.9 if name == "sgd" else 1  # Nesterov's first step is 1 + momentum long
            torch.testing.assert_close(p, before[id(p)] * (1 - steps * 0.1 * 0.01), rtol=1e-6, atol=0)
        else:
            assert torch.equal(p, before[id(p)])


# IVON


def test_a_step_is_ivons_own_loop_under_the_same_noise():
    ours = ensemble()
    theirs = copy.deepcopy(ours)
    optimizer = built("ivon", ours)
    slow, others = parameter_groups(theirs, 0.01)
    own = [p for layer in (theirs[0], theirs[4]) for p in (layer.alpha, layer.gamma, layer.bias)]
    own += list(theirs[1].parameters())  # member_affine
    assert {id(p) for p in own} == {id(p) for p in others["params"]}
    by_hand = IVON([slow, others | {"ess": 200}], lr=0.1, ess=100, beta1=0.9, hess_init=0.5)  # two members
    x = torch.randn(4, 1, 4, 4)
    for seed in range(5):
        torch.manual_seed(seed)
        optimizers.step(optimizer, loss_on(ours, x))
        torch.manual_seed(seed)
        by_hand.zero_grad()
        with by_hand.sampled_params(train=True):
            loss_on(theirs, x)().backward()
        by_hand.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_means_are_back_bit_for_bit_after_an_exception(train, error):
    model = ensemble()
    optimizer = built("ivon", model)
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(error):
        with sampled(optimizer, train=train):
            assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            raise error
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_what_members_share_has_the_sample_size_of_the_data_and_what_one_owns_that_of_all_members():
    model = batch_ensemble(plain(), ensemble_size=3, alpha_init=-0.5, gamma_init=None)  # BatchNorm shared
    ess = {id(p): group["ess"] for group in built("ivon", model).param_groups for p in group["params"]}
    owned = {id(p) for layer in (model[0], model[4]) for p in (layer.alpha, layer.bias)}
    assert ess == {id(p): 300 if id(p) in owned else 100 for p in model.parameters()}
    assert {group["ess"] for group in built("ivon", deep()).param_groups} == {100}


def test_the_posterior_of_a_members_own_factor_is_that_of_its_whole_likelihood():
    # two members, alpha_m scaling one input: mean loss (l_1 + l_2) / 2, l_m = 3/2 (alpha_m w - t)^2 of 1000 examples, w = 1
    model = nn.Sequential(nn.Linear(1, 256, bias=False).double())
    nn.init.ones_(model[0].weight)
    model = batch_ensemble(model, ensemble_size=2, alpha_init=None, gamma_init=0.5)
    model[0].weight.requires_grad_(False)
    optimizer = built(
        "ivon", model, learning_rate=0.1, weight_decay=0.0, training_examples=1000, hess_init=1.0, beta2=0.995
    )
    for _ in range(1500):
        optimizers.step(optimizer, lambda: 3 / 2 * (model[0].gamma - 0.0).square().sum() / 2)
    (group,) = (group for group in optimizer.param_groups if group["ess"] == 2000)
    assert (group["ess"] * group["hess"]).mean().item() == pytest.approx(1000 * 3, rel=0.02)


def test_a_parameter_without_a_gradient_has_one_of_zero():
    model, twin = plain(), plain()
    losses = {
        model: lambda: model[0].weight.sum(),
        twin: lambda: sum(0 * p.sum() for p in twin[1:].parameters()) + twin[0].weight.sum(),
    }
    for one, loss_of in losses.items():
        torch.manual_seed(1)
        optimizers.step(built("ivon", one), loss_of)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_beta2_is_the_second_moments():
    assert built("adam", plain(), beta2=0.99).defaults["betas"] == (0.9, 0.99)
    assert built("ivon", plain()).defaults["beta2"] == 0.99999
    assert built("ivon", plain(), beta2=0.99).defaults["beta2"] == 0.99


def test_a_sample_has_the_variance_of_the_posterior():
    weight = nn.Linear(100, 1000, bias=False)
    optimizer = built("ivon", weight, hess_init=0.3, training_examples=50)
    mean = weight.weight.detach().clone()
    with sampled(optimizer):
        noise = weight.weight - mean
    assert noise.var().item() == pytest.approx(1 / (50 * (0.3 + 0.01)), rel=0.02)


def on_a_quadratic(curvature, target, steps, delta=0.1, examples=1000):
    """IVON after `steps` on the loss h/2 (w - target)^2 with the prior delta/2 w^2: 256 problems of one dimension."""
    weight = nn.Linear(256, 1, bias=False).double()
    groups = parameter_groups(weight, delta)
    optimizer = IVON(groups, lr=0.1 / (1 + delta), ess=examples, hess_init=1.0, beta1=0.9, beta2=0.995)
    for _ in range(steps):
        optimizers.step(optimizer, lambda: (curvature / 2 * (weight.weight - target) ** 2).sum())
    return weight.weight.mean().item(), (examples * (optimizer.param_groups[0]["hess"] + delta)).mean().item()


@pytest.mark.parametrize("curvature", [0.2, 1.0, 5.0])
def test_on_a_quadratic_the_variance_becomes_that_of_the_exact_posterior(curvature):
    # around 0, where loss and prior pull the same way; elsewhere it is larger by a term of order 1 - beta2
    mean, precision = on_a_quadratic(curvature, target=0, steps=1500)
    assert 1 / precision == pytest.approx(1 / (1000 * (curvature + 0.1)), rel=0.01)
    assert mean == pytest.approx(0, abs=0.005)


def test_on_a_quadratic_the_mean_becomes_that_of_the_exact_posterior():
    mean, _ = on_a_quadratic(1.0, target=2, steps=300)
    assert mean == pytest.approx(2 / 1.1, rel=0.005)


# saved and restored


@pytest.mark.parametrize("name", NAMES)
def test_steps_after_a_saved_state_equal_uninterrupted_ones(name, tmp_path):
    x = torch.randn(4, 1, 4, 4)
    model = ensemble()
    optimizer = built(name, model, learning_rate=0.01)
    for _ in range(5):
        optimizers.step(optimizer, loss_on(model, x))
    torch.save({"model": model.state_dict(), "optimizer": state_of(optimizer)}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    twin = ensemble()
    twin.load_state_dict(saved["model"])
    restored = built(name, twin, learning_rate=0.01)
    load_state(restored, saved["optimizer"])
    if name == "ivon":
        assert restored.current_step == 5
    for seed in range(3):
        for one, its_optimizer in ((model, optimizer), (twin, restored)):
            torch.manual_seed(seed)
            optimizers.step(its_optimizer, loss_on(one, x))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_was_read_onto_the_cpu_is_put_on_the_device_of_the_parameters(name):
    model = plain()
    optimizer = built(name, model)
    optimizers.step(optimizer, loss_on(model, torch.randn(4, 1, 4, 4)))
    restored = built(name, plain().to("meta"))  # as a GPU would be
    load_state(restored, state_of(optimizer))
    tensors = [value for group in restored.param_groups for value in group.values() if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} <= {"meta"}
