"""Write values of the lowered graph into the captured graph, where a replaced site needs them.

A lowered node is either the value of some captured node, or it is copied, operator by operator, from the captured nodes
below it. Tables are traced from their expression, so what the graph gets is ordinary ATen and differentiates as such.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy as sp
import torch
from torch import Tensor, fx

from attngen import compat
from attngen.algebra import Int, Load
from attngen.evaluate import Evaluator
from attngen.index import Axis
from attngen.passes.dropout import SEEDS, Seed, draws
from attngen.passes.effects import updated, written
from attngen.passes.lower import Lowered
from attngen.passes.memory import storage, values
from attngen.passes.semantics import is_tensor, op_name, shape_of
from attngen.passes.specialise import Number, Table


class NotHere(Exception):
    """A value does not exist at the place where it is needed; the message says why."""


class Writer:
    """Writes before ``anchor``, a node of the captured graph. ``written`` lists the new nodes, for taking them back.

    Random numbers are drawn here only if these are ``moved`` nodes, which are drawn nowhere else.
    """

    def __init__(self, lowered: Lowered, anchor: fx.Node, moved: frozenset[fx.Node] = frozenset()) -> None:
        self._lowered = lowered
        self._moved = moved
        self._anchor = anchor
        self._before = _nodes_before(anchor)
        self._copies: dict[fx.Node, fx.Node] = {}
        self.written: list[fx.Node] = []
        self._lost: dict[int, list[fx.Node]] = {}  # writes in place that are gone where the anchor is, by memory
        for node in lowered.emitted.get(anchor, ()):
            for target in written(node):
                self._lost.setdefault(storage(target), []).append(node)

    def value(self, node: fx.Node) -> fx.Node:
        """A captured node that holds the value of the lowered ``node``."""
        memory = node
        while memory.target is updated:
            memory = memory.args[0]  # type: ignore[assignment]
        for origin in self._lowered.origins.get(memory, ()):
            if origin in self._before:
                return origin
        if (target := self._written(node)) is not None:
            return self.value(target)
        if memory is not node:
            raise NotHere(f"{memory.name} is written in pieces, and exists only inside another call")
        if node not in self._copies:
            self._copies[node] = self._copied(node)
        return self._copies[node]

    def call(self, target: Any, args: tuple[Any, ...], value: Any = None) -> fx.Node:
        """A new call before the anchor, with the anchor's provenance."""
        with self._anchor.graph.inserting_before(self._anchor):
            node = self._anchor.graph.call_function(target, args)
        kept = ("nn_module_stack", "stack_trace", "source_fn_stack")
        node.meta = {key: self._anchor.meta[key] for key in kept if key in self._anchor.meta}
        if value is not None:
            node.meta["example_value"] = node.meta["val"] = value
        self.written.append(node)
        return node

    def cast(self, node: fx.Node, value: Tensor, dtype: torch.dtype) -> fx.Node:
        return node if value.dtype == dtype else self.call(torch.ops.aten.to.dtype, (node, dtype))

    def table(self, table: Table, sizes: dict[sp.Symbol, tuple[fx.Node, int]], like: fx.Node) -> fx.Node:
        """The tensor ``[*batch, diagonals]`` of a table; ``sizes`` names a lowered node and a dimension for each symbol.

        It is built on the device of the lowered node ``like``.

        Sites that need the same one share it.
        """
        known = self._lowered.tables.get(table)
        if known in self._before:
            return known  # type: ignore[return-value]
        loads = [n.source for n in table.expr.walk() if isinstance(n, Load)]
        measured = [node for node, _ in sizes.values()]
        sources: list[fx.Node] = list(dict.fromkeys([like, *loads, *measured]))  # type: ignore[list-item]
        numbers = _numbers(table, sizes)
        graph = _traced_table(table, sources, sizes, numbers)
        given = [*map(self.value, sources), *(self.number(number, like) for number in numbers)]
        inner = dict(zip(graph.find_nodes(op="placeholder"), given, strict=True))
        self._lowered.tables[table] = self._inlined(graph, inner)
        return self._lowered.tables[table]

    def seed(self, seed: Seed, like: fx.Node) -> fx.Node:
        """A number drawn at random, on the device of the lowered node ``like``: one for all that ``seed`` is of."""
        known = self._lowered.tables.get(seed)
        if known in self._before or known in self.written:
            return known  # type: ignore[return-value]
        drawn = self.call(torch.ops.aten.randint.low, (0, SEEDS, []))
        drawn.kwargs = {"dtype": torch.int64, "device": like.meta["val"].device}
        self._lowered.tables[seed] = drawn
        return drawn

    def number(self, number: Number, like: fx.Node) -> fx.Node:
        """A tensor of the number, on the device of the lowered node ``like``."""
        device = like.meta["val"].device
        known = self._lowered.tables.get((number, device))
        if known in self._before or known in self.written:
            return known  # type: ignore[return-value]
        if (given := number.given(like.graph)) is None:
            raise NotHere(f"nothing in the graph is the number {number.symbol} alone")
        made = self.call(torch.ops.aten.full.default, ([], self.value(given)))
        made.kwargs = {"dtype": torch.int64, "device": device}
        self._lowered.tables[number, device] = made
        return made

    def kept(self, node: fx.Node, write: fx.Node) -> fx.Node:
        """A copy of the lowered ``node`` from before the lowered ``write`` to it."""
        if (known := self._lowered.tables.get((node, write))) in self._before:
            return known  # type: ignore[return-value]
        point = self._lowered.parent(write)
        before = frozenset() if point is None else _nodes_before(point)
        source = next((origin for origin in self._lowered.origins.get(node, ()) if origin in before), None)
        if source is None or point not in self._before:
            raise NotHere(f"{node.name} is written in place inside the call that makes it")
        with self._anchor.graph.inserting_before(point):
            copy = self._anchor.graph.call_function(torch.ops.aten.clone.default, (source,))
        self.written.append(copy)
        self._before |= {copy}
        self._lowered.tables[node, write] = copy
        return copy

    def take_back(self) -> None:
        for node in reversed(self.written):
            self._anchor.graph.erase_node(node)
        for table, node in list(self._lowered.tables.items()):
            if node in self.written:
                del self._lowered.tables[table]
        self.written.clear()

    def _written(self, node: fx.Node) -> fx.Node | None:
        """What ``node`` wrote to, and shows, if that was done by now, by a statement, which has no value itself."""
        targets = written(node)
        if len(targets) != 1 or node.args[0] is not targets[0] or self._lowered.parent(node) not in self._before:
            return None
        known = self._lowered.origins.get(targets[0]) or self._written(targets[0])
        return targets[0] if known else None

    def _may_move(self, node: fx.Node) -> bool:
        return node in self._moved and not node.target._schema.is_mutable  # type: ignore[union-attr]

    def _copied(self, node: fx.Node) -> fx.Node:
        if node.op != "call_function":
            raise NotHere(f"{node.name} is not passed into the part of the graph that needs it")
        if is_tensor(node) and any(_out_of_place(write) is None for write in self._lost.get(storage(node), ())):
            raise NotHere(f"{node.name} is written in place inside another call, and exists only there")
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and not (is_pure(node) or self._may_move(node)):
            pure = _out_of_place(node)
            if pure is None:
                raise NotHere(f"{node.name} writes memory or draws random numbers, and exists only inside another call")
            target = pure
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)  # type: ignore[misc]
        # A copy that had nothing to do was not traced, so a view may count on memory that now lies in another order.
        target = torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target
        copy = self.call(target, args, node.meta.get("val"))
        copy.kwargs = kwargs
        return copy

    def _inlined(self, graph: fx.Graph, inner: dict[fx.Node, fx.Node]) -> fx.Node:
        for node in graph.nodes:
            if node.op == "output":
                result: fx.Node = inner[node.args[0]]
                return result
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), inner.__getitem__)  # type: ignore[misc]
                inner[node] = self.call(node.target, args, node.meta.get("val"))
                inner[node].kwargs = kwargs
            elif node.op != "placeholder":
                raise NotHere("a table needs a constant tensor")
        raise NotHere("a table without a result")


