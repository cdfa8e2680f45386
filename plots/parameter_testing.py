"""Figures of parameter testing: which initial alpha and gamma, how many members, at which learning rate; and at what cost?

A *setting* is everything that the experiment does not vary on purpose: data, model, optimizer, batch size, epochs ...
Each setting has figures of its own. Beside its BatchEnsembles stand, equal in all of that, the single network, the deep
ensembles, and single networks trained for a multiple of the epochs: M times as long sees as many images as all members
of M do under `repeat`.

An arm is single, longer (a single network with `size` times the epochs), deep_ensemble or batchensemble; `size` is the number
of members, for `longer` the multiple. Whatever is called best was chosen on validation (`image_runs.choose`), never on test.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from plots.figure import (
    DASHED,
    LOOKS,
    MEASURES,
    REFERENCE_COLUMNS,
    TEXT_WIDTH,
    TIMES,
    Figures,
    Finding,
    colour_bar,
    counted,
    heatmap,
    levels_of,
    listed,
    markdown,
    new_figure,
    norm_of,
    number,
    ordered_looks,
    spread_of,
    with_spread,
)
from plots.image_runs import (
    ON_VALIDATION,
    RELIABILITY,
    Setting,
    choose,
    compared,
    in_words,
    main_device,
    measured_on,
    provenance,
    reliability_diagrams,
    setting_names,
    summarise_epochs,
    summarise_reliability,
    summarise_runs,
    two_curves,
    two_members,
    two_scatters,
)

SETTING = [
    "dataset", "model", "batchnorm", "regime", "optimizer", "weight_decay", "momentum", "hess_init", "warmup_epochs",
    "batch_size", "augment", "precision", "epochs",
]  # fmt: skip
VARIED = ["method", "ensemble_size", "alpha_init", "gamma_init", "learning_rate", "seed"]
CONFIG = [*SETTING, *VARIED]

CELL = ["arm", "size", "alpha_init", "gamma_init", "learning_rate"]
SAME_MEMBERS = 1e-6  # nats of epistemic uncertainty
BANDS = 9  # members are drawn for so many cells, of more only for some
BATCH_ENSEMBLE = "BatchEnsemble of M"


# --- from rows to numbers ---------------------------------------------------------------------------------------------


def settings(df: pd.DataFrame) -> list[Setting]:
    """Return the settings of a results table, by name; a single network may belong to several."""
    runs = summarise_runs(df, CONFIG)
    found: list[tuple[dict[str, Any], pd.DataFrame]] = []
    taken: set[str] = set()
    for method in ("batchensemble", "deep_ensemble", "single"):  # what has no setting yet makes its own
        while not (left := runs[(runs["method"] == method) & ~runs["run_id"].isin(taken)].sort_values("epochs")).empty:
            fields = {name: left.iloc[0][name] for name in SETTING}
            found.append((fields, _belonging(runs, fields)))
            taken |= set(found[-1][1]["run_id"])
    names = setting_names(found)
    return sorted(Setting(name, *item) for name, item in zip(names, found, strict=True))


def _belonging(runs: pd.DataFrame, fields: dict[str, Any]) -> pd.DataFrame:
    def equal(*names: str) -> pd.Series:
        return (runs[list(names)] == pd.Series({name: fields[name] for name in names})).all(axis=1)

    # `scripts.parameter_testing.Config` gives a field that a method has no use for its neutral value
    same = equal(*(name for name in SETTING if name not in ("batchnorm", "regime", "epochs")))
    plain = runs["batchnorm"] == ("none" if fields["batchnorm"] == "none" else "shared")
    times = runs["epochs"] // fields["epochs"]
    single = same & plain & (runs["method"] == "single") & (runs["epochs"] % fields["epochs"] == 0)
    deep = same & plain & (runs["method"] == "deep_ensemble") & equal("regime", "epochs")
    shared = same & (runs["method"] == "batchensemble") & equal("batchnorm", "regime", "epochs")
    mine = runs[single | deep | shared].copy()
    mine["arm"] = mine["method"].where(~((mine["method"] == "single") & (times > 1)), "longer")
    mine["size"] = mine["ensemble_size"].where(mine["method"] != "single", times)
    return mine.sort_values([*CELL, "seed"]).reset_index(drop=True)


def main_size(runs: pd.DataFrame) -> int | None:
    """Return the ensemble size most runs are of, the larger of equals: the one that methods are compared at."""
    for arm in ("batchensemble", "deep_ensemble", "longer"):
        sizes = runs.loc[runs["arm"] == arm, "size"]
        if len(sizes):
            return int(max((sizes[sizes > 1] if sizes.max() > 1 else sizes).mode()))
    return None


def summarise_arms(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the chosen runs of each method at the main ensemble size, by label: what is compared with what."""
    chosen, size = choose(runs, CELL), main_size(runs)
    arms = {}
    for arm in LOOKS:
        mine = chosen[(chosen["arm"] == arm) & (chosen["size"] == (1 if arm == "single" else size))]
        if len(mine):
            arms[arm] = mine
    return arms


