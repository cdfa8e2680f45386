"""Numbers before pictures: cells and what they are compared with, paired intervals against known ones, n in every caption."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from batchens.grid import run_id
from batchens.results import result_path, write_run
from plots import figure
from plots import parameter_sharing as ps
from plots.__main__ import experiments
from plots.image_runs import Setting
from plots.reading import usable_results
from scripts.parameter_sharing import Config

ROOT = Path(__file__).parents[2]
SMALL = Config(epochs=2, batch_size=64)
MINUS = "\N{MINUS SIGN}"


def write(
    folder: Path, accuracy: float, parameters: int, *, device: str = "cpu", curves: bool = True, **fields: object
) -> None:
    """Write a run as the script does: this accuracy on test and after each epoch, an NLL of what is missing to 1."""
    config = dataclasses.replace(SMALL, **fields)  # type: ignore[arg-type]
    path = result_path(folder, "parameter_sharing", run_id(config))
    head = {"run_id": path.stem, "experiment": "parameter_sharing"}
    head |= {name: value for name, value in dataclasses.asdict(config).items() if name not in Config.INCIDENTAL}
    facts = {
        "parameters": parameters, "device_name": device, "number_format": "float32", "torch": "2", "data_source": "here",
        "commit": "", "dirty": "", "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    members, rows = range(config.members), []
    for epoch in range(1, config.epochs + 1):
        costs = {"seconds": 2.0, "images_per_second": 640.0 * epoch}
        rows += [{"epoch": epoch, "split": "train", "member": m, "nll": 1 / epoch, **costs} for m in members]
        for split in ("validation", "test")[: 1 + (epoch == config.epochs)]:
            scores = {"accuracy": accuracy, "nll": 1 - accuracy, "brier": 0.1, "ece": 0.02}
            several = {"disagreement": 0.1, "epistemic": 0.05} if len(members) > 1 else {}
            rows += [{"epoch": epoch, "split": split, "member": m, **scores, **costs} for m in members]
            rows.append({"epoch": epoch, "split": split, **scores, **several, **costs})
    if curves:
        rows.append(
            {"epoch": config.epochs, "split": "reliability", "x": "0.5 nan 0.9", "y": "0.4 nan 1", "n": "0.2 0 0.8"}
        )
        rows.append({"epoch": config.epochs, "split": "weights", "x": "-1 0 1", "y": "0 1 0"})
    columns = (
        "epoch", "split", "member", "accuracy", "nll", "brier", "ece", "disagreement", "epistemic", *("xyn" if curves else ""),
        "seconds", "images_per_second",
    )  # fmt: skip
    write_run(path, [{**head, **{name: row.get(name) for name in columns}, **facts} for row in rows])


UPS = (0.0, 0.01, 0.03, 0.02)  # of the seeds


def references(folder: Path, **fields: object) -> None:
    for seed, up in enumerate(UPS):
        write(folder, 0.80 + up, 100, method="single", seed=seed, **fields)
        write(folder, 0.81 + up, 100, method="single", seed=seed, **(fields | {"epochs": 8}))
        write(folder, 0.90, 400, method="deep_ensemble", seed=seed, **fields)
        write(folder, 0.84 + up, 120, method="batchensemble", seed=seed, **fields)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A small whole study: four seeds of the references, of two intensities between members, and of each way to tie all."""
    references(tmp_path)
    for seed, up in enumerate(UPS):
        write(tmp_path, 0.85 + up, 150, intensity="early", seed=seed)
        write(tmp_path, 0.80 + 2 * up, 110, seed=seed)
        write(tmp_path, 0.82 + up, 115, ties="scaled", seed=seed)
        write(tmp_path, 0.83 + up, 250, ties="part", seed=seed)
        write(tmp_path, 0.81 + up, 111, method="same_size", seed=seed)
        write(tmp_path, 0.78 + up, 60, regime="within", seed=seed)
    return tmp_path


def read(folder: Path) -> pd.DataFrame:
    return usable_results(folder, "parameter_sharing", ps.CONFIG)[0]


