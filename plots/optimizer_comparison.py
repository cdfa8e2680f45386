"""Figures of the optimizer comparison: SGD, Adam or IVON, in single networks, BatchEnsembles and deep ensembles?

A *setting* is everything that the experiment does not vary on purpose: data, model, epochs, batch size ... Each setting has
figures of its own. A *method* is a single network, or a BatchEnsemble or deep ensemble of so many members. An *arm* is one
optimizer in one method, at the learning rate that was chosen for it there: on validation (`image_runs.choose`), never on
test, and from the rates that have as many seeds as any, since a run that diverges leaves no result.

The runs of IVON are two arms: `ivon`, evaluated at the mean of its posterior, which is what validation chooses by, and
`ivon_posterior`, the same runs with predictions averaged over samples of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from plots.figure import (
    DASHED,
    LOOKS,
    MEASURES,
    MINUS,
    TEXT_WIDTH,
    Figures,
    Finding,
    Look,
    Measure,
    counted,
    levels_of,
    markdown,
    new_figure,
    number,
    with_spread,
)
from plots.image_runs import (
    COUNTED,
    GREY,
    ON_VALIDATION,
    RELIABILITY_BINS,
    SPARSE,
    Row,
    Setting,
    choose,
    differences_in_words,
    dots_of,
    draw_curves,
    draw_reliability,
    draw_rows,
    legend,
    logarithmic_losses,
    main_device,
    measured_on,
    paired_table,
    provenance,
    row_of,
    row_of_difference,
    setting_names,
    summarise_epochs,
    summarise_reliability,
    tally,
    two_members,
)
from plots.image_runs import summarise_runs as summarise_image_runs
from plots.statistics import Difference, difference

SETTING = ["dataset", "model", "warmup_epochs", "batch_size", "augment", "precision", "epochs"]
VARIED = [
    "method", "ensemble_size", "alpha_init", "gamma_init", "optimizer", "learning_rate", "weight_decay", "momentum", "beta2",
    "hess_init", "posterior_samples", "seed",
]  # fmt: skip
CONFIG = [*SETTING, *VARIED]

OF = ["method", "ensemble_size", "optimizer"]  # what a learning rate is chosen for
CELL = [name for name in VARIED if name != "seed"]
METHODS = ("single", "batchensemble", "deep_ensemble")
POSTERIOR = "ivon_posterior"
OPTIMIZERS = {
    "sgd": Look("SGD", "#009E73", "o"),
    "adam": Look("Adam", "#E69F00", "s", (0, (5, 1.5))),
    "ivon": Look("IVON at the mean", "#CC79A7", "^", (0, (4, 1, 1, 1))),
    POSTERIOR: Look("IVON averaged", "#6A3D7C", "v", (0, (1, 1))),
}
PAIRS = (("adam", "sgd"), ("ivon", "sgd"), (POSTERIOR, "sgd"), (POSTERIOR, "ivon"))
COMPARED = ("test_accuracy", "test_nll", "test_ece")
LEVELS = (0.90, 0.95, 0.99)  # of what the worst optimizer reaches, the accuracies that time is measured to
AVERAGED = (
    "IVON learns a distribution of weights, its posterior. Each of its runs is evaluated twice: with the posterior's mean as "
    "weights, and with predictions averaged over {} samples of it"
)
STRETCHED = "accuracy is stretched towards 100 %"
RUNNING = "running, in training mode, the members' mean"
HIGHEST = {"validation_nll": 10.0}  # on an axis that runs which diverged would take for themselves
ASIDE = 1.3  # IVON averaged is drawn at so many times the rate, or it would hide IVON at the mean
WIDTHS = {1: 0.5, 2: 0.75}  # of a figure of so few, in parts of a page's


# --- from rows to numbers ---------------------------------------------------------------------------------------------


def summarise_runs(df: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run and arm: configuration and measures; a second one of a run of IVON, from its posterior splits."""
    ordinary = summarise_image_runs(df, CONFIG)
    parts = [ordinary.assign(arm=ordinary["optimizer"])]
    sampled = df.loc[df["split"] == "test_posterior", "run_id"]
    if len(sampled):
        mine = df[
            df["run_id"].isin(set(sampled)) & df["split"].isin(["train", "validation_posterior", "test_posterior"])
        ]
        renamed = mine.assign(split=mine["split"].str.removesuffix("_posterior"))
        parts.append(summarise_image_runs(renamed, CONFIG).assign(arm=POSTERIOR))
    runs = pd.concat(parts, ignore_index=True)
    runs["name"] = [method_name(*of) for of in runs[["method", "ensemble_size"]].itertuples(index=False)]
    epochs = df[(df["split"] == "train") & (df["member"] == 0)]
    steps = (
        (epochs["seconds"] * epochs["images_per_second"] / epochs["batch_size"]).round().groupby(epochs["run_id"]).sum()
    )
    runs["steps"] = runs["run_id"].map(steps)
    return runs


def method_name(method: str, size: int) -> str:
    """Return `single network`, `deep ensemble of 4`."""
    return LOOKS[method].label + (f" of {size:g}" if method != "single" else "")


