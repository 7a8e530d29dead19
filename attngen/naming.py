"""A mask in the field's words: ``causal & window(4096)``."""

from __future__ import annotations

import sympy as sp

from attngen.algebra import COMPARISONS, TRUE, Expr, Int, Load, Op
from attngen.compat import FloorDiv
from attngen.inequalities import Datum, inequalities, solve
from attngen.spec import KEY, ROW
from attngen.text import index_text


def describe(mask: Expr) -> str | None:
    """The name of ``mask``, or None if it has none."""
    if mask == TRUE:
        return ""
    parts = mask.args if isinstance(mask, Op) and mask.name == "and" else (mask,)
    low: sp.Expr | None = None
    high: sp.Expr | None = None
    others: list[str] = []
    for part in parts:
        conjunctions = inequalities(part)
        atoms = conjunctions[0][0] if len(conjunctions) == 1 and conjunctions[0][1] else []
        known = bool(atoms) and not any(atom.atoms(Datum) for atom in atoms)
        bounds = [_band(atom) for atom in atoms] if known else [None]
        if None in bounds:
            name = _named(part)
            if name is None:
                return None
            others.append(name)
            continue
        for side, offset in bounds:  # type: ignore[misc]
            if side == "low":
                low = offset if low is None else sp.Max(low, offset)
            else:
                high = offset if high is None else sp.Min(high, offset)
    return " & ".join([*_band_names(low, high), *others])


def _band(atom: sp.Expr) -> tuple[str, sp.Expr] | None:
    """``j <= i + c`` or ``j >= i + c``."""
    side, bound = solve(atom, KEY) if atom.has(KEY) else (None, sp.S.Zero)
    if side is None or not bound.has(ROW) or sp.expand(bound - ROW).has(ROW):
        return None
    return side, sp.expand(bound - ROW)


def _band_names(low: sp.Expr | None, high: sp.Expr | None) -> list[str]:
    if low is not None and high is not None and sp.expand(low + high) == 0 and high != 0:
        return [f"window(±{index_text(high)})"]
    if low is not None and high is None:
        return [f"anticausal{'' if low == 0 else f'(offset {index_text(low)})'}"]
    names = []
    if high is not None:
        names.append("causal" if high == 0 else f"causal(offset {index_text(high)})")
    if low is not None and high is not None:
        names.append(f"window({index_text(1 - low + high)})")
    return names


def _named(part: Expr) -> str | None:
    """A part that is no band: by what it looks at."""
    if isinstance(part, Op) and part.name == "or":
        names = [describe(choice) for choice in part.args]
        return None if None in names else f"({' | '.join(map(str, names))})"
    loads = [node for node in part.walk() if isinstance(node, Load)]
    if not loads:
        return _named_position(part)
    if any(ROW in load.axes and KEY in load.axes for load in loads):
        return None
    row, key = (any(axis in load.axes for load in loads) for axis in (ROW, KEY))
    if KEY not in part.axes:
        return "query padding"
    if isinstance(part, Op) and part.name in COMPARISONS and row and key:
        return "documents" if part.name == "eq" else "causal(loaded positions)"
    if isinstance(part, Op) and part.name in COMPARISONS and not key:
        of_batch = not row and any(load.axes for load in loads)
        return ("lengths" if _ends_keys(part) else "padding") if of_batch else "causal(loaded positions)"
    return "padding" if ROW not in part.axes else None


def _ends_keys(part: Op) -> bool:
    """``j < n`` or ``n > j``."""
    smaller = {"lt": 0, "le": 0, "gt": 1, "ge": 1}.get(part.name)
    return smaller is not None and KEY in part.args[smaller].axes


def _named_position(part: Expr) -> str | None:
    if not (isinstance(part, Op) and all(isinstance(a, Int) for a in part.args)):
        return None
    left, right = (a.value for a in part.args)  # type: ignore[attr-defined]
    if part.name == "eq" and isinstance(left, FloorDiv) and isinstance(right, FloorDiv):
        return f"chunks({left.args[1]})" if left.args[1] == right.args[1] else None
    conjunctions = inequalities(part)
    atoms = conjunctions[0][0] if len(conjunctions) == 1 else []
    if len(atoms) == 1 and atoms[0].has(KEY) and not atoms[0].has(ROW):
        side, bound = solve(atoms[0], KEY)
        return {"high": f"prefix({index_text(bound + 1)})", "low": f"from({index_text(bound)})"}.get(str(side))
    return None
