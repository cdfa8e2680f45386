"""Figures of parameter sharing: what it costs to tie layers within a network, between the members of an ensemble, or both.

A *setting* is everything that the experiment does not vary on purpose: data, model, optimizer, learning rate, members ...
Each setting has figures of its own. Its *cells* are the ways to share: where layers are tied (regime), which (intensity),
and how: whole, whole with a scale of each use, or in part; beside each a plain network with as many parameters. Beside all
of them stand the references: a single network and a deep ensemble, where nothing is tied, a single network trained for a
multiple of the epochs, and a BatchEnsemble. Nothing is selected: every cell is drawn as it was run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator

from plots.figure import (
    DASHED,
    LOOKS,
    MEASURES,
    TEXT_WIDTH,
    TIMES,
    Figures,
    Finding,
    Look,
    counted,
    listed,
    markdown,
    new_figure,
    number,
    with_spread,
)
from plots.image_runs import (
    COUNTED,
    GREY,
    RELIABILITY,
    Row,
    Setting,
    curves_of,
    differences_in_words,
    dots_of,
    draw_curves,
    draw_rows,
    in_words,
    legend,
    logarithmic,
    logarithmic_losses,
    main_device,
    measured_on,
    paired_table,
    provenance,
    reliability_diagrams,
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

SETTING = [
    "dataset", "model", "batchnorm", "ensemble_size", "optimizer", "learning_rate", "weight_decay", "momentum",
    "warmup_epochs", "batch_size", "augment", "precision", "epochs",
]  # fmt: skip
VARIED = ["method", "regime", "intensity", "ties", "fraction", "alpha_init", "gamma_init", "seed"]
CONFIG = [*SETTING, *VARIED]

CELL = ["arm", "size", "regime", "intensity", "ties", "fraction", "alpha_init", "gamma_init"]
REGIMES = {"within": "within a network", "between": "between members", "both": "within and between"}
INTENSITIES = ("early", "deep", "all")
TIES = {"whole": "tied whole", "scaled": "tied, each use scaled", "part": "tied in part"}
SAME_SIZE = "plain network of this size"
ARMS = {
    **LOOKS,
    "whole": Look("tied whole", "#009E73", "^"),
    "scaled": Look("tied, each use scaled", "#56B4E9", "v"),
    "part": Look("tied in part", "#E69F00", "P"),
    "same_size": Look("plain network of the tied one's size", "#555555", "X"),
}
HOW = (
    "Tied layers hold one weight. A name says which are tied (early, deep, or all but the head) and how: whole; scaled, each "
    "use with factors of its own; in part; or same size, a plain network in which nothing is tied, with as many parameters as "
    "when these layers are tied whole."
)
# of the layers that are tied: in a line's colour and its dashes
OPTIONS = {
    "single": LOOKS["single"],
    "deep_ensemble": LOOKS["deep_ensemble"],
    "early": Look("early layers tied", "#56B4E9", "o", (0, (1, 1))),
    "deep": Look("deep layers tied", "#009E73", "o", DASHED),
    "all": Look("all but the head tied", "#CC79A7", "o", (0, (5, 1, 1, 1))),
}
SHADES = ("#9bd3f5", "#f6c66b")  # of early and of deep layers that are tied
FILLED: dict[str, Any] = {"early": "none", "deep": "left", "all": "full"}  # how much of a marker


# --- from rows to numbers ---------------------------------------------------------------------------------------------


def summarise_runs(df: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run: configuration and measures; batches a second is the median over epochs, without validation."""
    runs = summarise_image_runs(df, CONFIG)
    speeds = df[df["split"] == "train"].drop_duplicates(["run_id", "epoch"]).groupby("run_id")["images_per_second"]
    runs["batches_per_second"] = runs["run_id"].map(speeds.median()) / runs["batch_size"]
    return runs