def only(folder: Path) -> Setting:
    (setting,) = ps.settings(read(folder))
    return setting


def test_a_setting_is_the_whole_configuration_but_what_is_varied() -> None:
    assert set(ps.CONFIG) == {field.name for field in dataclasses.fields(Config)} - set(Config.INCIDENTAL)


def test_batches_a_second_are_the_median_over_epochs(results: Path) -> None:
    runs = ps.summarise_runs(read(results))
    assert set(runs.loc[runs["epochs"] == 2, "batches_per_second"]) == {15.0}  # of 10 and 20
    assert set(runs.loc[runs["epochs"] == 8, "batches_per_second"]) == {45.0}


def test_cells_are_in_order_with_the_references_first(results: Path) -> None:
    cells = ps.cells(only(results))
    assert [(cell.regime, cell.label, len(cell.runs)) for cell in cells] == [
        ("", "single network", 4), ("", "single network, 4 \N{MULTIPLICATION SIGN} epochs", 4), ("", "deep ensemble of 4", 4),
        ("", "BatchEnsemble of 4", 4), ("within", "all: whole", 4), ("between", "early: whole", 4),
        ("between", "all: whole", 4), ("between", "all: scaled", 4), ("between", "all: part", 4),
        ("between", "all: same size", 4),
    ]  # fmt: skip


def test_what_tells_cells_apart_is_named_and_nothing_else(results: Path) -> None:
    write(results, 0.8, 300, ties="part", fraction=0.25)
    labels = [cell.label for cell in ps.cells(only(results))]
    assert labels[-4:] == ["all: scaled", "all: part, fraction 0.25", "all: part, fraction 0.5", "all: same size"]


def test_settings_join_what_is_of_one_network_and_separate_the_rest(tmp_path: Path) -> None:
    cnn = {"model": "cnn", "batchnorm": "shared"}
    for regime in ("within", "between"):
        for ties in ("whole", "part"):
            write(tmp_path, 0.8, 100, regime=regime, ties=ties, **cnn)
    for fields in ({}, {"ensemble_size": 8}, {"batchnorm": "member"}, {"learning_rate": 0.2}):
        write(tmp_path, 0.8, 100, method="batchensemble", **(cnn | fields))
    for method in ("single", "deep_ensemble"):
        write(tmp_path, 0.8, 100, method=method, **cnn)
    found = {setting.name: sorted(setting.runs["arm"]) for setting in ps.settings(read(tmp_path))}
    one = ["part", "single", "whole"]  # within a network
    assert found == {
        "digits-cnn-batchnorm_member": sorted(["batchensemble", "deep_ensemble", "part", *one]),
        "digits-cnn": sorted(["batchensemble", "deep_ensemble", "part", "whole", *one]),
        "digits-cnn-learning_rate_0.2": ["batchensemble"],
        "digits-cnn-ensemble_size_8": sorted(["batchensemble", *one]),
    }


def test_each_cell_is_compared_with_what_it_must_be(results: Path) -> None:
    cells = ps.cells(only(results))
    found = {
        regime: [(pair.label, pair.kind) for pair in ps.comparisons(cells, regime)] for regime in ("", *ps.REGIMES)
    }
    assert found == {
        "": [
            ("BatchEnsemble of 4", "less deep ensemble of 4"),
            ("single network, 4 \N{MULTIPLICATION SIGN} epochs", "less single network"),
            ("deep ensemble of 4", "less single network"),
            ("BatchEnsemble of 4", "less single network"),
        ],
        "within": [("all: whole", "less single network")],
        "between": [
            *((f"{cell}", "less deep ensemble of 4") for cell in ("early: whole", "all: whole", "all: scaled", "all: part")),
            ("all: same size", "plain network, less deep ensemble of 4"),
            ("all: whole", "less plain network of this size"),
            ("all: scaled", "less the same tied whole"),
            ("all: part", "less the same tied whole"),
        ],
        "both": [],
    }  # fmt: skip


