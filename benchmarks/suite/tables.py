"""The tables of docs/performance.md, made from a file of results. Text around their markers is left as it is."""

import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from suite.compare import Spread, beyond_gradients, cost, median, phase, ratio, turns_of
from suite.contests import OURS, SCORED
from suite.floor import Rates, of_step, rates_of
from suite.shapes import SHAPES
from suite.targets import FULL, SAMPLED, scoring_floor, targets

Data = dict[str, Any]
GIB = 2**30


def write(data: Data, docs: Path) -> None:
    """Put every table between its markers.

    Raises:
        ValueError: a marker has no table.
    """

    def filled(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"{docs}: there is no table {name!r}; there are {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name](data)}\n<!-- end -->"

    text = docs.read_text()
    docs.write_text(re.sub(r"<!-- table: (?P<name>.+?) -->\n.*?<!-- end -->", filled, text, flags=re.DOTALL))


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; what has no rows was not measured."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return "Not measured yet."
    names = list(headings)
    return "\n".join([f"| {' | '.join(names)} |", "|" + "---|" * len(names), *lines])


def machine(data: Data) -> str:
    facts = data["machine"]
    held = data["contests"].values()
    dates = sorted({entry["date"] for entry in held})
    load = max((entry["load"] for entry in held), default=0.0)
    seconds = [entry.get("seconds") for entry in held]
    took = f" in {sum(seconds) / 60:.0f} minutes" if seconds and all(seconds) else ""
    trl = facts["trl"] or "not there"
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']:g} GiB, {facts['system']}; {facts['threads']} threads; "
        f"Python {facts['python']}, torch {facts['torch']}, transformers {facts['transformers']}, TRL {trl}; measured "
        f"{' to '.join(dates[:1] + dates[1:][-1:])}{took}, load at the start of a contest at most {load:g}."
    )


def target_rows(data: Data) -> str:
    return table(("what", "target", "measured", "verdict"), targets(data))


def targets_text(data: Data) -> str:
    """The targets for a terminal."""
    return "\n".join(f"{row.verdict:<15} {row.what}: {row.measured or '-'} ({row.target})" for row in targets(data))


def rate_rows(data: Data) -> str:
    turns = turns_of(data, "rates").get("machine", [])
    names = sorted({name.rpartition(", ")[0] for turn in turns for name in turn["products"]})

    def best(name: str, clock: str) -> str:
        return f"{max(turn['products'][name][clock] for turn in turns) / 1e9:.0f}"

    rows = [
        [name, *(best(f"{name}, {dtype}", clock) for dtype in ("float32", "bfloat16") for clock in ("wall", "cpu"))]
        for name in names
    ]
    if turns:
        copied = max(turn["memory"]["wall"] for turn in turns) / 1e9, max(turn["memory"]["cpu"] for turn in turns) / 1e9
        rows.append(["copy, GB/s read and written", *(f"{rate:.0f}" for rate in copied), "", ""])
    headings = ("product", "fp32 GFLOP/s", "fp32 a CPU second", "bf16 GFLOP/s", "bf16 a CPU second")
    return table(headings, rows)


def score_rows(data: Data) -> str:
    rates = rates_of(data)
    rows = []
    for contest, full in ((SAMPLED, False), (FULL, True)):
        turns = turns_of(data, contest)
        for name, own in turns.items():
            floor = scoring_floor(rates, own, full=full) if rates else None
            rows.append(
                [
                    "full vocabulary" if full else "sampled",
                    name,
                    f"{median(own, 'wall'):.1f}",
                    f"{median(own, 'cpu'):.1f}",
                    _share(ratio(turns, OURS, name), name),
                    f"{median(own, 'cpu') / floor:.2f}" if floor else "",
                    f"{max(turn['peak'] for turn in own) / GIB:.2f}",
                    f"{own[0]['gradient_norm']:.5e}",
                    str(len(own)),
                ]
            )
        rows += _failures(data, contest, 9)
    headings = (
        *("objective", "who", "s", "CPU s", "ours over theirs", "over the floor", "GiB above models", "gradient norm"),
        "turns",
    )
    return table(headings, rows)


def step_rows(data: Data) -> str:
    rows = []
    for shape in SHAPES:
        contest = f"step, {shape}"
        turns = turns_of(data, contest)
        for name, own in turns.items():
            tokens = median(own, "tokens")
            rows.append(
                [
                    shape,
                    name,
                    f"{tokens:,.0f}",
                    f"{median(own, 'wall'):.2f}",
                    f"{median(own, 'cpu'):.2f}",
                    f"{rollout_seconds(own):.2f}",
                    f"{tokens / median(own, 'wall'):,.0f}",
                    _share(ratio(turns, OURS, name), name),
                    f"{max(turn['base'] + turn['peak'] for turn in own) / GIB:.2f}",
                    str(len(own)),
                ]
            )
        rows += _failures(data, contest, 10)
    headings = (
        "pair",
        "who",
        "tokens",
        "s",
        "CPU s",
        "of them rollouts",
        "tokens/s",
        "ours over theirs",
        "peak GiB",
        "turns",
    )
    return table(headings, rows)


def phase_rows(data: Data) -> str:
    rates = rates_of(data)
    rows: list[list[str]] = []
    for shape in SHAPES:
        for name, full in ((OURS, False), ("poweropd, reverse KL", True)):
            own = turns_of(data, f"step, {shape}").get(name)
            if own:
                rows += _phases(shape, name, own, rates, full=full)
    return table(("pair", "who", "phase", "s", "CPU s", "of the step", "tokens/s", "over the floor"), rows)


