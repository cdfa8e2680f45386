"""Figures of the toy regression: what each method predicts, how well and how sure, inside the training range and beyond it.

A *setting* is everything but method, regime, members and seed: generator, kind of variance, network, data and steps. Each
has figures of its own. Nothing is selected in this experiment: every method is drawn as it was run, on the same data.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from batchens.results import REGRESSION_METRICS
from plots.figure import (
    DASHED,
    LOOKS,
    MINUS,
    TEXT_WIDTH,
    Finding,
    Look,
    Measure,
    counted,
    listed,
    markdown,
    new_figure,
    number,
    with_spread,
)
from plots.reading import FACTS
from plots.statistics import half_width, paired_difference

SETTING = ["generator", "variance", "mean_first", "hidden_size", "train_points", "learning_rate", "epochs"]
ARM = ["method", "regime", "ensemble_size", "alpha_init", "gamma_init"]
CONFIG = [*SETTING, *ARM, "seed"]
METRICS = REGRESSION_METRICS
OF_TRUTH = {"rmse": "rmse_of_truth", "nll": "nll_of_truth"}

REGIONS = {"test": "inside", "test_gap": "in the gap", "test_outside": "outside"}
LEVELS = (50, 90, 95)
MEASURES = {
    "rmse": Measure("RMSE", "units of y", 3, False),
    "nll": Measure("NLL", "nats", 3, False),
    "coverage_50": Measure("coverage of 50 %", "%", 1),
    "coverage_90": Measure("coverage of 90 %", "%", 1),
    "coverage_95": Measure("coverage of 95 %", "%", 1),
    "spread": Measure("spread of members' means", "units of y", 2),
}
GREY, INK, SHADE = "#404040", "#808080", "#f0f0f0"
CURVES = ("curve", "truth", "points", "gap", "outside")

Figures: TypeAlias = Iterator[tuple[str, str, Figure]]


# --- from rows to numbers ---------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """One method as it was run: its label, how it looks, and its rows of `summarise_runs`."""

    label: str
    look: Look
    filled: bool
    runs: pd.DataFrame


class Setting(NamedTuple):
    """The runs that may be compared."""

    name: str
    fields: dict[str, Any]
    arms: list[Arm]

    @property
    def runs(self) -> pd.DataFrame:
        return pd.concat([arm.runs for arm in self.arms])


def summarise_runs(df: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run and region of the test: configuration, facts and the ensemble's measures; coverage in percent."""
    tests = df[df["member"].isna() & df["split"].isin(list(REGIONS))].copy()
    tests[[f"coverage_{level}" for level in LEVELS]] *= 100
    return tests[["run_id", "split", *CONFIG, *FACTS, *MEASURES, *OF_TRUTH.values(), "seconds"]].reset_index(drop=True)


def settings(df: pd.DataFrame) -> list[Setting]:
    """Return the settings of a results table, by name; a single network of either kind of variance belongs to one."""
    found: list[tuple[dict[str, Any], pd.DataFrame]] = [
        (dict(runs.iloc[0][SETTING]), runs) for _, runs in summarise_runs(df).groupby(SETTING)
    ]
    names = []
    for fields, _ in found:
        namesakes = [f for f, _ in found if all(f[name] == fields[name] for name in ("generator", "variance"))]
        differing = [name for name in SETTING if len({f[name] for f in namesakes}) > 1]
        names.append("-".join([fields["generator"], fields["variance"], *(f"{n}_{fields[n]}" for n in differing)]))
    return sorted(Setting(name, fields, _arms(runs)) for name, (fields, runs) in zip(names, found, strict=True))


def _arms(runs: pd.DataFrame) -> list[Arm]:
    """Return the methods in the order of LOOKS; a label says of the members no more than it takes to tell them apart."""
    members = [name for name in ARM[2:] if runs.loc[runs["method"] != "single", name].nunique() > 1]
    arms = []
    for _, mine in runs.groupby(ARM, dropna=False):
        fields = dict(mine.iloc[0][ARM])
        look = LOOKS[fields["method"]]
        words = [look.label]
        if fields["method"] != "single":
            words.append(fields["regime"])
            words += [f"{name} {number(fields[name])}" for name in members if pd.notna(fields[name])]
        arms.append(Arm(", ".join(words), look, fields["regime"] == "split", mine))
    order = list(LOOKS.values())
    return sorted(arms, key=lambda arm: (order.index(arm.look), arm.label))


