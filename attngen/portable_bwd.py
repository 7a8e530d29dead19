"""The holes of ``portable_bwd.py.jinja``: the gradients of a spec by plain Triton, for every GPU and for the interpreter.

Both kernels of the file are one macro. What it holds and what it goes over are queries and keys in the one, keys and
queries in the other, for which the whole score program is mirrored: there ``i`` counts keys and ``j`` queries.
"""

from __future__ import annotations

import json
from typing import Any

from attngen.adjoint import SCORE_GRAD, TOTAL_GRAD, WEIGHT_GRAD
from attngen.algebra import ONE, Const, Expr, op
from attngen.bounds import loop_bounds
from attngen.gradient import DIAGONAL, HEAD, KEYS, ROWS, Backward, Target, adjoints, backward_of, mirrored, of_total
from attngen.gradient import mirrored_input as turned
from attngen.layout import base_of, stride_of, used_dims
from attngen.mask import derive
from attngen.portable import helpers_of, products_of, sink_lines
from attngen.printer import LOG2E, Printer, bare
from attngen.scores import gain_of, in_units, score_lines, sink_values
from attngen.sides import Side, called_with, heads_of, launch_of, leading, mirrored_side, order_of
from attngen.spec import FEATURE, INNER, KEY, ROW, SCORE, AttentionSpec, Input, Tile

NAMES: dict[Expr, str] = {SCORE: "qk", SCORE_GRAD: "ds", WEIGHT_GRAD: "dp"}


def holes(spec: AttentionSpec, tiles: tuple[Tile, Tile], l2_bytes: int) -> dict[str, Any]:
    """What fills the template; ``tiles`` are that of the kernel that holds queries and that of the other. Raises
    ``Unprintable``."""
    plan = backward_of(spec)
    grad = Input("grad", spec.output, spec.out_dtype)
    sides = (
        Side("queries", spec, (spec.query, grad), (spec.keys, spec.values), plan, tiles[0], True),
        mirrored_side(spec, Side("keys", spec, (spec.keys, spec.values), (spec.query, grad), plan, tiles[1], False)),
    )
    kernels = [_kernel(side) for side in sides]
    return {
        "kernels": kernels,
        "helpers": {name: next(filter(None, (k["helpers"][name] for k in kernels)), "") for name in kernels[0]["helpers"]},
        "exact": _exact(plan),
        "diagonals": any(target.kind == DIAGONAL for target in plan.extras),
        "softmax": spec.softmax,
        "total": spec.total is not None,
        "by_row": spec.softmax or spec.total is not None,
        "empty": spec.empty,
        "lost": plan.may_be_lost,
        "redo": plan.redo is not None,
        "log2e": repr(LOG2E),
        "head_dim": spec.head_dim,
        "value_dim": spec.value_dim,
        **products_of(spec),
        "l2_half": l2_bytes // 2,
        **launch_of(spec, plan),
    }


# ------------------------------------------------------------------------------------------------------------ a kernel


