"""Work against traffic under what the device can do: one site, as the model spells it and as one kernel.

Work is that of both products over the pairs which positions leave, the same before and after. Before, the time is not
predicted: the point stands where the spelling would be if its traffic were all that takes time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup

from attngen.device import Device
from attngen.mask import derive
from attngen.page import svg
from attngen.report import SiteReport
from attngen.spec import AttentionSpec, Problem
from attngen.work import bindings, count_blocks

WIDTH, HEIGHT = 440.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 18.0, 12.0, 38.0
LINE = 14.0  # from one line of words to the next
PREFIXES = {0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}


@dataclass(frozen=True)
class Point:
    """``intensity`` in FLOP per byte, ``rate`` in FLOP/s; ``kind`` is "before" or "after"."""

    kind: str
    intensity: float
    rate: float


@dataclass(frozen=True)
class Roofline:
    """Bytes/s of memory, FLOP/s of products, and, with a softmax, the FLOP/s at which exponentials keep up with them."""

    bandwidth: float
    products: float
    exponentials: float | None
    points: tuple[Point, ...]

    def limit(self, intensity: float) -> float:
        return min(self.bandwidth * intensity, self.products, self.exponentials or math.inf)


def of(site: SiteReport, spec: AttentionSpec, problem: Problem, device: Device) -> Roofline | None:
    """The roofline of a site, or None where nothing is left to compute or nothing was predicted."""
    work = flop(spec, problem)
    if not work or site.hbm_bytes is None or not site.predicted_ms:
        return None
    per_pair = 2 * (spec.head_dim + spec.value_dim)
    exponentials = device.sms * device.clock * device.exp_per_clock * per_pair if spec.softmax else None
    before, after = (work / site.hbm_bytes[which] for which in ("before", "after"))
    bare = Roofline(device.hbm_bandwidth, rate_of_products(spec, device), exponentials, ())
    points = Point("before", before, bare.limit(before)), Point("after", after, 1e3 * work / site.predicted_ms)
    return Roofline(bare.bandwidth, bare.products, exponentials, points)


def flop(spec: AttentionSpec, problem: Problem) -> float:
    """Of both products over the pairs that positions leave; where documents must agree, as many as the cost model assumes."""
    pairs = count_blocks(derive(spec.mask), bindings(spec, problem), problem, 1, 1).mean * problem.rows
    return 2.0 * problem.heads * pairs * (spec.head_dim + spec.value_dim)


def rate_of_products(spec: AttentionSpec, device: Device) -> float:
    if spec.query.dtype != torch.float32:
        return device.tensor16 * (2 if spec.fp8 else 1)
    return device.tensor32 if spec.tf32 else device.fp32


# -------------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Scales:
    """Logarithms on both axes: the powers of ten, not only whole ones, at which each ends."""

    intensities: tuple[float, float]
    rates: tuple[float, float]

    def x(self, intensity: float) -> float:
        low, high = self.intensities
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(intensity) - low) / (high - low)

    def y(self, rate: float) -> float:
        low, high = self.rates
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(rate) - low) / (high - low)


def scales_for(roofline: Roofline) -> Scales:
    ceilings = [roofline.products, *filter(None, [roofline.exponentials])]
    ridges = [ceiling / roofline.bandwidth for ceiling in ceilings]
    intensities = [*(point.intensity for point in roofline.points), *(2 * ridge for ridge in ridges)]
    rates = [*(point.rate for point in roofline.points), *ceilings]
    return Scales(_ends(intensities, 2.5, 2.5), _ends(rates, 8.0, 2.5))


def _ends(values: Sequence[float], below: float, above: float) -> tuple[float, float]:
    return math.log10(min(values) / below), math.log10(max(values) * above)


def _ticks(ends: tuple[float, float]) -> range:
    return range(math.ceil(ends[0]), math.floor(ends[1]) + 1)


def drawn(roofline: Roofline) -> Markup:
    scales = scales_for(roofline)
    shapes = [*_grid(scales), *_ceilings(roofline, scales)]
    places = [(scales.x(point.intensity), scales.y(point.rate)) for point in roofline.points]
    shapes.append(svg.line(places, class_="move"))
    (x, y), (right, below) = places
    apart = LINE if abs(x - right) < 4 * LINE and abs(y - below) < LINE else 0.0  # of names that would lie on each other
    for place, point, more in zip(places, roofline.points, (0.0, apart), strict=True):
        shapes += _marked(point, *place, more)
    return svg.picture(WIDTH, HEIGHT, "Roofline: FLOP/s over FLOP per byte of device memory", shapes)


def _marked(point: Point, x: float, y: float, more: float) -> list[Markup]:
    """A dot, and its name under it."""
    dot = svg.element("circle", cx=x, cy=y, r=5.0, class_=point.kind)
    return [dot, svg.text(x + 8, y + LINE + more, point.kind, class_="name")]


def said(point: Point) -> str:
    return f"{digits(point.intensity)} FLOP per byte, {rate_text(point.rate)}"


def _grid(scales: Scales) -> list[Markup]:
    shapes = []
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for power in _ticks(scales.intensities):
        x = scales.x(10.0**power)
        shapes += [svg.line([(x, TOP), (x, bottom)], class_="grid")]
        shapes += [svg.text(x, bottom + 14, f"{10.0**power:g}", text_anchor="middle")]
    for power in _ticks(scales.rates):
        y = scales.y(10.0**power)
        shapes += [svg.line([(LEFT, y), (right, y)], class_="grid")]
        shapes += [svg.text(LEFT - 5, y + 4, _short(10.0**power), text_anchor="end")]
    middle = (LEFT + right) / 2
    return [
        *shapes,
        svg.text(middle, HEIGHT - 6, "FLOP per byte of device memory", text_anchor="middle"),
        svg.text(-(TOP + bottom) / 2, 10, "FLOP/s", text_anchor="middle", transform="rotate(-90)"),
    ]


def _ceilings(roofline: Roofline, scales: Scales) -> list[Markup]:
    right = 10.0 ** scales.intensities[1]
    lowest = max(10.0 ** scales.intensities[0], 10.0 ** scales.rates[0] / roofline.bandwidth)
    flat = [("products", roofline.products, "roof")]
    if roofline.exponentials is not None:
        flat.append(("exponentials", roofline.exponentials, "roof second"))
    shapes = []
    for place, (name, rate, kind) in enumerate(sorted(flat, key=lambda each: each[1])):
        ridge = rate / roofline.bandwidth
        shapes.append(svg.line([(scales.x(ridge), scales.y(rate)), (scales.x(right), scales.y(rate))], class_=kind))
        above = place == len(flat) - 1  # the name of the lower of two stands below it, for they may be close
        at = scales.y(rate) + (-6 if above else 13)
        shapes.append(svg.text(scales.x(right) - 4, at, f"{name} {rate_text(rate)}", class_="name", text_anchor="end"))
    return [*shapes, *_slope(roofline.bandwidth, lowest, max(rate for _, rate, _ in flat), scales)]


def _slope(bandwidth: float, lowest: float, ceiling: float, scales: Scales) -> list[Markup]:
    ends = [(scales.x(i), scales.y(bandwidth * i)) for i in (lowest, ceiling / bandwidth)]
    (x, y), (right, top) = ends
    middle = (x + right) / 2, (y + top) / 2
    angle = -math.degrees(math.atan2(y - top, right - x))
    turned = f"rotate({angle:.1f} {middle[0]:.1f} {middle[1]:.1f}) translate(0 -6)"
    words = f"memory {bandwidth / 1e12:.3g} TB/s"
    return [
        svg.line(ends, class_="roof"),
        svg.text(*middle, words, class_="name", text_anchor="middle", transform=turned),
    ]


def rate_text(rate: float) -> str:
    return f"{digits(rate / 1e12)} TFLOP/s"


def digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _short(value: float) -> str:
    power = min(18, max(0, int(math.log10(value) + 1e-9) // 3 * 3))
    return f"{value / 10.0**power:g}{PREFIXES[power]}"