def comparisons(arms: list[Arm]) -> list[tuple[str, Arm, Arm]]:
    """Return what is compared with what: every ensemble less the single network, each BatchEnsemble less deep ensembles.

    A BatchEnsemble and a deep ensemble are compared in one regime and with as many members.
    """
    pairs = [(ours, other) for other in arms for ours in arms if _comparable(_fields(ours), _fields(other))]
    return [(f"{ours.label}\n{MINUS} {other.label}", ours, other) for ours, other in pairs]


def _comparable(ours: dict[str, Any], other: dict[str, Any]) -> bool:
    if other["method"] == "single":
        return bool(ours["method"] != "single")
    same = all(ours[name] == other[name] for name in ("regime", "ensemble_size"))
    return bool(same and ours["method"] == "batchensemble" and other["method"] == "deep_ensemble")


def _fields(arm: Arm) -> dict[str, Any]:
    return dict(arm.runs.iloc[0][ARM])


def of_region(arm: Arm, split: str) -> pd.DataFrame:
    """Return an arm's runs in one region, in the order of their seeds."""
    return arm.runs[arm.runs["split"] == split].sort_values("seed")


class Difference(NamedTuple):
    """A paired difference over seeds: its mean, half of its 95 % t interval (nan for fewer than 3 pairs), how many pairs."""

    mean: float
    half: float
    pairs: int

    @property
    def shown(self) -> bool:
        return bool(abs(self.mean) > self.half)


def difference(ours: Arm, other: Arm, split: str, measure: str) -> Difference:
    mean, error, pairs = paired_difference(of_region(ours, split), of_region(other, split), measure)
    return Difference(mean, half_width(error, pairs) if pairs >= 3 else np.nan, pairs)


def summarise_arms(setting: Setting) -> pd.DataFrame:
    """Return, as text, mean and spread of every measure of each arm and region, and what the true distribution scores."""
    rows = []
    for split, region in REGIONS.items():
        for arm in setting.arms:
            runs = of_region(arm, split)
            row = {"test points": region, "method": arm.label, "seeds": str(len(runs))}
            for name, measure in MEASURES.items():
                known = bool(runs[name].notna().any())  # a single network has no spread
                row[measure.label] = with_spread(runs[name], measure, unit=False) if known else ""
            rows.append(row)
        truth = setting.runs[setting.runs["split"] == split].groupby("seed")[list(OF_TRUTH.values())].first()
        row = {"test points": region, "method": "the true distribution", "seeds": str(len(truth))}
        row |= {
            MEASURES[name].label: with_spread(truth[of], MEASURES[name], unit=False) for name, of in OF_TRUTH.items()
        }
        rows.append(row | {MEASURES[f"coverage_{level}"].label: str(level) for level in LEVELS})
    return pd.DataFrame(rows).fillna("")


def summarise_differences(setting: Setting) -> pd.DataFrame:
    """Return, as text, every paired difference with its 95 % interval; bold where that leaves 0 out."""
    rows = []
    for label, ours, other in comparisons(setting.arms):
        for measure in OF_TRUTH:
            row = {"difference": label.replace("\n", " "), "of": MEASURES[measure].label}
            for split, region in REGIONS.items():
                found = difference(ours, other, split, measure)
                row[region] = f"**{_interval(found, measure)}**" if found.shown else _interval(found, measure)
            rows.append(row)
    return pd.DataFrame(rows)


def _interval(found: Difference, measure: str) -> str:
    decimals = MEASURES[measure].decimals
    ends = f" ({found.mean - found.half:+.{decimals}f} to {found.mean + found.half:+.{decimals}f})"
    return f"{found.mean:+.{decimals}f}{ends if np.isfinite(found.half) else ''}".replace("-", MINUS)


# --- from numbers to pictures -----------------------------------------------------------------------------------------


