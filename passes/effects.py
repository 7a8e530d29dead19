"""What happens to memory around a site: which nodes matter, which change in place, and whether a site may move its reads.

A replaced site reads its inputs where the value contraction stood. That is the same as reading them earlier unless one of
them is written in between; and its intermediate values may only vanish if nobody else looks at them.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from attngen.errors import Miss
from attngen.passes.dropout import drops
from attngen.passes.memory import storage
from attngen.passes.semantics import op_name
from attngen.passes.views import FREE, PARTS, VIEWS

if TYPE_CHECKING:
    from attngen.passes.detect import Site


@dataclass(frozen=True)
class Effects:
    """``live``: feeds an output or a write. ``stale``: written in place after it was made, and still used after that.

    ``writes``: for each storage, the nodes that write to it, in order; ``times``: their positions. ``order``: the position of
    each node.
    ``cut``: passes no gradients on, being detached, or computed while they were disabled.
    """

    live: frozenset[fx.Node]
    stale: frozenset[fx.Node]
    writes: dict[int, list[fx.Node]]
    times: dict[int, list[int]]
    order: dict[fx.Node, int]
    cut: frozenset[fx.Node]

    def overwritten(self, node: fx.Node, since: fx.Node, end: fx.Node) -> bool:
        """``node`` no longer holds at ``end`` what it held at ``since``."""
        times = self.times.get(storage(node), []) if _is_tensor(node) else []
        before = bisect_right(times, self.order[end])
        return before > 0 and self.order[since] < times[before - 1]


def updated(whole: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
    """``whole`` as it is after the ``write`` to a part of it: the same memory. ``passes.versions`` puts such nodes in."""
    return whole


def run(graph: fx.Graph) -> Effects:
    order = {node: k for k, node in enumerate(graph.nodes)}
    writes: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        for target in written(node):
            writes.setdefault(storage(target), []).append(node)
    times = {storage: [order[node] for node in nodes] for storage, nodes in writes.items()}
    return Effects(_live(graph), _stale(graph, times, order), writes, times, order, _cut(graph))


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that the node writes to."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    if node.target is torch.ops.aten.detach_.default:
        return []  # changes no element
    written = []
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            written += [v for v in values if isinstance(v, fx.Node) and _is_tensor(v)]
    return written


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _live(graph: fx.Graph) -> frozenset[fx.Node]:
    """What outputs are made of, and what writes to memory that is read later on, or is not the graph's own."""
    given = {storage(node) for node in graph.nodes if node.op in ("placeholder", "get_attr") and _is_tensor(node)}
    live: set[fx.Node] = set()
    read: set[int] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live or any(storage(n) in read | given for n in written(node)):
            live.add(node)
            live.update(node.all_input_nodes)
            read.update(storage(n) for n in node.all_input_nodes if _is_tensor(n))
    return frozenset(live)


def _stale(graph: fx.Graph, times: dict[int, list[int]], order: dict[fx.Node, int]) -> frozenset[fx.Node]:
    """Nodes whose memory is written after they are made, and that are used after that write.

    Tracing already points later uses of the written tensor itself at the writing node, so what is left are its aliases.
    The next version of the same memory does not use what was there before.
    """
    stale = set()
    for node in graph.nodes:
        if not _is_tensor(node) or storage(node) not in times:
            continue
        later = times[storage(node)]
        following = bisect_right(later, order[node])
        last_use = max((order[user] for user in node.users if user.target is not updated), default=-1)
        if following < len(later) and later[following] < last_use:
            stale.add(node)
    return frozenset(stale)


def _cut(graph: fx.Graph) -> frozenset[fx.Node]:
    cut, enabled = set(), True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled or op_name(node) == "detach":
            cut.add(node)
    return frozenset(cut)


def undisturbed(site: Site, sites: Sequence[Site], facts: Effects) -> Miss | None:
    """None if the site may be replaced together with all ``sites``, else what stands in the way.

    Weights that are dropped at random are for the site alone: another one might stay as it was, with other random numbers.
    """
    dropped = _from(filter(drops, site.interior), site.interior)
    for node in site.interior:
        others = () if node in dropped else sites
        for user in node.users:
            if user in facts.live and not any(_goes_with(each, node, user) for each in (site, *others)):
                blamed = "" if user.op == "output" else user.name
                return Miss(_read_elsewhere(node, user), node.name, depth=6, blamed=blamed)
        writes = facts.writes.get(storage(node), ()) if _is_tensor(node) else ()
        if outside := [w for w in writes if not any(w in each.interior for each in (site, *others))]:
            return Miss("a value between the two products is written in place", outside[0].name, depth=6)
    return None


def _from(nodes: Iterable[fx.Node], inside: frozenset[fx.Node]) -> set[fx.Node]:
    """``nodes`` and what is made of them ``inside``."""
    stack, found = list(nodes), set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in inside and node not in found:
            found.add(node)
            stack.extend(node.users)
    return found


