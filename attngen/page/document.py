"""The page: every distinct site once, with what was decided for it and why; what was left alone; the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup, escape

import attngen
from attngen import show
from attngen.abbreviate import abbreviated
from attngen.device import Device
from attngen.page import masks, roofline, spent, svg
from attngen.prepare import Use
from attngen.report import Report, Same, SiteReport, groups, unnumbered
from attngen.spec import Problem, Tile

TEMPLATE = "page.html.jinja"
WORDS = {"empty": "empty: skipped", "full": "full: no mask", "partial": "partial: masked", "data": "depends on data"}
COLOURED = {  # classes in the page's style sheet, by the token types of Pygments
    "comment": ("Comment", "Literal.String.Doc"),
    "keyword": ("Keyword", "Operator.Word"),
    "literal": ("Literal",),
    "defined": ("Name.Function", "Name.Decorator"),
}


@dataclass(frozen=True)
class Pictures:
    """Of a site and its kernel; no roofline where there is nothing to compute."""

    blocks: masks.Blocks
    notes: tuple[str, ...]
    mask: Markup
    roofline: Markup | None
    points: tuple[str, ...]
    time: Markup


@dataclass(frozen=True)
class Shown:
    """A group of sites that differ in nothing but their layer, with pictures where there is a kernel."""

    group: Same
    expression: tuple[str, ...]
    sizes: str
    paths: tuple[str, ...]
    pictures: Pictures | None

    @property
    def site(self) -> SiteReport:
        return self.group.first

    @property
    def measured(self) -> bool:
        return any(each.measured_ms is not None for each in self.site.candidates)


@dataclass(frozen=True)
class Source:
    """The text of a kernel, and the sites that it is for."""

    name: str
    what: str
    text: Markup


def rendered(report: Report, uses: Sequence[Use], device: Device, model: str) -> str:
    """``report.html`` of a run that made the kernels of ``uses``."""
    by_name = {use.kernel.name: use for use in uses}
    replaced = [shown(group, by_name.get(group.first.kernel), device) for group in groups(report.replaced)]
    reasons: dict[str, list[Same]] = {}
    for group in groups(report.missed):
        reasons.setdefault(unnumbered(group.first.reason), []).append(group)
    return _environment().get_template(TEMPLATE).render(
        report=report, device=device, model=model, version=attngen.__version__, summary=show.summary(report).plain,
        replaced=replaced, reasons=reasons, sources=[source for use in uses for source in _sources(use)],
        words=WORDS,
    )  # fmt: skip


def shown(group: Same, use: Use | None, device: Device) -> Shown:
    expression, *sizes = group.first.computes.rsplit(", ", 4)
    paths = tuple(each.where for each in group.sites)
    pictures = None if use is None else pictures_of(group.first, use, device)
    return Shown(group, tuple(abbreviated(expression)), ", ".join(sizes), paths, pictures)


def pictures_of(site: SiteReport, use: Use, device: Device) -> Pictures:
    assert site.sizes is not None
    spec, problem = use.kernel.spec, Problem(tuple(site.sizes["batch"]), site.sizes["rows"], site.sizes["keys"])
    blocks, roof = masks.blocks_of(spec, problem, use.kernel.tile), roofline.of(site, spec, problem, device)
    drawing, points = (None, ()) if roof is None else (roofline.drawn(roof), tuple(map(roofline.said, roof.points)))
    time = spent.drawn(site.candidates[0])
    return Pictures(blocks, _notes(blocks, use.kernel.tile), masks.drawn(blocks), drawing, points, time)


def _notes(blocks: masks.Blocks, tile: Tile) -> tuple[str, ...]:
    cell = f"A cell is {blocks.rows} x {blocks.keys} pairs"
    each = ": one block of the kernel" if (blocks.rows, blocks.keys) == (tile.rows, tile.keys) else ""
    later = "What depends on data is found out by the kernel, tile by tile or pair by pair." if blocks.counts["data"] else ""
    return tuple(filter(None, [f"{cell}{each}.", later]))


# -------------------------------------------------------------------------------------------------------------- kernels


def _sources(use: Use) -> list[Source]:
    sources = [Source(use.kernel.name, f"forward, {use.kernel.tile}", highlighted(use.kernel.source))]
    if use.backward is not None:
        tiles = ", ".join(map(str, use.backward.tiles))
        sources.append(Source(use.backward.name, f"backward, {tiles}", highlighted(use.backward.source)))
    return sources


def highlighted(source: str) -> Markup:
    """Python with a class for what is worth a colour; all else, which is most of it, stays plain text."""
    from pygments.lexers import PythonLexer

    pieces = ((_class(kind), text) for kind, text in PythonLexer(stripnl=False).get_tokens(source))
    return Markup().join(svg.element("span", text, class_=name) if name else escape(text) for name, text in pieces)


def _class(kind: Any) -> str | None:
    from pygments.token import string_to_tokentype

    return next((name for name, parts in COLOURED.items() if any(kind in string_to_tokentype(part) for part in parts)), None)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attngen.page", ""),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": show.size, "time": spent.time_text}
    return environment
