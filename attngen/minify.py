"""One site of a model as a script of its own: what to send with a report of a wrong result, or to look at a miss by itself.

The script holds the site's part of the lowered graph as PyTorch code, inputs of the same shapes and strides, and a check.
"""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import fx

import attngen
from attngen import capture, pipeline, sample
from attngen import options as option_parsing
from attngen.errors import BadOption
from attngen.passes import extract, lower, provenance, source
from attngen.passes.extract import Region
from attngen.passes.lower import Lowered
from attngen.pipeline import Found, Missed
from attngen.report import Report, SiteReport, groups, unnumbered

_PARAMETER = re.compile(r"_(?:modules|parameters|buffers)_")

TEMPLATE = '''\
"""{title}
Cut out by attngen {version} (torch {torch}). {recorded}

    python {file}             runs it eagerly, in float64 and under attngen; ends with 1 if attngen is wrong
    attngen optimize {file}   compiles its kernel and checks it, without a GPU at a small size
"""

import sys

import attngen
import torch
from attngen.verify import within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADIENTS = {gradients}


def attention({parameters}):
{body}


def inputs():
    """Floating point is random, from a fixed seed; small integers and truth values are the model's own."""
    generator = torch.Generator().manual_seed(0)
    return (
{inputs}
    )


{helpers}class Float64(torch.overrides.TorchFunctionMode):
    """Whatever asks for a floating dtype gets float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def exact(value):
            return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

        args, kwargs = torch.utils._pytree.tree_map(exact, (args, kwargs or {{}}))
        return function(*args, **kwargs)


def results(function, arguments):
    """Outputs, and the gradients of what asks for them."""
    torch.manual_seed(0)
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not GRADIENTS:
        return outputs
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    wanted = [argument for argument in arguments if argument.requires_grad]
    return (*outputs, *torch.autograd.grad(outputs, wanted, weights, allow_unused=True))


def fresh(dtype=None):
    """The inputs, those in floating point as ``dtype``."""
    arguments = [x.to(dtype) if dtype and x.is_floating_point() else x for x in inputs()]
    return [x.detach().requires_grad_(GRADIENTS and x.is_floating_point()) for x in arguments]


def main():
    print(f"torch {{torch.__version__}}, attngen {{attngen.__version__}}, {{DEVICE}}")
    with torch.set_grad_enabled(GRADIENTS):
        eager = results(attention, fresh())
        with Float64():
            exact = results(attention, fresh(torch.float64))
        with attngen.record() as reports:
            compiled = torch.compile(attention, backend="attngen", options={{"inner": "eager", "strict": True}})
            actual = results(compiled, fresh())
    sites = [site for report in reports for site in report.sites]
    for site in sites:
        print(f"{{site.status}}: {{site.reason or f'{{site.computes}}, tile {{site.tile}}'}}")
    if not sites:
        print("attngen sees no attention here")
    pairs = [each for each in zip(actual, exact, eager) if each[0] is not None and each[0].is_floating_point()]
    checks = [within_budget(*each, slack=3.0 if GRADIENTS else 2.0) for each in pairs]
    for check in checks:
        print(f"{{'right' if check.ok else 'WRONG'}}: {{check}}")
    return 0 if all(check.ok for check in checks) else 1


model, example_inputs = attention, inputs()

if __name__ == "__main__":
    sys.exit(main())
'''


@dataclass(frozen=True)
class Entry:
    """A site, and how to write down its part of the graph."""

    report: SiteReport
    region: Callable[[], Region]
    lowered: Lowered
    captured: Mapping[fx.Node, fx.Node]  # lowered node -> the captured node that it is traced from
    values: Mapping[fx.Node, Any]  # lowered placeholder -> what the model was called with
    training: bool


@dataclass(frozen=True)
class Minified:
    """``text`` of a script for one site. ``alone`` is what became of it by itself, where that is something else."""

    text: str
    site: SiteReport
    alone: str


def run(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], site: str, file: str) -> Minified:
    """A script named ``file`` for the site at ``site``.

    Raises ``BadOption``, listing the sites, if there is none.
    """
    options = option_parsing.parse({})
    entries: dict[int, Entry] = {}

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Report:
        device = pipeline.planning_device(example_inputs, options)
        lowered = lower.run(gm, example_inputs)
        training = pipeline.trains(gm, example_inputs)
        found = pipeline.analyse(lowered, device, options, training)
        sites = [pipeline.reported(each, device) for each in found]
        shared = _captured(lowered), _values(lowered, example_inputs), training
        for report, each in zip(sites, found, strict=True):
            entries[id(report)] = Entry(report, _region(each, lowered), lowered, *shared)
        return Report(device.label, tuple(sites))

    report = capture.over_graphs(model, args, kwargs, options, look, may_run=True)
    chosen = _chosen(report, site)
    text = _script(entries[id(chosen)], file)
    return Minified(text, chosen, _alone(text, file, chosen))


