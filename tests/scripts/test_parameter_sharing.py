import csv
from collections import Counter
from dataclasses import fields, replace

import pytest

from batchens.grid import run_id
from batchens.results import METRICS, damage, differences
from batchens.run import Folders, Run
from scripts.parameter_sharing import GRIDS, TIED, Config, build, count

# settings and grids


def test_a_field_that_a_method_has_no_use_for_makes_no_other_run():
    single, deep = Config(method="single"), Config(method="deep_ensemble")
    assert Config(method="single", ensemble_size=8, ties="part", regime="both", batchnorm="member") == single
    assert Config(method="deep_ensemble", intensity="all", ties="scaled", alpha_init=-1) == deep
    assert Config(fraction=0.3, alpha_init=0.1) == Config()
    assert Config(regime="within", ties="scaled", alpha_init=0.3) == Config(regime="within", ties="scaled")
    assert Config(ties="part", fraction=0.3) != Config(ties="part") == replace(Config(), ties="part")
    assert Config(ties="scaled", alpha_init=0.3) != Config(ties="scaled") == replace(Config(), ties="scaled")


def test_where_nothing_is_tied_stand_the_single_network_and_the_deep_ensemble():
    assert Config(regime="within", intensity="none") == Config(method="single")
    for regime in ("between", "both"):
        assert Config(regime=regime, intensity="none") == Config(method="deep_ensemble")
    for method, regime, members in (("single", "within", 1), ("deep_ensemble", "between", 4)):
        config = Config(method=method)
        assert (config.regime, config.intensity, config.ensemble_size) == (regime, "none", members)


BASE = Config(model="cnn", ties="scaled")
OTHERS = {
    "dataset": "fashion_mnist", "model": "mlp", "batchnorm": "member", "method": "single", "regime": "both",
    "intensity": "early", "ties": "whole", "fraction": 0.3, "ensemble_size": 3, "alpha_init": None, "gamma_init": -0.5,
    "optimizer": "adam", "learning_rate": 0.2, "weight_decay": 0, "momentum": 0.8, "epochs": 3, "warmup_epochs": 0,
    "batch_size": 64, "augment": False, "precision": "bf16", "seed": 1, "device": "cpu", "threads": 2, "compile": True,
}  # fmt: skip


def test_every_field_changes_the_id_except_those_that_do_not_decide_the_result():
    assert set(OTHERS) == {field.name for field in fields(Config)}
    same = {name for name, value in OTHERS.items() if run_id(replace(BASE, **{name: value})) == run_id(BASE)}
    assert same == {"device", "threads", "compile", "fraction"}
    assert run_id(Config(ties="part", fraction=0.3)) != run_id(Config(ties="part"))


def test_the_id_of_the_default_run_never_changes():
    assert run_id(Config()) == "digits-mlp-sharing-between-all-whole-m4-e15-s0-09bce103"


STUDIES = [name for name in GRIDS if name != "smoke"]


@pytest.mark.parametrize("name", STUDIES)
def test_every_setting_of_a_study_is_run_with_three_seeds(name):
    assert set(Counter(replace(config, seed=0) for config in GRIDS[name]).values()) == {3}


@pytest.mark.parametrize("name", STUDIES)
def test_beside_every_cell_stand_what_it_must_be_compared_with(name):
    present = set(GRIDS[name])
    for cell in present:
        if cell.method == "sharing" and cell.ties == "whole":
            base = replace(cell, regime="between", ensemble_size=4)
            single = replace(base, method="single")
            others = [single, replace(base, method="deep_ensemble"), replace(base, method="batchensemble")]
            others += [replace(single, epochs=4 * cell.epochs)]
            if name not in ("demo", "fashion_mnist") or cell.intensity == "all":
                others += [replace(cell, method="same_size"), replace(cell, ties="scaled"), replace(cell, ties="part")]
            assert set(others) <= present


