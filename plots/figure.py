"""What the figures of all experiments share: one style, words and colours for methods and measures, heatmaps, saving."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib import style as matplotlib_style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from batchens.files import replacing

STYLE = Path(__file__).with_name("suite.mplstyle")
TEXT_WIDTH = 7.0  # inches, of a page; a column is half of it
REFERENCE_COLUMNS = 2.2  # width of a heatmap's references and their labels, in cells
DASHED = (0, (4, 2))
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


class Measure(NamedTuple):
    """How a number is named, in what unit, to how many decimals, and which end of it is good."""

    name: str
    unit: str
    decimals: int
    more_is_better: bool | None = None

    @property
    def label(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def title(self) -> str:
        return self.label[0].upper() + self.label[1:]


MEASURES = {
    "test_accuracy": Measure("final test accuracy", "%", 2, True),
    "test_nll": Measure("final test NLL", "nats", 3, False),
    "test_brier": Measure("final test Brier score", "0 to 2", 3, False),
    "test_ece": Measure("final test ECE", "%", 2, False),
    "validation_accuracy": Measure("validation accuracy", "%", 2, True),
    "validation_nll": Measure("validation NLL", "nats", 3, False),
    "mean_validation_accuracy": Measure("validation accuracy, mean over epochs", "%", 2, True),
    "train_accuracy": Measure("training accuracy", "%", 2, True),
    "train_nll": Measure("training NLL", "nats", 3, False),
    "mean_train_nll": Measure("training NLL, mean over epochs", "nats", 3, False),
    "disagreement": Measure("disagreement of members", "%", 2),
    "epistemic": Measure("epistemic uncertainty", "nats", 3),
    "seconds": Measure("training time", "s", 1),
    "batches_per_second": Measure("training batches per second", "", 1, True),
    "parameters": Measure("parameters", "", 0, False),
}


Figures: TypeAlias = Iterator[tuple[str, str, Figure]]  # setting/name, caption, figure


class Finding(NamedTuple):
    """What a setting's results say: in sentences, in Markdown tables, and from which runs."""

    sentences: list[str]
    table: str
    provenance: str
    differences: str = ""
    """the table of paired differences that the sentences count, for FINDINGS.md"""


class Look(NamedTuple):
    label: str
    colour: str
    marker: str
    line: Any = "-"


# a method is told apart by its colour, by its marker, and by words
LOOKS = {
    "single": Look("single network", "#000000", "o"),
    "longer": Look("single network, longer", "#CC79A7", "D"),
    "deep_ensemble": Look("deep ensemble", "#D55E00", "s"),
    "batchensemble": Look("BatchEnsemble", "#0072B2", "o"),
}


def style() -> AbstractContextManager[None]:
    """Draw and save inside this: matplotlib's defaults and our style, whatever the user's own settings are."""
    return matplotlib_style.context(["default", str(STYLE)])


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, which no global list of figures keeps alive."""
    return Figure(figsize=(width, height))


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path`.png and `path`.pdf, each whole or not at all; the same figure gives the same bytes on any day."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        target = path.with_name(f"{path.name}.{kind}")
        with replacing(target) as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata)
        written.append(target)
    return written


def ordered_looks(values: Iterable[float]) -> dict[float, tuple[str, str]]:
    """Return a colour and a marker for each value of an ordered quantity, from dark to light."""
    values = sorted(values)
    shades = colormaps["viridis"](np.linspace(0.0, 0.8, max(2, len(values))))
    return {
        value: ("#" + "".join(f"{round(255 * part):02x}" for part in shade[:3]), "osD^vP*X<>"[i % 10])
        for i, (value, shade) in enumerate(zip(values, shades, strict=False))
    }


def number(value: float) -> str:
    """Return a setting's value in words: its shortest form with a minus sign; `none` for a value that is absent."""
    return "none" if pd.isna(value) else f"{value:g}".replace("-", MINUS)


