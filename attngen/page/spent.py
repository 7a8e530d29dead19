"""The parts of a predicted time: what each resource is busy for, at the same time as the others, and what adds to that."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from attngen.candidates import BUSY, WORDS
from attngen.page import svg
from attngen.report import Candidate

WIDTH, ROW, LABEL, NUMBER = 440.0, 20.0, 190.0, 60.0
ADDED = ("waiting", "shares", "launch")


def drawn(candidate: Candidate) -> Markup:
    """One bar per part, those that add up from left to right, over one of the whole; then what was measured, if it was."""
    parts = candidate.parts_ms
    busiest = max(BUSY, key=lambda name: parts[name])
    bars = [(WORDS[name], 0.0, parts[name], "busiest" if name == busiest else "busy") for name in BUSY]
    begin = parts[busiest]
    for name in ADDED:
        bars.append((WORDS[name], begin, parts[name], "added"))
        begin += parts[name]
    bars.append(("predicted", 0.0, candidate.predicted_ms, "whole"))
    if candidate.measured_ms is not None:
        bars.append(("measured", 0.0, candidate.measured_ms, "whole"))
    longest = max(begin + taken for _, begin, taken, _ in bars)
    shapes = [shape for place, bar in enumerate(bars) for shape in _bar(place, bar, longest)]
    return svg.picture(WIDTH, ROW * len(bars) + 4, "Parts of the predicted time", shapes)


def _bar(place: int, bar: tuple[str, float, float, str], longest: float) -> Sequence[Markup]:
    name, begin, taken, kind = bar
    scale, top = (WIDTH - LABEL - NUMBER) / longest, ROW * place
    left, width = LABEL + begin * scale, max(taken * scale, 0.5)
    return (
        svg.text(LABEL - 6, top + 14, name, text_anchor="end", class_="name"),
        svg.rectangles([(left, top + 3, width, ROW - 6)], class_=kind),
        svg.text(left + width + 4, top + 14, time_text(taken)),
    )


def time_text(milliseconds: float) -> str:
    """Three digits, in a unit that needs no zeros before them."""
    return f"{1e3 * milliseconds:.3g} us" if milliseconds < 0.9995 else f"{milliseconds:.3g} ms"
