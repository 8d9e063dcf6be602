"""Responses that go round in circles, found by how well their end compresses (StableOPD, arXiv 2604.08527).

The paper looks at the last 10,000 characters and calls a ratio above 10 repetitive, so it sees nothing at budgets below
about 3,000 tokens. Here the window follows the budget, and the threshold the window, for the ratio grows with length:

    window  threshold   GSM8K answers  MATH problems  enumerations   repeated phrase of 6, 20, 40, 80, 160 characters
       100        3.2             2.3            2.6           2.1       5.9    3.2    1.9    1.2    1.2
       200        3.8             2.2            3.2           2.9      12      6.5    3.9    2.3    1.6
       500        4.7             2.8            3.9           3.9      26     15      9.3    5.6    3.8
     1,000        5.6             2.7            3.4           4.9      45     27     17     11      7.4
     2,000        6.7             2.6            2.4           5.9      69     44     30     20     14
    10,000       10               2.6            2.5           7.9     213    137    103     75     56

Left, the largest ratio of good texts, one by one and joined (enumerations: lists of primes, trial divisions, matrix
products and the like); right, of a phrase repeated. The threshold lies between them for phrases up to a fifth of the
window. Of 20,686 GSM8K answers and MATH problems five are above it at some budget from 64 to 4,096, all of them drawing
programs, whose lines differ by a few digits.
"""

import zlib
from collections.abc import Sequence

LONGEST_WINDOW = 10_000  # characters; the paper's


def compression_ratio(text: str) -> float:
    """Bytes of the text in UTF-8 over its bytes in zlib, level 6; 0 for the empty text."""
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded, 6))


def is_repetitive(text: str, *, window: int, threshold: float) -> bool:
    """Whether a text is longer than `window` characters and the ratio of its last `window` ones above `threshold`."""
    return len(text) > window and compression_ratio(text[-window:]) > threshold


def window_for(max_new_tokens: int) -> int:
    """Characters to look at: one less than the budget has tokens, so that a truncated answer of digits is long enough."""
    return max(1, min(LONGEST_WINDOW, max_new_tokens - 1))


def threshold_for(window: int) -> float:
    """The compression ratio above which `window` characters are repetitive: its fourth root, so 10 at 10,000."""
    return float(window**0.25)


def repetition_rate(texts: Sequence[str], max_new_tokens: int) -> float:
    """Share of responses that end in repetition; 0 where there are none."""
    window = window_for(max_new_tokens)
    return sum(is_repetitive(text, window=window, threshold=threshold_for(window)) for text in texts) / max(
        len(texts), 1
    )