def test_a_paired_difference_and_its_interval_are_those_of_scipy(results: Path) -> None:
    cells = ps.cells(only(results))
    pair = next(pair for pair in ps.comparisons(cells, "between") if "this size" in pair.kind)
    each = 100 * (np.array([0.80, 0.82, 0.86, 0.84]) - np.array([0.81, 0.82, 0.84, 0.83]))
    low, high = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    shuffled = pair.ours.runs.sort_values("seed", ascending=False)  # seeds are paired, not rows
    found = ps.difference(shuffled, pair.other.runs, "test_accuracy")
    assert (found.mean, found.mean - found.half, found.mean + found.half) == pytest.approx((each.mean(), low, high))
    table = ps.summarise_differences(only(results))
    row = table[(table["cell"] == "all: whole") & (table["compared with"] == "plain network of this size")].iloc[0]
    assert row["final test accuracy (points)"] == f"{each.mean():+.2f} ({low:+.2f} to {high:+.2f})".replace("-", MINUS)


def test_an_interval_that_leaves_0_out_is_bold_and_counted(results: Path) -> None:
    finding = ps.findings(read(results))["digits-mlp"]
    assert "| between members | early: whole | deep ensemble of 4 | **\N{MINUS SIGN}3.50 (" in finding.table
    counted = "Tied between members, less deep ensemble of 4: test accuracy better in 0 and worse in 4 of 4; test NLL better in"
    assert any(line.startswith(counted) for line in finding.sentences)
    assert "deep ensemble of 4 90.00 ± 0.00 % (400 parameters)" in finding.sentences[1]


def test_a_plain_network_is_in_no_tally_of_what_is_tied(results: Path) -> None:
    setting = only(results)
    for pair in (pair for regime in ps.REGIMES for pair in ps.comparisons(ps.cells(setting), regime)):
        assert pair.plain == pair.kind.startswith("plain network, ") == (pair.ours.arm == "same_size")
    sentences = ps.findings(read(results))["digits-mlp"].sentences
    assert not any("same size" in line for line in sentences if line.startswith("Tied"))
    plain = "Plain network as large as what is tied between members"
    assert any(line.startswith(f"{plain}: all: same size 82.50 ± ") for line in sentences)
    assert any(line.startswith(f"{plain}, less deep ensemble of 4: test accuracy {MINUS}7.50 (") for line in sentences)
    for table in (ps.summarise_cells(setting), ps.summarise_differences(setting)):
        same = table["cell"] == "all: same size"
        assert set(table.loc[same, "tied"]) == {"nothing (sized as between members)"}
        assert not table.loc[~same, "tied"].str.contains("sized").any()


def test_two_seeds_state_no_interval_and_absent_references_are_named(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path, 0.8 + 0.1 * seed, 100, method="single", seed=seed)
        write(tmp_path, 0.7 + 0.2 * seed, 100, regime="within", seed=seed)
    finding = ps.findings(read(tmp_path))["digits-mlp"]
    assert "There is no deep ensemble to compare with." in finding.sentences[0]
    assert finding.sentences[-1].endswith("no interval is known, and none can be said to be better.")
    assert f"| within a network | all: whole | single network | {MINUS}5.00 | +0.050 |" in finding.table
    with figure.style():
        captions = {name.partition("/")[2]: caption for name, caption, _ in ps.figures(read(tmp_path))}
    for name in ("degree", "calibration", "throughput", "differences_within"):
        assert "95 %" not in captions[name] and "n = 2 " in captions[name]


def test_every_kind_of_figure_is_there_with_n_and_the_setting(results: Path) -> None:
    gone = read(results)
    lone = gone[(gone["intensity"] == "early") & (gone["seed"] == 3)]["run_id"].iloc[0]
    with figure.style():
        drawn = list(ps.figures(gone[gone["run_id"] != lone]))
    assert [name.partition("/")[2] for name, _, _ in drawn] == [
        "scheme", "parameters", "cost", "degree", "calibration", "diversity", "throughput", "differences_within",
        "differences_between", "members_between", "reliability", "training", "weights",
    ]  # fmt: skip
    uneven = {"parameters", "cost", "degree", "calibration", "diversity", "throughput", "differences_between",
              "members_between", "training", "weights"}  # fmt: skip
    for name, caption, _ in drawn[1:]:  # the scheme has no results in it
        n = "n = 3 to 4 " if name.partition("/")[2] in uneven else "n = 4 "
        assert n in caption and "Setting: digits (here), mlp, 2 epochs" in caption, name


