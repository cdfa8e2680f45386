"""FINDINGS.md: each claim of the study that this suite grew from, and what is measured now. Every number is of a CSV.

What was printed and what was wrong with it stands here as text; what is measured is worded from the results when
`python -m plots findings` is called, the intervals and whether they show a difference included. A claim that no result bears on
yet says so, and which command makes some.
"""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from batchens.files import write_text
from batchens.results import METRICS
from plots import parameter_testing, skafte_mlp
from plots.figure import MEASURES, counted, levels_of, markdown, number, with_spread
from plots.image_runs import Setting, choose, compared
from plots.reading import usable_results

HEAD = """# Findings

What the study that this suite grew from printed, what was wrong with it, and what is measured here. Written by
`python -m plots findings` from the CSV files in `results/`; a test fails when it is out of date. Mean ± standard deviation over
seeds; intervals are of 95 %, by Student's t over paired seeds; none is corrected for the number of comparisons. Learning rates
and initial values are chosen on validation. No run chooses by the test set. A run reads it at its end; those of parameter
averaging read it more than once: of each network at the end of its training, of what is made of them, also with a permutation
in the place of each matrix and with BatchNorm's statistics averaged, and at points of the line between two networks."""


class Missing(NamedTuple):
    """A study that is not there yet: until the results of these values have so many levels of the column that it varies."""

    values: dict[str, object]
    column: str
    levels: int
    what: str
    command: str

    def still(self, df: pd.DataFrame) -> bool:
        if df.empty:
            return True
        mine = df[(df[list(self.values)] == pd.Series(self.values)).all(axis=1)]
        return mine.loc[mine["split"] == "test", self.column].nunique() < self.levels


class Claim(NamedTuple):
    title: str
    printed: str
    wrong: str
    experiment: str
    measured: Callable[[pd.DataFrame], list[str]]
    """what the results of the experiment say, in paragraphs"""
    figures: tuple[str, ...]
    """that show it, of every setting that has them"""
    missing: tuple[Missing, ...] = ()


def write_findings(results: Path) -> Path:
    """Write FINDINGS.md beside the folder of results, whole or not at all, and return its path."""
    path = results.parent / "FINDINGS.md"
    write_text(path, text(results, path.parent))
    return path


def text(results: Path, beside: Path) -> str:
    """Return FINDINGS.md for these results; figures are linked from the folder `beside`."""
    parts = [HEAD]
    for claim in claims():
        module = import_module(f"plots.{claim.experiment}")
        df, _ = usable_results(results, claim.experiment, module.CONFIG, getattr(module, "METRICS", METRICS))
        printed, wrong = (" ".join(words.split()) for words in (claim.printed, claim.wrong))
        parts += [f"## {claim.title}", f"**Printed.** {printed}", f"**What was wrong.** {wrong}"]
        paragraphs = [] if df.empty else claim.measured(df)
        parts += ["**Measured.** " + (paragraphs[0] if paragraphs else "Nothing yet."), *paragraphs[1:]]
        parts += [f"**Not measured yet:** {one.what}: `{one.command}`." for one in claim.missing if one.still(df)]
        parts.append(_figures(results / "figures" / claim.experiment, claim, beside))
    return "\n\n".join(parts) + "\n"


def _figures(folder: Path, claim: Claim, beside: Path) -> str:
    settings = []
    for readme in sorted(folder.glob("*/README.md")):
        drawn = [path for name in claim.figures if (path := readme.with_name(f"{name}.png")).exists()]
        if drawn:
            links = [f"[{path.stem.replace('_', ' ')}]({os.path.relpath(path, beside)})" for path in drawn]
            settings.append(f"[{readme.parent.name}]({os.path.relpath(readme, beside)}): {', '.join(links)}")
    return f"Figures and tables: {'; '.join(settings) or 'none yet'}. Redrawn by `python -m plots {claim.experiment}`."


# --- what results say of a claim --------------------------------------------------------------------------------------


def said(experiment: str) -> Callable[[pd.DataFrame], list[str]]:
    """Return what says of each setting what its figures' README does, of the tables only that of paired differences."""

    def measured(df: pd.DataFrame) -> list[str]:
        paragraphs = []
        for name, finding in import_module(f"plots.{experiment}").findings(df).items():
            lines = [f"- {sentence}" for sentence in finding.sentences]
            paragraphs += [f"{name}:", "\n".join(lines), *([finding.differences] if finding.differences else [])]
        return paragraphs

    return measured