def settings(df: pd.DataFrame) -> list[Setting]:
    """Return the settings of a results table, by name; what is of one network may belong to several.

    `arm` is whole, scaled, part (how a cell is tied) or same_size, or one of the references: single, longer, deep_ensemble,
    batchensemble; `size` is the number of members, for `longer` the multiple of epochs.
    """
    runs = summarise_runs(df)
    runs["arm"] = runs["method"].where(runs["method"] != "sharing", runs["ties"])
    several = runs["ensemble_size"] > 1
    # what has no setting yet makes its own, those first that know of members and of their BatchNorm
    unknown = (~several).astype(int) * 2 + runs["arm"].isin(["deep_ensemble", "part"])
    runs = runs.assign(unknown=unknown).sort_values(["unknown", "epochs", "run_id"], kind="stable")
    found: list[tuple[dict[str, Any], pd.DataFrame]] = []
    taken: set[str] = set()
    while not (left := runs[~runs["run_id"].isin(taken)]).empty:
        fields = {name: left.iloc[0][name] for name in SETTING}
        found.append((fields, _belonging(runs.drop(columns="unknown"), fields)))
        taken |= set(found[-1][1]["run_id"])
    names = setting_names(found)
    return sorted(Setting(name, *item) for name, item in zip(names, found, strict=True))