def opened(call: fx.Node, lowered: Lowered) -> None:
    """Put the operators that a captured ``call`` was traced into in its place: ``f(x) --> op1; op2; ...``.

    For calls that do more than one thing, of which a site is a part (``F.multi_head_attention_forward``). Raises
    ``NotHere``, leaving the graph alone, where an operator is not pure.
    """
    writer = Writer(lowered, call, moved=frozenset(lowered.emitted[call]))
    held = {captured: node for node, origins in lowered.origins.items() for captured in origins}
    try:
        copies = {node: writer.value(node) for node in lowered.emitted[call]}
    except NotHere:
        writer.take_back()
        raise
    for node, copy in copies.items():
        lowered.origins.setdefault(node, []).insert(0, copy)
        lowered.emitted[copy] = [node]
    parts = [user for user in call.users if user.target is operator.getitem]  # of a call that gives several
    for result in [call, *parts]:
        if result in held:
            result.replace_all_uses_with(writer.value(held[result]), propagate_meta=False)
    for result in [*parts, call]:
        if not result.users:
            result.graph.erase_node(result)


def is_pure(node: fx.Node) -> bool:
    """Neither writes memory nor draws random numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return not target._schema.is_mutable and not draws(node)


def _out_of_place(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that makes what ``node`` writes, if that goes to memory that was made for it: nobody saw it before."""
    targets, name = written(node), op_name(node)
    if draws(node) or len(targets) != 1 or targets[0] is not node.args[0] or len(targets[0].users) > 1:
        return None
    first = next(n for n in node.graph.nodes if is_tensor(n) and storage(n) == storage(node))
    packet = getattr(torch.ops.aten, name, None)
    overload = node.target._overloadname  # type: ignore[union-attr]
    found = getattr(packet, overload) if packet is not None and overload in packet.overloads() else None
    made = first is targets[0] and first.op == "call_function"
    return found if made and found is not None and not found._schema.is_mutable else None


