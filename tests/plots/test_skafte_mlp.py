"""Numbers before pictures: arms, paired differences and their intervals against known ones; every seed and member drawn."""

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
from plots import skafte_mlp as sk
from plots.__main__ import experiments
from plots.reading import usable_results
from plots.statistics import difference
from scripts.skafte_mlp import CURVE, Config

ROOT = Path(__file__).parents[2]
X = np.linspace(0, 10, 5)
MINUS, TIMES, STEPS = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "5 \N{MULTIPLICATION SIGN} steps"
METHODS = ["single network", f"single network, {STEPS}", "deep ensemble", "BatchEnsemble"]


def cells(**values: object) -> dict[str, str]:
    return {name: " ".join(f"{value:g}" for value in np.atleast_1d(given)) for name, given in values.items()}  # type: ignore[call-overload]


def write(folder: Path, nll: float, **fields: object) -> Path:
    """Write a run as the script does: this NLL inside, 1 and 2 more in the gap and outside, an RMSE of twice as much."""
    config = dataclasses.replace(Config(), **fields)  # type: ignore[arg-type]
    path = result_path(folder, "skafte_mlp", run_id(config))
    head = {"run_id": path.stem, "experiment": "skafte_mlp"}
    head |= {name: value for name, value in dataclasses.asdict(config).items() if name not in Config.INCIDENTAL}
    facts = {
        "parameters": 100, "device_name": "cpu", "number_format": "float32", "torch": "2", "data_source": "here", "commit": "",
        "dirty": "", "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    members = [*range(1 if config.method == "single" else config.ensemble_size), None]
    rows: list[dict[str, object]] = []
    for more, split in enumerate(sk.REGIONS):
        for member in members:
            scores = {"rmse": 2 * (nll + more), "nll": nll + more, "spread": None}
            scores |= {"coverage_50": 0.4, "coverage_90": 0.8, "coverage_95": 0.9}
            if member is None:
                scores |= {"spread": 0.5 if len(members) > 2 else None, "rmse_of_truth": 1.0, "nll_of_truth": 0.5}
            rows.append({"split": split, "member": member, **scores})
    if config.seed == 0:
        rows += [{"split": "curve", "member": m, **cells(x=X, mean=X + m, sd=X)} for m in members[:-1]]  # type: ignore[operator]
        rows.append({"split": "curve", **cells(x=X, mean=X, sd=X, lower=X - 2, upper=X + 2)})
        rows += [{"split": split, **cells(x=X, mean=X, sd=1 + X)} for split in ("truth", "points")]
        rows += [{"split": "gap", **cells(x=[2, 4])}, {"split": "outside", **cells(x=[8, 10])}]
    columns = ("split", "member", *sk.METRICS, "rmse_of_truth", "nll_of_truth", *CURVE)
    written = [{name: row.get(name) for name in columns} for row in rows]
    write_run(path, [{**head, "epoch": config.epochs, **row, "seconds": 0.5, **facts} for row in written])
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Every method in both regimes, four seeds of one setting; two single networks also of another."""
    for seed, up in enumerate((0.0, 0.1, 0.3, 0.2)):
        for name in ("repeat", "split"):
            write(tmp_path, 3.0 + up, method="single", regime=name, seed=seed, variance="constant")
        for regime, lower in (("repeat", 0.1), ("split", 0.2)):
            write(tmp_path, 2.1 + up - lower, method="single", regime=regime, seed=seed)
            write(tmp_path, 2.2 + 3 * up, method="single", regime=regime, seed=seed, epochs=1250)
            write(tmp_path, 2.0 + up - lower, method="deep_ensemble", regime=regime, seed=seed)
            write(tmp_path, 2.0 + 2 * up - lower, method="batchensemble", regime=regime, seed=seed)
    return tmp_path


def read(folder: Path) -> pd.DataFrame:
    return usable_results(folder, "skafte_mlp", sk.CONFIG, sk.METRICS)[0]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "plots", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_a_setting_is_the_whole_configuration_but_what_is_varied() -> None:
    assert set(sk.CONFIG) == {field.name for field in dataclasses.fields(Config)} - set(Config.INCIDENTAL)


def test_settings_hold_the_methods_in_order_and_separate_what_differs(results: Path) -> None:
    write(results, 2.0, method="single", learning_rate=0.01)
    found = {setting.name: [arm.label for arm in setting.arms] for setting in sk.settings(read(results))}
    assert found == {
        "dtu-constant": ["single network, repeat", "single network, split"],
        "dtu-predicted-learning_rate_0.003": [
            f"{label}, {regime}" for label in METHODS for regime in ("repeat", "split")
        ],
        "dtu-predicted-learning_rate_0.01": ["single network, split"],
    }


def test_a_single_network_trained_for_a_multiple_of_the_steps_belongs_and_for_another_number_does_not(
    tmp_path: Path,
) -> None:
    write(tmp_path, 2.0, epochs=100)
    for epochs in (100, 150, 300, 450):
        write(tmp_path, 2.0, method="single", epochs=epochs)
    found = {setting.name: [arm.label for arm in setting.arms] for setting in sk.settings(read(tmp_path))}
    assert found == {
        "dtu-predicted-epochs_100": [
            "single network, split", "single network, 3 \N{MULTIPLICATION SIGN} steps, split", "BatchEnsemble, split",
        ],
        "dtu-predicted-epochs_150": [
            "single network, split", "single network, 2 \N{MULTIPLICATION SIGN} steps, split",
            "single network, 3 \N{MULTIPLICATION SIGN} steps, split",
        ],
    }  # fmt: skip


def test_members_are_named_only_where_they_differ(results: Path) -> None:
    write(results, 2.0, alpha_init=-0.5)
    (setting,) = (setting for setting in sk.settings(read(results)) if setting.name == "dtu-predicted")
    labels = [arm.label for arm in setting.arms if "BatchEnsemble" in arm.label]
    assert labels == [
        "BatchEnsemble, repeat, alpha_init 0.5", "BatchEnsemble, split, alpha_init 0.5",
        "BatchEnsemble, split, alpha_init \N{MINUS SIGN}0.5",
    ]  # fmt: skip


def test_comparisons_are_in_one_regime_with_both_single_networks_and_the_deep_ensemble(results: Path) -> None:
    setting = sk.settings(read(results))[1]
    single, longer, deep, shared = METHODS
    against = "\nagainst "
    expected = [f"{single}, split{against}{single}, repeat"]
    for regime in ("repeat", "split"):
        expected += [f"{ours}, {regime}{against}{single}, {regime}" for ours in (longer, deep, shared)]
        expected += [f"{ours}, {regime}{against}{longer}, {regime}" for ours in (deep, shared)]
        expected.append(f"{shared}, {regime}{against}{deep}, {regime}")
    assert sorted(label for label, _, _ in sk.comparisons(setting.arms)) == sorted(expected)


def test_a_longer_single_network_is_compared_with_only_as_many_members_as_it_has_times_the_steps(
    tmp_path: Path,
) -> None:
    for size in (5, 10):
        for method in ("single", "batchensemble"):
            write(tmp_path, 2.0, method=method, ensemble_size=size)
        write(tmp_path, 2.0, method="single", ensemble_size=size, epochs=1250)
    (setting,) = sk.settings(read(tmp_path))
    against = "\nagainst single network, "
    times = f"{STEPS}, split, ensemble_size "
    assert {label for label, _, _ in sk.comparisons(setting.arms)} == {
        f"single network, {times}5{against}split, ensemble_size 5",
        f"single network, {times}10{against}split, ensemble_size 10",
        f"BatchEnsemble, split, ensemble_size 5{against}split, ensemble_size 5",
        f"BatchEnsemble, split, ensemble_size 5{against}{times}5",
        f"BatchEnsemble, split, ensemble_size 10{against}split, ensemble_size 10",
    }


def test_a_paired_difference_and_its_interval_are_those_of_scipy(results: Path) -> None:
    setting = sk.settings(read(results))[1]
    arms = {arm.label: arm for arm in setting.arms}
    single, ours = arms["single network, repeat"], arms["BatchEnsemble, repeat"]
    each = np.array([0.0, 0.1, 0.3, 0.2]) - 0.1
    for split in sk.REGIONS:
        found = difference(sk.of_region(ours, split), sk.of_region(single, split), "nll")
        interval = stats.ttest_1samp(each, 0).confidence_interval(0.95)
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(interval))
        assert found.pairs == 4 and not found.shown
    table = sk.summarise_differences(setting)
    row = table[(table["methods"] == "BatchEnsemble, repeat against single network, repeat")].iloc[0]
    assert row["compared"] == "difference of RMSE (units of y)"
    assert row["inside"] == f"+0.100 ({MINUS}0.311 to +0.511)"


def test_nll_is_compared_by_the_ratio_of_excess_with_the_interval_of_its_logarithm(tmp_path: Path) -> None:
    factors = 0.5 * np.exp([-0.2, 0.1, 0.3, -0.2])  # their geometric mean is a half
    for seed, excess in enumerate((1.0, 2.0, 4.0, 8.0)):
        write(tmp_path, 0.5 + excess, method="single", seed=seed)
        write(tmp_path, 0.5 + excess * factors[seed], seed=seed)
    (setting,) = sk.settings(read(tmp_path))
    half = 3.182446 * np.sqrt((0.2**2 + 0.1**2 + 0.3**2 + 0.2**2) / 3) / 2  # the t of 3 degrees of freedom
    low, high = 0.5 * np.exp(-half), 0.5 * np.exp(half)
    row = sk.summarise_differences(setting).iloc[1]
    assert row["compared"] == "ratio of excess NLL"
    assert row["inside"] == f"**{TIMES} 0.50 ({low:.2f} to {high:.2f})**" == f"**{TIMES} 0.50 (0.34 to 0.74)**"
    with figure.style():
        ax = sk.draw_differences(
            sk.comparisons(setting.arms), figure.new_figure(3, 2).add_subplot(), split="test", measure=sk.RATIO
        )
    assert ax.get_xscale() == "log" and ax.get_xlim()[0] < factors.min() and ax.get_xlim()[1] > 1
    dots, diamond, one = ax.lines[0], *(line for line in ax.lines if line.get_marker() in ("D", "None"))
    assert dots.get_xdata() == pytest.approx(factors)
    assert diamond.get_xdata() == pytest.approx([0.5]) and list(one.get_xdata()) == [1, 1]
    (bar,) = ax.collections
    assert bar.get_segments()[0][:, 0] == pytest.approx([low, high], rel=1e-4)


def test_what_is_higher_in_nineteen_of_twenty_seeds_is_shown_though_one_of_them_makes_the_mean(tmp_path: Path) -> None:
    factors = [0.8, *np.linspace(2, 6, 18), 500.0]
    for seed, factor in enumerate(factors):
        write(tmp_path, 0.7, method="single", seed=seed)
        write(tmp_path, 0.5 + 0.2 * factor, seed=seed)
    (setting,) = sk.settings(read(tmp_path))
    single, ours = (sk.of_region(arm, "test") for arm in setting.arms)
    assert not difference(ours, single, "nll").shown
    assert sk.summarise_signs([setting])[["lower", "higher"]].iloc[0].tolist() == [0, 1]
    mean = stats.gmean(factors)
    assert sk.summarise_differences(setting)["inside"].iloc[1].startswith(f"**{TIMES} {mean:.2f} (")


def test_where_some_excess_is_not_positive_nll_is_compared_in_nats(tmp_path: Path) -> None:
    for seed in range(3):
        for variance, low in (("constant", 1.0), ("predicted", 0.45)):  # that of the truth is 0.5
            write(tmp_path, 2.0, method="single", variance=variance, seed=seed)
            write(tmp_path, low + 0.1 * seed, variance=variance, seed=seed)
    ratio, nats = joined = sk.settings(read(tmp_path))
    assert sk.compared(ratio) == ("rmse", sk.RATIO) and sk.compared(nats) == ("rmse", "nll")
    row = sk.summarise_differences(nats).iloc[1]
    assert row["compared"] == "difference of NLL (nats)"
    assert row["inside"] == f"**{MINUS}1.450 ({MINUS}1.698 to {MINUS}1.202)**"
    assert sk.summarise_signs(joined)["lower"].tolist() == [2, 2, 2]
    found = sk.findings(read(tmp_path))
    assert "in dtu-predicted, where some excess is not positive" in found["all"].sentences[0]
    assert "ratio" in found["dtu-constant"].table and "leaves 1 out" in found["dtu-constant"].sentences[-1]
    assert "leaves 1 out" not in found["dtu-predicted"].sentences[-1]
    with figure.style():
        drawn = {name: (caption, drawing) for name, caption, drawing in sk.figures(read(tmp_path))}
    caption, drawing = drawn["dtu-predicted/differences"]
    assert "ratio" not in caption and drawing.axes[3].get_xscale() == "linear"
    assert [ax.get_xlabel() for ax in drawing.axes[::3]] == [
        "difference of RMSE\n(units of y)", "difference of NLL\n(nats)",
    ]  # fmt: skip
    caption, drawing = drawn["dtu-constant/differences"]
    assert "axis of ratios is logarithmic" in caption and drawing.axes[3].get_xscale() == "log"
    assert drawing.axes[3].get_xlabel() == "ratio of excess NLL"


def test_a_zero_has_no_sign() -> None:
    assert sk._interval(np.array([-0.0001, -0.002, 0.0004]), 3, "+") == f"0.000 ({MINUS}0.002 to 0.000)"
    assert sk._interval(np.array([-0.001, np.nan, np.nan]), 2) == "0.00"


def test_two_seeds_state_no_interval(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path, 2.0 + seed, method="single", seed=seed)
        write(tmp_path, 1.0, seed=seed)
    (setting,) = sk.settings(read(tmp_path))
    ours, single = (sk.of_region(arm, "test") for arm in (setting.arms[1], setting.arms[0]))
    found = difference(ours, single, "nll")
    assert found.pairs == 2 and np.isnan(found.half) and not found.shown
    # excess of 1.5 and 2.5, and of 0.5
    assert sk.summarise_differences(setting)["inside"].tolist() == [f"{MINUS}3.000", f"{TIMES} 0.26"]
    finding = sk.findings(read(tmp_path))["dtu-predicted"]
    with figure.style():
        captions = {name: caption for name, caption, _ in sk.figures(read(tmp_path))}
    for text in (*captions.values(), *finding.sentences, finding.table):
        assert "Student" not in text and "leaves" not in text.replace("leaves the", "")
    assert "no interval is drawn of fewer than 3 paired seeds" in captions["dtu-predicted/differences"]
    assert sk.summarise_signs([setting]).empty


def test_what_has_no_seed_in_common_is_not_compared(tmp_path: Path) -> None:
    write(tmp_path, 2.0, method="single", seed=1)
    write(tmp_path, 1.0, seed=2)
    (setting,) = sk.settings(read(tmp_path))
    assert len(setting.arms) == 2 and sk.comparisons(setting.arms) == []


def test_the_table_holds_every_region_and_what_the_truth_scores(results: Path) -> None:
    table = sk.summarise_arms(sk.settings(read(results))[1])
    assert len(table) == 3 * (2 * len(METHODS) + 1)
    gap = table[table["test points"] == "in the gap"].set_index("method")
    assert gap.loc["single network, repeat", "NLL (nats)"] == "3.150 ± 0.129"
    assert gap.loc["single network, repeat", "coverage of 90 % (%)"] == "80.0 ± 0.0"
    assert gap.loc["the true distribution", "NLL (nats)"] == "0.500 ± 0.000"
    assert gap.loc["single network, repeat", "spread of members' means (units of y)"] == ""


def test_how_far_each_method_is_from_the_truth_and_where_a_difference_is_shown_join_the_settings(
    tmp_path: Path,
) -> None:
    for seed, up in enumerate((0.0, 0.1, 0.3, 0.2)):
        for variance, more in (("constant", 1.0), ("predicted", -1.0)):
            write(tmp_path, 2.0 + up, method="single", variance=variance, seed=seed)
            write(tmp_path, 2.01 + 1.1 * up + more, variance=variance, seed=seed)
    joined = sk.settings(read(tmp_path))
    table = sk.summarise_excess(joined)
    assert list(table.columns) == ["test points", "method", "dtu-constant", "dtu-predicted"] and len(table) == 3 * 2
    mean, (low, high) = 1.65, stats.ttest_1samp(1.5 + np.array([0.0, 0.1, 0.3, 0.2]), 0).confidence_interval(0.95)
    assert table.iloc[0].tolist()[:3] == ["inside", "single network, split", f"{mean:.3f} ({low:.3f} to {high:.3f})"]
    signs = sk.summarise_signs(joined)
    assert signs[["settings", "lower", "higher"]].to_numpy().tolist() == [[2, 1, 1]] * 3
    found = sk.findings(read(tmp_path))
    assert list(found) == ["all", "dtu-constant", "dtu-predicted"]
    head, *bullets = found["all"].sentences
    assert f"2 settings {TIMES} 3 regions = 6 comparisons" in head and "in nats" not in head
    assert bullets == [
        "BatchEnsemble, split: lower excess NLL than the single network, split in 3 of 6 comparisons, higher in 3."
    ]
    assert "of 2: 1 lower, 1 higher" in found["all"].table and "Drawn from 16 runs" in found["all"].provenance


def test_every_seed_is_drawn_and_n_is_in_every_caption(results: Path) -> None:
    with figure.style():
        drawn = {name: (caption, drawing) for name, caption, drawing in sk.figures(read(results))}
    names = ("predictions", "measures", "coverage", "differences", "differences_longer")
    assert {"all/nll", *(f"dtu-predicted/{name}" for name in names)} <= set(drawn)
    for name, (caption, _) in drawn.items():
        assert ("n = 1" if name.endswith("predictions") else f"n = 4 {'paired ' * ('diff' in name)}seeds") in caption
        assert "Setting" in caption and "50 training points" in caption
    ax = drawn["dtu-predicted/measures"][1].axes[3]  # excess NLL inside
    assert ax.get_xscale() == "log"
    dots = [line for line in ax.lines if len(line.get_xdata()) == 4]
    assert len(dots) == 2 * len(METHODS)
    assert sorted(dots[0].get_xdata()) == pytest.approx([1.5, 1.6, 1.7, 1.8])
    assert {line.get_markerfacecolor() == "white" for line in dots[::2]} == {True}  # repeat
    assert {line.get_markerfacecolor() == "white" for line in dots[1::2]} == {False}
    panels = drawn["all/nll"][1].axes
    assert [len([line for line in ax.lines if len(line.get_xdata()) == 4]) for ax in panels] == [2] * 3 + [8] * 3
    for ax in panels:  # no dot is cut
        low, high = ax.get_xlim()
        assert all(low < x < high for line in ax.lines if len(line.get_xdata()) == 4 for x in line.get_xdata())


def test_an_excess_that_is_not_positive_everywhere_has_no_logarithmic_axis(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, 0.4 + 0.1 * seed, seed=seed)
        write(tmp_path, 2.0 + 0.1 * seed, seed=seed, variance="constant")
    with figure.style():
        drawn = {name: (caption, drawing) for name, caption, drawing in sk.figures(read(tmp_path))}
    caption, drawing = drawn["dtu-predicted/measures"]
    assert "logarithmic" not in caption and drawing.axes[3].get_xscale() == "linear"
    assert "logarithmic" in drawn["dtu-constant/measures"][0]
    caption, drawing = drawn["all/nll"]
    assert "logarithmic" not in caption
    for ax in drawing.axes:
        assert ax.get_xscale() == "linear" and ax.get_xlim()[0] < min(line.get_xdata().min() for line in ax.lines)


def test_predictions_show_each_member_the_band_the_points_and_the_gap(results: Path) -> None:
    df = read(results)
    run = df.loc[(df["method"] == "batchensemble") & (df["seed"] == 0), "run_id"].iloc[0]
    with figure.style():
        ax = sk.draw_predictions(
            df[df["run_id"] == run], figure.new_figure(3, 2).add_subplot(), look=figure.LOOKS["single"]
        )
    members = [line for line in ax.lines if line.get_linewidth() == 0.5]
    assert sorted(line.get_ydata()[0] for line in members) == [0, 1, 2, 3, 4]
    (dots,) = (line for line in ax.lines if line.get_marker() == "o")
    assert (dots.get_xdata() == X).all()
    (band,) = ax.collections
    assert (band.get_datalim(ax.transData).y0, band.get_datalim(ax.transData).y1) == (-2, 12)
    assert [patch.get_x() for patch in ax.patches] == [2, 8]


def test_figures_are_the_same_bytes_on_any_day(results: Path, tmp_path: Path) -> None:
    digests = []
    for day in ("a", "b"):
        with figure.style():
            name, _, drawing = next(sk.figures(read(results)))
            files = figure.save(drawing, tmp_path / day / name)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]


def test_the_command_draws_what_is_there_and_names_what_is_not(tmp_path: Path) -> None:
    write(tmp_path, 2.0, method="single", seed=1)
    cut = write(tmp_path, 2.0, method="single", seed=2)
    cut.write_bytes(cut.read_bytes()[:-40])
    done = command("skafte_mlp", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"warning: left out {cut}: cut short")
    folder = tmp_path / "figures" / "skafte_mlp" / "dtu-predicted"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", *(f"{name}.{kind}" for name in ("measures", "coverage") for kind in ("png", "pdf")),
    }  # fmt: skip
    assert "| inside | single network, split | 1 | 4.000 | 2.000 |" in (folder / "README.md").read_text()


def test_it_is_an_experiment_and_imports_no_torch() -> None:
    code = "import sys; from plots import skafte_mlp; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    assert "skafte_mlp" in experiments()
