"""Where attention could be: one sweep over a lowered graph, cheap and generous. ``passes.detect`` proves or refuses."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from attngen.passes.dropout import DROPOUTS
from attngen.passes.effects import updated
from attngen.passes.pointwise import POINTWISE
from attngen.passes.semantics import bind, is_tensor, op_name, shape_of
from attngen.passes.values import is_contraction
from attngen.passes.views import PARTS, VIEWS

SOFTMAX = frozenset(["softmax", "_softmax", "special_softmax", "_safe_softmax", "log_softmax", "_log_softmax"])
_ELEMENTWISE = frozenset([*VIEWS, *PARTS, *POINTWISE, *DROPOUTS, "tril", "triu", "constant_pad_nd", "pad"])
_JOINS = frozenset(["cat", "stack", "amax", "max"])
# What people put between softmax and values, or scores and softmax, and no kernel computes: worth a ``Miss``.
_CHANGES = frozenset(["layer_norm", "rms_norm", "nan_to_num", "roll", "cumsum", "scatter", "gather", "topk"])
ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Marks:
    """How far each node got: 1 follows a contraction, 2 an exponential after it, 3 a normaliser after that.

    ``pairs`` follow a batched contraction without leaving its elements: they may weigh pairs of rows and keys.
    """

    level: dict[fx.Node, int] = field(default_factory=dict)
    pairs: set[fx.Node] = field(default_factory=set)
    settled: set[fx.Node] = field(default_factory=set)

    def highest(self, nodes: list[fx.Node]) -> int:
        return max((self.level.get(n, 0) for n in nodes), default=0)

    def level_of(self, node: fx.Node) -> int:
        return self.level.get(node, 0)

    def settle(self, output: fx.Node) -> None:
        """``output`` is a proved attention: to what follows, it is a product like any other, if it is no sum of weights."""
        self.settled.add(output)
        if output in self.level and not is_total(output):
            self.level[output] = 1

    def add(self, node: fx.Node) -> None:
        """The mark of ``node``; nodes come in program order."""
        name, inputs = op_name(node), node.all_input_nodes
        before = self.highest(inputs)
        passes = name in _ELEMENTWISE or _keeps_all(node) or node.target in (operator.getitem, updated) or _is_pointwise(node)
        contracts = is_product(node) and (not is_sum(node) or before < 2)
        if is_total(node) and before:
            self.level[node] = 3
        elif node in self.settled or contracts:
            self.level[node] = 1
        elif before and (name in SOFTMAX or name == "logsumexp"):
            self.level[node] = 3
        elif before and (name in ("exp", "exp2") or (name == "pow" and not is_tensor(node.args[0]))):
            self.level[node] = max(before, 2)
        elif is_sum(node) and before:
            self.level[node] = 3 if before >= 2 else 1
        elif before and (passes or name in _JOINS | _CHANGES or self._mixes_channels(node)):
            self.level[node] = before
        if (contracts and is_batched(node)) or (passes and any(n in self.pairs for n in inputs)):
            self.pairs.add(node)
        if before and name == "copy":
            self.level[_whole(node)] = before

    def _mixes_channels(self, node: fx.Node) -> bool:
        """A convolution over what may be scores or weights, whose channels are then heads."""
        source = node.all_input_nodes[:1]
        return is_pointwise_convolution(node) and (self.highest(source) == 3 or any(n in self.pairs for n in source))


def _whole(node: fx.Node) -> fx.Node:
    """The tensor that a copy into a part of it goes to."""
    while node.all_input_nodes and (op_name(node) == "copy" or op_name(node) in VIEWS):
        node = node.all_input_nodes[0]
    return node


def _is_pointwise(node: fx.Node) -> bool:
    """Also where no row says what it computes: its decomposition does."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def is_batched(node: fx.Node) -> bool:
    """Not a product with a layer's weights, which have no batch of their own."""
    return all(len(shape_of(n)) > 2 for n in node.all_input_nodes if is_tensor(n))


def is_product(node: fx.Node) -> bool:
    """A contraction; among sums, only those of products."""
    if not is_contraction(node) or _keeps_all(node):
        return False
    return not is_sum(node) or any(op_name(n) == "mul" for n in node.all_input_nodes)


def _keeps_all(node: fx.Node) -> bool:
    """An einsum that sums over nothing: two masks for a mask of pairs, or weights and a gate."""
    if op_name(node) != "einsum":
        return False
    letters, arrow, kept = str(bind(node)["equation"]).partition("->")
    return bool(arrow) and {c for c in letters if c.isalpha()} <= set(kept)


def is_sum(node: fx.Node) -> bool:
    """Of the elements of one tensor, ``einsum`` being a way to write it."""
    return op_name(node) == "sum" or (op_name(node) == "einsum" and len(node.args[1]) == 1)  # type: ignore[arg-type]


def is_total(node: fx.Node) -> bool:
    """A sum of weights, written as their product with a column of ones; see ``passes.totals``."""
    return op_name(node) == "matmul" and op_name(node.args[1]) == "ones"  # type: ignore[arg-type]


def is_pointwise_convolution(node: fx.Node) -> bool:
    """A product over channels, position by position."""
    if op_name(node) != "conv2d":
        return False
    args = bind(node)
    small = args["groups"] == 1 and shape_of(args["weight"])[2:] == (1, 1)
    return bool(small) and shape_of(args["input"])[2:] == shape_of(node)[2:]


def is_candidate(node: fx.Node, marks: Marks) -> bool:
    if op_name(node) == ATTENTION:
        return True
    inputs = node.all_input_nodes
    return marks.highest(inputs) == 3 or (marks.highest(inputs) == 2 and divided(node) is not None)


def weighs_pairs(node: fx.Node, marks: Marks) -> bool:
    """An einsum of three tensors or more may be all of an attention without softmax."""
    return is_batched(node) and (any(n in marks.pairs for n in node.all_input_nodes) or _joins_several(node))


def _joins_several(node: fx.Node) -> bool:
    return op_name(node) == "einsum" and len(node.args[1]) > 2  # type: ignore[arg-type]


def divided(node: fx.Node) -> fx.Node | None:
    """The division of the result by the sum of the weights, in a softmax whose normalisation comes last."""
    while len(node.users) == 1:
        (user,) = node.users
        if op_name(user) in ("div", "mul") and is_tensor(user.args[0]) and is_tensor(user.args[1]):
            return user
        if op_name(user) not in VIEWS and not (op_name(user) == "copy" and user.args[1] is node):
            return None
        node = user
    return None