def _kernel(side: Side) -> dict[str, Any]:
    spec, plan = side.spec, side.plan
    beside = "[:, None]" if side.queries else "[None, :]"
    printer = Printer(spec, known={**NAMES, TOTAL_GRAD: f"delta{beside}"})
    scale, shaped, natural = in_units(spec)
    if side.queries:
        sinks = sink_lines(sink_values(printer, plan.spec.sinks, natural=True), f" * {LOG2E!r}") if plan.redo else []
    else:
        sinks = []
    score = score_lines(printer, spec, scale, shaped, natural)
    factor, _ = leading(dict(adjoints(spec, spec.score)).get(SCORE, Const(0.0)))
    bodies = {
        "full": body_of(printer, side, spec.score, factor, masked=False),
        "masked": body_of(printer, side, spec.score, factor, masked=True),
    }
    if plan.redo is not None:
        again = plan.redo.score if side.queries else mirrored(plan.redo.score)
        bodies["again"] = {
            "score": bare(printer.value(again, masked=True)),
            **body_of(printer, side, again, factor, masked=True),
        }
    for name in ("full", "masked"):
        bodies[name]["reads"] = list(dict.fromkeys([*score[f"{name}_reads"], *bodies[name]["reads"]]))
    cover = derive(spec.mask)
    bounds = loop_bounds(printer, cover, side.tile.warps)
    targets = [target_of(side, printer, target) for target in side.plan.extras if _by_queries(target) == side.queries]
    exact = [target for target in targets if target.get("shared")]
    for target in exact:
        target["largest"] = f"largest_ptr + {_exact(side.plan).index(target['name'])}"
    total = printer.hoisted(spec.total.read_by(spec.score)) if side.queries and spec.total is not None else ""
    scaled = [f"scale = {scale!r}  # scores times this are in base 2"] if score["times"] else []
    return {
        "name": side.name,
        "queries": side.queries,
        "tile": side.tile,
        "held": [x.name for x in side.held],
        "stepped": [x.name for x in side.stepped],
        "at": {x.name: address_of(side, printer, x) for x in (*side.held, *side.stepped)},
        "score": score,
        "bodies": bodies,
        "times": f" * {factor!r}" if factor != 1 else "",
        "extra_bases": [base_of(x, printer) for x in spec.extras],
        "out": address_of(side, printer, Input("out", spec.output, spec.out_dtype)) if side.queries else {},
        "prologue": [*scaled, *printer.prologue],
        "total": total,
        "bounds": bounds,
        "sinks": sinks,
        "sums_to_one": not plan.spec.sinks,
        "below": repr(plan.redo.below) if plan.redo else "",
        "targets": targets,
        "corrected": [t for t in targets if t["kind"] in (ROWS, HEAD) and spec.softmax],
        "results": _results(side, printer),
        "heads": heads_of(side),
        "order": order_of(cover),
        "wide": ".to(tl.int64)" if spec.wide else "",
        "exact": [f"need_{target['name']}" for target in exact],
        "helpers": helpers_of(printer, bounds),
        **_arguments(side),
    }


def body_of(printer: Printer, side: Side, score: Expr, factor: float, *, masked: bool) -> dict[str, Any]:
    """The gradients that one block makes: of the raw product but for ``factor``, and of what else was loaded, also with
    weights in place of the gradients of scores: they are linear in these."""
    found = {load.source: grad for load, grad in adjoints(side.spec, score)}
    own = found.pop(SCORE.source, Const(0.0))
    lead, rest = leading(own)
    own = rest if lead == factor else op("mul", own, Const(1 / factor))
    texts = {
        target.source.name: bare(printer.value(found[target.source.name], masked=masked))
        for target in side.plan.extras
        if _by_queries(target) == side.queries and target.source.name in found
    }
    body = {"qk": bare(printer.value(own, masked=masked)), "extras": texts, "gain": gain_of(printer, side.spec, masked)}
    if side.queries and side.spec.total is not None:
        body["total"] = bare(printer.value(of_total(side.spec), masked=masked))
        body["added_up"] = bare(printer.value(side.spec.total.weight, masked=masked))
    printer.known |= {SCORE_GRAD: "p", WEIGHT_GRAD: "0.0"}
    body["weights"] = {name: bare(printer.value(found[name], masked=masked)) for name in texts}
    printer.known |= NAMES
    return {**body, "weighs": side.spec.gain != ONE, "reads": printer.blocks()}


def _by_queries(target: Target) -> bool:
    """Whether the kernel that holds queries makes it."""
    return target.kind != KEYS


# ----------------------------------------------------------------------------------------------------------- addresses


def address_of(side: Side, printer: Printer, source: Input) -> dict[str, str]:
    """Where the slice of a program begins, and what separates rows (queries or keys) and features in it."""
    inner = next(axis for axis in (INNER, FEATURE) if any(place.has(axis) for place in source.index))
    row = KEY if any(place.has(KEY) for place in source.index) else ROW
    return {
        "base": base_of(source, printer),
        "row": stride_of(source, row),
        "step": f"{source.name}_step" if side.spec.wide else stride_of(source, row),
        "inner": stride_of(source, inner),
        "features": inner.name,
    }


