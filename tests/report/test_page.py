"""The page in a real browser, as its readers have it: with a mouse, a keyboard, a finger, a screen reader, on paper."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from made_up import HOSTILE, made_up
from playwright.sync_api import Browser, Page, sync_playwright

from poweropd.report.page import Content, render

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAWN = "!document.querySelector('[aria-busy=true]')"
FIGURES = ("gradient-norm", "accuracy", "rewards", "plane")

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("THE REPORT IS NOT TESTED: no Chromium; `apt-get install chromium`, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Pages of one run with long answers, and of three with short ones."""
    folder = tmp_path_factory.mktemp("pages")
    paths = {runs: folder / f"{runs}.html" for runs in (1, 3)}
    for runs, path in paths.items():
        path.write_text(render(made_up(runs, tokens=700 if runs == 1 else 40)), encoding="utf-8")
    return paths


class Reader:
    """Opens pages with every figure drawn, and keeps what a page should not do: speak to the console, load anything."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.problems: list[str] = []

    def open(self, path: Path, **settings: Any) -> Page:
        context = self.browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **settings})
        page = context.new_page()
        page.on("console", lambda message: self.problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("request", lambda sent: sent.url == path.as_uri() or self.problems.append(f"request: {sent.url}"))
        page.on("requestfailed", lambda sent: self.problems.append(f"failed: {sent.url}"))
        page.goto(path.as_uri())
        if settings.get("java_script_enabled", True):
            page.wait_for_function(DRAWN)
        return page


@pytest.fixture(scope="module")
def reader(browser: Browser) -> Reader:
    return Reader(browser)


@pytest.fixture
def opened(reader: Reader, files: dict[int, Path]) -> Iterator[Open]:
    """A page of its own for this test."""
    pages: list[Page] = []

    def open_page(page: int | Path = 3, **settings: Any) -> Page:
        pages.append(reader.open(page if isinstance(page, Path) else files[page], **settings))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()
    assert reader.problems == []


@pytest.fixture(scope="module")
def kept(reader: Reader, files: dict[int, Path]) -> dict[int, Page]:
    """Drawing Plotly's first figure takes a browser a second: these pages serve many tests, which undo what they do."""
    return {runs: reader.open(path, color_scheme="light") for runs, path in files.items()}


@pytest.fixture
def page(kept: dict[int, Page], reader: Reader) -> Iterator[Page]:
    """Three runs."""
    yield kept[3]
    assert reader.problems == []


@pytest.fixture
def answers(kept: dict[int, Page], reader: Reader) -> Iterator[Page]:
    """One run, with long rollouts."""
    yield kept[1]
    assert reader.problems == []


def traces(page: Page, key: str) -> int:
    """How many lines, bands and histograms are on the screen."""
    return page.locator(f"#{key} .scatterlayer .trace").count()


def colour_of(page: Page, selector: str, name: str) -> str:
    return page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{name}")


def at(page: Page, key: str, x: float, y: float) -> tuple[float, float]:
    """Where a point of a figure is on the screen."""
    plot = page.locator(f"#{key} .plot")
    plot.scroll_into_view_if_needed()
    place = plot.evaluate(
        """(plot, [x, y]) => {
          const {xaxis, yaxis} = plot._fullLayout, box = plot.getBoundingClientRect();
          return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
        }""",
        [x, y],
    )
    return place[0], place[1]


def open_all(page: Page) -> None:
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")


def test_every_figure_is_drawn(page: Page) -> None:
    assert page.locator("figure").evaluate_all("all => all.map(figure => figure.id)") == list(FIGURES)
    assert traces(page, "gradient-norm") == 3
    assert traces(page, "accuracy") == 7  # three runs with their bands, and the teacher
    assert traces(page, "rewards") == 3
    assert page.locator("#plane .heatmaplayer image").count() == 1


def test_hovering_tells_the_values(page: Page) -> None:
    page.mouse.move(*at(page, "gradient-norm", 20, math.exp(-1)))
    label = page.locator("#gradient-norm .hoverlayer .legend")
    label.wait_for()
    assert "optimizer step 20" in label.text_content()
    for run in range(2):
        assert f"power {run} : {math.exp(-1) * (run + 1):.4g}" in label.text_content()
    page.mouse.move(*at(page, "plane", 0.35, 0.25))
    told = page.locator("#plane .hoverlayer .hovertext")
    told.wait_for()
    assert "mean reward 0.1" in told.text_content()
    assert "90 tokens" in told.text_content()


def test_zoom_and_back(page: Page) -> None:
    axis = "plot => plot._fullLayout.xaxis.range"
    plot = page.locator("#accuracy .plot")
    whole = plot.evaluate(axis)
    page.mouse.move(*at(page, "accuracy", 10, 0.4))
    page.mouse.down()
    page.mouse.move(*at(page, "accuracy", 30, 0.5), steps=4)
    page.mouse.up()
    low, high = plot.evaluate(axis)
    assert low == pytest.approx(10, abs=1)
    assert high == pytest.approx(30, abs=1)
    for _ in range(10):  # on a busy machine two clicks can be too far apart to be a double one
        page.mouse.dblclick(*at(page, "accuracy", 20, 0.45))
        page.wait_for_timeout(500)
        if plot.evaluate(axis)[1] == whole[1]:
            break
    assert plot.evaluate(axis) == whole


