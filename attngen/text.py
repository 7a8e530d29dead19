"""Expressions as text: one canonical form for identity, one readable form for people."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy as sp
from sympy.printing.str import StrPrinter

from attngen.algebra import COMPARISONS, Access, Const, Dot, Expr, Int, Load, Op, Reduce
from attngen.index import Axis
from attngen.philox import BITS


class _IndexPrinter(StrPrinter):  # type: ignore[misc]
    """Axes by name; sums in an order that does not depend on the process."""

    def _print_Dummy(self, expr: sp.Dummy) -> str:
        return str(expr.name)

    def _print_Axis(self, expr: Axis) -> str:
        return str(expr.name)

    def _print_Add(self, expr: sp.Add, order: Any = None) -> str:
        parts = sorted((self._print(term) for term in expr.args), key=lambda t: (t.startswith("-"), t.lstrip("-")))
        return parts[0] + "".join(f" - {p[1:]}" if p.startswith("-") else f" + {p}" for p in parts[1:])

    def _print_FloorDiv(self, expr: sp.Expr) -> str:
        return f"({self._print(expr.args[0])}) // ({self._print(expr.args[1])})"


_PRINTER = _IndexPrinter()


def index_text(expr: sp.Expr) -> str:
    return str(_PRINTER.doprint(expr))


def canonical(expr: Expr | sp.Expr) -> str:
    """A prefix form without ambiguity; equal expressions, and only those, print equal."""
    if isinstance(expr, sp.Basic):
        return index_text(expr)
    if isinstance(expr, Int):
        return index_text(expr.value)
    if isinstance(expr, Const):
        return repr(expr.value)
    if isinstance(expr, Load):
        return f"{expr.source}[{', '.join(map(canonical, expr.index))}]:{expr.kind}"
    if isinstance(expr, Reduce):
        return f"{expr.name}_{expr.axis.name}({canonical(expr.body)})"
    if isinstance(expr, Dot):
        return f"dot_{expr.axis.name}({canonical(expr.lhs)}, {canonical(expr.rhs)})"
    if isinstance(expr, Access):
        return f"{expr.source}[{', '.join(map(canonical, expr.index))}]"
    assert isinstance(expr, Op)
    return f"{expr.name}({', '.join(map(canonical, expr.args))})"


_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", **COMPARISONS}
_INFIX |= {"and": "&", "or": "|"}
_STRENGTH = {"or": 0, "and": 1, **dict.fromkeys(COMPARISONS, 2), "add": 3, "sub": 3}
_STRENGTH |= dict.fromkeys(("mul", "div", "floordiv", "mod"), 4)


def readable(expr: Expr, name_of: Callable[[Any], str] = str) -> str:
    """Infix, with named tensors: ``0.125*qk + slopes[h]*j``."""

    def show(node: Expr, strength: int = -1) -> str:
        if isinstance(node, Int):
            text = index_text(node.value)
            return f"({text})" if strength > 3 and isinstance(node.value, sp.Add) else text
        if isinstance(node, Const):
            return _number(node.value)
        if isinstance(node, Load):
            inside = ", ".join(show(place) for place in node.index if place != Int(sp.Integer(0)))
            name = name_of(node.source)
            return name if name == "qk" or not inside else f"{name}[{inside}]"
        if not isinstance(node, Op):
            return canonical(node)
        if node.name in ("float", "drown", "rounded"):
            return show(node.args[0], strength)
        if (threshold := _chance(node)) is not None:
            return f"random >= {_number(threshold)}"
        if node.name == "where":
            condition, yes, no = (show(a, 0) for a in node.args)
            text = f"{yes} if {condition} else {no}"
            return text if strength < 0 else f"({text})"
        if node.name not in _INFIX:
            return f"{node.name}({', '.join(show(a) for a in node.args)})"
        own = _STRENGTH[node.name]
        space = "" if own == 4 else " "
        tighter = own + (0 if node.name in ("and", "or", "add", "mul") else 1)
        parts = [show(node.args[0], own), *(show(a, tighter) for a in node.args[1:])]
        text = f"{space}{_INFIX[node.name]}{space}".join(parts)
        return f"({text})" if own < strength else text

    return show(expr)


def _chance(node: Op) -> float | None:
    """With which probability random bits are below what they are compared with."""
    if node.name == "ge" and isinstance(node.args[0], Op) and node.args[0].name == "random":
        return float(node.args[1].value) / 2**BITS  # type: ignore[attr-defined]
    return None


def _number(value: float | bool) -> str:
    if isinstance(value, bool) or not math.isfinite(value):
        return str(value)
    return f"{value:.6g}"
