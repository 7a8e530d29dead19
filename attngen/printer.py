"""Expressions of a spec as lines of a Triton kernel.

A kernel has four places where a value can be computed: once per program, once per query row, once per key block, or
once per pair. ``Printer`` puts each subexpression at the outermost place it allows: values without the key axis become
named variables before the loop, values without the row axis are vectors over the keys of the block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy as sp

from attngen.algebra import COMPARISONS, Const, Expr, Int, Load, Op, limited, number
from attngen.compat import FloorDiv
from attngen.index import Axis, never_negative
from attngen.spec import FEATURE, INNER, KEY, ROW, SCORE, AttentionSpec, Input
from attngen.text import index_text

LOG2E = 1 / math.log(2)
HALF_LIMIT = -32768.0  # from there down, fp16 numbers are 32 apart; bfloat16 ones are sooner

_CALLS = {
    "exp": "tl.exp",
    "exp2": "tl.exp2",
    "log": "tl.log",
    "log2": "tl.log2",
    "sqrt": "tl.sqrt",
    "rsqrt": "tl.rsqrt",
    "sin": "tl.sin",
    "cos": "tl.cos",
    "erf": "tl.erf",
    "floor": "tl.floor",
    "sigmoid": "tl.sigmoid",
    "tanh": "tanh",
    "abs": "tl.abs",
    "min": "tl.minimum",
    "max": "tl.maximum",
    "where": "tl.where",
    "drown": "drowned",
    "rounded": "rounded",
}
_GUARDS = {True: ["row_ok", "col_ok"], False: ["row_ok"]}  # of a load per pair, in masked and in full blocks
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", **COMPARISONS}


class Unprintable(Exception):
    """A kernel cannot compute this operation."""


@dataclass(frozen=True)
class Places:
    """How a template names the positions of a block: as vectors, and as what they become beside a block of pairs."""

    row: str = "rows[:, None]"
    key: str = "cols[None, :]"
    row_beside: str = "[:, None]"
    key_beside: str = "[None, :]"
    key_float: str = ""  # the keys as floats, where a template has them


@dataclass
class Printer:
    """Turns expressions of ``spec`` into kernel text, collecting what must come before the loop in ``prologue``."""

    spec: AttentionSpec
    places: Places = Places()
    known: dict[Expr, str] = field(default_factory=lambda: {SCORE: "qk"})  # what a template has a name for
    prologue: list[str] = field(default_factory=list)
    uses_floor_div: bool = False
    uses_tanh: bool = False
    uses_drowned: bool = False
    uses_rounded: bool = False
    uses_random: bool = False
    uses_random_block: bool = False
    _names: dict[Expr, str] = field(default_factory=dict)
    _blocks: dict[str, str] = field(default_factory=dict)
    _keys_end: str = "size_j"

    def value(self, expr: Expr, *, masked: bool) -> str:
        """``expr`` inside the loop; ``masked`` blocks also guard their loads against keys beyond the end."""
        return self._show(expr, masked)

    def scanned(self, expr: Expr, end: str) -> str:
        """``expr``, which is the same for all rows, for a block of keys of which those before ``end`` are read."""
        self._keys_end = end
        text = self._show(expr, True)
        self._keys_end = "size_j"
        return text

    def blocks(self) -> list[str]:
        """Lines that read what the values printed since the last call load per pair.

        They belong before the product of query and key: Triton settles the layout of the rows' maxima and sums by the
        last of the operations that the scores come from. If that is a load, softmax is computed twice, once in the
        layout of the load and once in that of the product.
        """
        lines = [f"{name} = {text}" for name, text in self._blocks.items()]
        self._blocks.clear()
        return lines

    def hoisted(self, expr: Expr) -> str:
        """A key-free expression as a variable of the prologue."""
        if isinstance(expr, Const) or number(expr) is not None:
            return self._show(expr, False)
        if expr not in self._names:
            name = f"c{len(self._names)}"
            self._names[expr] = name
            self.prologue.append(f"{name} = {bare(self._show(expr, False, top=True))}")
        return self._names[expr]

    def by_row(self) -> list[str]:
        """The variables of the prologue that differ from row to row."""
        return [name for expr, name in self._names.items() if ROW in expr.axes]

    def _show(self, expr: Expr, masked: bool, *, top: bool = False) -> str:
        if expr in self.known:
            return self.known[expr]
        if isinstance(expr, Int):
            return self._int(expr.value)
        if isinstance(expr, Const):
            return _literal(expr.value)
        if not top and KEY not in expr.axes:
            return self.hoisted(expr)
        if isinstance(expr, Load):
            return self._load(expr, masked)
        assert isinstance(expr, Op), expr
        if (limit := limited(expr)) is not None:
            return self._limited(expr, *limit, masked)
        if len(_factors(expr)) > 1:
            return self._product(expr, masked, top)
        return self._operation(expr, masked)

    def _operation(self, expr: Op, masked: bool) -> str:
        if expr.name == "float" and expr.args[0] == Int(KEY) and self.places.key_float:
            return self.places.key_float
        if expr.name == "float" and (sum_of_floats := apart(expr.args[0])) is not None:
            return self._show(sum_of_floats, masked)
        args = [self._show(a, masked) for a in expr.args]
        if expr.name == "random":
            return self._random(expr, args)
        if expr.name in _INFIX:
            return "(" + f" {_INFIX[expr.name]} ".join(args) + ")"
        if expr.name == "float":
            return f"({args[0]}).to(tl.float32)" if expr.args[0].axes else f"({args[0]} * 1.0)"
        if expr.name == "not":
            return f"({args[0]} == 0)"
        if expr.name == "neg":
            return f"(-{args[0]})"
        if expr.name not in _CALLS:
            raise Unprintable(f"a kernel has no {expr.name}")
        self.uses_tanh |= expr.name == "tanh"
        self.uses_drowned |= expr.name == "drown"
        if expr.name == "rounded":
            self.uses_rounded = True
            args.append("tl.float16" if number(expr.args[1]) == HALF_LIMIT else "tl.bfloat16")
        return f"{_CALLS[expr.name]}({', '.join(map(bare, args))})"

    def _limited(self, expr: Op, value: Expr, limit: float, masked: bool) -> str:
        """Kept from a number on, or up to one; NaN stays, which an instruction for the maximum would lose."""
        text, bound = bare(self._show(value, masked)), _literal(limit)
        return f"tl.where({text} {'>' if expr.name == 'min' else '<'} {bound}, {bound}, {text})"

    def _random(self, expr: Op, args: list[str]) -> str:
        """Bits for a whole block at once, where its rows and columns are what is counted."""
        seed, *counter = map(bare, args)
        if expr.args[1:3] not in ((Int(KEY), Int(ROW)), (Int(ROW), Int(KEY))):
            self.uses_random = True
            return f"random({seed}, {', '.join(counter)})"
        self.uses_random_block = True
        turned = expr.args[1] == Int(ROW)
        return f"random_block({seed}, first, block, {', '.join(counter[2:])}, BLOCK_I, BLOCK_J, {turned})"

    def _product(self, expr: Op, masked: bool, top: bool) -> str:
        """Numbers become one number; factors that do not change over the keys are multiplied before the loop."""
        factors = _factors(expr)
        fixed = [f for f in factors if KEY not in f.axes]
        moving = [f for f in factors if KEY in f.axes]
        if top or len(fixed) < 2:
            return "(" + " * ".join(self._show(f, masked) for f in factors) + ")"
        product = fixed[0]
        for factor in fixed[1:]:
            product = Op("mul", (product, factor))
        return "(" + " * ".join([self.hoisted(product), *(self._show(f, masked) for f in moving)]) + ")"

    # ------------------------------------------------------------------------------------------------------- indices

    def base(self, place: sp.Expr) -> str:
        """A position that is one per program, in 64 bits."""
        text = self.index(place)
        return f"{text}.to(tl.int64)" if place.atoms(Axis) else text

    def _int(self, expr: sp.Expr) -> str:
        return self.index(expr, {ROW: self.places.row, KEY: self.places.key})

    def index(self, expr: sp.Expr, axes: Mapping[sp.Symbol, str] | None = None) -> str:
        """Integer arithmetic as Triton text; floor division of what may be negative goes through a helper."""
        axes = axes or {}
        if expr in axes:
            return axes[expr]
        if isinstance(expr, Axis) or expr.is_Symbol:
            return str(expr.name)
        if expr.is_Integer:
            return str(int(expr))
        parts = [self.index(a, axes) for a in _ordered(expr)]
        if isinstance(expr, sp.Add):
            return "(" + " + ".join(parts).replace("+ -", "- ") + ")"
        if isinstance(expr, sp.Mul):
            return f"-{'*'.join(parts[1:])}" if parts[0] == "-1" and len(parts) == 2 else "(" + " * ".join(parts) + ")"
        if isinstance(expr, (FloorDiv, sp.Mod)):
            return self._division(expr, *parts)
        if isinstance(expr, sp.Abs):
            return f"tl.abs({parts[0]})"
        if isinstance(expr, (sp.Max, sp.Min)):
            call = "tl.maximum" if isinstance(expr, sp.Max) else "tl.minimum"
            text = parts[0]
            for part in parts[1:]:
                text = f"{call}({bare(text)}, {bare(part)})"
            return text
        raise Unprintable(f"index arithmetic {type(expr).__name__}")

    def _division(self, expr: sp.Expr, left: str, right: str) -> str:
        """Triton's own division truncates, so it serves only where nothing is negative."""
        if never_negative(expr.args[0]):
            return f"({left} {'//' if isinstance(expr, FloorDiv) else '%'} {right})"
        self.uses_floor_div = True
        quotient = f"floor_div({bare(left)}, {right})"
        return quotient if isinstance(expr, FloorDiv) else f"({left} - {quotient} * {right})"

    # --------------------------------------------------------------------------------------------------------- loads

    def _load(self, expr: Load, masked: bool) -> str:
        source = next(x for x in self.spec.extras if x.name == expr.source)
        if {ROW, KEY} <= expr.axes:
            text = f"{source.name}_block"
            self._blocks[text] = self._read(source, {ROW: self.places.row, KEY: self.places.key}, _GUARDS[masked])
        elif KEY in expr.axes:
            text = self._read(source, {KEY: "cols"}, [f"cols < {self._keys_end}"] if masked else [])
            text += self.places.key_beside
        elif ROW in expr.axes:
            text = self._read(source, {ROW: "rows"}, ["rows < size_i"]) + self.places.row_beside
        else:
            text = self._read(source, {}, [])
        if expr.kind == "bool":
            return f"({text} != 0)"
        return f"{text}.to(tl.float32)" if expr.kind == "float" else text

    def _read(self, source: Input, axes: dict[Axis, str], guards: list[str]) -> str:
        """Vectors are read as such: as a row or column of a block they would give scores and row statistics their
        layout. Offsets are added up before the pointer, so that 32 bits of each are kept rather than 64."""
        steps = [f"{self.wide(place, axes)} * {source.name}_stride_{dim}" for dim, place in moving_dims(source)]
        offset = f" + ({' + '.join(steps)})" if len(steps) > 1 else "".join(f" + {step}" for step in steps)
        guard = f", mask={' & '.join(guards)}, other=0" if guards else ""
        return f"tl.load({source.name}_base{offset}{guard})"

    def wide(self, place: sp.Expr, axes: dict[Axis, str]) -> str:
        text = self.index(place, axes)
        return f"({text}).to(tl.int64)" if self.spec.wide and place.atoms(Axis) else text


