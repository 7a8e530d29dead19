"""A few shapes of SVG as text that is escaped wherever it says something. Colours belong to the page's style sheet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape


def element(name: str, *content: str, **attributes: object) -> Markup:
    """``<name attribute="value">content</name>``; ``class_`` is ``class``, and ``stroke_width`` is ``stroke-width``."""
    pairs = [(key.rstrip("_").replace("_", "-"), _number(value)) for key, value in attributes.items()]
    opening = Markup(" ").join([Markup(name), *(Markup('{}="{}"').format(key, value) for key, value in pairs)])
    return Markup("<{}>{}</{}>").format(opening, Markup().join(escape(each) for each in content), Markup(name))


def picture(width: float, height: float, label: str, shapes: Iterable[Markup], kind: str = "chart") -> Markup:
    """A drawing that scales with the page; ``label`` is what it is called by those who do not see it."""
    box = f"0 0 {_number(width)} {_number(height)}"
    return element("svg", *shapes, viewBox=box, width=width, height=height, class_=kind, role="img", aria_label=label)


def text(x: float, y: float, words: object, **attributes: object) -> Markup:
    return element("text", str(words), x=x, y=y, **attributes)


def line(points: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    places = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
    return element("polyline", points=places, fill="none", **attributes)


def rectangles(boxes: Iterable[tuple[float, float, float, float]], **attributes: object) -> Markup:
    """Many rectangles (x, y, width, height) as one path."""
    parts = (f"M{_number(x)} {_number(y)}h{_number(w)}v{_number(h)}h{_number(-w)}z" for x, y, w, h in boxes)
    return element("path", d="".join(parts), **attributes)


def _number(value: object) -> object:
    """Floats with two decimals at most: a page holds thousands of them."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
