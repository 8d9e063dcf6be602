"""Find the final answer in a response. Every step is one pass over the text, whatever the text is."""

import re
from collections import deque

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*(?P<box>\{)|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*([^\s{}$]+)")
_ANSWER_IS = re.compile(r"answer\s+is\b[\s:*]*", re.IGNORECASE)
_STATED = re.compile(r"\$+([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|(\([A-J]\))")
_NUMBER = re.compile(r"(?<![\w.)])-?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?!\w)|/\d+)?|\d+")


def extract_answer(response: str) -> str | None:
    r"""The final answer of a response, None if there is none. The first of these that is there:

    1. the last complete `\boxed{...}` or `\fbox{...}` (the innermost of nested ones), else `\boxed 7`. A box that is
       empty, or that the end of the response cut off, is no box;
    2. the rest of the line after the last `####`;
    3. what follows the last "answer is": formula (`$...$`, `\(...\)`, `\[...\]`), choice such as (C), or the first
       number in the same line;
    4. the last number.
    """
    return _last_box(response) or _after_hashes(response) or _stated(response) or _last_number(response)


def _last_box(text: str) -> str | None:
    """Braces are matched in one forward pass, so that a thousand boxes that never close cost no more than one that does."""
    opened: list[int | None] = []  # for every open brace: where the content of its box starts, None if it opens no box
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match["box"]:
            opened.append(match.end())
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]) and text[start : match.start()].strip():
                last = start, match.start()
    if last is not None:
        return text[last[0] : last[1]].strip()
    bare = _last_match(_BARE_BOX, text)
    return bare[1].rstrip(".,;:") or None if bare else None


def _after_hashes(text: str) -> str | None:
    _, marker, after = text.rpartition("####")
    lines = after.strip().splitlines()
    return lines[0].strip() if marker and lines else None


def _stated(text: str) -> str | None:
    match = _last_match(_ANSWER_IS, text)
    if match is None:
        return None
    line = text[match.end() :].split("\n", 1)[0]
    stated = _STATED.match(line)
    if stated:
        return next(group for group in stated.groups() if group).strip() or None
    number = _NUMBER.search(line)
    return number[0] if number else None


def _last_number(text: str) -> str | None:
    number = _last_match(_NUMBER, text)
    return number[0] if number else None


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = deque(pattern.finditer(text), maxlen=1)
    return last[0] if last else None