def settings(df: pd.DataFrame) -> list[Setting]:
    """Return the settings of a results table, by name."""
    found = [(dict(runs.iloc[0][SETTING]), runs) for _, runs in summarise_runs(df).groupby(SETTING)]
    names = setting_names(found)
    return sorted(Setting(name, fields, _in_order(runs)) for name, (fields, runs) in zip(names, found, strict=True))


def _in_order(runs: pd.DataFrame) -> pd.DataFrame:
    ranks = {"method": METHODS, "arm": tuple(OPTIMIZERS)}
    by = ["method", "ensemble_size", "arm", *CELL[2:], "seed"]
    return runs.sort_values(
        by,
        key=lambda column: column.map(ranks[column.name].index) if column.name in ranks else column,
    ).reset_index(drop=True)


def with_most_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the cells that have as many seeds as any other of their method and optimizer."""
    seeds = runs.groupby(CELL, dropna=False)["seed"].transform("nunique")
    return runs[seeds == seeds.groupby([runs[name] for name in OF]).transform("max")]


def lacking(runs: pd.DataFrame) -> list[str]:
    """Return in words which learning rates have fewer seeds than others of their method and optimizer, and how many.

    Also named is a rate without any where another method has one: all its runs may have diverged.
    """
    words = []
    ordinary = runs[runs["arm"] != POSTERIOR]
    for _, mine in ordinary.groupby(OF, sort=False):
        optimizer = mine["optimizer"].iloc[0]
        cells = mine.groupby(CELL, dropna=False)["seed"].nunique().reset_index(name="seeds")
        differing = [name for name in CELL if name not in OF and cells[name].nunique(dropna=False) > 1]
        found = [
            (
                cell["learning_rate"],
                [f"{name.replace('_', ' ')} {number(cell[name])}" for name in differing],
                cell["seeds"],
            )
            for _, cell in cells[cells["seeds"] < cells["seeds"].max()].iterrows()
        ]
        rates = set(ordinary.loc[ordinary["optimizer"] == optimizer, "learning_rate"]) - set(mine["learning_rate"])
        found += [(rate, [f"learning rate {number(rate)}"], 0) for rate in rates]
        words += [
            f"{mine['name'].iloc[0]}, {optimizer_name(optimizer)}, {', '.join(what)} ({seeds} of {cells['seeds'].max()} seeds)"
            for _, what, seeds in sorted(found)
        ]
    return words


def optimizer_name(optimizer: str) -> str:
    """Return `SGD`, `Adam`, `IVON`."""
    return OPTIMIZERS[optimizer].label.removesuffix(" at the mean")


class Arm(NamedTuple):
    """One optimizer in one method: the runs of its chosen learning rate, and those of all its rates.

    `edge` is smallest or largest where the chosen rate is that of all, `only` where there is no other, else empty.
    """

    method: str
    name: str
    runs: pd.DataFrame
    rates: pd.DataFrame
    edge: str

    @property
    def look(self) -> Look:
        return OPTIMIZERS[self.name]

    @property
    def rate(self) -> float:
        return float(self.runs["learning_rate"].iloc[0])


def arms(setting: Setting) -> list[Arm]:
    """Return what is compared, by method and optimizer; the runs of an arm are in the order of their seeds."""
    runs = setting.runs
    chosen = choose(with_most_seeds(runs[runs["arm"] != POSTERIOR]), CELL, OF)
    both = _in_order(runs.merge(chosen[["run_id", "candidates"]], on="run_id"))
    beside = [name for name in CELL if name != "learning_rate"]
    found = []
    for _, mine in both.groupby(["name", "arm"], sort=False):
        method, arm = mine[["name", "arm"]].iloc[0]
        rates = runs[runs["arm"] == arm].merge(mine[beside].drop_duplicates(), on=beside)
        levels, rate = levels_of(rates["learning_rate"]), mine["learning_rate"].iloc[0]
        edge = "largest" if rate == levels[-1] else "smallest" if rate == levels[0] else ""
        found.append(Arm(method, arm, mine, rates, edge if len(levels) > 1 else "only"))
    return found


class Comparison(NamedTuple):
    """Two arms of one method of which the second is what the first is compared with."""

    label: str
    ours: Arm
    other: Arm

    def difference(self, measure: str) -> Difference:
        return difference(self.ours.runs, self.other.runs, measure)


def comparisons(every: Sequence[Arm]) -> list[Comparison]:
    """Return what is compared with what: `PAIRS` in each method."""
    return [
        Comparison(f"{ours.look.label} {MINUS} {other.look.label}", ours, other)
        for method in dict.fromkeys(arm.method for arm in every)
        for pair in PAIRS
        for ours in every
        for other in every
        if (ours.name, other.name) == pair and ours.method == other.method == method
    ]


def summarise_chosen_epochs(df: pd.DataFrame, every: Sequence[Arm]) -> pd.DataFrame:
    """Return one row a chosen run and epoch, with the columns method, arm and device, and the `elapsed` seconds of training."""
    mine = pd.concat([arm.runs.assign(method=arm.method) for arm in every if arm.name != POSTERIOR])
    epochs = mine[["run_id", "method", "arm", "device_name"]].merge(summarise_epochs(df), on="run_id")  # in our order
    epochs["elapsed"] = epochs.groupby("run_id")["seconds"].cumsum()
    return epochs.rename(columns={"device_name": "device"})


def levels_to_reach(epochs: pd.DataFrame) -> list[float]:
    """Return the validation accuracies (%) that the optimizers of one method are timed to.

    90, 95 and 99 % of what the worst of them has after the last epoch, the mean over its seeds, rounded down to 0.1 points:
    each optimizer reaches them, though not each of its runs need do.
    """
    last = epochs[epochs["epoch"] == epochs["epochs"]]
    worst = last.groupby("arm")["validation_accuracy"].mean().min()
    return [float(np.floor(round(10 * share * worst, 6)) / 10) for share in LEVELS]


def summarise_convergence(epochs: pd.DataFrame, levels: Sequence[float]) -> pd.DataFrame:
    """Return one row a run and level: the first epoch whose validation accuracy is there, and the seconds until its end.

    Both are absent where the run never is.
    """
    rows = []
    for run, mine in epochs.groupby("run_id", sort=False):
        for level in levels:
            there = mine[mine["validation_accuracy"] >= level]
            when = there[["epoch", "elapsed"]].iloc[0] if len(there) else {"epoch": np.nan, "elapsed": np.nan}
            facts = mine[["method", "arm", "seed", "device"]].iloc[0]
            rows.append({"run_id": run, **facts, "level": level, "epoch": when["epoch"], "elapsed": when["elapsed"]})
    return pd.DataFrame(rows)


def convergence(df: pd.DataFrame, every: Sequence[Arm]) -> dict[str, pd.DataFrame]:
    """Return for each method `summarise_convergence` of its chosen runs, at the levels of that method."""
    epochs = summarise_chosen_epochs(df, every)
    found = {}
    for method in dict.fromkeys(arm.method for arm in every):
        mine = epochs[epochs["method"] == method]
        found[method] = summarise_convergence(mine, levels_to_reach(mine))
    return found


# --- from numbers to words --------------------------------------------------------------------------------------------


def summarise_arms(every: Sequence[Arm]) -> pd.DataFrame:
    """Return, as text, what was chosen for each method and optimizer, n, and its measures; seconds are of one device."""
    device = main_device(_runs(every))
    rows = []
    for arm in every:
        seconds = arm.runs.loc[arm.runs["device_name"].astype(str) == device, "seconds"]
        row = {
            "method": arm.method,
            "optimizer": arm.look.label,
            "learning rate": number(arm.rate) + (f" ({arm.edge})" if arm.edge else ""),
            "chosen from": str(arm.runs["candidates"].iloc[0]),
            "seeds": str(len(arm.runs)),
        }
        row |= {MEASURES[name].label: with_spread(arm.runs[name], MEASURES[name], unit=False) for name in COMPARED}
        rows.append(row | {MEASURES["seconds"].label: with_spread(seconds, MEASURES["seconds"], unit=False)})
    return pd.DataFrame(rows)


def summarise_convergence_in_words(found: Mapping[str, pd.DataFrame], device: str) -> pd.DataFrame:
    """Return, as text, epochs and seconds to each level of each method and optimizer."""
    rows = []
    for method, reached in found.items():
        for arm, mine in reached.groupby("arm", sort=False):
            row = {"method": method, "optimizer": OPTIMIZERS[str(arm)].label}
            for share, level in zip(LEVELS, levels_of(reached["level"]), strict=True):
                at = mine[mine["level"] == level]
                row[f"{100 * share:g} % of the worst"] = f"{level:.1f} %: {_time_in_words(at, device)}"
            rows.append(row)
    return pd.DataFrame(rows)


def _time_in_words(at: pd.DataFrame, device: str = "") -> str:
    """Return `2.3 ± 0.6 epochs, 4.1 ± 0.2 s`, without a device only epochs.

    Where a run is not there no mean, since that would be of the fast ones.
    """
    there = at["epoch"].notna().sum()
    if there < len(at):
        return f"reached by {there} of {len(at)} seeds"
    timed = at.loc[at["device"].astype(str) == device, "elapsed"]
    seconds = f", {with_spread(timed, Measure('', 's', 2 if timed.mean() < 10 else 1))}" if len(timed) else ""
    return with_spread(at["epoch"], Measure("", "epochs", 1)) + seconds


def summarise_differences(every: Sequence[Arm]) -> pd.DataFrame:
    """Return, as text, every paired difference with its 95 % interval; bold where that leaves 0 out."""
    rows = []
    for pair in comparisons(every):
        row = {"method": pair.ours.method, "difference": pair.label}
        rows.append(row | differences_in_words({name: pair.difference(name) for name in COMPARED}))
    return pd.DataFrame(rows)


def describe(setting: Setting) -> str:
    """Return in words what a setting holds constant, where its images are from, and how each optimizer was set."""
    f, runs = setting.fields, setting.runs
    sources = sorted(set(runs["data_source"].astype(str)))

    def values(of: pd.DataFrame, *names: str) -> str:
        return ", ".join(f"{name} {' or '.join(map(number, levels_of(of[name])))}" for name in names)

    own = {
        "sgd": ("momentum", "weight_decay"),
        "adam": ("momentum", "beta2", "weight_decay"),
        "ivon": ("momentum", "beta2", "weight_decay", "hess_init", "posterior_samples"),
    }
    optimizers = [
        f"{optimizer_name(name)} with {values(mine, *fields)}".replace("_", " ").replace("hess init", "hess_init")
        for name, fields in own.items()
        if len(mine := runs[runs["optimizer"] == name])
    ]
    if len(fast := runs[runs["method"] == "batchensemble"]):
        optimizers.append(f"BatchEnsembles with {values(fast, 'alpha_init', 'gamma_init')}".replace("_init", ""))
    return (
        f"{f['dataset']} ({', '.join(sources)}), {f['model']}, {f['epochs']} epoch{'s' * bool(f['epochs'] != 1)}, batches of "
        f"{f['batch_size']} images, {number(f['warmup_epochs'])} warm-up epoch{'s' * bool(f['warmup_epochs'] != 1)}, augment "
        f"{f['augment']}, precision {f['precision']}; " + "; ".join(optimizers)
    )


def _runs(every: Sequence[Arm]) -> pd.DataFrame:
    """Return the runs of all rates."""
    return pd.concat([arm.rates for arm in every])


def _averaged(every: Sequence[Arm]) -> str:
    """Return a sentence, or nothing where IVON is not averaged."""
    samples = sorted({int(n) for arm in every if arm.name == POSTERIOR for n in arm.runs["posterior_samples"]})
    return f" {AVERAGED.format(' or '.join(map(str, samples)))}." if samples else ""


def _seeds(every: Sequence[Arm]) -> list[int]:
    return [arm.runs["seed"].nunique() for arm in every]


def _n(every: Sequence[Arm]) -> str:
    return counted(_seeds(every))


def _chosen_in_words(arm: Arm) -> str:
    candidates = arm.runs["candidates"].iloc[0]
    alone = "the only one" if arm.edge == "only" else "the only one with all seeds"
    return f"learning rate {number(arm.rate)}, " + (f"best of {candidates}" if candidates > 1 else alone)


def _chosen(every: Sequence[Arm]) -> str:
    """Return which learning rates were chosen, and how; for captions."""
    ordinary = [arm for arm in every if arm.name != POSTERIOR]
    by_method = []
    for method in dict.fromkeys(arm.method for arm in ordinary):
        rates = [f"{optimizer_name(arm.name)} {number(arm.rate)}" for arm in ordinary if arm.method == method]
        by_method.append(f"{method}: {', '.join(rates)}")
    return f"Learning rates, chosen {ON_VALIDATION}: {'; '.join(by_method)}."


# --- from numbers to pictures -----------------------------------------------------------------------------------------


def draw_rates(arm: Arm, ax: Axes, *, measure: str) -> Axes:
    """Draw a validation measure against the learning rate: small dots are seeds, large ones their mean, filled the chosen.

    What lies above HIGHEST is drawn there.
    """
    by = arm.rates.groupby("learning_rate")[measure]
    aside, top, look = ASIDE if arm.name == POSTERIOR else 1.0, HIGHEST.get(measure), arm.look
    means, seeds = by.mean().clip(upper=top), arm.rates[measure].clip(upper=top)
    style: dict[str, Any] = {"marker": look.marker, "color": look.colour, "clip_on": False}
    ax.plot(aside * arm.rates["learning_rate"], seeds, ls="", ms=2.4, mew=0, alpha=0.55, **style)
    ax.plot(aside * means.index, means, ls=look.line, lw=0.9, ms=5, mfc="white", mew=0.8, **style)
    ax.plot(aside * arm.rate, means[arm.rate], ms=6, mec="white", mew=0.5, zorder=4, **style)
    ax.set_xscale("log")
    ax.margins(x=0.2)
    return ax


def note_seeds(arm: Arm, ax: Axes, *, measure: str) -> None:
    """Write beside a rate how many seeds it has where it has fewer than another; the axis has its scale and ends already.

    To the right of the mean, since lines that leave the others come from the left, and towards the axis's middle.
    """
    by = arm.rates.groupby("learning_rate")
    means, seeds = by[measure].mean().clip(upper=HIGHEST.get(measure)), by["seed"].nunique()
    for rate, n in seeds[seeds < seeds.max()].reset_index().itertuples(index=False):
        at = (rate, means[rate])
        high = (ax.transScale + ax.transLimits).transform(at)[1] > 0.5
        text = ax.annotate(f"{n} of {seeds.max()}", at, (7, -9 if high else 9), textcoords="offset points", va="center")
        text.set(color=GREY, fontsize=6.5, path_effects=[Stroke(linewidth=1.5, foreground="white"), Normal()])


def stretch(ax: Axes) -> None:
    """Let an axis of accuracy in percent, with all its drawings there, resolve the last points before 100."""
    ax.set_yscale("function", functions=(lambda y: -np.log10(101 - np.minimum(y, 100.9)), lambda y: 101 - 10.0**-y))
    ax.margins(y=0.08)
    low, high = ax.get_ylim()
    low, high = max(low, -1), min(high, 100.3)
    ax.set_ylim(low, high)
    if (101 - low) / (101 - high) > 4:
        ax.yaxis.set_major_locator(FixedLocator([0, 30, 50, 70, 80, 90, 95, 98, 99, 100]))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_arms(every: Sequence[Arm], ax: Axes, *, measure: str) -> Axes:
    """Draw a row for each arm, under a heading for each method; dashed through all: the single network that SGD trains."""
    groups: dict[str, list[tuple[str, Row]]] = {}
    for arm in every:
        groups.setdefault(arm.method, []).append((arm.look.label, row_of(arm.runs, measure, arm.look)))
    draw_rows(groups, ax, measure=measure)
    for arm in every:
        if arm.name == "sgd" and arm.method == LOOKS["single"].label:
            ax.axvline(arm.runs[measure].mean(), color=arm.look.colour, lw=0.8, ls=DASHED, zorder=1)
    return ax


def draw_differences(pairs: Sequence[Comparison], ax: Axes, *, measure: str) -> Axes:
    """Draw a row for each pair, those of a method under one heading."""
    groups: dict[str, list[tuple[str, Row]]] = {}
    for pair in pairs:
        row = row_of_difference(pair.ours.runs, pair.other.runs, measure, pair.ours.look)
        groups.setdefault(pair.ours.method, []).append((pair.label, row))
    return draw_rows(groups, ax, measure=measure, differences=True)


def draw_convergence(reached: pd.DataFrame, ax: Axes, *, measure: str, most: float | None = None) -> Axes:
    """Draw the epochs or seconds (`elapsed`) to each level: dots are seeds, a line goes through their means.

    A run that does not reach a level is a cross above a line, and such a level has no mean.

    Args:
        most: of this measure, where several panels have one scale.
    """
    most = float(reached[measure].max()) if most is None else most
    top, missed = 1.15 * most, bool(reached[measure].isna().any())
    levels = levels_of(reached["level"])
    for i, (name, look) in enumerate((name, look) for name, look in OPTIMIZERS.items() if name != POSTERIOR):
        mine = reached[reached["arm"] == name]
        seeds = levels_of(mine["seed"])
        beside = mine["seed"].map({seed: 0.05 * (k - (len(seeds) - 1) / 2) for k, seed in enumerate(seeds)})
        at = mine["level"].map(levels.index) + 0.26 * (i - 1)
        there = mine[measure].notna()
        style: dict[str, Any] = {"color": look.colour, "ls": "", "clip_on": False, "in_layout": False}
        ax.plot((at + beside)[there], mine.loc[there, measure], marker=look.marker, ms=2.8, mew=0, alpha=0.6, **style)
        ax.plot((at + beside)[~there], [top] * (~there).sum(), marker="x", ms=4, mew=1, **style)
        means = mine.groupby("level")[measure].agg(lambda values: values.mean() if values.notna().all() else np.nan)
        ax.plot(
            np.arange(len(means)) + 0.26 * (i - 1), means, look.marker, ls=look.line, lw=1, color=look.colour, ms=4.6
        )
    ax.set_xticks(range(len(levels)), [f"{level:.1f}" for level in levels])
    ax.set_xlim(-0.5, len(levels) - 0.5)
    ax.set_ylim(0, 1.22 * most)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=measure == "epoch"))
    if missed:
        ax.axhline(1.075 * most, color=GREY, lw=0.5)
        ax.text(-0.45, top, "not reached", va="center", fontsize=6.5, color=GREY)
    ax.grid(False, axis="x")
    return ax


# --- which figures, and what they say ---------------------------------------------------------------------------------


def figures(df: pd.DataFrame) -> Figures:
    """Yield (setting/name, caption, figure) of every figure that the results support; inside `plots.figure.style()`."""
    for setting in settings(df):
        every = arms(setting)
        for part in (_curve_figures, _rate_figures, _method_figures, _convergence_figures, _member_figures):
            for name, caption, figure in part(every, df):
                yield f"{setting.name}/{name}", f"{caption} Setting: {describe(setting)}.", figure


def findings(df: pd.DataFrame) -> dict[str, Finding]:
    """Return for each setting's name what was found, and from what."""
    found = {}
    for setting in settings(df):
        every = arms(setting)
        reached = convergence(df, every)
        tables = [
            "Mean ± standard deviation over seeds; one seed has no spread. The learning rate of each row was chosen "
            f"{ON_VALIDATION}; IVON's with the posterior's mean. In brackets: it is the smallest, largest or only one of "
            f"those tried. {_seconds(every)}\n\n" + markdown(summarise_arms(every)),
            "Epochs and seconds of training until the validation accuracy is first there: 90, 95 and 99 % of the final one of "
            "the method's worst optimizer. Validation is once an epoch. Seconds are as above.\n\n"
            + markdown(summarise_convergence_in_words(reached, main_device(_runs(every)))),
        ]
        differences = paired_table(summarise_differences(every))
        made = provenance(setting.runs, describe(setting))
        found[setting.name] = Finding(
            _sentences(setting, every, reached), "\n\n".join(tables + differences), made, "".join(differences)
        )
    return found


