"""Numbers before pictures: arms and forms kept apart, what validation chooses, seeds paired, n in every caption."""

import dataclasses
import hashlib
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from batchens.grid import run_id
from batchens.results import METRICS, result_path, write_run
from plots import figure
from plots import parameter_averaging as pa
from plots.__main__ import experiments
from plots.image_runs import Setting
from plots.reading import usable_results
from scripts.parameter_averaging import GRIDS, Config

ROOT = Path(__file__).parents[2]
SMALL = Config(method="single", hidden_size=8, epochs=3, batch_size=64)
MINUS = "\N{MINUS SIGN}"
MATCHED = {"start": "matching"}
UPS = (0.0, 0.01, 0.03, 0.02)  # of the seeds
PICTURE = "1 0 0 0.5"


def write(
    folder: Path,
    accuracy: float,
    *,
    validation: float | None = None,
    projected: float | None = None,
    stale: float | None = None,
    speed: float = 100.0,
    plain: float | None = 100.0,
    device: str = "cpu",
    networks: str = "",
    **fields: object,
) -> None:
    """Write a run as the script does: on test this accuracy, an NLL of what is missing to 1; validation alike if not given.

    Without `plain` as it did before a plain network was timed too.
    """
    config = dataclasses.replace(SMALL, **fields)  # type: ignore[arg-type]
    path = result_path(folder, "parameter_averaging", run_id(config))
    head = {"run_id": path.stem, "experiment": "parameter_averaging"}
    head |= {name: value for name, value in dataclasses.asdict(config).items() if name not in Config.INCIDENTAL}
    extra = config.extra_epochs or 0
    facts = {
        "parameters": 100 * (config.ensemble_size if config.method == "deep_ensemble" else 1),
        "parameters_trained": 64 if extra else 0,
        "seconds_base": 0.0 if config.method == "longer" else 10.0 * config.ensemble_size,
        "seconds_matching": 0.5 if config.matching else None, "inference_images_per_second": speed, "device_name": device,
        "number_format": "float32", "torch": "2", "data_source": "here", "commit": "", "dirty": "", "finished": "2026",
        "networks_digest": networks,
    } | ({} if plain is None else {"plain_images_per_second": plain})  # fmt: skip
    rows = []

    def measured(epoch: int, split: str, value: float) -> None:
        scores = {"accuracy": value, "nll": 1 - value, "brier": 0.1, "ece": 0.02}
        rows.extend({"epoch": epoch, "split": split, "member": member, **scores} for member in (0, None))

    known = accuracy if validation is None else validation
    for epoch in range(extra + 1):
        measured(epoch, "validation", known if epoch == extra else 0.5)
        if epoch:
            rows.append({"epoch": epoch, "split": "train", "member": 0, "nll": 1.0, "seconds": 2.0})
    measured(extra, "test", accuracy)
    for suffix, value in (("_projected", projected), ("_stale", stale)):
        if value is not None:
            measured(extra, f"validation{suffix}", value)
            measured(extra, f"test{suffix}", value)
    rows.append({"epoch": extra, "split": "reliability", "x": "0.5 nan 0.9", "y": "0.4 nan 1", "n": "0.2 0 0.8"})
    if config.method in ("permavg", "mixing"):
        for member in range(1, config.ensemble_size):
            error = 0.003 * member if config.method == "permavg" else 7.0
            shape = {"diagonal": 0.1, "row_max": 0.2 * member, "unique_argmax": 0.5, "row_error": error}
            rows.append({"epoch": extra, "split": "matrix", "member": member, "layer": 0, "size": 8, **shape})
        for split in ("picture", "picture_ordered") if config.seed == 0 else ():
            rows.append({"epoch": extra, "split": split, "member": 1, "layer": 0, "size": 2, "y": PICTURE})
    if config.method == "weight_matching" and config.ensemble_size == 2:
        for name, worst in (("line", 0.5), ("matched_line", 0.75)):
            for metric, y, barrier in (
                ("accuracy", f"0.9 {worst} 0.8", 0.85 - worst), ("nll", f"0.1 {1 - worst} 0.2", 0.85 - worst),
            ):  # fmt: skip
                rows.append({"epoch": 0, "split": f"{name}_{metric}", "x": "0 0.5 1", "y": y, "barrier": barrier})
    measures = ("epoch", "split", "member", *METRICS, *"xyn", *pa.MATRIX, "barrier", "seconds", "images_per_second")
    write_run(path, [{**head, **{name: row.get(name) for name in measures}, **facts} for row in rows])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small whole study: four seeds, two and three networks; on validation PermAVG is best from matched networks."""
    tmp_path = tmp_path_factory.mktemp("results")
    for seed, up in enumerate(UPS):
        write(tmp_path, 0.80 + up, method="single", ensemble_size=1, seed=seed)
        for size in (2, 3):
            same = {"ensemble_size": size, "seed": seed}
            write(tmp_path, 0.81 + up, method="single", **same)
            write(tmp_path, 0.88, method="deep_ensemble", speed=25.0, **same)
            write(tmp_path, 0.10 + 2 * up, method="naive_average", **same)
            write(tmp_path, 0.70 + up, method="weight_matching", **same)
            if size > 2:
                write(tmp_path, 0.71 + up, validation=0.6, method="weight_matching", matching="first", **same)
            write(tmp_path, 0.84 + up, method="distillation", **same)
            write(tmp_path, 0.845 + up, method="longer", **same)
            write(tmp_path, 0.82 + up, method="fine_tuned_single", **same)
            write(tmp_path, 0.86 + up, validation=0.85, method="fine_tuned_average", **same)
            write(tmp_path, 0.85 + up, validation=0.86, method="fine_tuned_average", **same, **MATCHED)
            write(tmp_path, 0.84, method="mixing", **same)
            write(tmp_path, 0.86 + up, validation=0.80, projected=0.60 + up, method="permavg", **same)
            write(
                tmp_path, 0.83 + 2 * up, validation=0.82, projected=0.9, method="permavg", speed=50.0, **same, **MATCHED
            )
            write(tmp_path, 0.78 + up, validation=0.79, projected=0.4, method="permavg", temperature=1.0, **same)
    return tmp_path


def read(folder: Path) -> pd.DataFrame:
    return usable_results(folder, "parameter_averaging", pa.CONFIG, pa.METRICS)[0]


def only(folder: Path) -> Setting:
    (setting,) = pa.settings(read(folder))
    return setting


@pytest.fixture(scope="module")
def df(results: Path) -> pd.DataFrame:
    return read(results)


@pytest.fixture(scope="module")
def setting(results: Path) -> Setting:
    return only(results)


@pytest.fixture(scope="module")
def finding(df: pd.DataFrame) -> figure.Finding:
    return pa.findings(df)["digits-mlp"]


def pair_of(setting: Setting, other: str, size: int = 3, thesis: bool = False) -> pa.Comparison:
    (pair,) = (one for one in pa.comparisons(setting, thesis) if (one.other, one.size) == (other, size))
    return pair


def test_a_setting_is_the_whole_configuration_but_what_is_varied() -> None:
    assert set(pa.CONFIG) == {field.name for field in dataclasses.fields(Config)} - set(Config.INCIDENTAL)


def test_every_run_of_every_grid_has_an_arm_of_its_own_name() -> None:
    found = set()
    for configs in GRIDS.values():
        arms = {pa._arm(c.method, c.start or "", c.matching or "", c.temperature or np.nan) for c in configs}
        assert arms <= set(pa.ARMS)
        found |= arms
    assert found == set(pa.ARMS)


def test_the_thesis_form_is_its_start_and_temperature_at_the_rate_that_validation_chose(tmp_path: Path) -> None:
    for accuracy, fields in (
        (0.5, {}), (0.6, {"extra_learning_rate": 0.3}), (0.7, MATCHED), (0.8, {"temperature": 0.1, "extra_learning_rate": 0.1}),
    ):  # fmt: skip
        for seed in range(3):
            write(tmp_path, accuracy, method="permavg", seed=seed, **{"temperature": 1.0, **fields})
    for seed in range(3):
        write(tmp_path, 0.9, method="distillation", seed=seed)
    setting = only(tmp_path)
    runs = pair_of(setting, "distillation", thesis=True).ours
    assert runs["test_accuracy"].tolist() == pytest.approx([60] * 3) and set(runs["candidates"]) == {2}
    assert set(setting.runs["label"]) == {
        "PermAVG T = 1 (thesis), extra learning rate 0.1", "PermAVG T = 1 (thesis), extra learning rate 0.3",
        "PermAVG T = 1 from matched", "PermAVG T = 0.1", "distillation",
    }  # fmt: skip
    labels = [cell.label for cell in pa.cells(setting, 3)]
    assert labels.count("PermAVG T = 1 (thesis)") == 1
    ours = pair_of(setting, "distillation").ours
    assert ours["label"].iloc[0] == "PermAVG T = 0.1" and set(ours["candidates"]) == {4}
    told = pa.findings(read(tmp_path))["digits-mlp"].sentences
    assert any("of PermAVG it is PermAVG T = 0.1, best of 4." in line for line in told)
    assert (
        "At the edge of the rates that were tried, so that the best may lie outside: PermAVG T = 1 (thesis) at 0.3, the "
        "largest of 2." in told
    )


def test_a_chosen_rate_at_the_edge_is_said_and_where_nothing_was_chosen(tmp_path: Path) -> None:
    def rates(size: int, **fields: object) -> None:
        for validation, rate in ((0.7, 0.1), (0.9, 0.2), (0.8, 0.3)):
            write(tmp_path, 0.8, validation=validation, extra_learning_rate=rate, ensemble_size=size, **fields)

    rates(3, method="fine_tuned_average")  # the best is inside
    for size in (3, 4):
        write(tmp_path, 0.8, method="fine_tuned_single", ensemble_size=size, extra_learning_rate=0.02)
    for rate, validation in ((0.02, 0.9), (0.1, 0.8)):
        write(tmp_path, 0.8, validation=validation, method="permavg", extra_learning_rate=rate)
    rates(3, method="mixing", **MATCHED)
    write(tmp_path, 0.8, validation=0.95, method="mixing", extra_learning_rate=0.4, ensemble_size=3, **MATCHED)
    rates(4, method="distillation")  # of another number of networks than the main one
    told = pa.findings(read(tmp_path))["digits-mlp"].sentences
    (edge,) = (line for line in told if line.startswith("At the edge of the rates that were tried"))
    assert edge == (
        "At the edge of the rates that were tried, so that the best may lie outside: PermAVG T = 0.1 at 0.02, the smallest of "
        "2; free mixing from matched at 0.4, the largest of 4."
    )
    assert "Nothing was chosen where one rate alone was tried: fine-tuned best single at 0.02." in told
    labels = set(only(tmp_path).runs["label"])
    assert {"PermAVG T = 0.1, extra learning rate 0.02", "PermAVG T = 0.1, extra learning rate 0.1"} <= labels


def test_the_caption_says_of_which_numbers_of_networks_there_was_a_choice(tmp_path: Path) -> None:
    def caption() -> str:
        (text,) = (text for name, text, _ in pa.figures(read(tmp_path)) if name.endswith("size"))
        return text

    write(tmp_path, 0.8, method="single", ensemble_size=1)
    for size in (2, 3):
        write(tmp_path, 0.8, method="permavg", ensemble_size=size)
    assert "several configurations" not in caption()
    write(tmp_path, 0.8, method="permavg", ensemble_size=3, extra_learning_rate=0.3)
    assert "several configurations (of 3 networks, else there is one) the best is taken" in caption()
    write(tmp_path, 0.8, method="permavg", ensemble_size=2, extra_learning_rate=0.3)
    assert "several configurations the best is taken" in caption()


def test_the_last_epoch_of_a_run_is_measured_whether_it_trains_or_not(setting: Setting) -> None:
    runs = setting.runs.query("seed == 2 and form == '' and ensemble_size == 3").set_index("label")
    assert runs.loc["best single network", "test_accuracy"] == pytest.approx(84)
    trained = runs.loc["PermAVG T = 0.1"]
    assert (trained["test_accuracy"], trained["validation_accuracy"]) == pytest.approx((89, 80))  # not epoch 0's 50
    assert trained["test_nll"] == pytest.approx(0.11)


def test_time_is_that_of_the_networks_of_matching_and_of_training_after(setting: Setting) -> None:
    runs = setting.runs.query("seed == 0 and form == '' and ensemble_size == 3").set_index("label")["total_seconds"]
    assert runs["deep ensemble"] == 30
    assert runs["weight matching to mean"] == 30.5
    assert runs["PermAVG T = 0.1"] == 30 + 3 * 2
    assert runs["single network, longer"] == 12 * 2  # no networks before it
    assert runs["PermAVG T = 0.1 from matched"] == 30 + 0.5 + 3 * 2


def test_what_is_projected_is_a_form_of_its_own_and_never_chosen(setting: Setting) -> None:
    by_label = setting.runs[setting.runs["ensemble_size"] == 3].groupby("label")["test_accuracy"].mean()
    assert by_label["PermAVG T = 0.1"] == pytest.approx(87.5)
    assert by_label["PermAVG T = 0.1, projected"] == pytest.approx(61.5)
    for thesis in (False, True):  # the projected form of PermAVG from matched has the best validation of all
        assert {form for pair in pa.comparisons(setting, thesis) for form in pair.ours["form"]} == {""}
    assert set(pa.best_of_arms(setting)["form"]) == {""}
    before, after = pa._projections(setting, 3)[0]
    assert (
        set(before["form"]) == {""} and set(after["form"]) == {"_projected"} and set(before["arm"]) == set(after["arm"])
    )


def test_stale_statistics_are_a_form_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, 0.8, stale=0.3, method="naive_average", model="cnn")
    runs = only(tmp_path).runs.set_index("label")["test_accuracy"]
    assert dict(runs) == pytest.approx({"naive average": 80, "naive average, stale BatchNorm": 30})


def test_cells_are_in_order_with_the_first_network_before_all(setting: Setting) -> None:
    assert [cell.label for cell in pa.cells(setting, 3)] == [
        "first single network", "best single network", "deep ensemble", "naive average", "weight matching to mean",
        "weight matching to first", "PermAVG T = 0.1", "PermAVG T = 0.1 from matched", "PermAVG T = 1 (thesis)",
        "distillation", "single network, longer", "fine-tuned best single", "fine-tuned average",
        "fine-tuned matched average", "free mixing",
        "PermAVG T = 0.1, projected", "PermAVG T = 0.1 from matched, projected", "PermAVG T = 1 (thesis), projected",
    ]  # fmt: skip


def test_what_tells_configurations_of_an_arm_apart_is_named_and_nothing_else(tmp_path: Path) -> None:
    for extra in ({}, {"extra_epochs": 6}, {"matching": "first", **MATCHED}, {"temperature": 0.2}):
        write(tmp_path, 0.8, method="permavg", **extra)
    write(tmp_path, 0.8, method="distillation", extra_learning_rate=0.05)
    assert list(only(tmp_path).runs["label"]) == [
        "PermAVG T = 0.1, extra epochs 3", "PermAVG T = 0.1, extra epochs 6", "PermAVG T = 0.2",
        "PermAVG T = 0.1 from matched", "distillation",
    ]  # fmt: skip


def test_permavg_and_what_it_is_compared_with_are_chosen_on_validation(setting: Setting) -> None:
    pairs = pa.comparisons(setting)
    assert {pair.ours["label"].iloc[0] for pair in pairs} == {"PermAVG T = 0.1 from matched"}  # not the best on test
    assert pairs[0].ours["candidates"].iloc[0] == 3
    assert pair_of(setting, "fine_tuned_average").others["label"].iloc[0] == "fine-tuned matched average"
    assert pair_of(setting, "weight_matching").others["label"].iloc[0] == "weight matching to mean"
    assert {pair.ours["label"].iloc[0] for pair in pa.comparisons(setting, True)} == {"PermAVG T = 1 (thesis)"}
    assert [(pair.other, pair.size) for pair in pairs] == [(other, size) for other in pa.OTHERS for size in (2, 3)]


def test_what_trains_is_compared_at_equal_extra_epochs(results: Path, tmp_path: Path) -> None:
    results = shutil.copytree(results, tmp_path / "more")
    for seed in range(4):
        longer = {"ensemble_size": 3, "seed": seed, "extra_epochs": 9}
        write(results, 0.99, method="distillation", **longer)
        write(results, 0.5, method="permavg", **longer)
    setting = only(results)
    assert pair_of(setting, "distillation").others["test_accuracy"].mean() == pytest.approx(85.5)
    # one seed is not chosen
    write(results, 0.99, method="permavg", ensemble_size=3, seed=4, extra_epochs=12)
    assert pair_of(only(results), "distillation").ours["extra_epochs"].iloc[0] == 3


def test_the_longer_network_is_compared_with_permavg_of_its_budget(results: Path, tmp_path: Path) -> None:
    results = shutil.copytree(results, tmp_path / "more")
    for seed in range(4):
        write(results, 0.99, method="longer", ensemble_size=3, seed=seed, extra_epochs=3)
    assert pair_of(only(results), "longer").others["extra_epochs"].tolist() == [12] * 4
    label = pair_of(only(results), "longer").others["label"].iloc[0]
    assert label == "single network, longer, extra epochs 12"


def test_of_learning_rates_the_best_on_validation_is_drawn_and_the_table_has_all(results: Path, tmp_path: Path) -> None:
    results = shutil.copytree(results, tmp_path / "more")
    before = only(results)
    for seed, up in enumerate(UPS):
        for size in (2, 3):
            same = {"ensemble_size": size, "seed": seed}
            write(results, 0.7 + up, validation=0.99, method="fine_tuned_single", extra_learning_rate=0.3, **same)
            write(results, 0.99, validation=0.5, method="mixing", extra_learning_rate=0.01, **same)
            write(results, 0.87, validation=0.9, method="fine_tuned_average", extra_learning_rate=0.3, **same)
    after = only(results)
    assert [cell.label for cell in pa.cells(after, 3)] == [cell.label for cell in pa.cells(before, 3)]
    found = {cell.label: cell.runs for cell in pa.cells(after, 3)}
    chosen = (
        "fine-tuned best single",
        "free mixing",
        "fine-tuned average",
        "fine-tuned matched average",
        "distillation",
    )
    assert [found[label]["extra_learning_rate"].iloc[0] for label in chosen] == [0.3, 0.001, 0.3, 0.1, 0.1]
    assert [found[label]["candidates"].iloc[0] for label in chosen] == [2, 2, 2, 1, 1]
    best = pa.best_of_arms(after)
    assert len(best) == len(pa.best_of_arms(before)) and not best.duplicated(["arm", "ensemble_size", "seed"]).any()
    label = pair_of(after, "fine_tuned_single").others["label"].iloc[0]
    assert label == "fine-tuned best single, extra learning rate 0.3"  # though it is the worst on test
    assert pair_of(after, "fine_tuned_average").others["candidates"].iloc[0] == 3
    methods = pa.summarise_cells(after).query("networks == '3'")["method"].tolist()
    assert {"free mixing, extra learning rate 0.001", "free mixing, extra learning rate 0.01"} <= set(methods)
    with figure.style():
        captions = {name.partition("/")[2]: caption for name, caption, _ in pa.figures(read(results))}
    for name in ("methods", "cost", "reliability"):
        assert "Of several learning rates of extra training the best is drawn" in captions[name]
    assert "Of several learning rates" not in captions["projection"]
    told = [line for line in pa.findings(read(results))["digits-mlp"].sentences if "several learning rates" in line]
    assert len(told) == 1 and told[0].startswith(
        "Of several learning rates of extra training the best is told, by the last"
    )


def test_a_paired_difference_and_its_interval_are_those_of_scipy(setting: Setting) -> None:
    pair = pair_of(setting, "single")
    each = 100 * (np.array([0.83, 0.85, 0.89, 0.87]) - np.array([0.81, 0.82, 0.84, 0.83]))
    low, high = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    shuffled = pair._replace(ours=pair.ours.sort_values("seed", ascending=False))  # seeds are paired, not rows
    found = shuffled.difference("test_accuracy")
    assert (found.mean, found.mean - found.half, found.mean + found.half) == pytest.approx((each.mean(), low, high))
    table = pa.summarise_differences(setting)
    row = table[(table["networks"] == "3") & (table["less"] == "best single network")].iloc[0]
    assert row["final test accuracy (points)"] == f"**{each.mean():+.2f} ({low:+.2f} to {high:+.2f})**"


def test_sentences_say_what_is_better_worse_and_not_shown(finding: figure.Finding) -> None:
    told = next(line for line in finding.sentences if line.startswith("PermAVG is compared"))
    assert "of 2 networks PermAVG T = 0.1 from matched, best of 3; of 3 networks PermAVG T = 0.1 from matched" in told
    accuracy = next(
        line for line in finding.sentences if line.startswith("PermAVG as it is best on validation, test accuracy: ")
    )
    better, none = accuracy.split("; no difference is shown from ")
    assert "better than best single network" in better and "fine-tuned best single" in better
    assert "naive average" not in none and "worse than" not in better
    assert "deep ensemble" in none and "distillation" in none
    thesis = next(line for line in finding.sentences if line.startswith("PermAVG in the thesis' form"))
    assert "worse than best single network" in thesis
    rows = [line for line in finding.differences.split("\n") if line.startswith("| ") and "| deep ensemble | 4" in line]
    assert "no interval is known" not in finding.differences
    assert len(rows) == 2 and all(row.startswith("| 3 |") and row in finding.table for row in rows)
    assert f"| {MINUS}2.00 ({MINUS}6.11 to +2.11) |" in rows[0]
    # all constant differences leave 0 out: of nine methods, two sizes and two measures
    counted = next(line for line in finding.sentences if "intervals of accuracy and NLL" in line)
    assert counted.startswith("Of these 36 intervals") and "with no true difference 1.8 would" in counted


def test_a_verdict_names_the_numbers_of_networks_where_they_differ(tmp_path: Path) -> None:
    for size, other in ((2, 0.7), (3, 0.9)):
        for seed in range(3):
            same = {"seed": seed, "ensemble_size": size}
            write(tmp_path, 0.8 + 0.01 * seed, method="permavg", **same)
            write(tmp_path, other + 0.015 * seed, method="distillation", **same)
            write(tmp_path, 0.5 + 0.015 * seed, method="naive_average", **same)
    pairs = pa.comparisons(only(tmp_path))
    assert pa._verdict(pairs, "test_accuracy") == (
        "better than naive average, than distillation (of 2 networks); worse than distillation (of 3 networks)"
    )
    assert pa._verdict([pair for pair in pairs if pair.size == 2], "test_accuracy") == (
        "better than distillation and naive average"
    )


def test_accuracy_by_number_of_networks_is_that_of_each_arms_best(setting: Setting, finding: figure.Finding) -> None:
    table = pa.summarise_sizes(setting).set_index("method")
    best = pa.best_of_arms(setting)
    mine = best[(best["arm"] == "naive_average") & (best["ensemble_size"] == 3)]["test_accuracy"]
    assert list(table.columns) == ["M = 1", "M = 2", "M = 3"] and table.loc["naive average", "M = 1"] == ""
    assert table.loc["naive average", "M = 3"] == f"{mine.mean():.2f} ± {mine.std():.2f}"
    assert "by number of networks, M." in finding.differences


def test_a_lower_nll_is_in_favour() -> None:
    assert pa.in_favour(pa.Difference(-0.2, 0.1, 3), "test_nll") and pa.in_favour(
        pa.Difference(2, 1, 3), "test_accuracy"
    )
    assert not pa.in_favour(pa.Difference(0.2, 0.1, 3), "test_nll")
    assert not pa.in_favour(pa.Difference(0.2, 0.3, 3), "test_accuracy")


def test_size_and_speed_are_beside_those_of_one_network_and_of_the_ensemble(finding: figure.Finding) -> None:
    size, speed = finding.sentences[-2:]
    assert "has 100 parameters (as many as one plain network and 0.333 times as many as the deep ensemble)" in size
    assert speed == (
        "In inference it is 0.50 times as fast as a plain network (n = 4) and 2.00 times as fast as the deep ensemble (n = 4): "
        "medians over seeds of images per second, each timed in turn with a plain network (cpu)."
    )
    ours, other = (pd.DataFrame({"seed": seeds, "device_name": devices, "relative_speed": speeds})
                   for seeds, devices, speeds in (([0, 1], "cpu", [10, 30]), ([1, 0], ["cpu", "gpu"], [15, 1])))  # fmt: skip
    assert dict(pa.relative_speed(ours, other, "cpu")) == {1: 2.0}


def test_speed_is_beside_the_plain_network_of_the_same_process_alone(tmp_path: Path) -> None:
    for seed, load in enumerate((1, 2, 4)):
        write(tmp_path, 0.8, method="single", seed=seed, plain=None)
        write(tmp_path, 0.8, method="deep_ensemble", seed=seed, speed=30 / load, plain=120 / load)
        write(tmp_path, 0.8, method="permavg", seed=seed, speed=500 * load, plain=1000 * load)
    assert read(tmp_path)["run_id"].nunique() == 9  # those without the column are whole results too
    table = pa.summarise_cells(only(tmp_path)).set_index("method")["images per second, plain network = 1"]
    assert dict(table) == {"best single network": "", "deep ensemble": "0.25 ± 0.00", "PermAVG T = 0.1": "0.50 ± 0.00"}
    speed = pa.findings(read(tmp_path))["digits-mlp"].sentences[-1]
    assert "0.50 times as fast as a plain network (n = 3) and 2.00 times as fast as the deep ensemble (n = 3)" in speed
    with figure.style():
        drawn = {name.partition("/")[2]: (caption, drawing) for name, caption, drawing in pa.figures(read(tmp_path))}
    caption, drawing = drawn["cost"]
    left, right = drawing.axes
    assert right.get_xlabel() == "images per second, plain network = 1" and "timed a plain network in turn" in caption
    assert {round(x, 9) for line in right.lines for x in line.get_xdata() if np.isfinite(x)} == {0.25, 0.5}
    assert len([line for line in left.lines if len(line.get_xdata()) == 3]) == 3


def test_runs_that_timed_no_plain_network_have_no_relative_speed(tmp_path: Path) -> None:
    for method in ("single", "deep_ensemble", "permavg"):
        write(tmp_path, 0.8, method=method, plain=None)
    assert set(pa.summarise_cells(only(tmp_path))["images per second, plain network = 1"]) == {""}
    assert not any("images per second" in line for line in pa.findings(read(tmp_path))["digits-mlp"].sentences)
    with figure.style():
        drawn = {name.partition("/")[2]: (caption, drawing) for name, caption, drawing in pa.figures(read(tmp_path))}
    caption, drawing = drawn["cost"]
    assert len(drawing.axes) == 1 and "images per second" not in caption


def test_two_seeds_state_no_interval_and_absent_references_are_named(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path, 0.8 + 0.1 * seed, method="naive_average", ensemble_size=3, seed=seed)
        write(tmp_path, 0.7 + 0.2 * seed, method="permavg", ensemble_size=3, seed=seed)
    finding = pa.findings(read(tmp_path))["digits-mlp"]
    assert "There is no best single network and deep ensemble to compare with." in finding.sentences[0]
    assert any(line.startswith("No interval is known") for line in finding.sentences)
    assert f"| naive average | 2 | {MINUS}5.00 | +0.050 |" in finding.table
    assert finding.differences.count("Of fewer than 3 pairs no interval is known.") == 1
    with figure.style():
        captions = {name.partition("/")[2]: caption for name, caption, _ in pa.figures(read(tmp_path))}
    for name in ("methods", "differences"):
        assert "interval by Student" not in captions[name] and "intervals is corrected" not in captions[name]
    assert "diamonds their mean, n = 2 seeds; no interval is drawn of fewer than 3 seeds" in captions["methods"]
    assert "n = 2 paired seeds; no interval is drawn of fewer than 3 paired seeds" in captions["differences"]


def test_a_caption_counts_the_intervals_that_are_drawn(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, 0.8 + 0.01 * seed, projected=0.7, method="permavg", seed=seed)
        write(tmp_path, 0.7 + 0.03 * seed, method="distillation", seed=seed)
    for seed in range(2):
        write(tmp_path, 0.7 + 0.02 * seed, method="naive_average", seed=seed)
    with figure.style():
        captions = {name.partition("/")[2]: caption for name, caption, _ in pa.figures(read(tmp_path))}
    assert "None of the 2 intervals is corrected" in captions["differences"]  # accuracy and NLL less distillation
    for name in ("methods", "differences", "projection"):
        assert "with its 95 % interval by Student's t, n = 2 to 3 " in captions[name]
        assert "no interval is drawn of fewer than 3 " in captions[name]


def test_the_main_number_of_networks_is_3_or_the_one_of_most_runs(results: Path, tmp_path: Path) -> None:
    assert pa.main_size(only(results)) == 3
    for size, seeds in ((2, 1), (4, 2), (8, 2)):
        for seed in range(seeds):
            write(tmp_path / "other", 0.8, method="deep_ensemble", ensemble_size=size, seed=seed)
    assert pa.main_size(only(tmp_path / "other")) == 8


def test_barriers_and_lines_are_those_of_the_runs(df: pd.DataFrame) -> None:
    lines = pa.summarise_lines(df)
    plain = lines[~lines["matched"]].query("seed == 0")
    assert plain["share"].tolist() == [0, 0.5, 1] and plain["test_accuracy"].tolist() == pytest.approx([90, 50, 80])
    assert plain["test_nll"].tolist() == pytest.approx([0.1, 0.5, 0.2])
    assert pa._barriers(lines) == (
        "the barrier of test accuracy is 35.00 ± 0.00 as they are and 10.00 ± 0.00 matched (points), "
        "the barrier of test NLL is 0.350 ± 0.000 as they are and 0.100 ± 0.000 matched (nats)"
    )


def test_matrices_are_means_over_members_and_pictures_are_square(df: pd.DataFrame, setting: Setting) -> None:
    runs = setting.runs.query("label == 'PermAVG T = 1 (thesis)' and ensemble_size == 3").set_index("seed")["run_id"]
    matrices = pa.summarise_matrices(df).set_index("run_id").loc[runs[1]]
    assert (matrices["layer"], matrices["row_max"], matrices["unique_argmax"]) == pytest.approx((1, 0.3, 50))
    assert pa.picture(df, runs[0], "picture").tolist() == [[1, 0], [0, 0.5]]
    assert pa.picture(df, runs[1], "picture") is None


def test_how_nearly_rows_sum_to_1_is_the_largest_error_of_all_members(finding: figure.Finding) -> None:
    (said,) = (one for one in finding.sentences if "a row's sum" in one)
    assert said.endswith(
        "off by at most: PermAVG T = 0.1 0.006; PermAVG T = 0.1 from matched 0.006; PermAVG T = 1 (thesis) 0.006."
    )


def test_runs_of_one_seed_that_are_of_other_networks_are_named(tmp_path: Path) -> None:
    for seed, of_one, of_other in ((0, "abc", "abc"), (1, "abd", "abe"), (2, "abf", "")):  # "": not known
        write(tmp_path, 0.8, method="naive_average", seed=seed, networks=of_one)
        write(tmp_path, 0.8, method="permavg", seed=seed, networks=of_other)
        write(tmp_path, 0.8, method="permavg", ensemble_size=2, seed=seed, networks=f"{of_one}2")
    (finding,) = pa.findings(read(tmp_path)).values()
    assert [one for one in finding.sentences if "sets of networks" in one] == [
        "Of 3 networks, seed 1, runs are of 2 different sets of networks: their differences are of these too."
    ]


def test_titles_of_matrices_are_inside_the_figure(tmp_path: Path) -> None:
    for method in ("permavg", "mixing"):
        for start in ({}, MATCHED):
            for rate in (0.01, 0.05):
                write(tmp_path, 0.8, method=method, extra_learning_rate=rate, **start)
    write(tmp_path, 0.8, method="permavg", temperature=1.0)
    with figure.style():
        (drawing,) = (drawing for name, _, drawing in pa.figures(read(tmp_path)) if name.endswith("/matrices"))
        drawing.draw_without_rendering()
    titles = [ax._left_title.get_window_extent() for ax in drawing.axes if ax.get_title("left")]
    assert len(titles) == 5
    for box in titles:
        assert box.x1 < drawing.bbox.x1 and box.y1 < drawing.bbox.y1
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(titles))


def test_a_matrix_with_signs_has_0_in_the_middle_of_its_scale() -> None:
    norm, _ = pa.norm_of_matrix(np.array([[1.5, -0.2]]))
    assert (norm(0), norm(-1.5), norm(1.5)) == pytest.approx((0.5, 0, 1))
    norm, _ = pa.norm_of_matrix(np.array([[0.9, 0.0]]))
    assert (norm(0.0), norm(0.01), norm(1)) == pytest.approx((0, 0.5, 1))


def test_0_is_on_the_axis_of_differences_and_what_lies_far_beyond_it_is_an_arrow(tmp_path: Path) -> None:
    for seed in range(3):
        same = {"seed": seed, "ensemble_size": 3}
        write(tmp_path, 0.8 + 0.001 * seed, method="permavg", **same)
        write(tmp_path, 0.1, method="naive_average", **same)
        for method, up in (("distillation", 0), ("fine_tuned_single", 0.001), ("fine_tuned_average", 0.003)):
            write(tmp_path, 0.85 + up, method=method, **same)
    with figure.style():
        ax = pa.draw_differences(
            pa.comparisons(only(tmp_path)), figure.new_figure(3, 3).add_subplot(), measure="test_accuracy"
        )
    low, high = ax.get_xlim()
    assert low < -5 and 0 < high < 1
    assert [text.get_text() for text in ax.texts] == ["+70.10 (+69.85 to +70.35) \N{RIGHTWARDS ARROW}"]


def test_a_row_is_its_seeds_mean_and_interval_or_written_at_the_edge(setting: Setting) -> None:
    every = pa.cells(setting, 3)
    with figure.style():
        ax = pa.draw_methods(every, figure.new_figure(3, 3).add_subplot(), measure="test_accuracy")
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[:2] == ["nothing trained", "first single network"]
    assert {"trained for 3 epochs more", "trained for 12 epochs from the start"} <= set(labels)
    assert labels[labels.index("a new network, trained for 3 epochs") + 1] == "distillation"
    assert labels.count("projected, nothing trained after") == 1
    first = next(line for line in ax.lines if len(line.get_xdata()) == 4)
    assert first.get_xdata() == pytest.approx([80, 81, 83, 82])
    interval = stats.ttest_1samp([80, 81, 83, 82], 0).confidence_interval(0.95)
    assert ax.collections[0].get_segments()[0][:, 0] == pytest.approx(tuple(interval))
    edge = [text.get_text() for text in ax.texts]
    assert {"\N{LEFTWARDS ARROW} 13.00 ± 2.58", "\N{LEFTWARDS ARROW} 40.00 ± 0.00"} <= set(edge)
    drawn = [line for line in ax.lines if len(line.get_xdata()) == 4]
    assert len(drawn) + len(edge) == len(every)  # each has one or the other


def test_every_kind_of_figure_is_there_with_n_and_the_setting(df: pd.DataFrame) -> None:
    lone = df[(df["method"] == "distillation") & (df["ensemble_size"] == 3) & (df["seed"] == 3)]["run_id"].iloc[0]
    with figure.style():
        drawn = list(pa.figures(df[df["run_id"] != lone]))
    assert [name.partition("/")[2] for name, _, _ in drawn] == [
        "size", "methods", "differences", "differences_thesis", "projection", "barriers", "matrices", "matrices_summary",
        "cost", "reliability", "training",
    ]  # fmt: skip
    uneven = {"size", "methods", "differences", "differences_thesis", "cost", "reliability", "training"}
    for name, caption, _ in drawn:
        short = name.partition("/")[2]
        n = "seed 0" if short == "matrices" else "n = 3 to 4 " if short in uneven else "n = 4 "
        assert n in caption and "Setting: digits (here), mlp with 1 hidden layer of 8" in caption, name
    captions = {name.partition("/")[2]: caption for name, caption, _ in drawn}
    assert "(of 2 networks PermAVG T = 0.1 from matched, best of 3; of 3 networks" in captions["differences"]
    assert "None of the 36 intervals is corrected" in captions["differences"]
    assert "35.00 ± 0.00 as they are" in captions["barriers"]
    assert (
        "of these runs, in all their members and layers, a row's sum is at most 0.006 away from it."
        in captions["matrices"]
    )
    assert captions["training"].count("The longer single network, with epochs of its own, is not drawn.") == 1
    assert "3 extra epochs, batches" in captions["size"]  # not those of the longer network


def test_one_run_alone_draws_what_it_can(tmp_path: Path) -> None:
    write(tmp_path, 0.8, method="deep_ensemble", ensemble_size=3)
    with figure.style():
        names = [name.partition("/")[2] for name, _, _ in pa.figures(read(tmp_path))]
    assert names == ["methods", "cost", "reliability"]
    assert pa.findings(read(tmp_path))["digits-mlp"].sentences


def test_of_one_number_of_networks_with_the_lines_between_two_there_is_no_figure_of_sizes(tmp_path: Path) -> None:
    for method in ("deep_ensemble", "permavg"):
        write(tmp_path, 0.8, method=method, ensemble_size=3)
    write(tmp_path, 0.7, method="weight_matching", ensemble_size=2)
    with figure.style():
        names = {name.partition("/")[2] for name, _, _ in pa.figures(read(tmp_path))}
    assert "barriers" in names and "size" not in names


def test_no_seed_in_common_is_said(tmp_path: Path) -> None:
    write(tmp_path, 0.8, method="naive_average", seed=0, ensemble_size=3)
    write(tmp_path, 0.8, method="permavg", seed=1)
    finding = pa.findings(read(tmp_path))["digits-mlp"]
    assert any("too few seeds to tell from naive average." in line for line in finding.sentences)
    assert "| naive average | 0 | no seed in common |" in finding.differences
    with figure.style():
        captions = {name.partition("/")[2]: caption for name, caption, _ in pa.figures(read(tmp_path))}
    assert "n = 0 paired seeds" in captions["differences"]


def test_single_networks_alone_are_no_setting(tmp_path: Path) -> None:
    write(tmp_path, 0.8, method="single", ensemble_size=1)
    assert not list(pa.figures(read(tmp_path))) and not pa.findings(read(tmp_path))


def test_cost_is_of_one_device(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, 0.8, method="deep_ensemble", ensemble_size=3, seed=seed)
    write(tmp_path, 0.7, method="naive_average", ensemble_size=3, device="another")
    with figure.style():
        drawn = {name.partition("/")[2]: (caption, drawing) for name, caption, drawing in pa.figures(read(tmp_path))}
    caption, drawing = drawn["cost"]
    assert "Measured on cpu; runs on other devices are left out" in caption and "n = 3 seeds" in caption
    colours = {line.get_color() for ax in drawing.axes for line in ax.lines}
    assert colours == {pa.ARMS["deep_ensemble"].colour}


def test_what_is_below_the_view_of_cost_is_named_and_not_in_the_legend(tmp_path: Path) -> None:
    for method, accuracy in (
        ("deep_ensemble", 0.8),
        ("permavg", 0.75),
        ("naive_average", 0.1),
        ("weight_matching", 0.7),
    ):
        for seed in range(3):
            write(tmp_path, accuracy + 0.01 * seed, method=method, seed=seed)
    with figure.style():
        (found,) = (one for one in pa.figures(read(tmp_path)) if one[0].endswith("/cost"))
    _, caption, drawing = found
    labels = {text.get_text() for text in drawing.legends[0].get_texts()}
    assert "Below what is in view: naive average (11.0 %) and weight matching to mean (71.0 %). " in caption
    assert labels == {"deep ensemble", "PermAVG"}


def test_networks_from_files_are_settings_of_their_own(tmp_path: Path) -> None:
    for method in ("naive_average", "deep_ensemble"):
        write(tmp_path, 0.8, method=method)
    for name in "ab":
        files = [tmp_path / f"{name}{i}.pt" for i in range(3)]
        for file in files:
            file.write_text(file.name)
        write(tmp_path, 0.8, method="naive_average", base_weights=tuple(files))
    names = [setting.name for setting in pa.settings(read(tmp_path))]
    assert len(set(names)) == 3 and names[0] == "digits-mlp"
    assert all(name.startswith("digits-mlp-epochs_0-base_digest_") for name in names[1:])


def test_a_setting_keeps_its_name_when_others_with_fewer_runs_come_beside_it(tmp_path: Path) -> None:
    def names() -> list[str]:
        return [setting.name for setting in pa.settings(read(tmp_path))]

    write(tmp_path, 0.8, method="naive_average", depth=2)
    write(tmp_path, 0.8, method="deep_ensemble", depth=2)
    assert names() == ["digits-mlp"]
    for fields in ({"depth": 1}, {"depth": 3, "epochs": 4}):
        write(tmp_path, 0.8, method="naive_average", **fields)
    alone = ["digits-mlp", "digits-mlp-depth_1", "digits-mlp-depth_3-epochs_4"]
    assert names() == alone
    heads = [finding.sentences[0] for finding in pa.findings(read(tmp_path)).values()]
    assert [head.partition(" networks")[0] for head in heads] == [f"{name}, 3" for name in alone]
    write(tmp_path, 0.8, method="naive_average", model="cnn")
    assert names() == ["digits-cnn", *alone]


def test_figures_are_the_same_bytes_on_any_day(tmp_path: Path) -> None:
    write(tmp_path, 0.8, method="deep_ensemble", ensemble_size=3)
    digests = []
    for day in ("a", "b"):
        with figure.style():
            name, _, drawing = next(pa.figures(read(tmp_path)))
            files = figure.save(drawing, tmp_path / day / name)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]


def test_it_is_an_experiment_and_imports_no_torch() -> None:
    code = "import sys; from plots import parameter_averaging; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    assert "parameter_averaging" in experiments()
