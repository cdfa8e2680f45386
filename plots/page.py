"""All that is drawn on one page: a single HTML file that needs no other file, no network and no script.

It is made from the README.md beside each setting's figures, and says what those say: a setting that an earlier call drew is
on it too. Figures are in it as lossless WebP, 0.4 times the bytes of their PNG (50 figures: 2.5 MB of text instead of 6.4).
Every browser since 2020 shows them. The same folder gives the same bytes.
"""

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

from batchens.files import write_text

TITLE = "batchens: every figure, and what was found"
SUMMARY = (
    "Everything here is drawn from CSV files of results alone: under each figure is its caption and the command that draws it "
    "again."
)
SHOWN = 2 / 3  # of a figure's pixels, where the screen is wide enough: as wide as the page is a figure of 7 inches
FIGURE = re.compile(r"!\[(?P<name>[^]]*)\]\((?P<file>[^)]*)\)")
NAME_AND_PDF = re.compile(r"\*\*.*?\*\* \(\[PDF\]\([^)]*\)\)\. ")
FIRST_SENTENCE = re.compile(r".+?[.?](?=\s|$)", re.DOTALL)


class Drawn(NamedTuple):
    """A figure: its name, its caption in Markdown and its file."""

    name: str
    caption: str
    file: Path


class Setting(NamedTuple):
    """What a README of a setting says, in paragraphs and tables of Markdown, and its figures."""

    name: str
    command: str
    found: list[str]
    provenance: str
    figures: list[Drawn]


def write_page(page: Path, results: Path, experiments: Iterable[str]) -> None:
    """Write the page of all figures that are in `results`, whole or not at all.

    Raises:
        ValueError: a figure that a README names can't be read.
    """
    contents, parts = [], []
    for experiment in experiments:
        folder = results / "figures" / experiment
        settings = [read_setting(readme) for readme in sorted(folder.glob("*/README.md"))]
        contents.append(_contents(experiment, settings))
        heading = f'<section>\n<h2 id="{escape(experiment)}">{escape(experiment)}</h2>'
        has_results = any((results / experiment).glob("*.csv"))
        body = [_setting(experiment, setting) for setting in settings] or [_nothing(experiment, has_results)]
        parts += [heading, *body, "</section>"]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, "\n".join([HEAD, *contents, "</ul>\n</nav>", *parts, "</main>\n</body>\n</html>\n"]))


def read_setting(readme: Path) -> Setting:
    """Return what `python -m plots` wrote: title, command, what was found, provenance, and each figure with its caption."""
    _, command, *blocks = readme.read_text(encoding="utf-8").strip().split("\n\n")
    at = next((i for i, block in enumerate(blocks) if FIGURE.fullmatch(block)), len(blocks))
    *found, provenance = blocks[:at] or [""]
    figures = []
    for image, caption in zip(blocks[at::2], blocks[at + 1 :: 2], strict=False):
        if match := FIGURE.fullmatch(image):
            figures.append(
                Drawn(match["name"], NAME_AND_PDF.sub("", caption, count=1), readme.with_name(match["file"]))
            )
    return Setting(readme.parent.name, command, found, provenance, figures)


# --- from Markdown to HTML --------------------------------------------------------------------------------------------


