"""Long expressions made short enough to read: what repeats gets a name, and what is still too long is cut."""

from __future__ import annotations

import re
from collections import Counter
from string import ascii_uppercase

ENOUGH = 160  # characters that need no help
LONGEST = 240  # characters shown of one line
MOST = 4  # names explained
WORTH = 12  # characters that a name must stand for


def abbreviated(text: str) -> list[str]:
    """``text`` in one line, or with names for its repeated parts and a line for each name: ``A = ...``."""
    names: dict[str, str] = {}
    free = [letter for letter in ascii_uppercase if letter not in text]
    while len(text) > ENOUGH and len(names) < len(free):
        part = _most_saving(text)
        if part is None:
            break
        name = free[len(names)]
        names[name] = part
        text = text.replace(part, name)
    lines = [text, *(f"{name} = {part}" for name, part in list(names.items())[:MOST])]
    if len(names) > MOST:
        lines.append(f"... and {len(names) - MOST} more (--json prints all of it)")
    return [_cut(line) for line in lines]


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 30].rstrip()} ... ({len(line)} characters)"


def _most_saving(text: str) -> str | None:
    """The part in brackets that repeats and whose name would shorten ``text`` most."""
    counts = Counter(part for part in _bracketed(text) if len(part) >= WORTH)
    repeated = {part: (count - 1) * len(part) for part, count in counts.items() if count > 1}
    return max(repeated, key=repeated.__getitem__) if repeated else None


def _bracketed(text: str) -> list[str]:
    """Every part that stands in round brackets of its own, not being the arguments of a function."""
    parts, opened = [], []
    for place, character in enumerate(text):
        if character == "(":
            opened.append(place)
        elif character == ")" and opened:
            start = opened.pop()
            if not re.match(r"\w", text[start - 1 : start] or " "):
                parts.append(text[start : place + 1])
    return parts
