import csv
import os
import signal
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import fields, replace

import pytest

from batchens.grid import run_id
from batchens.results import METRICS, damage, differences
from batchens.run import Folders, Run
from scripts.parameter_testing import GRIDS, SIGNED, Config, main

# settings and grids


def test_a_field_that_a_method_has_no_use_for_makes_no_other_run():
    assert Config(method="single", ensemble_size=8, alpha_init=1, regime="split") == Config(method="single")
    assert Config(method="deep_ensemble", gamma_init=-1, batchnorm="member") == Config(method="deep_ensemble")
    assert Config(optimizer="adam", hess_init=1.0) == Config(optimizer="adam")
    assert Config(optimizer="ivon", hess_init=1.0) != Config(optimizer="ivon")
    assert Config(method="single", batchnorm="none") != Config(method="single")


OTHERS = {
    "dataset": "cifar10", "model": "mlp", "batchnorm": "member", "method": "single", "ensemble_size": 3,
    "alpha_init": None, "gamma_init": -0.5, "regime": "split", "optimizer": "sgd", "learning_rate": 0.2,
    "weight_decay": 0, "momentum": 0.8, "hess_init": 0.1, "epochs": 3, "warmup_epochs": 0, "batch_size": 64,
    "augment": False, "precision": "bf16", "seed": 1, "device": "cpu", "threads": 2, "compile": True,
}  # fmt: skip


def test_every_field_changes_the_id_except_those_that_do_not_decide_the_result():
    base = Config(optimizer="ivon")
    assert set(OTHERS) == {field.name for field in fields(Config)}
    same = {name for name, value in OTHERS.items() if run_id(replace(base, **{name: value})) == run_id(base)}
    assert same == {"device", "threads", "compile"}


def test_the_id_of_the_default_run_never_changes():
    assert run_id(Config()) == "digits-cnn-batchensemble-m4-a0.5-g0.5-lr0.1-e15-s0-3eb1841b"


STUDIES = [name for name in GRIDS if name not in ("smoke", "cluster")]


@pytest.mark.parametrize("name", STUDIES)
def test_every_setting_of_a_study_is_run_with_three_seeds(name):
    assert set(Counter(replace(config, seed=0) for config in GRIDS[name]).values()) == {3}


@pytest.mark.parametrize("name", STUDIES)
def test_beside_every_batchensemble_stand_what_it_must_be_compared_with(name):
    for config in GRIDS[name]:
        if config.method == "batchensemble":
            single = replace(config, method="single")
            assert single in GRIDS[name]
            if config.ensemble_size > 1:
                assert replace(single, epochs=config.epochs * config.ensemble_size) in GRIDS[name]
                assert replace(config, method="deep_ensemble") in GRIDS[name]


def test_alpha_gamma_is_9_by_9_by_3_seeds_and_9_references():
    cells = [c for c in GRIDS["alpha_gamma"] if c.method == "batchensemble"]
    assert {(c.alpha_init, c.gamma_init, c.seed) for c in cells} == {
        (alpha, gamma, seed) for alpha in SIGNED for gamma in SIGNED for seed in range(3)
    }
    assert len(SIGNED) == 9 and len(cells) == 243
    assert len(GRIDS["alpha_gamma"]) == 243 + 9
    assert {(c.dataset, c.model, c.ensemble_size) for c in cells} == {("cifar10", "vgg11", 4)}


# what is built


class Built(Exception):
    pass


@pytest.fixture
def built(monkeypatch):
    """What `main` hands to `fit` for a configuration."""
    from batchens import image_runs

    def run(**settings):
        def fit(model, images, optimizer, **options):
            raise Built(model, optimizer, options)

        monkeypatch.setattr(image_runs, "fit", fit)
        with pytest.raises(Built) as caught:
            main(Config(threads=1, **settings), Folders())
        return caught.value.args

    return run


def test_single_network_slow_weights_and_first_deep_member_of_a_seed_start_from_the_same_point(built):
    import torch

    single, _, _ = built(method="single", seed=3)
    ensemble, _, _ = built(seed=3)
    deep, _, _ = built(method="deep_ensemble", seed=3)
    other, _, _ = built(method="single", seed=4)
    for name in ("0.weight", "4.weight", "9.weight"):
        weight = single.get_parameter(name)
        assert torch.equal(weight, ensemble.get_parameter(name))
        assert torch.equal(weight, deep.networks[0].get_parameter(name))
        for network in (*deep.networks[1:], other):
            assert not torch.equal(weight, network.get_parameter(name))


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "AdamW"), ("ivon", "IVON")])
def test_the_optimizer_that_trains_is_the_one_in_the_configuration(name, kind, built):
    _, optimizer, _ = built(optimizer=name, learning_rate=0.07, weight_decay=0.003, momentum=0.6)
    assert type(optimizer).__name__ == kind
    assert {group["lr"] for group in optimizer.param_groups} == {0.07}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.003, 0}