def draw_predictions(rows: pd.DataFrame, ax: Axes, *, look: Look) -> Axes:
    """Draw what one run predicts along x, beside the true distribution and the points it learned from.

    Args:
        rows: of one run, those of splits curve, truth, points, gap and outside (`scripts.skafte_mlp.curves`).
    """

    def numbers(row: pd.Series, name: str) -> np.ndarray:
        return np.array(str(row[name]).split(), float)

    by_split = {split: part for split, part in rows.groupby("split")}
    truth, points = by_split["truth"].iloc[0], by_split["points"].iloc[0]
    x, mean, sd = (numbers(truth, name) for name in ("x", "mean", "sd"))
    for region in ("gap", "outside"):
        ax.axvspan(*numbers(by_split[region].iloc[0], "x"), color=SHADE, lw=0, zorder=0)
    for edge in (mean - 1.96 * sd, mean + 1.96 * sd):
        ax.plot(x, edge, color=GREY, lw=0.7, ls=DASHED)
    curves = by_split["curve"]
    ensemble, members = curves[curves["member"].isna()].iloc[0], curves[curves["member"].notna()]
    ax.fill_between(
        numbers(ensemble, "x"),
        numbers(ensemble, "lower"),
        numbers(ensemble, "upper"),
        color=look.colour,
        alpha=0.22,
        lw=0,
    )
    if len(members) > 1:
        for _, member in members.iterrows():
            ax.plot(numbers(member, "x"), numbers(member, "mean"), color=look.colour, lw=0.5, alpha=0.8)
    ax.plot(numbers(ensemble, "x"), numbers(ensemble, "mean"), color=look.colour, lw=1.5)
    ax.plot(numbers(points, "x"), numbers(points, "mean"), "o", color=GREY, ms=2, mew=0, zorder=3)
    low, high = (mean - 1.96 * sd).min(), (mean + 1.96 * sd).max()
    ax.set_ylim(
        low - 0.25 * (high - low), high + 0.25 * (high - low)
    )  # what leaves it is cut, on the same scale for all
    ax.set_xlim(x[0], x[-1])
    ax.grid(False)
    return ax


def draw_measure(arms: list[Arm], ax: Axes, *, split: str, measure: str) -> Axes:
    """Draw a measure of each arm in one region: a dot for each seed, and the mean with its 95 % t interval.

    Dashed: what the true distribution scores on the same points, the mean over seeds.
    """
    for at, arm in enumerate(arms):
        values = of_region(arm, split)[measure].to_numpy()
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) >= 3 else np.nan
        _strip(ax, at, values, arm)
        _mean(ax, at, values.mean(), half_width(error, len(values)) if len(values) >= 3 else np.nan)
    runs = pd.concat([of_region(arm, split) for arm in arms])
    ax.axvline(runs[OF_TRUTH[measure]].mean(), color=GREY, lw=0.8, ls=DASHED, zorder=1)
    return _rows(ax, [arm.label for arm in arms])


def draw_differences(arms: list[Arm], ax: Axes, *, split: str, measure: str) -> Axes:
    """Draw the paired differences of a measure in one region: a dot for each seed, the mean with its 95 % t interval."""
    pairs = comparisons(arms)
    for at, (_, ours, other) in enumerate(pairs):
        each = of_region(ours, split).set_index("seed")[measure] - of_region(other, split).set_index("seed")[measure]
        _strip(ax, at, each.dropna().to_numpy(), ours)
        found = difference(ours, other, split, measure)
        _mean(ax, at, found.mean, found.half)
    ax.axvline(0, color=GREY, lw=0.8, zorder=1)
    return _rows(ax, [label for label, _, _ in pairs])


def draw_coverage(arms: list[Arm], ax: Axes, *, split: str) -> Axes:
    """Draw each arm's coverage of 50, 90 and 95 % in one region, one below the other: dots are seeds, strokes means.

    The grey strokes are where a calibrated prediction is.
    """
    for at, arm in enumerate(arms):
        for i, level in enumerate(LEVELS):
            values, row = of_region(arm, split)[f"coverage_{level}"].to_numpy(), at + 0.27 * (i - 1)
            ax.plot([level] * 2, [row - 0.12, row + 0.12], color=GREY, lw=1.1, zorder=4)
            _strip(ax, row, values, arm, height=0.16)
            ax.plot(values.mean(), row, "|", color="black", ms=6, mew=1.4, zorder=5)
    ax.set_xlim(-3, 103)
    return _rows(ax, [arm.label for arm in arms])


def _strip(ax: Axes, at: float, values: np.ndarray, arm: Arm, height: float = 0.5) -> None:
    rows = at + height * (np.linspace(-0.5, 0.5, len(values)) if len(values) > 1 else np.zeros(1))
    face = arm.look.colour if arm.filled or arm.look is LOOKS["single"] else "white"
    ax.plot(values, rows, arm.look.marker, color=arm.look.colour, mfc=face, ms=2.4, mew=0.5, alpha=0.6, zorder=2)


