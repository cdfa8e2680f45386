"""Figures of parameter averaging: can several networks become one that is better than each, and what does it take?

A *setting* is everything that the experiment does not vary on purpose: data, architecture, how the networks were trained, or
which files they are from. Each setting has figures of its own. Its *arms* are the ways to make something of M networks, the
forms of PermAVG each an arm of its own. An arm's runs may differ in more (temperature, what matching is with, extra epochs and
their learning rate): where one line stands for an arm, and where methods are compared, it is the configuration that is best on
validation (`image_runs.choose`), for PermAVG and for what it is compared with alike, at equal extra epochs. Of learning rates
of extra training the best is chosen everywhere but in the table, which has all. The longer single network is compared with
PermAVG of its whole budget, the epochs of all networks and the extra ones.

Some runs are measured in a second *form*: PermAVG with a permutation in the place of each matrix (projected), and averages
whose BatchNorm statistics are averages too (stale). A form is never chosen and never compared as if it were the method.
"""

from collections.abc import Collection, Iterable, Sequence
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from batchens import results
from plots.figure import (
    DASHED,
    LOOKS,
    MEASURES,
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
from plots.image_runs import (
    ON_VALIDATION,
    RELIABILITY,
    Row,
    Setting,
    choose,
    curves_of,
    difference_in_words,
    differences_in_words,
    dots_of,
    draw_curves,
    draw_rows,
    in_favour,
    logarithmic,
    main_device,
    measured_on,
    padded,
    paired_table,
    provenance,
    reliability_diagrams,
    row_of,
    row_of_difference,
    setting_names,
    summarise_reliability,
)
from plots.reading import FACTS
from plots.statistics import Difference, difference

SETTING = [
    "dataset", "model", "depth", "hidden_size", "batchnorm", "optimizer", "learning_rate", "weight_decay", "momentum", "epochs",
    "warmup_epochs", "batch_size", "augment", "precision", "base_digest",
]  # fmt: skip
VARIED = [
    "method", "ensemble_size", "matching", "start", "temperature", "extra_epochs", "extra_learning_rate", "seed",
]  # fmt: skip
CONFIG = [*SETTING, *VARIED]
COSTS = (
    "parameters_trained", "seconds_base", "seconds_matching", "inference_images_per_second", "plain_images_per_second",
)  # fmt: skip  # of a run
MATRIX = ("layer", "size", "diagonal", "row_max", "unique_argmax", "row_error")
METRICS = (*results.METRICS, *COSTS, *MATRIX, "barrier")

CELL = ["arm", "ensemble_size", "matching", "temperature", "extra_epochs", "extra_learning_rate"]
FORMS = {"": "", "_projected": ", projected", "_stale": ", stale BatchNorm"}
ARMS = {
    "single": LOOKS["single"]._replace(label="best single network"),
    "deep_ensemble": LOOKS["deep_ensemble"]._replace(line=DASHED),
    "naive_average": Look("naive average", "#7f7f7f", "p", (0, (1, 1))),
    "matching_mean": Look("weight matching to mean", "#0072B2", "^"),
    "matching_first": Look("weight matching to first", "#56B4E9", "v", (0, (5, 1, 1, 1))),
    "permavg": Look("PermAVG", "#009E73", "P"),
    "permavg_matched": Look("PermAVG from matched", "#00503A", "D", (0, (3, 1))),
    "thesis": Look("PermAVG T = 1 (thesis)", "#8FBC3F", "X", (0, (5, 1, 1, 1))),
    "distillation": Look("distillation", "#E69F00", "d"),
    "longer": LOOKS["longer"],
    "fine_tuned_single": Look("fine-tuned best single", "#882255", "8", (0, (3, 1))),
    "fine_tuned_average": Look("fine-tuned average", "#CC6677", "<", (0, (5, 1, 1, 1))),
    "fine_tuned_matched": Look("fine-tuned matched average", "#332288", ">"),
    "mixing": Look("free mixing", "#B08FCB", "h", (0, (1, 1))),
    "mixing_matched": Look("free mixing from matched", "#6A3D7C", "H", (0, (5, 1, 1, 1, 1, 1))),
}
REFERENCES = ("single", "deep_ensemble")
UNTRAINED = ("naive_average", "matching_mean", "matching_first")
PERMAVG = ("permavg", "permavg_matched", "thesis")
CONTROLS = tuple(arm for arm in ARMS if arm not in (*REFERENCES, *UNTRAINED, *PERMAVG))
# what PermAVG must be compared with, by the name of the method
OTHERS = {
    "single": "best single network",
    "deep_ensemble": "deep ensemble",
    "distillation": "distillation",
    "longer": "longer single network",
    "naive_average": "naive average",
    "weight_matching": "weight matching",
    "fine_tuned_single": "fine-tuned best single",
    "fine_tuned_average": "fine-tuned average",
    "mixing": "free mixing",
}
THESIS_SIZE, THESIS_TEMPERATURE = 3, 1.0
BEST, FORM_OF_THESIS = "best on validation", "in the thesis' form"
COMPARED = ("test_accuracy", "test_nll")
OWN = {
    "total_seconds": Measure("training time, of the networks and after", "s", 1),
    "relative_speed": Measure("images per second, plain network = 1", "", 2, True),
}
RATIO = Measure("", "", 2)


# --- from rows to numbers ---------------------------------------------------------------------------------------------


def summarise_runs(df: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run and form: its configuration, its arm, and its measures after its last epoch; shares in percent.

    `seconds` are of training after the networks', `total_seconds` of all training and matching; the networks' time is that of
    all M, also of the best single one. `relative_speed` is of inference, beside the plain network that the same process timed
    in turn with the run's own; what another process measures at another load is beside nothing.
    """
    ensemble = df[df["member"].isna()]
    seconds = df[df["split"] == "train"].drop_duplicates(["run_id", "epoch"]).groupby("run_id")["seconds"].sum()
    parts = []
    for form in FORMS:
        test, validation = (_last(ensemble[ensemble["split"] == split + form]) for split in ("test", "validation"))
        runs = test.reindex(columns=[*CONFIG, *FACTS, *COSTS, "networks_digest"])
        for name in ("accuracy", "nll", "brier", "ece"):
            runs[f"test_{name}"] = test[name] * (100 if name in ("accuracy", "ece") else 1)
        runs["validation_accuracy"], runs["validation_nll"] = 100 * validation["accuracy"], validation["nll"]
        parts.append(runs.assign(form=form))
    runs = pd.concat(parts).reset_index()
    for name in ("matching", "start", "base_digest"):
        runs[name] = runs[name].astype(object).where(runs[name].notna(), "")
    runs["seconds"] = runs["run_id"].map(seconds).fillna(0.0)
    runs["total_seconds"] = runs["seconds_base"] + runs["seconds_matching"].fillna(0) + runs["seconds"]
    runs["relative_speed"] = runs["inference_images_per_second"] / runs["plain_images_per_second"]
    deciding = ["method", "start", "matching", "temperature"]
    runs["arm"] = [_arm(*of) for of in runs[deciding].itertuples(index=False)]
    return runs


def _last(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values("epoch", kind="stable").drop_duplicates("run_id", keep="last").set_index("run_id")


def _arm(method: str, start: str, matching: str, temperature: float) -> str:
    if method == "weight_matching":
        return f"matching_{matching or 'mean'}"
    if (method, start, temperature) == ("permavg", "identity", THESIS_TEMPERATURE):
        return "thesis"
    matched = {"permavg": "permavg_matched", "mixing": "mixing_matched", "fine_tuned_average": "fine_tuned_matched"}
    return matched[method] if start == "matching" else method


def settings(df: pd.DataFrame) -> list[Setting]:
    """Return the settings of a results table in which something is made of several networks, by name.

    Their runs have a `label`, which tells a configuration and form from all others of its M.
    """
    found = []
    for _, runs in summarise_runs(df).groupby(SETTING, dropna=False):
        if (runs["ensemble_size"] == 1).all():
            continue
        fields = dict(runs.iloc[0][SETTING])
        for name in ("depth", "hidden_size"):  # beside models that have none they are no integers
            fields[name] = int(fields[name]) if pd.notna(fields[name]) else None
        found.append((fields, _labelled(runs)))
    short = [(fields | {"base_digest": fields["base_digest"][:8] or "none"}, runs) for fields, runs in found]
    names = setting_names(short)
    return sorted(Setting(name, *item) for name, item in zip(names, found, strict=True))


TOLD = {
    "matching": "matched with the",
    "extra_epochs": "extra epochs",
    "extra_learning_rate": "extra learning rate",
}


def _labelled(runs: pd.DataFrame, told: Collection[str] = tuple(TOLD)) -> pd.DataFrame:
    """Add `label`: no more of what varies within a form than it takes to tell its configurations apart.

    A form is an arm, of PermAVG a start and a temperature.
    """
    forms = runs.apply(_form_of, axis=1)
    several = {}
    for form, mine in runs.groupby(forms):
        known = mine.assign(matching=mine["matching"].where(mine["ensemble_size"] > 2))  # of two, both ways are one
        if form == ARMS["longer"].label:  # whose epochs are as many as M networks'
            known["extra_epochs"] -= known["ensemble_size"] * known["epochs"]
        several[form] = [name for name in told if known[name].nunique() > 1]
    labels = []
    for form, run in zip(forms, runs.to_dict("records"), strict=True):
        first = run["arm"] == "single" and run["ensemble_size"] == 1
        words = ["first single network" if first else form]
        for name in several[form]:
            words.append(f"{TOLD[name]} {run[name] if name == 'matching' else number(run[name])}")
        labels.append(", ".join(words) + FORMS[run["form"]])
    order = {arm: i for i, arm in enumerate(ARMS)}
    ranks = runs.assign(label=labels, rank=runs["arm"].map(order), part=runs["form"].map(list(FORMS).index))
    return ranks.sort_values(["ensemble_size", "part", "rank", "label", "seed"]).drop(columns=["rank", "part"])


def _form_of(run: pd.Series) -> str:
    if run["arm"] not in ("permavg", "permavg_matched"):
        return ARMS[run["arm"]].label
    return f"PermAVG T = {number(run['temperature'])}{' from matched' * (run['arm'] == 'permavg_matched')}"


def main_size(setting: Setting) -> int:
    """Return the number of networks that is looked at more closely: the thesis' 3, else the one of most runs."""
    several = setting.runs.loc[setting.runs["ensemble_size"] > 1, "ensemble_size"]
    if (several == THESIS_SIZE).any():
        return THESIS_SIZE
    counts = several.value_counts()
    return int(counts[counts == counts.max()].index.max())


class Cell(NamedTuple):
    """The runs of one configuration in one form, a row each, and what they are called."""

    label: str
    runs: pd.DataFrame

    @property
    def arm(self) -> str:
        return str(self.runs["arm"].iloc[0])

    @property
    def form(self) -> str:
        return str(self.runs["form"].iloc[0])

    @property
    def look(self) -> Look:
        return ARMS[self.arm]


def cells(setting: Setting, size: int) -> list[Cell]:
    """Return what is made of so many networks, the first of them before all else, forms of their own last.

    Of configurations that differ in the learning rate of extra training alone there is the best on validation, of so many
    `candidates`.
    """
    runs = _labelled(setting.runs, [name for name in TOLD if name != "extra_learning_rate"])
    own = runs[runs["form"] == ""]
    best = choose(own, [*CELL, "label"], ["label", "ensemble_size"])
    runs = runs.merge(best[["run_id", "candidates"]], on="run_id")
    mine = runs[(runs["ensemble_size"] == size) | ((runs["arm"] == "single") & (runs["ensemble_size"] == 1))]
    return [Cell(str(label), some) for label, some in mine.groupby("label", sort=False)]


def best_of_arms(setting: Setting) -> pd.DataFrame:
    """Return the runs, not in a form of their own, of each arm's best configuration at each M, chosen on validation."""
    runs = setting.runs
    return choose(runs[runs["form"] == ""], CELL, ["arm", "ensemble_size"])


class Comparison(NamedTuple):
    """PermAVG of so many networks, and a method that it must be compared with."""

    other: str
    size: int
    ours: pd.DataFrame
    others: pd.DataFrame

    def difference(self, measure: str) -> Difference:
        return difference(self.ours, self.others, measure)

    @property
    def look(self) -> Look:
        return ARMS[str(self.ours["arm"].iloc[0])]


def comparisons(setting: Setting, thesis: bool = False) -> list[Comparison]:
    """Return PermAVG, as it is best on validation or in the thesis' form, beside each of OTHERS, by method and M.

    Of a method with several configurations it is the best on validation; of those that train, with as many extra epochs, and
    of the longer single network with as many as PermAVG and its networks together.
    """
    made = setting.runs[setting.runs["form"] == ""]
    found = []
    for size in sorted(set(made["ensemble_size"])):
        same = made[made["ensemble_size"] == size]
        ours = same[(same["arm"] == "thesis") if thesis else (same["method"] == "permavg")]
        if ours.empty:
            continue
        ours = _best(ours)
        own = same["extra_epochs"] - (same["ensemble_size"] * same["epochs"]).where(same["method"] == "longer", 0)
        equal = same[own.isna() | (own == ours["extra_epochs"].iloc[0])]
        for method in OTHERS:
            if len(other := equal[equal["method"] == method]):
                found.append(Comparison(method, int(size), ours, _best(other)))
    return sorted(found, key=lambda one: list(OTHERS).index(one.other))


def _best(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the best configuration on validation of these, which are of one M."""
    if len(runs[CELL].drop_duplicates()) == 1:
        return runs.assign(candidates=1)
    return choose(runs, CELL, ["ensemble_size"])


def summarise_epochs(df: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run and epoch of what is trained, from 0, where it starts: validation accuracy (%) and NLL."""
    rows = df[(df["split"] == "validation") & df["member"].isna() & df["extra_epochs"].notna()]
    epochs = rows[["run_id", "seed", "epoch"]].copy()
    epochs["validation_accuracy"], epochs["validation_nll"] = 100 * rows["accuracy"], rows["nll"]
    return epochs.sort_values(["run_id", "epoch"]).reset_index(drop=True)


def summarise_lines(df: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run and point between its two networks: `matched` or not, share, test_accuracy (%), test_nll.

    `barrier_test_accuracy` (points) and `barrier_test_nll` are the run's, the same at all points.
    """
    parts = []
    for matched, start in ((False, "line"), (True, "matched_line")):
        by_metric = []
        for metric, scale in (("accuracy", 100), ("nll", 1)):
            split, name = f"{start}_{metric}", f"test_{metric}"
            points = curves_of(df, split, {"x": "share", "y": name})
            points[name] *= scale
            barriers = df[df["split"] == split].set_index("run_id")["barrier"] * scale
            points[f"barrier_{name}"] = points["run_id"].map(barriers)
            by_metric.append(points.set_index(["run_id", "seed", "share"]))
        parts.append(by_metric[0].join(by_metric[1]).reset_index().assign(matched=matched))
    return pd.concat(parts, ignore_index=True)


def summarise_matrices(df: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run and hidden layer (from 1): diagonal, row_max and unique_argmax (%), means over the members."""
    rows = df[df["split"] == "matrix"]
    matrices = rows.groupby(["run_id", "layer"])[["diagonal", "row_max", "unique_argmax"]].mean().reset_index()
    matrices["layer"] += 1
    matrices["unique_argmax"] *= 100
    return matrices


def picture(df: pd.DataFrame, run_id: str, split: str) -> np.ndarray | None:
    """Return the picture of a run's matrix, or None where it has none."""
    rows = df[(df["split"] == split) & (df["run_id"] == run_id)]
    if rows.empty:
        return None
    values = np.array(str(rows["y"].iloc[0]).split(), float)
    return values.reshape(int(rows["size"].iloc[0]), -1)


# --- from numbers to words --------------------------------------------------------------------------------------------


def summarise_cells(setting: Setting) -> pd.DataFrame:
    """Return, as text, what is made of each number of networks: seeds, scores, parameters, and the time of one device."""
    rows = []
    device = main_device(setting.runs)
    for (size, label), mine in setting.runs.groupby(["ensemble_size", "label"], sort=False):
        timed = mine[mine["device_name"].astype(str) == device]
        row = {"networks": str(size), "method": str(label), "seeds": str(len(mine))}
        row |= {
            MEASURES[name].label: with_spread(mine[name], MEASURES[name], unit=False)
            for name in ("validation_accuracy", "test_accuracy", "test_nll", "test_ece")
        }
        row["parameters"] = f"{mine['parameters'].iloc[0]:,.0f}"
        row["parameters trained after"] = f"{mine['parameters_trained'].iloc[0]:,.0f}"
        own = mine["form"].iloc[0] == ""
        row["training after (s)"] = with_spread(timed["seconds"], RATIO, unit=False) if own else ""
        speeds = timed["relative_speed"].dropna()
        few = f" (of {len(speeds)})" if len(speeds) < len(mine) else ""
        row[OWN["relative_speed"].label] = with_spread(speeds, RATIO, unit=False) + few if own and len(speeds) else ""
        rows.append(row)
    return pd.DataFrame(rows)


def summarise_sizes(setting: Setting) -> pd.DataFrame:
    """Return, as text, the final test accuracy of each arm, at its best configuration on validation, by number of networks."""
    best = best_of_arms(setting)
    sizes = sorted(int(size) for size in set(best["ensemble_size"]))
    rows = []
    for arm, look in ARMS.items():
        mine = best[best["arm"] == arm]
        if len(mine):
            row = {"method": look.label}
            for size in sizes:
                values = mine.loc[mine["ensemble_size"] == size, "test_accuracy"]
                row[f"M = {size}"] = with_spread(values, MEASURES["test_accuracy"], unit=False) if len(values) else ""
            rows.append(row)
    return pd.DataFrame(rows)


def summarise_differences(setting: Setting) -> pd.DataFrame:
    """Return, as text, every paired difference with its 95 % interval; bold where that leaves 0 out."""
    rows = []
    for thesis in (False, True):
        for pair in comparisons(setting, thesis):
            row = {
                "networks": str(pair.size),
                "PermAVG": f"{FORM_OF_THESIS if thesis else BEST}: {pair.ours['label'].iloc[0]}",
                "less": str(pair.others["label"].iloc[0]),
                "pairs": str(pair.difference("test_accuracy").pairs),
            }
            rows.append(row | differences_in_words({name: pair.difference(name) for name in (*COMPARED, "test_ece")}))
    return pd.DataFrame(rows)


def _verdict(pairs: Sequence[Comparison], measure: str) -> str:
    """Return what PermAVG is better and worse than, and of how many networks, by paired intervals."""
    order = ("better than", "worse than", "no difference is shown from", "too few seeds to tell from")
    kinds: dict[str, dict[str, list[int]]] = {kind: {} for kind in order}
    for pair in pairs:
        found = pair.difference(measure)
        kind = "no difference is shown from" if np.isfinite(found.half) else "too few seeds to tell from"
        if found.shown:
            kind = "better than" if in_favour(found, measure) else "worse than"
        kinds[kind].setdefault(OTHERS[pair.other], []).append(pair.size)
    every = sorted({pair.size for pair in pairs})
    words = []
    for kind, methods in kinds.items():
        alike: dict[str, list[str]] = {}
        for method, sizes in methods.items():
            of = "" if sizes == every else f" (of {listed([str(size) for size in sizes])} networks)"
            alike.setdefault(of, []).append(method)
        verb, _, preposition = kind.rpartition(" ")
        if parts := [f"{preposition} {listed(some)}{of}" for of, some in sorted(alike.items())]:
            words.append(f"{verb} {', '.join(parts)}")
    return "; ".join(words)


def _sentences(setting: Setting, df: pd.DataFrame) -> list[str]:
    f, size = setting.fields, main_size(setting)
    every = cells(setting, size)
    accuracy = MEASURES["test_accuracy"]

    def scores(some: Iterable[Cell]) -> str:
        return "; ".join(
            f"{cell.label.removesuffix(FORMS[cell.form])} {with_spread(cell.runs['test_accuracy'], accuracy)}"
            for cell in some
        )

    spread = " ± standard deviation" if max(len(cell.runs) for cell in every) > 1 else ""
    n = _n(every).removeprefix("n = ")
    head = f"{setting.name}, {size} networks{_epochs_of(f)}, {n}, final test accuracy (mean{spread})."
    absent = [ARMS[arm].label for arm in REFERENCES if not any(cell.arm == arm for cell in every)]
    lines = [head + (f" There is no {listed(absent)} to compare with." if absent else "")]
    for title, some in _groups(every):
        lines.append(f"{title[0].upper()}{title[1:]}: {scores(some)}.")
    if rates := _rates(every):
        lines.append(rates.strip().replace("is drawn", "is told"))
    lines += _rate_sentences(setting, size)
    return [
        *lines,
        *_verdicts(setting),
        *_projection_sentence(setting, size),
        *_row_error_sentence(df, every),
        *_barrier_sentence(df, setting),
        *_network_sentence(setting, size),
        *_other_networks_sentence(setting),
    ]


def _rate_sentences(setting: Setting, size: int) -> list[str]:
    """Return which chosen rates of extra training are the smallest or largest that were tried, and which are the only ones."""
    runs = setting.runs
    trained = runs[(runs["ensemble_size"] == size) & (runs["form"] == "") & runs["extra_learning_rate"].notna()]
    edges, only = [], []
    form = ["method", "start", "matching", "temperature", "extra_epochs"]
    for _, tried in trained.groupby(form, dropna=False, sort=False):
        chosen, rates = _best(tried).iloc[0], sorted(set(tried["extra_learning_rate"]))
        rate = chosen["extra_learning_rate"]
        told = f", {TOLD['extra_learning_rate']} {number(rate)}"
        words = f"{chosen['label'].replace(told, '')} at {number(rate)}"
        if len(rates) == 1:
            only.append(words)
        elif rate in (rates[0], rates[-1]):
            edges.append(f"{words}, the {'smallest' if rate == rates[0] else 'largest'} of {len(rates)}")
    lines = []
    if edges:
        lines.append(f"At the edge of the rates that were tried, so that the best may lie outside: {'; '.join(edges)}.")
    if only:
        lines.append(f"Nothing was chosen where one rate alone was tried: {'; '.join(only)}.")
    return lines


def _epochs_of(fields: dict[str, Any]) -> str:
    if not fields["epochs"]:
        return " from files"
    return f" of {fields['epochs']} epoch{'s' if fields['epochs'] > 1 else ''}"


def _verdicts(setting: Setting) -> list[str]:
    best, thesis = comparisons(setting), comparisons(setting, thesis=True)
    if not best:
        return []
    several = len({pair.size for pair in best}) > 1
    lines = [
        "PermAVG is compared with each method by paired differences over seeds and their 95 % intervals (t), at equal "
        f"extra epochs. Of a method with several configurations the one is taken that is {BEST}; of PermAVG it is "
        f"{_which(best)}." + " Where no number of networks is named, all are meant." * several
    ]
    for pairs, form in ((best, f"as it is {BEST}"), (thesis, FORM_OF_THESIS)):
        for measure, word in zip(COMPARED, ("accuracy", "NLL"), strict=True):
            if pairs:
                lines.append(f"PermAVG {form}, test {word}: {_verdict(pairs, measure)}.")
        if pairs is best:
            lines.append(_tally(best))
    return lines


def _tally(pairs: Sequence[Comparison]) -> str:
    found = [(pair.difference(measure), measure) for measure in COMPARED for pair in pairs]
    known = sum(bool(np.isfinite(one.half)) for one, _ in found)
    if not known:
        return "No interval is known: fewer than three seeds are in common, and none can be said to be better."
    shown = sum(one.shown for one, _ in found)
    better = sum(in_favour(one, measure) for one, measure in found)
    return (
        f"Of these {known} intervals of accuracy and NLL {shown} leave 0 out, {better} in favour of PermAVG; with no true "
        f"difference {0.05 * known:.1f} would."
    )


def _which(pairs: Sequence[Comparison]) -> str:
    """Return which configuration of PermAVG is compared, of each number of networks."""
    ours = {pair.size: pair.ours.iloc[0] for pair in pairs}
    labels = {
        size: f"{run['label']}" + f", best of {run['candidates']}" * int(run["candidates"] > 1)
        for size, run in ours.items()
    }
    if len(labels) == 1:
        return next(iter(labels.values()))
    return "; ".join(f"of {size} networks {label}" for size, label in sorted(labels.items()))


def _projection_sentence(setting: Setting, size: int) -> list[str]:
    words = []
    for before, after in _projections(setting, size):
        found = difference(after, before, "test_accuracy")
        words.append(f"{before['label'].iloc[0]} {difference_in_words(found, 'test_accuracy')}")
    if not words:
        return []
    return [
        "With the nearest permutation in the place of each learned matrix, and nothing trained after, test accuracy changes "
        f"by, in points: {'; '.join(words)}."
    ]


def _projections(setting: Setting, size: int) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """Return the runs of each configuration of PermAVG as learned and projected."""
    every = {cell.label: cell.runs for cell in cells(setting, size)}
    suffix = FORMS["_projected"]
    return [(runs, every[label + suffix]) for label, runs in every.items() if label + suffix in every]


def _row_errors(df: pd.DataFrame) -> pd.Series:
    """Return, by PermAVG's run, how far from 1 a row's sum is at most, in all its members and layers."""
    return df[(df["split"] == "matrix") & (df["method"] == "permavg")].groupby("run_id")["row_error"].max().dropna()


def _row_error_sentence(df: pd.DataFrame, every: Sequence[Cell]) -> list[str]:
    """Return how far from doubly stochastic the matrices of each form of PermAVG are."""
    errors = _row_errors(df)
    found = {
        cell.label: cell.runs["run_id"].map(errors).max() for cell in every if cell.arm in PERMAVG and not cell.form
    }
    words = [f"{label} {error:.2g}" for label, error in found.items() if pd.notna(error)]
    if not words:
        return []
    return [
        "Of PermAVG's matrices the columns sum to 1, and the rows as nearly as 100 normalisations make them; in all runs, "
        f"members and layers a row's sum is off by at most: {'; '.join(words)}."
    ]


def _other_networks_sentence(setting: Setting) -> list[str]:
    """Return where runs of one seed are not of the same networks, as they may be where these were trained again."""
    known = setting.runs.dropna(subset="networks_digest")
    several = known.groupby(["ensemble_size", "seed"])["networks_digest"].nunique().reset_index()
    return [
        f"Of {size} networks, seed {seed}, runs are of {count} different sets of networks: their differences are of "
        "these too."
        for size, seed, count in several[several["networks_digest"] > 1].itertuples(index=False)
    ]


def _barrier_sentence(df: pd.DataFrame, setting: Setting) -> list[str]:
    lines = summarise_lines(df[df["run_id"].isin(set(setting.runs["run_id"]))])
    return [f"On the line between two networks: {_barriers(lines)}."] if len(lines) else []


def _barriers(lines: pd.DataFrame) -> str:
    words = []
    of_run = lines.drop_duplicates(["run_id", "matched"])
    for name in COMPARED:
        each = [
            f"{with_spread(of_run.loc[of_run['matched'] == matched, f'barrier_{name}'], MEASURES[name], unit=False)} {how}"
            for matched, how in ((False, "as they are"), (True, "matched"))
        ]
        unit = MEASURES[name].unit.replace("%", "points")
        words.append(f"the barrier of {MEASURES[name].name.removeprefix('final ')} is {listed(each)} ({unit})")
    return ", ".join(words)


def _network_sentence(setting: Setting, size: int) -> list[str]:
    """Return how large PermAVG's network is and how fast, beside a plain one and the deep ensemble, on one device."""
    pairs = [pair for pair in comparisons(setting) if pair.size == size]
    if not pairs:
        return []
    ours, device = pairs[0].ours, main_device(setting.runs)
    by = {pair.other: pair.others for pair in pairs}
    ensemble = by.get("deep_ensemble", ours.iloc[:0])
    shares = [
        f"{_times_as_many(ours['parameters'].iloc[0] / by[method]['parameters'].iloc[0])} {name}"
        for method, name in (("single", "one plain network"), ("deep_ensemble", "the deep ensemble"))
        if method in by
    ]
    beside = f" ({listed(shares)})" if shares else ""
    lines = [
        f"PermAVG's network, written out, has {ours['parameters'].iloc[0]:,.0f} parameters{beside}. To make it of {size} "
        f"networks {ours['parameters_trained'].iloc[0]:,.0f} entries of matrices were trained."
    ]
    plain = ours.loc[ours["device_name"].astype(str) == device, "relative_speed"].dropna()
    speeds = [(plain, "a plain network"), (relative_speed(ours, ensemble, device), "the deep ensemble")]
    # the median: what else the machine did while one run was timed is in the mean, and not in that
    words = [f"{times.median():.2f} times as fast as {name} (n = {len(times)})" for times, name in speeds if len(times)]
    if words:
        lines.append(
            f"In inference it is {listed(words)}: medians over seeds of images per second, each timed in turn with a plain "
            f"network ({device})."
        )
    return lines


def _times_as_many(ratio: float) -> str:
    return "as many as" if ratio == 1 else f"{ratio:.3g} times as many as"


def relative_speed(ours: pd.DataFrame, others: pd.DataFrame, device: str) -> pd.Series:
    """Return, for each seed that both have on the device, how many times the others' images a second ours infers.

    Each beside the plain network of its own process: the ratio of both ratios.
    """
    one, two = (
        runs[runs["device_name"].astype(str) == device].set_index("seed")["relative_speed"] for runs in (ours, others)
    )
    return (one / two).dropna()


def describe(setting: Setting) -> str:
    """Return in words what a setting holds constant, and where its images and networks are from."""
    f = setting.fields
    sources = sorted(set(setting.runs["data_source"].astype(str)))
    shape = f" with {f['depth']} hidden layer{'s' * (f['depth'] > 1)} of {f['hidden_size']}" if f["depth"] else ""
    made = (
        f"networks from files (SHA-256 {f['base_digest'][:8]}...)"
        if f["base_digest"]
        else f"networks of {f['epochs']} epochs, {number(f['warmup_epochs'])} of them warm-up"
    )
    extra = sorted(setting.runs.loc[setting.runs["arm"] != "longer", "extra_epochs"].dropna().unique())
    after = f", {listed([f'{epochs:g}' for epochs in extra])} extra epochs" if extra else ""
    return (
        f"{f['dataset']} ({', '.join(sources)}), {f['model']}{shape}, {made}{after}, batches of {f['batch_size']} images, "
        f"{f['optimizer']} at learning rate {number(f['learning_rate'])} with momentum {number(f['momentum'])}, weight decay "
        f"{number(f['weight_decay'])}, batchnorm {f['batchnorm']}, augment {f['augment']}, precision {f['precision']}"
    )


def _seeds(every: Iterable[Cell]) -> list[int]:
    return [cell.runs["seed"].nunique() for cell in every]


def _n(every: Iterable[Cell]) -> str:
    return counted(_seeds(every))


def _n_of(runs: pd.DataFrame) -> str:
    return counted(runs.groupby([*CELL, "form"], dropna=False)["seed"].nunique())


# --- from numbers to pictures -----------------------------------------------------------------------------------------


def draw_methods(every: Sequence[Cell], ax: Axes, *, measure: str) -> Axes:
    """Draw a row for each cell, in groups; dashed through all: the mean of the best single network and the deep ensemble."""
    groups = {
        title: [(cell.label.removesuffix(FORMS[cell.form]), row_of(cell.runs, measure, cell.look)) for cell in some]
        for title, some in _groups(every)
    }
    draw_rows(groups, ax, measure=measure)
    for cell in every:
        if cell.arm in REFERENCES and cell.runs["ensemble_size"].iloc[0] > 1:
            ax.axvline(cell.runs[measure].mean(), color=cell.look.colour, lw=0.8, ls=DASHED, zorder=1)
    return ax


def _groups(every: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """Return what is drawn under which heading; only what is there."""
    anew = [cell for cell in every if cell.arm == "longer"]
    students = [cell for cell in every if cell.arm == "distillation"]
    trained = [
        cell for cell in every if cell.arm not in ("longer", "distillation") and cell.runs["extra_epochs"].notna().any()
    ]

    def of(some: Sequence[Cell]) -> str:
        epochs = sorted({epochs for cell in some for epochs in cell.runs["extra_epochs"]})
        return f"trained for {listed([f'{n:g}' for n in epochs])} epoch{'s' if epochs != [1] else ''}"

    groups = {
        "nothing trained": [c for c in every if not c.form and c.runs["extra_epochs"].isna().all()],
        f"{of(trained)} more": [cell for cell in trained if not cell.form],
        f"a new network, {of(students)}": students,
        f"{of(anew)} from the start": anew,
        "projected, nothing trained after": [cell for cell in every if cell.form == "_projected"],
        "statistics averaged, not estimated": [cell for cell in every if cell.form == "_stale"],
    }
    return [(title, some) for title, some in groups.items() if some]


def draw_differences(pairs: Sequence[Comparison], ax: Axes, *, measure: str) -> Axes:
    """Draw paired differences of PermAVG, under a heading for what is taken off, a row for each number of networks."""
    groups: dict[str, list[tuple[str, Row]]] = {}
    for pair in pairs:
        row = row_of_difference(pair.ours, pair.others, measure, pair.look)
        groups.setdefault(f"less {OTHERS[pair.other]}", []).append((f"{pair.size} networks", row))
    return draw_rows(groups, ax, measure=measure, differences=True)


def draw_sizes(runs: pd.DataFrame, ax: Axes, *, measure: str, sizes: Sequence[int], arms: Sequence[str]) -> Axes:
    """Draw a measure against the number of networks, a line for each arm: dots are seeds, lines join their means."""
    places = {size: at for at, size in enumerate(sizes)}
    there = [arm for arm in arms if (runs["arm"] == arm).any()]
    for arm, aside in zip(there, np.linspace(-0.2, 0.2, len(there)) if len(there) > 1 else [0.0], strict=True):
        look, mine = ARMS[arm], runs[runs["arm"] == arm]
        at = mine["ensemble_size"].map(places) + aside
        ax.plot(at, mine[measure], look.marker, color=look.colour, ms=2.4, mew=0, alpha=0.55)
        mean = mine.groupby("ensemble_size")[measure].mean()
        places_of_means = mean.index.map(places) + aside
        ax.plot(places_of_means, mean, color=look.colour, ls=look.line, lw=1.1, zorder=2.5)
        ax.plot(places_of_means, mean, look.marker, color=look.colour, ms=5.2, mec="white", mew=0.5, zorder=3)
    ax.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    ax.set_xlim(-0.4, len(sizes) - 0.6)
    ax.set_ylabel(MEASURES[measure].label)
    return ax


def draw_lines(lines: pd.DataFrame, ax: Axes, *, measure: str) -> Axes:
    """Draw a measure along the line between two networks, as they are and matched: thin lines are seeds, thick their mean."""
    for matched, look in LINES.items():
        mine = lines[lines["matched"] == matched]
        for _, run in mine.groupby("run_id"):
            ax.plot(run["share"], run[measure], color=look.colour, ls=look.line, lw=0.5, alpha=0.5)
        mean = mine.groupby("share")[measure].mean()
        ax.plot(mean.index, mean, look.marker, color=look.colour, ls=look.line, lw=1.6, ms=4, mec="white", mew=0.5)
    ax.set_xlabel("share of the second network")
    ax.set_ylabel(MEASURES[measure].label)
    return ax


LINES = {
    False: ARMS["naive_average"]._replace(label="as they are"),
    True: ARMS["matching_mean"]._replace(label="matched"),
}


def draw_matrix(values: np.ndarray, ax: Axes, *, norm: Normalize, cmap: str) -> Axes:
    ax.imshow(values, norm=norm, cmap=cmap, interpolation="nearest", rasterized=True)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


def norm_of_matrix(values: np.ndarray) -> tuple[Normalize, str]:
    """Return a scale of colours: logarithmic from 0.0001 to 1; of what has a sign, around 0 and linear up to 0.01."""
    if (values < 0).any():
        most = max(1.0, float(np.abs(values).max()))
        return SymLogNorm(0.01, vmin=-most, vmax=most), "RdBu_r"
    return LogNorm(1e-4, 1, clip=True), "viridis"


def draw_cost(every: Sequence[Cell], ax: Axes, *, x: str, y: str) -> Axes:
    """Draw a measure against a cost, logarithmic: small dots are runs, large ones cells, at their mean and median cost.

    The median, as what else the machine did while one run was timed is in the mean, and not in that; nor is there a large
    dot where some runs were not timed and fewer than three were.
    """
    for cell in reversed(every):
        look, runs = cell.look, cell.runs
        first = cell.arm == "single" and cell.runs["ensemble_size"].iloc[0] == 1
        ax.plot(runs[x], runs[y], look.marker, color=look.colour, ms=2.4, mew=0, alpha=0.5)
        if runs[x].isna().any() and runs[x].count() < 3:
            continue
        face: dict[str, Any] = {"mfc": "white", "mec": look.colour} if first else {"mec": "white"}
        ax.plot(runs[x].median(), runs[y].mean(), look.marker, color=look.colour, ms=6, mew=0.7, zorder=3, **face)
    in_view = [cell.runs[y] for cell in every if cell.arm not in UNTRAINED] or [cell.runs[y] for cell in every]
    ax.set_ylim(padded(pd.concat(in_view)))
    ax.set_xlabel(OWN[x].label)
    ax.set_ylabel(MEASURES[y].label)
    logarithmic(ax)
    return ax


def _legend(figure: Figure, looks: Iterable[Look], columns: int = 4, lines: bool = True) -> None:
    """Put above a figure which colour, marker and dash is which arm."""
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, ls=look.line if lines else "", label=look.label, mec="white",
               mew=0.4, ms=5.2, lw=1.1)
        for look in looks
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside upper center", ncols=min(len(handles), columns), handlelength=3 if lines else 1.5,
        columnspacing=1.2,
    )  # fmt: skip


# --- which figures, and what they say ---------------------------------------------------------------------------------


def figures(df: pd.DataFrame) -> Figures:
    """Yield (setting/name, caption, figure) of every figure that the results support; inside `plots.figure.style()`."""
    for setting in settings(df):
        mine = df[df["run_id"].isin(set(setting.runs["run_id"]))]
        for part in (
            _size_figure,
            _method_figure,
            _difference_figures,
            _projection_figure,
            _barrier_figure,
            _matrix_figures,
            _cost_figure,
            _reliability_figure,
            _training_figure,
        ):
            for name, caption, figure in part(setting, mine):
                yield f"{setting.name}/{name}", f"{caption} Setting: {describe(setting)}.", figure


def findings(df: pd.DataFrame) -> dict[str, Finding]:
    """Return for each setting's name what was found, and from what."""
    found = {}
    for setting in settings(df):
        mine = df[df["run_id"].isin(set(setting.runs["run_id"]))]
        tables = [
            "Mean ± standard deviation over seeds (of one seed no spread is known), by the number of networks, M; seconds are "
            f"of {main_device(setting.runs)}.\n\n" + markdown(summarise_cells(setting))
        ]
        pairs = summarise_differences(setting)
        note = f"PermAVG and what it is compared with are chosen {ON_VALIDATION}."
        if len(pairs) and (pairs["pairs"].astype(int) < 3).any():
            note += " Of fewer than 3 pairs no interval is known."
        of_main_size = pairs[pairs["networks"] == str(main_size(setting))] if len(pairs) else pairs
        tables += paired_table(pairs, note)
        made = provenance(setting.runs, describe(setting))
        by_size = summarise_sizes(setting)
        shown = [
            f"Final test accuracy (%) by number of networks, M.{_chosen(best_of_arms(setting))}\n\n{markdown(by_size)}"
        ]
        shown = (shown if len(by_size.columns) > 2 else []) + paired_table(of_main_size, note)
        found[setting.name] = Finding(_sentences(setting, mine), "\n\n".join(tables), made, "\n\n".join(shown))
    return found


def _chosen(runs: pd.DataFrame) -> str:
    """Return that there was a choice of configurations, where there was one, and of which numbers of networks."""
    candidates = runs.groupby("ensemble_size")["candidates"].max()
    several = [str(size) for size, count in candidates.items() if count > 1]
    if not several:
        return ""
    averages = (candidates.index > 1).sum()  # of one network there is nothing to choose
    some = f" (of {listed(several)} networks, else there is one)" if len(several) < averages else ""
    return f" Of a method with several configurations{some} the best is taken, {ON_VALIDATION}."


def _rates(every: Iterable[Cell]) -> str:
    """Return that there was a choice of learning rates, where there was one."""
    chosen = f" Of several learning rates of extra training the best is drawn, {ON_VALIDATION}; the table has all."
    return chosen if any((cell.runs["candidates"] > 1).any() for cell in every) else ""


def _size_figure(setting: Setting, df: pd.DataFrame) -> Figures:
    runs = best_of_arms(setting)
    others = set(runs.loc[runs["method"] != "weight_matching", "ensemble_size"])
    runs = runs[runs["ensemble_size"].isin(others)]  # of two there may be matching alone, for the line between them
    sizes = sorted(map(int, others))
    if sum(size > 1 for size in sizes) < 2:
        return
    panels = {"nothing trained": UNTRAINED, "PermAVG": PERMAVG, "other extra training": CONTROLS}
    panels = {title: arms for title, arms in panels.items() if runs["arm"].isin(arms).any()} or {"": ()}
    figure = new_figure(TEXT_WIDTH * max(2, len(panels)) / 3, 4.9)
    axes = figure.subplots(2, len(panels), sharex=True, squeeze=False)
    for at, (title, arms) in enumerate(panels.items()):
        for ax, measure in zip(axes[:, at], COMPARED, strict=True):
            draw_sizes(runs, ax, measure=measure, sizes=sizes, arms=[*REFERENCES, *arms])
            ax.set_ylabel("" if at else MEASURES[measure].label)
        axes[0, at].set_title(title)
        axes[1, at].set_xlabel("networks")
    _legend(figure, [look for arm, look in ARMS.items() if (runs["arm"] == arm).any()])
    yield (
        "size",
        "Final test accuracy (above) and NLL (below) against the number of networks; each panel has its own scale, and the "
        "best single network (on validation; of one, the first) and the deep ensemble are in all of them. Small dots are "
        f"seeds, large ones their mean, {_n_of(runs)}; arms are drawn a little aside of each other. "
        f"Of two networks, "
        f"matching with the first and with the mean are one.{_chosen(runs)}",
        figure,
    )


def _method_figure(setting: Setting, df: pd.DataFrame) -> Figures:
    size = main_size(setting)
    every = cells(setting, size)
    lines = len(every) + len(_groups(every))
    measures = ("test_accuracy", "test_nll", "test_ece")
    figure = new_figure(TEXT_WIDTH, 0.19 * lines + 0.6)
    for ax, measure in zip(figure.subplots(1, 3, sharey=True), measures, strict=True):
        draw_methods(every, ax, measure=measure)
    yield (
        "methods",
        f"What is made of {size} networks: final test accuracy, NLL, and ECE in 15 bins. The best single network is so "
        f"on validation. {dots_of(_seeds(every))}. Dashed: the means of the best single network (black) and of the "
        f"deep ensemble (orange).{_rates(every)}",
        figure,
    )


def _difference_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    for thesis in (False, True):
        pairs = comparisons(setting, thesis)
        if not pairs:
            continue
        lines = len(pairs) + len({pair.other for pair in pairs})
        figure = new_figure(TEXT_WIDTH, 0.19 * lines + 0.6)
        for ax, measure in zip(figure.subplots(1, 2, sharey=True), COMPARED, strict=True):
            draw_differences(pairs, ax, measure=measure)
        n = [pair.difference("test_accuracy").pairs for pair in pairs]
        intervals = sum(np.isfinite(pair.difference(measure).half) for pair in pairs for measure in COMPARED)
        corrected = f" None of the {intervals} intervals is corrected for their number." if intervals else ""
        what = f"{FORM_OF_THESIS if thesis else f'as it is {BEST}'} ({_which(pairs)})"
        yield (
            "differences_thesis" if thesis else "differences",
            f"Paired differences over seeds of final test accuracy (left; right of 0 PermAVG is better) and NLL (right; left "
            f"of 0 it is better): PermAVG {what} less what the heading says, of several configurations the best on validation, "
            "those that train for as many extra epochs, the longer single network for those of PermAVG and all its networks. "
            f"{dots_of(n, 'paired seed')}.{corrected}",
            figure,
        )


def _projection_figure(setting: Setting, df: pd.DataFrame) -> Figures:
    size = main_size(setting)
    pairs = _projections(setting, size)
    if not pairs:
        return
    every = cells(setting, size)
    rows: list[tuple[str, list[Cell]]] = [
        (str(before["label"].iloc[0]), [Cell("as learned", before), Cell("projected", after)])
        for before, after in pairs
    ]
    beside = [cell for cell in every if cell.arm in ("single", *UNTRAINED) and not cell.form and
              cell.runs["ensemble_size"].iloc[0] == size]  # fmt: skip
    rows += [("nothing learned", beside)] if beside else []
    figure = new_figure(TEXT_WIDTH, 0.19 * sum(1 + len(some) for _, some in rows) + 0.6)
    for ax, measure in zip(figure.subplots(1, 2, sharey=True), COMPARED, strict=True):
        draw_rows(
            {title: [(cell.label, row_of(cell.runs, measure, cell.look)) for cell in some] for title, some in rows},
            ax,
            measure=measure,
        )
    shown = [*(Cell("", runs) for pair in pairs for runs in pair), *beside]
    yield (
        "projection",
        f"PermAVG of {size} networks with its matrices as learned, and with the permutation nearest to each in its place and "
        f"nothing trained after: final test accuracy (left) and NLL (right). {dots_of(_seeds(shown))}."
        f"{_rates(shown)}",
        figure,
    )


def _barrier_figure(setting: Setting, df: pd.DataFrame) -> Figures:
    lines = summarise_lines(df)
    if lines.empty:
        return
    figure = new_figure(TEXT_WIDTH, 2.5)
    for ax, measure in zip(figure.subplots(1, 2), COMPARED, strict=True):
        draw_lines(lines, ax, measure=measure)
    _legend(figure, LINES.values())
    yield (
        "barriers",
        "Test accuracy (left) and NLL (right) of the networks on the straight line between two, as they are and with one "
        f"matched to the other. Thin lines are seeds, thick ones their mean, {counted([lines['seed'].nunique()])}. "
        f"By how much it gets worse than on the straight line of its ends, mean ± standard deviation: {_barriers(lines)}.",
        figure,
    )


def _matrix_figures(setting: Setting, df: pd.DataFrame) -> Figures:
    """Pictures of a learned matrix of each arm, and what all of them are like."""
    size = main_size(setting)
    runs = best_of_arms(setting)
    first = runs[(runs["ensemble_size"] == size) & (runs["seed"] == 0) & runs["method"].isin(["permavg", "mixing"])]
    shown = [
        (str(run.label), as_learned, in_order)
        for run in first.sort_values("arm", key=lambda arms: arms.map(list(ARMS).index)).itertuples()
        if (as_learned := picture(df, str(run.run_id), "picture")) is not None
        and (in_order := picture(df, str(run.run_id), "picture_ordered")) is not None
    ]
    if shown:
        titles = [fill(label.replace("extra learning ", ""), 19, break_on_hyphens=False) for label, *_ in shown]
        figure = new_figure(TEXT_WIDTH * max(3, len(shown)) / 5, 3.4)
        axes = figure.subplots(2, len(shown), squeeze=False)
        for column, title, (_, *both) in zip(axes.T, titles, shown, strict=True):
            norm, cmap = norm_of_matrix(np.concatenate(both))
            for ax, values in zip(column, both, strict=True):
                draw_matrix(values, ax, norm=norm, cmap=cmap)
            column[0].set_title(title)
            ticks = [1e-4, 1e-2, 1] if isinstance(norm, LogNorm) else [-1, -0.01, 0.01, 1]
            bar = figure.colorbar(
                ScalarMappable(norm, cmap), ax=list(column), location="bottom", fraction=0.05, aspect=20, pad=0.02
            )
            bar.set_ticks(ticks, labels=[number(tick) for tick in ticks], fontsize=6)
            bar.ax.minorticks_off()
            bar.outline.set_visible(False)
        axes[0, 0].set_ylabel("as learned")
        axes[1, 0].set_ylabel("columns in order")
        units = shown[0][1].shape[0]
        yield (
            "matrices",
            f"A learned matrix of {size} networks: member 1, first hidden layer, seed 0, the first {units} {TIMES} {units} "
            "entries, as learned (above; rate: the learning rate) and with its columns in the order of the nearest permutation "
            "(below), where a permutation would be the diagonal. Scales are logarithmic, below 0.0001 all is dark; those of "
            "free mixing have a sign, and are linear up to 0.01."
            + _row_error(df[df["run_id"].isin(set(first["run_id"]))]),
            figure,
        )
    matrices = summarise_matrices(df).merge(runs, on="run_id")
    if len(matrices):
        yield _matrix_summary(matrices)


def _row_error(df: pd.DataFrame) -> str:
    """Return how nearly PermAVG's matrices are doubly stochastic."""
    errors = _row_errors(df)
    if errors.empty:
        return ""
    return (
        " Columns of PermAVG's matrices sum to 1; of these runs, in all their members and layers, a row's sum is at most "
        f"{errors.max():.2g} away from it."
    )


def _matrix_summary(matrices: pd.DataFrame) -> tuple[str, str, Figure]:
    layers = sorted(int(layer) for layer in set(matrices["layer"]))
    sizes = sorted(int(size) for size in set(matrices["ensemble_size"]))
    many = len(sizes) * len(layers) > 6
    figure = new_figure(TEXT_WIDTH, 4.2 if many else 2.6)
    axes = figure.subplots(2, 1, sharex=True) if many else figure.subplots(1, 2)
    there = [arm for arm in ARMS if (matrices["arm"] == arm).any()]
    names = {"row_max": "largest entry\nof a row, mean", "unique_argmax": "rows with a column\nof their own (%)"}
    groups = [(size, layer) for size in sizes for layer in layers]
    for ax, (name, label) in zip(axes, names.items(), strict=True):
        for arm, aside in zip(there, np.linspace(-0.25, 0.25, len(there)) if len(there) > 1 else [0.0], strict=True):
            look, mine = ARMS[arm], matrices[matrices["arm"] == arm]
            at = (
                np.array([groups.index(group) for group in zip(mine["ensemble_size"], mine["layer"], strict=True)])
                + aside
            )
            ax.plot(at, mine[name], look.marker, color=look.colour, ms=2.4, mew=0, alpha=0.55)
            mean = mine[name].groupby(at).mean()
            ax.plot(mean.index, mean, look.marker, color=look.colour, ms=5.2, mec="white", mew=0.5, zorder=3)
        ax.set_xticks(
            range(len(groups)),
            [
                str(size) if len(layers) == 1 else f"{layer}\nM = {size}" if layer == layers[0] else str(layer)
                for size, layer in groups
            ],
        )
        ax.set_xlabel("networks" if len(layers) == 1 else "hidden layer, of M networks")
        ax.set_ylabel(label)
        ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
        ax.grid(False, axis="x")
    _legend(figure, [ARMS[arm] for arm in there], lines=False, columns=5)
    caption = (
        "How near learned matrices are to permutations, of which both would be 1 (100 %): the largest entry of a row, mean "
        "over rows and members (first), and the share of rows whose largest entry is in a column that is no other row's "
        f"(second). Small dots are seeds, large ones their mean, {_n_of(matrices)}.{_chosen(matrices)}"
    )
    return "matrices_summary", caption, figure


def _cost_figure(setting: Setting, df: pd.DataFrame) -> Figures:
    size, device = main_size(setting), main_device(setting.runs)
    every = [
        cell._replace(runs=cell.runs[cell.runs["device_name"].astype(str) == device]) for cell in cells(setting, size)
    ]
    every = [cell for cell in every if len(cell.runs) and not cell.form]
    axes_of = [x for x in OWN if any(cell.runs[x].notna().any() for cell in every)]
    if not axes_of:
        return
    figure = new_figure(TEXT_WIDTH, 3.3)
    axes = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
    for ax, x in zip(axes, axes_of, strict=True):
        draw_cost(every, ax, x=x, y="test_accuracy")
    for ax in axes[1:]:
        ax.set_ylabel("")
    costs = {
        "total_seconds": "the seconds of training, of all networks (for the best single one too) and of what comes after, "
        "matching included",
        "relative_speed": "images per second in inference, of the runs that timed a plain network in turn with their own",
    }
    low = axes[0].get_ylim()[0]
    below = [cell for cell in every if cell.runs["test_accuracy"].max() < low]
    there = {cell.arm for cell in every} - {cell.arm for cell in below}
    _legend(figure, [look for arm, look in ARMS.items() if arm in there], lines=False)
    means = listed([f"{cell.label} ({cell.runs['test_accuracy'].mean():.1f} %)" for cell in below])
    yield (
        "cost",
        f"Final test accuracy of what is made of {size} networks against {', and against '.join(costs[x] for x in axes_of)}; "
        "logarithmic. The open circle is the first network alone. Small dots are runs, large ones means over seeds at the "
        "median cost, "
        f"{_n(every)}; not all runs timed inference, and where fewer than three did there is no large one. "
        f"{f'Below what is in view: {means}. ' if below else ''}"
        f"{measured_on(setting.runs, [*CELL, 'form'])}{_rates(every)}",
        figure,
    )


def _reliability_figure(setting: Setting, df: pd.DataFrame) -> Figures:
    bins, size = summarise_reliability(df), main_size(setting)
    there = set(bins["run_id"])
    panels: dict[str, tuple[Look, Collection[str]]] = {}
    shown = []
    for cell in cells(setting, size):
        first = cell.arm == "single" and cell.runs["ensemble_size"].iloc[0] == 1
        runs = there & set(cell.runs["run_id"])
        if not cell.form and not first and runs:
            panels[fill(cell.label, 23, break_on_hyphens=False)] = (cell.look, runs)
            shown.append(cell._replace(runs=cell.runs[cell.runs["run_id"].isin(runs)]))
    if panels:
        caption = RELIABILITY.replace(
            "the ensemble's prediction", f"the prediction, of what is made of {size} networks,"
        )
        caption += f", {_n(shown)}.{_rates(shown)}"
        figure = reliability_diagrams(bins, panels)
        figure.supxlabel("confidence of the prediction (%)", fontsize=8)
        yield "reliability", caption, figure


def _training_figure(setting: Setting, df: pd.DataFrame) -> Figures:
    size, runs = main_size(setting), best_of_arms(setting)
    mine = runs[runs["ensemble_size"] == size]
    epochs = summarise_epochs(df).merge(mine.loc[mine["arm"] != "longer", ["run_id", "arm"]], on="run_id")
    if epochs["epoch"].nunique() < 3:
        return
    panels = {"PermAVG": PERMAVG, "other extra training": CONTROLS}
    panels = {title: arms for title, arms in panels.items() if epochs["arm"].isin(arms).any()}
    figure = new_figure(TEXT_WIDTH, 4.6)
    axes = figure.subplots(2, len(panels), sharex=True, squeeze=False)
    measures = ("validation_accuracy", "validation_nll")
    for measure, row in zip(measures, axes, strict=True):
        for ax, (title, arms) in zip(row, panels.items(), strict=True):
            draw_curves(epochs, ax, measure=measure, looks={arm: ARMS[arm] for arm in arms})
            late = epochs[epochs["arm"].isin(arms) & (epochs["epoch"] >= epochs["epoch"].max() / 2)]
            ends = [late[measure].min(), late[measure].max()]
            for arm in REFERENCES:
                reference = mine.loc[mine["arm"] == arm, measure].mean()
                if np.isfinite(reference):
                    ax.axhline(reference, color=ARMS[arm].colour, lw=0.8, ls=DASHED, zorder=1)
                    ends.append(reference)
            ax.set_ylim(padded(ends))
            ax.set_xlabel("epoch of extra training" if measure == measures[1] else "")
            ax.set_title(title if measure == measures[0] else "")
            ax.set_ylabel(MEASURES[measure].label if title == next(iter(panels)) else "")
    there = [ARMS[arm]._replace(marker="") for arms in panels.values() for arm in arms if (epochs["arm"] == arm).any()]
    _legend(figure, there)
    trained = mine[mine["run_id"].isin(set(epochs["run_id"]))]
    longer = (mine["arm"] == "longer").any()
    left_out = " The longer single network, with epochs of its own, is not drawn." if longer else ""
    yield (
        "training",
        f"Validation accuracy (above) and NLL (below) by epoch of what is trained from {size} networks; epoch 0 is where it "
        f"starts. Each panel has its own scale, that of the later half of epochs. Thin lines are seeds, thick ones "
        f"their mean, {_n_of(trained)}; dashed: the means of the best single network (black) and of the deep ensemble "
        f"(orange).{_chosen(trained)}{left_out}",
        figure,
    )