def _nodes_before(anchor: fx.Node) -> frozenset[fx.Node]:
    before = []
    for node in anchor.graph.nodes:
        if node is anchor:
            break
        before.append(node)
    return frozenset(before)


def _numbers(table: Table, sizes: dict[sp.Symbol, tuple[fx.Node, int]]) -> list[Number]:
    """What a table is computed of beside positions, data and ``sizes``."""
    used = {symbol for n in table.expr.walk() if isinstance(n, Int) for symbol in n.value.free_symbols}
    return [Number(symbol) for symbol in sorted(used - sizes.keys(), key=str) if not isinstance(symbol, Axis)]


def _traced_table(
    table: Table, sources: Sequence[fx.Node], sizes: dict[sp.Symbol, tuple[fx.Node, int]], numbers: Sequence[Number]
) -> fx.Graph:
    """The ATen operators that compute ``table`` from the values of ``sources`` and ``numbers``, on the device of the first.

    What it looks up is widened before, not after: an entry may be read for thousands of diagonals, whose gradients would
    add up in 16 bits.
    """
    inputs = values(sources)

    def body(*tensors: Tensor) -> Tensor:
        known = dict(zip(sources, map(_widened, tensors), strict=False))
        measured = {symbol: known[node].shape[dim] for symbol, (node, dim) in sizes.items()}
        positions = _positions(table, measured, tensors[0].device)
        positions.update({number.symbol: x for number, x in zip(numbers, tensors[len(sources) :], strict=True)})
        evaluate = Evaluator(positions, known.__getitem__, dtype=torch.float32, device=tensors[0].device)
        shape = [positions[axis].numel() for axis in (*table.batch, table.diagonal)]  # type: ignore[union-attr]
        return torch.broadcast_to(evaluate(table.expr), shape)

    mode = next(v.fake_mode for v in inputs if isinstance(v, compat.FakeTensor))
    with mode, compat.enable_python_dispatcher(), compat.tracing(None):
        inputs += [torch.empty([], dtype=torch.int64, device=inputs[0].device) for _ in numbers]
        traced = compat.make_fx(body, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)
    return traced.graph


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def _positions(table: Table, measured: dict[sp.Symbol, Any], device: torch.device) -> dict[sp.Symbol, Any]:
    """Sizes by symbol, and one index tensor per axis, each along a dimension of its own."""
    axes: tuple[Axis, ...] = (*table.batch, table.diagonal)
    numbers = Evaluator(dict(measured), lambda source: source)
    positions: dict[sp.Symbol, Any] = dict(measured)
    for place, axis in enumerate(axes):
        shape = [1] * len(axes)
        shape[place] = -1
        positions[axis] = torch.arange(numbers.integer(axis.extent), device=device).reshape(shape)  # type: ignore[arg-type]
    return positions


def sizes_of(nodes: Sequence[fx.Node]) -> dict[sp.Symbol, tuple[fx.Node, int]]:
    """For each size symbol that is a whole dimension of one of ``nodes``: that node and dimension."""
    found: dict[sp.Symbol, tuple[fx.Node, int]] = {}
    for node in nodes:
        for dim, size in enumerate(shape_of(node)):
            if size.is_Symbol:
                found.setdefault(size, (node, dim))
    return found
