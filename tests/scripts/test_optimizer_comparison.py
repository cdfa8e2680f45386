import csv
from collections import Counter, defaultdict
from dataclasses import fields, replace

import pytest

from batchens.grid import run_id
from batchens.results import damage
from batchens.run import Folders, Run
from scripts import optimizer_comparison
from scripts.optimizer_comparison import GRIDS, USUAL, Config


def test_a_field_that_a_method_or_optimizer_has_no_use_for_makes_no_other_run():
    assert Config(method="single", ensemble_size=8, alpha_init=1) == Config(method="single")
    assert Config(method="deep_ensemble", gamma_init=0.5) == Config(method="deep_ensemble")
    for name in ("sgd", "adam"):
        assert Config(optimizer=name, hess_init=1.0, posterior_samples=3) == Config(optimizer=name)
    assert Config(optimizer="sgd", beta2=0.9) == Config(optimizer="sgd")
    for name in ("adam", "ivon"):
        assert Config(optimizer=name, beta2=0.9) != Config(optimizer=name)


def test_what_is_not_given_is_what_the_optimizer_is_usually_run_with():
    for name, usual in USUAL.items():
        config = Config(optimizer=name)
        assert {field: getattr(config, field) for field in usual} == usual
        assert Config(optimizer=name, learning_rate=0.7).learning_rate == 0.7
        assert all(replace(config, optimizer=name) == config for _ in range(2))


def test_every_field_but_three_decides_the_id():
    base = Config(method="batchensemble", optimizer="ivon")
    others = {
        "dataset": "cifar10", "model": "vgg11", "method": "single", "ensemble_size": 3, "alpha_init": None, "gamma_init": 0.5,
        "optimizer": "adam", "learning_rate": 0.2, "weight_decay": 0, "momentum": 0.8, "beta2": 0.99, "hess_init": 0.1,
        "posterior_samples": 3, "epochs": 3, "warmup_epochs": 0, "batch_size": 64, "augment": False, "precision": "bf16",
        "seed": 1, "device": "cpu", "threads": 2, "compile": True,
    }  # fmt: skip
    assert set(others) == {field.name for field in fields(Config)}
    base = replace(base, dataset="cifar10")
    others["dataset"] = "cifar20"
    same = {name for name, value in others.items() if run_id(replace(base, **{name: value})) == run_id(base)}
    assert same == {"device", "threads", "compile"}


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "smoke"])
def test_optimizers_are_compared_at_equal_terms(name):
    """Each optimizer has as many rates and seeds as the others, for every method, size and budget."""
    rates, seeds = defaultdict(set), Counter()
    for c in GRIDS[name]:
        arm = (c.dataset, c.model, c.method, c.ensemble_size, c.epochs)
        rates[arm, c.optimizer].add(c.learning_rate)
        seeds[replace(c, seed=0)] += 1
    assert {arm for arm, _ in rates} == {arm for arm, optimizer in rates if optimizer == "ivon"}
    assert {len(of_one) for of_one in rates.values()} == {5 if name == "digits" else 4}
    assert min(seeds.values()) == max(seeds.values()) >= 3
    equal = ("batch_size", "augment", "warmup_epochs", "momentum", "precision")
    assert {tuple(getattr(c, field) for field in equal) for c in GRIDS[name]} == {
        tuple(getattr(GRIDS[name][0], field) for field in equal)
    }


def test_no_grid_has_the_neutral_values_of_another_method_or_optimizer():
    for configs in GRIDS.values():
        for c in configs:
            assert (c.method == "batchensemble") == (c.alpha_init == c.gamma_init == -0.5)
            assert (c.optimizer == "ivon") == (c.posterior_samples > 0)
            assert c.beta2 == {"sgd": 0.999, "adam": 0.999, "ivon": 0.9999}[c.optimizer]


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "AdamW"), ("ivon", "IVON")])
def test_the_optimizer_in_the_result_is_the_one_that_stepped(name, kind, command, tmp_path, monkeypatch):
    from batchens import optimizers

    stepped, step = set(), optimizers.step

    def watched(optimizer, *arguments):
        stepped.add(type(optimizer).__name__)
        step(optimizer, *arguments)

    monkeypatch.setattr(optimizers, "step", watched)
    options = ("--method", "batchensemble", "--ensemble-size", "2", "--epochs", "2", "--posterior-samples", "2")
    assert command("--optimizer", name, "--threads", "1", "--learning-rate", "0.01", *options)[0] == 0
    (path,) = (tmp_path / "results").rglob("*.csv")
    assert damage(path) is None
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert stepped == {kind} and {row["optimizer"] for row in rows} == {name}
    splits = {row["split"] for row in rows}
    assert splits - {"validation_posterior", "test_posterior"} == {
        "train",
        "validation",
        "test",
        "reliability",
        "weights",
    }
    assert ("test_posterior" in splits) == (name == "ivon")
    (weights,) = (row for row in rows if row["split"] == "weights")
    x, y = ([float(value) for value in weights[axis].split()] for axis in "xy")
    assert sum(y) * (x[1] - x[0]) == pytest.approx(
        1, abs=0.01
    )  # a density, but for what is beyond 5 standard deviations


def test_networks_start_from_the_same_point_whatever_the_method():
    import torch

    single, ensemble, deep = (
        optimizer_comparison.build(Config(method=method, ensemble_size=2, seed=3), (1, 8, 8), 10)
        for method in ("single", "batchensemble", "deep_ensemble")
    )
    for name in ("0.weight", "4.weight", "9.weight"):
        assert torch.equal(single.get_parameter(name), ensemble.get_parameter(name))
        assert torch.equal(single.get_parameter(name), deep.networks[0].get_parameter(name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "lion"], "lion"),
        (["--optimizer", "ivon", "--posterior-samples", "-1"], "posterior_samples must be at least 0, however: -1"),
        (["--optimizer", "ivon", "--beta2", "1"], "beta2 must be above 0 and below 1, however: 1.0"),
        (["--optimizer", "ivon", "--hess-init", "0"], "hess_init must be above 0, however: 0.0"),
        (["--model", "vgg11"], "vgg11 takes images of 28x28 or 32x32, however digits has smaller ones"),
        (["--learning-rate", "0"], "learning_rate must be positive and finite, however: 0.0"),
        (["--batch-size", "2000"], "batch_size must be at most the number of training images, however: 2000 > 1257"),
    ],
)
def test_what_is_not_possible_is_said_and_nothing_is_trained(arguments, message, refused):
    assert message in refused(*arguments)


def test_a_run_that_is_done_is_not_repeated(command, tmp_path):
    options = ("--epochs", "2", "--threads", "1")
    assert command(*options)[0] == 0
    run = Run("optimizer_comparison", Config(epochs=2), Folders())
    before = run.result.stat().st_mtime_ns
    assert command(*options)[0] == 0
    assert run.result.stat().st_mtime_ns == before
