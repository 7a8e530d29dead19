"""Derivatives of a score program: from the gradient of its value to that of everything it is made of.

One pass from the value back to the leaves, each node passing on what reaches it times its own derivative, gives every
leaf's gradient as an expression of the same algebra: kernels print it as they print the score. Where torch says what
happens at a corner (equal arguments of a maximum, the absolute value of zero), this says the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from attngen.algebra import Const, Expr, Int, Load, Op, number, op, total
from attngen.printer import Unprintable
from attngen.spec import KEY, ROW

# The gradient of a score, that of a weight, at one pair.
SCORE_GRAD = Load("ds", (Int(ROW), Int(KEY)))
WEIGHT_GRAD = Load("dp", (Int(ROW), Int(KEY)))
TOTAL_GRAD = Load("dtotal", (Int(ROW), Int(KEY)))  # of the sum of a row's weights: the same for all pairs of the row

_ZERO = Const(0.0)
Rule = Callable[..., tuple["Expr | None", ...]]


def _mul(*factors: Expr) -> Expr:
    result, *rest = factors
    for factor in rest:
        result = op("mul", result, factor)
    return result


def _larger(grad: Expr, mine: Expr, other: Expr) -> Expr:
    """The share of the one that is chosen, if ``mine`` is the larger; equal ones share evenly, but a limit takes nothing."""
    if number(other) is not None:
        return op("where", op("lt", mine, other), _ZERO, grad)
    tie = op("where", op("eq", mine, other), _mul(grad, Const(0.5)), _ZERO)
    return op("where", op("gt", mine, other), grad, tie)


def _smaller(grad: Expr, mine: Expr, other: Expr) -> Expr:
    return op("where", op("gt", mine, other), _ZERO, grad) if number(other) is not None else _larger(grad, other, mine)


def _absolute(grad: Expr, _: Expr, x: Expr) -> tuple[Expr]:
    negative = op("where", op("lt", x, _ZERO), op("neg", grad), _ZERO)
    return (op("where", op("gt", x, _ZERO), grad, negative),)


def _quotient(grad: Expr, node: Expr, _: Expr, divisor: Expr) -> tuple[Expr, Expr]:
    share = op("div", grad, divisor)
    return share, op("neg", _mul(share, node))


def _power(grad: Expr, _: Expr, base: Expr, exponent: Expr) -> tuple[Expr, None]:
    if (value := number(exponent)) is None:
        raise Unprintable("a kernel has no gradient of a power whose exponent is not a number")
    return _mul(grad, op("pow", base, Const(value - 1)), Const(value)), None


# Of each operation: what reaches its arguments, from what reaches it, itself and its arguments. None: nothing does.
_RULES: dict[str, Rule] = {
    "add": lambda g, y, a, b: (g, g),
    "sub": lambda g, y, a, b: (g, op("neg", g)),
    "mul": lambda g, y, a, b: (_mul(g, b), _mul(g, a)),
    "div": _quotient,
    "neg": lambda g, y, a: (op("neg", g),),
    "abs": _absolute,
    "relu": lambda g, y, a: (op("where", op("le", a, _ZERO), _ZERO, g),),
    "max": lambda g, y, a, b: (_larger(g, a, b), _larger(g, b, a)),
    "min": lambda g, y, a, b: (_smaller(g, a, b), _smaller(g, b, a)),
    "exp": lambda g, y, a: (_mul(g, y),),
    "exp2": lambda g, y, a: (_mul(g, y, Const(math.log(2))),),
    "log": lambda g, y, a: (op("div", g, a),),
    "log2": lambda g, y, a: (_mul(op("div", g, a), Const(1 / math.log(2))),),
    "sqrt": lambda g, y, a: (_mul(op("div", g, y), Const(0.5)),),
    "rsqrt": lambda g, y, a: (_mul(op("div", g, a), y, Const(-0.5)),),
    "sin": lambda g, y, a: (_mul(g, op("cos", a)),),
    "cos": lambda g, y, a: (op("neg", _mul(g, op("sin", a))),),
    "tanh": lambda g, y, a: (_mul(g, op("sub", Const(1.0), _mul(y, y))),),
    "sigmoid": lambda g, y, a: (_mul(g, y, op("sub", Const(1.0), y)),),
    "erf": lambda g, y, a: (_mul(g, op("exp", op("neg", _mul(a, a))), Const(2 / math.sqrt(math.pi))),),
    "pow": _power,
    "where": lambda g, y, c, a, b: (None, op("where", c, g, _ZERO), op("where", c, _ZERO, g)),
    "floor": lambda g, y, a: (None,),
    "drown": lambda g, y, a, limit: (g, None),
    "rounded": lambda g, y, a, limit: (g, None),
    "float": lambda g, y, a: (None,),
}


def gradients(expr: Expr, grad: Expr) -> dict[Load, Expr]:
    """For every float that ``expr`` loads, the raw score among them: its gradient, where ``grad`` is that of ``expr``.

    Raises ``Unprintable`` for an operation whose derivative is not known.
    """
    reaching: dict[Expr, list[Expr]] = {expr: [grad]}
    found: dict[Load, Expr] = {}
    for node in _users_first(expr):
        if node.kind != "float" or node not in reaching:
            continue
        grad = total(reaching[node])
        if isinstance(node, Load):
            found[node] = grad
        elif isinstance(node, Op):
            for argument, share in zip(node.args, _shares(node, grad), strict=True):
                if share is not None and argument.kind == "float":
                    reaching.setdefault(argument, []).append(share)
    return found


def _shares(node: Op, grad: Expr) -> tuple[Expr | None, ...]:
    if node.name not in _RULES:
        raise Unprintable(f"a kernel has no gradient of {node.name}")
    return _RULES[node.name](grad, node, *node.args)


def _users_first(expr: Expr) -> list[Expr]:
    """Every distinct node, each before what it is made of."""
    done: dict[Expr, None] = {}

    def visit(node: Expr) -> None:
        if node in done:
            return
        for child in node.children:
            visit(child)
        done[node] = None

    visit(expr)
    return list(reversed(done))