def _goes_with(site: Site, node: fx.Node, user: fx.Node) -> bool:
    """If the site is replaced, its own part of what reads ``node`` is not there any more."""
    return node in site.interior and (user in site.interior or user is site.end)


def _read_elsewhere(node: fx.Node, user: fx.Node) -> str:
    if user.op == "output":
        return "the attention weights are returned"
    return f"the attention weights are also read by {user.name}"


def written_between(inputs: list[fx.Node], first: fx.Node, last: fx.Node, facts: Effects) -> Miss | None:
    """A write to any of ``inputs`` after ``first`` and up to ``last``, where the replacement will read them."""
    for node in inputs:
        for write in facts.writes.get(storage(node), ()):
            if facts.order[first] < facts.order[write] <= facts.order[last]:
                return Miss("an input is written in place before the attention is finished", write.name, depth=6)
    return None


def written_after(inputs: list[fx.Node], last: fx.Node, facts: Effects) -> Miss | None:
    """A write to any of ``inputs`` after ``last``: the backward would read what it left."""
    for node in inputs:
        for write in facts.writes.get(storage(node), ()):
            if facts.order[write] > facts.order[last]:
                return Miss("an input that the backward needs is written in place later", write.name, depth=6)
    return None


def cut_between(inputs: list[fx.Node], site: Site, facts: Effects) -> Miss | None:
    """A value on the way from ``inputs`` to the result that lets no gradients through, where the replacement would.

    The maximum that a softmax is shifted by may be detached: its gradients cancel.
    """
    last = site.output
    if not inputs or not facts.cut or last in facts.cut:
        return None
    reached, node = set(inputs), min(inputs, key=facts.order.__getitem__)
    while node is not last:
        node = node.next
        if any(below in reached for below in node.all_input_nodes):
            reached.add(node)
    stack, seen = [last], set(inputs)
    while stack:
        node = stack.pop()
        if _is_tensor(node) and not node.meta["val"].dtype.is_floating_point:
            continue  # passes none on, detached or not
        if node in facts.cut and not (node in site.interior and _is_maximum(node)):
            return Miss("a part of it is detached from gradients", node.name, depth=6)
        above = [n for n in node.all_input_nodes if n in reached and n not in seen]
        seen.update(above)
        stack.extend(above)
    return None


def passes_nothing_on(inputs: Sequence[fx.Node], site: Site, facts: Effects) -> bool:
    """No gradients go from the result to ``inputs``: on each way something is detached."""
    if not facts.cut:
        return False
    stack, seen, wanted = [site.output], {site.output}, set(inputs)
    while stack:
        node = stack.pop()
        if node in wanted:
            return False
        if node not in facts.cut:
            stack += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
    return True


def ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and all that it is computed from."""
    stack, seen = [node], {node}
    while stack:
        node = stack.pop()
        yield node
        above = [n for n in node.all_input_nodes if n not in seen]
        seen.update(above)
        stack.extend(above)


def between(start: fx.Node, end: fx.Node, without: Callable[[fx.Node], bool] = lambda node: False) -> frozenset[fx.Node]:
    """The nodes on a path from ``start`` to ``end`` on which none is ``without``, with the first and without the last."""
    below = {start}
    current = start
    while current is not end:
        current = current.next
        if any(n in below for n in current.all_input_nodes) and (current is end or not without(current)):
            below.add(current)
    inside: set[fx.Node] = set()
    stack = [n for n in end.all_input_nodes if n in below]
    while stack:
        current = stack.pop()
        if current not in inside:
            inside.add(current)
            stack.extend(n for n in current.all_input_nodes if n in below)
    return frozenset(inside)


def _is_maximum(node: fx.Node) -> bool:
    while op_name(node) in VIEWS or node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return op_name(node) in ("amax", "max")


@dataclass(frozen=True)
class Fate:
    """What becomes of the memory of a result: who writes to it in place, if anybody, and whether the caller gets it.

    ``by_layout``: whether that memory is also somebody else's depends on strides (a reshape is a view or a copy).
    """

    writer: fx.Node | None
    returned: bool
    by_layout: bool


def fate(result: fx.Node) -> Fate:
    """The fate of ``result`` and of everything that only rearranges it."""
    found, stack = {result}, [result]
    while stack:
        for user in stack.pop().users:
            if user not in found and (op_name(user) in VIEWS or op_name(user) in PARTS or user.target is operator.getitem):
                found.add(user)
                stack.append(user)
    readers = [user for node in found for user in node.users]
    moved = [n for n in found - {result} if op_name(n) in VIEWS and op_name(n) not in FREE]
    writer = next((user for user in readers if any(node in found for node in written(user))), None)
    return Fate(writer, any(user.op == "output" for user in readers), bool(moved))