def html(block: str) -> str:
    """Return a paragraph or a table of Markdown, as `plots` writes them, in HTML."""
    if block.startswith("|"):
        return _table([[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()])
    return f"<p>{inline(block)}</p>"


def inline(text: str) -> str:
    """Return text in HTML: `code` and **bold** are marked, all else is as it stands."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text, quote=False))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{inline(cell)}</th>' for cell in rows[0])
    body = ["<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in row) + "</tr>" for row in rows[2:]]
    label = escape(f"Table: {', '.join(rows[0][:2])}, ...")
    return "\n".join(
        [
            f'<div class="table" role="region" tabindex="0" aria-label="{label}">\n<table>\n<thead><tr>{head}</tr></thead>',
            "<tbody>",
            *body,
            "</tbody>\n</table>\n</div>",
        ]
    )


# --- parts of the page ------------------------------------------------------------------------------------------------


def _contents(experiment: str, settings: Sequence[Setting]) -> str:
    lines = [f"<li>{_link(experiment, experiment)}"]
    if not settings:
        lines.append("<p>nothing drawn</p>")
    for setting in settings:
        place = f"{experiment}/{setting.name}"
        figures = [f"<li>{_link(f'{place}/{name}', _words(name))}</li>" for name, _, _ in setting.figures]
        count = f"{len(figures)} figure{'s' * (len(figures) != 1)}"
        listed = f"<details><summary>{count}</summary><ul>{''.join(figures)}</ul></details>"
        lines.append(f"<ul><li>{_link(place, setting.name)}{listed}</li></ul>")
    return "\n".join([*lines, "</li>"])


def _setting(experiment: str, setting: Setting) -> str:
    place = f"{experiment}/{setting.name}"
    return "\n".join(
        [
            f'<section>\n<h3 id="{escape(place)}">{escape(setting.name)}</h3>',
            *map(html, setting.found),
            f'<p class="small">{inline(setting.provenance)} {inline(setting.command)}</p>',
            *(_figure(place, figure, setting.command) for figure in setting.figures),
            '<p class="small"><a href="#contents">Contents</a></p>\n</section>',
        ]
    )


def _figure(place: str, figure: Drawn, command: str) -> str:
    try:
        with Image.open(figure.file) as image:
            width, height = image.size
            encoded = BytesIO()
            image.save(encoded, "WEBP", lossless=True, method=2)
    except OSError as error:
        raise ValueError(
            f"a README's figures must be beside it, however {figure.file}: {error}; draw it again, or delete that folder"
        ) from error
    place, what = f"{place}/{figure.name}", FIRST_SENTENCE.match(figure.caption)
    return f"""<figure id="{escape(place)}">
<div class="picture" id="{escape(place)}/full">
<a class="open" href="#{quote(place)}/full" title="Full size"><img alt="{escape(what[0] if what else figure.name)}" \
width="{round(width * SHOWN)}" height="{round(height * SHOWN)}" loading="lazy" decoding="async" \
src="data:image/webp;base64,{b64encode(encoded.getvalue()).decode()}"></a>
<a class="close" href="#{quote(place)}">Close</a>
</div>
<figcaption>
<h4>{escape(_words(figure.name))}</h4>
<p>{inline(figure.caption)}</p>
<p class="small">{inline(command)}</p>
</figcaption>
</figure>"""


def _nothing(experiment: str, has_results: bool) -> str:
    draw = f"`python -m plots {experiment}`"
    if has_results:
        return html(f"There are results, but no figures of them. Draw them with {draw}.")
    submit = f"`python -m jobs submit {experiment} --grid demo --cluster local`"
    return html(f"There are no results. Make some with {submit}, then draw them with {draw}.")


def _link(place: str, text: str) -> str:
    return f'<a href="#{quote(place)}">{escape(text)}</a>'


def _words(name: str) -> str:
    return name.replace("_", " ")


STYLE = """
:root { color-scheme: light dark; --text: #1d1d1f; --faint: #5c5c62; --page: #ffffff; --box: #f4f4f6; --line: #d5d5da;
  --link: #0059b3; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8ea; --faint: #a9a9b0; --page: #17181a; --box: #222427;
  --line: #3c3e43; --link: #8ab8ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
main p { max-width: 46rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 1rem 0; }
h2 { font-size: 1.45rem; margin: 3.5rem 0 1rem; padding-top: .75rem; border-top: 3px solid var(--line); }
h3 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h4 { font-size: 1rem; margin: .5rem 0 0; }
a { color: var(--link); }
a:focus-visible, .table:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; background: var(--box);
  padding: .1em .3em; border-radius: .25em; }
.small, figcaption .small { font-size: .875rem; color: var(--faint); }
nav { background: var(--box); border-radius: .5rem; padding: 1rem 1.25rem; }
nav h2 { border: 0; padding: 0; margin: 0; font-size: 1.1rem; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav > ul > li { margin-top: .75rem; font-weight: 600; }
nav li li { font-weight: 400; padding-left: 1rem; margin-top: .35rem; }
nav p { margin: 0; padding-left: 1rem; font-weight: 400; color: var(--faint); }
nav details { font-size: .875rem; }
nav summary { color: var(--faint); cursor: pointer; padding: .2rem 0; width: fit-content; }
nav details li { display: inline-block; padding: .15rem 0; margin: 0 1.1rem 0 0; }
.table { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; font-size: .8125rem; line-height: 1.4; font-variant-numeric: tabular-nums; min-width: 100%;
  overflow-wrap: normal; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; background: var(--box); }
td { border-top: 1px solid var(--line); }
td:first-child { white-space: normal; min-width: 6.5rem; background: var(--page); }
th:first-child, td:first-child { position: sticky; left: 0; }
figure { margin: 2rem 0; }
.picture a.open { display: block; width: fit-content; max-width: 100%; background: #fff; border: 1px solid var(--line);
  border-radius: .4rem; overflow: hidden; cursor: zoom-in; }
.picture img { display: block; max-width: 100%; height: auto; background: #fff; }
.picture .close { display: none; }
figcaption p { margin: .25rem 0 0; font-size: .9375rem; }
.picture:target { position: fixed; inset: 0; z-index: 1; overflow: auto; background: #fff; overscroll-behavior: contain; }
.picture:target a.open { max-width: none; min-width: 100%; min-height: 100%; border: 0; border-radius: 0; cursor: default; }
.picture:target img { width: auto; max-width: none; margin: 0 auto; }
.picture:target .close { display: block; position: fixed; top: .75rem; right: .75rem; padding: .5rem 1rem; border-radius: 2rem;
  background: #1d1d1f; color: #fff; text-decoration: none; box-shadow: 0 0 0 2px #fff; }
@media print {
  :root { color-scheme: light; --text: #000; --faint: #333; --page: #fff; --box: #fff; --line: #999; --link: #000; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  main p { max-width: none; }
  nav details, a[href="#contents"] { display: none; }
  a { text-decoration: none; }
  h2 { break-before: page; }
  nav h2 { break-before: auto; }
  h2, h3, h4 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .table { overflow: visible; border: 0; }
  table { font-size: 6.5pt; }
  th, td { white-space: normal; padding: .2rem .3rem; }
  th:first-child, td:first-child { position: static; min-width: 0; }
}
""".strip()

HEAD = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{TITLE}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
<h1>{TITLE}</h1>
<p>{SUMMARY}</p>
<nav aria-labelledby="contents">
<h2 id="contents">Contents</h2>
<ul>"""