def test_the_study_is_three_regimes_by_three_intensities_on_two_data_sets_beside_its_references():
    cells = {(c.dataset, c.regime, c.intensity, c.ties, c.seed)
             for c in GRIDS["full"] if c.method == "sharing" and c.model == "vgg11_repeats"}  # fmt: skip
    assert len(cells) == 2 * 3 * 3 * 3 * 3
    assert {c.model for c in GRIDS["between"]} == {"vgg11"}
    for name in ("within", "between", "both"):
        assert {c.epochs for c in GRIDS[name]} == {15, 60}
        assert {c.regime for c in GRIDS[name] if c.method == "sharing"} == {name}
        assert set(GRIDS[name]) <= set(GRIDS["full"])


# what is built


CIFAR = ((3, 32, 32), 10)


@pytest.mark.parametrize(
    ("model", "regime", "intensity", "parameters"),
    [
        ("vgg11", "within", "none", 9_225_610),
        ("vgg11", "between", "none", 73_804_880),
        ("vgg11", "between", "early", 73_275_344),
        ("vgg11", "between", "deep", 9_791_056),
        ("vgg11", "between", "all", 9_261_520),
        ("vgg11_repeats", "within", "none", 9_889_546),
        ("vgg11_repeats", "within", "early", 9_852_618),
        ("vgg11_repeats", "within", "deep", 4_579_850),
        ("vgg11_repeats", "within", "all", 4_542_922),
        ("vgg11_repeats", "both", "all", 4_542_922 + 7 * 5_130),
    ],
)
def test_a_cell_has_the_right_number_of_parameters(model, regime, intensity, parameters):
    import torch

    cell = Config("cifar10", model, "none", regime=regime, intensity=intensity, ensemble_size=8)
    with torch.device("meta"):
        assert count(build(cell, *CIFAR)) == parameters
        # BatchNorm: an affine pair for each use within a network, one for all members of a shared layer
        channels = 2752 + (64 + 64 + 256) * (model == "vgg11_repeats")
        early = 192 if model == "vgg11" else 320
        pairs = {"none": 8 * channels, "early": 8 * channels - 7 * early, "deep": channels + 7 * early, "all": channels}
        own = channels if regime == "within" else pairs[intensity]
        assert count(build(replace(cell, batchnorm="shared"), *CIFAR)) == parameters + 2 * own


def test_a_vgg11_has_nothing_to_tie_early_within_itself(command, tmp_path):
    with pytest.raises(ValueError, match="no two of one shape"):
        build(Config("cifar10", "vgg11", regime="within", intensity="early"), *CIFAR)


DIGITS = ((1, 8, 8), 10)


@pytest.mark.parametrize("regime", ["within", "between", "both"])
@pytest.mark.parametrize("intensity", TIED)
def test_a_plain_network_of_the_same_size_has_the_cells_number_of_parameters(regime, intensity):
    cell = Config(regime=regime, intensity=intensity)
    plain = build(replace(cell, method="same_size"), *DIGITS)
    assert count(plain) == pytest.approx(count(build(cell, *DIGITS)), rel=0.02)
    assert not hasattr(plain, "networks") and replace(cell, method="same_size").members == 1


def test_a_plain_vgg_of_the_same_size_is_within_a_percent():
    cell = Config("cifar10", "vgg11_repeats", regime="within")
    assert count(build(replace(cell, method="same_size"), *CIFAR)) == pytest.approx(
        count(build(cell, *CIFAR)), rel=0.01
    )


def test_all_methods_of_a_seed_start_from_the_same_point_and_members_from_points_of_their_own():
    import torch

    def first(seed=3, member=0, **settings):
        model = build(Config(seed=seed, **settings), *DIGITS)
        return (model.networks[member] if hasattr(model, "networks") else model)[1].weight

    weight = first(method="single")
    for settings in (
        {"method": "deep_ensemble"}, {"method": "batchensemble"}, {"regime": "within"}, {"regime": "both"},
        {"intensity": "early", "member": 2}, {"intensity": "deep"}, {"ties": "scaled"},
    ):  # fmt: skip
        assert torch.equal(weight, first(**settings)), settings
    for settings in (
        {"method": "single", "seed": 4}, {"method": "deep_ensemble", "member": 1}, {"intensity": "deep", "member": 1},
    ):  # fmt: skip
        assert not torch.equal(weight, first(**settings)), settings


