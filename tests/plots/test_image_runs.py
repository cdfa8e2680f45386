"""What all experiments on images draw from: curves stated as text, reliability against hand-computed numbers, words."""

import numpy as np
import pandas as pd
import pytest

from plots import figure, image_runs


def row(run: str, seed: int, split: str, **cells: object) -> dict[str, object]:
    return {"run_id": run, "seed": seed, "split": split, "member": pd.NA, **cells}


BINS = pd.DataFrame(
    [
        row("a", 0, "test"),
        row("a", 0, "reliability", x="0.1 nan 0.9", y="0.5 nan 0.8", n="0.25 0 0.75"),
        row("b", 1, "reliability", x="0.2 nan 0.9", y="0.1 nan 1", n="0.75 0 0.25"),
    ]
)


def test_bins_of_reliability_are_in_percent_and_empty_ones_left_out() -> None:
    bins = image_runs.summarise_reliability(BINS)
    assert bins["run_id"].tolist() == ["a", "a", "b", "b"]
    assert bins["bin"].tolist() == [0, 2, 0, 2]
    assert bins["confidence"].tolist() == pytest.approx([10, 90, 20, 90])
    assert bins["accuracy"].tolist() == pytest.approx([50, 80, 10, 100])
    assert bins["share"].tolist() == pytest.approx([25, 75, 75, 25])


def test_results_without_curves_have_none() -> None:
    for df in (BINS[BINS["split"] == "test"], BINS[["run_id", "seed", "split", "member"]]):
        assert image_runs.summarise_reliability(df).empty
        assert image_runs.curves_of(df, "weights", {"x": "x", "y": "density"}).empty


def test_a_reliability_diagram_weights_each_seed_with_its_images() -> None:
    with figure.style():
        ax = figure.new_figure(2, 2).add_subplot()
        image_runs.draw_reliability(image_runs.summarise_reliability(BINS), ax, look=figure.LOOKS["single"])
    pooled = next(line for line in ax.lines if line.get_markersize() == 3.8)
    assert np.column_stack(pooled.get_data()) == pytest.approx(
        np.array([[(0.25 * 10 + 0.75 * 20), (0.25 * 50 + 0.75 * 10)], [90, (0.75 * 80 + 0.25 * 100)]])
    )
    seeds = next(line for line in ax.lines if line.get_markersize() == 1.8)
    assert len(seeds.get_xdata()) == 4
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([50, 50])


def test_a_comparison_pairs_seeds_and_says_what_it_shows() -> None:
    def cell(**accuracy: float) -> pd.DataFrame:
        return pd.DataFrame({"seed": [int(name[1:]) for name in accuracy], "test_accuracy": list(accuracy.values())})

    ours, other = cell(s0=3, s1=5, s2=4, s9=90), cell(s2=3, s0=1, s1=2)
    names = ("ours", "other")
    assert image_runs.compared(ours, other, names) == (
        "ours less other: +2.00 points, 95 % interval \N{MINUS SIGN}0.48 to +4.48 (t, 3 paired seeds): no difference is shown."
    )
    assert image_runs.compared(ours, cell(s0=1.0, s1=2.9, s2=2.1), names).endswith("(t, 3 paired seeds): a difference.")
    assert (
        image_runs.compared(ours, cell(s0=1), names)
        == "ours less other: +2.00 points (1 paired seed: too few to tell)."
    )
    assert image_runs.compared(ours, cell(s7=1), names) == "ours and other have no seed in common."


def test_a_tally_counts_what_is_shown_for_the_better_and_the_worse_and_states_one_alone() -> None:
    up, down, wide, unknown = (image_runs.Difference(mean, half, 3) for mean, half in
                               ((2.0, 1.0), (-2.0, 1.0), (2.0, 3.0), (2.0, np.nan)))  # fmt: skip
    assert image_runs.tally({"test_accuracy": [up, up, down, wide, unknown], "test_nll": [up, up, down, wide]}) == (
        "test accuracy better in 2 and worse in 1 of 4, too few seeds to tell in 1 more; "
        "test NLL better in 1 and worse in 2 of 4"
    )
    assert image_runs.tally({"test_accuracy": [wide, wide]}) == "test accuracy, no difference is shown in any of 2"
    alone = (
        "test accuracy +2.00 (+1.00 to +3.00) points; test NLL +2.000 (-1.000 to +5.000) nats, no difference is shown"
    )
    assert image_runs.tally({"test_accuracy": [up], "test_nll": [wide]}) == alone.replace("-", figure.MINUS)
    assert image_runs.tally({"test_accuracy": [unknown, unknown]}) == ""
    one = image_runs.tally({"test_accuracy": [wide, unknown]})  # of which of the two it is can't be said
    assert one == "test accuracy, no difference is shown in any of 1, too few seeds to tell in 1 more"


