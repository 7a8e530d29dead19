"""Lower a captured graph to a second, analysis-only graph of ATen operators, and remember which node came from which.

The captured graph stays as it is: it is what gets rewritten, so autocast regions, in-place operators, checkpointing and
parameter bookkeeping survive untouched. The lowered graph is never run. It is traced before autograd and before
decompositions, so ``matmul`` and ``softmax`` are still whole; ``passes.semantics`` decomposes the rest where it looks.
Autocast regions are entered for real while tracing, so the metadata shows the types the operators will really see. What was
traced before is copied: see ``passes.repeats``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from attngen import compat
from attngen.passes import arrange, features, joins, merges, planes, totals, versions
from attngen.passes.repeats import CannotCopy, Repeats, materialised, traced_node


@dataclass(frozen=True)
class Lowered:
    """A lowered graph and the way back.

    ``origins`` lists for each lowered node the captured nodes that hold exactly its value, in program order.
    ``emitted`` lists for each captured node the lowered nodes it was traced into.
    ``parameters`` are the placeholders that stand for weights of the model.
    ``refused`` are products of pieces of the weights that are not joined, and why.
    ``tables`` are those that replaced sites needed (and their seeds), each with the captured node that holds it now.
    """

    graph: fx.Graph
    origins: dict[fx.Node, list[fx.Node]]
    emitted: dict[fx.Node, list[fx.Node]]
    parameters: frozenset[fx.Node] = frozenset()
    tables: dict[Hashable, fx.Node] = field(default_factory=dict)
    refused: dict[fx.Node, str] = field(default_factory=dict)

    def parent(self, node: fx.Node) -> fx.Node | None:
        """The captured node whose tracing made the lowered ``node``."""
        return next((captured for captured, made in self.emitted.items() if node in made), None)


def run(gm: fx.GraphModule, example_inputs: Sequence[Any] = ()) -> Lowered:
    """Lower ``gm``. Placeholders are traced on their own fake tensors where they have them, else on ``example_inputs``.

    Raises whatever tracing raises: a graph that cannot be lowered is left alone by the caller.
    """
    names, attributes = _tensor_attributes(gm)
    fake_mode, inputs = _fake_inputs(gm, example_inputs, attributes)
    try:
        lowered, record = _traced(gm, names, fake_mode, inputs, _Record(None if _transforms(gm) else Repeats()))
    except CannotCopy:
        lowered, record = _traced(gm, names, fake_mode, inputs, _Record(None))
    _write_out_constants(lowered)
    versions.run(lowered.graph)
    planes.run(lowered.graph)
    features.run(lowered.graph)
    merged = merges.run(lowered.graph)
    joined = joins.run(lowered.graph)
    summed = totals.run(lowered.graph)
    moved = {**joined.moved, **{node: joined.moved.get(new, new) for node, new in merged.items()}}
    moved |= {node: made[-1] for node, made in summed.items()}
    kept = set(lowered.graph.nodes)
    origins: dict[fx.Node, list[fx.Node]] = {}
    for captured, node in record.values.items():
        node = moved.get(node, node)
        if node in kept:
            origins.setdefault(node, []).append(captured)
        if node.target is torch.ops.aten.detach_.default:  # a literal tensor is copied, then detached in place
            origins.setdefault(node.all_input_nodes[0], []).append(captured)
    for node in filter(lambda n: arrange.COPY in n.meta, lowered.graph.nodes):
        origins.setdefault(node, []).extend(origins.get(node.meta[arrange.COPY], []))
    made = {node: [m for n in new for m in summed.get(n, [moved.get(n, n)])] for node, new in record.emitted.items()}
    emitted = {node: [n for n in new if n in kept] for node, new in made.items()}
    placeholders = lowered.graph.find_nodes(op="placeholder")
    weights = (n for n, x in zip(placeholders, tree_leaves(inputs), strict=True) if isinstance(x, torch.nn.Parameter))
    return Lowered(lowered.graph, origins, emitted, frozenset(weights), refused=joined.refused)


def _traced(
    gm: fx.GraphModule, attributes: Sequence[str], fake_mode: compat.FakeTensorMode, inputs: Sequence[Any], record: _Record
) -> tuple[fx.GraphModule, _Record]:
    tracer = _Recorder(gm, attributes, record)
    with ExitStack() as stack:
        stack.enter_context(fake_mode)
        stack.enter_context(fx.traceback.preserve_node_meta())
        stack.enter_context(compat.enable_python_dispatcher())
        stack.enter_context(compat.tracing(None))
        stack.enter_context(_restored_autocast())
        lowered = compat.make_fx(
            tracer.lowered, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True
        )(*inputs)
    return lowered, record


def _transforms(gm: fx.GraphModule) -> bool:
    """Some of the graph runs under ``vmap`` or the like, where a tensor is more than it shows."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return any("functorch" in str(getattr(n.target, "__module__", "")) for graph in graphs for n in graph.nodes)


def _write_out_constants(lowered: fx.GraphModule) -> None:
    """``torch.tensor(0.0)`` is traced as an attribute on some releases: write the number into the graph instead."""
    for node in lowered.graph.find_nodes(op="get_attr"):
        value = getattr(lowered, str(node.target), None)
        if not isinstance(value, torch.Tensor) or isinstance(value, compat.FakeTensor) or value.numel() != 1:
            continue
        with torch.utils._python_dispatch._disable_current_modes():
            number = value.item()
        with lowered.graph.inserting_before(node):
            options = {"dtype": value.dtype, "device": node.meta["val"].device}
            written = lowered.graph.call_function(torch.ops.aten.full.default, (list(value.shape), number), options)
        written.meta = dict(node.meta)
        node.replace_all_uses_with(written)
        lowered.graph.erase_node(node)


