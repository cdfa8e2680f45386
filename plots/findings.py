"""FINDINGS.md: each claim of the study that this suite grew from, and what is measured now.

What was printed and what was wrong with it stands here as text, numbers included; what is measured is worded from the CSVs when
`python -m plots findings` is called, every number, the intervals and whether they show a difference. The verdicts are text
too, without numbers: whoever adds results reads them again. A claim that no result bears on yet says so, and which command
makes some.
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
`python -m plots findings`; what is under **Measured** is worded from the CSV files in `results/`, every number of it, and
a test fails when it is out of date. Mean ± standard deviation over seeds; intervals are of 95 %, by Student's t over
paired seeds; none is corrected for the number of comparisons. They cover seeds alone: all of them are measured on one
test set. Where several learning rates or initial values were tried, validation chose; the text says where one alone was
tried. No run chooses by the test set. A run reads it at
its end; those of parameter averaging read it more than once: of each network at the end of its training, of what is made
of them, also with a permutation in the place of each matrix and with BatchNorm's statistics averaged, and at points of
the line between two networks.

| word | what it means here |
| --- | --- |
| single network | one plain network; *longer*: trained for as many times the epochs as there are members beside it |
| deep ensemble of M | M plain networks from different points; their probabilities are averaged |
| BatchEnsemble of M | M members that share all weights but two vectors a layer: alpha of its inputs, gamma of its outputs |
| NLL | negative log-likelihood of the right class, mean over images, in nats; less is better |
| ECE | expected calibration error: mean distance of confidence and accuracy, in 15 bins; less is better |
| shown | an interval leaves 0 out; with no true difference 1 in 20 would |"""


class Missing(NamedTuple):
    """A study that is not there yet: until nine in ten of its runs are, since those that diverge write no result."""

    values: dict[str, object]
    """by which its runs, or a part of them that no other study has, are found"""
    runs: int
    """with these values, in its grid"""
    what: str
    command: str

    def still(self, df: pd.DataFrame) -> bool:
        if df.empty:
            return True
        mine = df[(df[list(self.values)] == pd.Series(self.values)).all(axis=1)]
        return mine["run_id"].nunique() < 0.9 * self.runs


class Claim(NamedTuple):
    title: str
    verdict: str
    printed: str
    wrong: str
    words: str
    """what the words of its section mean"""
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
        parts.append(f"## {claim.title}")
        for name, words in (
            ("Verdict", claim.verdict), ("Printed", claim.printed), ("What was wrong", claim.wrong), ("Words", claim.words),
        ):  # fmt: skip
            parts.append(f"**{name}.** {' '.join(words.split())}")
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
            levels = [len(levels_of(plane[name])) for name in ("alpha_init", "gamma_init")]
            tried = (
                f", {len(by_cell)} of the {levels[0] * levels[1]} pairs of {levels[0]} alphas and {levels[1]} gammas"
            )
            sentences = [
                f"{_place(setting)}, BatchEnsemble of {first['size']:g}, learning rate {number(first['learning_rate'])}"
                f"{tried}, {counted(cells['n'])}."
            ]
            if len(differ) > 1:
                means = {key: values.mean() for key, values in differ.items()}
                low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
                sentences.append(
                    f"Of the {len(differ)} pairs whose members differ, test accuracy is lowest at {_pair(low)}, "
                    f"{with_spread(differ[low], accuracy)}, and highest at {_pair(high)}, "
                    f"{with_spread(differ[high], accuracy)}."
                )
                sentences += _variance(plane[plane["epistemic"] >= parameter_testing.SAME_MEMBERS])
            if len(same):
                sentences.append(
                    f"Where all members start, and so stay, one network ({'; '.join(map(_pair, pairs))}): "
                    f"{with_spread(same['test_accuracy'], accuracy)}."
                )
                best = choose(plane[plane["epistemic"] >= parameter_testing.SAME_MEMBERS], parameter_testing.CELL)
                if len(best):
                    where = _pair((best.iloc[0]["alpha_init"], best.iloc[0]["gamma_init"]))
                    names = (f"The one of the others that validation chose ({where})", "members that are one network")
                    sentences.append(compared(best, same, names))
            if len(sentences) > 1:
                paragraphs.append(" ".join(sentences))
    return paragraphs


