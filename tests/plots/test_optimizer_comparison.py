"""Numbers before pictures: what validation chooses and from what, IVON at its mean and averaged, paired intervals, times."""

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from batchens.grid import run_id
from batchens.results import result_path, write_run
from plots import figure
from plots import optimizer_comparison as oc
from plots.__main__ import experiments
from plots.image_runs import draw_reliability, summarise_epochs, summarise_reliability
from plots.reading import usable_results
from scripts.optimizer_comparison import Config

ROOT = Path(__file__).parents[2]
SMALL = Config(
    method="batchensemble", optimizer="ivon", learning_rate=0.1, epochs=2, batch_size=64, posterior_samples=16
)
MINUS = "\N{MINUS SIGN}"
RATES = {"sgd": (0.1, 0.3), "adam": (0.003, 0.01), "ivon": (0.1, 0.3, 1.0)}


def write(
    folder: Path,
    validation: Sequence[float],
    test: float,
    *,
    nll: float | None = None,
    posterior: float | None = None,
    seconds: float = 2.0,
    device: str = "cpu",
    **fields: object,
) -> None:
    """Write a run as the script does: the ensemble's accuracy after each epoch and on test, an NLL of what is missing to 1.

    Args:
        nll: another NLL, on validation.
        posterior: accuracy on test averaged over samples of the posterior, on validation it is 0.01 less.
    """
    config = dataclasses.replace(SMALL, epochs=len(validation), **fields)  # type: ignore[arg-type]
    path = result_path(folder, "optimizer_comparison", run_id(config))
    head = {"run_id": path.stem, "experiment": "optimizer_comparison"}
    head |= {name: value for name, value in dataclasses.asdict(config).items() if name not in Config.INCIDENTAL}
    facts = {
        "parameters": 100, "device_name": device, "number_format": "float32", "torch": "2", "data_source": "here",
        "commit": "", "dirty": "", "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    members, last, rows = range(config.ensemble_size), len(validation), []

    def scores(accuracy: float, nll: float | None = None) -> dict[str, float]:
        return {"accuracy": accuracy, "nll": 1 - accuracy if nll is None else nll, "brier": 0.1, "ece": 0.02}

    for epoch, accuracy in enumerate(validation, 1):
        rows += [
            {"epoch": epoch, "split": "train", "member": m, "accuracy": 0.5 + 0.1 * m, "nll": 1 / epoch}
            for m in members
        ]
        for split in ("validation", "test")[: 1 + (epoch == last)]:
            found = scores(accuracy, nll) if split == "validation" else scores(test)
            rows += [{"epoch": epoch, "split": split, "member": m, **found} for m in members]
            rows.append({"epoch": epoch, "split": split, **found})
    rows.append({"epoch": last, "split": "reliability", "x": "0.5 nan 0.9", "y": "0.4 nan 1", "n": "0.2 0 0.8"})
    if posterior is not None:
        rows.append({"epoch": last, "split": "validation_posterior", **scores(posterior - 0.01)})
        rows.append({"epoch": last, "split": "test_posterior", **scores(posterior), "disagreement": 0.3})
    columns = (
        "epoch", "split", "member", "accuracy", "nll", "brier", "ece", "disagreement", "epistemic", *"xyn", "seconds",
    )  # fmt: skip
    write_run(
        path, [{**head, **{name: row.get(name) for name in columns}, "seconds": seconds, **facts} for row in rows]
    )


UPS = (0.0, 0.01, 0.03)  # of the seeds
OWN = {"sgd": (0.0, 0.0, 0.0), "adam": (0.01, 0.02, 0.0), "ivon": (0.0, 0.01, 0.01)}
AVERAGED = (0.0, 0.005, 0.01)


def write_single(folder: Path) -> None:
    """Write three seeds of each optimizer at its rates; validation likes the second rate most, test the largest."""
    for optimizer, rates in RATES.items():
        for i, rate in enumerate(rates):
            for seed, up in enumerate(UPS):
                averaged = 0.75 + up + AVERAGED[seed] if optimizer == "ivon" else None
                well = 0.80 + up + OWN[optimizer][seed] - 0.05 * abs(i - 1)
                write(
                    folder, (0.6, well), 0.70 + up + OWN[optimizer][seed] + 0.02 * i, method="single", seed=seed,
                    optimizer=optimizer, learning_rate=rate, posterior=averaged,
                )  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_single(tmp_path)
    return tmp_path


def read(folder: Path) -> pd.DataFrame:
    return usable_results(folder, "optimizer_comparison", oc.CONFIG)[0]


def arms(folder: Path) -> dict[str, oc.Arm]:
    """Return the arms of the one setting, by method and name, of the single network by name alone."""
    [setting] = oc.settings(read(folder))
    return {
        arm.name if arm.method == "single network" else f"{arm.method}, {arm.name}": arm for arm in oc.arms(setting)
    }


def test_a_setting_is_the_whole_configuration_but_what_is_varied(results: Path) -> None:
    fields = {field.name for field in dataclasses.fields(Config)} - set(Config.INCIDENTAL)
    assert set(oc.CONFIG) == fields and len(oc.CONFIG) == len(fields)
    write(results, (0.6, 0.7, 0.8), 0.7, method="single", optimizer="sgd")
    assert [setting.name for setting in oc.settings(read(results))] == ["digits-cnn", "digits-cnn-epochs_3"]


def test_the_rate_is_chosen_on_validation_where_test_disagrees(results: Path) -> None:
    found = arms(results)
    runs = found["ivon"].rates
    assert runs.groupby("learning_rate")["test_accuracy"].mean().idxmax() == 1.0
    assert found["ivon"].rate == 0.3
    assert found["ivon"].runs["candidates"].tolist() == [3, 3, 3]
    assert found["ivon"].runs["test_accuracy"].tolist() == pytest.approx([72, 74, 76])


def test_of_equal_accuracies_the_lower_nll_on_validation_is_chosen(tmp_path: Path) -> None:
    for rate, nll in ((0.1, 0.5), (0.3, 0.4), (1.0, 0.6)):
        write(tmp_path, (0.5, 0.8), 0.7, nll=nll, method="single", optimizer="sgd", learning_rate=rate)
    assert arms(tmp_path)["sgd"].rate == 0.3


def test_an_optimum_at_the_edge_of_the_grid_is_said_to_be_one(results: Path) -> None:
    write(results, (0.6, 0.8), 0.7, method="deep_ensemble", ensemble_size=2, optimizer="adam", learning_rate=0.01)
    edges = {name: arm.edge for name, arm in arms(results).items()}
    assert edges == {
        "sgd": "largest", "adam": "largest", "ivon": "", "ivon_posterior": "", "deep ensemble of 2, adam": "only",
    }  # fmt: skip
    sentences = oc.findings(read(results))["digits-cnn"].sentences
    assert (
        "Chosen at the edge of the rates that were tried, so that a better one may lie beyond: SGD 0.3, the largest of 2 "
        "(single network); Adam 0.01, the largest of 2 (single network)."
    ) in sentences
    assert "Only one rate was tried, so that none was chosen: Adam 0.01 (deep ensemble of 2)." in sentences


def test_a_rate_with_fewer_seeds_is_named_and_not_chosen(results: Path) -> None:
    for seed in range(2):  # the third diverged
        write(results, (0.9, 0.99), 0.99, method="single", optimizer="sgd", learning_rate=1.0, seed=seed)
    for seed in range(3):
        write(results, (0.6, 0.7), 0.7, method="deep_ensemble", ensemble_size=2, optimizer="sgd", seed=seed)
    found = arms(results)
    assert found["sgd"].rate == 0.3
    assert found["sgd"].runs["candidates"].unique().tolist() == [2]
    assert found["sgd"].edge == ""  # 1 was tried
    assert oc.lacking(oc.settings(read(results))[0].runs) == [
        "single network, SGD, learning rate 1 (2 of 3 seeds)",
        "deep ensemble of 2, SGD, learning rate 0.3 (0 of 3 seeds)",
        "deep ensemble of 2, SGD, learning rate 1 (0 of 3 seeds)",
    ]
    finding = oc.findings(read(results))["digits-cnn"]
    assert any(
        "could not be chosen: single network, SGD, learning rate 1 (2 of 3 seeds);" in s for s in finding.sentences
    )


def test_posterior_rows_are_an_arm_of_their_own_of_the_same_runs(results: Path) -> None:
    found = arms(results)
    mean, averaged = found["ivon"].runs, found["ivon_posterior"].runs
    assert mean["run_id"].tolist() == averaged["run_id"].tolist()
    assert mean["test_accuracy"].tolist() == pytest.approx([72, 74, 76])
    assert averaged["test_accuracy"].tolist() == pytest.approx([75, 76.5, 79])
    assert mean["validation_accuracy"].tolist() == pytest.approx([80, 82, 84])
    assert averaged["validation_accuracy"].tolist() == pytest.approx([74, 75.5, 78])
    assert averaged["seconds"].tolist() == mean["seconds"].tolist() == [4, 4, 4]
    assert "ivon_posterior" not in set(oc.summarise_chosen_epochs(read(results), list(found.values()))["arm"])


def test_the_posterior_does_not_choose(tmp_path: Path) -> None:
    write(tmp_path, (0.5, 0.8), 0.7, posterior=0.6, method="single", learning_rate=0.1)
    write(tmp_path, (0.5, 0.7), 0.8, posterior=0.9, method="single", learning_rate=0.3)
    assert {name: arm.rate for name, arm in arms(tmp_path).items()} == {"ivon": 0.1, "ivon_posterior": 0.1}


def test_differences_pair_seeds_with_the_interval_of_a_paired_t_test(results: Path) -> None:
    write(results, (0.6, 0.99), 0.1, method="single", optimizer="sgd", learning_rate=0.3, seed=7)  # without a partner
    pairs = {pair.label: pair for pair in oc.comparisons(list(arms(results).values()))}
    assert list(pairs) == [
        f"Adam {MINUS} SGD", f"IVON at the mean {MINUS} SGD", f"IVON averaged {MINUS} SGD",
        f"IVON averaged {MINUS} IVON at the mean",
    ]  # fmt: skip
    pair = pairs[f"Adam {MINUS} SGD"]
    known = stats.ttest_rel([73, 75, 75], [72, 73, 75]).confidence_interval(0.95)
    found = pair.difference("test_accuracy")
    assert (found.mean, found.pairs) == (pytest.approx(1.0), 3)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(known))
    averaged = pairs[f"IVON averaged {MINUS} IVON at the mean"].difference("test_nll")
    assert averaged.mean == pytest.approx(np.mean([-0.03, -0.025, -0.03]))


