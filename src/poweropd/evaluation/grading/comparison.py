r"""Compare two answers as far as that takes no algebra: spelling, units, words, plain numbers, lists.

Nothing here decides what it is not sure of: that is left to the `algebra` of `compare`.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from poweropd.evaluation.grading.members import members
from poweropd.evaluation.grading.numerals import read_number, same_number
from poweropd.evaluation.grading.spelling import Answer, clean, split_unit

Verdict = bool | None  # None: cannot be told
Algebra = Callable[[str, str], Verdict]

_NAMED_NUMBER = re.compile(r".*[\d})]\s+(?:[a-zA-Z]{3,}.*|[mgshl](?:\^.*)?)")  # 4 apples, 5 m
_CHOICE = re.compile(r"\(([A-J])\)|([A-J])[.:)]?")
_LABEL = re.compile(r"\(([A-J])\)\s*(-?(?:\d|\\frac|\\sqrt).*|[a-z]+)")
_WORDS = re.compile(r"[a-zA-Z]{2,}(?:[ '-]+[a-zA-Z]+)*")
_BASED = re.compile(r"([0-9A-Z]+)\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))")


def compare(given: str, gold: str, algebra: Algebra = lambda given, gold: None) -> Verdict:
    r"""Whether two answers are equal, None where that cannot be told.

    Bare lists and sets are equal in any order (a list with its repetitions), tuples and intervals in theirs and with the
    same brackets; a bare list in the right order is also taken for a tuple. Members, and answers that are no lists, are
    compared by `algebra` where plain comparison does not tell.
    """
    answers = clean(given), clean(gold)
    if answers[0].plain and answers[0].plain == answers[1].plain and not _units_differ(*answers):
        return True
    left, right = (members(answer.text) for answer in answers)
    if len(left.parts) != len(right.parts):  # 100,200 may be a number or a list
        if len(left.parts) == 1:
            left = members(answers[0].text, thousands=False)
        else:
            right = members(answers[1].text, thousands=False)
    if len(left.parts) == 1 and len(right.parts) == 1:
        given, gold = left.parts[0], right.parts[0]
        return _compare_single(Answer(given, answers[0].unit), Answer(gold, answers[1].unit), algebra)
    if left.single != right.single and (left.ordered or right.ordered):
        return algebra(answers[0].text, answers[1].text)  # 0 < x < 1 and (0, 1)
    if len(left.parts) != len(right.parts) or (left.brackets != right.brackets and left.brackets and right.brackets):
        return False

    def same(at: int, wanted: str) -> Verdict:
        return compare(left.parts[at], wanted, algebra)

    if left.ordered or right.ordered:
        return _all(same(at, wanted) for at, wanted in enumerate(right.parts))
    return _matched(same, right.parts)


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    unknown = False
    for verdict in verdicts:
        if verdict is False:
            return False
        unknown |= verdict is None
    return None if unknown else True


def _matched(same: Callable[[int, str], Verdict], wanted: Sequence[str]) -> Verdict:
    """Whether every wanted member has a given one of its own."""
    free = list(range(len(wanted)))
    for member in wanted:
        verdicts = []
        for at in free:
            verdicts.append(same(at, member))
            if verdicts[-1]:
                free.remove(at)
                break
        else:
            return None if None in verdicts else False
    return True


def _units_differ(given: Answer, gold: Answer) -> bool:
    """Of two units that both are known; one that a single side states, or `units`, contradicts nothing."""
    return bool(given.unit and gold.unit and given.unit != gold.unit and "unit" not in given.unit + gold.unit)


def _compare_single(given: Answer, gold: Answer, algebra: Algebra) -> Verdict:
    if _units_differ(given, gold):
        return False
    if given.plain and given.plain == gold.plain:
        return True
    label = _LABEL.fullmatch(given.plain)
    if label and not _choice(gold):
        return compare(label[2], gold.text, algebra)
    number, wanted = read_number(given.text), read_number(gold.text)
    if wanted and not number:
        named = _NAMED_NUMBER.fullmatch(given.text)
        quantity, unit, _ = split_unit(given.text) if named else (given.text, None, False)
        number = read_number(quantity)
        if number and _units_differ(Answer(quantity, unit), gold):
            return False
    if number and wanted:
        return same_number(number, wanted)
    bases = _BASED.fullmatch(given.text), _BASED.fullmatch(gold.text)
    if any(bases):
        return bool(bases[0] and bases[1] and _digits(bases[0]) == _digits(bases[1]))
    verdict = _compare_words(given, gold)
    return algebra(given.text, gold.text) if verdict is None else verdict


def _digits(based: re.Match[str]) -> tuple[str, int]:
    return based[1].lstrip("0"), int(based[2] or based[3])


def _compare_words(given: Answer, gold: Answer) -> Verdict:
    wanted = _choice(gold)
    if wanted:
        label = _LABEL.fullmatch(given.plain)
        chosen = label[1] if label else _choice(given)
        return chosen == wanted if chosen or "(" in gold.text or gold.is_text else None
    words, wanted = _words(given), _words(gold)
    if words and wanted and words == wanted and (len(words) > 2 or words == "no"):
        return True
    return False if (wanted and gold.is_text) or (words and given.is_text) else None


def _choice(answer: Answer) -> str | None:
    match = _CHOICE.fullmatch(answer.plain)
    return match[1] or match[2] if match else None


def _words(answer: Answer) -> str | None:
    text = " ".join(answer.plain.strip('"`').split())
    return text.casefold() if _WORDS.fullmatch(text) else None
