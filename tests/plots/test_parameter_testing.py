"""Numbers before pictures: summaries against hand-computed ones, selection on validation, and a command that never guesses."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from batchens.grid import run_id
from batchens.results import result_path, write_run
from plots import figure, image_runs
from plots import parameter_testing as pt
from plots.__main__ import experiments
from plots.reading import usable_results
from plots.statistics import paired_difference
from scripts.parameter_testing import Config

ROOT = Path(__file__).parents[2]
SMALL = Config(epochs=2, batch_size=64)


def write(folder: Path, validation: tuple[float, float], test: float, **fields: object) -> Path:
    """Write a run as a script does: `validation` is the ensemble's accuracy after each epoch, `test` the last one."""
    config = dataclasses.replace(SMALL, **fields)  # type: ignore[arg-type]
    path = result_path(folder, "parameter_testing", run_id(config))
    head = {"run_id": path.stem, "experiment": "parameter_testing"}
    head |= {name: value for name, value in dataclasses.asdict(config).items() if name not in Config.INCIDENTAL}
    facts = {
        "parameters": 100, "device_name": "cpu", "number_format": "float32", "torch": "2", "data_source": "here", "commit": "",
        "dirty": "", "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    blank = dict.fromkeys(("accuracy", "nll", "brier", "ece", "disagreement", "epistemic"))
    members, rows = range(config.ensemble_size), []
    for epoch in range(1, config.epochs + 1):
        accuracy = validation[min(epoch, 2) - 1]
        common = {**head, "epoch": epoch, **facts, "seconds": 2.0}
        rows += [
            common | blank | {"split": "train", "member": m, "accuracy": 0.5, "nll": 4.0 / epoch + m} for m in members
        ]
        for split, value in (("validation", accuracy), ("test", test))[: 1 + (epoch == config.epochs)]:
            scores = {"brier": 0.1, "ece": 0.02}
            rows += [
                common
                | blank
                | scores
                | {"split": split, "member": m, "accuracy": value - 0.01 * m, "nll": 1 - value + m}
                for m in members
            ]
            several = {"disagreement": 0.1, "epistemic": 0.05} if len(members) > 1 else {}
            ensemble = {"split": split, "member": None, "accuracy": value, "nll": 1 - value}
            rows.append(common | blank | scores | several | ensemble)
    columns = list(rows[0])
    write_run(path, [{name: row[name] for name in columns} for row in rows])
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A small whole study: two alphas, two gammas but one cell, two seeds, and every reference."""
    for seed in range(2):
        up = 0.02 * seed
        write(tmp_path, (0.5, 0.80 + up), 0.70 + up, method="single", seed=seed)
        write(tmp_path, (0.5, 0.84 + up), 0.74 + up, method="single", epochs=4, seed=seed)
        write(tmp_path, (0.6, 0.90 + up), 0.80 + up, method="deep_ensemble", ensemble_size=2, seed=seed)
        # the test set would choose the second, validation chooses the first
        write(tmp_path, (0.6, 0.88 + up), 0.75 + up, ensemble_size=2, alpha_init=-0.5, seed=seed)
        write(tmp_path, (0.6, 0.82 + up), 0.79 + up, ensemble_size=2, seed=seed)
        write(tmp_path, (0.4, 0.81 + up), 0.73 + up, ensemble_size=2, gamma_init=1.0, seed=seed)
    return tmp_path


def read(folder: Path) -> pd.DataFrame:
    return usable_results(folder, "parameter_testing", pt.CONFIG)[0]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "plots", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_a_setting_is_the_whole_configuration_but_what_is_varied() -> None:
    fields = {field.name for field in dataclasses.fields(Config)} - set(Config.INCIDENTAL)
    assert set(pt.CONFIG) == fields


def test_run_summary_equals_hand_computed_numbers(results: Path) -> None:
    runs = image_runs.summarise_runs(read(results), pt.CONFIG).set_index("run_id")
    run = runs[(runs["method"] == "batchensemble") & (runs["alpha_init"] == -0.5) & (runs["seed"] == 1)].iloc[0]
    assert run["test_accuracy"] == pytest.approx(77.0)
    assert run["test_nll"] == pytest.approx(0.23)
    assert run["test_ece"] == pytest.approx(2.0)
    assert run["disagreement"] == pytest.approx(10.0)
    assert run["validation_accuracy"] == pytest.approx(90.0)
    assert run["mean_validation_accuracy"] == pytest.approx((60 + 90) / 2)
    assert run["mean_train_nll"] == pytest.approx((4.5 + 2.5) / 2)  # members 4, 5, then 2, 3
    assert run["seconds"] == 4.0


def test_a_mean_over_epochs_is_absent_when_an_epoch_is(results: Path) -> None:
    df = read(results)
    run = df["run_id"].iloc[0]
    df.loc[(df["run_id"] == run) & (df["split"] == "train") & (df["epoch"] == 1), "nll"] = np.nan
    runs = image_runs.summarise_runs(df, pt.CONFIG).set_index("run_id")["mean_train_nll"]
    assert np.isnan(runs[run])
    assert runs.drop(run).notna().all()


def test_settings_join_references_and_separate_what_differs(results: Path) -> None:
    write(results, (0.5, 0.6), 0.5, dataset="digits", regime="split", batchnorm="member", ensemble_size=2)
    write(results, (0.5, 0.6), 0.5, dataset="fashion_mnist", method="single")
    found = {setting.name: setting.runs for setting in pt.settings(read(results))}
    assert list(found) == [
        "digits-cnn", "digits-cnn-batchnorm_member-regime_split", "fashion_mnist-cnn",
    ]  # fmt: skip
    whole = found["digits-cnn"]
    assert whole.groupby(["arm", "size"]).size().to_dict() == {
        ("batchensemble", 2): 6, ("deep_ensemble", 2): 2, ("longer", 2): 2, ("single", 1): 2,
    }  # fmt: skip
    # a single network has neither regime nor members' statistics: it is the reference of both; the deep ensemble is not
    other = found["digits-cnn-batchnorm_member-regime_split"]
    assert set(other["arm"]) == {"single", "longer", "batchensemble"}


def test_selection_uses_validation_where_test_disagrees(results: Path) -> None:
    runs = pt.settings(read(results))[0].runs
    assert runs.groupby(["alpha_init", "gamma_init"])["test_accuracy"].mean().idxmax() == (0.5, 0.5)
    chosen = pt.summarise_arms(runs)["batchensemble"]
    assert set(zip(chosen["alpha_init"], chosen["gamma_init"], strict=True)) == {(-0.5, 0.5)}
    assert set(chosen["candidates"]) == {3}


def test_a_cell_of_one_seed_wins_nothing_while_others_have_more(results: Path) -> None:
    write(results, (0.9, 0.99), 0.99, ensemble_size=2, alpha_init=-0.2)
    chosen = pt.summarise_arms(pt.settings(read(results))[0].runs)["batchensemble"]
    assert set(chosen["alpha_init"]) == {-0.5}


def test_cells_hold_mean_spread_and_n(results: Path) -> None:
    runs = pt.settings(read(results))[0].runs
    cells = pt.summarise_alpha_gamma(runs[runs["arm"] == "batchensemble"], "test_accuracy")
    assert len(cells) == 3  # the fourth was not run
    cell = cells[(cells["alpha_init"] == -0.5) & (cells["gamma_init"] == 0.5)].iloc[0]
    assert (cell["mean"], cell["sd"], cell["n"]) == (pytest.approx(76.0), pytest.approx(2**0.5), 2)
    assert not cells["marked"].any()


def test_paired_difference_is_over_equal_seeds() -> None:
    def arm(**accuracy: float) -> pd.DataFrame:
        return pd.DataFrame({"seed": [int(name[1:]) for name in accuracy], "a": list(accuracy.values())})

    mean, error, pairs = paired_difference(arm(s0=3, s1=5, s2=4, s9=90), arm(s2=3, s0=1, s1=2), "a")
    assert (mean, pairs) == (pytest.approx(2.0), 3)  # 2, 3, 1
    assert error == pytest.approx(1 / 3**0.5)
    assert np.isnan(paired_difference(arm(s0=3, s1=5), arm(s0=1, s1=2), "a")[1])


def test_findings_say_when_a_difference_is_within_the_spread(results: Path) -> None:
    sentences = pt.findings(read(results))["digits-cnn"].sentences
    assert "4 epochs" not in sentences[0]
    assert "2 members, 2 seeds: single network (learning rate 0.1) 71.00 ± 1.41 %" in sentences[0]
    assert (
        "BatchEnsemble of 2 (alpha \N{MINUS SIGN}0.5, gamma 0.5, learning rate 0.1, best of 3 by validation)"
        in sentences[0]
    )
    assert sentences[1].endswith("+5.00 points (2 paired seeds: too few to tell).")
    assert sentences[2].endswith("+1.00 points (2 paired seeds: too few to tell).")


def test_a_missing_cell_and_a_missing_seed_are_counted_in_the_caption(results: Path) -> None:
    df = read(results)
    lone = df[(df["gamma_init"] == 1.0) & (df["seed"] == 1)]["run_id"].iloc[0]
    with figure.style():
        name, caption, _ = next(iter(pt.figures(df[df["run_id"] != lone])))
    assert name == "digits-cnn/alpha_gamma_test_accuracy"
    assert "n = 1 to 2 seeds" in caption
    assert "3 of 4 cells are there; a hatched one" in caption


def test_one_seed_states_no_spread(tmp_path: Path) -> None:
    write(tmp_path, (0.5, 0.8), 0.7, method="single")
    write(tmp_path, (0.5, 0.8), 0.9, ensemble_size=16)
    finding = pt.findings(read(tmp_path))["digits-cnn"]
    assert "±" not in "".join(finding.sentences)
    assert "One seed each" in finding.sentences[-1]
    with figure.style():
        assert [name for name, _, _ in pt.figures(read(tmp_path))]


def test_figures_are_the_same_bytes_on_any_day(results: Path, tmp_path: Path) -> None:
    digests = []
    for day in ("a", "b"):
        with figure.style():
            name, _, drawing = next(pt.figures(read(results)))
            files = figure.save(drawing, tmp_path / day / name)
        assert [path.suffix for path in files] == [".png", ".pdf"]
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]


def test_every_kind_of_figure_is_there_with_n_and_how_it_was_chosen(results: Path) -> None:
    for seed in range(2):
        write(results, (0.6, 0.85), 0.76, ensemble_size=4, seed=seed)
        write(results, (0.6, 0.85), 0.76, ensemble_size=4, learning_rate=0.03, seed=seed)
    with figure.style():
        captions = {name.partition("/")[2]: caption for name, caption, _ in pt.figures(read(results))}
    four = ("test_accuracy", "mean_validation_accuracy", "test_nll", "mean_train_nll")
    assert set(captions) == {
        *(f"alpha_gamma_{measure}" for measure in (*four, "test_ece", "disagreement", "epistemic")),
        *(f"ensemble_size_{measure}" for measure in four),
        *(f"ensemble_size_learning_rate_{measure}" for measure in four),
        "ensemble_size_final_and_mean_accuracy", "ensemble_size_final_and_mean_nll",
        "members", "calibration", "diversity", "cost", "training",
    }  # fmt: skip
    for name, caption in captions.items():
        assert "n = 2 seeds" in caption and "Setting: digits (here)" in caption
        assert ("never on test" in caption) == (
            not name.startswith(("alpha", "ensemble_size_learning", "ensemble_size_final"))
        )


def test_only_singles_are_drawn_and_a_truncated_file_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, (0.5, 0.8), 0.7, method="single")
    write(tmp_path, (0.5, 0.8), 0.9, method="single", seed=1)
    cut = write(tmp_path, (0.5, 0.8), 0.9, method="single", seed=2)
    cut.write_bytes(cut.read_bytes()[:-40])
    done = command("parameter_testing", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"warning: left out {cut}: cut short")
    assert "digits, cnn, 2 epochs, 2 seeds: single network (learning rate 0.1) 80.00 ± 14.14 %" in done.stdout
    folder = tmp_path / "figures" / "parameter_testing" / "digits-cnn"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", *(f"{name}.{kind}" for name in ("members", "calibration", "cost", "training") for kind in ("png", "pdf")),
    }  # fmt: skip
    readme = (folder / "README.md").read_text()
    assert "n = 2 seeds" in readme and "python -m plots parameter_testing" in readme
    assert str(tmp_path) not in readme


def test_what_is_not_a_result_of_this_experiment_is_named(tmp_path: Path) -> None:
    good = write(tmp_path, (0.5, 0.8), 0.7, method="single")
    bad = write(tmp_path, (0.5, 0.8), 0.9, method="single", seed=1)
    lines = bad.read_text().splitlines(keepends=True)
    bad.write_text(
        "".join(line for line in lines if ",test," not in line).replace(f",{len(lines) - 1}\n", f",{len(lines) - 3}\n")
    )
    (good.parent / "notes.csv").write_text("a,b\n1,2\n")
    df, left_out = usable_results(tmp_path, "parameter_testing", pt.CONFIG)
    assert set(df["run_id"]) == {good.stem}
    assert ["notes.csv" in left_out[0], left_out[1]] == [True, f"left out {bad}: it has no test result of the ensemble"]


def test_a_spoiled_number_or_line_costs_one_file_not_all(tmp_path: Path) -> None:
    paths = [write(tmp_path, (0.5, 0.8), 0.7, method="single", seed=seed) for seed in range(3)]
    paths[0].write_text(paths[0].read_text().replace(",0.5,", ",half,", 1))
    paths[1].write_text(paths[1].read_text().replace(",0.5,", ",0.5,0.5,", 1))
    df, left_out = usable_results(tmp_path, "parameter_testing", pt.CONFIG)
    assert set(df["run_id"]) == {paths[2].stem}
    assert sorted(line.partition(":")[0] for line in left_out) == sorted(f"left out {path}" for path in paths[:2])


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ("parameter_test", "an experiment must be one of "),
        ("parameter_testing", "python -m jobs submit parameter_testing --grid demo --cluster local"),
    ],
)
def test_nothing_to_draw_is_exit_code_2_and_a_way_out(tmp_path: Path, experiment: str, message: str) -> None:
    done = command(experiment, "--results", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_plots_import_no_torch() -> None:
    code = "import sys; from plots import __main__, parameter_testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    assert "parameter_testing" in experiments()


def test_reliability_is_drawn_where_runs_state_it(results: Path) -> None:
    df = read(results)
    stated = df[(df["split"] == "test") & df["member"].isna()].assign(
        split="reliability", x="0.5 nan 0.9", y="0.4 nan 1", n="0.2 0 0.8"
    )
    with figure.style():
        drawn = {name: (caption, drawing) for name, caption, drawing in pt.figures(pd.concat([df, stated]))}
    caption, drawing = drawn["digits-cnn/reliability"]
    assert "n = 2 seeds" in caption
    assert [ax.get_title(loc="left") for ax in drawing.axes] == [
        "single network", "single, 2 \N{MULTIPLICATION SIGN} epochs", "deep ensemble of 2", "BatchEnsemble of 2",
    ]  # fmt: skip