def listed(words: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def markdown(table: pd.DataFrame) -> str:
    """Return a table of text in Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_spread(values: Sequence[float] | pd.Series, measure: Measure, unit: bool = True) -> str:
    """Return `mean ± standard deviation unit`; of one value no spread is known, and none is stated."""
    values = pd.Series(values).dropna()
    if values.empty:
        return "not there"
    spread = f" ± {values.std():.{measure.decimals}f}" if len(values) > 1 else ""
    return f"{values.mean():.{measure.decimals}f}{spread}" + (f" {measure.unit}" if unit else "")


def counted(n: Iterable[int]) -> str:
    """Return how many seeds there are behind each number: `n = 3 seeds`, `n = 2 to 3 seeds`."""
    least, most = min(n := list(n)), max(n)
    return f"n = {least} seed{'s' * (least != 1)}" if least == most else f"n = {least} to {most} seeds"


def spread_of(runs: pd.DataFrame, by: list[str], measure: str) -> pd.DataFrame:
    """Return mean, sd (over seeds, ddof 1; absent for one seed) and n of a measure for each value of `by`."""
    grouped = runs.dropna(subset=[measure]).groupby(by, dropna=False)[measure]
    return grouped.agg(mean="mean", sd="std", n="count").reset_index()


def levels_of(values: Iterable[float]) -> list[float]:
    """Return the different values in order, an absent one last."""
    return sorted(pd.unique(pd.Series(values)), key=lambda value: (pd.isna(value), value))


def norm_of(*values: Iterable[float]) -> Normalize:
    """Return one colour scale for all these values."""
    every = np.array([value for part in values for value in part if np.isfinite(value)])
    return Normalize(every.min(), every.max()) if len(every) else Normalize(0, 1)


def heatmap(
    ax: Axes,
    cells: pd.DataFrame,
    axes: tuple[str, str],
    levels: tuple[list[float], list[float]],
    measure: Measure,
    norm: Normalize,
    references: Sequence[tuple[str, float, float]] = (),
) -> None:
    """Draw `mean` of each cell, and in a map of few columns `sd`; a cell that is absent is hatched, and yellow is good.

    Args:
        cells: columns `axes` (rows, columns), mean, sd and, to put a = into some of the cells, a boolean `marked`.
        levels: the rows and the columns there should be.
        references: label, mean and sd of cells to draw beside the map, in its colours.
    """
    down, across = levels
    cmap, crowded = colormaps[_cmap(measure)], len(across) > 6

    def paint(x: float, y: float, mean: float, sd: float, marked: bool = False) -> None:
        known = bool(np.isfinite(mean))
        colour = cmap(norm(mean)) if known else "white"
        edge, hatch = ("white", None) if known else ("#d0d0d0", "/////")
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, lw=0.8, edgecolor=edge, facecolor=colour, hatch=hatch))
        if not known:
            return
        ink = "white" if np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.55 else "black"
        stated = f"{sd:.{measure.decimals}f}" if np.isfinite(sd) and not crowded else ""
        raised = 0.14 if stated else 0
        centred: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
        ax.text(x, y - raised, f"{mean:.{measure.decimals}f}", fontsize=6.5 if crowded else 7, **centred)
        if stated:
            ax.text(x, y + 0.23, f"± {stated}", fontsize=5.5, **centred)
        if marked:
            ax.text(x + 0.46, y - 0.45, "=", ha="right", va="top", color=ink, fontsize=6.5, fontweight="bold")

    # found by their words, because an absent value (nan) is not equal to itself
    found = {(number(row[axes[0]]), number(row[axes[1]])): row for row in cells.to_dict("records")}
    for y, row in enumerate(down):
        for x, column in enumerate(across):
            cell = found.get((number(row), number(column)), {"mean": np.nan, "sd": np.nan})
            paint(x, y, cell["mean"], cell["sd"], cell.get("marked", False))
    beside = len(across) + 0.1
    for y, (label, mean, sd) in enumerate(references):
        paint(beside, y, mean, sd)
        ax.text(beside + 0.58, y, label, ha="left", va="center", fontsize=7)
    ax.set_xlim(-0.5, len(across) - 0.5 + (REFERENCE_COLUMNS if references else 0))
    ax.set_ylim(max(len(down), len(references)) - 0.5, -0.5)
    ax.set_xticks(range(len(across)), [number(value) for value in across])
    ax.set_yticks(range(len(down)), [number(value) for value in down])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def colour_bar(axes: Sequence[Axes], measure: Measure, norm: Normalize) -> None:
    """Put the scale of heatmaps beside them, the good end up."""
    figure = axes[0].get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(ScalarMappable(norm, _cmap(measure)), ax=list(axes), fraction=0.05, aspect=25, pad=0.02)
    bar.set_label(measure.label.replace(", ", ",\n"))  # in one line it would be longer than a low map is high
    bar.outline.set_visible(False)
    if measure.more_is_better is False:
        bar.ax.invert_yaxis()


def _cmap(measure: Measure) -> str:
    return "viridis_r" if measure.more_is_better is False else "viridis"