def _seconds(every: Sequence[Arm]) -> str:
    """Return what seconds are; how far they may be trusted all rates tell, since these do the same work."""
    return (
        f"Seconds are of training, without validation. {measured_on(_runs(every), ['name', 'arm'])} Runs that differ in the "
        "learning rate alone count as one configuration there."
    )


def _sentences(setting: Setting, every: Sequence[Arm], reached: Mapping[str, pd.DataFrame]) -> list[str]:
    f = setting.fields
    epochs = f"{f['epochs']} epoch{'s' if f['epochs'] > 1 else ''}"
    spread = ", mean ± standard deviation" if max(len(arm.runs) for arm in every) > 1 else ""
    lines = [
        f"{f['dataset']}, {f['model']}, {epochs}, {_n(every).removeprefix('n = ')}: test accuracy, NLL (negative "
        f"log-likelihood) and ECE (expected calibration error) after the last epoch{spread}. Learning rates were chosen "
        f"{ON_VALIDATION}.{_averaged(every)}"
    ]
    for method in reached:
        values = [
            ", ".join(
                [
                    f"{arm.look.label} {with_spread(arm.runs['test_accuracy'], MEASURES['test_accuracy'])}",
                    with_spread(arm.runs["test_nll"], MEASURES["test_nll"]),
                    with_spread(arm.runs["test_ece"], MEASURES["test_ece"])
                    + (f" ({_chosen_in_words(arm)})" if arm.name != POSTERIOR else ""),
                ]
            )
            for arm in every
            if arm.method == method
        ]
        lines.append(f"{_capital(method)}: {'; '.join(values)}.")
    ordinary = [arm for arm in every if arm.name != POSTERIOR]
    if edges := _by_rate([arm for arm in ordinary if arm.edge in ("smallest", "largest")]):
        lines.append(f"Chosen at the edge of the rates that were tried, so that a better one may lie beyond: {edges}.")
    if only := _by_rate([arm for arm in ordinary if arm.edge == "only"]):
        lines.append(f"Only one rate was tried, so that none was chosen: {only}.")
    if short := lacking(setting.runs):
        lines.append(
            "These rates have fewer seeds than others, because runs diverged or are not done yet, and could not be chosen: "
            f"{'; '.join(short)}."
        )
    lines += _verdicts(every)
    times = []
    for method, mine in reached.items():
        level = mine["level"].max()
        each = [
            f"{OPTIMIZERS[str(name)].label} {_time_in_words(one[one['level'] == level])}"
            for name, one in mine.groupby("arm", sort=False)
        ]
        times.append(f" {_capital(method)} ({level:.1f} %): {', '.join(each)}.")
    lines.append(
        f"Training until the validation accuracy is first at {100 * LEVELS[-1]:g} % of what the method's worst optimizer ends "
        f"with.{''.join(times)}"
    )
    if moved := _hessians_way(setting.runs):
        lines.append(moved)
    lines.append(
        f"All of this is at one budget of {epochs}, at whose end the learning rate is 0. It says nothing of longer training, "
        "or of how optimizers compare once networks have converged."
    )
    return lines


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _hessians_way(runs: pd.DataFrame) -> str:
    """Return how far IVON's estimate of the Hessian can have gone: in few steps it stays what it was set to."""
    ivon = runs[runs["arm"] == "ivon"]
    ways = 100 * (1 - ivon["beta2"] ** ivon["steps"])
    if ivon.empty or ways.isna().any():
        return ""
    way, steps = (
        " to ".join(dict.fromkeys(f"{value:,.0f}" for value in (values.min(), values.max())))
        for values in (ways, ivon["steps"])
    )
    return (
        "The variance of IVON's posterior comes from a running average of the loss's curvature (its Hessian), which starts at "
        f"hess_init. In {steps} steps that average goes {way} % of its way; the rest of it was set and not learned."
    )