def test_arms_are_compared_within_a_method(results: Path) -> None:
    for seed in range(3):
        write(results, (0.6, 0.8), 0.9, method="deep_ensemble", ensemble_size=2, optimizer="adam", seed=seed)
    pairs = oc.comparisons(list(arms(results).values()))
    assert {(pair.ours.method, pair.other.method) for pair in pairs} == {("single network", "single network")}


def curve(run: str, arm: str, accuracies: Sequence[float], seconds: float = 2.0, device: str = "cpu") -> pd.DataFrame:
    epochs = np.arange(1, len(accuracies) + 1)
    facts = {"run_id": run, "method": "single network", "arm": arm, "seed": int(run[-1]), "device": device}
    return pd.DataFrame(
        facts | {"epoch": epochs, "epochs": len(epochs), "validation_accuracy": accuracies, "elapsed": seconds * epochs}
    )


CURVES = pd.concat(
    [
        curve("sgd0", "sgd", [60, 79, 90]),
        curve("sgd1", "sgd", [74, 81, 92]),
        curve("ivon0", "ivon", [50, 77, 82], 3.0),
        curve("ivon1", "ivon", [50, 76, 78], 3.0),
    ],
    ignore_index=True,
)


def test_levels_are_shares_of_what_the_worst_optimizer_reaches() -> None:
    # IVON's mean of 82 and 78: 72, 76 and 79.2 %
    assert oc.levels_to_reach(CURVES) == [72.0, 76.0, 79.2]