def alpha_and_gamma(df: pd.DataFrame) -> list[str]:
    """Return of each setting whether initial values matter: members that are one network, and cells whose members differ."""
    paragraphs = []
    for setting in parameter_testing.settings(df):
        for plane in parameter_testing.planes(setting.runs)[:1]:
            cells = parameter_testing.summarise_alpha_gamma(plane, "test_accuracy")
            by_cell = plane.groupby(["alpha_init", "gamma_init"], dropna=False)["test_accuracy"]
            differ = {key: values for key, values in by_cell if not _marked(cells, key)}
            pairs = [key for key, _ in by_cell if _marked(cells, key)]
            # one value a seed: cells of one network are no more seeds of it
            same = (
                plane[plane["epistemic"] < parameter_testing.SAME_MEMBERS]
                .groupby("seed", as_index=False)[["test_accuracy"]]
                .mean()
            )
            accuracy, first = MEASURES["test_accuracy"], plane.iloc[0]
            sentences = [
                f"{_place(setting)}, BatchEnsemble of {first['size']:g}, learning rate {number(first['learning_rate'])}, "
                f"{counted(cells['n'])}."
            ]
            if len(differ) > 1:
                means = {key: values.mean() for key, values in differ.items()}
                low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
                test = stats.f_oneway(*differ.values())
                verdict = "they differ" if test.pvalue < 0.05 else "no difference between them is shown"
                sentences.append(
                    f"Of the {len(differ)} pairs of alpha and gamma whose members differ, test accuracy is lowest at "
                    f"{_pair(low)}, {with_spread(differ[low], accuracy)}, and highest at {_pair(high)}, "
                    f"{with_spread(differ[high], accuracy)}; these two were picked on test. One-way analysis of variance, "
                    f"seeds taken as independent: F = {test.statistic:.2f}, p = {test.pvalue:.2g}, {verdict}."
                )
            if len(same):
                sentences.append(
                    f"Where all members start, and so stay, one network ({'; '.join(map(_pair, pairs))}): "
                    f"{with_spread(same['test_accuracy'], accuracy)}."
                )
                best = choose(plane[plane["epistemic"] >= parameter_testing.SAME_MEMBERS], parameter_testing.CELL)
                if len(best):
                    where = _pair((best.iloc[0]["alpha_init"], best.iloc[0]["gamma_init"]))
                    sentences.append(
                        compared(best, same, (f"The pair that validation chose of the others ({where})", "it"))
                    )
            if len(sentences) > 1:
                paragraphs.append(" ".join(sentences))
    return paragraphs


def _marked(cells: pd.DataFrame, key: Any) -> bool:
    alpha, gamma = key
    return bool(cells.loc[(cells["alpha_init"] == alpha) & (cells["gamma_init"] == gamma), "marked"].any())


def _pair(key: Any) -> str:
    alpha, gamma = key
    return f"alpha {number(alpha)}, gamma {number(gamma)}"


def _place(setting: Setting) -> str:
    f = setting.fields
    return f"{f['dataset']}, {f['model']}, {f['epochs']} epochs"


def sizes(df: pd.DataFrame) -> list[str]:
    """Return for each setting with several ensemble sizes a table of methods and sizes, and the largest against the single."""
    paragraphs = []
    for setting in parameter_testing.settings(df):
        runs = choose(setting.runs, parameter_testing.CELL)
        many = [arm for arm in ("batchensemble", "deep_ensemble") if runs.loc[runs["arm"] == arm, "size"].nunique() > 1]
        single = runs[runs["arm"] == "single"]
        if not many or single.empty:
            continue
        arms = [arm for arm in ("batchensemble", "deep_ensemble", "longer") if (runs["arm"] == arm).any()]
        rows = []
        for size in levels_of(runs.loc[runs["arm"].isin(arms), "size"]):
            row = {"M": number(size)}
            for arm in arms:
                mine = runs[(runs["arm"] == arm) & (runs["size"] == size)]
                title = {"batchensemble": "BatchEnsemble of M", "deep_ensemble": "deep ensemble of M"}.get(
                    arm, "single network, M times the epochs"
                )
                rate = f", rate {number(mine['learning_rate'].iloc[0])}" if len(mine) else ""
                row[title] = (
                    with_spread(mine["test_accuracy"], MEASURES["test_accuracy"], unit=False) + rate
                    if len(mine)
                    else ""
                )
            rows.append(row)
        words = []
        for arm in arms:
            largest = runs[(runs["arm"] == arm) & (runs["size"] == runs.loc[runs["arm"] == arm, "size"].max())]
            label = parameter_testing.label_of(arm, int(largest["size"].iloc[0]))
            words.append(compared(largest, single, (label[0].upper() + label[1:], "single network")))
        paragraphs += [
            f"{_place(setting)}, batches of {setting.fields['batch_size']} for every M. Single network "
            f"{with_spread(single['test_accuracy'], MEASURES['test_accuracy'])}. {' '.join(words)} Test accuracy in %, the "
            "learning rate of each chosen on validation:",
            markdown(pd.DataFrame(rows)),
        ]
    return paragraphs