def test_a_run_is_hidden_everywhere_by_keyboard(page: Page) -> None:
    assert page.locator("#runs label").all_text_contents()[:2] == ["● power 0", "■ power 1"]
    page.get_by_role("checkbox", name="power 1").focus()
    page.keyboard.press("Space")
    page.wait_for_function(DRAWN)
    assert [traces(page, key) for key in FIGURES[:3]] == [2, 5, 2]
    page.keyboard.press("Space")
    page.wait_for_function(DRAWN)
    assert [traces(page, key) for key in FIGURES[:3]] == [3, 7, 3]


def test_a_legend_entry_hides_its_line_and_band_in_its_figure(page: Page) -> None:
    page.locator("#accuracy .legendtoggle").first.click()
    page.wait_for_function("document.querySelectorAll('#accuracy .scatterlayer .trace').length === 5")
    assert traces(page, "gradient-norm") == 3
    page.locator("#accuracy .legendtoggle").first.click()
    page.wait_for_function("document.querySelectorAll('#accuracy .scatterlayer .trace').length === 7")


def test_the_theme_recolours_page_and_plots_and_is_remembered(opened: Open) -> None:
    page = opened(color_scheme="light")

    def colours() -> list[str]:
        return [
            colour_of(page, "body", "backgroundColor"),
            colour_of(page, "#gradient-norm .xtick text", "fill"),
            colour_of(page, "#gradient-norm .ygrid", "stroke"),
            page.locator("#plane .plot").evaluate("plot => plot._fullData[0].colorscale[1][1]"),
        ]

    light = colours()
    page.get_by_role("button", name="Dark theme").click()
    page.wait_for_function(DRAWN)
    dark = colours()
    assert all(before != after for before, after in zip(light, dark, strict=True))
    page.reload()
    page.wait_for_function(DRAWN)
    assert colours() == dark
    page.get_by_role("button", name="Light theme").click()
    page.wait_for_function(DRAWN)
    assert colours() == light


def use_system_theme(page: Page, theme: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=theme)
    page.get_by_role("button", name="Light theme" if theme == "dark" else "Dark theme").wait_for()
    page.wait_for_function(DRAWN)


@pytest.fixture
def dark(page: Page) -> Iterator[Page]:
    """Three runs, as a system in the dark shows them."""
    use_system_theme(page, "dark")
    yield page
    use_system_theme(page, "light")


def test_the_systems_theme_is_followed(dark: Page) -> None:
    before = colour_of(dark, "body", "backgroundColor"), colour_of(dark, "#plane .xtick text", "fill")
    use_system_theme(dark, "light")
    after = colour_of(dark, "body", "backgroundColor"), colour_of(dark, "#plane .xtick text", "fill")
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_tokens_by_keyboard_mouse_and_finger(answers: Page) -> None:
    page = answers
    info = page.locator(".rollout:visible .info").first
    page.locator(".prompt:visible").first.focus()
    page.keyboard.press("Tab")
    assert info.text_content().endswith("reward 0.00 · student q = 0.607 · teacher p = unknown")
    page.keyboard.press("ArrowRight")
    reward = math.sin(1 / 3) / 2
    assert (
        info.text_content() == f" so · reward +{reward:.3g} · student q = 0.497 · teacher p = 0.670 · log p/q = +0.300"
    )
    page.keyboard.press("End")
    assert "394" in info.text_content()
    page.keyboard.press("Home")
    assert HOSTILE.replace("\u2028", "") in info.text_content().replace("\u2028", "")
    tokens = page.locator(".tokens:visible").first.locator("span")
    tokens.nth(12).hover()
    assert f"reward −{abs(math.sin(4) / 2):.3g}" in info.text_content()
    tokens.nth(20).click()
    page.keyboard.press("ArrowLeft")
    assert info.text_content().startswith(" 14 ")
    assert page.locator(".tokens:visible").first.locator("[tabindex]").count() == 1  # Tab leaves the answer at once


def test_rollouts_are_early_and_late_and_fold(answers: Page) -> None:
    page = answers
    assert page.locator(".choose label").all_inner_texts() == ["0", "20", "40"]
    assert page.locator(".step:visible").count() == 1
    page.get_by_role("radio", name="40").check()
    assert page.locator(".rollout:visible").get_attribute("aria-label") == "Rollout math-40 at step 40"
    assert page.locator(".tokens:visible span").count() == 400
    page.get_by_text("300 further tokens").locator("visible=true").click()
    assert page.locator(".tokens:visible span").count() == 700
    assert page.locator(".tokens:visible span").all_text_contents()[1:6] == [" so", "↵\n", "␣", "∅", " 0"]


def test_text_of_models_does_nothing(page: Page) -> None:
    open_all(page)
    assert page.title() == "power alpha=5: a run"
    assert page.locator("img").count() == 0
    assert page.locator("b").all_text_contents() == ["Try:"]
    assert HOSTILE.split("\u2028")[0] in page.locator(".prompt").first.text_content()
    assert HOSTILE.split("\u2028")[0][:20] in page.locator("#gradient-norm .legendtext").nth(2).text_content()