def _by_rate(some: Sequence[Arm]) -> str:
    """Return `Adam 0.03, the largest of 4 (single network, BatchEnsemble of 2); SGD ...`."""
    methods: dict[str, list[str]] = {}
    for arm in some:
        of = f", the {arm.edge} of {arm.rates['learning_rate'].nunique()}" if arm.edge != "only" else ""
        methods.setdefault(f"{optimizer_name(arm.name)} {number(arm.rate)}{of}", []).append(arm.method)
    return "; ".join(f"{rate} ({', '.join(where)})" for rate, where in methods.items())


def _verdicts(every: Sequence[Arm]) -> list[str]:
    """Return, of each pair of optimizers, in how many methods the one is shown to be better and worse."""
    pairs = comparisons(every)
    lines = []
    for label in dict.fromkeys(pair.label for pair in pairs):
        mine = [pair for pair in pairs if pair.label == label]
        if words := tally({name: [pair.difference(name) for pair in mine] for name in COMPARED}):
            methods = f"{len(mine)} methods" if len(mine) > 1 else mine[0].ours.method
            lines.append(f"{label}, {methods}: {words}.")
    if pairs and not lines:
        return [
            "No two optimizers have three seeds in common: no interval is known, and none can be said to be better."
        ]
    return [COUNTED, *lines] if lines else []


