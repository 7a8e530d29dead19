"""Which blocks of keys a tile of queries visits: a cover as lines of a kernel that set the bounds of its loops.

    start .. stop              all that can matter to some row
    full_start .. full_stop    of that, what matters to all rows and needs no mask: the longest such stretch
    gap_start .. gap_stop      of the rest, what matters to no row: the longest such stretch, jumped over

Most masks have no gap, and one stretch of full blocks whose ends are known; they get a few lines. Where stretches have to
be compared, or keys to be looked at one by one, the kernel does that once per tile, before it loads any key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy as sp

from attngen.inequalities import Datum
from attngen.mask import MAX_RUNS, Cover, Interval, grouped, may_be_full
from attngen.printer import Printer, bare
from attngen.spec import KEY

SCANNED = 256  # keys that one warp looks at together
_EXTREMES = {"least": ("tl.min", 2**63 - 1), "most": ("tl.max", -(2**63))}


@dataclass(frozen=True)
class Bounds:
    """``lines`` set the bounds. With ``has_head`` a loop over masked blocks comes before the full ones.

    The last loop goes over masked blocks ``start .. stop``, and from each place of ``jumps`` on adds so many keys, which
    ``jump_lines`` set. ``has_gap``: some of these are keys that matter to no row.
    """

    lines: tuple[str, ...]
    has_head: bool
    has_full: bool
    start: str
    stop: str = "stop"
    jumps: tuple[tuple[str, str], ...] = ()
    jump_lines: tuple[str, ...] = ()
    compares: bool = False
    has_gap: bool = False


def loop_bounds(printer: Printer, cover: Cover, warps: int) -> Bounds:
    """The bounds of a tile that so many warps share."""
    writer = _Writer(printer, SCANNED * warps)
    writer.name_data([*cover.visit, *cover.partial])
    return writer.fixed(cover) if is_plain(cover) else writer.compared(cover)


def is_plain(cover: Cover) -> bool:
    """The visited keys are one stretch, and so are the full ones, between masked ones at the beginning and at the end."""
    if any(i.among for i in (*cover.visit, *cover.partial)) or len(grouped(cover.visit)) > 1:
        return False
    at_ends = all(i.low == 0 or i.high == KEY.extent for i in cover.partial)
    return at_ends and not any(_is_all(i) and i.when for i in cover.partial)


def _is_all(interval: Interval) -> bool:
    return interval.low == 0 and interval.high == KEY.extent


@dataclass(frozen=True)
class _Run:
    """One stretch of keys, as text."""

    low: str
    high: str
    among: tuple[sp.Expr, ...] = ()


@dataclass
class _Writer:
    printer: Printer
    scanned: int
    lines: list[str] = field(default_factory=list)
    names: dict[sp.Symbol, str] = field(default_factory=dict)

    def say(self, name: str, text: str) -> str:
        self.lines.append(f"{name} = {bare(text)}")
        return name

    def name_data(self, intervals: Sequence[Interval]) -> None:
        """A variable for each loaded value that is the same for all keys, and for its extremes over the rows."""
        found = dict.fromkeys(each for interval in intervals for each in interval.data if each.role != "key")
        for number, each in enumerate(found):
            value = f"{self.printer.hoisted(each.expr)}.to(tl.int64)"
            if each.role in _EXTREMES:
                call, other = _EXTREMES[each.role]
                value = f"{call}(tl.where(row_ok, {value}, {other}))"
            self.names[each] = self.say(f"{each.role}_{number}", value)

    # ---------------------------------------------------------------------------------------------------- plain covers

    def fixed(self, cover: Cover) -> Bounds:
        low, high = self._hull(cover.visit)
        heads = [i for i in cover.partial if i.low == 0 and i.high != KEY.extent]
        tails = [i for i in cover.partial if i not in heads]
        has_head, has_full = bool(heads) or low != "0", all(i.low != 0 for i in tails)
        if low != "0":
            low = self.say("low", low)
        self.say("start", "low // BLOCK_J * BLOCK_J" if low == "low" else "0")
        self.say("stop", high)
        if not has_full:
            return Bounds(tuple(self.lines), False, False, "start")
        if has_head:
            full_low = self._innermost(heads, "high", "tl.maximum", low)
            self.say("full_low", f"tl.minimum({full_low}, stop)")
            self.say("full_start", "tl.maximum(start, tl.cdiv(full_low, BLOCK_J) * BLOCK_J)")
        else:
            self.say("full_start", "start")
        if tails:
            self.say("full_high", self._innermost(tails, "low", "tl.minimum", "stop"))
        self.say("full_stop", f"tl.maximum(full_start, {'full_high' if tails else 'stop'} // BLOCK_J * BLOCK_J)")
        return Bounds(tuple(self.lines), has_head, True, "full_stop")

    def _hull(self, intervals: tuple[Interval, ...]) -> tuple[str, str]:
        """The stretch that all of ``intervals`` are together; one that is empty for this tile does not count."""
        if not intervals:
            return "0", "0"
        ends = []
        for k, interval in enumerate(intervals):
            low, high = self._end(interval.low), self._end(interval.high)
            if interval.when:
                high = self.say(f"high_{k}", self._guarded(interval, high, "0"))
            ends.append((low, high))
        if len(ends) == 1:
            return ends[0]
        lows = [low if low == "0" else f"tl.where({low} < {high}, {low}, size_j)" for low, high in ends]
        low = "0" if all(i.low == 0 for i in intervals) else _folded("tl.minimum", lows)
        return low, _folded("tl.maximum", [high for _, high in ends])

    def _innermost(self, intervals: list[Interval], end: str, call: str, limit: str) -> str:
        parts = [limit]
        for interval in intervals:
            text = self._end(getattr(interval, end))
            parts.append(self._guarded(interval, text, limit) if interval.when else text)
        return _folded(call, parts)

    def _guarded(self, interval: Interval, text: str, otherwise: str) -> str:
        guards = " & ".join(f"({self.printer.index(e, self.names)} >= 0)" for e in interval.when)
        return f"tl.where({guards}, {text}, {otherwise})"

    def _end(self, expr: sp.Expr) -> str:
        text = self.printer.index(expr, self.names)
        if not expr.atoms(Datum):
            return text
        return f"tl.minimum(tl.maximum({bare(text)}, 0), size_j).to(tl.int32)"  # data is in 64 bits, and may be anything

    # ------------------------------------------------------------------------------------------------- compared covers

    def compared(self, cover: Cover) -> Bounds:
        visit = self._runs(cover.visit, "")
        has_full = may_be_full(cover)
        partial = self._runs(cover.partial, "mask_") if has_full else []
        scanned = [run for run in (*visit, *partial) if run.among]
        if scanned:
            self._scan(visit, scanned)
        for run in (*visit, *partial):
            self.say(run.low, f"tl.where({run.low} < {run.high}, {run.low}, size_j)")
        self._around(visit, "low", "stop")
        self.say("start", "low // BLOCK_J * BLOCK_J")
        has_gap = 1 < len(visit) <= MAX_RUNS
        if has_full:
            self._longest("full", partial, ["low", *(run.high for run in partial)])
        if has_gap:
            self._longest("gap", visit, [run.high for run in visit])
        lines, self.lines = self.lines, []
        names = [name for name, there in (("full", has_full), ("gap", has_gap)) if there]
        jumps = [(f"{name}_start", self.say(name, f"{name}_stop - {name}_start")) for name in names]
        stop = " - ".join(["stop", *names])
        if len(jumps) > 1:
            jumps = self._in_order(*jumps)
        return Bounds(
            tuple(lines),
            False,
            has_full,
            "start",
            stop,
            tuple(jumps),
            tuple(self.lines),
            compares=bool(names),
            has_gap=has_gap,
        )

    def _in_order(self, left: tuple[str, str], right: tuple[str, str]) -> list[tuple[str, str]]:
        """Two jumps, the earlier first. At one place there are two only if one of them is over nothing."""
        first = self.say("jump", f"tl.minimum({left[0]}, {right[0]})")
        second = self.say("next_jump", f"tl.maximum({left[0]}, {right[0]})")
        over = self.say("over", f"tl.where({left[0]} <= {right[0]}, {left[1]}, {right[1]})")
        return [(first, over), (second, self.say("next_over", f"{left[1]} + {right[1]} - {over}"))]

    def _runs(self, intervals: tuple[Interval, ...], prefix: str) -> list[_Run]:
        runs = []
        for number, group in enumerate(grouped(intervals)):
            highs = [self._end(i.high) for i in group]
            lows = [self._end(i.low) for i in group]
            if len(group) > 1 and group[0].low != 0:  # they end together: the first to begin counts
                lows = [self._guarded(i, text, "size_j") if i.when else text for i, text in zip(group, lows, strict=True)]
                low, high = _folded("tl.minimum", lows), highs[0]
            else:
                highs = [self._guarded(i, text, "0") if i.when else text for i, text in zip(group, highs, strict=True)]
                low, high = lows[0], _folded("tl.maximum", highs)
            low = self.say(f"{prefix}low_{number}", low)
            if high != "size_j" or group[0].among:
                high = self.say(f"{prefix}high_{number}", high)
            runs.append(_Run(low, high, group[0].among))
        return runs

    def _around(self, runs: list[_Run], low: str, high: str) -> None:
        self.say(low, _folded("tl.minimum", [run.low for run in runs]))
        self.say(high, _folded("tl.maximum", [run.high for run in runs]))

    def _longest(self, name: str, runs: list[_Run], starts: list[str]) -> None:
        """``name_start .. name_stop``: of the stretches that begin at ``starts``, and end where one of ``runs`` begins,
        the one of most blocks."""
        self.lines.append(f"{name}_start, {name}_stop = start, start")
        for place in starts:
            after = "low"
            if place == "size_j":
                continue  # nothing comes after
            if place != "low":
                after = self.say("after", f"tl.maximum({place}, low)")
            ends = [_begins(run, after) for run in runs if run.high != place]
            before = self.say("before", _folded("tl.minimum", ["stop", *ends]))
            self.lines.append(f"{name}_start, {name}_stop = longer({name}_start, {name}_stop, {after}, {before}, BLOCK_J)")

    # ------------------------------------------------------------------------------------------------------- key by key

    def _scan(self, visit: list[_Run], scanned: list[_Run]) -> None:
        """Narrow each of ``scanned`` to what lies between the first and the last key that meets its conditions."""
        self.lines.append("# The first and the last key of each kind, as far as the data says.")
        reachable = [_Run(f"tl.where({run.low} < {run.high}, {run.low}, size_j)", run.high) for run in visit]
        self._around(reachable if len(visit) > 1 else visit, "low", "stop")
        for run in scanned:
            self.say(f"first_{run.low}", "size_j")
            self.say(f"last_{run.high}", "0")
        self.lines += [
            f"for block in range(low // BLOCK_J * BLOCK_J, stop, {self.scanned}):",
            f"    cols = block + tl.arange(0, {self.scanned})",
            "    places = cols[None, :]",
        ]
        self._name_keys(scanned)
        for run in scanned:  # scalars cross the loop: with vectors, Triton 3.9 neither vectorises nor stages loads of keys
            conditions = " & ".join(["(places < stop)", *(self._condition(e) for e in run.among)])
            first, last = f"first_{run.low}", f"last_{run.high}"
            self.say("    found", conditions)
            self.say(f"    {first}", f"tl.minimum({first}, tl.min(tl.where(found, places, size_j)))")
            self.say(f"    {last}", f"tl.maximum({last}, tl.max(tl.where(found, places + 1, 0)))")
        for run in scanned:
            self.say(run.low, f"tl.maximum({run.low}, first_{run.low})")
            self.say(run.high, f"tl.minimum({run.high}, last_{run.high})")

    def _name_keys(self, scanned: list[_Run]) -> None:
        """A variable for what is loaded for each key of a block, truth values as 0 or 1."""
        found = {each for run in scanned for e in run.among for each in e.atoms(Datum) if each.role == "key"}
        for number, each in enumerate(sorted(found, key=lambda each: str(each.name))):
            text = self.printer.scanned(each.expr, "stop")
            self.names[each] = f"key_{number}"
            self.say(f"    key_{number}", f"{text}.to(tl.int32)" if each.expr.kind == "bool" else text)

    def _condition(self, expr: sp.Expr) -> str:
        """``expr >= 0`` for the keys of a block, as a comparison without subtraction: data may be any number."""
        parts = sp.Add.make_args(sp.expand(expr))
        strictly = -1 in parts
        right = [p for p in parts if not p.could_extract_minus_sign()]
        left = [-p for p in parts if p not in right and p != -1]
        texts = [self.printer.index(sp.Add(*terms), {**self.names, KEY: "places"}) for terms in (left, right)]
        return f" {'<' if strictly else '<='} ".join(texts).join("()")


def _begins(run: _Run, after: str) -> str:
    """Where ``run`` begins, if anything of it comes after ``after``."""
    return run.low if run.high == "size_j" else f"tl.where({run.high} > {after}, {run.low}, stop)"


def _folded(call: str, parts: list[str]) -> str:
    text = parts[0]
    for part in parts[1:]:
        text = f"{call}({bare(text)}, {bare(part)})"
    return text