def test_what_has_no_members_or_curves_draws_none(tmp_path: Path) -> None:
    write(tmp_path, 0.8, 100, method="single", curves=False)
    write(tmp_path, 0.7, 100, regime="within", curves=False)
    with figure.style():
        names = [name.partition("/")[2] for name, _, _ in ps.figures(read(tmp_path))]
    assert names == [
        "scheme",
        "parameters",
        "cost",
        "degree",
        "calibration",
        "throughput",
        "differences_within",
        "members",
    ]


def test_time_is_of_one_device(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, 0.8, 100, method="single", seed=seed)
    write(tmp_path, 0.7, 100, regime="within", device="another")
    with figure.style():
        drawn = {name.partition("/")[2]: (caption, drawing) for name, caption, drawing in ps.figures(read(tmp_path))}
    for name in ("cost", "throughput"):
        caption, drawing = drawn[name]
        assert "Measured on cpu; runs on other devices are left out." in caption and "n = 3 seeds" in caption
        drawn_in = {line.get_color() for ax in drawing.axes for line in ax.lines if len(line.get_xdata())}
        assert ps.ARMS["whole"].colour not in drawn_in


def test_every_seed_is_drawn_with_its_mean_and_interval(results: Path) -> None:
    cells = ps.cells(only(results))
    with figure.style():
        ax = ps.draw_cells(cells, figure.new_figure(3, 3).add_subplot(), measure="test_accuracy")
    dots = [line for line in ax.lines if len(line.get_xdata()) == 4]
    assert len(dots) == len(cells)
    assert dots[0].get_xdata() == pytest.approx([80, 81, 83, 82])
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["references", "single network"]
    mean = next(line for line in ax.lines if line.get_marker() == "D" and len(line.get_xdata()) == 1)
    assert mean.get_xdata() == pytest.approx([81.5])
    (ends,) = ax.collections[0].get_segments()
    interval = stats.ttest_1samp([80, 81, 83, 82], 0).confidence_interval(0.95)
    assert ends[:, 0] == pytest.approx(tuple(interval))


def test_densities_are_drawn_for_each_seed_and_their_mean() -> None:
    densities = pd.DataFrame(
        {"run_id": ["a"] * 3 + ["b"] * 3, "option": "all", "x": [-1, 0, 1] * 2, "density": [0, 1, 0, 0, 3, 0]}
    )
    with figure.style():
        ax = ps.draw_weights(densities, figure.new_figure(3, 3).add_subplot())
    thin, mean = [line for line in ax.lines if line.get_linewidth() == 0.4], ax.lines[-1]
    assert len(thin) == 2
    assert max(mean.get_ydata()) == pytest.approx(2)


def test_figures_are_the_same_bytes_on_any_day(tmp_path: Path) -> None:
    write(tmp_path, 0.8, 100, method="single")
    digests = []
    for day in ("a", "b"):
        with figure.style():
            name, _, drawing = next(ps.figures(read(tmp_path)))
            files = figure.save(drawing, tmp_path / day / name)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]


def test_it_is_an_experiment_and_imports_no_torch() -> None:
    code = "import sys; from plots import parameter_sharing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    assert "parameter_sharing" in experiments()


def test_the_scheme_has_as_many_weights_as_the_regime_and_intensity_leave():
    def weights(regime, intensity):
        members = 1 if regime == "within" else 3
        return len({ps.weights_of(regime, intensity, layer, member) for layer in range(5) for member in range(members)})

    assert [weights("within", intensity) for intensity in ("none", "early", "deep", "all")] == [5, 4, 4, 3]
    assert [weights("between", intensity) for intensity in ("none", "early", "deep", "all")] == [15, 11, 11, 7]
    assert [weights("both", intensity) for intensity in ("none", "early", "deep", "all")] == [15, 10, 10, 5]
