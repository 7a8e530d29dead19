"""Which tensor of the graph holds the value of an expression, and where it is read there."""

from __future__ import annotations

from torch import fx

from attngen.algebra import Expr

Place = tuple[fx.Node, tuple]  # type: ignore[type-arg]
Clumsiness = tuple[bool, bool]  # may be outside of the tensor, needs divisions


class Holders(dict[Expr, Place]):
    """The plainest place for each expression.

    A place that may be outside of its tensor was read in a choice, for the positions that are inside: it holds the value
    there. Two such places of one expression hold it for different positions (``cat([f(x[:9]), f(x[9:])])``), so neither does
    for all of them. ``origin``: the place that another one is only a view of.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Expr, tuple[Clumsiness, Place | None]] = {}

    def note(self, expr: Expr, place: Place, clumsiness: Clumsiness, origin: Place) -> None:
        known = self._known.get(expr)
        if known is not None and known[0][0] and clumsiness[0] and known[1] != origin:
            self.pop(expr, None)
            self._known[expr] = (True, False), None  # only a place that is surely inside is better
        elif known is None or clumsiness < known[0]:
            self[expr] = place
            self._known[expr] = clumsiness, origin