def test_a_level_is_reached_at_the_first_epoch_that_has_it_or_not_at_all() -> None:
    found = oc.summarise_convergence(CURVES, [72.0, 76.0, 79.2]).set_index(["run_id", "level"])
    assert found.loc["sgd0", "epoch"].tolist() == [2, 2, 3]
    assert found.loc["sgd1", "epoch"].tolist() == [1, 2, 2]
    assert found.loc["sgd1", "elapsed"].tolist() == [2, 4, 4]
    assert found.loc["ivon0", "elapsed"].tolist() == [6, 6, 9]
    assert found.loc["ivon1", "epoch"].tolist()[:2] == [2, 2]  # 76 is there at 76
    assert found.loc[("ivon1", 79.2)][["epoch", "elapsed"]].isna().all()
    table = oc.summarise_convergence_in_words({"single network": found.reset_index()}, "cpu").set_index("optimizer")
    assert table.loc["SGD"].tolist() == [
        "single network", "72.0 %: 1.5 ± 0.7 epochs, 3.00 ± 1.41 s", "76.0 %: 2.0 ± 0.0 epochs, 4.00 ± 0.00 s",
        "79.2 %: 2.5 ± 0.7 epochs, 5.00 ± 1.41 s",
    ]  # fmt: skip
    assert table.loc["IVON at the mean", "99 % of the worst"] == "79.2 %: reached by 1 of 2 seeds"


