"""Figures of the toy regression: what each method predicts, how well and how sure, inside the training range and beyond it.

A *setting* is everything but method, regime, members and seed: generator, kind of variance, network, data and steps. Each
has figures of its own, and one figure joins them all. A single network trained for a multiple of the steps, `longer`, belongs
to the setting too: five times the steps are as many as all members of five make. Under `split` a single network sees a random
share of the points in each step, as a member does. Nothing is selected in this experiment: every method is drawn as it was
run, on the same data.
"""

from collections.abc import Iterable
from functools import partial
from textwrap import fill
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from batchens.results import REGRESSION_METRICS
from plots.figure import (
    DASHED,
    LOOKS,
    MINUS,
    TEXT_WIDTH,
    TIMES,
    Figures,
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
from plots.image_runs import diamonds_of, provenance
from plots.reading import FACTS
from plots.statistics import Difference, difference, interval_of

SETTING = ["generator", "variance", "mean_first", "hidden_size", "train_points", "learning_rate", "epochs"]
ARM = ["method", "regime", "ensemble_size", "alpha_init", "gamma_init"]
CONFIG = [*SETTING, *ARM, "seed"]
METRICS = REGRESSION_METRICS
OF_TRUTH = {"rmse": "rmse_of_truth", "nll": "nll_of_truth"}
EXCESS = Measure("excess NLL", "nats", 3, False)  # over that of the true distribution on the same points
ALL = "all"  # the folder of what joins the settings

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
COMPARED = {  # of two methods: the first's less the second's, or the first's by the second's
    "rmse": Measure("difference of RMSE", "units of y", 3),
    "nll": Measure("difference of NLL", "nats", 3),
    "log_excess": Measure("ratio of excess NLL", "", 2),
}
RATIO = "log_excess"  # a mean of differences of logarithms is the logarithm of the ratio of geometric means
GREY, INK, SHADE = "#404040", "#808080", "#f0f0f0"
CURVES = ("curve", "truth", "points", "gap", "outside")


# --- from rows to numbers ---------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """One method as it was run: its label, how it looks, and its rows of `summarise_runs`."""

    label: str
    look: Look
    filled: bool
    runs: pd.DataFrame


Pair: TypeAlias = tuple[str, Arm, Arm]  # label, ours, the one that it is compared with


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
    tests["excess"] = tests["nll"] - tests["nll_of_truth"]
    tests[RATIO] = np.log(tests["excess"].where(tests["excess"] > 0))
    columns = ["run_id", "split", *CONFIG, *FACTS, *MEASURES, *OF_TRUTH.values(), "excess", RATIO, "seconds"]
    return tests[columns].reset_index(drop=True)


def settings(df: pd.DataFrame) -> list[Setting]:
    """Return the settings of a results table, by name; a single network may belong to several, by its number of steps."""
    found: list[tuple[dict[str, Any], pd.DataFrame]] = []
    for _, alike in summarise_runs(df).groupby([name for name in SETTING if name != "epochs"]):
        single, epochs = alike["method"] == "single", alike["epochs"]
        every = sorted(set(epochs[~single]))
        for own in sorted(set(epochs[single])):  # what belongs to none yet makes its own
            if all(own % steps for steps in every):
                every.append(own)
        for steps in every:
            mine = alike[(epochs == steps) | (single & (epochs % steps == 0))]
            fields = dict(mine.iloc[0][SETTING]) | {"epochs": steps}
            found.append((fields, mine.assign(times=mine["epochs"] // steps)))
    names = []
    for fields, _ in found:
        namesakes = [f for f, _ in found if all(f[name] == fields[name] for name in ("generator", "variance"))]
        differing = [name for name in SETTING if len({f[name] for f in namesakes}) > 1]
        names.append("-".join([fields["generator"], fields["variance"], *(f"{n}_{fields[n]}" for n in differing)]))
    return sorted(Setting(name, fields, _arms(runs)) for name, (fields, runs) in zip(names, found, strict=True))


def _arms(runs: pd.DataFrame) -> list[Arm]:
    """Return the methods in the order of LOOKS; a label says of the members no more than it takes to tell them apart."""
    whole = (runs["method"] == "single") & (runs["regime"] == "repeat")  # it has neither members nor shares
    members = [name for name in ARM[2:] if runs.loc[~whole, name].nunique() > 1]
    arms = []
    for _, mine in runs.groupby([*ARM, "times"], dropna=False):
        fields = dict(mine.iloc[0][[*ARM, "times"]])
        look = LOOKS[fields["method"]]
        words = [look.label]
        if fields["times"] > 1:
            look = LOOKS["longer"]
            words.append(f"{fields['times']} {TIMES} steps")
        words.append(fields["regime"])
        if fields["method"] != "single" or fields["regime"] == "split":
            words += [f"{name} {number(fields[name])}" for name in members if pd.notna(fields[name])]
        arms.append(Arm(", ".join(words), look, fields["regime"] == "split", mine))
    return _ordered(arms)


def _ordered(arms: Iterable[Arm]) -> list[Arm]:
    order = list(LOOKS.values())
    return sorted(arms, key=lambda arm: (order.index(arm.look), arm.label))


def comparisons(arms: list[Arm]) -> list[Pair]:
    """Return what is compared with what, in one regime and with as many members.

    Every ensemble with the single networks, trained for the same steps and for as many times longer as there are members;
    each BatchEnsemble with the deep ensemble; the longer single network with the shorter. Between regimes: the single network
    under split with that under repeat, which is what small batches do by themselves.
    """
    pairs = [
        (ours, other)
        for other in arms
        for ours in arms
        if _comparable(_fields(ours), _fields(other)) and ours.runs["seed"].isin(other.runs["seed"]).any()
    ]
    return [(f"{ours.label}\nagainst {other.label}", ours, other) for ours, other in pairs]


def _comparable(ours: dict[str, Any], other: dict[str, Any]) -> bool:
    alike, size = ours["ensemble_size"] == other["ensemble_size"], ours["ensemble_size"]
    methods, times = (ours["method"], other["method"]), (ours["times"], other["times"])
    if ours["regime"] != other["regime"]:
        return bool(methods == ("single", "single") and times == (1, 1) and ours["regime"] == "split")
    if methods == ("single", "single"):
        return bool(times[0] > 1 and times[1] == 1 and alike)
    if methods[1] == "single":
        return bool(times[1] in (1, size) and (alike or ours["regime"] == "repeat"))
    return bool(methods == ("batchensemble", "deep_ensemble") and alike)


def _fields(arm: Arm) -> dict[str, Any]:
    return dict(arm.runs.iloc[0][[*ARM, "times"]])


def of_region(arm: Arm, split: str) -> pd.DataFrame:
    """Return an arm's runs in one region, in the order of their seeds."""
    return arm.runs[arm.runs["split"] == split].sort_values("seed")


def compared(setting: Setting) -> tuple[str, str]:
    """Return the names in COMPARED of what tells two methods of a setting apart.

    The tails of the NLL are heavy: one seed may make a mean of differences. Ratios of the excess take that all of it is
    positive, which chance may prevent, as test points are finite; then the NLL is compared in nats.
    """
    return "rmse", RATIO if _logarithmic(setting.arms) else "nll"


def _difference(pair: Pair, split: str, measure: str) -> Difference:
    _, ours, other = pair
    return difference(of_region(ours, split), of_region(other, split), measure)


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
    """Return, as text, every comparison with its 95 % interval; bold where that leaves 0, of a ratio 1, out."""
    rows = []
    for pair in comparisons(setting.arms):
        for measure in compared(setting):
            row = {"methods": pair[0].replace("\n", " "), "compared": COMPARED[measure].label}
            for split, region in REGIONS.items():
                found = _difference(pair, split, measure)
                sign = "" if measure == RATIO else "+"
                words = _interval(_ends(found, measure), COMPARED[measure].decimals, sign)
                words = f"{TIMES} {words}" if measure == RATIO else words
                row[region] = f"**{words}**" if found.shown else words
            rows.append(row)
    return pd.DataFrame(rows)


def summarise_excess(joined: list[Setting]) -> pd.DataFrame:
    """Return, as text, how far the NLL of each method is from that of the true distribution, a column a setting."""
    rows = []
    for split, region in REGIONS.items():
        for label in _labels(joined):
            row = {"test points": region, "method": label}
            for setting in joined:
                runs = [of_region(arm, split)["excess"] for arm in setting.arms if arm.label == label]
                row[setting.name] = _interval(_ends(interval_of(runs[0])), EXCESS.decimals) if runs else ""
            rows.append(row)
    return pd.DataFrame(rows)


def summarise_signs(joined: list[Setting]) -> pd.DataFrame:
    """Return each comparison, `ours` and `other`, with the settings in which the NLL is lower and higher, by region.

    Columns: ours, other, region, settings (in how many this comparison has an interval), lower, higher.
    """
    rows = []
    for setting in joined:
        for pair in comparisons(setting.arms):
            for split, region in REGIONS.items():
                found = _difference(pair, split, compared(setting)[1])
                lower, higher = found.shown and found.mean < 0, found.shown and found.mean > 0
                if np.isfinite(found.half):
                    rows.append((pair[1].label, pair[2].label, region, 1, int(lower), int(higher)))
    columns = ["ours", "other", "region", "settings", "lower", "higher"]
    return pd.DataFrame(rows, columns=columns).groupby(columns[:3], sort=False, as_index=False).sum()


def _labels(joined: list[Setting]) -> list[str]:
    """Return the labels of all methods, in order."""
    arms = {arm.label: arm for setting in joined for arm in setting.arms}
    return [arm.label for arm in _ordered(arms.values())]


def _ends(found: Difference, measure: str = "") -> np.ndarray:
    """Return the mean and both ends of its interval (nan where none is known); of logarithms, ratios."""
    ends = np.array([found.mean, found.mean - found.half, found.mean + found.half])
    return np.exp(ends) if measure == RATIO else ends


def _interval(ends: np.ndarray, decimals: int, sign: str = "") -> str:
    mean, low, high = (f"{end:{sign}.{decimals}f}" for end in ends)
    mean, low, high = (text if float(text) else text.lstrip("+-") for text in (mean, low, high))  # a zero has no sign
    return f"{mean}{f' ({low} to {high})' if np.isfinite(ends[1]) else ''}".replace("-", MINUS)


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


def draw_measure(arms: list[Arm], ax: Axes, *, split: str, measure: str, among: list[Arm] | None = None) -> Axes:
    """Draw a measure of each arm in one region: a dot for each seed, and the mean with its 95 % t interval.

    Dashed: what the true distribution scores on the same points, the mean over seeds. `excess`, the NLL over that, is on a
    logarithmic axis where all of it is positive, from below its lowest dot: an interval that reaches further is cut.

    Args:
        among: all arms whose panels share the axis, if those are more.
    """
    for at, arm in enumerate(arms):
        values = of_region(arm, split)[measure]
        _strip(ax, at, values.to_numpy(), arm)
        _mean(ax, at, _ends(interval_of(values)))
    if measure in OF_TRUTH:
        runs = pd.concat([of_region(arm, split) for arm in arms])
        ax.axvline(runs[OF_TRUTH[measure]].mean(), color=GREY, lw=0.8, ls=DASHED, zorder=1)
    elif _logarithmic(among or arms):
        every = [of_region(arm, split)[measure] for arm in among or arms]
        _logarithmic_axis(ax, [end for each in every for end in (*each, _ends(interval_of(each))[2])])
    return _rows(ax, [arm.label for arm in arms])


def _logarithmic(arms: list[Arm]) -> bool:
    return all((arm.runs["excess"] > 0).all() for arm in arms)


def _logarithmic_axis(ax: Axes, shown: list[float]) -> None:
    low, high = 0.7 * np.nanmin(shown), 1.4 * np.nanmax(shown)
    decades = np.log10(high / low)
    ax.set_xscale("log")
    few = {0.7: (1, 1.5, 2, 3, 5, 7), 1: (1, 2, 3, 5), 1.5: (1, 2, 5), 2.5: (1, 3)}
    ax.xaxis.set_major_locator(LogLocator(subs=next((subs for most, subs in few.items() if decades < most), (1,))))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(low, high)


def draw_differences(pairs: list[Pair], ax: Axes, *, split: str, measure: str) -> Axes:
    """Draw each comparison of a measure in one region: a dot for each seed, the mean with its 95 % t interval.

    Ratios are on a logarithmic axis, and their mean is the geometric one.
    """
    shown = [1.0]
    for at, (_, ours, other) in enumerate(pairs):
        each = of_region(ours, split).set_index("seed")[measure] - of_region(other, split).set_index("seed")[measure]
        values, ends = each.dropna().to_numpy(), _ends(interval_of(each), measure)
        values = np.exp(values) if measure == RATIO else values
        _strip(ax, at, values, ours)
        _mean(ax, at, ends)
        shown += [*values, *ends]
    ax.axvline(1 if measure == RATIO else 0, color=GREY, lw=0.8, zorder=1)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    if measure == RATIO:
        _logarithmic_axis(ax, shown)
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
    face = arm.look.colour if arm.filled else "white"
    ax.plot(values, rows, arm.look.marker, color=arm.look.colour, mfc=face, ms=2.4, mew=0.5, alpha=0.6, zorder=2)


def _mean(ax: Axes, at: float, ends: np.ndarray) -> None:
    bars = np.nan_to_num(np.abs(ends[1:] - ends[0]))[:, None]
    ax.errorbar(ends[0], at, xerr=bars, fmt="D", color="black", ms=3.2, mec="white", mew=0.5, elinewidth=1.3, zorder=5)


def _rows(ax: Axes, labels: list[str]) -> Axes:
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    return ax


# --- which figures, and what they say ---------------------------------------------------------------------------------


def figures(df: pd.DataFrame) -> Figures:
    """Yield (setting/name, caption, figure) of every figure that the results support; inside `plots.figure.style()`."""
    every = settings(df)
    for setting in every:
        for part in (_prediction_figures, _measure_figures):
            for name, caption, figure in part(setting, df):
                yield f"{setting.name}/{name}", f"{caption} Setting: {describe(setting)}.", figure
    if len(every) > 1:
        yield from _joined_figure(every)


def findings(df: pd.DataFrame) -> dict[str, Finding]:
    """Return for each setting's name, and for all that join them, what was found, and from what."""
    found = {}
    every = settings(df)
    if len(every) > 1:
        runs = pd.concat([setting.runs for setting in every])
        found[ALL] = Finding(_joined_sentences(every), _joined_tables(every), provenance(runs, _described(every)))
    for setting in every:
        tables = ["Mean ± standard deviation over seeds.\n\n" + markdown(summarise_arms(setting))]
        if pairs := comparisons(setting.arms):
            interval = " and 95 % interval by Student's t, bold where it leaves 0, of a ratio 1, out; none is corrected"
            known = interval * (max(_paired(pairs)) >= 3)
            tables.append(f"{_comparison(setting)}. Mean{known}.\n\n{markdown(summarise_differences(setting))}")
        made = provenance(setting.runs, describe(setting))
        found[setting.name] = Finding(_sentences(setting), "\n\n".join(tables), made)
    return found


def describe(setting: Setting) -> str:
    """Return in words what a setting holds constant."""
    f = setting.fields
    late = f", the first {100 * f['mean_first']:g} % of the steps for the mean alone" if f["mean_first"] < 1 else ""
    return f"generator {f['generator']}, {f['variance']} variance{late}, {_training(setting)}"


def _training(setting: Setting) -> str:
    f, sizes = setting.fields, setting.runs.loc[setting.runs["method"] != "single", "ensemble_size"]
    fast = setting.runs.loc[setting.runs["method"] == "batchensemble", ["alpha_init", "gamma_init"]].drop_duplicates()
    members = f", {listed([f'{size:g}' for size in sorted(sizes.unique())])} members" if len(sizes) else ""
    inits = listed(
        [f"alpha {number(alpha)} and gamma {number(gamma)}" for alpha, gamma in fast.itertuples(index=False)]
    )
    shares = setting.runs.loc[setting.runs["regime"] == "split", "ensemble_size"]
    seen = ["all of them (repeat)"] * bool((setting.runs["regime"] == "repeat").any())
    if len(shares):
        seen.append(f"a random {listed([f'1/{size:g}' for size in sorted(shares.unique())])} of them (split)")
    return (
        f"{f['train_points']} training points, two hidden layers of {f['hidden_size']}, Adam at learning rate "
        f"{number(f['learning_rate'])}, {f['epochs']} steps, in each of which a member, or a single network, sees "
        f"{' or '.join(seen)}{members}" + (f", BatchEnsembles from {inits}" if len(fast) else "")
    )


def _described(joined: list[Setting]) -> str:
    """Return in words what each of several settings holds constant, those together that hold the same."""
    names: dict[str, list[str]] = {}
    for setting in joined:
        names.setdefault(_training(setting), []).append(setting.name)
    return "; ".join(f"{listed(those)}: {words}" for words, those in names.items())


def _seeds(*some: Setting) -> list[int]:
    return [arm.runs["seed"].nunique() for setting in some for arm in setting.arms]


def _paired(pairs: list[Pair]) -> list[int]:
    return [_difference(pair, "test", "rmse").pairs for pair in pairs]


def _dots(n: list[int], what: str = "seed") -> str:
    return f"{DOTS}, {diamonds_of(n, what)}"


def _comparison(setting: Setting, whose: str = "") -> str:
    """Return what of two methods is compared."""
    first = f"The first method of each row against the second{whose}, over paired seeds: difference of RMSE"
    if compared(setting)[1] == "nll":
        return f"{first} and of NLL (first minus second). Below 0 the first is better"
    return (
        f"{first} (first minus second) and ratio of excess NLL (first divided by second, of means the geometric one). Below 0, "
        f"or below 1, the first is better. Excess NLL is {OVER_TRUTH}"
    )


def _sentences(setting: Setting) -> list[str]:
    lines = []
    n = counted(_seeds(setting)).removeprefix("n = ")
    for split, region in REGIONS.items():
        values = [
            f"{arm.label}: {with_spread(of_region(arm, split)['nll'], MEASURES['nll'], unit=False)}"
            for arm in setting.arms
        ]
        truth = setting.runs.loc[setting.runs["split"] == split, "nll_of_truth"].mean()
        lines.append(
            f"{setting.name}, test points {region}, NLL in nats ({n}; the true distribution: {truth:.3f}): {'; '.join(values)}."
        )
    pairs = [pair for pair in comparisons(setting.arms) if _paired([pair])[0] >= 3]
    for measure in compared(setting) if pairs else ():
        shown = [
            f"{region} {sum(_difference(pair, split, measure).shown for pair in pairs)} of {len(pairs)}"
            for split, region in REGIONS.items()
        ]
        lines.append(
            f"Comparisons of two methods in which the 95 % interval of the {COMPARED[measure].name} leaves "
            f"{1 if measure == RATIO else 0} out: {', '.join(shown)}; below."
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
    drawn.sort(key=lambda arm_and_rows: arm_and_rows[0].filled)  # a row of panels for each regime, where all are there
    columns = min(4, len(drawn))
    down = -(-len(drawn) // columns)
    figure = new_figure(TEXT_WIDTH, 1.65 * down + 0.4)
    axes = figure.subplots(down, columns, sharex=True, sharey=True, squeeze=False)
    handles = {
        "prediction": Line2D([], [], color=INK, lw=1.5),
        "its members": Line2D([], [], color=INK, lw=0.5),
        "its central 95 %": Patch(color=INK, alpha=0.35, lw=0),
        "true central 95 %": Line2D([], [], color=GREY, lw=0.7, ls=DASHED),
        "training points": Line2D([], [], color=GREY, ls="", marker="o", ms=2.5, mew=0),
        "no training points": Patch(color=SHADE, lw=0),
    }
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=6, columnspacing=1.2)
    for at, ax in enumerate(axes.flat):
        if at >= len(drawn):
            ax.set_axis_off()
            continue
        arm, rows = drawn[at]
        draw_predictions(rows, ax, look=arm.look).set_title("\n".join(arm.label.split(", ", 1)))
        first, last = at % columns == 0, at + columns >= len(drawn)  # of its row, of its column
        ax.set(ylabel="y" if first else "", xlabel="x" if last else "")
        ax.tick_params(labelleft=first, labelbottom=last)
        ax.xaxis.set_major_locator(MaxNLocator(5, prune="both"))  # at an edge it would touch the next panel's
    seeds = sorted({int(rows["seed"].iloc[0]) for _, rows in drawn})
    yield (
        "predictions",
        "What each method predicts along x: mean of the ensemble (thick), of its members (thin) and the central 95 % interval "
        "of the mixture (band), beside that of the true distribution (dashed); dots are the training points, grey is the gap "
        f"and the range outside, where there are none. Seed {listed([str(s) for s in seeds])}, so n = 1: an illustration. "
        "What leaves the frame is cut.",
        figure,
    )


def _cut(arms: list[Arm]) -> str:
    return ", that of the excess NLL logarithmic, where an interval that leaves the panel is cut" * _logarithmic(arms)


DOTS = "Dots are seeds (filled: split, open: repeat)"
OVER_TRUTH = "that over the true distribution's on the same points"


def _measure_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    n = _seeds(setting)

    def grid_of(draw: Any, height: float, measures: dict[str, Measure]) -> Figure:
        figure = new_figure(TEXT_WIDTH, height)
        axes = figure.subplots(2, 3, sharey=True)
        for row, (name, measure) in zip(axes, measures.items(), strict=True):
            for ax, (split, region) in zip(row, REGIONS.items(), strict=True):
                draw(ax, split=split, measure=name).set_xlabel(fill(measure.label, 20))  # or it touches the next one
                if name == "rmse":
                    ax.set_title(region)
        return figure

    rows = len(setting.arms)
    yield (
        "measures",
        f"RMSE (above) and excess NLL (below), {OVER_TRUTH}, of test points inside the training range, in the gap and outside. "
        f"{_dots(n)}. Dashed: the RMSE of the true distribution. Less is better; each panel has its own "
        f"axis{_cut(setting.arms)}.",
        grid_of(
            partial(draw_measure, setting.arms), 0.5 * max(rows, 3) + 1.2, {"rmse": MEASURES["rmse"], "excess": EXCESS}
        ),
    )
    figure = new_figure(TEXT_WIDTH, 0.52 * max(rows, 3) + 0.7)
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (split, region) in zip(axes, REGIONS.items(), strict=True):
        draw_coverage(setting.arms, ax, split=split).set_title(region)
        ax.set_xlabel("coverage (%)")
    yield (
        "coverage",
        "Share of test points inside the prediction's central 50, 90 and 95 % interval, one below the other for each method. "
        f"{DOTS}, black strokes their mean, grey ones the nominal level; {counted(n)}. Left of the level: too sure.",
        figure,
    )
    pairs = comparisons(setting.arms)
    longer = [pair for pair in pairs if LOOKS["longer"] in (pair[1].look, pair[2].look)]
    measures = {measure: COMPARED[measure] for measure in compared(setting)}
    for name, some, whose in (
        ("differences", [pair for pair in pairs if pair not in longer], ""),
        ("differences_longer", longer, " (one of them a single network trained for longer)"),
    ):
        if some:
            yield (
                name,
                f"{_comparison(setting, whose)}.{' The axis of ratios is logarithmic.' * (RATIO in measures)} "
                f"{_dots(_paired(some), 'paired seed')}. No interval is corrected for their number, {6 * len(some)}.",
                grid_of(partial(draw_differences, some), 0.62 * max(len(some), 3) + 1.2, measures),
            )


def _joined_sentences(joined: list[Setting]) -> list[str]:
    names, seeds = listed([setting.name for setting in joined]), counted(_seeds(*joined)).removeprefix("n = ")
    longer = any(arm.look == LOOKS["longer"] for setting in joined for arm in setting.arms)
    in_nats = [setting.name for setting in joined if compared(setting)[1] == "nll"]
    but = f"; in {listed(in_nats)}, where some excess is not positive, that of their difference in nats, below 0 or above 0"
    lines = [
        f"Two methods are compared in {len(joined)} settings {TIMES} 3 regions = {3 * len(joined)} comparisons, over {seeds}. "
        f"A setting ({names}) is named after the generator of the data, and after whether the networks predict the variance of "
        "y or take a constant one; a region is test points inside the training range, in its gap, or outside. Under repeat a "
        "member, or a single network, sees all training points in each step, under split a random share of them"
        f"{f'; N {TIMES} steps are N times as many' * longer}. Excess NLL is {OVER_TRUTH}. It is lower (better), or higher, "
        "than another method's where the 95 % interval of their ratio (geometric mean over paired seeds, Student's t) lies "
        f"below 1, or above 1{but * bool(in_nats)}; of fewer than 3 seeds nothing is said. No interval is corrected for the "
        "number of comparisons."
    ]
    for ours, pairs in summarise_signs(joined).groupby("ours", sort=False):
        total = pairs.groupby("other", sort=False)[["settings", "lower", "higher"]].sum()
        words = [
            f"than the {other} in {lower} of {count} comparisons, higher in {higher}"
            for other, count, lower, higher in total.itertuples()
        ]
        lines.append(f"{str(ours)[0].upper()}{str(ours)[1:]}: lower excess NLL {'; '.join(words)}.")
    return lines


def _joined_tables(joined: list[Setting]) -> str:
    """Return in Markdown the excess NLL of each method, and where each comparison shows a difference."""
    interval = " and 95 % interval by Student's t" * (max(_seeds(*joined)) >= 3)
    tables = [f"Excess NLL in nats, {OVER_TRUTH}: mean{interval}.", markdown(summarise_excess(joined))]
    rows = []
    for (ours, other), pairs in summarise_signs(joined).groupby(["ours", "other"], sort=False):
        counts = zip(*(pairs[name] for name in ("region", "settings", "lower", "higher")), strict=True)
        row = {"methods": f"{ours} against {other}"}
        rows.append(row | {name: f"of {n}: {lower} lower, {higher} higher" for name, n, lower, higher in counts})
    if rows:
        signs = "In how many settings the first method has a lower, or higher, excess NLL than the second, as counted above."
        tables += [signs, markdown(pd.DataFrame(rows))]
    return "\n\n".join(tables)


def _joined_figure(joined: list[Setting]) -> Figures:
    arms, heights = [arm for setting in joined for arm in setting.arms], [len(setting.arms) for setting in joined]
    figure = new_figure(TEXT_WIDTH, 0.19 * sum(heights) + 0.2 * len(joined) + 0.6)
    axes = figure.subplots(len(joined), 3, sharex="col", sharey="row", gridspec_kw={"height_ratios": heights})
    for row, setting in zip(axes, joined, strict=True):
        for ax, (split, region) in zip(row, REGIONS.items(), strict=True):
            draw_measure(setting.arms, ax, split=split, measure="excess", among=arms)
            if setting is joined[0]:
                ax.set_title(region)
            if setting is not joined[-1]:
                ax.tick_params(axis="x", which="both", length=0)
        row[0].set_ylabel(setting.name)
    for ax in axes[-1]:
        ax.set_xlabel(EXCESS.label)
    yield (
        f"{ALL}/nll",
        f"Excess NLL, {OVER_TRUTH}, in every setting (a row of panels) and region (a column). {_dots(_seeds(*joined))}. Less "
        f"is better; each column has its own axis{_cut(arms)}. Settings {_described(joined)}.",
        figure,
    )
