"""Draw every figure of an experiment, or of all that have results, from their CSV files: python -m plots [EXPERIMENT].

Written are <results>/figures/<experiment>/<setting>/<name>.png and .pdf, and beside them a README.md with what was found
and every caption; then <results>/figures/index.html, a page with all of them. `python -m plots findings` writes FINDINGS.md
beside the folder of results (`plots/findings.py`). An experiment is a module of this package that has

    CONFIG          the columns that every row of a result must state
    METRICS         the columns of its metrics, where they are not those of classification
    figures(df)     yields (setting/name, caption, Figure)
    findings(df)    setting -> Finding
"""

import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

from batchens.files import results_folder, write_text
from batchens.results import METRICS

PACKAGE = Path(__file__).parent
WHICH = "one of {}; without it, all that have results; or findings, to write FINDINGS.md beside the folder of results"


def way_out(experiment: str, results: Path) -> str:
    """Return what to do where there are no results."""
    there = "" if results == results_folder() else f" --results {shlex.quote(str(results))}"
    return (
        f"make some with `python -m jobs submit {experiment} --grid demo --cluster local{there}`, or name another folder with "
        "--results"
    )


def experiments() -> list[str]:
    """Return the modules here that have `figures`; none is imported, an answer must not wait for matplotlib."""
    modules = PACKAGE.glob("[!_]*.py")
    return sorted(path.stem for path in modules if "\ndef figures(" in path.read_text(encoding="utf-8"))


def has_results(experiment: str, results: Path) -> bool:
    return any((results / experiment).glob("*.csv"))


def draw(experiment: str, results: Path, command: str) -> None:
    """Draw all figures, write them with their captions, and print what was found.

    Raises:
        ValueError: there is no such experiment, or no result of it.
    """
    if experiment not in experiments():
        raise ValueError(
            f"an experiment must be one of {', '.join(experiments())} (or findings), however: {experiment}"
        )
    if not has_results(experiment, results):
        raise ValueError(
            f"figures are drawn from results, however {results / experiment} holds none; {way_out(experiment, results)}"
        )

    from plots.figure import save, style
    from plots.reading import usable_results

    module = import_module(f"plots.{experiment}")
    df, left_out = usable_results(results, experiment, module.CONFIG, getattr(module, "METRICS", METRICS))
    for reason in left_out:
        print(f"warning: {reason}", file=sys.stderr)
    if df.empty:
        raise ValueError(
            f"figures are drawn from results, however {results / experiment} holds no whole one; "
            f"{way_out(experiment, results)}"
        )

    folder = results / "figures" / experiment
    captions: dict[str, list[tuple[str, str]]] = {}
    with style():
        for name, caption, figure in module.figures(df):
            save(figure, folder / name)
            setting, _, short = name.rpartition("/")
            captions.setdefault(setting, []).append((short, caption))
    written = set()
    for setting, finding in module.findings(df).items():
        text = [
            f"# {experiment}: {setting}",
            f"Redrawn by `{command}`.",
            *finding.sentences,
            finding.table,
            finding.provenance,
        ]
        for short, caption in captions.get(setting, []):
            text.append(f"![{short}]({short}.png)\n\n**{short}** ([PDF]({short}.pdf)). {caption}")
            written |= {f"{setting}/{short}.png", f"{setting}/{short}.pdf"}
        readme = folder / setting / "README.md"
        write_text(readme, "\n\n".join(text) + "\n")
        written.add(f"{setting}/README.md")
        print("\n".join(finding.sentences))
        print(f"{len(captions.get(setting, []))} figures and their captions: {readme}\n")
    present = {path.relative_to(folder).as_posix() for path in folder.glob("*/[!.]*")}
    if stale := sorted(present - written):
        print(
            f"{len(stale)} files of {folder} are of an earlier call and were not drawn by this one, such as {stale[0]}"
        )


def draw_all(results: Path, command: str) -> bool:
    """Draw every experiment that has results; say which could not be drawn, and return whether there was none.

    Raises:
        ValueError: there are no results.
    """
    known = experiments()
    there = [experiment for experiment in known if has_results(experiment, results)]
    if not there:
        raise ValueError(f"figures are drawn from results, however {results} holds none; {way_out(known[0], results)}")
    good = True
    for experiment in there:
        try:
            draw(experiment, results, command.format(experiment))
        except ValueError as error:  # the others are drawn nevertheless
            print(f"error: {error}", file=sys.stderr)
            good = False
    return good


def main() -> int:
    import tyro

    for stream in (sys.stdout, sys.stderr):  # not every terminal knows our signs
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]

    def arguments(
        experiment: Annotated[
            str | None,
            tyro.conf.Positional,
            tyro.conf.arg(metavar="[EXPERIMENT]", help_behavior_hint="", help=WHICH.format(", ".join(experiments()))),
        ] = None,
        results: Annotated[Path, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = results_folder(),  # noqa: B008
        page: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
    ) -> tuple[str | None, Path, Path | None]:
        """Draw every figure of an experiment, or of all, from the CSV files, and write a page with all figures.

        Args:
            experiment: whose results to draw
            results: folder of the CSV files, for the figures too (default: $BATCHENS_RESULTS, else results/)
            page: a file for the page, which needs no other (default: figures/index.html in the folder of results)
        """
        return experiment, results, page

    experiment, results, page = tyro.cli(arguments, prog="python -m plots")
    # the folder is not named: captions are the same wherever they were made
    command = "python -m plots {}" + ("" if results == results_folder() else " --results DIR")
    results = results.absolute()
    page = page or results / "figures" / "index.html"
    try:
        if experiment == "findings":
            from plots.findings import write_findings

            print(f"written: {write_findings(results)}")
            return 0
        if experiment is None:
            good = draw_all(results, command)
        else:
            draw(experiment, results, command.format(experiment))
            good = True
        from plots.page import write_page

        write_page(page, results, experiments())
        print(f"the page of all figures: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    except KeyboardInterrupt:
        print("\nstopped; figures that were drawn are kept, and the same command draws all", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error}; make the folder writable, or copy the CSV files to another and name it with --results",
            file=sys.stderr,
        )
        return 1
    return 0 if good else 2


if __name__ == "__main__":
    sys.exit(main())
