"""Random attention-like graphs, made from a list of choices so that a failing one can be shrunk and shown.

The graphs are what a captured model looks like: torch functions and tensor methods, views, casts, in-place operators. Most
are attention in some spelling; many are not quite, which is the point. A choice of zero is always the plainest one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from fuzz_scores import normalised, score_step, truth, varying
from fuzz_writer import Draw, Node, Writer
from torch import Tensor, fx
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """A graph and inputs for it; ``training``: gradients of its floating inputs are asked for."""

    gm: fx.GraphModule
    inputs: tuple[Tensor, ...]
    training: bool

    @property
    def text(self) -> str:
        """A script that shows the graph."""
        shapes = [f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in self.inputs]
        return f"training={self.training}, inputs {'; '.join(shapes)}\n{self.gm.code.strip()}"


def build(draw: Draw, *, half: Sequence[torch.dtype] = (torch.float16, torch.bfloat16), longest: int = 24) -> Case:
    """One case from ``draw``, of sequences up to ``longest``."""
    with torch.no_grad():
        made = _Model(draw, half, longest)
        results = made.results()
    made.g.graph.output(results)
    gm = fx.GraphModule(torch.nn.Module(), made.g.graph)
    return Case(gm, tuple(made.g.inputs.values()), made.training)


class _Model:
    """Sizes and kind of one case, and its attentions."""

    def __init__(self, draw: Draw, half: Sequence[torch.dtype], longest: int) -> None:
        self.g, self.draw = Writer(draw, half), draw
        self.training = draw.chance(15)
        self.dtype: torch.dtype = draw.one([torch.float32, torch.float32, *half])
        lengths = [8, 1, 2, 3, 5, 7, 12, 16, longest]
        self.lead: tuple[int, ...] = draw.one([(2, 4), (2, 4), (1, 2), (2, 1), (3,), (8,), (), (2, 3, 4), (2, 2, 3, 2)])
        self.rows: int = draw.one(lengths)
        self.keys: int = self.rows if draw.chance(60) else draw.one(lengths)
        self.width: int = draw.one([8, 16, 4, 32, 12])
        self.features: int = self.width if draw.chance(75) else draw.one([8, 4, 24])
        self.by_library = False  # what that makes of infinities is its own business
        self.unshifted = False  # exp(s) over its sum: huge scores are lost there, in one way or another
        self.readers: list[Node] = []

    @property
    def mild(self) -> bool:
        """No huge scores: gradients of a saturated softmax are differences of equal numbers, exact only in eager's order."""
        return self.training or self.unshifted

    def results(self) -> tuple[Node, ...]:
        first = self.attention(None)
        if self.draw.chance(6):
            again = self.attention(first if self.features == self.width else None)
            first = self.g(operator.sub, first, self.g(operator.mul, again, 0.3))
        return (self.finished(first), *self.readers)

    def attention(self, query: Node | None) -> Node:
        self.unshifted = self.draw.chance(15) and query is None  # nobody knows how large the result of another is
        self.by_library = bool(self.lead) and self.draw.chance(8)
        q = query or self.operand((*self.lead, self.rows, self.width))
        k = self.operand((*self.lead, self.keys, self.width), grouped=True)
        v = self.operand((*self.lead, self.keys, self.features), grouped=True)
        if self.features == self.width and self.draw.chance(4):
            k = v = self.operand((*self.lead, self.keys, self.width))
        q, k, v = (self.disturbed(x, 3) for x in (q, k, v))
        if self.by_library:
            return self.library(q, k, v)
        weights = self.weights(q, k, v)
        if self.draw.chance(8):
            weights = self.combined(weights, v)
        if self.draw.chance(2):
            self.written(self.draw.one([v, k, q]))
        out = self.product(self.disturbed(self.read(weights), 4), v)
        if self.draw.chance(3):
            self.written(self.draw.one([out, v, k, q]))
        return out

    def weights(self, q: Node, k: Node, v: Node) -> Node:
        scores = self.scores(q, k)
        steps = self.draw.below(4)
        for step in range(steps):
            # The gradient of what is done to a huge fill is a difference of huge numbers.
            tame = self.unshifted or (self.training and step < steps - 1)
            scores = score_step(self.g, scores, tame=tame, mild=self.mild)
        if self.draw.chance(3):
            self.written(self.draw.one([q, k, v]))
        return normalised(self.g, self.read(scores), unshifted=self.unshifted)

    def combined(self, first: Node, v: Node) -> Node:
        """Differential attention: two softmaxes over the same keys, one of them times something."""
        q = self.operand((*self.lead, self.rows, self.width))
        k = self.operand((*self.lead, self.keys, self.width), grouped=True)
        second = self.weights(q, k, v)
        rate = self.draw.one([0.8, self.g.normal(1, dtype=self.dtype), self.g.normal(self.rows, 1, dtype=self.dtype)])
        second = self.g(operator.mul, self.disturbed(second, 4), rate)
        both: Node = self.g(self.draw.one([operator.sub, operator.add]), first, second)
        return self.g(operator.mul, both, 0.5) if self.draw.chance(20) else both

    def library(self, q: Node, k: Node, v: Node) -> Node:
        """``scaled_dot_product_attention``, with a mask or without."""
        q = self.g("to", q, self.g.dtype(k))
        shape = (*self.lead, self.rows, self.keys)
        options = self.draw.one([{}, {"scale": 0.3}, {"is_causal": True}, {"is_causal": True, "scale": 1.0}])
        if "is_causal" not in options and self.draw.chance(70):
            mask = (
                truth(self.g, shape)
                if self.draw.chance(60)
                else self.g.normal(*varying(self.g, shape), dtype=self.g.dtype(q))
            )
            wide = self.draw.chance(50) or len(self.g.shape(mask)) < 2  # torch 2.11 takes no mask of one dimension
            options = {**options, "attn_mask": self.g("expand", mask, *shape) if wide else mask}
        return self.g(F.scaled_dot_product_attention, q, k, v, **options)

    # ------------------------------------------------------------------------------------------------------ operands

    def operand(self, shape: tuple[int, ...], *, grouped: bool = False) -> Node:
        """[*lead, length, width], laid out in memory and made in one of many ways."""
        ways = [self._direct, self._permuted, self._merged, self._sliced, self._projected, self._expanded]
        node: Node = self.draw.one([*ways, *[self._grouped] * (2 if grouped else 0)])(shape)
        if self.draw.chance(10):
            node = self.g(operator.mul, node, self.draw.one([0.25, -1.0, 3.0]))
        scale = self.draw.one([1.0] * 8 + [0.01, 20.0])
        if scale != 1.0 and not self.mild:
            node = self.g(operator.mul, node, scale)
        return self.g(self.draw.one(["clone", "contiguous"]), node) if self.draw.chance(8) else node

    def _direct(self, shape: tuple[int, ...]) -> Node:
        node = self.g.normal(*shape, dtype=self.dtype)
        if not self.by_library and self.draw.chance(3):
            value = self.draw.one([math.inf, -math.inf, math.nan, math.nan if self.mild else 1e4])
            self.g.inputs[node].view(-1)[self.draw.below(math.prod(shape))] = value
        return node

    def _permuted(self, shape: tuple[int, ...]) -> Node:
        order = list(range(len(shape)))
        for place in range(len(order) - 1):
            other = place + self.draw.below(len(order) - place)
            order[place], order[other] = order[other], order[place]
        node = self.g.normal(*(shape[d] for d in order), dtype=self.dtype)
        return self.g("permute", node, *(order.index(d) for d in range(len(order))))

    def _merged(self, shape: tuple[int, ...]) -> Node:
        """[B, N, H * D] seen as [B, H, N, D]."""
        if len(shape) < 3:
            return self._direct(shape)
        *lead, heads, length, width = shape
        node = self.g.normal(*lead, length, heads * width, dtype=self.dtype)
        node = self.g(self.draw.one(["view", "reshape"]), node, *lead, length, heads, width)
        return self.g("transpose", node, -3, -2)

    def _sliced(self, shape: tuple[int, ...]) -> Node:
        *lead, length, width = shape
        if self.draw.chance(50):
            packed = self.g.normal(*lead, length, 2 * width, dtype=self.dtype)
            return self.g.part(self.g("chunk", packed, 2, -1), self.draw.below(2))
        if lead and self.draw.chance(40):
            more = self.g.normal(*lead[:-1], lead[-1] + 2, length, width, dtype=self.dtype)
            first = self.draw.below(3)
            return self.g.part(more, ..., slice(first, first + lead[-1]), slice(None), slice(None))
        longer = self.g.normal(*lead, length + 2, width, dtype=self.dtype)
        first = self.draw.below(3)
        return self.g.part(longer, ..., slice(first, first + length), slice(None))

    def _projected(self, shape: tuple[int, ...]) -> Node:
        x = self.g.normal(*shape[:-1], 6, dtype=self.dtype)
        return self.g(F.linear, x, self.g.normal(shape[-1], 6, dtype=self.dtype, scale=0.4))

    def _expanded(self, shape: tuple[int, ...]) -> Node:
        """One of several batch elements or heads, seen as many."""
        if len(shape) < 3:
            return self._direct(shape)
        dim = self.draw.below(len(shape) - 2)
        node = self.g.normal(*(1 if d == dim else size for d, size in enumerate(shape)), dtype=self.dtype)
        return self.g("expand", node, *shape) if self.draw.chance(60) else self.g("repeat_interleave", node, shape[dim], dim)

    def _grouped(self, shape: tuple[int, ...]) -> Node:
        if len(shape) < 3 or shape[-3] % 2:
            return self._direct(shape)
        *lead, heads, length, width = shape
        node = self.g.normal(*lead, heads // 2, length, width, dtype=self.dtype)
        way = self.draw.below(3)
        if way == 0:
            return self.g("repeat_interleave", node, 2, -3)
        if way == 1:
            return self.g("repeat", node, *[1] * len(lead), 2, 1, 1)
        node = self.g("expand", self.g("unsqueeze", node, -3), *lead, heads // 2, 2, length, width)
        return self.g("reshape", node, *shape)

    # ------------------------------------------------------------------------------------------------------ products

    def scores(self, q: Node, k: Node) -> Node:
        if self.draw.chance(10):
            q, k = self.g("float", q), self.g("float", k)
        if self.g.dtype(q) != self.g.dtype(k):
            q = self.g("to", q, self.g.dtype(k))
        ways = [self._by_matmul, self._by_matmul, self._by_einsum, self._by_bmm, self._by_sum, self._turned, self._added]
        node: Node = self.draw.one(ways)(q, self._transposed(k))
        if self.draw.chance(15):
            node = self.g("to", node, torch.float32)
        return node

    def product(self, weights: Node, v: Node) -> Node:
        if self.g.dtype(weights) != self.g.dtype(v):
            side = self.draw.below(2)
            weights = self.g("to", weights, self.g.dtype(v)) if side == 0 else weights
            v = v if side == 0 else self.g("to", v, self.g.dtype(weights))
        ways = [self._by_matmul, self._by_matmul, self._by_einsum, self._by_bmm, self._by_sum, self._turned]
        node: Node = self.draw.one(ways)(weights, v)
        return node

    def _transposed(self, node: Node) -> Node:
        way = self.draw.below(3)
        if way == 2:
            rank = len(self.g.shape(node))
            return self.g("permute", node, *range(rank - 2), rank - 1, rank - 2)
        return self.g("transpose", node, -1, -2) if way == 0 else self.g("swapaxes", node, -2, -1)

    def _by_matmul(self, a: Node, b: Node) -> Node:
        return self.g(self.draw.one([torch.matmul, operator.matmul]), a, b)

    def _by_einsum(self, a: Node, b: Node) -> Node:
        lead = "abcde"[: len(self.g.shape(a)) - 2]
        sides = [f"{lead}xy", f"{lead}yz"]
        tensors = [a, b]
        for place in range(2):
            if lead and self.draw.chance(40):  # heads beside features
                tensors[place] = self.g("transpose", tensors[place], -3, -2)
                sides[place] = lead[:-1] + sides[place][-2] + lead[-1] + sides[place][-1]
        if self.draw.chance(30):
            sides, tensors = sides[::-1], tensors[::-1]
        return self.g(torch.einsum, f"{sides[0]},{sides[1]}->{lead}xz", *tensors)

    def _flat(self, *tensors: Node) -> list[Node]:
        return [self.g("reshape", t, -1, *self.g.shape(t)[-2:]) for t in tensors]

    def _by_bmm(self, a: Node, b: Node) -> Node:
        out = self.g(torch.bmm, *self._flat(a, b))
        return self.g("view", out, *self.g.shape(a)[:-1], self.g.shape(b)[-1])

    def _added(self, a: Node, b: Node) -> Node:
        """baddbmm, with or without something to add."""
        flat = self._flat(a, b)
        shape = (self.g.shape(flat[0])[0], self.g.shape(a)[-2], self.g.shape(b)[-1])
        bias = self.g.normal(*(1 if self.draw.chance(30) else size for size in shape), dtype=self.g.dtype(a))
        options = {"beta": self.draw.one([1, 0, 0.5]), "alpha": self.draw.one([1, 0.25])}
        out = self.g(torch.baddbmm, bias, *flat, **options)
        return self.g("view", out, *self.g.shape(a)[:-1], self.g.shape(b)[-1])

    def _by_sum(self, a: Node, b: Node) -> Node:
        product = self.g(operator.mul, self.g("unsqueeze", a, -1), self.g("unsqueeze", b, -3))
        return self.g("sum", product, -2)

    def _turned(self, a: Node, b: Node) -> Node:
        """(b^T a^T)^T."""
        out = self.g(torch.matmul, self.g("transpose", b, -1, -2), self.g("transpose", a, -1, -2))
        return self.g("transpose", out, -1, -2)

    # -------------------------------------------------------------------------------------------------------- others

    def read(self, node: Node) -> Node:
        """Somebody else reads it, now and then."""
        if self.draw.chance(3):
            self.readers.append(self.draw.one([lambda: self.g("mean", node, -1), lambda: node])())
        return node

    def written(self, node: Node) -> None:
        with suppress(RuntimeError):  # an expanded tensor cannot be written to
            self.g(self.draw.one(["zero_", "neg_", "sin_"]), node)

    def disturbed(self, node: Node, percent: int) -> Node:
        """Sometimes rearranged, so that what looks like attention mixes up its positions."""
        if not self.draw.chance(percent):
            return node
        g, shape = self.g, self.g.shape(node)
        size = shape[-2]
        steps = [
            lambda: g("flip", node, -2),
            lambda: g("flip", node, -1),
            lambda: g("roll", node, 1, -2),
            lambda: g("roll", node, 1, -1),
            lambda: g(
                torch.cat, [g.part(node, ..., slice(1, None), slice(None)), g.part(node, ..., slice(0, 1), slice(None))], -2
            ),
            lambda: g.part(g(F.pad, node, (0, 0, 1, 0)), ..., slice(0, size), slice(None)),
            lambda: g.part(node, ..., g.whole(size, below=size), slice(None)),
            lambda: g("reshape", g("transpose", node, -1, -2), *shape),
            lambda: g("roll", node, 1, 0),
            lambda: g("flip", node, 0),
            lambda: g("cumsum", node, -1),
            lambda: g("reshape", g("permute", node, *range(len(shape))[::-1]), *shape),
            lambda: g("gather", node, -1, g("expand", g.whole(shape[-1], below=shape[-1]), *shape)),
            lambda: g(operator.mul, node, 2),
            lambda: g("relu", node),
        ]
        disturbed: Node = self.draw.one(steps)()
        return disturbed

    def finished(self, out: Node) -> Node:
        """What models do with the result."""
        g, shape = self.g, self.g.shape(out)
        way = self.draw.below(7)
        if way in (1, 2, 3) and len(shape) > 2:
            out = g("transpose", out, -3, -2)
            if way == 2:
                out = g("contiguous", out)
            joined = (*shape[:-3], shape[-2], shape[-3] * shape[-1])
            out = out if way == 1 else g("view" if way == 2 else "reshape", out, *joined)
        elif way == 4:
            out = g("add_", out, 1)
        elif way == 5:
            out = g(F.linear, out, g.normal(5, shape[-1], dtype=g.dtype(out)))
        elif way == 6:
            g("mul_", g.part(out, ..., slice(0, 1)), 2)
        return out