def test_selection_is_among_the_cells_it_is_given() -> None:
    runs = pd.DataFrame(
        {
            "arm": ["x"] * 4 + ["y"] * 2,
            "rate": [1, 1, 2, 2, 1, 1],
            "seed": [0, 1] * 3,
            "validation_accuracy": [1, 2, 3, 4, 5, 5],
            "validation_nll": 1.0,
        }
    )
    chosen = image_runs.choose(runs, ["arm", "rate"], of=["arm"])
    assert chosen[["arm", "rate", "candidates"]].drop_duplicates().values.tolist() == [["x", 2, 2], ["y", 1, 1]]


def test_candidates_are_what_was_chosen_from() -> None:
    runs = pd.DataFrame(
        {"arm": "x", "rate": [1, 1, 2, 2, 3], "seed": [0, 1, 0, 1, 0], "validation_accuracy": [1, 2, 3, 4, 9]}
    ).assign(validation_nll=1.0)
    chosen = image_runs.choose(runs, ["arm", "rate"], of=["arm"])
    assert set(chosen["rate"]) == {2} and set(chosen["candidates"]) == {2}  # of one seed is not chosen from
    assert set(image_runs.choose(runs[runs["seed"] == 0], ["arm", "rate"], of=["arm"])["candidates"]) == {3}


def test_an_axis_holds_all_but_what_lies_far_from_the_rest() -> None:
    near = [(90, 89, 91), (91, 90, 92), (92, 91, 93), (88, 88, 88)]
    assert image_runs.span_of(near) == pytest.approx((87.75, 93.25))
    assert image_runs.span_of([*near, (50, 40, 60)]) == pytest.approx((87.75, 93.25))
    assert image_runs.span_of([(1, 1, 1)]) == (0.5, 1.5)


def test_an_axis_of_differences_holds_0_and_not_what_lies_far_beyond_it() -> None:
    below = [(-4, -5, -3), (-5, -5, -5), (-6, -7, -5), (-5, -5, -5)]
    assert image_runs.span_of(below, zero=True) == pytest.approx((-7.35, 0.35))
    assert image_runs.span_of([*below, (3, 2, 4)], zero=True) == pytest.approx((-7.55, 4.55))
    assert image_runs.span_of([*below, (44, 43, 45)], zero=True) == pytest.approx((-7.35, 0.35))
    assert image_runs.span_of(below)[1] < -2


def test_no_seed_and_no_interval_is_cut_off_at_the_edge() -> None:
    def row(*values: float) -> image_runs.Row:
        runs = pd.DataFrame({"seed": range(len(values)), "test_accuracy": values})
        return image_runs.row_of(runs, "test_accuracy", figure.LOOKS["single"])

    # the mean of the wide one is among the others
    rows = [(str(i), row(i, i, i)) for i in range(9)] + [("wide", row(*[2.5] * 7, 40))]
    with figure.style():
        ax = image_runs.draw_rows({"all": rows}, figure.new_figure(3, 3).add_subplot(), measure="test_accuracy")
    low, high = ax.get_xlim()
    assert low < 7.1875 < high < 40
    assert all(low < x < high for line in ax.lines for x in line.get_xdata())
    assert "7.19 ± 13.26 \N{RIGHTWARDS ARROW}" in {text.get_text() for text in ax.texts}
    weights = [label.get_fontweight() for label in ax.get_yticklabels()]
    assert weights == ["bold"] + ["normal"] * 10 and ax.get_yticklabels()[0].get_text() == "all"


def test_a_row_of_differences_pairs_seeds_and_not_rows() -> None:
    ours = pd.DataFrame({"seed": [2, 0, 1], "test_nll": [3.0, 1.0, 2.0]})
    others = pd.DataFrame({"seed": [0, 1, 5], "test_nll": [0.5, 0.5, 9.0]})
    row = image_runs.row_of_difference(ours, others, "test_nll", figure.LOOKS["single"])
    assert dict(row.values) == {0: 0.5, 1: 1.5} and row.found.pairs == 2 and row.found.mean == 1


def test_what_rounds_to_0_has_no_sign() -> None:
    minus = figure.MINUS
    assert [image_runs.signed(value, 2) for value in (0.004, -0.004, 0.006, -10, 100)] == [
        "0.00", "0.00", "+0.01", f"{minus}10.00", "+100.00",
    ]  # fmt: skip


def test_times_say_how_far_they_differ_where_the_work_is_the_same() -> None:
    runs = pd.DataFrame(
        {"cell": ["a", "a", "b", "b"], "seconds": [10.0, 25.0, 100.0, 101.0], "device_name": ["cpu"] * 3 + ["gpu"]}
    )
    said = image_runs.measured_on(runs, ["cell"])
    assert said.startswith("Measured on cpu; runs on other devices are left out. ") and "a factor of 2.5" in said
    quiet = image_runs.measured_on(runs.assign(seconds=[10.0, 10.1, 100.0, 101.0], device_name="cpu"), ["cell"])
    assert quiet == "Measured on cpu."