def test_settings_reach_the_training(built):
    settings = {"ensemble_size": 2, "regime": "split", "epochs": 7, "warmup_epochs": 2.0, "batch_size": 50, "seed": 9}
    *_, options = built(**settings, augment=False, precision="bf16", batchnorm="none", alpha_init=-0.3, gamma_init=None)
    expected = settings | {"augmented": False, "precision": "bf16", "compiled": False}
    assert {name: options[name] for name in expected} == expected
    model, *_ = built(batchnorm="member", alpha_init=-0.3, gamma_init=None, ensemble_size=2)
    assert (model[0].alpha_init, model[0].gamma_init, model[0].ensemble_size) == (-0.3, None, 2)
    assert model[1].statistics == "member"
    assert "BatchNorm" not in repr(built(batchnorm="none")[0])


# the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimiser", "sgd"], "--optimizer"),
        (["--optimizer", "lion"], "lion"),
        (["--epochs", "many"], "many"),
        (["--epochs", "0"], "epochs must be at least 1, however: 0"),
        (["--alpha-init", "1.5"], "alpha_init must be negative, between 0 and 1, or None, however: 1.5"),
        (["--gamma-init", "nan"], "gamma_init must be negative, between 0 and 1, or None, however: nan"),
        (["--momentum", "2"], "momentum must be at least 0 and below 1, however: 2.0"),
        (["--learning-rate", "inf"], "learning_rate must be positive and finite, however: inf"),
        (["--learning-rate", "-1"], "learning_rate must be positive and finite, however: -1.0"),
        (["--model", "vgg11"], "vgg11 takes images of 28x28 or 32x32, however digits has smaller ones"),
        (["--regime", "split", "--batch-size", "10"], "batch_size=10, ensemble_size=4"),
        (["--batch-size", "2000"], "batch_size must be at most the number of training images, however: 2000 > 1257"),
        (["--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_what_is_not_possible_is_said_and_nothing_is_trained(arguments, message, refused):
    assert message in refused(*arguments)


def test_a_data_set_that_cannot_be_had_is_said_and_nothing_is_trained(refused, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    said = refused("--dataset", "cifar10", "--data", tmp_path / "none")
    assert "cifar10 must be in" in said and "batchens.data.images cifar10" in said


def test_a_loss_that_is_not_a_number_fails_without_a_result_and_says_why(command, tmp_path):
    code, said = command("--model", "mlp", "--learning-rate", "1e20", "--epochs", "2")
    assert code == 1 and said.startswith(
        "error: the loss must stay a finite number, however it did not in epoch 1 of 2"
    )
    assert not list(tmp_path.rglob("*.csv"))
    (reason,) = tmp_path.rglob("failure.txt")
    assert reason.read_text().startswith(
        "Diverged: the loss must stay a finite number, however it did not in epoch 1 of 2"
    )
    assert [path.name for path in reason.parent.iterdir()] == ["failure.txt"]


SMALL = ("--optimizer", "ivon", "--ensemble-size", "2", "--epochs", "4", "--threads", "1")


def rows_of(folder):
    (path,) = folder.rglob("*.csv")
    assert damage(path) is None
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_killed_then_stopped_then_gone_on_with_ends_as_one_that_was_not(paused, command, tmp_path):
    run = Run("parameter_testing", Config(optimizer="ivon", ensemble_size=2, epochs=4), Folders())
    killed = paused(*SMALL)
    code, said = command(*SMALL)
    assert code == 2 and f"held by process {killed.pid}" in said
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert run.claim.exists() and run.checkpoint.exists() and not run.result.exists()

    stopped = paused(*SMALL, after=2)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate()
    assert stopped.returncode == 130 and "the same command goes on" in said
    assert not run.claim.exists() and run.checkpoint.exists() and not run.result.exists()

    assert command(*SMALL)[0] == 0
    resumed = rows_of(tmp_path / "results")
    assert list(run.folder.iterdir()) == []
    command(*SMALL, "--runs", tmp_path / "other", "--results", tmp_path / "uninterrupted")
    uninterrupted = rows_of(tmp_path / "uninterrupted")
    names = ("epoch", "split", "member", *METRICS)
    assert [[row[name] for name in names] for row in resumed] == [
        [row[name] for name in names] for row in uninterrupted
    ]
    assert set(differences(resumed, uninterrupted).values()) == {0.0}
    assert command(*SMALL) == (0, "")  # done before
    assert rows_of(tmp_path / "results") == resumed


@pytest.mark.parametrize("method", ["single", "deep_ensemble"])
def test_a_run_learns_digits_and_its_result_says_what_it_was(method, command, tmp_path):
    settings = ("--method", method, "--ensemble-size", "2", "--epochs", "3", "--threads", "1", "--batchnorm", "none")
    assert command(*settings) == (0, "")
    rows = rows_of(tmp_path / "results")
    test = [row for row in rows if row["split"] == "test"]
    assert {row["epoch"] for row in test} == {"3"} and all(float(row["accuracy"]) > 0.8 for row in test)
    members = 1 if method == "single" else 2
    convolutions_and_head = (1 * 32 * 9 + 32) + (32 * 64 * 9 + 64) + (256 * 10 + 10)
    for row in rows:
        assert (row["method"], row["ensemble_size"], row["batchnorm"]) == (method, str(members), "none")
        assert int(row["parameters"]) == members * convolutions_and_head
        assert (row["data_source"], row["number_format"]) == ("scikit-learn digits", "float32")
    assert os.listdir(tmp_path / "runs" / "parameter_testing" / rows[0]["run_id"]) == []