def _belonging(runs: pd.DataFrame, fields: dict[str, Any]) -> pd.DataFrame:
    def equal(*names: str) -> pd.Series:
        return (runs[list(names)] == pd.Series({name: fields[name] for name in names})).all(axis=1)

    # `scripts.parameter_sharing.Config` gives a field that a method has no use for its neutral value
    same = equal(*(name for name in SETTING if name not in ("batchnorm", "ensemble_size", "epochs")))
    without = fields["batchnorm"] == "none"
    plain = runs["batchnorm"] == ("none" if without else "shared")
    own = runs["batchnorm"] == ("none" if without else "member")
    times = runs["epochs"] // fields["epochs"]
    longer = plain & (runs["arm"] == "single") & (times > 1) & (runs["epochs"] % fields["epochs"] == 0)
    one = plain & (runs["regime"] == "within") & equal("epochs")
    members = (runs["regime"] != "within") & equal("epochs", "ensemble_size")
    deep, part = (runs["arm"] == "deep_ensemble") & plain, (runs["ties"] == "part") & own
    other = ~runs["arm"].isin(["deep_ensemble"]) & (runs["ties"] != "part") & equal("batchnorm")
    mine = runs[same & (longer | one | members & (deep | part | other))].copy()
    mine["arm"] = mine["arm"].where(~((mine["arm"] == "single") & (mine["epochs"] > fields["epochs"])), "longer")
    mine["size"] = mine["ensemble_size"].where(mine["arm"] != "longer", mine["epochs"] // fields["epochs"])
    return mine.sort_values([*CELL, "seed"]).reset_index(drop=True)


class Cell(NamedTuple):
    """The runs of one configuration, a row each: what part they play, and what they are called."""

    arm: str
    regime: str  # empty for a reference
    intensity: str
    label: str
    runs: pd.DataFrame


def cells(setting: Setting) -> list[Cell]:
    """Return the references, then the cells by regime, intensity and how they are tied.

    A label says of fraction, alpha and gamma no more than it takes to tell cells apart.
    """
    found = []
    order = list(ARMS)
    for _, mine in setting.runs.groupby(CELL, dropna=False):
        first = mine.iloc[0]
        arm, reference = first["arm"], first["arm"] in LOOKS
        known = setting.runs[setting.runs["arm"] == arm]
        values = [
            f"{name.removesuffix('_init')} {number(first[name])}"
            for name in ("fraction", "alpha_init", "gamma_init")
            if known.loc[known["regime"] == first["regime"], name].nunique(dropna=False) > 1
        ]
        if reference:
            label = _reference(arm, int(first["size"]))
        else:
            label = f"{first['intensity']}: {'same size' if arm == 'same_size' else arm}"
            if arm == "same_size" and first["ties"] != "whole":
                label += f" as {first['ties']}"
        regime, intensity = ("", "none") if reference else (first["regime"], first["intensity"])
        found.append(Cell(arm, regime, intensity, ", ".join([label, *values]), mine))
    ranks = ["", *REGIMES], ["none", *INTENSITIES]
    return sorted(
        found,
        key=lambda cell: (
            ranks[0].index(cell.regime),
            ranks[1].index(cell.intensity),
            order.index(cell.arm),
            cell.label,
        ),
    )


def _reference(arm: str, size: int) -> str:
    if arm == "longer":
        return f"single network, {size} {TIMES} epochs"
    return LOOKS[arm].label + (f" of {size}" if arm != "single" else "")


class Comparison(NamedTuple):
    """Two cells of which the second is what the first must be compared with."""

    kind: str
    label: str
    ours: Cell
    other: Cell

    @property
    def plain(self) -> bool:
        """Whether nothing is tied in the first: it only is as large as what is."""
        return self.ours.arm == "same_size"

    @property
    def against(self) -> str:
        return self.kind.rpartition("less ")[2]

    def difference(self, measure: str) -> Difference:
        return difference(self.ours.runs, self.other.runs, measure)


def comparisons(every: Sequence[Cell], regime: str) -> list[Comparison]:
    """Return what is compared with what in a regime, or for "" of the references.

    A cell with the network or ensemble in which nothing is tied, and with a plain network of its size; one that is scaled or
    tied in part with the one that ties the same layers whole. That plain network, which ties nothing, is of a kind of its own.
    """
    references = {cell.arm: cell for cell in every if cell.arm in LOOKS}
    mine = [cell for cell in every if cell.regime == regime]
    if not regime:
        pairs = [("batchensemble", "deep_ensemble"), *((arm, "single") for arm in list(LOOKS)[1:])]
        return [
            Comparison(f"less {other.label}", ours.label, ours, other)
            for pair in pairs
            for ours in mine
            for other in mine
            if (ours.arm, other.arm) == pair
        ]
    found = []
    untied = references.get("single" if regime == "within" else "deep_ensemble")
    tied, plains = ([cell for cell in mine if (cell.arm == "same_size") == plain] for plain in (False, True))
    if untied:
        found = [Comparison(f"less {untied.label}", cell.label, cell, untied) for cell in tied]
        found += [Comparison(f"plain network, less {untied.label}", cell.label, cell, untied) for cell in plains]
    for plain in plains:
        alike = ["intensity", "ties", "fraction", "alpha_init", "gamma_init"]
        found += [
            Comparison(f"less {SAME_SIZE}", cell.label, cell, plain) for cell in tied if _equal(cell, plain, alike)
        ]
    for whole in (cell for cell in tied if cell.arm == "whole"):
        found += [
            Comparison("less the same tied whole", cell.label, cell, whole)
            for cell in tied
            if cell.arm != "whole" and cell.intensity == whole.intensity
        ]
    return sorted(found, key=lambda one: list(dict.fromkeys(every.kind for every in found)).index(one.kind))


def _equal(ours: Cell, other: Cell, names: Sequence[str]) -> bool:
    return all(str(ours.runs.iloc[0][name]) == str(other.runs.iloc[0][name]) for name in names)


def summarise_cells(setting: Setting) -> pd.DataFrame:
    """Return, as text, seeds, parameters and every measure of each cell; seconds are of one device."""
    runs, rows = setting.runs, []
    seconds = runs["seconds"].where(runs["device_name"].astype(str) == main_device(runs))
    for cell in cells(setting._replace(runs=runs.assign(seconds=seconds))):
        row = {
            "tied": _tied(cell),
            "cell": cell.label,
            "seeds": str(len(cell.runs)),
            "parameters": f"{cell.runs['parameters'].iloc[0]:,.0f}",
        }
        rows.append(row | in_words(cell.runs))
    return pd.DataFrame(rows)


def _tied(cell: Cell) -> str:
    if cell.arm == "batchensemble":
        return "weights, with rank-1 factors"
    return (
        f"nothing (sized as {REGIMES[cell.regime]})" if cell.arm == "same_size" else REGIMES.get(cell.regime, "nothing")
    )


def summarise_differences(setting: Setting, measures: Sequence[str] = ("test_accuracy", "test_nll")) -> pd.DataFrame:
    """Return, as text, every paired difference with its 95 % interval; bold where that leaves 0 out."""
    rows = []
    every = cells(setting)
    for regime in ("", *REGIMES):
        for pair in comparisons(every, regime):
            row = {"tied": _tied(pair.ours) if regime else "", "cell": pair.label, "compared with": pair.against}
            rows.append(row | differences_in_words({name: pair.difference(name) for name in measures}))
    return pd.DataFrame(rows)


def summarise_weights(df: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run and point of the density of its slow weights: x, density; empty where results have none."""
    return curves_of(df, "weights", {"x": "x", "y": "density"})


# --- from numbers to pictures -----------------------------------------------------------------------------------------


def draw_cells(every: Sequence[Cell], ax: Axes, *, measure: str) -> Axes:
    """Draw a row for each cell, under a heading for each regime.

    Dashed, through all rows: the mean of the single network and of the deep ensemble.
    """
    groups: dict[str, list[tuple[str, Row]]] = {}
    for cell in every:
        row = row_of(cell.runs, measure, ARMS[cell.arm])
        groups.setdefault(REGIMES.get(cell.regime, "references"), []).append((cell.label, row))
    draw_rows(groups, ax, measure=measure)
    for cell in every:
        if cell.arm in ("single", "deep_ensemble") and cell.runs[measure].notna().any():
            ax.axvline(cell.runs[measure].mean(), color=ARMS[cell.arm].colour, lw=0.8, ls=DASHED, zorder=1)
    return ax


def draw_differences(pairs: Sequence[Comparison], ax: Axes, *, measure: str) -> Axes:
    """Draw a row for each pair, those of a kind under one heading."""
    groups: dict[str, list[tuple[str, Row]]] = {}
    for pair in pairs:
        row = row_of_difference(pair.ours.runs, pair.other.runs, measure, ARMS[pair.ours.arm])
        groups.setdefault(pair.kind, []).append((pair.label, row))
    return draw_rows(groups, ax, measure=measure, differences=True)


def draw_against(runs: pd.DataFrame, ax: Axes, *, x: str, y: str) -> Axes:
    """Draw a measure against parameters or time: small dots are runs, large ones the means of cells.

    These are open where early layers are tied, half filled where deep ones are, else filled.
    """
    for arm, look in ARMS.items():  # the references lie below
        mine = runs[runs["arm"] == arm]
        ax.plot(mine[x], mine[y], look.marker, color=look.colour, ms=2.4, mew=0, alpha=0.45)
        for _, cell in mine.groupby(CELL, dropna=False):
            filled = "full" if arm in LOOKS else FILLED[cell["intensity"].iloc[0]]
            style: dict[str, Any] = {"color": look.colour, "fillstyle": filled, "mfcalt": "white"}
            ax.plot(cell[x].mean(), cell[y].mean(), look.marker, ms=5.4, mew=0.7, zorder=3, **style)
    ax.set_xlabel(MEASURES[x].label)
    ax.set_ylabel(MEASURES[y].label)
    logarithmic(ax)
    return ax


def draw_weights(densities: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the density of the slow weights of each `option`: thin lines are seeds, thick ones their mean."""
    for option, look in OPTIONS.items():
        mine = densities[densities["option"] == option]
        if mine.empty:
            continue
        grid = np.linspace(mine["x"].min(), mine["x"].max(), 201)
        curves = []
        for _, run in mine.groupby("run_id"):
            curves.append(np.interp(grid, run["x"], run["density"], 0, 0))
            ax.plot(run["x"], run["density"], color=look.colour, lw=0.4, alpha=0.4)
        ax.plot(grid, np.mean(curves, axis=0), color=look.colour, ls=look.line, lw=1.4)
    return ax


def weights_of(regime: str, intensity: str, layer: int, member: int) -> str:
    """Return the letter of the weight that a layer has: of three members, each of two early and two deep layers and a head."""
    part = 2 if layer == 4 else layer // 2
    tied = part < 2 and intensity in ("all", ("early", "deep")[part])
    if tied and regime != "between":
        layer = 2 * part
    if tied and regime != "within":
        member = 0
    return "ABCDEFGHIJKLMNO"[5 * member + layer]


def draw_scheme(ax: Axes, *, regime: str, intensity: str) -> Axes:
    """Draw which layers of a network, or of three members side by side, hold one weight: they have one letter."""
    members = 1 if regime == "within" else 3
    letters = [[weights_of(regime, intensity, layer, member) for layer in range(5)] for member in range(members)]
    every = [letter for column in letters for letter in column]
    for member, column in enumerate(letters):
        for layer, letter in enumerate(column):
            shade = SHADES[layer // 2] if every.count(letter) > 1 else "white"
            corner = (1.1 * (member + (3 - members) / 2), layer)
            ax.add_patch(Rectangle(corner, 1, 0.8, facecolor=shade, edgecolor=GREY, lw=0.7))
            ax.text(corner[0] + 0.5, layer + 0.4, letter, ha="center", va="center", fontsize=7)
    ax.set(xlim=(-0.1, 3.3), ylim=(-0.15, 5))
    ax.set_axis_off()
    return ax


# --- which figures, and what they say ---------------------------------------------------------------------------------


def figures(df: pd.DataFrame) -> Figures:
    """Yield (setting/name, caption, figure) of every figure that the results support; inside `plots.figure.style()`."""
    for setting in settings(df):
        for part in (
            _scheme_figure,
            _against_figures,
            _cell_figures,
            _difference_figures,
            _member_figures,
            _option_figures,
        ):
            for name, caption, figure in part(setting, df):
                yield f"{setting.name}/{name}", f"{caption} Setting: {describe(setting)}.", figure


def findings(df: pd.DataFrame) -> dict[str, Finding]:
    """Return for each setting's name what was found, and from what."""
    found = {}
    for setting in settings(df):
        tables = [
            "Mean ± standard deviation over seeds; one seed has no spread. Nothing was selected; the learning rate is the same "
            f"for all. Training time is without validation. {measured_on(setting.runs, CELL)}\n\n"
            + markdown(summarise_cells(setting))
        ]
        differences = paired_table(summarise_differences(setting))
        made = provenance(setting.runs, describe(setting))
        found[setting.name] = Finding(
            _sentences(setting), "\n\n".join(tables + differences), made, "".join(differences)
        )
    return found


def describe(setting: Setting) -> str:
    """Return in words what a setting holds constant, and where its images are from."""
    f, runs = setting.fields, setting.runs
    sources = sorted(set(runs["data_source"].astype(str)))
    members = f", ensembles of {f['ensemble_size']:g}" if f["ensemble_size"] > 1 else ""
    part = sorted(runs["fraction"].dropna().unique())
    shares = f", {listed([f'{100 * share:g} %' for share in part])} of outputs where part is tied" if part else ""
    return (
        f"{f['dataset']} ({', '.join(sources)}), {f['model']}, {f['epochs']} epoch{'s' * bool(f['epochs'] != 1)}, batches of "
        f"{f['batch_size']} images{members}{shares}, {f['optimizer']} at learning rate {number(f['learning_rate'])} with "
        f"momentum {number(f['momentum'])}, weight decay {number(f['weight_decay'])} and {number(f['warmup_epochs'])} warm-up "
        f"epoch{'s' * bool(f['warmup_epochs'] != 1)}, batchnorm {f['batchnorm']}, augment {f['augment']}, precision "
        f"{f['precision']}"
    )


def _seeds(runs: pd.DataFrame) -> list[int]:
    return runs.groupby(CELL, dropna=False)["seed"].nunique().tolist()


def _n(runs: pd.DataFrame) -> str:
    return counted(_seeds(runs))


def _timed(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs["device_name"].astype(str) == main_device(runs)]


def _sentences(setting: Setting) -> list[str]:
    f, every = setting.fields, cells(setting)
    accuracy = MEASURES["test_accuracy"]

    def scores(cell: Cell) -> str:
        size = f"{cell.runs['parameters'].iloc[0]:,.0f} parameters"
        values = with_spread(cell.runs["test_accuracy"], accuracy)
        return f"{cell.label} {values} ({size})"

    spread = ", mean ± standard deviation" if max(_seeds(setting.runs)) > 1 else ""
    groups: dict[str, list[Cell]] = {}
    for cell in every:
        plain = "Plain network as large as what is tied" if cell.arm == "same_size" else "Tied"
        groups.setdefault(f"{plain} {REGIMES[cell.regime]}" if cell.regime else "References", []).append(cell)
    lines = [f"{title}: {'; '.join(map(scores, some))}." for title, some in groups.items()]
    absent = [name for arm, name in (("single", "single network"), ("deep_ensemble", "deep ensemble"))
              if not any(cell.arm == arm for cell in every)]  # fmt: skip
    epochs, n = f"{f['epochs']} epoch{'s' if f['epochs'] > 1 else ''}", _n(setting.runs).removeprefix("n = ")
    head = f"{f['dataset']}, {f['model']}, {epochs}, {n}: final test accuracy{spread}. {HOW}"
    if absent:
        head += f" There is no {listed(absent)} to compare with."
    return [head, *lines, *_verdicts(every)]


def _verdicts(every: Sequence[Cell]) -> list[str]:
    """Return, of each kind of comparison, how many are shown to be better and worse."""
    groups: dict[str, list[Comparison]] = {}
    for regime in ("", *REGIMES):
        for pair in comparisons(every, regime):
            what = (
                f"{'plain network as large as what is ' * pair.plain}tied {REGIMES[regime]}," if regime else pair.label
            )
            groups.setdefault(f"{what} less {pair.against}", []).append(pair)
    lines = []
    for what, pairs in groups.items():
        if words := tally({name: [one.difference(name) for one in pairs] for name in ("test_accuracy", "test_nll")}):
            lines.append(f"{what[0].upper()}{what[1:]}: {words}.")
    if not lines:
        return ["No two cells have three seeds in common: no interval is known, and none can be said to be better."]
    return [COUNTED, *lines]


def _scheme_figure(setting: Setting, df: pd.DataFrame) -> Figures:
    figure = new_figure(TEXT_WIDTH, 3.6)
    axes = figure.subplots(3, 4)
    for row, (regime, title) in zip(axes, REGIMES.items(), strict=True):
        for ax, intensity in zip(row, ("none", *INTENSITIES), strict=True):
            draw_scheme(ax, regime=regime, intensity=intensity)
            if regime == "within":
                ax.set_title(intensity)
        row[0].text(-0.3, 2.4, title.replace(" ", "\n", 1), ha="right", va="center")
    yield (
        "scheme",
        "Which layers are one, by regime (rows) and intensity (columns): boxes of one letter hold one weight, and are shaded. "
        "Drawn for three members and, from below, two early and two deep layers of one shape and a head. Layers of different "
        "shapes are tied between members only.",
        figure,
    )


def _against_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    """Accuracy and NLL against parameters and against time, a column for each regime; the references are in all of them."""
    runs, timed = setting.runs, _timed(setting.runs)
    what = (
        "Final test accuracy (above) and NLL (below) against {}, logarithmic. Small dots are runs, large ones means over "
        "seeds, {}; of what is tied they are open (early layers), half filled (deep ones) or filled (all but the head). The "
        "references are the same in each column. "
    )
    yield (
        "parameters",
        what.format("the number of trained parameters, a tied one counted once", _n(runs)).strip(),
        _grid_of_scatters(runs, "parameters"),
    )
    yield (
        "cost",
        what.format("the seconds of training, without validation", _n(timed))
        + f"The networks of a deep ensemble count one after another. {measured_on(runs, CELL)}",
        _grid_of_scatters(timed, "seconds"),
    )


def _grid_of_scatters(runs: pd.DataFrame, x: str) -> Figure:
    tied = ~runs["arm"].isin(list(LOOKS))
    columns = [regime for regime in REGIMES if (tied & (runs["regime"] == regime)).any()] or [""]
    figure = new_figure(TEXT_WIDTH * max(2, len(columns)) / 3, 4.6)
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for column, regime in zip(axes.T, columns, strict=True):
        for ax, measure in zip(column, ("test_accuracy", "test_nll"), strict=True):
            draw_against(runs[~tied | (runs["regime"] == regime)], ax, x=x, y=measure)
            if x == "parameters":
                ax.xaxis.set_major_formatter(FuncFormatter(_thousands))
                if runs[x].max() < 10 * runs[x].min():  # 1, 2 and 5 would be two ticks
                    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
            ax.label_outer()
        if regime:
            column[0].set_title(f"tied {REGIMES[regime]}")
    _legend_of_arms(figure, runs)
    return figure


def _thousands(value: float, _: Any) -> str:
    scaled, unit = (value / 1e6, " M") if value >= 1e6 else (value / 1e3, " k")
    return f"{scaled:g}{unit}"


def _legend_of_arms(figure: Figure, runs: pd.DataFrame) -> None:
    """Put above a figure, a row each: the references, how layers are tied, and which."""
    markers = {
        arm: Line2D([], [], color=look.colour, marker=look.marker, ls="", label=look.label)
        for arm, look in ARMS.items()
        if (runs["arm"] == arm).any()
    }
    which = [
        Line2D([], [], color=GREY, marker="s", ls="", fillstyle=filled, mfcalt="white", label=OPTIONS[intensity].label)
        for intensity, filled in FILLED.items()
        if (runs["intensity"] == intensity).any()
    ]
    references = [handle for arm, handle in markers.items() if arm in LOOKS]
    rows = [row for row in (references, [h for h in markers.values() if h not in references], which) if row]
    columns = max(map(len, rows))
    empty = Line2D([], [], ls="", label=" ")  # matplotlib fills column after column
    handles = [row[at] if at < len(row) else empty for at in range(columns) for row in rows]
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, columnspacing=1.2)


def _cell_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    """The original's bars of sharing degree, and of batches a second: dots, means and intervals; calibration and diversity."""
    every = cells(setting)
    dashed = "Dashed: the means of the single network (black) and of the deep ensemble (orange)."

    def two(measures: tuple[str, str], shown: Sequence[Cell]) -> Figure:
        headings = 1 + len({cell.regime for cell in shown})
        figure = new_figure(TEXT_WIDTH, 0.17 * (len(shown) + headings) + 0.6)
        for ax, measure in zip(figure.subplots(1, 2, sharey=True), measures, strict=True):
            draw_cells(shown, ax, measure=measure)
        return figure

    for name, measures, title in (
        ("degree", ("test_accuracy", "test_nll"), "Final test accuracy (left) and NLL (right)"),
        ("calibration", ("test_ece", "test_brier"), "ECE in 15 bins (left) and Brier score (right) on the test set"),
    ):
        yield name, f"{title}. {HOW} {dots_of(_seeds(setting.runs))}. {dashed}", two(measures, every)
    several = [cell for cell in every if cell.runs["disagreement"].notna().any()]
    if several:
        yield (
            "diversity",
            "Share of test images on which two members disagree (left), and mutual information of prediction and member "
            f"(right), of all that has members. {HOW} {dots_of(_seeds(pd.concat([cell.runs for cell in several])))}. "
            "Dashed: the mean of the deep ensemble.",
            two(("disagreement", "epistemic"), several),
        )
    runs = _timed(setting.runs).dropna(subset=["batches_per_second"])
    if len(runs):
        timed = cells(setting._replace(runs=runs))
        headings = 1 + len({cell.regime for cell in timed})
        figure = new_figure(0.7 * TEXT_WIDTH, 0.17 * (len(timed) + headings) + 0.6)
        draw_cells(timed, figure.add_subplot(), measure="batches_per_second")
        yield (
            "throughput",
            f"Batches of {setting.fields['batch_size']} images in a second of training, each run's median over its epochs. "
            f"{HOW} Every member sees the whole batch. {dots_of(_seeds(runs))}. {dashed} "
            f"{measured_on(setting.runs, CELL, 'batches_per_second')}",
            figure,
        )


def _difference_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    every = cells(setting)
    references = comparisons(every, "")
    regimes = [regime for regime in REGIMES if comparisons(every, regime)]
    for regime in regimes or [""]:
        pairs = [*(comparisons(every, regime) if regime else []), *references]
        if not pairs:
            continue
        lines = len(pairs) + len({pair.kind for pair in pairs})
        figure = new_figure(TEXT_WIDTH, 0.17 * lines + 0.6)
        for ax, measure in zip(figure.subplots(1, 2, sharey=True), ("test_accuracy", "test_nll"), strict=True):
            draw_differences(pairs, ax, measure=measure)
        dots = dots_of([pair.difference("test_accuracy").pairs for pair in pairs], "paired seed")
        yield (
            f"differences_{regime}" if regime else "differences",
            f"Paired differences over seeds of final test accuracy (left; right of 0 is better) and NLL (right; left of 0 is "
            f"better){', tied ' + REGIMES[regime] if regime else ''}: each row less what its heading says. {dots}. None of the "
            f"{2 * len(pairs)} intervals is corrected for their number. {HOW}",
            figure,
        )


def _member_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    """Members beside their ensemble, and reliability diagrams."""
    every = cells(setting)
    references = [cell for cell in every if not cell.regime]
    regimes = [regime for regime in ("between", "both") if any(cell.regime == regime for cell in every)]
    for regime in regimes or [""]:
        mine = [*references, *(cell for cell in every if regime and cell.regime == regime)]
        bands = pd.concat([cell.runs.assign(label=cell.label) for cell in mine])
        yield (
            f"members_{regime}" if regime else "members",
            "Members beside their ensemble: final test accuracy (left) and NLL (right), of the references"
            + (f" and of what is tied {REGIMES[regime]}" if regime else "")
            + ". Each line is a seed, its small dots the members alone, its large dot their ensemble; the stroke through a "
            f"band is the mean over seeds, {_n(bands)}.",
            two_members(bands, df, ARMS),
        )
    bins = summarise_reliability(df)
    there = set(bins["run_id"])
    most = [intensity for intensity in INTENSITIES if any(cell.intensity == intensity for cell in every)]
    panels = {}
    for cell in every:
        if (not cell.regime or cell.intensity == most[-1]) and there & set(cell.runs["run_id"]):
            title = f"{cell.regime}, {cell.label}" if cell.regime else cell.label.replace(" network,", ",")
            panels[title] = (ARMS[cell.arm], set(cell.runs["run_id"]))
    if panels:
        shown = setting.runs[setting.runs["run_id"].isin({run for _, runs in panels.values() for run in runs} & there)]
        yield ("reliability", f"{RELIABILITY}, {_n(shown)}.", reliability_diagrams(bins, panels))


def _option_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    """Training curves and densities of weights by which layers are tied, a panel for each regime, for each way to tie."""
    epochs, weights = summarise_epochs(df), summarise_weights(df)
    for ties, how in TIES.items():
        panels = _options(setting.runs, ties)
        tied = pd.concat(list(panels.values())) if panels else setting.runs.iloc[:0]
        if tied["option"].nunique() < 2 if len(tied) else True:
            continue
        name = "" if ties == "whole" else f"_{ties}"
        every = tied.drop_duplicates("run_id")
        n = f"Thin lines are seeds, thick ones their mean, {_n(every)}."
        what = (
            f"by which layers are {how}; nothing is tied in the single network (within) and in the deep "
            "ensemble (between, both)"
        )
        if epochs["epoch"].nunique() > 1:
            yield (
                f"training{name}",
                f"Training NLL (running, in training mode, the members' mean; above) and validation accuracy of the ensemble "
                f"(below) by epoch, {what}. {n}",
                _training(panels, epochs),
            )
        if weights["run_id"].isin(set(every["run_id"])).any():
            shown = every[every["run_id"].isin(set(weights["run_id"]))]
            yield (
                f"weights{name}",
                f"Density of the slow weights after training, {what}. Thin lines are seeds, thick ones their mean, "
                f"{_n(shown)}; what lies beyond 5 standard deviations is not drawn.",
                _densities(panels, weights),
            )


def _options(runs: pd.DataFrame, ties: str) -> dict[str, pd.DataFrame]:
    """Return for each regime the runs that tie in this way, and those that tie nothing, with a column `option`."""
    panels = {}
    for regime in REGIMES:
        mine = runs[(runs["arm"] == ties) & (runs["regime"] == regime)]
        if mine["intensity"].nunique() > 1:
            untied = runs[runs["arm"] == ("single" if regime == "within" else "deep_ensemble")]
            panels[regime] = pd.concat([untied.assign(option=untied["arm"]), mine.assign(option=mine["intensity"])])
    return panels


def _training(panels: dict[str, pd.DataFrame], epochs: pd.DataFrame) -> Figure:
    figure = new_figure(TEXT_WIDTH * max(2, len(panels)) / 3, 3.9)
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False)
    for column, (regime, runs) in zip(axes.T, panels.items(), strict=True):
        mine = epochs.merge(runs[["run_id", "option"]].rename(columns={"option": "arm"}), on="run_id")
        for ax, measure in zip(column, ("train_nll", "validation_accuracy"), strict=True):
            draw_curves(mine, ax, measure=measure, looks=OPTIONS)
            ax.label_outer()
        logarithmic_losses(column[0])
        column[0].set_title(f"tied {REGIMES[regime]}")
    legend(figure, set(pd.concat(list(panels.values()))["option"]), OPTIONS, lines=OPTIONS)
    return figure


def _densities(panels: dict[str, pd.DataFrame], weights: pd.DataFrame) -> Figure:
    figure = new_figure(TEXT_WIDTH * max(2, len(panels)) / 3, 2.3)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (regime, runs) in zip(axes, panels.items(), strict=True):
        draw_weights(weights.merge(runs[["run_id", "option"]], on="run_id"), ax).set_title(f"tied {REGIMES[regime]}")
        ax.set(xlabel="weight", ylabel="density", yscale="log")
        ax.label_outer()
    axes[0].set_ylim(bottom=1e-4 * axes[0].get_ylim()[1])
    legend(figure, set(pd.concat(list(panels.values()))["option"]), OPTIONS, lines=OPTIONS)
    return figure
