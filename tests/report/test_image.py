"""Figures as files for a paper."""

from pathlib import Path

import pytest
from made_up import made_up

from poweropd.errors import RunError
from poweropd.report.colours import colour, mark
from poweropd.report.image import save_each

FIGURES = [figure for section in made_up(2).sections for figure in section.figures]
DRAWN = {"gradient-norm", "accuracy", "rewards", "plane"}


def test_one_file_a_figure_named_by_its_key(tmp_path: Path) -> None:
    files = save_each(FIGURES, tmp_path / "new" / "folder")
    assert {file.name for file in files} == {f"{key}.png" for key in DRAWN}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_fonts_of_a_pdf_are_embedded_as_fonts(tmp_path: Path) -> None:
    for file in save_each(FIGURES, tmp_path, "pdf"):
        pdf = file.read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"/FontFile2" in pdf  # TrueType
        assert b"/Type3" not in pdf


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(RunError, match="there is a file of that name; give a folder"):
        save_each(FIGURES, tmp_path / "taken")


def test_no_two_of_many_runs_look_the_same() -> None:
    assert len({(colour(run), mark(run)) for run in range(100)}) == 100


def test_a_folder_that_cannot_be_made() -> None:
    with pytest.raises(RunError, match="--figures /proc/figures: the folder cannot be made: "):
        save_each([], Path("/proc/figures"))
