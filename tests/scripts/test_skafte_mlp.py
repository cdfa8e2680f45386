import csv
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from batchens.data.skafte import GENERATORS, load
from batchens.grid import run_id
from batchens.results import REGRESSION_METRICS, damage, differences, read_results
from batchens.run import Folders, Run
from scripts import skafte_mlp
from scripts.skafte_mlp import CURVE, CURVE_POINTS, GRIDS, Config, main

SHORT = Config(epochs=20, hidden_size=8)
TESTS = ("test", "test_gap", "test_outside")


def rows_of(path):
    assert damage(path) is None
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def find(rows, split, member=""):
    (row,) = (row for row in rows if (row["split"], row["member"]) == (split, str(member)))
    return row


def numbers(row, name):
    return np.array(row[name].split(), float)


# settings and grids


def test_a_field_that_a_method_has_no_use_for_makes_no_other_run():
    whole = Config(method="single", regime="repeat")
    assert Config(method="single", regime="repeat", ensemble_size=8, alpha_init=1) == whole
    assert Config(method="single", ensemble_size=10, gamma_init=1) == Config(method="single", ensemble_size=10)
    assert len({whole, Config(method="single"), Config(method="single", ensemble_size=10)}) == 3  # by the share it sees
    assert Config(method="deep_ensemble", gamma_init=-1) == Config(method="deep_ensemble")
    assert Config(variance="constant", mean_first=0.2) == Config(variance="constant")
    assert Config(mean_first=0.2) != Config()


OTHERS = {
    "generator": "john", "method": "single", "ensemble_size": 10, "alpha_init": None, "gamma_init": -0.5,
    "regime": "repeat", "variance": "constant", "mean_first": 0.0, "hidden_size": 20, "train_points": 100,
    "learning_rate": 0.01, "epochs": 300, "seed": 1, "threads": 2,
}  # fmt: skip


def test_every_field_changes_the_id_except_the_number_of_threads():
    assert set(OTHERS) == {field.name for field in fields(Config)}
    same = {name for name, value in OTHERS.items() if run_id(replace(Config(), **{name: value})) == run_id(Config())}
    assert same == {"threads"}


def test_grids_have_every_method_regime_generator_and_variance_at_each_seed():
    base = Config()
    for name, seeds in (("demo", 3), ("full", 20)):
        assert len(GRIDS[name]) == 2 * 2 * (2 + 2 + 2 + 2) * seeds
        longer = [config for config in GRIDS[name] if config.epochs != base.epochs]
        assert {(config.method, config.epochs) for config in longer} == {("single", base.ensemble_size * base.epochs)}
        assert len(longer) == 2 * 2 * 2 * seeds
        assert set(Counter(replace(config, seed=0) for config in GRIDS[name]).values()) == {seeds}
    assert {run_id(config) for config in GRIDS["demo"]} <= {run_id(config) for config in GRIDS["full"]}


def test_what_was_run_before_there_were_longer_and_small_batch_single_networks_has_its_names_still():
    ids = {run_id(config) for config in GRIDS["full"]}
    assert {
        "dtu-single-repeat-predicted-m1-s0-ebdda16d",
        "john-batchensemble-split-constant-m5-a0.5-g0.5-s19-e034099e",
        "dtu-deep_ensemble-repeat-predicted-m5-s7-bacef438",
    } <= ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs must be at least 1, however: 0"),
        (["--learning-rate", "-1"], "learning_rate must be positive, however: -1.0"),
        (["--mean-first", "2"], "mean_first must be between 0 and 1, however: 2.0"),
        (["--alpha-init", "1.5"], "alpha_init must be negative, between 0 and 1, or None, however: 1.5"),
        (["--ensemble-size", "7"], "train_points=50, ensemble_size=7; choose another number, or regime repeat"),
        (["--generator", "sine"], "sine"),
    ],
)
def test_what_is_not_possible_is_said_and_nothing_is_trained(arguments, message, refused):
    assert message in refused(*arguments)


# a run


@pytest.mark.parametrize("variance", ["constant", "predicted"])
@pytest.mark.parametrize(
    ("method", "regime"),
    [
        ("single", "repeat"),
        ("single", "split"),
        ("batchensemble", "split"),
        ("batchensemble", "repeat"),
        ("deep_ensemble", "split"),
    ],
)
def test_a_result_has_every_split_and_member_and_a_second_run_is_equal(method, regime, variance, tmp_path):
    config = replace(SHORT, method=method, regime=regime, variance=variance)
    path = main(config, Folders())
    rows = rows_of(path)
    members = config.ensemble_size if method != "single" else 1
    names = [*map(str, range(members)), ""]
    for split in ("train", "validation", *TESTS):
        assert [row["member"] for row in rows if row["split"] == split] == names
        for member in names:
            row = find(rows, split, member)
            assert all(np.isfinite(float(row[name])) for name in REGRESSION_METRICS[:-1])
            assert (row["spread"] != "") == (member == "" and members > 1)
        if members > 1:  # members differ, also those that see the same points
            assert len({find(rows, split, m)["rmse"] for m in range(members)}) == members
        assert (
            float(find(rows, split)["nll"])
            <= np.mean([float(find(rows, split, m)["nll"]) for m in range(members)]) + 1e-9
        )
    out = 1 if variance == "constant" else 2
    plain = (8 + 8) + (8 * 8 + 8) + (8 * out + out)
    shared = 8 + 64 + 8 * out + 5 * ((1 + 8 + 8) + (8 + 8 + 8) + (8 + out + out))
    counts = {"single": plain, "deep_ensemble": 5 * plain, "batchensemble": shared}
    assert {row["parameters"] for row in rows} == {str(counts[method])}
    assert main(config, Folders()) == path and rows_of(path) == rows  # done before
    again = main(config, Folders(runs=tmp_path / "again", results=tmp_path / "again"))
    assert differences(rows, rows_of(again)) == dict.fromkeys(REGRESSION_METRICS, 0.0)
    assert [find(rows_of(again), "curve")[name] for name in CURVE] == [find(rows, "curve")[name] for name in CURVE]
    assert not list(Run("skafte_mlp", config, Folders()).folder.iterdir())