def _curve_figures(every: Sequence[Arm], df: pd.DataFrame) -> Figures:
    """Figures 15 to 18 of the original study."""
    epochs = summarise_chosen_epochs(df, every)
    if epochs["epoch"].nunique() < 2:
        return
    ordinary = [arm for arm in every if arm.name != POSTERIOR]
    sampled = OPTIMIZERS | {"ivon": OPTIMIZERS["ivon"]._replace(label="IVON at its samples")}
    for name, title in (
        ("train_nll", f"Training NLL ({RUNNING}), logarithmic"),
        ("validation_nll", "Validation NLL of the ensemble's prediction, logarithmic"),
        ("train_accuracy", f"Training accuracy ({RUNNING}); {STRETCHED}"),
        ("validation_accuracy", f"Validation accuracy of the ensemble's prediction; {STRETCHED}"),
    ):
        figure, axes = _panels([arm.method for arm in every], 1.75)
        for method, ax in axes.items():
            draw_curves(epochs[epochs["method"] == method], ax, measure=name, looks=OPTIMIZERS).set_title(method)
        _scale(next(iter(axes.values())), name)
        _outer(axes)
        training = name.startswith("train")
        legend(figure, set(epochs["arm"]), sampled if training else OPTIMIZERS, lines=OPTIMIZERS)
        where = (
            "at a sample of its posterior in each step, which is harder" if training else "at the mean of its posterior"
        )
        yield (
            f"curves_{name}",
            f"{title}; by epoch, for each method and optimizer, IVON {where}. Thin lines are seeds, thick "
            f"ones their mean, {_n(ordinary)}. {_chosen(every)}",
            figure,
        )