def apart(whole: Expr) -> Expr | None:
    """The float of a sum over a key and a row as a sum of floats, of which each is made once per key or row, not per pair.

    Both are whole numbers far below 2^24, so that their sum is exact.
    """
    if not isinstance(whole, Int):
        return None
    parts = sp.Add.make_args(sp.expand(whole.value))
    keys = [part for part in parts if part.has(KEY)]
    others = [part for part in parts if part not in keys]
    if not any(part.has(ROW) for part in others) or any(part.has(ROW) for part in keys) or not keys:
        return None
    key, other = sp.Add(*keys), Op("float", (Int(sp.Add(*others)),))
    if key.could_extract_minus_sign():
        return Op("sub", (other, Op("float", (Int(-key),))))
    return Op("add", (Op("float", (Int(key),)), other))


def moving_dims(source: Input) -> list[tuple[int, sp.Expr]]:
    """The dimensions of an extra whose position changes within a program."""
    return [(d, p) for d, p in enumerate(source.index) if p.has(ROW) or p.has(KEY)]


def fixed_dims(source: Input) -> list[tuple[int, sp.Expr]]:
    """The dimensions of an input whose position is one per program, and not always zero."""
    return [(d, p) for d, p in enumerate(source.index) if p != 0 and not p.has(ROW, KEY, INNER, FEATURE)]