def test_a_run_that_does_not_get_there_is_drawn_as_not_reached_and_leaves_no_mean() -> None:
    reached = oc.summarise_convergence(CURVES, [72.0, 76.0, 79.2])
    with figure.style():
        ax = oc.draw_convergence(reached, figure.new_figure(3, 2).add_subplot(), measure="epoch")
    crosses = [line for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [len(line.get_xdata()) for line in crosses] == [1]
    assert crosses[0].get_ydata()[0] > reached["epoch"].max()
    assert [text.get_text() for text in ax.texts] == ["not reached"]
    means = [line.get_ydata() for line in ax.lines if line.get_markersize() == 4.6 and len(line.get_xdata())]
    assert np.array(means) == pytest.approx(np.array([[1.5, 2, 2.5], [2, 2, np.nan]]), nan_ok=True)


def test_seconds_are_of_one_device_and_epochs_of_all() -> None:
    curves = pd.concat([CURVES, curve("sgd2", "sgd", [74, 80, 91], 100.0, "cuda")])
    found = oc.summarise_convergence(curves, [72.0])
    assert oc._time_in_words(found[found["arm"] == "sgd"], "cpu") == "1.3 ± 0.6 epochs, 3.00 ± 1.41 s"
    assert oc._time_in_words(found[found["arm"] == "sgd"]) == "1.3 ± 0.6 epochs"


def test_the_table_leaves_out_seconds_of_other_devices(tmp_path: Path) -> None:
    for seed in range(3):
        device = "cuda" if seed == 2 else "cpu"
        write(tmp_path, (0.5, 0.8), 0.7, method="single", optimizer="sgd", seed=seed, seconds=9.0**seed, device=device)
    every = list(arms(tmp_path).values())
    assert oc.summarise_arms(every).loc[0, ["seeds", "training time (s)"]].tolist() == ["3", "10.0 ± 11.3"]  # 2 and 18
    finding = oc.findings(read(tmp_path))["digits-cnn"]
    assert "Measured on cpu; runs on other devices are left out" in finding.table
    assert "by up to a factor of 9.0" in finding.table  # the load of the machine stands beside the seconds
    assert not any(" s;" in sentence or " s." in sentence for sentence in finding.sentences)


def test_the_load_of_the_machine_is_judged_by_all_rates(tmp_path: Path) -> None:
    for rate, seconds, well in ((0.1, 2.0, 0.8), (0.3, 6.0, 0.7)):
        for seed in range(2):
            write(
                tmp_path,
                (0.5, well),
                0.7,
                method="single",
                optimizer="sgd",
                learning_rate=rate,
                seed=seed,
                seconds=seconds,
            )
    assert "by up to a factor of 3.0" in oc.findings(read(tmp_path))["digits-cnn"].table


def test_findings_say_what_is_shown_and_what_is_not(results: Path) -> None:
    finding = oc.findings(read(results))["digits-cnn"]
    head, single, *rest = finding.sentences
    assert head.startswith("digits, cnn, 2 epochs, 3 seeds: test accuracy") and "never on test" in head
    assert "averaged over 16 samples" in head
    assert single.startswith(
        "Single network: SGD 73.33 ± 1.53 %, 0.267 ± 0.015 nats, 2.00 ± 0.00 % (learning rate 0.3, best of 2); Adam"
    )
    adam, averaged = (
        next(
            sentence for sentence in rest if sentence.startswith(f"{name} {MINUS} SGD, single network: test accuracy ")
        )
        for name in ("Adam", "IVON averaged")
    )
    assert "+3.50 (+2.26 to +4.74) points; test NLL" in averaged and "points, no difference is shown; test NLL" in adam
    assert finding.differences in finding.table and "**+3.50 (+2.26 to +4.74)**" in finding.differences
    # SGD ends with 80, 81 and 83 %, of whose mean 99 % are 80.5
    assert any("ends with. Single network (80.5 %): SGD reached by 2 of 3 seeds, Adam" in sentence for sentence in rest)
    assert rest[-1].startswith("All of this is at one budget of 2 epochs, at whose end the learning rate is 0.")
    assert finding.table.count("| --- |") >= 3


def test_one_seed_states_no_spread_and_no_verdict(tmp_path: Path) -> None:
    for optimizer in RATES:
        write(tmp_path, (0.5, 0.8), 0.7, method="single", optimizer=optimizer)
    finding = oc.findings(read(tmp_path))["digits-cnn"]
    assert "±" not in "".join(finding.sentences)
    assert any(sentence.startswith("No two optimizers have three seeds in common") for sentence in finding.sentences)
    with figure.style():
        captions = {name.partition("/")[2]: caption for name, caption, _ in oc.figures(read(tmp_path))}
    for name in ("methods", "differences"):
        assert "95 %" not in captions[name] and "n = 1 " in captions[name]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Figure]]:
    """Caption and figure of a study with two methods, by name."""
    folder = tmp_path_factory.mktemp("whole")
    write_single(folder)
    for optimizer, rates in RATES.items():
        for seed in range(3):
            late = 0.9 - 0.01 * seed
            write(folder, (0.7, late), 0.85, optimizer=optimizer, learning_rate=rates[0], seed=seed, ensemble_size=2)
    with figure.style():
        return {name.removeprefix("digits-cnn/"): rest for name, *rest in oc.figures(read(folder))}  # type: ignore[misc]


