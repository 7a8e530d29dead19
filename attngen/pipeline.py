"""The whole compiler in one function: capture -> detect -> specialise -> choose -> emit -> replace.

``optimize`` changes the graph it is given, site by site; whatever cannot be proved stays as it was and is reported with a
reason. It never runs a kernel. ``explain`` stops before anything is written or changed.
"""

from __future__ import annotations

import fnmatch
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy as sp
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from attngen import compat, decide, describe, runtime
from attngen.aot import Layout, layout_of
from attngen.cache.key import BACKWARD, FORWARD, Wanted
from attngen.cache.lookup import Choice, Choices
from attngen.choose import Plan
from attngen.choose_bwd import BackwardPlan
from attngen.device import Device, probe, resolve
from attngen.emit import BackwardKernel, Kernel
from attngen.errors import Miss
from attngen.options import Options
from attngen.passes import closing, detect, effects, extract, lower, provenance, specialise, strides
from attngen.passes import replace as replacing
from attngen.passes.detect import Site
from attngen.passes.lower import Lowered
from attngen.passes.specialise import Specialised
from attngen.prepare import Use
from attngen.report import Report, SiteReport
from attngen.spec import FEATURE, INNER, KEY, ROW, AttentionSpec, Input, Problem
from attngen.verify import extents, shape_of

log = logging.getLogger("attngen")


@dataclass(frozen=True)
class Found:
    """A site that can be replaced, with the problem it poses and the choices made for it and, if it has any, its gradients.

    ``given`` are those of them that had been made before. ``inputs`` are the tensors that its operator will be called on;
    ``terms`` are all that add up to its output, itself among them: they are replaced together. ``in_16_bits`` is why its
    products are not of 8-bit numbers, where that was asked for. ``loads`` says where what scores and masks load comes from.
    """

    placed: replacing.Placed
    where: str
    problem: Problem
    plan: Plan
    inputs: tuple[Layout, ...]
    backward: BackwardPlan | Miss | None = None
    given: tuple[Choice | None, Choice | None] = (None, None)
    terms: tuple[replacing.Placed, ...] = ()
    in_16_bits: str = ""
    loads: tuple[tuple[str, str], ...] = ()

    @property
    def anchor(self) -> fx.Node:
        return self.placed.anchor


@dataclass(frozen=True)
class Missed:
    """A place that is left as it was. ``anchor`` is the captured node it is at, ``blamed`` the one the reason is about.

    ``end`` is the lowered node of its product with the values; ``sites`` are the attention, if it was proved to be one.
    """

    where: str
    reason: str
    node: str = ""
    anchor: fx.Node | None = None
    blamed: fx.Node | None = None
    end: fx.Node | None = None
    sites: detect.Terms = ()


def optimize(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    choices: Choices | None = None,
    device: Device | None = None,
) -> tuple[Report, list[Use]]:
    """Replace every proved site of ``gm`` in place. Returns the report and each distinct kernel with its first use."""
    started = time.perf_counter()
    device = device or planning_device(example_inputs, options)
    lowered = lower.run(gm, example_inputs)
    found = analyse(lowered, device, options, trains(gm, example_inputs), choices)
    analysed = time.perf_counter()
    uses: dict[str, Use] = {}
    sites: list[SiteReport] = []
    for each in found:
        if isinstance(each, Missed):
            sites.append(describe.missed(each))
        elif each.placed is each.terms[0]:
            terms = [one for one in found if isinstance(one, Found) and one.terms is each.terms]
            sites += _replace(terms, lowered, device, uses, options)
    gm.graph.lint()
    gm.recompile()
    seconds = {"analyse": analysed - started, "replace": time.perf_counter() - analysed}
    return Report(device.label, tuple(sites), seconds=seconds), list(uses.values())


def explain(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    device: Device | None = None,
    choices: Choices | None = None,
) -> Report:
    """What ``optimize`` would do; nothing is written or changed."""
    started = time.perf_counter()
    device = device or planning_device(example_inputs, options)
    found = analyse(lower.run(gm, example_inputs), device, options, trains(gm, example_inputs), choices)
    sites = [reported(each, device) for each in found]
    return Report(device.label, tuple(sites), notes(), seconds={"analyse": time.perf_counter() - started})


def reported(each: Found | Missed, device: Device) -> SiteReport:
    return describe.missed(each) if isinstance(each, Missed) else describe.found(each, device, "found")


def notes() -> tuple[str, ...]:
    """What a user should know of this machine beside the sites."""
    problem = runtime.triton_problem()
    return () if problem is None else (problem,)


def planning_device(example_inputs: Sequence[Any], options: Options) -> Device:
    """The card the inputs are on, else the target that was asked for; it may run kernels of the families asked for."""
    device = resolve(options.target) if card(example_inputs) is None else probe()
    return replace(device, gluon=options.families == "all")