def _results(side: Side, printer: Printer) -> list[dict[str, Any]]:
    """The gradients of what the kernel holds."""
    plan = side.plan
    targets = [plan.query] if side.queries else [plan.keys, plan.values]
    places = [target.place if side.queries else turned(target.place) for target in targets]
    return [{"name": place.name, **address_of(side, printer, place)} for place in places]


def _exact(plan: Backward) -> list[str]:
    """What several programs add to, which may be asked to have the same bits each time."""
    return [target.source.name for target in plan.extras if target.shared]


def target_of(side: Side, printer: Printer, target: Target) -> dict[str, Any]:
    """How the gradient of an extra leaves the kernel."""
    place = target.place if side.queries else turned(target.place)
    found = {"name": target.source.name, "need": f"NEED_{target.source.name.upper()}", "kind": target.kind}
    if target.kind in (ROWS, KEYS, HEAD):
        return found
    steps = {d: p for d, p in enumerate(place.index) if p.has(ROW, KEY)}
    rows = {ROW: printer.places.row, KEY: printer.places.key}
    corner = {ROW: "first", KEY: "block"}
    texts = [f"{printer.wide(p, rows)} * {place.name}_stride_{d}" for d, p in steps.items()]
    moved = {"base": base_of(place, printer), "offset": " + ".join(texts), "shared": target.shared}
    if target.kind == DIAGONAL:
        ((dim, at),) = steps.items()
        moved |= {"corner": bare(printer.wide(at, corner)), "stride": f"{place.name}_stride_{dim}"}
    return {**found, **moved}


# ----------------------------------------------------------------------------------------------------------- arguments


def _arguments(side: Side) -> dict[str, Any]:
    """Names of the kernel's parameters, and what ``launch`` calls them with."""
    spec, plan = side.plan.spec, side.plan
    made = [target for target in plan.extras if _by_queries(target) == side.queries]
    results = [plan.query] if side.queries else [plan.keys, plan.values]
    tensors = [x.name for x in spec.inputs] + ["grad", *(["out"] if side.queries and spec.softmax else [])]
    tensors += ["lse"] * spec.softmax + ["delta"] * (spec.softmax or spec.total is not None)
    tensors += [t.place.name for t in (*results, *made)]
    tensors += (["redo", "peak", "share"] if plan.redo else []) + (["lost"] if plan.may_be_lost else [])
    shared = {t.place.name: f"units_{t.source.name} if way == 2 else {t.place.name}" for t in made if t.shared}
    tensors += ["largest"] if shared else []
    laid_out = [*spec.inputs, *(t.place for t in (*results, *made) if t.kind not in (ROWS, KEYS, HEAD))]
    strides = [f"{x.name}_stride_{d}" for x in laid_out for d in used_dims(x)]
    strides += [f"{name}_stride_{d}" for name in tensors if name in ("grad", "out") for d in range(len(spec.output))]
    sizes = [f"size_{a.name}" for a in (*spec.batch, ROW, KEY)]
    called = list(sizes) if side.queries else [*sizes[:-2], sizes[-1], sizes[-2]]
    more = ["terms"] if shared else []
    more += [] if side.queries else [f"sources_{a.name}" for a, by in plan.members if by]
    needs = [f"need_{target.source.name}" for target in made]
    return {
        "tensors": [f"{name}_ptr" for name in tensors],
        "call_tensors": [shared.get(name, name) for name in tensors],
        "stride_names": strides,
        "call_strides": [called_with(name) for name in strides],
        "sizes": [*sizes, *more],
        "call_sizes": [*called, *more],
        "needs": needs,
        "unspecialised": json.dumps([*sizes, *more, "heads_per_group"]),
        "rows_name": called[-2],
        "cols_name": called[-1],
        "step_bytes": sum(x.dtype.itemsize * n for x, n in zip(side.stepped, (spec.head_dim, spec.value_dim), strict=True)),
    }