def _panels(names: Sequence[str], height: float) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure of a panel for each name, with one scale."""
    names = list(dict.fromkeys(names))
    columns, down = _grid_of(len(names))
    figure = new_figure(TEXT_WIDTH * WIDTHS.get(columns, 1), height * down + 0.5)
    axes = figure.subplots(down, columns, sharex=True, sharey=True, squeeze=False)
    for ax in list(axes.flat)[len(names) :]:
        ax.set_axis_off()
    return figure, dict(zip(names, axes.flat, strict=False))


def _grid_of(panels: int) -> tuple[int, int]:
    """Return in how many columns and rows so many panels stand: four beside each other, three where that has fewer holes."""
    columns = min(panels, 3 if panels in (5, 6) else 4)
    return columns, -(-panels // columns)


def _outer(axes: Mapping[str, Axes]) -> None:
    """Leave labels to the left and to those without a panel below."""
    columns, _ = _grid_of(len(axes))
    for i, ax in enumerate(axes.values()):
        if i % columns:
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
        if i + columns < len(axes):
            ax.set_xlabel("")
        else:
            ax.tick_params(labelbottom=True)


def _scale(ax: Axes, measure: str) -> None:
    if measure.endswith("accuracy"):
        stretch(ax)
    else:
        logarithmic_losses(ax)


def _rate_figures(every: Sequence[Arm], df: pd.DataFrame) -> Figures:
    methods = list(dict.fromkeys(arm.method for arm in every))
    optimizers = [name for name in OPTIMIZERS if name != POSTERIOR and any(arm.name == name for arm in every)]
    runs = _runs(every)
    short = lacking(runs)
    named = (
        f" These rates have fewer seeds than others, because runs diverged or are not done yet: {'; '.join(short)}."
        if short
        else ""
    )
    if any(arm.name == POSTERIOR for arm in every):
        named = f" IVON averaged is drawn at {ASIDE:g} times its rate, beside IVON at the mean.{named}"
    for measure, title in (
        ("validation_accuracy", f"Validation accuracy after the last epoch ({STRETCHED})"),
        ("validation_nll", "Validation NLL after the last epoch (logarithmic)"),
    ):
        figure = new_figure(TEXT_WIDTH * max(1.5, len(optimizers)) / 3, max(2.4, 1.2 * len(methods) + 0.7))
        axes = figure.subplots(len(methods), len(optimizers), sharex="col", sharey="row", squeeze=False)
        top = HIGHEST.get(measure, np.inf)
        above = f" What is above {top:g} nats is drawn there." if runs[measure].max() > top else ""
        panels = {(method, name): axes[i, k] for i, method in enumerate(methods) for k, name in enumerate(optimizers)}
        for arm in every:
            draw_rates(arm, panels[arm.method, arm.runs["optimizer"].iloc[0]], measure=measure)
        for row, method in zip(axes, methods, strict=True):
            _scale(row[0], measure)
            if runs.loc[runs["name"] == method, measure].max() > top:
                row[0].set_ylim(top=top)
                row[0].yaxis.set_major_formatter(lambda nats, _, top=top: f"{'≥ ' if nats >= top else ''}{nats:g}")
            row[-1].annotate(method, (1.03, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize=8)
        for arm in every:
            if arm.name != POSTERIOR:
                note_seeds(arm, panels[arm.method, arm.name], measure=measure)
        for ax, name in zip(axes[0], optimizers, strict=True):
            ax.set_title(optimizer_name(name))
        for ax, name in zip(axes[-1], optimizers, strict=True):
            rates = levels_of(runs.loc[runs["optimizer"] == name, "learning_rate"])
            ax.xaxis.set_major_locator(FixedLocator(rates))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        figure.supxlabel("learning rate", fontsize=8)
        figure.supylabel(MEASURES[measure].label, fontsize=8)
        legend(figure, {arm.name for arm in every}, OPTIMIZERS)
        yield (
            f"learning_rates_{measure}",
            f"{title} against the learning rate, a column for each optimizer, a row for each method. Small dots are seeds, "
            f"large ones their mean, {_n(every)} at the chosen rate, which is filled. It was chosen {ON_VALIDATION}; IVON's at "
            f"the mean.{named}{above}",
            figure,
        )


def _method_figures(every: Sequence[Arm], df: pd.DataFrame) -> Figures:
    headings = len({arm.method for arm in every})
    averaged = _averaged(every)
    figure = new_figure(TEXT_WIDTH, 0.17 * (len(every) + headings) + 0.6)
    for ax, measure in zip(figure.subplots(1, 2, sharey=True), ("test_accuracy", "test_nll"), strict=True):
        draw_arms(every, ax, measure=measure)
    yield (
        "methods",
        f"Final test accuracy (left) and NLL (right) of each method and optimizer.{averaged} {dots_of(_seeds(every))}. Dashed: "
        f"the mean of the single network that SGD trains. {_chosen(every)}",
        figure,
    )
    pairs = comparisons(every)
    if not pairs:
        return
    headings = len({pair.ours.method for pair in pairs})
    figure = new_figure(TEXT_WIDTH, 0.17 * (len(pairs) + headings) + 0.75)
    for ax, measure in zip(figure.subplots(1, 3, sharey=True), COMPARED, strict=True):
        draw_differences(pairs, ax, measure=measure)
    dots = dots_of([pair.difference(COMPARED[0]).pairs for pair in pairs], "paired seed")
    yield (
        "differences",
        "Paired differences over seeds of final test accuracy (right of 0 is better), NLL and ECE in 15 bins (left of 0 is "
        f"better).{averaged} {dots}. None of the {len(COMPARED) * len(pairs)} intervals is corrected for their number. "
        f"{_chosen(every)}",
        figure,
    )


def _convergence_figures(every: Sequence[Arm], df: pd.DataFrame) -> Figures:
    found = convergence(df, every)
    every_run, device = pd.concat(list(found.values())), main_device(_runs(every))
    columns, down = _grid_of(len(found))
    figure = new_figure(TEXT_WIDTH * WIDTHS.get(columns, 1), 3.2 * down + 0.5)
    axes = figure.subplots(2 * down, columns, sharey=False, squeeze=False)
    for rows, measure, unit in ((axes[:down], "epoch", "epochs"), (axes[down:], "elapsed", "seconds of training")):
        for i, (ax, (method, reached)) in enumerate(zip(rows.flat, found.items(), strict=False)):
            shown = reached[reached["device"].astype(str) == device] if measure == "elapsed" else reached
            draw_convergence(shown, ax, measure=measure, most=every_run["epoch"].max() if measure == "epoch" else None)
            ax.set_title(method)
            ax.set_xlabel("validation accuracy (%)")
            if i % columns == 0:
                ax.set_ylabel(unit)
            elif measure == "epoch":
                ax.tick_params(labelleft=False)
        for ax in list(rows.flat)[len(found) :]:
            ax.set_axis_off()
    missed = int(every_run["epoch"].isna().sum())
    legend(figure, set(every_run["arm"]), OPTIMIZERS)
    yield (
        "convergence",
        "Epochs (above) and seconds of training (below) until the validation accuracy is first there, IVON at the mean: at 90, "
        "95 and 99 % of the final one of the method's worst optimizer (the mean over its seeds, rounded down), so that each "
        "optimizer gets there; optimizers are drawn a little aside of each other. Small dots are seeds, large ones their "
        f"mean, {_n(every)}; a run that does not get there is a "
        f"cross, and then there is no mean ({missed or 'none'} of {len(every_run)}). Validation is once an epoch, and the "
        "learning rate falls to 0 at the last one: with another budget the times are others. "
        f"{_seconds(every)} {_chosen(every)}",
        figure,
    )


def _member_figures(every: Sequence[Arm], df: pd.DataFrame) -> Figures:
    """Members beside their ensemble, and reliability diagrams."""
    ordinary = [arm for arm in every if arm.name != POSTERIOR]
    if any((arm.runs["ensemble_size"] > 1).any() for arm in ordinary):
        bands = pd.concat([arm.runs.assign(label=f"{arm.method},\n{arm.look.label}") for arm in ordinary])
        yield (
            "members",
            "Members beside their ensemble: final test accuracy (left) and NLL (right), IVON at the mean. Each line is a seed, "
            "its small dots the members alone, its large dot their ensemble; the stroke through a band is the mean over seeds, "
            f"{_n(ordinary)}. {_chosen(every)}",
            two_members(bands, df, OPTIMIZERS),
        )
    bins = summarise_reliability(df)
    stated = [arm._replace(runs=arm.runs[arm.runs["run_id"].isin(set(bins["run_id"]))]) for arm in ordinary]
    stated = [arm for arm in stated if len(arm.runs)]
    if not stated:
        return
    figure, axes = _panels([arm.method for arm in stated], 1.75)
    for arm in stated:
        ax = axes[arm.method]
        draw_reliability(bins[bins["run_id"].isin(set(arm.runs["run_id"]))], ax, look=arm.look, shares=False)
        ax.set_title(arm.method)
        ax.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(-2, 102), ylim=(-2, 102))
    _outer(axes)
    legend(figure, {arm.name for arm in stated}, OPTIMIZERS)
    yield (
        "reliability",
        "Accuracy of the ensemble's prediction, of IVON at the mean, against its confidence on the test set, in "
        f"{RELIABILITY_BINS} bins of equal width: below the diagonal it is too sure. Small dots are seeds, large ones their "
        f"mean weighted with the images in a bin, open where they are less than {SPARSE} % of all, {_n(stated)}. "
        f"{_chosen(every)}",
        figure,
    )
