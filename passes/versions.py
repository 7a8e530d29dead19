"""Scores and weights that are written in place through views, as values: each write makes a new version of the memory.

Tracing points later uses of the very tensor that is written at the write. Its other names still stand for what was there
before: above all the tensor that a view is a part of, as ``scores`` in ``scores[:, 1:] += bias``. Here whoever reads later
is pointed at the version that it really sees::

    part = slice(scores); write = add_(part, bias); softmax(scores)
    -->  part = slice(scores); write = add_(part, bias); new = updated(scores, write); softmax(new)

Only memory that holds products of queries and keys, or what became of them, has versions, and masks that are made of
positions and numbers alone: what they say need not exist. Other tensors that are put together in pieces (masks of data,
caches) are there when a kernel needs them, and are loaded as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from attngen.passes.candidates import Marks
from attngen.passes.effects import ancestors, updated, written
from attngen.passes.memory import storage
from attngen.passes.pointwise import POINTWISE
from attngen.passes.semantics import is_tensor, op_name
from attngen.passes.values import VALUES
from attngen.passes.views import VIEWS

# Writes that change elements, each with a row that says to what; ``transpose_`` and the like change a tensor's layout.
_WRITES = frozenset([*POINTWISE, *VALUES, "dropout"]) - (frozenset(VIEWS) - {"dropout", "to"})
_FILLS = frozenset(["fill", "zero", "masked_fill", "index_put"])
_OF_POSITIONS = frozenset([*POINTWISE, *VIEWS, "arange", "zeros", "ones", "full", "empty", "tril", "triu", "eye"])
# A matrix that is solved row by row (the delta rule) is no score: what its last rows are made of doubles with each row.
MOST_WRITES = 8


def run(graph: fx.Graph) -> None:
    """Every later reader of memory that is written through a view reads the version it sees."""
    memories = {storage: _Memory(names[0]) for storage, names in _in_versions(graph).items()}
    if not memories:
        return
    for node in list(graph.nodes):
        for below in node.all_input_nodes:
            if (memory := memories.get(_storage(below))) is not None:
                node.replace_input_with(below, memory.current(below, node))
        if (memory := memories.get(_storage(node))) is not None:
            memory.made(node)
    for memory in memories.values():
        memory.forget_unread()


@dataclass
class _Memory:
    """One piece of memory while the graph runs. ``names``: the nodes that show it as it is now, by any older node."""

    root: fx.Node
    names: dict[fx.Node, fx.Node] = field(default_factory=dict)
    versions: list[fx.Node] = field(default_factory=list)

    @property
    def _whole(self) -> fx.Node:
        return self.versions[-1] if self.versions else self.root

    def current(self, name: fx.Node, reader: fx.Node) -> fx.Node:
        """The node that shows now what ``name`` once showed, written before ``reader`` if there is none."""
        if name not in self.names:
            if name is self.root or name.target is updated:
                return self._whole
            source = self.current(_source(name), reader)
            self.names[name] = source if written(name) else _copied(name, source, reader)
        return self.names[name]

    def made(self, node: fx.Node) -> None:
        """``node`` has run: a view, which shows what is there now, or a write."""
        targets = written(node)
        if targets:
            with node.graph.inserting_after(node):
                version = node.graph.call_function(updated, (self._whole, node))
            version.meta = dict(self.root.meta)
            self.versions.append(version)
            self.names = {target: node for target in targets if target is not self.root}
        self.names[node] = node

    def forget_unread(self) -> None:
        for version in reversed(self.versions):
            if not version.users:
                version.graph.erase_node(version)


def _in_versions(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """The nodes in each piece of memory that holds scores, weights or a mask, written through names that can be followed."""
    marks, sharing, scored = Marks(), dict[int, list[fx.Node]](), set[int]()
    for node in graph.nodes:
        marks.add(node)
        if not is_tensor(node):
            continue
        sharing.setdefault(_storage(node), []).append(node)
        if node in marks.pairs or marks.level.get(node, 0) > 1:
            scored.add(_storage(node))
    scored |= {storage for storage, names in sharing.items() if _is_mask(names)}
    return {storage: sharing[storage] for storage in scored if _is_followed(sharing[storage])}


def _is_mask(names: Sequence[fx.Node]) -> bool:
    """Made of positions and numbers, and written in pieces with numbers."""
    writes = [op_name(name) for name in names if written(name)]
    if not writes or len(names[0].meta["val"].shape) < 2 or not set(writes) <= _FILLS:
        return False
    return all(op_name(node) in _OF_POSITIONS and not written(node) for node in ancestors(names[0]) if is_tensor(node))


def _is_followed(names: Sequence[fx.Node]) -> bool:
    """All but the first are views of an earlier one or writes to it, and there are a few writes."""
    known = {names[0]}
    for name in names[1:]:
        sources = [n for n in name.all_input_nodes if n in known]
        if written(name):
            follows = op_name(name) in _WRITES and len(written(name)) == 1 and written(name)[0] in known
        else:
            follows = op_name(name) in VIEWS and len(sources) == 1
        if not follows:
            return False
        known.add(name)
    return not written(names[0]) and 0 < sum(bool(written(name)) for name in names) <= MOST_WRITES


def _source(name: fx.Node) -> fx.Node:
    """What a view shows a part of, or a write goes to."""
    targets = written(name)
    return targets[0] if targets else name.all_input_nodes[0]


def _copied(view: fx.Node, source: fx.Node, reader: fx.Node) -> fx.Node:
    old = view.all_input_nodes[0]
    with view.graph.inserting_before(reader):
        copy = view.graph.node_copy(view, lambda n: source if n is old else n)
    copy.meta = dict(view.meta)
    return copy


def _storage(node: fx.Node) -> int:
    return storage(node) if is_tensor(node) else 0