# the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--regime", "across"], "across"),
        (["--epochs", "0"], "epochs must be at least 1, however: 0"),
        (["--ensemble-size", "1"], "ensemble_size must be at least 2, however: 1"),
        (["--learning-rate", "-1"], "learning_rate must be positive and finite, however: -1.0"),
        (["--ties", "part", "--fraction", "1"], "fraction must be between 0 and 1 where part is tied, however: 1.0"),
        (["--ties", "part", "--fraction", "0.001"], "0 of 128 would be tied"),
        (
            ["--ties", "scaled", "--gamma-init", "2"],
            "gamma_init must be negative, between 0 and 1, or None, however: 2",
        ),
        (["--model", "vgg11"], "vgg11 takes images of 28x28 or 32x32, however digits has smaller ones"),
        (["--model", "cnn", "--regime", "within"], '"all" must tie at least two layers'),
        (["--model", "cnn", "--method", "same_size"], "same_size must be of a model whose width can be chosen"),
        (["--batch-size", "2000"], "batch_size must be at most the number of training images, however: 2000 > 1257"),
    ],
)
def test_what_is_not_possible_is_said_and_nothing_is_trained(arguments, message, refused):
    assert message in refused(*arguments)


def rows_of(folder):
    (path,) = folder.rglob("*.csv")
    assert damage(path) is None
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ties", ["whole", "scaled", "part"])
def test_a_run_stopped_in_mid_epoch_and_gone_on_with_ends_as_one_that_was_not(ties, stopped, command, tmp_path):
    settings = ("--regime", "both", "--ties", ties, "--ensemble-size", "2", "--epochs", "3", "--threads", "1")
    run = Run("parameter_sharing", Config(regime="both", ties=ties, ensemble_size=2, epochs=3), Folders())
    stopped(*settings)
    assert run.checkpoint.exists() and not run.result.exists()
    assert command(*settings)[0] == 0
    assert list(run.folder.iterdir()) == []
    command(*settings, "--runs", tmp_path / "other", "--results", tmp_path / "uninterrupted")
    resumed, uninterrupted = rows_of(tmp_path / "results"), rows_of(tmp_path / "uninterrupted")
    names = ("epoch", "split", "member", *METRICS)
    assert [[row[name] for name in names] for row in resumed] == [
        [row[name] for name in names] for row in uninterrupted
    ]
    assert set(differences(resumed, uninterrupted).values()) == {0.0}
    assert command(*settings) == (0, "")  # done before


@pytest.mark.parametrize(
    ("settings", "stated", "parameters"),
    [
        ((), ("sharing", "between", "all", "whole", "4", ""), 74_368 + 4 * 1_290),
        (("--regime", "within"), ("sharing", "within", "all", "whole", "1", ""), 75_658 - 2 * 16_512),
        (("--ties", "part"), ("sharing", "between", "all", "part", "4", "0.5"), 74_368 // 2 * 5 + 4 * 1_290),
        (("--method", "batchensemble"), ("batchensemble", "between", "all", "scaled", "4", ""), 83_024),
        (("--method", "single"), ("single", "within", "none", "whole", "1", ""), 75_658),
    ],
)
def test_a_run_learns_digits_and_its_result_says_what_it_was(settings, stated, parameters, command, tmp_path):
    options = ("--epochs", "4", "--threads", "1", "--batch-size", "64", "--learning-rate", "0.05")
    assert command(*settings, *options) == (0, "")
    rows = rows_of(tmp_path / "results")
    test = [row for row in rows if row["split"] == "test"]
    assert {row["epoch"] for row in test} == {"4"} and all(float(row["accuracy"]) > 0.8 for row in test)
    assert len(test) == int(stated[4]) + 1
    columns = ("method", "regime", "intensity", "ties", "ensemble_size", "fraction")
    for row in rows:
        assert tuple(row[name] for name in columns) == stated
        assert int(row["parameters"]) == parameters