@pytest.mark.parametrize("regime", ["repeat", "split"])
def test_a_single_network_sees_in_each_step_what_the_first_network_of_a_deep_ensemble_sees(regime):
    single, deep = (
        rows_of(main(replace(SHORT, method=m, regime=regime), Folders())) for m in ("single", "deep_ensemble")
    )
    for split in TESTS:
        for name in ("rmse", "nll"):
            first, second = (float(find(deep, split, member)[name]) for member in (0, 1))
            assert float(find(single, split)[name]) == pytest.approx(first, rel=1e-3)
            assert first != pytest.approx(second, rel=1e-3)


def test_what_is_measured_of_the_truth_is_what_the_generator_says():
    rows = rows_of(main(SHORT, Folders()))
    data = load("dtu", 50, skafte_mlp.EVALUATION_POINTS, 0)
    for split in TESTS:
        x, y = getattr(data, split)
        sd = GENERATORS["dtu"].noise_sd(x)
        residual = y - x * np.sin(x)
        nll = (0.5 * np.log(2 * np.pi) + np.log(sd) + residual**2 / (2 * sd**2)).mean()
        assert float(find(rows, split)["rmse_of_truth"]) == pytest.approx((residual**2).mean() ** 0.5)
        assert float(find(rows, split)["nll_of_truth"]) == pytest.approx(nll)


def test_seed_0_stores_its_predictions_and_no_other_does():
    path = main(replace(SHORT, variance="constant"), Folders())
    rows = rows_of(path)
    assert path.stat().st_size < 50_000
    curve, truth, points = (find(rows, split) for split in ("curve", "truth", "points"))
    x = numbers(curve, "x")
    assert len(x) == CURVE_POINTS and (x[0], x[-1]) == (2.5, 12.5)
    assert numbers(truth, "mean") == pytest.approx(x * np.sin(x), abs=1e-3)
    assert numbers(truth, "sd") == pytest.approx(0.1 + 0.5 * x, abs=1e-3)
    assert numbers(points, "x") == pytest.approx(load("dtu", 50, 1, 0).train.x, abs=1e-3)
    assert (numbers(find(rows, "gap"), "x") == [5, 7]).all() and (
        numbers(find(rows, "outside"), "x") == [11, 12.5]
    ).all()
    members = np.array([numbers(find(rows, "curve", m), "mean") for m in range(5)])
    assert numbers(curve, "mean") == pytest.approx(members.mean(0), abs=2e-3)
    assert (numbers(curve, "lower") < numbers(curve, "mean")).all()
    assert (numbers(curve, "mean") < numbers(curve, "upper")).all()
    # a member's constant variance is its mean squared residual on the training points
    for m in range(5):
        (sd,) = set(numbers(find(rows, "curve", m), "sd"))
        assert sd == pytest.approx(float(find(rows, "train", m)["rmse"]), rel=1e-3)
    other = rows_of(main(replace(SHORT, seed=1), Folders()))
    assert {row["split"] for row in other} == {"train", "validation", *TESTS}
    read = read_results(Folders().results, "skafte_mlp")
    assert read["run_id"].nunique() == 2 and read.loc[read["split"] == "test", "rmse"].notna().all()


def test_a_trained_network_is_near_the_truth_inside_and_its_predicted_variance_beats_a_constant_one():
    nll = {}
    for variance in ("constant", "predicted"):
        rows = rows_of(main(Config(generator="john", variance=variance, train_points=200, epochs=400), Folders()))
        test = find(rows, "test")
        nll[variance] = float(test["nll"])
        assert float(test["rmse"]) < 1.15 * float(test["rmse_of_truth"])
    assert nll["predicted"] < nll["constant"] - 0.15
    assert abs(float(test["coverage_90"]) - 0.9) < 0.06  # of the predicted variance


def test_a_loss_that_is_not_finite_fails_without_a_result():
    from batchens.training import Diverged

    config = replace(SHORT, learning_rate=1e30)
    with pytest.raises(Diverged, match="predictions must be finite numbers, however they are not after 20 epochs"):
        main(config, Folders())
    run = Run("skafte_mlp", config, Folders())
    assert not run.result.exists() and run.failure.read_text().startswith("Diverged: ")