def _variance(runs: pd.DataFrame) -> list[str]:
    """Return an analysis of variance of the pairs with seeds as blocks (the square of the paired t of two), if it can be."""
    table = runs.pivot_table("test_accuracy", "seed", ["alpha_init", "gamma_init"], dropna=False).dropna(
        axis=1, how="all"
    )
    table = table.dropna()
    seeds, pairs = table.shape
    if seeds < 2 or pairs < 2:
        return []
    values = table.to_numpy()
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    free = (seeds - 1) * (pairs - 1)
    f = seeds * values.mean(0).var(ddof=1) / ((rest**2).sum() / free)
    p = float(stats.f.sf(f, pairs - 1, free))
    verdict = "they differ" if p < 0.05 else "no difference between them is shown"
    return [f"Analysis of variance with seeds as blocks: F = {f:.2f}, p = {p:.2g}, {verdict}."]


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
    """Return for each setting with several ensemble sizes a table of methods and sizes, and what the largest gains."""
    paragraphs = []
    for setting in parameter_testing.settings(df):
        ensembles = setting.runs[setting.runs["arm"].isin(["batchensemble", "deep_ensemble"])]
        if ensembles.groupby("arm")["size"].nunique().max() < 2:
            continue
        panels = {
            title: choose(runs, parameter_testing.CELL, ["size"])
            for title, runs in parameter_testing.by_size(setting.runs).items()
        }
        rows, words = [], []
        for size in levels_of(pd.concat(list(panels.values()))["size"]):
            row = {"M": number(size)}
            for title, runs in panels.items():
                mine = runs[runs["size"] == size]
                score = with_spread(mine["test_accuracy"], MEASURES["test_accuracy"], unit=False)
                row[title] = f"{score}, rate {number(mine['learning_rate'].iloc[0])}" if len(mine) else ""
            rows.append(row)
        for runs in panels.values():
            every = [runs[runs["size"] == size] for size in levels_of(runs["size"])]
            names = [parameter_testing.label_of(cell["arm"].iloc[0], int(cell["size"].iloc[0])) for cell in every]
            largest = names[-1][0].upper() + names[-1][1:]
            words += [compared(every[-1], cell, (largest, name)) for cell, name in zip(every[:-1], names, strict=False)]
        fast = panels.get(parameter_testing.BATCH_ENSEMBLE)
        inits = ""
        if fast is not None:
            pair = _pair((fast.iloc[0]["alpha_init"], fast.iloc[0]["gamma_init"]))
            inits = f" BatchEnsembles start from {pair}."
        paragraphs += [
            f"{_place(setting)}, batches of {setting.fields['batch_size']} for every M.{inits} Test accuracy in %; the "
            "learning rate of each was chosen on validation:",
            markdown(pd.DataFrame(rows)),
            "\n".join(f"- {sentence}" for sentence in words),
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
            """Not shown. In the small networks measured so far the initial values matter in one setting of two, and no pair
            is shown to be better than the one that makes all members one network.""",
            """VGG11 on CIFAR-10, BatchEnsemble of 4, 15 epochs, one run in each of 81 cells: 67.6 to 78.4 % test accuracy,
            "best when alpha or gamma is between 0.2 and 0.8".""",
            """Every model overwrote its fast weights after construction with random signs at probability alpha or gamma, so
            that all negative levels, 0 and 1 were one constant vector. 36 cells, where both were constant, had identical
            members: a single network, 69.78 ± 1.06 %; the others had random signs, 76.59 ± 0.92 (one of the two) or
            77.02 ± 0.77 (both). The region was that of ensembles that are ensembles; within it there was seed noise
            alone. The test set served as validation.""",
            """*alpha* and *gamma*: what the members' vectors start from. A negative value v draws from a normal
            distribution of mean 1 and standard deviation |v|; one of 0 to 1 is the probability of +1, else it is -1.""",
            "parameter_testing",
            alpha_and_gamma,
            ("alpha_gamma_test_accuracy",),
            (
                Missing(
                    VGG | {"ensemble_size": 4},
                    246,
                    "VGG11 on CIFAR-10, 9 x 9 levels, 3 seeds (for a GPU)",
                    "python -m jobs submit parameter_testing --grid alpha_gamma --cluster NAME",
                ),
            ),
        ),
        Claim(
            "Bigger ensembles are better, and the learning rate is 0.0002",
            """Not shown. On images of digits, the only setting with several sizes so far, no larger ensemble is shown to be
            better than a smaller one; the deep ensemble, and a single network trained longer, are better than the single
            network. The learning rate that was printed belongs to the batch of so many images.""",
            """VGG11 on CIFAR-10, 15 epochs, one run each: at learning rate 0.0002 from 81.39 % with 2 members to 84.84 %
            with 4 and 84.02 % with 9; at 0.02 from 10 to 73 %.""",
            """The batch size was the number of members, 2 to 9: what grew was the batch. No single network and no deep
            ensemble stood beside them.""",
            """*M*: the number of members; of a single network that is trained longer, how many times as long.""",
            "parameter_testing",
            sizes,
            ("ensemble_size_test_accuracy", "ensemble_size_learning_rate_test_accuracy"),
            (
                Missing(
                    VGG | {"learning_rate": 0.01},
                    42,
                    "VGG11 on CIFAR-10, 1 to 16 members, four learning rates, 3 seeds (for a GPU)",
                    "python -m jobs submit parameter_testing --grid ensemble_size --cluster NAME",
                ),
            ),
        ),
        Claim(
            "Adam, SGD and IVON differ, and IVON overfits",
            """In part, in short training of a small network. On digits Adam is better than SGD in some comparisons, at the
            largest rate that was tried, and worse in none; on CIFAR-10 no difference in accuracy is shown. IVON is worse than
            SGD in NLL in most comparisons; its variance is mostly the one that it was given, as it had too few steps to learn
            one.""",
            """BatchEnsembles of VGG11 on CIFAR-10 after 15 epochs, one run each: Adam 75.1, SGD 78.8 and IVON 78.4 % with 2
            members, 77.5, 78.9 and 80.3 with 4, 78.4, 77.0 and 78.2 with 8; single networks 63.3, 64.3 and 60.5.""",
            """The optimizer's name never reached the training: every run was one of Adam, and the differences are those
            between repeated runs. IVON's branch could not have run. The single networks had no BatchNorm, the ensembles
            had; with 8 members the learning rate was a tenth.""",
            """*IVON* learns a normal distribution over weights. *At the mean*: predictions of its mean alone. *Averaged*:
            over samples of it. *hess_init*: what its estimate of the Hessian, and so the variance, starts from. *0.1,
            the best of 4*: chosen from four learning rates. The *worst* in time to an accuracy is the optimizer that
            ends lowest.""",
            "optimizer_comparison",
            said("optimizer_comparison"),
            ("curves_train_nll", "curves_validation_accuracy", "methods", "differences", "convergence"),
            (
                Missing(
                    {"dataset": "cifar10", "model": "cnn", "epochs": 60},
                    252,
                    "the network of two convolutions on CIFAR-10, 15 and 60 epochs, with ensembles of 2, 4 and 8 (for a GPU)",
                    "python -m jobs submit optimizer_comparison --grid cnn_full --cluster NAME",
                ),
                Missing(
                    VGG | {"epochs": 15},
                    252,
                    "VGG11 on CIFAR-10, 15 epochs, with ensembles of 2, 4 and 8 (for a GPU)",
                    "python -m jobs submit optimizer_comparison --grid vgg11 --cluster NAME",
                ),
                Missing(
                    VGG | {"epochs": 60},
                    252,
                    "VGG11 on CIFAR-10, 60 epochs, with ensembles of 2, 4 and 8 (for a GPU)",
                    "python -m jobs submit optimizer_comparison --grid vgg11_long --cluster NAME",
                ),
            ),
        ),
        Claim(
            "Sharing parameters costs little",
            """It depends on what is shared, in one small network, at one learning rate, which was chosen for the single
            network, members' factors starting at random signs. Layers tied within a network cost nothing that is shown. Of
            what a deep ensemble gains over a single network, ties of the early or of all layers between its members take a
            large part, those of the deep layers nothing that is shown. Training a single network longer gains more than any
            of it.""",
            """VGG-like networks on CIFAR-10, one run each: within a network 73.4 % without sharing, 72.6 to 73.8 with;
            between 8 members 72.1 without, 69.6 to 72.5 with; both 72.8 and 73.4 to 74.2. On CIFAR-20 within a network
            62.7 without, 65.2 deep, 63.9 all, and 5.0 early.""",
            """Between members the same layers were put into every one of them, whatever was asked for: each option was one
            network with eight linear heads whose logits were averaged, which is one linear head. In the combined regime
            nothing was tied within; "early" within a network tied a layer with itself. A deep ensemble of 8 of these
            networks has 73.8 million parameters; what was printed for it, 9.26 million, shows the fault.""",
            """*Within* a network, layers of one shape hold one weight; *between* members, the same layer does in all of
            them. *Early*, *deep*, *all*: which layers, all but the head. *Whole*: the weight is the same. *Scaled*: each
            use has vectors of its own that scale inputs and outputs, as in a BatchEnsemble. *Part*: of a share of the
            outputs. *Same size*: nothing is tied, in a smaller network with as many parameters as the whole tie leaves.""",
            "parameter_sharing",
            said("parameter_sharing"),
            ("parameters", "degree", "differences_within", "differences_between", "differences_both"),
            (
                Missing(
                    {"dataset": "cifar10", "model": "vgg11_repeats"},
                    120,
                    "VGG11 on CIFAR-10 and CIFAR-20, three regimes, four intensities, all arms, 15 and 60 epochs (for a GPU)",
                    "python -m jobs submit parameter_sharing --grid full --cluster NAME",
                ),
            ),
        ),
        Claim(
            "A BatchEnsemble knows what it does not know (toy regression)",
            """In part. Deep ensembles and BatchEnsembles are closer to the true distribution than a single network in some
            comparisons, and further from it in none. Between the two no difference is shown in most; where members share each
            batch the deep ensemble is better in some, and worse in none. In the gap their
            intervals cover about what they should. Outside of the range of the training data all of them are far too sure.""",
            "Figures of one seed, without numbers.",
            """The prediction had no variance, so the uncertainty was the spread of the members alone; the result depended
            on what had been trained before in the same process; the batches were split among members, so that the single
            network saw each point as often as all members together. When the printed protocol was run again with ten
            seeds, before this suite was written, test errors spread by 35 to 78 around means of 62 to 103: one seed
            shows nothing.""",
            """*dtu* and *john*: the two generators of the data, after whom they were taken from, each a function with noise
            that grows. *Constant* and *predicted*: whether the variance is one number or an output of the network.
            *Repeat*: each member sees every point in each step. *Split*: its share of them. *Inside* the range of the
            training points, *in the gap* in their middle, *outside* of it. *Excess NLL*: by how much the NLL is above
            that of the true distribution.""",
            "skafte_mlp",
            toy,
            ("predictions", "differences", "nll"),
        ),
        Claim(
            "PermAVG makes one network as good as a deep ensemble",
            """It does not. The thesis mirrored images at random; measured are its networks, with training that ends where
            it should, on images that are cropped at random too, and on images as they are. On the first PermAVG is worse
            than the best of the networks that it is made of, and than all else that is trained for as many epochs. It is
            better only than averages that nothing is trained of, of which the naive one is far worse than any network. With
            three hidden layers in the place of one the same holds, and PermAVG is further behind. On the second networks
            overfit when they are trained on. There PermAVG is less accurate than the deep ensemble, the single network
            trained longer, the fine-tuned average and free mixing, and no difference is shown from the best network; in NLL
            it is better than all but the deep ensemble, as accuracy on validation chose them, but the naive average
            fine-tuned at a lower rate does as well. A network of two convolutions on CIFAR-10 says what the first do, but
            that no difference from weight matching is shown.""",
            """Three networks 784-512-10 on Fashion-MNIST, one run: 87.97, 84.28 and 87.30 % test accuracy, deep ensemble
            88.54, knowledge distillation 88.81, naive average 76.06, PermAVG 88.87.""",
            """The networks' learning rate went up and down every 40 steps and ended at its maximum, so that they were
            unequal. The matrices are doubly stochastic, not permutations: they mix units, have more free parameters
            than the network that comes of them, and were trained on the labels for as many epochs as the networks; but
            for the distilled student nothing that it was compared with had such training. At the start they averaged
            nearly all units (0.005 on the diagonal, 0.002 elsewhere). Logits were averaged, nothing was validated, and
            there was one seed. Not tried here: training on what is projected to permutations, and learning the matrices
            without labels.""",
            """All start from the same M networks, which were trained apart. *Naive average*: the mean of their weights.
            *Weight matching*: their hidden units are put into an order first in which their weights are most alike, each
            with the mean of the others or with the first network. *PermAVG*: before weights are averaged, each network's
            units are mixed by learned matrices whose columns sum to 1, and whose rows nearly do; *T*, the temperature: the
            lower, the nearer they start to the identity; *from matched*: of networks that were matched before; *projected*:
            with the nearest permutation in the place of each matrix. *Free mixing*: matrices of any entries. *Fine-tuned*:
            trained on as an ordinary network, for as many epochs as the matrices. *Distillation*: a new network that learns
            from the deep ensemble. *Barrier*: by how much it gets worse on the straight line between two networks.""",
            "parameter_averaging",
            said("parameter_averaging"),
            ("methods", "size", "differences", "barriers", "matrices"),
            (
                Missing(
                    {"dataset": "fashion_mnist", "model": "mlp", "depth": 1, "augment": True},
                    400,
                    "Fashion-MNIST, all of 2, 3, 5 and 8 networks",
                    "python -m jobs submit parameter_averaging --grid fashion_mnist --cluster NAME",
                ),
                Missing(
                    {"dataset": "fashion_mnist", "model": "mlp", "depth": 3},
                    48,
                    "Fashion-MNIST, all of three networks of three hidden layers",
                    "python -m jobs submit parameter_averaging --grid deeper --cluster NAME",
                ),
                Missing(
                    {"dataset": "fashion_mnist", "model": "mlp", "augment": False},
                    185,
                    "Fashion-MNIST without crops and flips, all of three networks, with three learning rates",
                    "python -m jobs submit parameter_averaging --grid unaugmented --cluster NAME",
                ),
                Missing(
                    {"dataset": "cifar10", "model": "cnn"},
                    84,
                    "two convolutions on CIFAR-10, all of 2 and 3 networks, 3 seeds",
                    "python -m jobs submit parameter_averaging --grid cnn --cluster NAME",
                ),
                Missing(
                    VGG,
                    252,
                    "VGG11 on CIFAR-10, with and without BatchNorm (for a GPU)",
                    "python -m jobs submit parameter_averaging --grid vgg11 --cluster NAME",
                ),
            ),
        ),
    ]
