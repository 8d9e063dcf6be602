"""What evaluations say: a model over its benchmarks, and several models on the problems that all were asked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import nan, sqrt

from poweropd.evaluation.metrics import Estimate, Paired, bootstrap, bootstrap_of_means, paired_of_means
from poweropd.evaluation.summary import in_paper_order
from poweropd.report.records import Record, is_number
from poweropd.report.runs import Summaries

AT_K = ("avg", "pass", "maj")  # measures whose name ends in the number of samples


@dataclass(frozen=True)
class Shared:
    """Several evaluations on the benchmarks, and the problems of each, that all of them asked.

    Attributes:
        accuracy: of each evaluation; the mean over benchmarks of the share of correct samples.
        problems: how many are shared, over all benchmarks; None where summaries do not tell problems apart.
        whole: no evaluation asked any problem beside them.
    """

    accuracy: list[Estimate]
    benchmarks: list[str]
    problems: int | None
    whole: bool


def samples(*models: Summaries) -> str:
    """The k of Avg@k: a number, or the letter where evaluations differ in it."""
    found = {str(summary["samples"]) for summaries in models for summary in summaries.values()}
    return found.pop() if len(found) == 1 else "k"


def title(summary: Record, benchmark: str) -> str:
    return str(summary.get("title", benchmark.replace("_", " ")))


def estimate(summary: Record, measure: str) -> Estimate | None:
    """`avg`, `pass`, `maj`, `mean_length`, `truncation` or `repetition` of one benchmark; None where it has none.

    The ends of the interval are NaN where the summary gives none.
    """
    key = f"{measure}_at_{summary['samples']}" if measure in AT_K else measure
    if not is_number(summary.get(key)):
        return None
    low, high = (summary.get("intervals") or {}).get(key) or (nan, nan)
    return Estimate(float(summary[key]), float(low), float(high))


def mean(summaries: Summaries, measure: str) -> Estimate | None:
    """The mean over benchmarks, of those that have the measure.

    Accuracy comes with the interval of resampled problems; of the other measures the benchmarks' own intervals are
    combined as those of independent means.
    """
    found = [value for summary in summaries.values() if (value := estimate(summary, measure)) is not None]
    if len(found) <= 1:
        return found[0] if found else None
    groups = [shares(summary) for summary in summaries.values()]
    if measure == "avg" and all(groups):
        return _bootstrap(tuple(tuple(group.values()) for group in groups))
    middle = sum(value.mean for value in found) / len(found)
    below = sqrt(sum((value.mean - value.low) ** 2 for value in found)) / len(found)
    above = sqrt(sum((value.high - value.mean) ** 2 for value in found)) / len(found)
    return Estimate(middle, middle - below, middle + above)


def shares(summary: Record) -> dict[str, float]:
    """The share of correct samples by problem; empty where the summary does not tell."""
    correct = summary.get("correct")
    return {problem: count / summary["samples"] for problem, count in correct.items()} if correct else {}


def distinct(models: Iterable[tuple[str, str, Summaries]]) -> dict[str, Summaries]:
    """Models by name, from (name, run, summaries): once where runs share them, else by the name of the run too."""
    found: dict[str, Summaries] = {}
    known: dict[str, list[Summaries]] = {}
    for name, run, summaries in models:
        seen = known.setdefault(name, [])
        if summaries not in seen:
            found[f"{name} of {run}" if seen else name] = summaries
            seen.append(summaries)
    return found


def on_shared_problems(models: Sequence[Summaries]) -> Shared | None:
    """The accuracies of several models where they can be compared; None if they share no benchmark or problem.

    Summaries of an earlier version do not tell problems apart: they are taken whole.
    """
    common = _common(models)
    by_benchmark = {name: [shares(model[name]) for model in models] for name in common}
    if not common:
        return None
    if not all(all(scores) for scores in by_benchmark.values()):
        levels = [mean({name: model[name] for name in common}, "avg") for model in models]
        return Shared([level for level in levels if level is not None], common, None, whole=True)
    problems = {name: [key for key in first if all(key in other for other in others)]
                for name, (first, *others) in by_benchmark.items()}  # fmt: skip
    kept = [name for name in common if problems[name]]
    if not kept:
        return None
    accuracy = [
        _bootstrap(tuple(tuple(by_benchmark[name][place][key] for key in problems[name]) for name in kept))
        for place in range(len(models))
    ]
    count = sum(len(problems[name]) for name in kept)
    asked = max(sum(len(shares(summary)) for summary in model.values()) for model in models)
    return Shared(accuracy, kept, count, whole=count == asked)


def compare(first: Summaries, second: Summaries) -> Paired | None:
    """Second minus first on the problems that both were asked; None where that cannot be told."""
    pairs = [(shares(first[name]), shares(second[name])) for name in _common([first, second])]
    if not all(before and after for before, after in pairs):
        return None
    return _paired(tuple((_frozen(before), _frozen(after)) for before, after in pairs if before.keys() & after.keys()))


Scores = tuple[tuple[str, float], ...]  # by problem, in a form that a cache can hold


def _frozen(scores: Mapping[str, float]) -> Scores:
    return tuple(scores.items())


@lru_cache(maxsize=256)
def _paired(pairs: tuple[tuple[Scores, Scores], ...]) -> Paired | None:
    return paired_of_means([(dict(before), dict(after)) for before, after in pairs]) if pairs else None


@lru_cache(maxsize=1024)
def _bootstrap(groups: tuple[tuple[float, ...], ...]) -> Estimate:
    return bootstrap(groups[0]) if len(groups) == 1 else bootstrap_of_means(groups)


def _common(models: Sequence[Summaries]) -> list[str]:
    """Benchmarks that all were asked, in the same version."""
    if not models:
        return []
    first, *others = models
    return [
        name
        for name in in_paper_order(list(first))
        if all(name in other and other[name].get("version") == first[name].get("version") for other in others)
    ]
