"""Problems that stand in two sets: the same text, or nearly so. Texts in, overlaps out."""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

NGRAM_WORDS = 8  # a problem of fewer words can only be equal, never near
NEAR_OF_BENCHMARK = 0.6  # least share of the benchmark problem's n-grams that the training problem has too
NEAR_OF_TRAINING = 0.4  # least share of the training problem's n-grams that the benchmark problem has too

NGram = tuple[str, ...]

# What looks the same on the page: other signs for one symbol, other commands for one symbol, commands for looks alone.
_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
     "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "°": r"^\circ ", "²": "^2 ", "³": "^3 ", "~": " "}
)  # fmt: skip
_SAME = {"dfrac": "frac", "tfrac": "frac", "leq": "le", "geq": "ge", "neq": "ne", "leqslant": "le", "geqslant": "ge"}
_LOOKS = {
    "left", "right", "big", "bigl", "bigr", "bigg", "biggl", "biggr", "displaystyle", "textstyle", "limits", "nolimits",
    "quad", "qquad", "text", "textbf", "textit", "textrm", "emph", "mbox", "mathrm", "mathbf", "mathit", "boldsymbol",
    "operatorname",
}  # fmt: skip
_WRITTEN_OUT = re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)(?!\d)")  # \frac12
_WORD = re.compile(
    r"\\(?P<command>[^\W\d_]+)|(?P<text>[^\W\d_]+|\d+(?:\.\d+)?)"
    r"|\\[^\w\s]|[\s${}.,;:?!'\"`‘’“”&\\]"  # wrappers and spaces of LaTeX, punctuation: no words
    r"|(?P<symbol>.)",
    re.DOTALL,
)
_OWN_SPACE = re.compile(r"(?<!\d) | (?!\d)")  # every space but one between two numbers


def words(text: str) -> list[str]:
    r"""The words of a problem: runs of letters, numbers, names of LaTeX commands, and single symbols.

    NFKC, lower case; without punctuation, `$`, `\(`, `\[`, braces, spacing and font commands, `\left` and `\right`.
    `Find $\dfrac{1}{2}x + 3$.` is `find frac 1 2 x + 3`.
    """
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).lower()
    found = []
    for match in _WORD.finditer(_WRITTEN_OUT.sub(r"\\frac \1 \2", text)):
        word = match[match.lastgroup] if match.lastgroup else ""
        if match.lastgroup == "command":
            word = "" if word in _LOOKS else _SAME.get(word, word)
        if word:
            found.append(word)
    return found


def normalised(text: str) -> str:
    """The words of a text without the spaces between them: what equal problems have in common."""
    return _joined(words(text))


def _joined(found: Sequence[str]) -> str:
    return _OWN_SPACE.sub("", " ".join(found))


@dataclass(frozen=True)
class Problem:
    """One row of a set.

    Attributes:
        id: unique within its set.
        answer: None: not known.
    """

    id: str
    text: str
    answer: str | None = None


@dataclass(frozen=True)
class Overlap:
    """A training problem and a benchmark problem that are one, or nearly.

    Attributes:
        training_place, benchmark_place: where the two stand in their sets, from 0.
        of_benchmark: share of the benchmark problem's n-grams that the training problem has too; 1 for equal texts.
        of_training: share of the training problem's n-grams that the benchmark problem has too; 1 for equal texts.
        same_answer: None: at least one is not known.
    """

    training_place: int
    benchmark_place: int
    training: Problem
    benchmark: Problem
    kind: Literal["exact", "near"]
    of_benchmark: float
    of_training: float
    same_answer: bool | None


def overlaps(training: Sequence[Problem], benchmark: Sequence[Problem]) -> list[Overlap]:
    """Every pair of a training and a benchmark problem that overlap, in the order of the training set.

    Exact: their normalised texts are equal. Near: the pair has at least `NEAR_OF_BENCHMARK` of the distinct n-grams of the
    benchmark problem and `NEAR_OF_TRAINING` of those of the training problem in common, n-grams of `NGRAM_WORDS` words.
    A near pair may ask two things: a long text with another number in it is near, one with numbers all over is not. A
    translation, or the same question in other words, is not found.
    """
    equal: dict[str, list[int]] = defaultdict(list)
    grams_of = []
    for place, problem in enumerate(benchmark):
        found = words(problem.text)
        equal[_joined(found)].append(place)
        grams_of.append(_ngrams(found))
    rare = _rare_holders(grams_of)
    pairs = []
    for place, problem in enumerate(training):
        found = words(problem.text)
        grams = _ngrams(found)
        exact = equal.get(_joined(found), []) if found else []
        shares = dict.fromkeys(exact, (1.0, 1.0))
        for other in {other for gram in grams for other in rare.get(gram, ())} - shares.keys():
            common = len(grams & grams_of[other])
            share = (common / len(grams_of[other]), common / len(grams))
            if share[0] >= NEAR_OF_BENCHMARK and share[1] >= NEAR_OF_TRAINING:
                shares[other] = share
        for other, (of_benchmark, of_training) in sorted(shares.items()):
            asked = benchmark[other]
            same = None if None in (problem.answer, asked.answer) else _same(str(problem.answer), str(asked.answer))
            kind: Literal["exact", "near"] = "exact" if other in exact else "near"
            pairs.append(Overlap(place, other, problem, asked, kind, of_benchmark, of_training, same))
    return pairs


def _rare_holders(grams_of: Sequence[set[NGram]]) -> dict[NGram, list[int]]:
    """Of every n-gram, the problems of which it is one of the rarest: so many that a near problem has one of them.

    Prefix filtering (Chaudhuri, Ganti and Kaushik, ICDE 2006): what shares s of n n-grams shares one of any n - s + 1. It
    leaves out what a whole benchmark begins with, which would make every problem a candidate for every other.
    """
    frequency = Counter(gram for grams in grams_of for gram in grams)
    rare: dict[NGram, list[int]] = defaultdict(list)
    for place, grams in enumerate(grams_of):
        enough = len(grams) - math.ceil(NEAR_OF_BENCHMARK * len(grams)) + 1
        for gram in sorted(grams, key=frequency.__getitem__)[:enough]:
            rare[gram].append(place)
    return rare


def _ngrams(found: Sequence[str]) -> set[NGram]:
    return set(zip(*(islice(found, start, None) for start in range(NGRAM_WORDS)), strict=False))


def _same(answer: str, other: str) -> bool:
    """Equal as numbers, or as normalised texts: a count of likely copies, not a grading."""
    try:
        return float(answer) == float(other)
    except ValueError:
        return normalised(answer) == normalised(other)
