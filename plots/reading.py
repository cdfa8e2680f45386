"""From a folder of result files to the table that can be drawn: what is not whole or not ours is named and left out."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from batchens.results import METRICS, read_results

# of a run, stated in each of its rows
FACTS = ("parameters", "device_name", "number_format", "torch", "data_source", "commit", "dirty", "finished")
NUMBERS = (
    "ensemble_size", "alpha_init", "gamma_init", "learning_rate", "weight_decay", "momentum", "beta2", "hess_init",
    "posterior_samples", "epochs", "warmup_epochs", "batch_size", "seed", "fraction", "images_per_second", "depth",
    "hidden_size", "temperature", "extra_epochs", "extra_learning_rate",
)  # fmt: skip
ABSENT = (
    "alpha_init", "gamma_init", "fraction", "depth", "hidden_size", "matching", "start", "temperature", "extra_epochs",
    "extra_learning_rate", "base_digest",
)  # fmt: skip  # of a configuration, on purpose


def usable_results(
    folder: Path, experiment: str, config: Sequence[str], metrics: Sequence[str] = METRICS
) -> tuple[pd.DataFrame, list[str]]:
    """Return all whole results of an experiment that state their `config`, and why each of the others was left out.

    Of the `metrics`, the first two must be there in the ensemble's test row. Of two runs with the same configuration only the
    one that finished last is kept.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        df = read_results(folder, experiment)
    left_out = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    if df.empty:
        return df, left_out
    df = df.reindex(columns=list(dict.fromkeys([*df.columns, *config, *FACTS, *metrics, *NUMBERS])))
    reasons: dict[str, str] = {}
    for name in ("epoch", "seconds", *metrics, *NUMBERS):  # a word edited in would turn the whole column into text
        numbers = pd.to_numeric(df[name], errors="coerce")
        for run in df.loc[numbers.isna() & df[name].notna(), "run_id"].unique():
            reasons[run] = f"a {name} of it is no number"
        df[name] = numbers
    for name in (name for name in config if name not in ABSENT):
        for run in df.loc[df[name].isna(), "run_id"].unique():
            reasons.setdefault(run, f"it states no {name}")
    tests = df[(df["split"] == "test") & df["member"].isna() & df[list(metrics[:2])].notna().all(axis=1)]
    for run in sorted(set(df["run_id"]) - set(tests["run_id"])):
        reasons.setdefault(run, "it has no test result of the ensemble")
    last = tests[~tests["run_id"].isin(list(reasons))].sort_values("finished", kind="stable")
    for run in last.loc[last.duplicated(list(config), keep="last"), "run_id"]:
        reasons[run] = "a later run has the same configuration"
    left_out += [f"left out {folder / experiment / run}.csv: {reason}" for run, reason in sorted(reasons.items())]
    return df[~df["run_id"].isin(list(reasons))].reset_index(drop=True), left_out
