"""Gains that keep some weights, all times one number, and set the others to zero: what dropout makes of them.

Kernels of the hopper family take no other gain. Such a one changes neither what a row's weights add up to nor what is left
of a weight but for that number, which is multiplied in once, when all is added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attngen.algebra import Expr, Int, Op, number
from attngen.philox import BITS, ROUNDS
from attngen.printer import Printer, bare
from attngen.spec import KEY, ROW


@dataclass(frozen=True)
class Dropped:
    """A weight is times ``factor`` where random ``bits`` are at least ``threshold``, else zero."""

    bits: Op
    threshold: int
    factor: float

    @property
    def turned(self) -> bool:
        """Whether rows are counted before keys."""
        return self.bits.args[1] == Int(ROW)


def dropped_of(gain: Expr) -> Dropped | None:
    """What ``gain`` drops, if it does nothing else."""
    if isinstance(gain, Op) and gain.name == "mul":
        for part, other in (gain.args, gain.args[::-1]):
            if (times := number(other)) and (found := dropped_of(part)) is not None:
                return Dropped(found.bits, found.threshold, found.factor * times)
    if not isinstance(gain, Op) or gain.name != "where" or number(gain.args[2]) != 0:
        return None
    keeps, factor = gain.args[0], number(gain.args[1])
    if not factor or not isinstance(keeps, Op) or keeps.name != "ge" or not _is_drawn(keeps.args[0]):
        return None
    bits, threshold = keeps.args
    assert isinstance(bits, Op)
    least = number(threshold)
    return Dropped(bits, int(least), factor) if least is not None else None


def _is_drawn(bits: Expr) -> bool:
    """Random bits whose counter has the pair in its first two numbers, and in no other."""
    if not isinstance(bits, Op) or bits.name != "random":
        return False
    seed, first, second, *others = bits.args
    return {first, second} == {Int(ROW), Int(KEY)} and not any({ROW, KEY} & each.axes for each in (seed, *others))


def holes_of(printer: Printer, gain: Expr, *, by_sign: bool = False) -> dict[str, Any] | None:
    """What a Gluon template is filled with to drop weights; None if it drops none. ``by_sign``: those that are dropped keep
    their size, and get a minus sign."""
    if (dropped := dropped_of(gain)) is None:
        return None
    seed, _, _, *others = dropped.bits.args
    return {
        "seed": printer.hoisted(seed),
        "counter": ", ".join(bare(printer.value(each, masked=False)) for each in others),
        "turned": dropped.turned,
        "limit": dropped.threshold << 32 - BITS,
        "factor": repr(dropped.factor),
        "rounds": ROUNDS,
        "marked": "with a minus sign" if by_sign else "zero",
        "instead": "-weights" if by_sign else "0.0",
    }
