"""What a report says, and its page: one file that needs no network."""

import base64
import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from poweropd.report import plots, tokens
from poweropd.report.colours import colour, mark
from poweropd.report.figure import Figure, Section
from poweropd.report.pathologies import Pathology
from poweropd.report.records import Record
from poweropd.report.tables import Table


@dataclass(frozen=True)
class Content:
    """All that a page says, in the order in which it says it.

    Attributes:
        runs: names, by the numbers that figures know the runs by.
        verdict: sentences; the first is the answer.
        rollouts: records of `rollouts.jsonl` by run.
        differences: settings in which the recipes of several runs differ; None for one run.
        recipes: YAML by run.
        notes: of what the page leaves out, such as lines of a log that are not whole.
    """

    title: str
    runs: list[str]
    verdict: list[str]
    pathologies: list[Pathology] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    rollouts: dict[str, list[Record]] = field(default_factory=dict)
    differences: Table | None = None
    recipes: dict[str, str] = field(default_factory=dict)
    machine: Table | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunRollouts:
    name: str
    steps: list[tokens.Step]


def render(content: Content) -> str:
    """The page, as HTML. Text of models, prompts and runs is escaped wherever it stands."""
    sections = [
        (_slug(section.title), section.title, [figure for figure in section.figures if not figure.is_empty])
        for section in content.sections
    ]
    sections = [section for section in sections if section[2]]
    runs, scale = _rollouts(content)
    return (
        _environment()
        .get_template("page.html")
        .render(
            content=content,
            sections=sections,
            rollouts=runs,
            scale=scale,
            contents=list(_contents(content, sections, has_rollouts=bool(runs))),
            plotly=base64.b64encode(_packed_plotly()).decode() if sections else "",
            colour=colour,
            mark=lambda run: mark(run)[2],
        )
    )


def _contents(
    content: Content, sections: list[tuple[str, str, list[Figure]]], *, has_rollouts: bool
) -> Iterator[tuple[str, str]]:
    """Anchor and title of each part that the page has."""
    if content.pathologies:
        grave = any(pathology.severity == "warn" for pathology in content.pathologies)
        yield "problems", "What went wrong" if grave else "What to look at"
    if content.tables:
        yield "results", "Results"
    yield from ((anchor, title) for anchor, title, _ in sections)
    if has_rollouts:
        yield "rollouts", "Rollouts"
    if content.recipes:
        yield "recipe", "Recipe" if len(content.recipes) == 1 else "Recipes"
    if content.machine:
        yield "machine", "Machine and versions"
    yield "definitions", "How each number is defined"


def _rollouts(content: Content) -> tuple[list[RunRollouts], float]:
    """What is shown of each run's rollouts, and the reward of full colour in all of them."""
    most_steps = tokens.STEPS if len(content.runs) == 1 else 2
    shown = {name: tokens.chosen(records, most_steps) for name, records in content.rollouts.items() if records}
    scale = tokens.full_scale([record for steps in shown.values() for _, records in steps for record in records])
    runs = [
        RunRollouts(
            name,
            [tokens.Step(step, [tokens.rollout(record, scale) for record in records]) for step, records in steps],
        )
        for name, steps in shown.items()
    ]
    return runs, scale


def _slug(title: str) -> str:
    return "section-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


@cache
def _environment() -> Environment:
    """Of the templates in `assets`; whatever is put into one is escaped."""
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"spec": plots.spec, "description": plots.description, "numbers": plots.numbers}
    environment.globals["asset"] = _asset
    return environment


@cache
def _asset(name: str) -> str:
    return resources.files("poweropd.report").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _packed_plotly() -> bytes:
    """Plotly's JavaScript, a third of its size: the browser unpacks it after the text is on the screen."""
    return gzip.compress(get_plotlyjs().encode(), compresslevel=9, mtime=0)