def card(example_inputs: Sequence[Any]) -> torch.device | None:
    """The GPU that the inputs are on, if they are on one."""
    tensors = (x for x in tree_leaves(example_inputs) if isinstance(x, torch.Tensor))
    return next((x.device for x in tensors if x.device.type == "cuda"), None)


# -------------------------------------------------------------------------------------------------------------- analyse


def trains(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Somebody may ask for gradients of this graph's results."""
    known = [*example_inputs, *(n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder"))]
    return torch.is_grad_enabled() and any(getattr(value, "requires_grad", False) for value in tree_leaves(known))


def analyse(
    lowered: Lowered, device: Device, options: Options, training: bool, choices: Choices | None = None
) -> list[Found | Missed]:
    """Every site of the graph with its spec and tile, and every near miss with its reason."""
    choices = choices or Choices(mode=options.cache)
    facts = effects.run(lowered.graph)
    captured = _captured_by_name(lowered)
    nodes = {node.name: node for node in lowered.graph.nodes}
    found: list[Found | Missed] = []
    for each in detect.run(lowered):
        earlier = [one.placed for one in found if isinstance(one, Found)] if training else []
        outcome = each if isinstance(each, Miss) else _all(each, earlier, lowered, facts, device, options, training, choices)
        if not isinstance(outcome, Miss):
            found += outcome
            continue
        sites = () if isinstance(each, Miss) else each
        named = nodes.get(outcome.node)
        end = sites[0].output if sites else named and extract.product_of(named)
        name = outcome.node or (end.name if end else "")
        anchor = captured.get(end.name) if end else None
        where = name if anchor is None else provenance.where(anchor)
        blamed = captured.get(outcome.blamed or name, captured.get(name, anchor))
        found.append(Missed(where, outcome.reason, name, anchor, blamed, end, sites))
    return found


def _all(sites: detect.Terms, *about: Any) -> list[Found] | Miss:
    """What adds up to one output, which is replaced as a whole or not at all."""
    outcomes = [_analysed(site, *about) for site in sites]
    found = [outcome for outcome in outcomes if isinstance(outcome, Found)]
    if len(found) < len(outcomes):
        return next(outcome for outcome in outcomes if isinstance(outcome, Miss))
    terms = tuple(each.placed for each in found)
    return [replace(each, terms=terms) for each in found]


def _analysed(
    each: Site, earlier: Sequence[replacing.Placed], lowered: Lowered, facts: effects.Effects, device: Device,
    options: Options, training: bool, choices: Choices,
) -> Found | Miss:  # fmt: skip
    specialised = specialise.run(each)
    if isinstance(specialised, Miss):
        return specialised
    placed = replacing.place(each, specialised, lowered, facts, training=training)
    if isinstance(placed, Miss):
        return placed
    if (unwanted := _unselected(provenance.module_path(placed.anchor), options)) is not None:
        return unwanted
    specialised = closing.run(each, specialised, earlier)
    problem = _problem(each)
    spec, in_16_bits = decide.in_eighths(_finished(specialised, each, training), problem, device, options.fp8)
    where = provenance.where(placed.anchor)
    wanted = Wanted(FORWARD, spec, problem, _layouts(each, specialised, problem), device, where)
    plan, given = decide.forward(wanted, choices)
    if isinstance(plan, Miss):
        return plan
    if isinstance(kernel := decide.emitted(plan, device, where), Miss):
        return kernel
    backward, given_backward = decide.gradients(replace(wanted, phase=BACKWARD, deterministic=options.deterministic), choices)
    placed = replace(placed, specialised=replace(specialised, spec=spec))
    return Found(
        placed, where, problem, plan, wanted.inputs, backward, (given, given_backward), in_16_bits=in_16_bits,
        loads=_loads(specialised, lowered),
    )  # fmt: skip


def _loads(specialised: Specialised, lowered: Lowered) -> tuple[tuple[str, str], ...]:
    """What each tensor is that scores and masks load, by its name in the spec."""
    named = zip(specialised.spec.extras, specialised.bindings, strict=True)
    return tuple((extra.name, provenance.made(binding, lowered)) for extra, binding in named)


def _unselected(path: str, options: Options) -> Miss | None:
    def matches(patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(path, p) or path.startswith(f"{p}.") for p in patterns)

    if options.only and not matches(options.only):
        return Miss(f"not selected by only={list(options.only)}")
    if matches(options.skip):
        return Miss(f"skipped by skip={list(options.skip)}")
    return None


def _captured_by_name(lowered: Lowered) -> dict[str, fx.Node]:
    captured: dict[str, fx.Node] = {}
    for node, emitted in lowered.emitted.items():
        for new in emitted:
            captured.setdefault(new.name, node)
    return captured


def _finished(specialised: Specialised, site: Site, training: bool) -> AttentionSpec:
    """The spec with what depends on the run: precision of float32 products, gradients, index width."""
    spec = specialised.spec
    single = spec.query.dtype == torch.float32
    tf32 = single and torch.backends.cuda.matmul.fp32_precision == "tf32"  # however the user set it
    return replace(spec, lse=training, tf32=tf32, wide=_is_wide(specialised, site))


def _is_wide(specialised: Specialised, site: Site) -> bool:
    """Some offset within one head passes 2^31 elements, or a length is not fixed, so that it might."""
    if site.row.extent.free_symbols | site.key.extent.free_symbols:
        return True
    nodes = [site.query.node, site.keys.node, site.values.node, *specialised.bindings]
    pairs = [(x, n.meta["val"]) for x, n in zip(specialised.spec.inputs, nodes, strict=True) if isinstance(n, fx.Node)]
    rows = (int(site.row.extent) - 1) * _elements_per_row(site)
    return max(rows, *(_reach(source, value) for source, value in pairs)) >= 2**31


def _reach(source: Input, value: torch.Tensor) -> int:
    """The largest offset within one head, in elements."""
    moving = [d for d, place in enumerate(source.index) if place.has(ROW, KEY, INNER, FEATURE)]
    return sum((compat.hint(value.shape[d]) - 1) * compat.hint(value.stride(d)) for d in moving)


def _elements_per_row(site: Site) -> int:
    """The stride of a query row in the output, which is dense."""
    if site.row not in site.axes:
        return 0
    value, order = site.output.meta["val"], strides.memory_order(site.output)
    place = order.index(site.axes.index(site.row))
    return math.prod(compat.hint(value.shape[d]) for d in order[place + 1 :])


def _problem(site: Site) -> Problem:
    values = {site.query.node, site.keys.node, site.values.node, site.output}
    known: dict[sp.Symbol, sp.Integer] = {}
    for node in values:
        for size in node.meta["val"].shape:
            expr = compat.size_expr(size)
            if expr.is_Symbol:
                known[expr] = sp.Integer(compat.hint(size))

    def measured(extent: sp.Expr) -> int:
        value = extent.xreplace(known)
        return int(value) if value.is_Integer else 1

    extents = [a.extent for a in (*site.batch, site.row, site.key)]
    sizes = [measured(e) for e in extents]
    return Problem(tuple(sizes[:-2]), sizes[-2], sizes[-1], dynamic=any(e.free_symbols for e in extents))


# -------------------------------------------------------------------------------------------------------------- replace


def _replace(
    terms: Sequence[Found], lowered: Lowered, device: Device, uses: dict[str, Use], options: Options
) -> list[SiteReport]:
    """Put kernels in place of all that adds up to one output. A report for each, or one that says why it stays."""
    first = terms[0]
    try:
        kernels = [_kernel(each, device) for each in terms]
        specs = [each.placed.specialised.spec for each in terms]
        backwards = [_backward(each, device) for each in terms]
        made = zip(specs, kernels, backwards, strict=True)
        targets = [runtime.operator(*of_site, deterministic=options.deterministic) for of_site in made]
        miss = replacing.run(first.terms, lowered, targets)
    except Exception as problem:
        if options.raises:
            raise
        log.warning("%s is left as it was: %s: %s", first.where, type(problem).__name__, problem)
        return [describe.missed(Missed(first.where, f"internal error: {problem}", anchor=first.anchor))]
    if miss is not None:
        return [describe.missed(Missed(first.where, miss.reason, miss.node, first.anchor, first.anchor))]
    reports = []
    for each, kernel, backward, target in zip(terms, kernels, backwards, targets, strict=True):
        uses.setdefault(kernel.name, Use(kernel, each.problem, each.inputs, backward))
        described = describe.found(each, device, "replaced")
        reports.append(replace(described, kernel=kernel.name, operator=str(target.name())))
    return reports


def _kernel(each: Found, device: Device) -> Kernel:
    kernel = decide.emitted(each.plan, device, each.where)
    assert isinstance(kernel, Kernel)  # or it had been missed
    return kernel


def _backward(each: Found, device: Device) -> BackwardKernel | None:
    """The kernels of the site's gradients, if it has gradients and there are such kernels."""
    if not isinstance(each.backward, BackwardPlan):
        return None
    return decide.emitted_backward(each.plan.spec, each.problem, each.backward, device, each.where)


def _layouts(site: Site, specialised: Specialised, problem: Problem) -> tuple[Layout, ...]:
    """The tensors that the operator will be called on."""
    spec = specialised.spec
    layouts = []
    for operand in (site.query, site.keys, site.values):
        layout = layout_of(operand.node.meta["val"])
        layouts.append(replace(layout, dtype=str(operand.dtype).removeprefix("torch.")))
    for source, binding in zip(spec.extras, specialised.bindings, strict=True):
        if isinstance(binding, specialise.Table):
            shape = shape_of(source, extents(spec, problem))
            layouts.append(layout_of(torch.empty(shape, device="meta")))
        elif isinstance(binding, fx.Node):
            layouts.append(layout_of(binding.meta["val"]))
        else:
            layouts.append(layout_of(torch.empty((), dtype=source.dtype, device="meta")))
    return tuple(layouts)
