"""The answer first: did the student come closer to the teacher, by how much, how sure."""

from dataclasses import dataclass
from math import isclose, isnan, sqrt
from statistics import fmean, variance

from poweropd.evaluation.metrics import FEW_PROBLEMS, Estimate, Paired
from poweropd.report.records import Record
from poweropd.report.runs import RunData, Summaries
from poweropd.report.scores import compare, mean, on_shared_problems, samples

ENDS = 10  # a trend compares the first with the last tenth of the steps,
AT_LEAST = 10  # or so many of them: the noise of fewer is itself too noisy to measure by
CLEAR = 2.0  # standard errors beyond which a trend is one
SAME = ("student", "teacher", "teachers", "data", "evaluation")  # sections that a comparison of objectives holds fixed
ASIDE = (  # of them, what changes no result
    "evaluation.every", "evaluation.teacher", "evaluation.folder", "evaluation.cache", "teacher.tokens_per_batch",
)  # fmt: skip
MOST_NAMED = 8  # settings in a sentence


@dataclass(frozen=True)
class Change:
    """What training did to the student of a run, on the problems that were asked before and after.

    Attributes:
        steps: optimizer steps until the last evaluation.
        name: of the measure, `Avg@8`.
        paired: after minus before, None where summaries do not tell problems apart.
        teachers: accuracy of each teacher that was asked those problems.
    """

    steps: int
    name: str
    before: Estimate
    after: Estimate
    paired: Paired | None
    teachers: dict[str, float]

    @property
    def difference(self) -> float:
        return self.after.mean - self.before.mean

    @property
    def is_certain(self) -> bool:
        """The paired interval leaves out 0; without pairing, the two intervals do not touch."""
        if self.paired is not None:
            return not holds_zero(self.paired)
        return self.after.low > self.before.high or self.after.high < self.before.low

    @property
    def is_few(self) -> bool:
        """Too few problems for what looks certain to be it."""
        return self.paired is not None and self.paired.problems < FEW_PROBLEMS

    @property
    def closed(self) -> float | None:
        """Share of the distance between the untrained student and its one teacher; None if it is none, or may be chance."""
        levels = list(self.teachers.values())
        if len(levels) != 1 or levels[0] <= self.before.mean or self.difference < 0:
            return None
        if self.is_few or not self.is_certain:
            return None
        return self.difference / (levels[0] - self.before.mean)


@dataclass(frozen=True)
class Trend:
    """A mean over the first steps and over the last; `is_clear` beyond two standard errors."""

    name: str
    first: float
    last: float
    is_clear: bool


def counted(number: int, name: str) -> str:
    """`1 problem`, `2 problems`."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def holds_zero(paired: Paired) -> bool:
    return paired.difference.low <= 0 <= paired.difference.high


def change(run: RunData) -> Change | None:
    """None where the run was not evaluated both before and after training."""
    if run.last is None or 0 not in run.evaluations:
        return None
    (steps, after), before = run.last, run.evaluations[0]
    shared = on_shared_problems([before, after])
    if shared is None:
        return None
    teachers = {}
    for name, summaries in run.teachers.items():
        with_teacher = on_shared_problems([before, after, summaries])
        if with_teacher is not None and with_teacher.problems == shared.problems:
            teachers[name] = with_teacher.accuracy[2].mean
    name, (first, last) = f"Avg@{samples(before, after)}", shared.accuracy
    return Change(steps, name, first, last, compare(before, after), teachers)


def trend(run: RunData) -> Trend | None:
    """How the distance to the teacher on the student's own answers went; None for a run of too few steps."""
    sampled = run.signal == "reward"
    for key, sign, name in (
        ("kl/k1", 1, "the estimate of KL(student || teacher)"),
        ("log_ratio/mean", -1, "the estimate of KL(student || teacher)"),
        ("divergence/mean", 1, "the divergence from the teacher"),
        ("reward/mean" if sampled else "loss", 1, "the mean reward" if sampled else "the loss"),
    ):
        if found := moved(name, [sign * value for value in run.column(key)[1]]):
            return found
    return None


