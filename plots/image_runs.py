"""Runs that train on images, for the figures of every experiment that has such: their numbers, what is chosen and compared,
and the drawings that want to know no more of a run than its arm.

An *arm* is one of the methods that an experiment compares; its `Look` says how it is named and drawn. A *cell* is a
configuration without its seed. Whatever is called best was chosen by the validation accuracy after the last epoch, the mean
over seeds; never on test.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from plots.figure import DASHED, LOOKS, MEASURES, MINUS, TEXT_WIDTH, Look, counted, markdown, new_figure, with_spread
from plots.reading import FACTS
from plots.statistics import Difference, difference, interval_of

SCORES = ("test_accuracy", "test_nll", "test_brier", "test_ece", "disagreement", "epistemic", "seconds")
ON_VALIDATION = "by the last epoch's validation accuracy, the mean over seeds, of equals by NLL; never on test"
RELIABILITY_BINS = 15
SPARSE = 1  # % of the images: of a bin with fewer not much is known
RELIABILITY = (
    f"Accuracy of the ensemble's prediction against its confidence on the test set, in {RELIABILITY_BINS} bins of equal width: "
    "below the diagonal it is too sure. Small dots are seeds, large ones their mean weighted with the images in a bin, open "
    f"where they are less than {SPARSE} % of all; grey bars are the share of images in a bin"
)
# where a dot's number stands, in points: methods that cost the same do not write over each other
BESIDE = {"longer": (7, -4), "deep_ensemble": (-7, 4), "batchensemble": (0, -8)}
GREY, INK, BARS = "#404040", "#000000", "#dcdcdc"
LEAVING = 3  # an axis is at most so many times as long as the nearer half of its rows needs; others are at its edge


# --- from rows to numbers ---------------------------------------------------------------------------------------------


def summarise_runs(df: pd.DataFrame, config: Sequence[str]) -> pd.DataFrame:
    """Return one row a run: its configuration, and its measures; shares (accuracy, ECE, disagreement) in percent.

    A mean over epochs that lacks an epoch's value is absent, not the mean of the others.
    """
    ensemble = df[df["member"].isna()]
    test = ensemble[(ensemble["split"] == "test") & (ensemble["epoch"] == ensemble["epochs"])].set_index("run_id")
    runs = test[[*config, *FACTS]].copy()
    for name in ("accuracy", "nll", "brier", "ece"):
        runs[f"test_{name}"] = test[name] * (100 if name in ("accuracy", "ece") else 1)
    runs["disagreement"] = 100 * test["disagreement"]
    runs["epistemic"] = test["epistemic"]
    epochs = summarise_epochs(df).set_index("run_id")
    last = epochs[epochs["epoch"] == epochs["epochs"]]
    runs["validation_accuracy"], runs["validation_nll"] = last["validation_accuracy"], last["validation_nll"]
    for name in ("validation_accuracy", "train_nll"):
        of_run = epochs.groupby("run_id")[name]
        runs[f"mean_{name}"] = of_run.mean().where(of_run.count() == of_run.size())
    runs["seconds"] = epochs.groupby("run_id")["seconds"].sum()
    return runs.reset_index()


def summarise_epochs(df: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run and epoch: seconds, and NLL and accuracy (%) of training (the members' mean) and of validation."""
    by = ["run_id", "epochs", "seed", "epoch"]
    train = df[df["split"] == "train"].groupby(by)
    validation = df[(df["split"] == "validation") & df["member"].isna()].set_index(by)
    epochs = train.agg(train_nll=("nll", "mean"), train_accuracy=("accuracy", "mean"), seconds=("seconds", "first"))
    epochs["train_accuracy"] *= 100
    epochs["validation_accuracy"] = 100 * validation["accuracy"]
    epochs["validation_nll"] = validation["nll"]
    return epochs.reset_index()