def _mean(ax: Axes, at: float, mean: float, half: float) -> None:
    bar = half if np.isfinite(half) else 0
    ax.errorbar(mean, at, xerr=bar, fmt="D", color="black", ms=3.2, mec="white", mew=0.5, elinewidth=1.3, zorder=5)


def _rows(ax: Axes, labels: list[str]) -> Axes:
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    return ax


# --- which figures, and what they say ---------------------------------------------------------------------------------


def figures(df: pd.DataFrame) -> Figures:
    """Yield (setting/name, caption, figure) of every figure that the results support; inside `plots.figure.style()`."""
    for setting in settings(df):
        for part in (_prediction_figures, _measure_figures):
            for name, caption, figure in part(setting, df):
                yield f"{setting.name}/{name}", f"{caption} Setting: {describe(setting)}.", figure


def findings(df: pd.DataFrame) -> dict[str, Finding]:
    """Return for each setting's name what was found, and from what."""
    found = {}
    for setting in settings(df):
        runs = setting.runs
        facts = [
            f"{label}: {', '.join(sorted(set(runs[name].dropna().astype(str)))) or 'not known'}"
            for name, label in (("device_name", "device"), ("torch", "torch"), ("commit", "commit"))
        ]
        if (runs["dirty"].astype(str) == "True").any():
            facts.append("some runs were made with changes that were not committed")
        tables = [
            "Mean ± standard deviation over seeds.\n\n" + markdown(summarise_arms(setting)),
            "Paired differences over seeds, mean and 95 % interval by Student's t, bold where it leaves 0 out; none is "
            "corrected for their number.\n\n" + markdown(summarise_differences(setting)),
        ]
        provenance = f"Drawn from {runs['run_id'].nunique()} runs. Setting: {describe(setting)}. {'; '.join(facts)}."
        found[setting.name] = Finding(_sentences(setting), "\n\n".join(tables), provenance)
    return found


def describe(setting: Setting) -> str:
    """Return in words what a setting holds constant."""
    f, sizes = setting.fields, setting.runs.loc[setting.runs["method"] != "single", "ensemble_size"]
    fast = setting.runs.loc[setting.runs["method"] == "batchensemble", ["alpha_init", "gamma_init"]].drop_duplicates()
    late = f", the first {100 * f['mean_first']:g} % of the steps for the mean alone" if f["mean_first"] < 1 else ""
    members = f", {listed([f'{size:g}' for size in sorted(sizes.unique())])} members" if len(sizes) else ""
    inits = listed(
        [f"alpha {number(alpha)} and gamma {number(gamma)}" for alpha, gamma in fast.itertuples(index=False)]
    )
    return (
        f"generator {f['generator']}, {f['train_points']} training points, {f['variance']} variance{late}, two hidden layers "
        f"of {f['hidden_size']}, Adam at learning rate {number(f['learning_rate'])}, {f['epochs']} steps of all training "
        f"points{members}" + (f", BatchEnsembles from {inits}" if len(fast) else "")
    )


def _n(setting: Setting) -> str:
    return counted(arm.runs["seed"].nunique() for arm in setting.arms)


def _sentences(setting: Setting) -> list[str]:
    lines = []
    n = _n(setting).removeprefix("n = ")
    for split, region in REGIONS.items():
        values = [
            f"{arm.label}: {with_spread(of_region(arm, split)['nll'], MEASURES['nll'], unit=False)}"
            for arm in setting.arms
        ]
        truth = setting.runs.loc[setting.runs["split"] == split, "nll_of_truth"].mean()
        lines.append(
            f"{setting.name}, test points {region}, NLL in nats ({n}; the true distribution: {truth:.3f}): {'; '.join(values)}."
        )
    pairs = comparisons(setting.arms)
    for measure in OF_TRUTH:
        parts = []
        for split, region in REGIONS.items():
            every = [difference(ours, other, split, measure) for _, ours, other in pairs]
            parts.append(f"{region} {sum(found.shown for found in every)} of {len(every)}")
        if pairs:
            lines.append(
                f"Paired differences of {MEASURES[measure].label} with a 95 % interval without 0: {', '.join(parts)}; below."
            )
    return lines


