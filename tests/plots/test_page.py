"""The page says what the READMEs say, needs nothing but itself, and fits a desk and a phone: seen by a parser and a browser."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pandas as pd
import pytest
from PIL import Image, ImageChops

from plots import __main__ as command_line
from plots import figure, page, reading
from plots.page import write_page

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img"}
CAPTION = "Accuracy of <A & B> by `alpha`. Dots are seeds, **n = 3**; learning_rate_0.1 * 2."
SENTENCE = 'Less than <0.5> & "more" is a **difference**.'
WIDE = pd.DataFrame({f"measure number {i} (%)": [f"{i}.00 \N{PLUS-MINUS SIGN} 0.10", "", "1 < 2"] for i in range(12)})
NAMES = ("one", "ensemble_size_learning_rate_mean_validation_accuracy_and_then_some_more")


class Element:
    def __init__(self, tag: str, attributes: dict[str, str]):
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, *tags: str) -> Iterator["Element"]:
        for child in self.children:
            if isinstance(child, Element):
                if child.tag in tags or not tags:
                    yield child
                yield from child.all(*tags)


class Tree(HTMLParser):
    """Elements that are all closed, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open[-1].children.append(element := Element(tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


@pytest.fixture(scope="module")
def made_up() -> Iterator[None]:
    """Three experiments: one with results, two settings of it; one with nothing; one with results that is not drawn."""

    def figures(df: pd.DataFrame) -> Iterator[tuple[str, str, Any]]:
        for setting in ("digits-cnn", "cifar10-cnn"):
            for width, name in enumerate(NAMES, 4):
                drawing = figure.new_figure(width, 2)
                drawing.add_subplot().plot([0, 1], [0, len(setting) * width])
                yield f"{setting}/{name}", CAPTION, drawing

    finding = figure.Finding(
        [SENTENCE, "Nothing else."],
        "Over seeds.\n\n" + figure.markdown(WIDE),
        f"Drawn from 7 runs. commit: {'f' * 90}.",
    )
    module = SimpleNamespace(
        CONFIG=[], figures=figures, findings=lambda df: {name: finding for name in ("digits-cnn", "cifar10-cnn")}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "plots.made_up", module)
        patch.setattr(command_line, "experiments", lambda: ["made_up", "never_run", "not_drawn"])
        patch.setattr(reading, "usable_results", lambda *_: (pd.DataFrame({"run_id": ["a"]}), []))
        yield


@pytest.fixture(scope="module")
def drawn(made_up: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    for experiment in ("made_up", "not_drawn"):
        (folder / experiment).mkdir()
        (folder / experiment / "a.csv").touch()
    command_line.draw("made_up", folder, "python -m plots made_up")
    return folder


@pytest.fixture
def results(drawn: Path, tmp_path: Path) -> Path:
    """A folder of results of the three experiments, the first of which has been drawn."""
    return Path(shutil.copytree(drawn, tmp_path / "here"))


def written(results: Path) -> str:
    path = results / "index.html"
    write_page(path, results, command_line.experiments())
    return path.read_text(encoding="utf-8")


def test_every_figure_of_the_folder_is_on_the_page_to_the_pixel_and_with_its_caption(results: Path) -> None:
    tree = Tree(written(results)).root
    found = {element.attributes["id"]: element for element in tree.all("figure")}
    folder = results / "figures"
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.png")}
    assert set(found) == set(files) and len(files) == 4
    for name, path in files.items():
        (image,) = found[name].all("img")
        kind, _, data = image.attributes["src"].partition(",")
        assert kind == "data:image/webp;base64"
        with Image.open(BytesIO(b64decode(data))) as ours, Image.open(path) as file:
            assert ImageChops.difference(ours.convert("RGB"), file.convert("RGB")).getbbox() is None
            assert float(image.attributes["width"]) / file.size[0] == pytest.approx(2 / 3, 0.01)
            assert float(image.attributes["height"]) / file.size[1] == pytest.approx(2 / 3, 0.01)
        assert image.attributes["alt"] == "Accuracy of <A & B> by `alpha`."
        assert (image.attributes["loading"], image.attributes["decoding"]) == ("lazy", "async")
        (caption,) = found[name].all("figcaption")
        assert CAPTION.replace("`", "").replace("**", "") in caption.text
        assert "PDF" not in caption.text
        assert [code.text for code in caption.all("code")] == ["alpha", "python -m plots made_up"]


def test_what_was_found_is_there_word_for_word_and_nothing_of_it_is_markup(results: Path) -> None:
    text = written(results)
    tree = Tree(text).root
    assert '&lt;0.5&gt; &amp; "more" is a <strong>difference</strong>' in text
    paragraphs = [element.text for element in tree.all("p")]
    for sentence in (SENTENCE.replace("**", ""), "Nothing else.", "Over seeds."):
        assert paragraphs.count(sentence) == 2
    assert sum(text.startswith("Drawn from 7 runs.") and "python -m plots made_up" in text for text in paragraphs) == 2
    table = next(tree.all("table"))
    assert [[cell.text for cell in row.all("th", "td")] for row in table.all("tr")] == [
        list(WIDE.columns), *WIDE.to_numpy().tolist()
    ]  # fmt: skip
    assert all(cell.attributes["scope"] == "col" for cell in table.all("th"))
    assert {"a&b", "b", "script"}.isdisjoint(element.tag for element in tree.all())


def test_it_needs_no_other_file_and_no_network(results: Path) -> None:
    text = written(results)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", re.sub(r"base64,[\w+/=]+", "", text))
    for element in Tree(text).root.all():
        assert element.attributes.get("src", "data:").startswith("data:")
        assert element.attributes.get("href", "#").startswith(("#", "data:"))
        assert not any(name.startswith("on") for name in element.attributes)
    assert str(results) not in text


def test_headings_nest_ids_are_unique_and_every_anchor_leads_somewhere(results: Path) -> None:
    tree = Tree(written(results)).root
    levels = [int(element.tag[1]) for element in tree.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    ids = [element.attributes["id"] for element in tree.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    targets = [unquote(element.attributes["href"][1:]) for element in tree.all("a")]
    assert set(targets) <= set(ids)
    (contents,) = tree.all("nav")
    listed = [unquote(element.attributes["href"][1:]) for element in contents.all("a")]
    figures = [element.attributes["id"] for element in tree.all("figure")]
    assert set(figures) < set(listed) and {"made_up", "made_up/digits-cnn", "never_run", "not_drawn"} < set(listed)
    assert next(tree.all("html")).attributes["lang"] == "en"


def test_an_experiment_without_results_or_figures_says_so_and_what_to_do(results: Path) -> None:
    sections = {element.attributes.get("id"): element for element in Tree(written(results)).root.all("h2")}
    assert {"made_up", "never_run", "not_drawn"} < set(sections)
    text = Tree(written(results)).root.text
    assert "There are no results. Make some with python -m jobs submit never_run --grid demo --cluster local" in text
    assert "There are results, but no figures of them. Draw them with python -m plots not_drawn." in text


def test_the_same_results_give_the_same_bytes(results: Path) -> None:
    first = written(results)
    for path in (results / "figures").rglob("*"):
        os.utime(path, (0, 0))
    assert written(results) == first


def test_a_figure_that_is_gone_or_damaged_is_named(results: Path) -> None:
    path = results / "figures" / "made_up" / "digits-cnn" / "one.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"a README's figures must be beside it, however .*digits-cnn/one\.png"):
        written(results)
    path.unlink()
    with pytest.raises(ValueError, match=r"however .*digits-cnn/one\.png: .*No such file"):
        written(results)


def test_a_setting_without_figures_is_read(tmp_path: Path) -> None:
    readme = tmp_path / "made_up" / "README.md"
    readme.parent.mkdir()
    readme.write_text("# a: b\n\nRedrawn by `c`.\n\nFound.\n\nDrawn from 1 run.\n")
    assert page.read_setting(readme) == ("made_up", "Redrawn by `c`.", ["Found."], "Drawn from 1 run.", [])


def test_the_command_draws_all_that_has_results_and_writes_the_page(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(results / "figures")
    shutil.rmtree(results / "not_drawn")
    monkeypatch.setattr(sys, "argv", ["plots", "--results", str(results)])
    assert command_line.main() == 0
    text = (results / "figures" / "index.html").read_text(encoding="utf-8")
    assert text.count("<figure ") == 4 and "python -m plots made_up --results DIR" in text
    assert "never_run" in text and f"the page of all figures: {results}" in capsys.readouterr().out


def test_one_experiment_that_fails_does_not_keep_the_others_from_being_drawn(
    results: Path, monkeypatch, capsys
) -> None:
    def draw(experiment: str, *_: object) -> None:
        asked.append(experiment)
        if experiment == "made_up":
            raise ValueError("figures are drawn from results, however")

    asked: list[str] = []
    monkeypatch.setattr(command_line, "draw", draw)
    assert not command_line.draw_all(results, "python -m plots {}")
    assert asked == ["made_up", "not_drawn"]
    assert capsys.readouterr().err == "error: figures are drawn from results, however\n"


def test_without_any_result_the_command_is_exit_code_2_and_a_way_out(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "plots", "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--grid demo --cluster local" in done.stderr and not list(tmp_path.iterdir())


class Browser:
    """Chromium without a window, spoken to through a pipe: messages of its DevTools protocol, each ended by a zero byte."""

    def __init__(self, folder: Path):
        assert BROWSER is not None
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}"]
        # it reads from file descriptor 3 and writes to 4
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, BROWSER, *options, "--remote-debugging-pipe", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.rest, self.session = 0, b"", None
        (tab, *_) = (t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=tab["targetId"], flatten=True)["sessionId"]

    def ask(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.back], [], [], 30)[0], f"no answer to {method}"
                self.rest += (more := os.read(self.back, 2**20))
                assert more, "the browser ended"
            answer, _, self.rest = self.rest.partition(b"\0")
            if (answer := json.loads(answer)).get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def show(self, path: Path, width: int, height: int, scale: float = 1, anchor: str = "") -> None:
        phone = width < 800
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=path.as_uri() + anchor)
        self.value(
            "new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', () => done()))"
        )

    def value(self, expression: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        os.close(self.to)  # at the end of its input it ends
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.back)


@pytest.mark.skipif(BROWSER is None, reason="wants chromium on PATH")
def test_nothing_overflows_at_the_width_of_a_desk_and_of_a_phone(results: Path, tmp_path: Path) -> None:
    written(results)
    browser = Browser(tmp_path / "profile")
    try:
        for width, height in ((1280, 800), (390, 844), (360, 640)):
            browser.show(results / "index.html", width, height)
            assert browser.value("innerWidth") == width >= browser.value("document.documentElement.scrollWidth")
            assert browser.value("document.body.innerText.includes('Nothing else.')")
            inside, outside = browser.value(
                "(box => [box.scrollWidth, box.clientWidth])(document.querySelector('.table'))"
            )
            assert inside > outside and outside < width  # a wide table scrolls in a box of its own
            right = "Math.max(...[...document.images].map(image => image.getBoundingClientRect().right))"
            assert browser.value(right) <= width
        # a tap shows a figure as large as it is, on all of the screen, and another puts it back
        first = "document.querySelector('figure img')"
        browser.value(f"{first}.scrollIntoView(); {first}.click()")
        seen = f"""new Promise(requestAnimationFrame).then(() => {first}.decode()).then(() => [
            getComputedStyle({first}.closest('.picture')).position, {first}.width, {first}.naturalWidth,
            document.documentElement.scrollWidth])"""
        assert browser.value(seen) == ["fixed", 800, 800, 360]
        browser.value("document.querySelector('figure .close').click()")
        position, shown, natural, across = browser.value(seen)
        assert position == "static" and shown < 360 and (natural, across) == (800, 360)
    finally:
        browser.close()
