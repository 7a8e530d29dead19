"""What detection and specialisation say about a module, beside what its graph really computes there.

The module is compiled with a backend that analyses each captured graph and then runs the lowered one, keeping every
value. So a spec is checked against the model's own numbers, and lowering against the module's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy as sp
import torch
from torch import Tensor, fx, nn

import attngen
from attngen import blockwise, compat
from attngen.errors import Miss
from attngen.evaluate import Evaluator
from attngen.passes import detect, lower, specialise
from attngen.passes.detect import Site
from attngen.passes.specialise import Specialised, Table
from attngen.passes.strides import memory_order

torch.set_num_threads(1)


@dataclass
class Analysis:
    """One captured graph: its sites and misses in order; what each node and the graph were when last run.

    Sites with the same output are terms of one sum.
    """

    lowered: lower.Lowered
    found: list[tuple[Site, Specialised] | Miss]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    seen: dict[tuple[fx.Node, fx.Node], Tensor] = field(default_factory=dict)  # by a reader, of what was written to
    results: list[Tensor] = field(default_factory=list)

    @property
    def hits(self) -> list[tuple[Site, Specialised]]:
        return [one for one in self.found if not isinstance(one, Miss)]

    @property
    def misses(self) -> list[Miss]:
        return [one for one in self.found if isinstance(one, Miss)]

    def errors(self, dtype: torch.dtype | None = None) -> list[float]:
        """For each hit, the largest difference between the spec's value and the graph's, relative to the latter."""
        return [self.error(site, special, dtype) for site, special in self.hits]

    def error(self, site: Site, special: Specialised, dtype: torch.dtype | None = None) -> float:
        terms = [(site, special), *(each for each in self.hits if each[0].output is site.output and each[0] is not site)]
        theirs = self.values[site.output]
        ours = sum((self.computed(*term, dtype) for term in terms), torch.zeros(())).to(theirs.dtype)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.equal(ours.isnan(), theirs.isnan())
        scale = float(theirs.nan_to_num().abs().max())
        return float((ours.double() - theirs.double()).nan_to_num().abs().max()) / max(scale, 1e-30)

    def sizes(self) -> dict[sp.Symbol, int]:
        """The size symbols of the graph in the latest run."""
        known = {}
        for node, value in self.values.items():
            size = node.meta.get("val")
            if isinstance(size, torch.SymInt) and isinstance(compat.size_expr(size), sp.Symbol):
                known[compat.size_expr(size)] = int(value)
            if node.op == "placeholder" and isinstance(size, torch.Tensor):
                pairs = zip(map(compat.size_expr, size.shape), value.shape, strict=True)
                known.update({s: n for s, n in pairs if isinstance(s, sp.Symbol)})
        return known

    def bound(self, site: Site, binding: fx.Node | Table) -> Tensor:
        """The tensor that a replaced ``site`` would be given for ``binding``."""
        if isinstance(binding, fx.Node):
            for reader in site.reader.readers.get(binding, ()):
                return self.seen[reader, binding]
            value: Tensor = self.values[binding]
            return value
        sizes = self.sizes()
        axes = (*binding.batch, binding.diagonal)
        positions: dict[sp.Symbol, Any] = dict(sizes)
        for place, axis in enumerate(axes):
            shape = [1] * len(axes)
            shape[place] = -1
            positions[axis] = torch.arange(int(axis.extent.subs(sizes))).reshape(shape)
        table = Evaluator(positions, self.values.__getitem__, dtype=torch.float32)(binding.expr)
        return table.expand([int(axis.extent.subs(sizes)) for axis in axes])

    def computed(
        self, site: Site, special: Specialised, dtype: torch.dtype | None = None, *, rounded: bool = True
    ) -> Tensor:
        """The spec evaluated on the values that the graph had for its inputs; not ``rounded``: kept in ``dtype``."""
        operands = [self.values[o.node] for o in (site.query, site.keys, site.values)]
        inputs = [*operands, *(self.bound(site, b) for b in special.bindings)]
        for tensor, declared in zip(inputs[3:], special.spec.extras, strict=True):
            assert tensor.dtype == declared.dtype
        spec = special.spec if rounded or dtype is None else replace(special.spec, out_dtype=dtype)
        order = memory_order(site.output)
        result = blockwise.forward(spec, inputs, dtype=dtype)[0]
        result = result if site.row in site.axes else result.squeeze(0)
        return result.permute([order.index(d) for d in range(len(order))])


class _Recorder(fx.Interpreter):
    def __init__(self, graph: fx.Graph, analysis: Analysis) -> None:
        assert graph.owning_module is not None
        super().__init__(graph.owning_module, garbage_collect_values=False)
        self._values, self._seen = analysis.values, analysis.seen

    def run_node(self, n: fx.Node) -> Any:
        read = {below: self.env[below] for below in n.all_input_nodes}
        self._seen.update({(n, b): x.clone() for b, x in read.items() if isinstance(x, Tensor) and x._version})
        result = super().run_node(n)
        # A later in-place operator may write to this memory: keep what the value is now.
        self._values[n] = result.detach().clone() if isinstance(result, Tensor) else result
        return result


def analyse_graph(gm: fx.GraphModule, inputs: Any = ()) -> Analysis:
    lowered = lower.run(gm, inputs)
    found: list[tuple[Site, Specialised] | Miss] = []
    for one in detect.run(lowered):
        if isinstance(one, Miss):
            found.append(one)
            continue
        terms = [specialise.run(site) for site in one]
        missed = [special for special in terms if isinstance(special, Miss)]
        found += missed[:1] or zip(one, terms, strict=True)  # type: ignore[arg-type]
    return Analysis(lowered, found)


def assert_replaced_with_its_gradient(
    function: Callable[..., Tensor], inputs: Callable[[], list[Tensor]], count: int = 1
) -> None:
    """Compiled, ``function`` has ``count`` sites, all replaced; its result and its gradients are eager's."""
    ours, theirs = inputs(), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="attngen", options={"inner": "eager"})
    with attngen.record() as reports:
        out = compiled(*ours)
    assert [site.status for report in reports for site in report.sites] == ["replaced"] * count
    expected = function(*theirs)
    torch.testing.assert_close(out, expected)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad)
    expected.backward(grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def watched(module: nn.Module, *, dynamic: bool | None = None) -> tuple[Callable[..., Any], list[Analysis]]:
    """``module`` compiled, and the list to which each captured graph is added when it is first needed."""
    torch._dynamo.reset()
    analyses: list[Analysis] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        analysis = analyse_graph(gm, example_inputs)
        analyses.append(analysis)
        constants = lower._tensor_attributes(gm)[1]

        def run(*args: Any) -> Any:
            analysis.values.clear()
            out = _Recorder(analysis.lowered.graph, analysis).run(*args, *constants)
            analysis.results = [value for value in out if isinstance(value, Tensor)]
            return out

        return run

    return torch.compile(module, backend=backend, dynamic=dynamic), analyses


def analyse(module: nn.Module, inputs: Mapping[str, Any], *, grad: bool = False) -> Analysis:
    """The one graph that ``module`` is captured as."""
    compiled, analyses = watched(module)
    with torch.set_grad_enabled(grad):
        compiled(**inputs)
    (analysis,) = analyses
    return analysis


# -------------------------------------------------------------------------------------------------- attention by hand

Function = Callable[..., Any]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1)


class Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, **inputs: Tensor) -> Any:
        return self.function(**inputs)


def inputs_of(function: Function) -> dict[str, Tensor]:
    """q, k, v of [batch 2, heads 4, length 12, width 16]; ``m``: truth values with a full row; ``w``: [12, 12]."""
    torch.manual_seed(0)
    known = {name: torch.randn(2, 4, 12, 16) for name in "qkv"}
    known["m"] = torch.rand(12, 12) > 0.6
    known["m"][3] = True
    known["w"] = torch.randn(12, 12)
    return {name: known[name] for name in inspect.signature(function).parameters}


def analysed(function: Function) -> Analysis:
    return analyse(Module(function), inputs_of(function))
