import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module

import pandas as pd
import pytest
from scipy import stats

from batchens.files import ROOT
from batchens.grid import run_id
from batchens.results import METRICS
from plots.findings import _variance, claims, text, write_findings
from plots.reading import usable_results
from scripts.parameter_averaging import GRIDS


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A folder with the results that came with the project alone, for whoever runs the tests may have others beside them."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "results"]
    try:
        names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    except (OSError, subprocess.CalledProcessError):  # no repository, so what was unpacked
        return ROOT
    folder = tmp_path_factory.mktemp("tracked")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def committed(tracked):
    return text(tracked / "results", tracked)


def test_the_committed_findings_are_those_of_the_committed_results(committed):
    assert (ROOT / "FINDINGS.md").read_text(encoding="utf-8") == committed, "run: python -m plots findings"


@pytest.mark.parametrize("experiment", sorted({claim.experiment for claim in claims()}))
def test_the_text_beside_committed_figures_is_that_of_the_committed_results(experiment, tracked):
    module = import_module(f"plots.{experiment}")
    df, _ = usable_results(tracked / "results", experiment, module.CONFIG, getattr(module, "METRICS", METRICS))
    for setting, finding in module.findings(df).items():
        readme = (ROOT / "results" / "figures" / experiment / setting / "README.md").read_text(encoding="utf-8")
        for part in (*finding.sentences, finding.table, finding.provenance):
            assert part in readme, f"run: python -m plots {experiment}"


def test_every_claim_has_its_section_with_what_was_printed_wrong_and_measured(committed):
    sections = committed.split("\n## ")[1:]
    assert [section.partition("\n")[0] for section in sections] == [claim.title for claim in claims()]
    for section in sections:
        for part in (
            "**Verdict.** ",
            "**Words.** ",
            "**Printed.** ",
            "**What was wrong.** ",
            "**Measured.** ",
            "Redrawn by `python -m plots ",
        ):
            assert section.count(part) == 1


def test_every_figure_that_is_linked_is_there_and_every_claim_with_results_shows_one(committed):
    links = re.findall(r"\]\(([^)]*)\)", committed)
    assert links and all((ROOT / link).is_file() for link in links)
    for section in committed.split("\n## ")[1:]:
        assert ("**Measured.** Nothing yet." in section) == ("Figures and tables: none yet." in section)


def test_without_results_nothing_is_measured_and_each_missing_study_has_its_command(tmp_path):
    path = write_findings(tmp_path / "results")
    assert path == tmp_path / "FINDINGS.md"
    said = path.read_text(encoding="utf-8")
    assert said.count("**Measured.** Nothing yet.") == said.count("Figures and tables: none yet.") == len(claims())
    for claim in claims():
        for one in claim.missing:
            assert f"**Not measured yet:** {one.what}: `{one.command}`." in said


def test_a_study_is_missing_until_its_grid_is_there_but_for_a_few_that_diverged():
    for claim in claims():
        for one in claim.missing:
            script, grid = re.search(r"submit (\w+) --grid (\w+) ", one.command).groups()
            configs = import_module(f"scripts.{script}").GRIDS[grid]
            df = results_of(configs)
            mine = df[(df[list(one.values)] == pd.Series(one.values)).all(axis=1)]
            assert len(mine) == one.runs, one.what
            assert not one.still(df) and not one.still(mine[: int(0.95 * len(mine))]), one.what
            assert one.still(pd.concat(3 * [mine[: int(0.85 * len(mine))]])), one.what


def results_of(configs):
    return pd.DataFrame([asdict(config) | {"run_id": run_id(config)} for config in configs])


def test_several_studies_are_missing_one_by_one():
    (claim,) = (claim for claim in claims() if claim.experiment == "parameter_averaging")
    grids = [re.search(r"--grid (\w+)", one.command).group(1) for one in claim.missing]
    assert grids == ["fashion_mnist", "deeper", "unaugmented", "cnn", "vgg11"]
    df = results_of(GRIDS["thesis"] + GRIDS["cnn"])
    assert [one.still(df) for one in claim.missing] == [True, True, True, False, True]


def test_the_head_says_where_the_test_set_is_read():
    head = " ".join(text(ROOT / "none", ROOT).partition("\n## ")[0].split())
    assert "the test set is read once" not in head
    assert "those of parameter averaging read it more than once: of each network at the end of its training" in head


def test_numbers_are_those_of_the_results(committed, tmp_path):
    """One test accuracy of one run, edited, changes the text, and nothing else but what depends on it."""
    for name in ("parameter_testing",):
        shutil.copytree(ROOT / "results" / name, tmp_path / "results" / name)
    before = text(tmp_path / "results", tmp_path)
    (run,) = (tmp_path / "results" / "parameter_testing").glob("digits-cnn-single-m1-lr0.1-e8-s0-*.csv")
    lines = run.read_text().splitlines()
    column = lines[0].split(",").index("accuracy")
    edited = []
    for line in lines:
        cells = line.split(",")
        if ",test,," in line:
            cells[column] = "0.5"
        edited.append(",".join(cells))
    run.write_text("\n".join(edited) + "\n")
    after = text(tmp_path / "results", tmp_path)
    changed = [new for old, new in zip(before.split("\n\n"), after.split("\n\n"), strict=True) if old != new]
    assert changed and all("Single network" in part or "single network" in part for part in changed)
    assert before.split("\n## ")[3:] == after.split("\n## ")[3:]


def test_the_command_writes_it_without_torch(tmp_path):
    (tmp_path / "results").mkdir()
    code = "import sys, plots.__main__ as m; code = m.main(); assert 'torch' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", code, "findings", "--results", str(tmp_path / "results")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "FINDINGS.md").exists() and "FINDINGS.md" in ran.stdout


def test_the_analysis_of_variance_of_two_pairs_is_the_square_of_their_paired_t():
    low, high = [70.0, 71.0, 74.0, 72.0], [71.0, 72.5, 75.0, 74.0]
    runs = pd.DataFrame(
        {
            "seed": [0, 1, 2, 3] * 2,
            "alpha_init": [-0.5] * 4 + [0.5] * 4,
            "gamma_init": [-0.5] * 4 + [float("nan")] * 4,
            "test_accuracy": low + high,
        }
    )
    found = stats.ttest_rel(high, low)
    (said,) = _variance(runs)
    assert f"F = {found.statistic**2:.2f}, p = {found.pvalue:.2g}, they differ" in said
    (said,) = _variance(pd.concat([runs, runs.iloc[:1].assign(seed=9)]))  # a seed that not all pairs have is left out
    assert f"F = {found.statistic**2:.2f}" in said
    assert not _variance(runs.iloc[:4])