def _phases(
    shape: str, name: str, own: list[dict[str, Any]], rates: Rates | None, *, full: bool
) -> Iterable[list[str]]:
    tokens, whole = median(own, "tokens"), median(own, "cpu")
    rollouts = own[0]["rollouts"]
    work = of_step(shape, rollouts, own[0]["prompt_tokens"] // rollouts, round(tokens / rollouts), full=full)
    floors = {phase_name: amount.seconds(rates) for phase_name, amount in work.items()} if rates else {}
    for phase_name in own[0]["laps"]:
        wall, cpu = phase(own, phase_name, "wall"), phase(own, phase_name)
        floor = f"{cpu / floors[phase_name]:.2f}" if phase_name in floors else ""
        yield [
            shape,
            name,
            phase_name,
            f"{wall:.3f}",
            f"{cpu:.3f}",
            f"{cpu / whole:.1%}",
            f"{tokens / wall:,.0f}",
            floor,
        ]
    floor = f"{whole / sum(floors.values()):.2f}" if floors else ""
    wall = median(own, "wall")
    yield [shape, name, "whole step", f"{wall:.3f}", f"{whole:.3f}", "100.0%", f"{tokens / wall:,.0f}", floor]


def memory_rows(data: Data) -> str:
    rows = [
        [name.split(", ")[0], name.split(", ")[1], f"{beyond_gradients(own):.2f}", f"{median(own, 'cpu'):.1f}"]
        for name, own in turns_of(data, "memory").items()
    ]
    return table(("objective", "tokens", "GiB beyond weights and gradients", "CPU s"), rows)


def objective_rows(data: Data) -> str:
    unit = SCORED["response"] * SHAPES["real vocabulary"].vocabulary * 4 / GIB
    rows = [
        [name, f"{(gib := beyond_gradients(own)):.2f}", f"{gib / unit:.2f}", f"{median(own, 'cpu'):.1f}"]
        for name, own in turns_of(data, "objectives").items()
    ]
    return table(("objective", "GiB beyond weights and gradients", "of one fp32 [tokens, vocabulary]", "CPU s"), rows)


def rollout_rows(data: Data) -> str:
    rows = []
    for contest in [name for name in data["contests"] if name.startswith("rollouts, ")]:
        turns = turns_of(data, contest)
        for name, own in turns.items():
            speed = ratio(turns, "transformers generate", name)
            rows.append(
                [
                    contest.removeprefix("rollouts, "),
                    name,
                    f"{median(own, 'tokens'):,.0f}",
                    f"{1 / Spread.of([cost(turn, 'wall') for turn in own]).median:,.0f}",
                    f"{1 / Spread.of([cost(turn) for turn in own]).median:,.0f}",
                    str(speed) if name == OURS and speed else "",
                ]
            )
    return table(("model", "who", "tokens", "tokens/s", "tokens a CPU s", "speed over generate"), rows)


def start_rows(data: Data) -> str:
    turns = [turn["seconds"] for turn in turns_of(data, "start").get("starts", [])]
    names = {
        "help": "`poweropd --help`",
        "first step, unevaluated": "`poweropd train recipes/quickstart.yaml` without evaluations, first step done",
        "first step": "`poweropd quickstart`, first step done, after both models' evaluations",
        "trl import": "`from trl import DistillationTrainer`, to compare",
    }
    found = {key: [turn[key] for turn in turns if key in turn] for key in names}
    rows = [[names[key], str(Spread.of(seconds)), str(len(seconds))] for key, seconds in found.items() if seconds]
    return table(("start", "s, median (range)", "times"), rows)


def profile_rows(data: Data) -> str:
    rows: list[list[str]] = []
    for name, (turn, *_) in sorted(turns_of(data, "profile").items()):
        total = sum(turn["groups"].values())
        for group, seconds in sorted(turn["groups"].items(), key=lambda item: -item[1]):
            rows.append([name, group, f"{seconds:.3f}", f"{seconds / total:.1%}"])
        for outside, key in (("", "overhead"), (", and of the models' forward and backward", "overhead beside models")):
            what = f"**outside of matrix products, attention and sampling{outside}**"
            rows.append([name, what, "", f"**{turn[key]:.1%}**"])
    return table(("step", "group", "CPU s", "share"), rows)


def operator_rows(data: Data) -> str:
    rows = [
        [name, operator, f"{seconds:.3f}"]
        for name, (turn, *_) in sorted(turns_of(data, "profile").items())
        for operator, seconds in sorted(turn["operators"].items(), key=lambda item: -item[1])
    ]
    return table(("step", "operator", "CPU s"), rows)


def rollout_seconds(own: list[dict[str, Any]]) -> float:
    """Median processor seconds of the rollouts of a step, ours or a peer's."""
    return statistics.median((turn["laps"].get("rollout") or turn["rollout"])["cpu"] for turn in own)


def _share(found: Spread | None, name: str) -> str:
    return "" if found is None or name == OURS else str(found)


def _failures(data: Data, contest: str, columns: int) -> list[list[str]]:
    failed = data["contests"].get(contest, {}).get("failed", {})
    return [["", name, why, *[""] * (columns - 3)] for name, why in failed.items()]


TABLES: dict[str, Callable[[Data], str]] = {
    "machine": machine,
    "targets": target_rows,
    "rates": rate_rows,
    "score": score_rows,
    "steps": step_rows,
    "phases": phase_rows,
    "memory": memory_rows,
    "rollouts": rollout_rows,
    "start": start_rows,
    "profile": profile_rows,
    "operators": operator_rows,
    "objectives": objective_rows,
}
