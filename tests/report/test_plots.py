"""Figures as traces, words and numbers, and rollouts as tokens: what the page is made from."""

import json
import math

import pytest
from made_up import HOSTILE, made_up

from poweropd.report import plots, tokens
from poweropd.report.figure import Bars, Figure, Line
from poweropd.report.page import render


def figure(*lines: Line, log_y: bool = False) -> Figure:
    return Figure("key", "Title", "step", "nats", list(lines), log_y=log_y)


def test_a_long_line_keeps_its_ends_and_its_peaks() -> None:
    x = [float(step) for step in range(50_000)]
    y = [0.0] * len(x)
    y[23_456], y[34_567] = 9.0, -7.0
    [trace] = plots.spec(figure(Line("a", x, y, low=y, high=y)))["traces"][1:]
    assert len(trace["x"]) == len(trace["y"]) == len(trace["customdata"]) <= plots.MOST_POINTS
    assert (trace["x"][0], trace["x"][-1]) == (0.0, 49_999.0)
    assert dict(zip(trace["x"], trace["y"], strict=True)).items() >= {23_456.0: 9.0, 34_567.0: -7.0}.items()


def test_what_is_not_finite_is_a_gap() -> None:
    spec = plots.spec(figure(Line("a", [0.0, 1.0, 2.0], [1.0, math.nan, math.inf])))
    assert spec["traces"][0]["y"] == [1.0, None, None]
    json.dumps(spec, allow_nan=False)


def test_numbers_are_few_and_have_both_ends() -> None:
    x = [float(step) for step in range(1000)]
    table = plots.numbers(figure(Line("a", x, x, low=x, high=x), Line("b", [0.0, 999.0], [0.5, 0.5])))
    assert table.headings == ["step", "a", "b"]
    assert len(table.rows) == plots.MOST_ROWS
    assert table.rows[0] == ["0", "0 [0, 0]", "0.5"]
    assert table.rows[-1] == ["999", "999 [999, 999]", "0.5"]
    assert table.note == "50 of 1000 rows, evenly spread."


def test_numbers_of_a_histogram_and_of_a_plane() -> None:
    bars = Figure("key", "Title", "reward", "tokens", bars=[Bars("a", [0.0, 0.5, 1.0], [3, 0])])
    assert plots.numbers(bars).rows == [["0", "0.5", "3"], ["0.5", "1", "0"]]
    plane = made_up().sections[1].figures[1]
    assert plots.numbers(plane).rows[0] == ["0 to 0.1", "0 to 0.1", "0", "100"]


def test_an_empty_bin_lies_below_a_logarithmic_axis() -> None:
    spec = plots.spec(Figure("key", "T", "x", "y", bars=[Bars("a", [0.0, 1.0, 2.0, 3.0], [8, 0, 2])], log_y=True))
    assert spec["traces"][0]["y"] == [8, 0.2, 2, 2]
    assert spec["layout"]["yaxis"]["autorangeoptions"]["minallowed"] == math.log10(2 / 2)


def test_a_figure_in_words() -> None:
    lines = [Line(f"run {number}", [0.0, 9.0], [1.0, 2.5]) for number in range(8)]
    words = plots.description(figure(*lines))
    assert words.startswith("Title. nats over step. run 0: 1 at 0, 2.5 at 9; run 1:")
    assert words.endswith("run 5: 1 at 0, 2.5 at 9; and 2 more.")


@pytest.mark.parametrize(
    ("text", "seen"),
    [("", "∅"), (" a", " a"), ("  ", "␣␣"), ("\n\n", "↵\n↵\n"), ("\t", "→\t"), ("\x00\x1b", "␀␛"), (" \n", " ↵\n")],
)
def test_tokens_without_ink_are_visible(text: str, seen: str) -> None:
    assert tokens.visible(text) == seen


def test_rollouts_of_early_and_late_steps() -> None:
    records = [{"step": step, "id": number} for step in range(100) for number in range(4)]
    steps = tokens.chosen(records)
    assert [step for step, _ in steps] == [0, 20, 40, 59, 79, 99]
    assert [record["id"] for record in steps[0][1]] == [0, 1]
    assert [step for step, _ in tokens.chosen(records, 2)] == [0, 99]


def test_the_strength_of_a_reward() -> None:
    weights = [*([0.1] * 94), *([-0.2] * 5), 9.0, None, 0.0]
    record = {"id": "a", "prompt": "p", "finish_reason": "stop", "tokens": ["x"] * 103, "weights": weights}
    scale = tokens.full_scale([record])
    assert scale == 0.2
    shown = tokens.rollout(record, scale).tokens
    assert [(token.sign, token.strength) for token in shown[93:]] == [
        ("up", 0.5), *[("down", 1.0)] * 5, ("up", 1.0), ("", 0.0), ("", 0.0), ("", 0.0),
    ]  # fmt: skip
    assert shown[93].values == "0.1 - -"


def test_text_is_escaped_wherever_it_stands() -> None:
    page = render(made_up(2))
    assert "<img" not in page
    assert "\u2028" in HOSTILE
    specs = page.split('<script type="application/json">')[1:]
    assert len(specs) == 4
    for spec in specs:
        text = spec.partition("</script>")[0]
        assert "\u2028" not in text
        assert "traces" in json.loads(text)