def moved(name: str, values: list[float]) -> Trend | None:
    """None of too few values."""
    if len(values) < 4:
        return None
    count = min(len(values) // 2, max(AT_LEAST, len(values) // ENDS))
    first, last = values[:count], values[-count:]
    error = sqrt((variance(first) + variance(last)) / count)
    return Trend(name, fmean(first), fmean(last), abs(fmean(last) - fmean(first)) > CLEAR * error)


def headline(run: RunData) -> str:
    """One line for the terminal."""
    found = change(run)
    if found is None:
        return "This run has no evaluation before and after training, so its curves must speak."
    text = f"{found.name} on held-out problems went from {found.before.mean:.3f} to {found.after.mean:.3f}"
    text += f" in {counted(found.steps, 'step')}"
    if found.paired is not None:
        text += f" ({interval(found.paired.difference, sign=True)})"
    if found.paired is None and not found.is_certain:
        text += ", which may be chance"
    elif not found.is_certain:
        text += ", not distinguishable from no change"
    elif found.is_few:
        text += ", on few problems"
    if found.teachers:
        text += f"; {_levels(found)}"
    if found.closed is not None:
        text += f", so {found.closed:.0%} of the gap is closed"
    return text + "."


def verdict(runs: list[RunData]) -> list[str]:
    """One to four plain sentences, the answer first; before it only that a run is not finished."""
    return _verdict_of_one(runs[0]) if len(runs) == 1 else _verdict_of_several(runs)


def interval(estimate: Estimate, *, sign: bool = False, digits: int = 3) -> str:
    """`0.397 [0.341, 0.451]`, or with signs for a difference; the middle alone where there is no interval."""
    form = f"{'+' if sign else ''}.{digits}f"
    middle = f"{estimate.mean:{form}}"
    return middle if isnan(estimate.low) else f"{middle} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _verdict_of_one(run: RunData) -> list[str]:
    told = [text] if (text := _unfinished(run)) else []
    found = change(run)
    if found is None and not run.metrics:
        told_all = run.status in ("running", "interrupted", "failed")
        return told if told_all else ["Nothing has been logged yet: there is a recipe and no step."]
    if found is None:
        return [*told, *_without_evaluations(run)]
    return [*told, *(text for text in (_answer(found), _problems(found), _length(run)) if text)]


def _unfinished(run: RunData) -> str:
    if run.status == "finished":
        return ""
    of = run.steps_planned
    done = f"after {run.steps_taken} of {counted(of, 'step')}" if of else f"after {counted(run.steps_taken, 'step')}"
    reasons = {
        "running": f"{run.name} is still running, or was killed: what is told here is its state {done}.",
        "interrupted": f"{run.name} was interrupted {done}.",
        "failed": f"{run.name} failed {done}.",
    }
    return reasons.get(run.status, f"{run.name} does not say whether it finished; its log ends {done}.")


def _answer(found: Change) -> str:
    """The first sentence: whether it came closer, by how much, how sure."""
    went = f"{found.name} went from {found.before.mean:.3f} to {found.after.mean:.3f} in {counted(found.steps, 'step')}"
    if found.paired is not None:
        sure = f", a paired difference of {interval(found.paired.difference, sign=True)} over {_number(found.paired)}"
    elif found.is_certain:
        sure = ", and the two 95 % intervals do not overlap"
    elif isnan(found.before.low) or isnan(found.after.low):
        sure = ""
    else:
        sure = ", and the two 95 % intervals overlap"
    levels = _levels(found)
    end = f"; {levels}" if levels else ""
    if not found.is_certain:
        start = "Whether the change is more than chance cannot be told"
        if found.paired is not None:
            start = "The change is not distinguishable from no change"
    elif found.is_few:
        start = f"The student did {'worse' if found.difference < 0 else 'better'} on few problems, which is not certain"
    elif found.difference < 0:
        start = "The student got worse"
    elif found.closed is not None:
        start, end = "The student came closer to the teacher", f"{end}, so {found.closed:.0%} of the gap is closed"
    else:
        start = "The student got better"
    return f"{start}: {went}{sure}{end}."


def _levels(found: Change) -> str:
    the = "the " if len(found.teachers) == 1 else ""
    return ", ".join(f"{the}{name} has {level:.3f}" for name, level in found.teachers.items())


def _problems(found: Change) -> str:
    if found.paired is None:
        return ""
    gained, lost = found.paired.gained, found.paired.lost
    return (
        f"It gained {counted(gained, 'problem')} and lost {lost}, where solved means in at least half of the samples."
    )


def _length(run: RunData) -> str:
    if run.last is None:
        return ""
    names = [name for name in run.evaluations[0] if name in run.last[1]]
    before, after = ({name: model[name] for name in names} for model in (run.evaluations[0], run.last[1]))
    lengths, cuts = ([mean(model, measure) for model in (before, after)] for measure in ("mean_length", "truncation"))
    if lengths[0] is None or lengths[1] is None or lengths[0].mean <= 0:
        return ""
    share = lengths[1].mean / lengths[0].mean - 1
    how = (
        "as long as before" if round(abs(share), 2) == 0 else f"{abs(share):.0%} {'longer' if share > 0 else 'shorter'}"
    )
    text = f"Its answers are {how} ({lengths[0].mean:.0f} to {lengths[1].mean:.0f} tokens)"
    if cuts[0] is not None and cuts[1] is not None:
        was, now = (f"{cut.mean:.1%}" for cut in cuts if cut is not None)
        text += f"; {was} of them reached the budget of tokens before, {now} do now"
    return text + "."


def _without_evaluations(run: RunData) -> list[str]:
    if run.evaluations:
        when = "before training alone" if run.last is None else "after training alone"
        known = f"The student was evaluated {when}"
    else:
        known = "This run has no evaluations"
    text = f"{known}, so whether its answers came closer to the teacher's is not known."
    found = trend(run)
    if found is None:
        return [text]
    moved = "went" if found.is_clear else "did not clearly move: it went"
    return [text, f"In training, {found.name} {moved} from {found.first:.3g} to {found.last:.3g} per token."]


def _verdict_of_several(runs: list[RunData]) -> list[str]:
    told = [text for run in runs if (text := _unfinished(run))]
    ranked = ranking(runs)
    missing = [run.name for run in runs if run.last is None]
    if missing:
        told.append(f"Without an evaluation after training, and so not ranked: {', '.join(missing)}.")
    if len(ranked) < 2:
        lone = [f"{run.name}: {headline(run)}" for run, _ in ranked]
        answer = lone or ["No two of these runs were evaluated on the same problems, so which is best is not known."]
    else:
        answer = [_lead(ranked)]
    return [" ".join(told)] * bool(told) + answer + [comparison(runs)] + _not_like_with_like(runs)


def ranking(runs: list[RunData]) -> list[tuple[RunData, Estimate]]:
    """Evaluated runs with their accuracy on the problems all of them were asked last, the best first."""
    evaluated = [(run, run.last[1]) for run in runs if run.last is not None]
    shared = on_shared_problems([summaries for _, summaries in evaluated])
    if shared is None:
        return []
    pairs = [(run, level) for (run, _), level in zip(evaluated, shared.accuracy, strict=True)]
    return sorted(pairs, key=lambda pair: -pair[1].mean)


def _lead(ranked: list[tuple[RunData, Estimate]]) -> str:
    (best, level), (second, below), *_ = ranked
    one, other = _last(second), _last(best)
    name = f"Avg@{samples(one, other)}"
    lead = compare(one, other)
    level_with = [run.name for run, other_level in ranked if isclose(other_level.mean, level.mean)]
    has = f"{best.name} has the highest {name}, {level.mean:.3f}"
    if len(level_with) > 1:
        text = f"{', '.join(level_with[:-1])} and {level_with[-1]} are level with the highest {name}, {level.mean:.3f}"
        if lead is not None:
            text += f": {second.name} against {best.name} {interval(lead.difference, sign=True)} over {_number(lead)}"
        return text + "."
    if lead is None:
        text = f"{has}, ahead of {second.name} with {below.mean:.3f}"
        if not isnan(level.low) and not isnan(below.high):
            text += f": the 95 % intervals {'overlap' if level.low <= below.high else 'do not overlap'}"
    else:
        text = f"{has}: {interval(lead.difference, sign=True)} more than {second.name} over {_number(lead)}"
        if holds_zero(lead):
            text += ", not distinguishable from no lead"
        elif lead.problems >= FEW_PROBLEMS:
            text += ", a distinguishable lead"
    found = change(best)
    if found is not None and found.closed is not None:
        text += f"; it closed {found.closed:.0%} of its gap to the teacher"
    return text + "."


def _last(run: RunData) -> Summaries:
    return run.last[1] if run.last is not None else {}


def _number(paired: Paired) -> str:
    few = ", too few for the interval to be trusted" if paired.problems < FEW_PROBLEMS else ""
    return f"{counted(paired.problems, 'problem')}{few}"


def comparison(runs: list[RunData]) -> str:
    """What a comparison may be read as: the settings in which its runs differ."""
    keys = [key for key in _differing(runs) if key not in ASIDE]
    if not keys:
        return "The recipes are equal."
    return f"The recipes differ in {_named(keys)}; all else is equal."


def _not_like_with_like(runs: list[RunData]) -> list[str]:
    keys = [key for key in _differing(runs) if key.split(".")[0] in SAME and key not in ASIDE]
    steps = {run.last[0] for run in runs if run.last is not None}
    reasons = [f"the runs differ in {_named(keys)}"] if keys else []
    if len(steps) > 1:
        reasons.append(f"their last evaluations are after {_joined(sorted(steps))} steps")
    return [f"This does not compare like with like: {' and '.join(reasons)}."] if reasons else []


def _named(keys: list[str]) -> str:
    """The first few; the page has a table of all."""
    return (
        ", ".join(keys)
        if len(keys) <= MOST_NAMED
        else f"{', '.join(keys[:MOST_NAMED])} and {len(keys) - MOST_NAMED} more"
    )


def _joined(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _differing(runs: list[RunData]) -> list[str]:
    recipes = [flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]


def flat(values: Record, above: str = "") -> Record:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: Record = {}
    for key, value in values.items():
        name = f"{above}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found