def _prediction_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    drawn = []
    for arm in setting.arms:
        rows = df[df["run_id"].isin(set(arm.runs["run_id"])) & df["split"].isin(CURVES)]
        if len(rows):
            drawn.append((arm, rows[rows["seed"] == rows["seed"].min()]))
    if not drawn:
        return
    columns = min(3, len(drawn))
    down = -(-len(drawn) // columns)
    figure = new_figure(TEXT_WIDTH, 1.8 * down + (0.5 if len(drawn) != 5 else 0.1))
    axes = figure.subplots(down, columns, sharex=True, sharey=True, squeeze=False)
    cells = list(axes.flat)
    handles = {
        "prediction": Line2D([], [], color=INK, lw=1.5),
        "its members": Line2D([], [], color=INK, lw=0.5),
        "its central 95 %": Patch(color=INK, alpha=0.35, lw=0),
        "true central 95 %": Line2D([], [], color=GREY, lw=0.7, ls=DASHED),
        "training points": Line2D([], [], color=GREY, ls="", marker="o", ms=2.5, mew=0),
        "no training points": Patch(color=SHADE, lw=0),
    }
    if len(drawn) == 5:  # the legend stands below the single network, and each regime has a column
        drawn = [drawn[0], *drawn[3:], *drawn[1:3]]
        empty = cells.pop(3)
        empty.set_axis_off()
        empty.legend(list(handles.values()), list(handles), loc="lower left")
    else:
        figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=6, columnspacing=1.2)
    for ax in cells[len(drawn) :]:
        ax.set_axis_off()
    for at, (ax, (arm, rows)) in enumerate(zip(cells, drawn, strict=False)):
        draw_predictions(rows, ax, look=arm.look).set_title(arm.label)
        first = ax in axes[:, 0] or (len(drawn) == 5 and at == 3)  # of its row: beside it is the legend
        last = ax in axes[-1] or (len(drawn) == 5 and at == 0)  # of its column
        ax.set(ylabel="y" if first else "", xlabel="x" if last else "")
        ax.tick_params(labelleft=first, labelbottom=last)
    seeds = sorted({int(rows["seed"].iloc[0]) for _, rows in drawn})
    yield (
        "predictions",
        "What each method predicts along x: mean of the ensemble (thick), of its members (thin) and the central 95 % interval "
        "of the mixture (band), beside that of the true distribution (dashed); dots are the training points, grey is the gap "
        f"and the range outside, where there are none. Seed {listed([str(s) for s in seeds])}, so n = 1: an illustration. "
        "What leaves the frame is cut.",
        figure,
    )


def _measure_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    n = _n(setting)
    dots = "Dots are seeds (filled: split, open: repeat; the single network filled)"
    mean = "diamonds their mean with its 95 % interval by Student's t"

    def grid_of(draw: Any, height: float) -> Figure:
        figure = new_figure(TEXT_WIDTH, height)
        axes = figure.subplots(2, 3, sharey=True)
        for row, measure in zip(axes, OF_TRUTH, strict=True):
            for ax, (split, region) in zip(row, REGIONS.items(), strict=True):
                draw(setting.arms, ax, split=split, measure=measure).set_xlabel(MEASURES[measure].label)
                if measure == "rmse":
                    ax.set_title(region)
        return figure

    rows = len(setting.arms)
    yield (
        "measures",
        f"RMSE (above) and NLL (below) of test points inside the training range, in the gap and outside. {dots}, {mean}; {n}. "
        "Dashed: the true distribution on the same points. Less is better; each panel has its own axis.",
        grid_of(draw_measure, 0.6 * max(rows, 3) + 1.2),
    )
    figure = new_figure(TEXT_WIDTH, 0.52 * max(rows, 3) + 0.7)
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (split, region) in zip(axes, REGIONS.items(), strict=True):
        draw_coverage(setting.arms, ax, split=split).set_title(region)
        ax.set_xlabel("coverage (%)")
    yield (
        "coverage",
        "Share of test points inside the prediction's central 50, 90 and 95 % interval, one below the other for each method. "
        f"{dots}, black strokes their mean, grey ones the nominal level; {n}. Left of the level: too sure.",
        figure,
    )
    if pairs := comparisons(setting.arms):
        yield (
            "differences",
            "Paired differences over seeds, of RMSE (above) and NLL (below); left of 0 the first of the two is better. "
            f"{dots}, {mean}; {n}. No interval is corrected for their number, {6 * len(pairs)}.",
            grid_of(draw_differences, 0.68 * max(len(pairs), 3) + 1.2),
        )