def summarise_members(df: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run and member on the test set: test_accuracy (%), test_nll."""
    test = df[(df["split"] == "test") & df["member"].notna()]
    members = test[["run_id", "seed", "member"]].copy()
    members["test_accuracy"], members["test_nll"] = 100 * test["accuracy"], test["nll"]
    return members.reset_index(drop=True)


def summarise_reliability(df: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run and bin of confidence that has images: bin from 0, mean confidence, accuracy and share, in %.

    Empty where results have no rows of split `reliability`.
    """
    bins = curves_of(df, "reliability", {"x": "confidence", "y": "accuracy", "n": "share"})
    bins["bin"] = bins.groupby("run_id").cumcount()
    bins[["confidence", "accuracy", "share"]] *= 100
    return bins.dropna().reset_index(drop=True)


def curves_of(df: pd.DataFrame, split: str, columns: Mapping[str, str]) -> pd.DataFrame:
    """Return one row a run and point of what runs state as numbers between spaces, in the ensemble's row of this split.

    Args:
        columns: those of the results, and what they are called in the answer.
    """
    parts = [pd.DataFrame({"run_id": [], "seed": [], **dict.fromkeys(columns.values(), np.array([]))})]
    if set(columns) <= set(df.columns):
        stated = df[(df["split"] == split) & df["member"].isna()].dropna(subset=list(columns))
        for _, row in stated.iterrows():
            points = {name: np.array(str(row[column]).split(), float) for column, name in columns.items()}
            parts.append(pd.DataFrame({"run_id": row["run_id"], "seed": row["seed"], **points}))
    return pd.concat(parts[1:] or parts, ignore_index=True)


class Setting(NamedTuple):
    """The runs that may be compared, one row each (`summarise_runs`), with a column `arm`: which part a run plays."""

    name: str
    fields: dict[str, Any]
    runs: pd.DataFrame


def setting_names(found: Sequence[tuple[Mapping[str, Any], pd.DataFrame]]) -> list[str]:
    """Return a folder's name for each setting's fields and runs: data and model, and what it does not share with the main one.

    That is the setting of these two with most runs, which so keeps its name when others are tried beside it.
    """
    names = []
    for fields, _ in found:
        namesakes = [
            one for one in found if (one[0]["dataset"], one[0]["model"]) == (fields["dataset"], fields["model"])
        ]
        main, _ = max(namesakes, key=lambda one: len(one[1]))
        differing = [name for name in fields if str(fields[name]) != str(main[name])]
        names.append("-".join([fields["dataset"], fields["model"], *(f"{name}_{fields[name]}" for name in differing)]))
    return names


def choose(runs: pd.DataFrame, cell: Sequence[str], of: Sequence[str] = ("arm", "size")) -> pd.DataFrame:
    """Return the runs of the best cell, told apart by the columns `cell`, of each arm and size, chosen on validation.

    By the last epoch's validation accuracy, the mean over seeds; of equals the one with the lower validation NLL. A cell
    of one seed is chosen only where no cell has more. `candidates` is the number of cells that were chosen from: the best
    of many is flattered by chance more than the best of few.
    """
    cell, of = list(cell), list(of)
    cells = runs.groupby(cell, dropna=False).agg(
        accuracy=("validation_accuracy", "mean"), nll=("validation_nll", "mean"), seeds=("seed", "nunique")
    )
    cells["accuracy"] = cells["accuracy"].round(9)  # the order of a sum decides nothing
    cells["several"] = cells["seeds"] > 1
    ranked = cells.sort_values(
        ["several", "accuracy", "nll"], ascending=[False, False, True], kind="stable"
    ).reset_index()
    ranked["candidates"] = ranked.groupby([*of, "several"])["seeds"].transform("size")
    return runs.merge(ranked.drop_duplicates(of)[[*cell, "candidates"]], on=cell)


# --- from numbers to words --------------------------------------------------------------------------------------------


def in_words(runs: pd.DataFrame) -> dict[str, str]:
    """Return, by name and unit, mean and spread over seeds of every score of a cell's runs; empty where it has none."""
    return {
        MEASURES[name].label: with_spread(runs[name], MEASURES[name], unit=False) if runs[name].notna().any() else ""
        for name in SCORES  # a single network has no disagreement
    }


def compared(ours: pd.DataFrame, other: pd.DataFrame, names: tuple[str, str], measure: str = "test_accuracy") -> str:
    """Return one sentence of what the seeds that two cells have in common say of their difference."""
    found = difference(ours, other, measure)
    if not found.pairs:
        return f"{names[0]} and {names[1]} have no seed in common."
    decimals, unit = MEASURES[measure].decimals, MEASURES[measure].unit.replace("%", "points")
    sentence = f"{names[0]} less {names[1]}: {signed(found.mean, decimals)} {unit}"
    if found.pairs < 3:
        return sentence + f" ({found.pairs} paired seed{'s' * (found.pairs > 1)}: too few to tell)."
    verdict = "a difference" if found.shown else "no difference is shown"
    interval = interval_in_words(found, decimals)
    return sentence + f", 95 % interval {interval} (t, {found.pairs} paired seeds): {verdict}."


def interval_in_words(found: Difference, decimals: int) -> str:
    """Return `-0.12 to +0.34`."""
    return f"{signed(found.mean - found.half, decimals)} to {signed(found.mean + found.half, decimals)}"


def signed(value: float, decimals: int) -> str:
    """Return `+0.12`, `-0.12`, or `0.00` of what is rounded to that."""
    text = f"{value:+.{decimals}f}".replace("-", MINUS)
    return text if text.strip(f"+{MINUS}0.") else text[1:]


def provenance(runs: pd.DataFrame, description: str) -> str:
    """Return from how many runs, made where and by what, a setting's figures are drawn."""
    facts = [
        f"{label}: {', '.join(sorted(set(runs[name].dropna().astype(str)))) or 'not known'}"
        for name, label in (
            ("device_name", "device"), ("number_format", "number format"), ("torch", "torch"), ("commit", "commit"),
        )
    ]  # fmt: skip
    if (runs["dirty"].astype(str) == "True").any():
        facts.append("some runs were made with changes that were not committed")
    return f"Drawn from {runs['run_id'].nunique()} runs. Setting: {description}. {'; '.join(facts)}."


def main_device(runs: pd.DataFrame) -> str:
    """Return the device that most of these runs were made on."""
    return str(runs["device_name"].astype(str).mode()[0])


def measured_on(runs: pd.DataFrame, cell: Sequence[str], measure: str = "seconds") -> str:
    """Return on which device times, or speeds, were measured, and how far they differ where they should not."""
    device, devices = main_device(runs), runs["device_name"].astype(str)
    left_out = "; runs on other devices are left out" if devices.nunique() > 1 else ""
    alike = runs[(devices == device) & (runs[measure] > 0)].groupby(list(cell), dropna=False)[measure]
    factor = (alike.max() / alike.min()).max()
    load = (
        f" Seeds of one configuration do the same work, and their times differ by up to a factor of {factor:.1f}: that is what "
        "else the machine did, and of methods differences of that size say nothing."
        if factor >= 1.05
        else ""
    )
    return f"Measured on {device}{left_out}.{load}"


def difference_in_words(found: Difference, measure: str) -> str:
    """Return `+0.12 (-0.10 to +0.34)`, to the decimals of the measure; of fewer than 3 pairs no interval is known."""
    if not found.pairs:
        return "no seed in common"
    decimals = MEASURES[measure].decimals
    ends = f" ({interval_in_words(found, decimals)})" if np.isfinite(found.half) else ""
    return signed(found.mean, decimals) + ends


def differences_in_words(found: Mapping[str, Difference]) -> dict[str, str]:
    """Return, by name and unit, the difference in each measure with its interval; bold where that leaves 0 out."""
    words = {name: difference_in_words(one, name) for name, one in found.items()}
    return {
        MEASURES[name].label.replace("%", "points"): f"**{text}**" if found[name].shown else text
        for name, text in words.items()
    }


COUNTED = (
    "Better and worse are paired differences over seeds whose 95 % interval (t) leaves 0 out. With no true difference 1 in 40 "
    "would look better, and 1 in 40 worse."
)


def in_favour(found: Difference, measure: str) -> bool:
    """Return whether a difference is shown, and is one for the better."""
    return found.shown and (found.mean > 0) == bool(MEASURES[measure].more_is_better)


def tally(found: Mapping[str, Sequence[Difference]]) -> str:
    """Return, by measure, how many differences are shown to be better and worse; of one alone, what it is.

    Nothing where no interval is known; of how many none is, beside others, is said.
    """
    words = []
    for name, every in found.items():
        known = [one for one in every if np.isfinite(one.half)]
        shown = sum(one.shown for one in known)
        label, unit = MEASURES[name].name.removeprefix("final "), MEASURES[name].unit.replace("%", "points")
        few = f", too few seeds to tell in {len(every) - len(known)} more" if len(known) < len(every) else ""
        if len(known) == len(every) == 1:
            verdict = "" if shown else ", no difference is shown"
            words.append(f"{label} {difference_in_words(known[0], name)} {unit}{verdict}")
        elif known and not shown:
            words.append(f"{label}, no difference is shown in any of {len(known)}{few}")
        elif known:
            better = sum(in_favour(one, name) for one in known)
            words.append(f"{label} better in {better} and worse in {shown - better} of {len(known)}{few}")
    return "; ".join(words)


def paired_table(differences: pd.DataFrame, note: str = "") -> list[str]:
    """Return the table of paired differences (rows of `differences_in_words`) below what it says; nothing of an empty one."""
    if differences.empty:
        return []
    said = (
        "Paired differences over seeds, mean and 95 % interval by Student's t, bold where it leaves 0 out; none is corrected "
        f"for their number.{' ' * bool(note)}{note}"
    )
    return [f"{said}\n\n{markdown(differences)}"]


# --- from numbers to pictures -----------------------------------------------------------------------------------------


def draw_members(
    runs: pd.DataFrame, ax: Axes, *, members: pd.DataFrame, measure: str, looks: Mapping[str, Look] = LOOKS
) -> Axes:
    """Draw each arm (`label`) as a band, a line in it for each seed: small dots are members, the large one their ensemble.

    A vertical stroke through the band is the mean over seeds.
    """
    labels = list(dict.fromkeys(runs["label"]))
    of_run = dict(iter(members.groupby("run_id")[measure]))
    for y, label in enumerate(labels):
        mine = runs[runs["label"] == label].sort_values("seed")
        look = looks[mine["arm"].iloc[0]]
        for i, run in enumerate(mine.itertuples()):
            at = y + 0.62 * ((i + 0.5) / len(mine) - 0.5)
            own = of_run[run.run_id]
            if len(own) > 1:
                ax.plot([own.min(), own.max()], [at, at], color=look.colour, lw=0.5, alpha=0.5)
                ax.plot(own, [at] * len(own), "o", color=look.colour, ms=2.4, mew=0, alpha=0.55)
            ax.plot(getattr(run, measure), at, look.marker, color=look.colour, ms=4.6, mec="white", mew=0.5, zorder=3)
        ax.plot([mine[measure].mean()] * 2, [y - 0.4, y + 0.4], color=look.colour, lw=1.2, zorder=2.5)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_xlabel(MEASURES[measure].label)
    return ax


def draw_scatter(
    runs: pd.DataFrame,
    ax: Axes,
    *,
    x: str,
    y: str,
    cell: Sequence[str],
    looks: Mapping[str, Look] = LOOKS,
    joined: bool = False,
) -> Axes:
    """Draw one measure against another: small dots are runs, large ones the mean of each cell, open ones not `chosen`.

    An arm without x (a single network has no disagreement) is a dashed line at its mean. `joined` means are connected in
    the order of their size, and say it.
    """
    for arm, look in reversed(list(looks.items())):
        mine = runs[runs["arm"] == arm]
        if mine.empty:
            continue
        if mine[x].isna().all():
            ax.axhline(mine[y].mean(), color=look.colour, linestyle=DASHED, lw=1)
            continue
        ax.plot(mine[x], mine[y], look.marker, color=look.colour, ms=2.6, mew=0, alpha=0.5)
        by = mine.groupby(["chosen", *cell], dropna=False)
        means = by[[x, y]].mean().reset_index().sort_values("size")
        for chosen, face, edge in ((False, "none", look.colour), (True, look.colour, "white")):
            some = means[means["chosen"] == chosen]
            line, large = "-" if joined else "", 3.4 if len(some) > 20 else 5.2
            ax.plot(
                some[x], some[y], look.marker, ls=line, color=look.colour, lw=0.9, ms=large, mfc=face, mec=edge, mew=0.7
            )
        if joined and arm != "single":
            for size, at_x, at_y in means[["size", x, y]].itertuples(index=False):
                beside = BESIDE.get(arm, (0, -8))
                text = ax.annotate(
                    f"{size:g}", (at_x, at_y), beside, textcoords="offset points", ha="center", va="center"
                )
                text.set(
                    color=look.colour, fontsize=6.5, path_effects=[Stroke(linewidth=1.5, foreground="white"), Normal()]
                )
    ax.set_xlabel(MEASURES[x].label)
    ax.set_ylabel(MEASURES[y].label)
    return ax


def draw_curves(epochs: pd.DataFrame, ax: Axes, *, measure: str, looks: Mapping[str, Look] = LOOKS) -> Axes:
    """Draw a measure against the epoch for each arm: thin lines are seeds, thick ones their mean."""
    for arm, look in looks.items():
        mine = epochs[epochs["arm"] == arm]
        for _, run in mine.groupby("run_id"):
            ax.plot(run["epoch"], run[measure], color=look.colour, ls=look.line, lw=0.5, alpha=0.45)
        if len(mine):
            mean = mine.groupby("epoch")[measure].mean()
            ax.plot(mean.index, mean, color=look.colour, ls=look.line, lw=1.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.set_ylabel(MEASURES[measure].label)
    return ax


def draw_reliability(bins: pd.DataFrame, ax: Axes, *, look: Look, shares: bool = True) -> Axes:
    """Draw accuracy against confidence of one arm's runs (`summarise_reliability`): on the diagonal what is sure is right.

    Small dots are seeds, large ones their mean weighted with the images of each, open where a bin has less than SPARSE % of
    them; grey bars are the share of images in a bin, left out without `shares`.
    """
    weighted = bins.assign(right=bins["accuracy"] * bins["share"], sure=bins["confidence"] * bins["share"])
    pooled = weighted.groupby("bin")[["right", "sure", "share"]].sum()
    wide, runs = 100 / RELIABILITY_BINS, bins["run_id"].nunique()
    if shares:
        ax.bar(pooled.index * wide, pooled["share"] / runs, width=wide, align="edge", color=BARS, lw=0)
    ax.plot([0, 100], [0, 100], color=GREY, lw=0.8, ls=DASHED, zorder=1.5)
    style: dict[str, Any] = {
        "color": look.colour,
        "clip_on": False,
        "in_layout": False,
        "ls": "",
        "marker": look.marker,
    }
    ax.plot(bins["confidence"], bins["accuracy"], ms=1.8, mew=0, alpha=0.5, **style)
    right, sure = (pooled[name] / pooled["share"] for name in ("right", "sure"))
    full = pooled["share"] / runs >= SPARSE
    ax.plot(sure[full], right[full], color=look.colour, lw=0.8, clip_on=False)
    ax.plot(sure[~full], right[~full], ms=3.4, mfc="white", mew=0.7, zorder=3, **style)
    ax.plot(sure[full], right[full], ms=3.8, mec="white", mew=0.4, zorder=3, **style)
    ax.set(xlim=(0, 100), ylim=(0, 100), xticks=range(0, 101, 25), yticks=range(0, 101, 25))
    return ax


class Row(NamedTuple):
    """What stands in a row: values of seeds, their mean with its interval, and how they look."""

    values: pd.Series
    found: Difference
    look: Look


def row_of(runs: pd.DataFrame, measure: str, look: Look) -> Row:
    values = runs.sort_values("seed")[measure].dropna()
    return Row(values, interval_of(values), look)


def row_of_difference(runs: pd.DataFrame, others: pd.DataFrame, measure: str, look: Look) -> Row:
    """Return the paired differences of the seeds that both have."""
    each = runs.set_index("seed")[measure] - others.set_index("seed")[measure]
    return Row(each.dropna().sort_index(), difference(runs, others, measure), look)


def draw_rows(
    groups: Mapping[str, Sequence[tuple[str, Row]]], ax: Axes, *, measure: str, differences: bool = False
) -> Axes:
    """Draw labelled rows from above, those of a group below its heading: dots are seeds, a diamond their mean and interval.

    A row that lies far from the rest, or of which a part would be cut off, is written at the edge. Of `differences` 0 is
    on the axis.
    """
    rows = [row for title, some in groups.items() for row in [(title, None), *some]]
    there = [(at, row) for at, (_, row) in enumerate(rows) if row is not None and len(row.values)]

    def ends(row: Row) -> tuple[float, float, float]:
        mean, half = row.found.mean, np.nan_to_num(row.found.half)
        return mean, min(mean - half, row.values.min()), max(mean + half, row.values.max())

    low, high = span_of([ends(row) for _, row in there], differences) if there else (-1, 1)
    for at, row in there:
        mean, least, most = ends(row)
        if low <= least and most <= high:
            _draw_strip(ax, at, row)
            continue
        words = with_spread(row.values, MEASURES[measure], unit=False).replace("-", MINUS)
        if differences:
            words = difference_in_words(row.found, measure)
        left = mean < (low + high) / 2
        ax.text(
            0.01 if left else 0.99,
            at,
            f"\N{LEFTWARDS ARROW} {words}" if left else f"{words} \N{RIGHTWARDS ARROW}",
            transform=ax.get_yaxis_transform(),
            ha="left" if left else "right",
            va="center",
            fontsize=6.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    ax.set_xlim(low, high)
    ax.set_xlabel(MEASURES[measure].label)
    if differences:
        ax.axvline(0, color=GREY, lw=0.8, zorder=1)
        ax.set_xlabel(f"difference of\n{MEASURES[measure].label.replace('%', 'points')}")
    ax.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
    ax.set_yticks(range(len(rows)), [label for label, _ in rows])
    for tick, (_, strip) in zip(ax.yaxis.get_major_ticks(len(rows)), rows, strict=True):
        tick.label1.set_fontweight("normal" if strip else "bold")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    return ax


def _draw_strip(ax: Axes, at: float, row: Row) -> None:
    rows = at - 0.15 + (np.linspace(-0.2, 0.2, len(row.values)) if len(row.values) > 1 else np.zeros(1))
    ax.plot(row.values, rows, row.look.marker, color=row.look.colour, ms=2.8, mec="white", mew=0.2, zorder=3)
    style: dict[str, Any] = {"fmt": "D", "color": INK, "ms": 3, "mec": "white", "mew": 0.4, "elinewidth": 0.9}
    ax.errorbar(row.found.mean, at + 0.27, xerr=np.nan_to_num(row.found.half), zorder=2.5, **style)


def span_of(parts: Sequence[tuple[float, float, float]], zero: bool = False) -> tuple[float, float]:
    """Return the ends of an axis for (mean, lowest, highest): of all, but for what lies far from the rest of them.

    From the half that is nearest to the median, and 0 if it must be seen, outwards, until the axis would be LEAVING times as
    long as these need.
    """
    middle = np.median([mean for mean, _, _ in parts])
    near = sorted(parts, key=lambda part: abs(part[0] - middle))
    half = near[: max(3, -(-len(near) // 2))]
    seen = [0.0] if zero else []
    low, high = min([*seen, *(part[1] for part in half)]), max([*seen, *(part[2] for part in half)])
    longest = LEAVING * (high - low)
    for _, least, most in near[len(half) :]:
        if max(high, most) - min(low, least) > longest:
            break
        low, high = min(low, least), max(high, most)
    return padded([low, high])


def padded(values: Iterable[float]) -> tuple[float, float]:
    low, high = float(min(values := list(values))), float(max(values))
    pad = 0.05 * (high - low) or 0.5
    return low - pad, high + pad


def dots_of(n: Iterable[int], what: str = "seed") -> str:
    """Return what is in the rows of `draw_rows`, of so many seeds."""
    edge = "what lies far from the rest, or reaches as far, is written at the edge"
    return f"Dots are seeds, {diamonds_of(n, what)}; {edge}"


def diamonds_of(n: Iterable[int], what: str = "seed") -> str:
    """Return what diamonds are, of so many seeds: no interval is promised where none is known."""
    interval = " with its 95 % interval by Student's t" if max(n := list(n)) >= 3 else ""
    none = f"; no interval is drawn of fewer than 3 {what}s" if min(n) < 3 else ""
    return f"diamonds their mean{interval}, {counted(n).replace('seed', what)}{none}"


def two_scatters(
    runs: pd.DataFrame,
    left: tuple[str, str],
    right: tuple[str, str],
    cell: Sequence[str],
    looks: Mapping[str, Look] = LOOKS,
    joined: bool = False,
) -> Figure:
    """Return a figure of two scatters, each of a measure (first) against another; what is joined has a logarithmic x."""
    figure = new_figure(TEXT_WIDTH, 2.6)
    for ax, (x, y) in zip(figure.subplots(1, 2), (left, right), strict=True):
        draw_scatter(runs, ax, x=x, y=y, cell=cell, looks=looks, joined=joined)
        if joined:
            logarithmic(ax)
    dashed = set(runs["arm"]) - set(runs.loc[runs[left[0]].notna(), "arm"])
    legend(figure, set(runs["arm"]), looks, dashed=dashed)
    return figure


def two_curves(epochs: pd.DataFrame, looks: Mapping[str, Look] = LOOKS) -> Figure:
    """Return a figure of training NLL and validation accuracy by epoch."""
    figure = new_figure(TEXT_WIDTH, 2.6)
    axes = figure.subplots(1, 2)
    logarithmic_losses(draw_curves(epochs, axes[0], measure="train_nll", looks=looks))
    draw_curves(epochs, axes[1], measure="validation_accuracy", looks=looks)
    legend(figure, set(epochs["arm"]), looks, lines=looks)
    return figure


def two_members(bands: pd.DataFrame, df: pd.DataFrame, looks: Mapping[str, Look] = LOOKS) -> Figure:
    """Return a figure of members beside their ensemble, a band for each `label` of these runs: test accuracy and NLL."""
    figure = new_figure(TEXT_WIDTH, 0.3 * bands["label"].nunique() + 0.5)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, measure in zip(axes, ("test_accuracy", "test_nll"), strict=True):
        draw_members(bands, ax, members=summarise_members(df), measure=measure, looks=looks)
    return figure


def reliability_diagrams(bins: pd.DataFrame, panels: Mapping[str, tuple[Look, Collection[str]]]) -> Figure:
    """Return a figure of reliability diagrams, at most four beside each other.

    Args:
        bins: `summarise_reliability` of the results.
        panels: title -> how it looks, and which runs (their ids) it is of.
    """
    columns = min(4, len(panels))
    down = -(-len(panels) // columns)
    figure = new_figure(TEXT_WIDTH * max(columns, 2) / 4, 1.75 * down + 0.35)
    axes = figure.subplots(down, columns, sharex=True, sharey=True, squeeze=False)
    for ax, (title, (look, runs)) in zip(axes.flat, panels.items(), strict=False):
        draw_reliability(bins[bins["run_id"].isin(list(runs))], ax, look=look).set_title(title)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_axis_off()
    figure.supxlabel("confidence of the ensemble's prediction (%)", fontsize=8)
    figure.supylabel("accuracy, share of images (%)", fontsize=8)
    return figure


def logarithmic(ax: Axes) -> None:
    """Make x logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def logarithmic_losses(ax: Axes) -> None:
    """Make y logarithmic, with plain numbers; what is drawn is there already."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def legend(
    figure: Figure,
    arms: Collection[str],
    looks: Mapping[str, Look] = LOOKS,
    lines: Collection[str] = (),
    dashed: Collection[str] = (),
) -> None:
    """Put above a figure which arm is which: drawn as `lines`, as a `dashed` line, or else as its marker."""
    handles = []
    for arm, look in looks.items():
        if arm in arms:
            style: Any = DASHED if arm in dashed else look.line if arm in lines else ""
            handles.append(
                Line2D([], [], color=look.colour, marker="" if style else look.marker, ls=style, label=look.label)
            )
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 5))