def toy(df: pd.DataFrame) -> list[str]:
    """Return what is said of all settings of the toy regression together, with its tables."""
    found = skafte_mlp.findings(df).get(skafte_mlp.ALL)
    return (
        [found.sentences[0], "\n".join(f"- {sentence}" for sentence in found.sentences[1:]), found.table]
        if found
        else []
    )


VGG: dict[str, object] = {"dataset": "cifar10", "model": "vgg11"}


def claims() -> list[Claim]:
    return [
        Claim(
            "There is a best region of initial alpha and gamma",
            """VGG11 on CIFAR-10, BatchEnsemble of 4, 15 epochs, one run in each of 81 cells: 67.6 to 78.4 % test accuracy,
            "best when alpha or gamma is between 0.2 and 0.8".""",
            """Every model overwrote its fast weights after construction with random signs at probability alpha or gamma, so
            that all negative levels, 0 and 1 were one constant vector. 36 cells, where both were constant, had identical
            members: a single network, 69.78 ± 1.06 %; the others had random signs, 76.59 ± 0.92 (one of the two) or 77.02 ±
            0.77 (both). The region was that of ensembles that are ensembles; within it there was seed noise alone. The test
            set served as validation.""",
            "parameter_testing",
            alpha_and_gamma,
            ("alpha_gamma_test_accuracy",),
            (
                Missing(
                    VGG,
                    "alpha_init",
                    9,
                    "VGG11 on CIFAR-10, 9 x 9 levels, 3 seeds (for a GPU)",
                    "python -m jobs submit parameter_testing --grid alpha_gamma --cluster NAME",
                ),
            ),
        ),
        Claim(
            "Bigger ensembles are better, and the learning rate is 0.0002",
            """VGG11 on CIFAR-10, 15 epochs, one run each: at learning rate 0.0002 from 81.39 % with 2 members to 84.84 % with
            4 and 84.02 % with 9; at 0.02 from 10 to 73 %.""",
            """The batch size was the number of members, 2 to 9: what grew was the batch. No single network and no deep
            ensemble stood beside them.""",
            "parameter_testing",
            sizes,
            ("ensemble_size_test_accuracy", "ensemble_size_learning_rate_test_accuracy"),
            (
                Missing(
                    VGG,
                    "ensemble_size",
                    5,
                    "VGG11 on CIFAR-10, 1 to 16 members, four learning rates, 3 seeds (for a GPU)",
                    "python -m jobs submit parameter_testing --grid ensemble_size --cluster NAME",
                ),
            ),
        ),
        Claim(
            "Adam, SGD and IVON differ, and IVON overfits",
            """BatchEnsembles of VGG11 on CIFAR-10 after 15 epochs, one run each: Adam 75.1, SGD 78.8 and IVON 78.4 % with 2
            members, 77.5, 78.9 and 80.3 with 4, 78.4, 77.0 and 78.2 with 8; single networks 63.3, 64.3 and 60.5.""",
            """The optimizer's name never reached the training: every run was one of Adam, and the differences are those
            between repeated runs. IVON's branch could not have run. The single networks had no BatchNorm, the ensembles
            had; with 8 members the learning rate was a tenth.""",
            "optimizer_comparison",
            said("optimizer_comparison"),
            ("curves_train_nll", "curves_validation_accuracy", "methods", "differences", "convergence"),
            (
                Missing(
                    VGG | {"epochs": 15},
                    "optimizer",
                    3,
                    "VGG11 on CIFAR-10, 15 epochs, with ensembles of 2, 4 and 8 (for a GPU)",
                    "python -m jobs submit optimizer_comparison --grid vgg11 --cluster NAME",
                ),
                Missing(
                    VGG | {"epochs": 60},
                    "optimizer",
                    3,
                    "VGG11 on CIFAR-10, 60 epochs, with ensembles of 2, 4 and 8 (for a GPU)",
                    "python -m jobs submit optimizer_comparison --grid vgg11_long --cluster NAME",
                ),
            ),
        ),
        Claim(
            "Sharing parameters costs little",
            """VGG-like networks on CIFAR-10, one run each: within a network 73.4 % without sharing, 72.6 to 73.8 with; between
            8 members 72.1 without, 69.6 to 72.5 with; both 72.8 and 73.4 to 74.2. On CIFAR-20 within a network 62.7
            without, 65.2 deep, 63.9 all, and 5.0 early.""",
            """Between members the same layers were put into every one of them, whatever was asked for: each option was one
            network with eight linear heads whose logits were averaged, which is one linear head. In the combined regime
            nothing was tied within; "early" within a network tied a layer with itself. A deep ensemble of 8 of these
            networks has 73.8 million parameters; what was printed for it, 9.26 million, shows the fault.""",
            "parameter_sharing",
            said("parameter_sharing"),
            ("parameters", "differences"),
            (
                Missing(
                    {"dataset": "cifar10", "model": "vgg11_repeats"},
                    "intensity",
                    4,
                    "VGG11 on CIFAR-10 and CIFAR-20, three regimes, four intensities, all arms, 15 and 60 epochs (for a GPU)",
                    "python -m jobs submit parameter_sharing --grid full --cluster NAME",
                ),
            ),
        ),
        Claim(
            "A BatchEnsemble knows what it does not know (toy regression)",
            "Figures of one seed, without numbers.",
            """The prediction had no variance, so the uncertainty was the spread of the members alone; the result depended on
            what had been trained before in the same process; the batches were split among members, so that the single
            network saw each point as often as all members together. Over ten seeds the test error of the printed protocol
            spreads by 35 to 78 around means of 62 to 103: one seed shows nothing.""",
            "skafte_mlp",
            toy,
            ("predictions", "differences", "nll"),
        ),
        Claim(
            "PermAVG makes one network as good as a deep ensemble",
            """Three networks 784-512-10 on Fashion-MNIST, one run: 87.97, 84.28 and 87.30 % test accuracy, deep ensemble
            88.54, knowledge distillation 88.81, naive average 76.06, PermAVG 88.87.""",
            """The networks' learning rate went up and down every 40 steps and ended at its maximum, so that they were poor and
            unequal. The matrices are doubly stochastic, not permutations: they mix units, have more free parameters than
            the network that comes of them, and were trained on the labels for as many epochs as the networks; but for the
            distilled student nothing that it was compared with had such training. At the start they averaged nearly all
            units (0.005 on the diagonal, 0.002 elsewhere). Logits were averaged, nothing was validated, and there was one
            seed. Not tried here: training on what is projected to permutations, and learning the matrices without labels.""",
            "parameter_averaging",
            said("parameter_averaging"),
            ("methods", "size", "differences", "barriers", "matrices"),
            (
                Missing(
                    {"dataset": "fashion_mnist", "model": "mlp", "depth": 1},
                    "ensemble_size",
                    5,
                    "Fashion-MNIST, all of 2, 3, 5 and 8 networks",
                    "python -m jobs submit parameter_averaging --grid fashion_mnist --cluster NAME",
                ),
                Missing(
                    {"dataset": "fashion_mnist", "model": "mlp", "depth": 3},
                    "method",
                    10,
                    "Fashion-MNIST, networks of two and three hidden layers",
                    "python -m jobs submit parameter_averaging --grid deeper --cluster NAME",
                ),
                Missing(
                    {"dataset": "cifar10", "model": "cnn"},
                    "method",
                    10,
                    "a network of two convolutions on CIFAR-10",
                    "python -m jobs submit parameter_averaging --grid cnn --cluster NAME",
                ),
                Missing(
                    VGG,
                    "method",
                    10,
                    "VGG11 on CIFAR-10, with and without BatchNorm (for a GPU)",
                    "python -m jobs submit parameter_averaging --grid vgg11 --cluster NAME",
                ),
            ),
        ),
    ]