def _alone(text: str, file: str, site: SiteReport) -> str:
    """How the outcome of the script differs from that of the site in its model; empty if it does not."""
    script = ModuleType("_attngen_minified")
    sys.modules[script.__name__] = script  # Dynamo looks there for a model's globals
    exec(compile(text, file, "exec"), vars(script))
    found = capture.explain(script.model, script.example_inputs, {}, {})
    outcomes = [(each.status, unnumbered(each.reason), each.computes) for each in found.sites]
    if (site.status, unnumbered(site.reason), site.computes) in outcomes:
        return ""
    return "; ".join(f"{status}: {reason or computes}" for status, reason, computes in outcomes) or "nothing is found"


def _region(each: Found | Missed, lowered: Lowered) -> Callable[[], Region]:
    if isinstance(each, Found):
        loaded = [node for one in each.terms for node in one.specialised.bindings if isinstance(node, fx.Node)]
        return lambda: extract.of_sites([one.site for one in each.terms], loaded, lowered)
    if each.sites:
        return lambda: extract.of_sites(each.sites, [], lowered)
    if each.end is None:
        raise AssertionError(f"{each.where} names no node of the graph: {each.reason}")
    end, blamed = each.end, next((n for n in lowered.graph.nodes if n.name == each.node), None)
    return lambda: extract.of_miss(end, blamed, lowered)


def _captured(lowered: Lowered) -> dict[fx.Node, fx.Node]:
    return {node: captured for captured, emitted in lowered.emitted.items() for node in emitted}


def _values(lowered: Lowered, example_inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """What each placeholder stood for; those after the inputs are attributes of the graph."""
    return dict(zip(lowered.graph.find_nodes(op="placeholder"), example_inputs, strict=False))


# --------------------------------------------------------------------------------------------------------------- choose


def _chosen(report: Report, wanted: str) -> SiteReport:
    """The site at a module path, a pattern of paths, a source line, or a row of ``explain``; of several the first.

    ``PATH#2`` is the second.
    """
    path, _, number = wanted.partition("#")
    rows = {id(site): row for row in groups(report.sites) for site in row.sites}

    def names(site: SiteReport) -> tuple[str, ...]:
        return tuple(filter(None, (site.where, site.module, site.node, rows[id(site)].path, rows[id(site)].line)))

    matching = [site for site in report.sites if any(path == n or fnmatch.fnmatchcase(n, path) for n in names(site))]
    place = int(number) - 1 if number.isdigit() else 0
    if 0 <= place < len(matching):
        return matching[place]
    found = groups(report.sites)
    listed = "\n".join(f"  {each.path or each.line}  ({each.line}, {each.first.status})" for each in found)
    sites = f"The sites are:\n{listed}" if listed else "No attention was found in this model."
    raise BadOption(f'there is no site "{wanted}" in this model. {sites}')


# --------------------------------------------------------------------------------------------------------------- script


def _script(entry: Entry, file: str) -> str:
    region, report = entry.region(), entry.report
    names = source.names_of(region, _wanted(region, entry))

    def line_of(node: fx.Node) -> str:
        captured = entry.captured.get(node)
        return provenance.exact_place(captured).short if captured is not None else ""

    body = source.statements(region, names, line_of)
    texts = [sample.text(node.meta["val"], entry.values.get(node)) for node in region.inputs]
    return TEMPLATE.format(
        title=f"{report.where}: {'replaced' if report.status == 'found' else report.status}.",
        version=attngen.__version__,
        torch=torch.__version__,
        recorded=f"It computes {report.computes}." if report.computes else f"Reason: {report.reason}.",
        file=file,
        gradients=entry.training,
        parameters=", ".join(names[node] for node in region.inputs),
        body="\n".join(f"    {line}" for line in body),
        inputs="\n".join(f"        {text},  # {names[n]}" for text, n in zip(texts, region.inputs, strict=True)),
        helpers="".join(f"{helper}\n\n" for helper in sample.helpers(texts)),
    )


def _wanted(region: Region, entry: Entry) -> dict[fx.Node, str]:
    """Names for people: the operands by what they are, inputs of the model by their own."""
    wanted = {node: _parameter(node, entry) for node in region.inputs if node.op == "placeholder"}
    wanted |= dict(zip(region.operands, ("query", "keys", "values"), strict=False))
    return {node: name for node, name in wanted.items() if name}


def _parameter(node: fx.Node, entry: Entry) -> str:
    """``l_self_modules_h_modules_0_parameters_weight_`` -> ``0_weight``, ``l_kwargs_mask_`` -> ``mask``."""
    captured = next(iter(entry.lowered.origins.get(node, ())), None)
    if captured is None:
        return ""
    parts = _PARAMETER.split(captured.name.strip("_"))
    return "_".join(parts[-2:]) if len(parts) > 1 else re.sub("^l_((kw)?args_|self_)?", "", parts[0])