def test_every_kind_of_figure_is_there_with_n_and_how_it_was_chosen(drawn: dict[str, tuple[str, Figure]]) -> None:
    curves = [f"curves_{name}" for name in ("train_nll", "validation_nll", "train_accuracy", "validation_accuracy")]
    rates = [f"learning_rates_{name}" for name in ("validation_accuracy", "validation_nll")]
    assert list(drawn) == [*curves, *rates, "methods", "differences", "convergence", "members", "reliability"]
    for caption, _ in drawn.values():
        assert "n = 3 " in caption and "Setting: digits (here)" in caption and "never on test" in caption
    assert "at a sample of its posterior in each step" in drawn["curves_train_nll"][0]
    panels = drawn["reliability"][1].axes
    assert [ax.get_title(loc="left") for ax in panels] == ["single network", "BatchEnsemble of 2"]


def test_chosen_rates_are_filled_and_each_optimizer_has_its_own_scale(drawn: dict[str, tuple[str, Figure]]) -> None:
    axes = drawn["learning_rates_validation_accuracy"][1].axes
    ticks = [
        [axis.get_major_formatter()(at) for at in axis.get_majorticklocs()] for axis in (ax.xaxis for ax in axes[3:])
    ]
    assert ticks == [["0.1", "0.3"], ["0.003", "0.01"], ["0.1", "0.3", "1"]]
    filled = [[line.get_xdata()[0] for line in ax.lines if line.get_markersize() == 6] for ax in axes[:3]]  # type: ignore[index]
    assert filled == [[0.3], [0.01], [0.3, pytest.approx(0.3 * oc.ASIDE)]]


