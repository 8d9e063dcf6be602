"""The targets, and what was measured of each."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from suite.compare import Spread, best_of, beyond_gradients, median, ratio, turns_of
from suite.contests import OURS, ROLLOUT_CASES, SCORED
from suite.floor import Rates, rates_of, teacher_scoring, update
from suite.shapes import SHAPES

Verdict = Literal["met", "missed", "not applicable", "not measured"]
Data = dict[str, Any]
SAMPLED, FULL = "score and update, sampled", "score and update, full vocabulary"


class Target(NamedTuple):
    what: str
    target: str
    measured: str
    verdict: Verdict


def targets(data: Data) -> list[Target]:
    """Every target with its verdict."""
    return [row for part in PARTS for row in part(data)]


def _memory(data: Data) -> Iterator[Target]:
    turns = turns_of(data, "memory")
    for objective, kind, most in (("power", "sampled", 0.20), ("reverse_kl", "full-vocabulary", 0.40)):
        sizes = {name: beyond_gradients(own) for name, own in turns.items() if name.startswith(f"{objective},")}
        what = f"memory beyond weights, gradients and optimizer, {kind} objective, at every number of tokens"
        measured = "; ".join(f"{name.partition(', ')[2]}: {gib:.2f}" for name, gib in sorted(sizes.items(), key=_size))
        yield _judged(what, f"<= {most:.2f} GiB", measured, is_met=max(sizes.values()) <= most if sizes else None)


def _size(item: tuple[str, float]) -> int:
    return int(item[0].split(", ")[1].split()[0].replace(",", ""))


def _scoring(data: Data) -> Iterator[Target]:
    turns, rates = turns_of(data, SAMPLED), rates_of(data)
    naive = best_of(turns, "naive")
    what = "sampled scoring and update"
    yield _below(f"{what}, over TRL chunked", 0.32, ratio(turns, OURS, "TRL chunked"))
    yield _below(f"{what}, over the best naive way ({naive})", 0.65, ratio(turns, OURS, naive or ""))
    for name, most in (("TRL chunked", 0.23), (naive or "naive", 0.47)):
        yield _bf16(f"{what}, bf16 heads, over {name}", most, ratio(turns, "poweropd, bf16", name), rates)
    full = turns_of(data, FULL)
    yield _below(
        "full-vocabulary reverse KL, scoring and update, over TRL chunked", 0.6, ratio(full, OURS, "TRL chunked")
    )
    zscore = ratio(turns, "poweropd, z-score", OURS)
    yield Target(
        "z-score, which needs the whole step's rewards, over plain power",
        "stated",
        _text(zscore),
        "met" if zscore else "not measured",
    )
    own = turns.get(OURS)
    beyond = median(own, "cpu") / scoring_floor(rates, own, full=False) if own and rates else None
    yield _judged(
        "sampled scoring and update over its FLOP floor",
        "<= 1.35",
        f"{beyond:.2f}" if beyond else "",
        is_met=beyond <= 1.35 if beyond else None,
    )


def scoring_floor(rates: Rates, turns: list[dict[str, Any]], *, full: bool) -> float:
    """Processor seconds that the tokens of a turn cannot go below."""
    rollouts = turns[0]["tokens"] // SCORED["response"]
    sizes = (SHAPES["real vocabulary"], rollouts, SCORED["prompt"], SCORED["response"])
    return (teacher_scoring(*sizes, full=full) + update(*sizes, full=full)).seconds(rates)


def _steps(data: Data) -> Iterator[Target]:
    rates = rates_of(data)
    limits = {
        "real vocabulary": {"DistillationTrainer": (0.55, 0.40), "IWOPDTrainer": (0.68, 0.50)},
        "quickstart-sized": {"DistillationTrainer": (0.90, 0.65), "IWOPDTrainer": (0.90, 0.65)},
    }
    for shape, peers in limits.items():
        turns = turns_of(data, f"step, {shape}")
        for peer, (equal, defaults) in peers.items():
            found = ratio(turns, OURS, f"TRL {peer}")
            note = ", the same objective" if peer == "IWOPDTrainer" else ", log-ratio against its exact reverse KL"
            yield _below(f"whole step, {shape}, over TRL {peer}{note}, both fp32", equal, found)
            yield _bf16(f"whole step, {shape}, our defaults, over TRL {peer}", defaults, found, rates)


def _rollouts(data: Data) -> Iterator[Target]:
    held = [name for name in data["contests"] if name.startswith("rollouts, ")]
    for name in dict.fromkeys([*(f"rollouts, {case}" for case in ROLLOUT_CASES), *held]):
        least = 1.5 if "quickstart" in name else 1.0
        found = ratio(turns_of(data, name), "transformers generate", OURS)
        what = f"{name}: speed over transformers generate at uneven lengths"
        yield _judged(what, f">= {least:g}", _text(found), is_met=found.median >= least if found else None)


def _overhead(data: Data) -> Iterator[Target]:
    for name, turns in sorted(turns_of(data, "profile").items()):
        share = turns[0]["overhead"]
        yield _judged(
            f"outside of matrix products, attention and sampling, {name}",
            "<= 5 % of a step",
            f"{share:.1%}",
            is_met=share <= 0.05,
        )


def _starts(data: Data) -> Iterator[Target]:
    turns = [turn["seconds"] for turn in turns_of(data, "start").get("starts", [])]
    limits = (
        ("help", "`poweropd --help`", 0.5),
        ("first step, unevaluated", "first step of the quickstart's recipe, evaluations left out", 10),
        ("first step", "first step of `poweropd quickstart`, after both models' evaluations", 10),
    )
    for key, what, most in limits:
        found = Spread.of([turn[key] for turn in turns if key in turn]) if turns else None
        yield _judged(
            what, f"<= {most:g} s", f"{_text(found)} s" if found else "", is_met=found.median <= most if found else None
        )


PARTS: tuple[Callable[[Data], Iterator[Target]], ...] = (_memory, _scoring, _steps, _rollouts, _overhead, _starts)


def _below(what: str, most: float, found: Spread | None) -> Target:
    return _judged(what, f"<= {most:.2f}", _text(found), is_met=found.median <= most if found else None)


def _bf16(what: str, most: float, found: Spread | None, rates: Rates | None) -> Target:
    """A target that counts on bf16 products being the faster ones."""
    if rates is not None and rates.bf16 <= rates.fp32:
        slower = f"bf16 products run at {rates.bf16 / rates.fp32:.1f} x the rate of fp32 on this machine"
        return Target(what, f"<= {most:.2f}", slower, "not applicable")
    return _below(what, most, found)


def _judged(what: str, target: str, measured: str, *, is_met: bool | None) -> Target:
    verdict: Verdict = "not measured" if is_met is None else "met" if is_met else "missed"
    return Target(what, target, measured, verdict)


def _text(found: Spread | None) -> str:
    return "" if found is None else str(found)
