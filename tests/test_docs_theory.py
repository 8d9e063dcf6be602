"""Every statement of docs/theory.md names a test, and every test it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
SECTIONS = [section for section in PAGE.split("\n## ")[1:] if not section.startswith("What is not proved")]


@pytest.mark.parametrize(("file", "name"), sorted(set(TEST.findall(PAGE))), ids=lambda part: part.split("/")[-1])
def test_every_test_named_exists(file, name):
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_every_point_and_every_row_names_its_test(section):
    points = re.findall(r"^\* .*(?:\n  .*)*", section, re.MULTILINE)
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert points or rows
    assert [point for point in points + rows if not TEST.search(point)] == []


def test_what_looks_like_a_test_is_named_in_full():
    assert len(re.findall(r"test_\w+`", PAGE)) == len(TEST.findall(PAGE))