def test_what_diverged_is_drawn_at_the_edge_of_an_axis_that_resolves_the_rest(tmp_path: Path) -> None:
    for rate, nll in ((0.1, 0.05), (0.3, 0.5), (1.0, 1e7)):
        for seed in range(3 - (rate == 1.0)):
            write(tmp_path, (0.5, 0.9), 0.7, nll=nll, method="single", optimizer="sgd", learning_rate=rate, seed=seed)
    with figure.style():
        _, (_, caption, drawing) = oc._rate_figures(list(arms(tmp_path).values()), read(tmp_path))
        drawing.canvas.draw()
    [ax] = drawing.axes
    low, high = ax.get_ylim()
    assert 0.01 < low < 0.05 and high == 10
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert {"0.1", "1", "≥ 10"} <= set(labels)
    means = next(line for line in ax.lines if line.get_markersize() == 5)
    assert list(means.get_ydata()) == pytest.approx([0.05, 0.5, 10])
    assert "What is above 10 nats is drawn there." in caption and "learning rate 1 (2 of 3 seeds)" in caption
    [note] = [text for text in ax.texts if text.get_text() == "2 of 3"]
    box, frame = note.get_window_extent(), ax.get_window_extent()
    assert frame.y0 < box.y0 and box.y1 < frame.y1 and box.x1 < frame.x1


def test_figures_are_the_same_bytes_on_any_day(results: Path, tmp_path: Path) -> None:
    digests, every = [], list(arms(results).values())
    for day in ("a", "b"):
        with figure.style():
            [(_, _, drawing)] = oc._convergence_figures(every, read(results))
            files = figure.save(drawing, tmp_path / day / "convergence")
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]


@pytest.mark.filterwarnings("error")
def test_a_stretched_axis_holds_100_percent() -> None:
    with figure.style():
        ax = figure.new_figure(3, 2).add_subplot()
        ax.plot([1, 2, 3], [12.0, 97.0, 100.0])
        oc.stretch(ax)
        ax.figure.canvas.draw()  # type: ignore[union-attr]
    low, high = ax.get_ylim()
    assert low <= 12 and 100 < high < 101
    assert {0, 50, 90, 99, 100} <= {round(tick) for tick in ax.get_yticks()}


def test_shared_pieces(results: Path) -> None:
    write(results, (0.6, 0.7), 0.7, ensemble_size=2, method="deep_ensemble", optimizer="sgd")
    epochs = summarise_epochs(read(results)).set_index("run_id")
    deep = epochs[epochs.index.str.contains("deep")]
    assert deep["train_accuracy"].tolist() == pytest.approx([55, 55])  # members have 50 and 60
    with figure.style():
        ax = figure.new_figure(2, 2).add_subplot()
        draw_reliability(summarise_reliability(read(results)), ax, look=oc.OPTIMIZERS["sgd"], shares=False)
    assert not ax.patches


def test_plots_import_no_torch() -> None:
    code = "import sys; from plots import optimizer_comparison; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    assert "optimizer_comparison" in experiments()


def test_how_far_the_hessian_can_have_gone_is_said_and_only_of_ivon() -> None:
    runs = pd.DataFrame({"arm": ["sgd", "ivon", "ivon"], "beta2": [0.999, 0.99, 0.99], "steps": [1000, 100, 1000]})
    assert "In 100 to 1,000 steps that average goes 63 to 100 % of its way" in oc._hessians_way(
        runs
    )  # 1 - 0.99^100 = 0.634
    assert oc._hessians_way(runs[:1]) == ""
    assert oc._hessians_way(runs.assign(steps=float("nan"))) == ""
