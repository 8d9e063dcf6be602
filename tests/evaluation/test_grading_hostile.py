"""Answers made to hang, crash or bloat a grader, a thousand and more, with ordinary ones between them."""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from poweropd.evaluation.grading import Grader

Make = Callable[[random.Random], str]


def nested(opening: str, inside: str, closing: str) -> Make:
    def make(rng: random.Random) -> str:
        depth = rng.randint(5, 140)
        return opening * depth + inside + closing * rng.choice([depth, depth, depth - 1, 0])

    return make


def characters(*ranges: tuple[int, int]) -> Make:
    return lambda rng: "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 400)))


PIECES = [
    "\\frac",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    "^",
    "_",
    "1",
    "x",
    "\\sqrt",
    "+",
    "-",
    "=",
    ",",
    "\\text",
    "\\left",
    "\\right",
    "|",
    "\\pm",
    "\\cup",
    "!",
    "%",
    "\\%",
    "\\int",
    "\\sum",
    "&",
    "\\\\",
    "\\begin{matrix}",
    "$",
    "<",
    "\\{",
    "\\in",
]

# Cheap to refuse or to compare; many of each are tried.
CHEAP: dict[str, Make] = {
    "braces": nested("{", "1", "}"),
    "parentheses": nested("(", "x", ")"),
    "roots": nested("\\sqrt{", "2", "}"),
    "fractions": nested("\\frac{1}{1+", "x", "}"),
    "boxes": nested("\\boxed{", "7", "}"),
    "texts": nested("\\text{", "7", "}"),
    "signs": lambda rng: rng.choice("+-!^_=,;|$&%\\'\"") * rng.randint(10, 950),
    "too long": lambda rng: (
        rng.choice(["9", "x+", "\\frac{1}{2}", "\\boxed{1}", "}{", "\\,"]) * rng.randint(5_000, 40_000)
    ),
    "digits": lambda rng: str(rng.randint(1, 9)) * rng.randint(100, 5_000),
    "exponents": lambda rng: f"{rng.randint(2, 99)}e{rng.randint(10**3, 10**18)}",
    "powers of ten": lambda rng: f"{rng.randint(2, 9)} \\times 10^{{{rng.randint(10**3, 10**18)}}}",
    "code": lambda rng: (
        rng.choice(
            [
                "__import__('os').system('touch hacked')",
                "open('hacked', 'w').write('x')",
                "exit()",
                "(lambda f: f(f))(lambda f: f(f))",
                "{{7*7}}",
                "'; DROP TABLE grades; --",
                "while True: pass",
                "import socket; socket.socket()",
                "[x for x in ().__class__.__base__.__subclasses__()]",
            ]
        )
        + " " * rng.randint(0, 9)
    ),
    "control characters": characters((0, 31), (127, 159)),
    "any character": characters((32, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF)),
    "soup": lambda rng: "".join(rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(rng.randint(1, 150))),
    "words": lambda rng: " ".join(rng.choice(["final answer is", "and", "or", "percent", "boxed"]) for _ in range(60)),
    "commas": lambda rng: ",".join(str(rng.randint(0, 99)) for _ in range(rng.randint(2, 300))),
    "matrix": lambda rng: (
        "\\begin{pmatrix}" + "\\\\".join("&".join("1234567") for _ in range(rng.randint(1, 30))) + "\\end{pmatrix}"
    ),
}
# Parsing or algebra that hardly ends: most are worth the whole time limit.
ENDLESS: dict[str, Make] = {
    "logarithms": nested("\\log_{2}(", "x", ")"),
    "endless": lambda rng: (
        rng.choice(["\\frac", "\\\\", "\\left(", "\\pm ", "1,", "x^", "\\text", "1 ", "a_"]) * rng.randint(50, 150)
    ),
    "tower": lambda rng: (lambda n: "9^{" * n + "9" + "}" * n)(rng.randint(3, 12)),
    "factorial": lambda rng: f"{rng.randint(10**7, 10**15)}!",
    "factorials": lambda rng: f"(({rng.randint(15, 100)}!)!)!",
    "product": lambda rng: f"\\prod_{{k=1}}^{{{rng.randint(10**6, 10**9)}}} k",
    "sum": lambda rng: f"\\sum_{{k=1}}^{{10^{{{rng.randint(6, 30)}}}}} \\frac{{1}}{{k^k}}",
    "power": lambda rng: (
        "(" + "+".join(f"x_{{{n}}}" for n in range(rng.randint(9, 30))) + f")^{{{rng.randint(50, 200)}}}+\\sqrt{{2}}"
    ),
    "binomial": lambda rng: f"\\binom{{10^{{9}}}}{{{rng.randint(10**7, 10**8)}}}",
    "floor": lambda rng: f"\\lfloor \\pi^{{10^{{{rng.randint(5, 8)}}}}} \\rfloor",
    "integral": lambda rng: f"\\int_0^{{{rng.randint(1, 9)}}} x^{{x^{{x}}}} \\sin(x^2) dx",
    "limit": lambda rng: f"\\lim_{{x\\to0}}\\frac{{\\sin x^{{x}}}}{{x^{{x^x}}+{rng.randint(1, 9)}}}",
}


def grade_among_ordinary_ones(hostile: list[str], ordinary: int, seconds: float) -> float:
    """Grades them all at once; returns the seconds it took."""
    rng = random.Random(0)
    questions = [(f"\\boxed{{{text}}}", rng.choice(["3", "\\sqrt{2}+x"]), False) for text in hostile]
    questions += [(f"\\boxed{{\\sqrt{{{2 * n * n}}}}}", f"{n}\\sqrt{{2}}", True) for n in range(2, ordinary + 2)]
    rng.shuffle(questions)
    start = time.monotonic()
    with Grader(seconds=seconds, workers=2) as grader:
        grades = grader.grade_many((response, reference) for response, reference, _ in questions)
    for (response, reference, right), grade in zip(questions, grades, strict=True):
        assert grade.correct == right, (response[:200], reference, grade.status)
    return time.monotonic() - start


def peak_memory() -> int:
    """Of this process, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.filterwarnings("ignore:the reference")
def test_a_thousand_hostile_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(1)
    kinds = list(CHEAP.values())
    hostile = [kinds[n % len(kinds)](rng) for n in range(1000)] + [make(rng) for make in ENDLESS.values()]
    before = peak_memory()
    grade_among_ordinary_ones(hostile, ordinary=100, seconds=1.0)
    assert peak_memory() - before < 100 * 2**20
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ten_thousand_hostile_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(2)
    kinds = list(CHEAP.values())
    hostile = [kinds[n % len(kinds)](rng) for n in range(10_000)]
    hostile += [make(rng) for make in ENDLESS.values() for _ in range(20)]
    before = peak_memory()
    grade_among_ordinary_ones(hostile, ordinary=500, seconds=1.0)
    assert peak_memory() - before < 200 * 2**20
    assert not list(tmp_path.iterdir())
