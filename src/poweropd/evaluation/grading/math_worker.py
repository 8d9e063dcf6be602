"""The program of a grading process: JSON lines `[given, gold]` in, JSON lines `[status, reference_is_mathematics]` out.

It runs alone because a hostile answer may make symbolic algebra hang, crash or eat memory. It gives up an answer that takes
too much processor time; where even that does not get through, its parent kills it by the clock. Equality is math-verify's, and narrower:
letters keep their case, tiny numbers are not all zero, and a decimal must have the digits to stand for what it rounds.
"""

import contextlib
import json
import logging
import re
import signal
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify.grader import should_treat_as_complex

from poweropd.evaluation.grading.comparison import Verdict, compare
from poweropd.evaluation.grading.numerals import read_number, stands_for
from poweropd.evaluation.grading.spelling import clean

MEMORY_LIMIT = 2**30  # bytes of address space; ordinary work takes less than a tenth of it
READY = "ready"
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_SPELLING = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
_STAND_INS = [  # what the parser takes for something else: the gamma function, e, a transpose, the sum 2 + 3 of 2(3)
    (re.compile(r"\\gamma(?![a-zA-Z])"), r"\\Upsilon "),
    (re.compile(r"(?<![\\a-zA-Z])E(?=\s*_)"), r"\\Xi "),
    (re.compile(r"\^\s*(?:T|\{\s*T\s*\})"), "^{(T)}"),
    (re.compile(r"((?<![_\d])\d+|\))\s*(?=\()"), r"\1\\cdot "),
]
# 5!! is not (5!)!, as the parser has it; a power with an exponent of six digits is never worked out.
_HOPELESS = re.compile(r"!\s*!|\^\s*\{?\s*[-+]?\s*\d{6}")
_TOLERANCE = sympy.Float("1e-12")


class _OutOfTime(BaseException):
    """No `Exception`: those are caught inside math-verify."""


def grade(given: str, gold: str) -> tuple[str, bool]:
    """`correct`, `wrong` or `unparsable`, and whether the reference is mathematics: else only its text was compared."""
    unread: list[str] = []

    def algebra(given: str, gold: str) -> Verdict:
        complex_numbers = should_treat_as_complex(given) or should_treat_as_complex(gold)
        wanted = _read(gold, complex_numbers)
        if wanted is None:
            unread.append(gold)
            return False
        value = _read(given, complex_numbers)
        if value is None:
            return None
        if not _agree((given, value), (gold, wanted)):  # first: showing that two are unequal may take algebra minutes
            return False
        return math_verify.verify(wanted, value, allow_set_relation_comp=True, timeout_seconds=None)

    verdict = compare(given, gold, algebra)
    return {True: "correct", False: "wrong", None: "unparsable"}[verdict], not unread


@lru_cache(maxsize=256)
def _read(text: str, complex_numbers: bool) -> Any:  # noqa: FBT001
    """What a text means to sympy; None if nothing. Of `m_{max} = n`, unreadable as a whole, n."""
    if _HOPELESS.search(text):
        return None
    spelt = normalize_latex(text, _SPELLING)
    for pattern, replacement in _STAND_INS:
        spelt = pattern.sub(replacement, spelt)
    try:
        value = latex2sympy(
            spelt,
            is_real=not complex_numbers,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=_CONVERSION,
        )
    except Exception:  # the parser raises many kinds
        name, equals, rest = text.rpartition("=")
        return _read(rest, complex_numbers) if equals and name.count("=") == 0 and "," not in text else None
    if not isinstance(value, sympy.Basic | sympy.MatrixBase) or value.has(sympy.zoo, sympy.nan):  # divided by zero
        return None
    if complex_numbers and isinstance(value, sympy.Expr):
        value = value.subs({symbol: sympy.I for symbol in value.free_symbols if symbol.name == "i"})
    return value


def _agree(given: tuple[str, Any], gold: tuple[str, Any]) -> bool:
    """Whether two expressions agree, relative to their size, where letters are numbers; True where that cannot be told."""
    values = given[1], gold[1]
    if not all(isinstance(value, sympy.Expr) for value in values):
        return True
    symbols = sorted(values[0].free_symbols | values[1].free_symbols, key=str)
    point = {symbol: sympy.Rational(7 + 4 * at, 5) for at, symbol in enumerate(symbols)}
    try:
        a, b = (_exact(value.doit()).subs(point).evalf(30) for value in values)
    except Exception:  # sympy raises many kinds
        return True
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return True
    for (text, _), other in ((given, b), (gold, a)):
        decimal = read_number(clean(text).text)
        if decimal and decimal.digits and other.is_Float:
            return stands_for(decimal, Fraction(str(other)))
    return bool(abs(a - b) <= _TOLERANCE * sympy.Max(abs(a), abs(b)))


def _exact(value: Any) -> Any:
    """With decimals as the fractions that they are."""
    return value.xreplace({number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)})


def main() -> None:
    seconds = float(sys.argv[1])
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    logging.disable(logging.CRITICAL)
    grade("\\frac{2x}{2}", "x+1")  # the parser's tables are built at its first use, at no answer's cost
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, _out_of_time)
    print(READY, flush=True)
    for line in sys.stdin:
        try:
            with _limited(seconds):
                reply = grade(*json.loads(line))
        except (_OutOfTime, MemoryError):
            reply = "timeout", True
        except Exception:  # sympy raises many kinds: what it cannot evaluate cannot be compared
            reply = "unparsable", True
        print(json.dumps(reply), flush=True)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Processor time, which other work on the machine does not shorten. It rings on, should a bare `except` swallow a ring."""
    if not hasattr(signal, "setitimer"):  # Windows: the parent's clock alone
        yield
        return
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _out_of_time(*_: object) -> None:
    raise _OutOfTime


if __name__ == "__main__":
    main()