@pytest.mark.parametrize("theme", ["page", "dark"])
def test_axe_finds_nothing(request: pytest.FixtureRequest, theme: str) -> None:
    page = request.getfixturevalue(theme)
    open_all(page)
    found = Axe().run(page).response["violations"]
    assert [(each["id"], [node["target"] for node in each["nodes"]]) for each in found] == []


@pytest.mark.parametrize("theme", ["page", "dark"])
def test_contrast_of_text(request: pytest.FixtureRequest, theme: str) -> None:
    page = request.getfixturevalue(theme)

    def resolved(value: str) -> list[float]:
        """Red, green and blue of a CSS colour, 0 to 1, as the browser blends it with the page."""
        painted = page.evaluate(
            """value => {
              const canvas = document.createElement('canvas').getContext('2d');
              const probe = document.body.appendChild(document.createElement('i'));
              for (const layer of ['var(--page)', value]) {
                probe.style.color = layer;
                canvas.fillStyle = getComputedStyle(probe).color;
                canvas.fillRect(0, 0, 1, 1);
              }
              probe.remove();
              return [...canvas.getImageData(0, 0, 1, 1).data];
            }""",
            value,
        )
        return [channel / 255 for channel in painted[:3]]

    def luminance(value: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in resolved(value)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(text: str, ground: str) -> float:
        lighter, darker = sorted((luminance(text), luminance(ground)), reverse=True)
        return (lighter + 0.05) / (darker + 0.05)

    texts = ("var(--ink)", "var(--soft)", "var(--accent)", "var(--alarm)")
    pairs = [(text, f"var(--{ground})") for text in texts for ground in ("page", "raised")]
    strongest = [f"color-mix(in srgb, var(--{sign}) 55%, transparent)" for sign in ("up", "down")]
    pairs += [("var(--ink)", ground) for ground in strongest]
    assert {pair: contrast(*pair) for pair in pairs if contrast(*pair) < 4.5} == {}


def test_every_figure_says_itself_in_words_and_numbers(opened: Open) -> None:
    page = opened(java_script_enabled=False)
    for key in FIGURES:
        figure = page.locator(f"#{key}")
        title = figure.locator("h3").inner_text()
        assert figure.locator(".plot").get_attribute("aria-label").startswith(title)
        figure.get_by_text("Numbers").first.click()
        rows = figure.locator("tbody tr")
        assert 0 < rows.count() <= 50
        assert rows.first.locator("th[scope=row]").is_visible()
    assert "60 rows" in page.locator("#gradient-norm .numbers").inner_text()
    assert page.locator(".step").locator("visible=true").count() == 2  # of the run whose rollouts are open


def test_headings_and_landmarks(opened: Open) -> None:
    page = opened(java_script_enabled=False)
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(heading => Number(heading.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert page.locator(f"body > {landmark}").count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answer"
    assert colour_of(page, ":focus", "outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "answer"
    targets = page.locator("nav a").evaluate_all("all => all.map(link => document.querySelector(link.hash)?.tagName)")
    assert set(targets) == {"H2"}


def test_a_phone_never_scrolls_sideways(opened: Open) -> None:
    page = opened(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    benchmarks = page.get_by_role("group", name="Benchmarks")
    assert benchmarks.evaluate("table => table.scrollWidth > table.clientWidth")
    page.locator(".tokens:visible span").nth(7).tap()
    assert "reward" in page.locator(".info:visible").first.text_content()


def test_motion_is_reduced_where_asked(page: Page) -> None:
    assert colour_of(page, "html", "scrollBehavior") == "smooth"
    page.emulate_media(reduced_motion="reduce")
    assert colour_of(page, "html", "scrollBehavior") == "auto"
    page.emulate_media(reduced_motion="no-preference")


def test_paper_has_every_figure_in_the_light(dark: Page) -> None:
    ink = "getComputedStyle(document.querySelector('#plane .xtick text')).fill"
    on_screen = dark.evaluate(ink)
    dark.evaluate(f"window.printed = []; addEventListener('beforeprint', () => printed.push({ink}))")
    assert dark.pdf(format="A4").startswith(b"%PDF")
    [on_paper] = dark.evaluate("printed")
    dark.wait_for_function(DRAWN)
    assert dark.evaluate(ink) == on_screen != on_paper


def test_a_page_with_nothing_to_show(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    path.write_text(render(Content("a run", ["a run"], ["Nothing was logged."])), encoding="utf-8")
    page = opened(path)
    assert page.locator(".lead").inner_text() == "Nothing was logged."
    assert page.locator("h2").all_inner_texts() == ["How each number is defined"]


def test_a_long_comparison_is_still_small(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "long.html"
    page = render(made_up(runs=10, steps=5000, tokens=2000))
    assert len(page.encode()) < 6e6
    path.write_text(page, encoding="utf-8")
    shown = opened(path)
    assert traces(shown, "gradient-norm") == 10
    assert shown.get_by_text("500 more tokens are in rollouts.jsonl.").count() == 20
