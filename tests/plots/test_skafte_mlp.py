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
from scripts.skafte_mlp import CURVE, Config

ROOT = Path(__file__).parents[2]
X = np.linspace(0, 10, 5)


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
    members = [*range(config.ensemble_size), None]
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
    """Every method in both regimes, four seeds of one setting; the single network also of another."""
    for seed, up in enumerate((0.0, 0.1, 0.3, 0.2)):
        write(tmp_path, 2.0 + up, method="single", seed=seed)
        write(tmp_path, 3.0 + up, method="single", seed=seed, variance="constant")
        for regime, lower in (("repeat", 0.1), ("split", 0.2)):
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
        "dtu-constant": ["single network"],
        "dtu-predicted-learning_rate_0.003": [
            "single network", "deep ensemble, repeat", "deep ensemble, split", "BatchEnsemble, repeat",
            "BatchEnsemble, split",
        ],
        "dtu-predicted-learning_rate_0.01": ["single network"],
    }  # fmt: skip


def test_members_are_named_only_where_they_differ(results: Path) -> None:
    write(results, 2.0, alpha_init=-0.5)
    (setting,) = (setting for setting in sk.settings(read(results)) if setting.name == "dtu-predicted")
    labels = [arm.label for arm in setting.arms if "BatchEnsemble" in arm.label]
    assert labels == [
        "BatchEnsemble, repeat, alpha_init 0.5", "BatchEnsemble, split, alpha_init 0.5",
        "BatchEnsemble, split, alpha_init \N{MINUS SIGN}0.5",
    ]  # fmt: skip


def test_comparisons_are_in_one_regime_and_less_the_single_network(results: Path) -> None:
    setting = sk.settings(read(results))[1]
    minus = "\n\N{MINUS SIGN} "
    assert [label for label, _, _ in sk.comparisons(setting.arms)] == [
        f"deep ensemble, repeat{minus}single network", f"deep ensemble, split{minus}single network",
        f"BatchEnsemble, repeat{minus}single network", f"BatchEnsemble, split{minus}single network",
        f"BatchEnsemble, repeat{minus}deep ensemble, repeat", f"BatchEnsemble, split{minus}deep ensemble, split",
    ]  # fmt: skip


def test_a_paired_difference_and_its_interval_are_those_of_scipy(results: Path) -> None:
    setting = sk.settings(read(results))[1]
    single, ours = setting.arms[0], setting.arms[3]
    each = np.array([0.0, 0.1, 0.3, 0.2]) - 0.1
    for split in sk.REGIONS:
        found = sk.difference(ours, single, split, "nll")
        interval = stats.ttest_1samp(each, 0).confidence_interval(0.95)
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(interval))
        assert found.pairs == 4 and not found.shown
        assert sk.difference(ours, single, split, "rmse").mean == pytest.approx(2 * each.mean())
    table = sk.summarise_differences(setting)
    row = table[(table["difference"] == "BatchEnsemble, repeat \N{MINUS SIGN} single network")].iloc[1]
    assert row["of"] == "NLL (nats)" and row["inside"].startswith("+0.050 (\N{MINUS SIGN}0.15")


def test_two_seeds_state_no_interval(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path, 2.0 + seed, method="single", seed=seed)
        write(tmp_path, 1.0, seed=seed)
    (setting,) = sk.settings(read(tmp_path))
    found = sk.difference(setting.arms[1], setting.arms[0], "test", "nll")
    assert found.pairs == 2 and np.isnan(found.half) and not found.shown
    assert sk.summarise_differences(setting)["inside"].tolist() == ["\N{MINUS SIGN}3.000", "\N{MINUS SIGN}1.500"]


def test_the_table_holds_every_region_and_what_the_truth_scores(results: Path) -> None:
    table = sk.summarise_arms(sk.settings(read(results))[1])
    assert len(table) == 3 * (5 + 1)
    gap = table[table["test points"] == "in the gap"].set_index("method")
    assert gap.loc["single network", "NLL (nats)"] == "3.150 ± 0.129"
    assert gap.loc["single network", "coverage of 90 % (%)"] == "80.0 ± 0.0"
    assert gap.loc["the true distribution", "NLL (nats)"] == "0.500 ± 0.000"
    assert gap.loc["single network", "spread of members' means (units of y)"] == ""


def test_every_seed_is_drawn_and_n_is_in_every_caption(results: Path) -> None:
    with figure.style():
        drawn = {name: (caption, drawing) for name, caption, drawing in sk.figures(read(results))}
    assert {f"dtu-predicted/{name}" for name in ("predictions", "measures", "coverage", "differences")} <= set(drawn)
    for name, (caption, _) in drawn.items():
        assert ("n = 1" if name.endswith("predictions") else "n = 4 seeds") in caption
        assert "Setting: generator dtu, 50 training points" in caption
    ax = drawn["dtu-predicted/measures"][1].axes[3]  # NLL inside
    dots = [line for line in ax.lines if len(line.get_xdata()) == 4]
    assert len(dots) == 5
    assert sorted(dots[0].get_xdata()) == pytest.approx([2.0, 2.1, 2.2, 2.3])


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
    assert "| inside | single network | 1 | 4.000 | 2.000 |" in (folder / "README.md").read_text()


def test_it_is_an_experiment_and_imports_no_torch() -> None:
    code = "import sys; from plots import skafte_mlp; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    assert "skafte_mlp" in experiments()