def summarise_alpha_gamma(runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return mean, sd and n of a measure for each alpha and gamma; `marked` where all members predict the same."""
    by = ["alpha_init", "gamma_init"]
    cells = spread_of(runs, by, measure)
    same = runs.groupby(by, dropna=False)["epistemic"].max().reset_index(name="marked")
    same["marked"] = same["marked"] < SAME_MEMBERS
    return cells.merge(same, on=by)


def summarise_sizes(runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return mean, sd and n of a measure for each ensemble size and learning rate."""
    return spread_of(runs, ["size", "learning_rate"], measure)


def summarise_chosen(runs: pd.DataFrame) -> pd.DataFrame:
    """Return, as text, what was chosen on validation for each method and size: its settings, n, and its measures."""
    rows = []
    for arm in LOOKS:
        chosen = choose(runs[runs["arm"] == arm], CELL)
        for size in levels_of(chosen["size"]):
            mine, fast = chosen[chosen["size"] == size], arm == "batchensemble"
            first = mine.iloc[0]
            row = {
                "method": label_of(arm, int(size)),
                "learning rate": number(first["learning_rate"]),
                "alpha": number(first["alpha_init"]) if fast else "",
                "gamma": number(first["gamma_init"]) if fast else "",
                "chosen from": str(first["candidates"]),
                "seeds": str(len(mine)),
                "parameters": f"{first['parameters']:,}",
            }
            rows.append(row | in_words(mine))
    return pd.DataFrame(rows)


# --- from numbers to pictures -----------------------------------------------------------------------------------------


def label_of(arm: str, size: int, short: bool = False) -> str:
    """Return what a method is called: `single network`, `deep ensemble of 4`; short: in two lines."""
    if arm == "longer":
        return f"single,\n{size} {TIMES} epochs" if short else f"single network, {size} {TIMES} epochs"
    if short:
        return LOOKS[arm].label.replace(" ", "\n")
    return LOOKS[arm].label + (f" of {size}" if arm != "single" else "")


def draw_alpha_gamma(runs: pd.DataFrame, ax: Axes, *, measure: str, references: pd.DataFrame | None = None) -> Axes:
    """Draw a heatmap of alpha (rows) and gamma (columns), and beside it the `references`, runs of the other arms."""
    cells = summarise_alpha_gamma(runs, measure)
    beside = []
    if references is not None:
        means = spread_of(references, ["arm", "size"], measure)
        for arm in ("single", "longer", "deep_ensemble"):
            for size, mean, sd in means.loc[means["arm"] == arm, ["size", "mean", "sd"]].itertuples(index=False):
                beside.append((label_of(arm, int(size), short=True), mean, sd))
    norm = norm_of(cells["mean"], [mean for _, mean, _ in beside])
    levels = (levels_of(runs["alpha_init"]), levels_of(runs["gamma_init"]))
    heatmap(ax, cells, ("alpha_init", "gamma_init"), levels, MEASURES[measure], norm, beside)
    across = len(levels[1])
    ax.set_xlabel(r"initial $\gamma$", x=across / 2 / (across + (REFERENCE_COLUMNS if beside else 0)))
    ax.set_ylabel(r"initial $\alpha$")
    colour_bar([ax], MEASURES[measure], norm)
    return ax


def draw_size_rate(runs: pd.DataFrame, ax: Axes, *, measure: str, levels: Any, norm: Normalize) -> Axes:
    """Draw a heatmap of ensemble size (rows) and learning rate (columns)."""
    heatmap(ax, summarise_sizes(runs, measure), ("size", "learning_rate"), levels, MEASURES[measure], norm)
    ax.set_xlabel("learning rate")
    return ax


def draw_sizes(runs: pd.DataFrame, ax: Axes, *, measures: Sequence[str], rates: Sequence[float]) -> Axes:
    """Draw measures against ensemble size: a line through the means for each learning rate, and a dot for each seed.

    The first measure is drawn solid, the second dashed with open dots.
    """
    for i, (rate, (colour, marker)) in enumerate(ordered_looks(rates).items()):
        shift = 2 ** (0.1 * (i - (len(rates) - 1) / 2))  # beside each other, not over each other
        mine = runs[runs["learning_rate"] == rate]
        for measure, line, face in zip(measures, ("-", DASHED), (colour, "white"), strict=False):
            means = spread_of(mine, ["size"], measure)
            ax.plot(means["size"] * shift, means["mean"], color=colour, linestyle=line)
            nth = mine.groupby("size").cumcount() - (mine.groupby("size")["seed"].transform("size") - 1) / 2
            at = mine["size"] * shift * 2 ** (0.03 * nth)
            ax.plot(at, mine[measure], marker, color=colour, mfc=face, ms=3.2, mew=0.6, alpha=0.8)
    return ax


# --- which figures, and what they say ---------------------------------------------------------------------------------


def figures(df: pd.DataFrame) -> Figures:
    """Yield (setting/name, caption, figure) of every figure that the results support; inside `plots.figure.style()`."""
    for setting in settings(df):
        for part in (_alpha_gamma_figures, _size_figures, _comparison_figures):
            for name, caption, figure in part(setting, df):
                yield f"{setting.name}/{name}", f"{caption} Setting: {describe(setting)}.", figure


def findings(df: pd.DataFrame) -> dict[str, Finding]:
    """Return for each setting's name what was found, and from what."""
    found = {}
    for setting in settings(df):
        table = (
            "Mean ± standard deviation over seeds (of one seed no spread is known); "
            f"learning rate, alpha and gamma of each row chosen {ON_VALIDATION}.\n\n"
            + markdown(summarise_chosen(setting.runs))
        )
        found[setting.name] = Finding(_sentences(setting), table, provenance(setting.runs, describe(setting)))
    return found


def describe(setting: Setting) -> str:
    """Return in words what a setting holds constant, and where its images are from."""
    f, sources = setting.fields, sorted(set(setting.runs["data_source"].astype(str)))
    return (
        f"{f['dataset']} ({', '.join(sources)}), {f['model']}, {f['epochs']} epochs, batches of {f['batch_size']} new images, "
        f"regime {f['regime']}, {f['optimizer']} with momentum {number(f['momentum'])}, weight decay "
        f"{number(f['weight_decay'])}{', hess_init ' + number(f['hess_init']) if f['optimizer'] == 'ivon' else ''} and "
        f"{number(f['warmup_epochs'])} warm-up epochs, batchnorm {f['batchnorm']}, augment {f['augment']}, "
        f"precision {f['precision']}"
    )


def _sentences(setting: Setting) -> list[str]:
    arms, f = summarise_arms(setting.runs), setting.fields
    size = main_size(setting.runs)
    accuracy, nll = MEASURES["test_accuracy"], MEASURES["test_nll"]
    n = counted(len(arm) for arm in arms.values()).removeprefix("n = ")
    of = f", {size} members" if {"batchensemble", "deep_ensemble"} & set(arms) and size != 1 else ""
    values = [f"{_in_words(arm)} {with_spread(arm['test_accuracy'], accuracy)}" for arm in arms.values()]
    losses = [f"{with_spread(arm['test_nll'], nll, unit=False)}" for arm in arms.values()]
    spread = " ± standard deviation" if max(map(len, arms.values())) > 1 else ""
    lines = [
        f"{f['dataset']}, {f['model']}, {f['epochs']} epoch{'s' if f['epochs'] > 1 else ''}{of}, {n}: {listed(values)} "
        f"final test accuracy (mean{spread}); NLL {listed(losses)}."
    ]
    if "batchensemble" in arms:
        ours = arms["batchensemble"]
        lines += [
            compared(ours, arms[arm], ("BatchEnsemble", label_of(arm, size or 1)))
            for arm in LOOKS
            if arm in arms and arm != "batchensemble"
        ]
    if not spread:
        lines.append("One seed each: no spread is known, and no method can be said to be better.")
    return lines


def _in_words(arm: pd.DataFrame) -> str:
    first = arm.iloc[0]
    settings = [f"learning rate {number(first['learning_rate'])}"]
    if first["arm"] == "batchensemble":
        settings = [f"alpha {number(first['alpha_init'])}", f"gamma {number(first['gamma_init'])}", *settings]
    if first["candidates"] > 1:
        settings.append(f"best of {first['candidates']} by validation")
    return f"{label_of(first['arm'], first['size'])} ({', '.join(settings)})"


def _alpha_gamma_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    """Figures 1 to 4 of the original study, for each ensemble size and learning rate with several alphas and gammas."""
    for i, plane in enumerate(planes(setting.runs)):
        size, rate = int(plane["size"].iloc[0]), plane["learning_rate"].iloc[0]
        same_rate = setting.runs[setting.runs["learning_rate"] == rate]
        references = same_rate[
            (same_rate["arm"] == "single")
            | (same_rate["arm"].isin(["longer", "deep_ensemble"]) & (same_rate["size"] == size))
        ]
        down, across = (plane[name].nunique(dropna=False) for name in ("alpha_init", "gamma_init"))
        for measure in (
            "test_accuracy", "mean_validation_accuracy", "test_nll", "mean_train_nll", "test_ece", "disagreement", "epistemic",
        ):  # fmt: skip
            cells = summarise_alpha_gamma(plane, measure)
            if cells.empty:
                continue
            beside = references.dropna(subset=[measure])
            width = 0.62 * (across + (REFERENCE_COLUMNS if len(beside) else 0)) + 1.4
            figure = new_figure(min(TEXT_WIDTH, width), 0.42 * max(down, 3) + 0.6)
            draw_alpha_gamma(plane, figure.add_subplot(), measure=measure, references=beside)
            pooled = np.sqrt((cells["sd"] ** 2).mean())
            caption = [
                f"{MEASURES[measure].title} of a BatchEnsemble of {size} by the initialisation of alpha (rows) and gamma "
                "(columns): -v is N(1, v), v the standard deviation; 0 to 1 is the probability of +1, else -1.",
                f"Learning rate {number(rate)}, also of the references beside it."
                if len(beside)
                else f"Learning rate {number(rate)}.",
                f"Mean over seeds, {counted(cells['n'])}; "
                + (
                    f"standard deviation over seeds, pooled over cells: {pooled:.{MEASURES[measure].decimals}f}."
                    if np.isfinite(pooled)
                    else "of one seed no spread is known."
                ),
                f"{len(cells)} of {down * across} cells are there"
                + ("." if len(cells) == down * across else "; a hatched one was not run, or its training diverged."),
            ]
            if cells["marked"].any():
                caption.append(f"= marks the {cells['marked'].sum()} where all members are the same network.")
            # the fullest map has the plain name
            name = f"alpha_gamma_{measure}" + (f"-m{size}-lr{rate:g}" if i else "")
            yield name, " ".join(caption), figure


def planes(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the BatchEnsembles of each size and learning rate that have several alphas and gammas, the fullest first."""
    fast = runs[runs["arm"] == "batchensemble"]
    planes = [(len(plane.drop_duplicates(CELL)), key, plane) for key, plane in fast.groupby(["size", "learning_rate"])]
    return [plane for cells, _, plane in sorted(planes, key=lambda plane: plane[:2], reverse=True) if cells > 1]


def _size_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    """Figures 5 to 14 of the original study, at the alpha and gamma that most sizes and learning rates were run with."""
    panels = by_size(setting.runs)
    runs = pd.concat([setting.runs.iloc[:0], *panels.values()])
    sizes, rates = levels_of(runs["size"]), levels_of(runs["learning_rate"])
    if len(sizes) < 2 or max(len(rates), *(panel["size"].nunique() - 1 for panel in panels.values())) < 2:
        return
    single = choose(setting.runs[setting.runs["arm"] == "single"], CELL)
    every = len(sizes) * len(rates)
    there = {title: len(panel.drop_duplicates(["size", "learning_rate"])) for title, panel in panels.items()}
    what = f"{listed(list(panels))}; M = 1 is the single network in all but the BatchEnsembles."
    fast = runs[runs["arm"] == "batchensemble"]
    if len(fast):
        alpha, gamma = fast[["alpha_init", "gamma_init"]].iloc[0]
        what = what.replace(
            "BatchEnsemble of M", f"BatchEnsemble of M (alpha {number(alpha)}, gamma {number(gamma)})", 1
        )
    n = counted(runs.groupby(CELL, dropna=False)["seed"].nunique())
    found = (
        f"Of {every} pairs of M and learning rate there are {listed([f'{k} ({title})' for title, k in there.items()])}"
    )
    found += "." if min(there.values()) == every else "; an absent one was not run, or its training diverged."
    dashed = f" Dashed: {_in_words(single)}, chosen {ON_VALIDATION}." if len(single) else ""

    for measure in ("mean_validation_accuracy", "mean_train_nll", "test_accuracy", "test_nll"):
        title = MEASURES[measure].title
        yield (
            f"ensemble_size_{measure}",
            f"{title} against M, a line for each learning rate: {what} Dots are seeds, lines means, {n}.{dashed} {found}",
            _size_lines(panels, [measure], sizes, rates, single),
        )
        figure = new_figure(TEXT_WIDTH, 0.4 * len(sizes) + 0.9)
        norm = norm_of(*(summarise_sizes(panel, measure)["mean"] for panel in panels.values()))
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (name, panel) in zip(axes, panels.items(), strict=True):
            draw_size_rate(panel, ax, measure=measure, levels=(sizes, rates), norm=norm).set_title(name)
        for ax in axes[1:]:
            ax.tick_params(labelleft=False)
        axes[0].set_ylabel("M")
        colour_bar(axes, MEASURES[measure], norm)
        yield (
            f"ensemble_size_learning_rate_{measure}",
            f"{title} by M (rows) and learning rate (columns): {what} Mean ± standard deviation over seeds, {n}. {found}",
            figure,
        )
    for kind, final, mean in (
        ("accuracy", "test_accuracy", "mean_validation_accuracy"),
        ("nll", "test_nll", "mean_train_nll"),
    ):
        yield (
            f"ensemble_size_final_and_mean_{kind}",
            f"{MEASURES[final].title} (solid, filled dots) and {MEASURES[mean].label} (dashed, open dots) against M, by "
            f"learning rate: {what} Dots are seeds, lines means, {n}. {found}",
            _size_lines(panels, [final, mean], sizes, rates, single),
        )


def by_size(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return by title what is compared over the size M: the three ways to spend M times a single network's training."""
    panels = {}
    fast = runs[runs["arm"] == "batchensemble"]
    pairs = fast.drop_duplicates(CELL).groupby(["alpha_init", "gamma_init"], dropna=False, as_index=False).size()
    if len(pairs):
        most = pairs.sort_values("size", ascending=False, kind="stable").iloc[:1]
        mine = fast.merge(most[["alpha_init", "gamma_init"]], on=["alpha_init", "gamma_init"])
        panels[BATCH_ENSEMBLE] = mine
    for arm, title in (("deep_ensemble", "deep ensemble of M"), ("longer", f"single network, M {TIMES} epochs")):
        if (runs["arm"] == arm).any():
            panels[title] = runs[runs["arm"].isin(["single", arm])]
    return panels


def _size_lines(
    panels: dict[str, pd.DataFrame], measures: list[str], sizes: list[float], rates: list[float], single: pd.DataFrame
) -> Figure:
    figure = new_figure(TEXT_WIDTH, 2.5)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    reference = len(single) > 0 and len(measures) == 1
    for ax, (title, panel) in zip(axes, panels.items(), strict=True):
        draw_sizes(panel, ax, measures=measures, rates=rates).set_title(title)
        if reference:
            ax.axhline(single[measures[0]].mean(), color=LOOKS["single"].colour, linestyle=DASHED, lw=0.9, zorder=1)
        ax.set_xscale("log", base=2)
        ax.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
        ax.xaxis.set_major_locator(FixedLocator(sizes))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("multiple of epochs M" if TIMES in title else "ensemble size M")
    first = MEASURES[measures[0]]
    both = f"{'accuracy' if first.more_is_better else 'NLL'} ({first.unit})"
    axes[0].set_ylabel(first.label.replace(", ", ",\n") if len(measures) == 1 else both)
    handles = [Line2D([], [], color=c, marker=m, ms=3.5, label=number(r)) for r, (c, m) in ordered_looks(rates).items()]
    if reference:
        handles.append(Line2D([], [], color=LOOKS["single"].colour, linestyle=DASHED, lw=0.9, label="single network"))
    if len(measures) == 2:
        grey = "#404040"
        mean_of = "validation" if first.more_is_better else "training"
        handles.append(Line2D([], [], color=grey, marker="o", ms=3.5, label="test, final"))
        handles.append(
            Line2D(
                [],
                [],
                color=grey,
                linestyle=DASHED,
                marker="o",
                mfc="white",
                ms=3.5,
                label=f"{mean_of},\nmean over epochs",
            )
        )
    figure.legend(handles=handles, title="learning rate", loc="outside right upper", alignment="left", handlelength=2.6)
    return figure


def _comparison_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    """What the original study lacked: members beside ensembles, calibration, diversity, cost and training curves."""
    runs, arms = setting.runs, summarise_arms(setting.runs)
    main = pd.concat(list(arms.values()))
    n = counted(len(arm) for arm in arms.values())
    chosen = f"Chosen {ON_VALIDATION}: {listed([_in_words(arm) for arm in arms.values()])}."
    cells = [cell for plane in planes(runs)[:1] for _, cell in plane.groupby(CELL, dropna=False)]
    cells = [cell for cell in cells if not set(cell["run_id"]) & set(main["run_id"])]
    others = (
        f" Open: {len(cells)} BatchEnsembles of other alpha and gamma (learning rate {_rate(cells)})." if cells else ""
    )

    bands = pd.concat(
        [_band(arm, label_of(name, int(arm["size"].iloc[0]))) for name, arm in arms.items()]
        + [_band(cell) for cell in _spanning(cells)]
    )
    below = "BatchEnsembles of other alpha and gamma"
    if len(cells) > BANDS:
        below = f"of {len(cells)} {below} the best, the median and the worst on validation"
    yield (
        "members",
        "Members beside their ensemble: final test accuracy (left) and NLL (right). Each line is a seed, its small dots the "
        f"members alone, its large dot their ensemble; the stroke through a band is the mean over seeds, {n}. {chosen}"
        + (f" Below: {below} (learning rate {_rate(cells)})." if cells else ""),
        two_members(bands, df),
    )

    dots = pd.concat([main.assign(chosen=True), *(cell.assign(chosen=False) for cell in cells)])
    figure = two_scatters(dots, ("test_nll", "test_ece"), ("test_nll", "test_brier"), CELL)
    yield (
        "calibration",
        "Calibration on the test set: ECE (15 bins, left) and Brier score (right) against NLL, down and left is better. Small "
        f"dots are runs, large ones means over seeds, {n}. {chosen}{others}",
        figure,
    )
    if dots["disagreement"].notna().any():
        figure = two_scatters(dots, ("disagreement", "test_accuracy"), ("epistemic", "test_nll"), CELL)
        yield (
            "diversity",
            "Does diversity pay? Final test accuracy against the share of test images on which two members disagree (left); "
            "NLL against the mutual information of prediction and member (right). Small dots are runs, large ones means over "
            f"seeds, {n}; dashed: the mean of networks without members. {chosen}{others}",
            figure,
        )

    timed = choose(runs[runs["device_name"].astype(str) == main_device(runs)], CELL).assign(chosen=True)
    figure = two_scatters(timed, ("seconds", "test_accuracy"), ("seconds", "test_nll"), CELL, joined=True)
    yield (
        "cost",
        "Final test accuracy (left) and NLL (right) against the seconds of training, without validation; the networks of a "
        "deep ensemble count one after another. Numbers are members; of a longer single network, multiples of the epochs. "
        f"Small dots are runs, large ones means over seeds, {counted(timed.groupby(['arm', 'size']).size())}. "
        f"{measured_on(runs, CELL)} Learning rate, alpha and gamma of each method and size were chosen {ON_VALIDATION}.",
        figure,
    )

    bins = summarise_reliability(df)
    shown = {name: arm[arm["run_id"].isin(set(bins["run_id"]))] for name, arm in arms.items()}
    panels = {
        label_of(name, int(arm["size"].iloc[0]), name == "longer").replace("\n", " "): (LOOKS[name], set(arm["run_id"]))
        for name, arm in shown.items()
        if len(arm)
    }
    if panels:
        counts = counted(len(arm) for arm in shown.values() if len(arm))
        yield "reliability", f"{RELIABILITY}, {counts}. {chosen}", reliability_diagrams(bins, panels)

    epochs = summarise_epochs(df).merge(main.loc[main["arm"] != "longer", ["run_id", "arm"]], on="run_id")
    if epochs["epoch"].nunique() > 1:
        yield (
            "training",
            "Training NLL (running, in training mode, the members' mean; left) and validation accuracy of the ensemble "
            f"(right) by epoch. Thin lines are seeds, thick ones their mean, {n}. {chosen}"
            + (" The longer single network, with epochs of its own, is not drawn." if "longer" in arms else ""),
            two_curves(epochs),
        )


def _spanning(cells: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Return the cells, of many only the best, the median and the worst on validation."""
    if len(cells) <= BANDS:
        return cells
    ranked = sorted(cells, key=lambda cell: cell["validation_accuracy"].mean(), reverse=True)
    return [ranked[0], ranked[len(ranked) // 2], ranked[-1]]


def _band(cell: pd.DataFrame, method: str = "") -> pd.DataFrame:
    first = cell.iloc[0]
    fast = rf"$\alpha$ {number(first['alpha_init'])}, $\gamma$ {number(first['gamma_init'])}"
    return cell.assign(label=f"{method}\n{fast}".strip() if first["arm"] == "batchensemble" else method)


def _rate(cells: list[pd.DataFrame]) -> str:
    return number(cells[0]["learning_rate"].iloc[0])