def bare(text: str) -> str:
    """``text`` without parentheses around the whole of it."""
    depth = 0
    for position, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0 and position < len(text) - 1:
            return text
    return text[1:-1] if text.startswith("(") else text


def _factors(expr: Expr) -> list[Expr]:
    """What a float product multiplies, its numbers (and divisions by numbers) as one number at the end."""
    factors = _split(expr)
    values = [v for f in factors if (v := number(f)) is not None]
    if len(factors) == 1 or not values:
        return factors
    return [*(f for f in factors if number(f) is None), Const(math.prod(values))]


def _split(expr: Expr) -> list[Expr]:
    if isinstance(expr, Op) and expr.name == "mul" and expr.kind == "float":
        return [f for a in expr.args for f in _split(a)]
    if isinstance(expr, Op) and expr.name == "div" and number(expr.args[1]):
        return [*_split(expr.args[0]), Const(1 / number(expr.args[1]))]  # type: ignore[operator]
    return [expr]


def _ordered(expr: sp.Expr) -> list[sp.Expr]:
    """Arguments in an order that depends on what they say alone; numbers last in sums, first in products."""
    if isinstance(expr, (sp.Add, sp.Max, sp.Min)):
        return sorted(expr.args, key=lambda a: (bool(a.is_Integer), a.could_extract_minus_sign(), index_text(a)))
    if isinstance(expr, sp.Mul):
        return sorted(expr.args, key=lambda a: (not a.is_Integer, index_text(a)))
    return list(expr.args)


def _literal(value: float | bool) -> str:
    if isinstance(value, bool):
        return str(value)
    if math.isinf(value):
        return 'float("inf")' if value > 0 else 'float("-inf")'
    return 'float("nan")' if math.isnan(value) else repr(float(value))