@dataclass
class _Record:
    repeats: Repeats | None
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    emitted: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)


class _Recorder(fx.Interpreter):
    """Runs a captured graph under tracing and notes which lowered node each captured node's value is."""

    def __init__(self, gm: fx.GraphModule, attributes: Sequence[str], record: _Record) -> None:
        super().__init__(gm)
        self.record = record
        self._attribute_names = attributes
        self._attributes: dict[str, torch.Tensor] = {}
        self._depth = 0  # of vmap
        self._numbers: dict[fx.Node, int] = {}  # to be used for tensors that hold them

    def lowered(self, *inputs: Any) -> Any:
        count = len(inputs) - len(self._attribute_names)
        self._attributes = dict(zip(self._attribute_names, inputs[count:], strict=True))
        return self.run(*inputs[:count])

    def run_node(self, n: fx.Node) -> Any:
        before = _last_node()
        repeats, mode = self.record.repeats, compat.get_proxy_mode()
        call = repeats.call(n, self.env) if repeats and mode else None
        known, result = repeats.copy(call, mode.tracer.graph) if repeats and mode and call else (False, None)
        if not known:
            result = self._run(n)
        made = self.record.emitted[n] = _nodes_after(before)
        if repeats and call and not known:
            repeats.learn(call, result, made)
        if (node := traced_node(result)) is not None:
            self.record.values[n] = node
        return result

    def _run(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except compat.DataDependentOutputException:  # a size that is a tensor, made from numbers
            self._numbers = {below: number for below in n.all_input_nodes if (number := _constant(below)) is not None}
            if not self._numbers:
                raise
            return super().run_node(n)
        finally:
            self._numbers = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        fetched = super().fetch_args_kwargs_from_env(n)
        if self._numbers:
            fetched = fx.node.map_arg((n.args, n.kwargs), lambda below: self._numbers.get(below, self.env[below]))  # type: ignore
        return materialised(fetched)  # type: ignore[no-any-return]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._attributes[target] if target in self._attributes else super().get_attr(target, args, kwargs)

    def run(self, *args: Any, **options: Any) -> Any:
        with ExitStack() as self._region:
            return super().run(*args, **options)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (compat.enter_vmap, compat.exit_vmap):
            return self._nest(target, args, kwargs)
        if target in compat.INLINED_BODIES and isinstance(args[0], fx.GraphModule):
            return _Recorder(args[0], (), self.record).run(*args[1:])
        if target is compat.enter_autocast:
            region = torch.autocast(*args)
            region.__enter__()
            return region
        if target is compat.exit_autocast:
            return args[0].__exit__(None, None, None)
        return super().call_function(target, args, kwargs)

    def _nest(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Inside ``vmap`` a batched tensor is no plain value: there, what it is made of is traced."""
        if target is compat.enter_vmap and self._depth == 0:
            self._region.enter_context(compat.traced_below_transforms())
        level = super().call_function(target, args, kwargs)
        self._depth += 1 if target is compat.enter_vmap else -1
        if self._depth == 0:
            self._region.close()
        return level


def _constant(node: fx.Node) -> int | None:
    """The whole number that Dynamo knows a tensor of one element to be."""
    constant = getattr(node.meta.get("example_value"), "constant", None)
    if constant is None or constant.numel() != 1 or constant.is_floating_point():
        return None
    with torch.utils._python_dispatch._disable_current_modes():
        return int(constant)


def _last_node() -> fx.Node | None:
    mode = compat.get_proxy_mode()
    return None if mode is None else next(iter(reversed(mode.tracer.graph.nodes)), None)


def _nodes_after(last: fx.Node | None) -> list[fx.Node]:
    mode = compat.get_proxy_mode()
    found: list[fx.Node] = []
    if mode is None:
        return found
    for node in reversed(mode.tracer.graph.nodes):
        if node is last:
            break
        found.append(node)
    return found[::-1]


def _tensor_attributes(gm: fx.GraphModule) -> tuple[list[str], list[torch.Tensor]]:
    targets = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "get_attr")
    found = {}
    for target in targets:
        value: Any = gm
        for part in target.split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            found[target] = value
    return list(found), list(found.values())


def _fake_inputs(
    gm: fx.GraphModule, examples: Sequence[Any], attributes: list[torch.Tensor]
) -> tuple[compat.FakeTensorMode, list[Any]]:
    """The inputs to trace on, fakes of the placeholders' own mode where they have one."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    known = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders]
    if any(value is None for value in known):
        known = list(examples)
    leaves = tree_leaves(known)  # the graph of a backward gets lists of tensors
    mode = next((v.fake_mode for v in leaves if isinstance(v, compat.FakeTensor)), None)
    if mode is None:
        shape_env = next((v.node.shape_env for v in leaves if isinstance(v, torch.SymInt)), None)
        mode = compat.FakeTensorMode(allow_non_fake_inputs=True, shape_env=shape_env)

    def fake(value: Any) -> Any:
        real = isinstance(value, torch.Tensor) and not isinstance(value, compat.FakeTensor)
        return mode.from_tensor(value, static_shapes=True) if real else value

    return mode, tree_map(fake, [*known, *attributes])


class _restored_autocast:
    """Leaves autocast as it was, even if the graph enters a region that it does not leave."""

    def __enter__(self) -> None:
        self._saved = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")}

    def __exit__(self, *exc: object) -> None:
        for device, (enabled, dtype) in self._saved.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
