"""Plan -> kernel source. Choices are made here, in Python; templates only say where the pieces go."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import jinja2

import attngen
from attngen import hopper, hopper_bwd, portable, portable_bwd
from attngen.errors import Miss
from attngen.gluon import gluon
from attngen.printer import Unprintable
from attngen.spec import HOPPER, PORTABLE, AttentionSpec, Tile, digest

TEMPLATES = {PORTABLE: "portable_fwd.py.jinja", HOPPER: "hopper_fwd.py.jinja"}
BACKWARDS = {PORTABLE: "portable_bwd.py.jinja", HOPPER: "hopper_bwd.py.jinja"}
_SHARE = {
    PORTABLE: "one kernel for the queries' gradient, one for those of keys and values",
    HOPPER: "one kernel for all products, one before and one after it",
}
_HOLES = {PORTABLE: portable.holes, HOPPER: hopper.holes}


@dataclass(frozen=True)
class Kernel:
    """The text of one generated module. ``name`` is unique to its content, apart from the header.

    ``otherwise`` is launched instead on tensors that its own ``launch`` cannot take, as its ``suits`` has it, and behind it
    where it leaves rows.
    """

    spec: AttentionSpec
    tile: Tile
    source: str
    name: str
    otherwise: Kernel | None = None

    @property
    def family(self) -> str:
        return self.tile.family

    @property
    def leaves_rows(self) -> bool:
        """Whether ``otherwise`` has to be launched behind it, for rows that masks leave nothing of."""
        return hopper.leaves_rows(self.spec, self.tile)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attngen.templates", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["listed"] = _listed
    environment.filters["joined"] = lambda names, suffix: ", ".join(name + suffix for name in names)
    environment.filters["quoted"] = json.dumps
    environment.filters["gluon"] = gluon
    environment.filters["listed_after"] = lambda names: "".join(f", {name}" for name in names)
    environment.filters["listed_before"] = lambda names: "".join(f"{name}, " for name in names)
    return environment


def _listed(names: list[str], indent: int) -> str:
    """A comma-separated list, broken into lines."""
    return textwrap.fill(", ".join(names) + ",", 116 - indent).replace("\n", "\n" + " " * indent)


@cache
def template_digest(template: str) -> str:
    """Of the template and of what it includes."""
    return digest("".join(_texts(template)))


def _texts(template: str) -> list[str]:
    text = files("attngen.templates").joinpath(template).read_text()
    return [text, *(part for name in re.findall(r'{% include "(.+?)" %}', text) for part in _texts(name))]


def emit(
    spec: AttentionSpec, tile: Tile, *, notes: tuple[str, ...] = (), l2_bytes: int = 50 << 20, sms: int = 132
) -> Kernel | Miss:
    """The kernel module for ``spec`` with ``tile``, or a ``Miss`` if the template cannot express it.

    ``notes`` are lines for the header (predicted traffic, where the choice came from); they do not change the name.
    The device tells how large its L2 cache is and, for programs that stay, how many multiprocessors it has.
    """
    try:
        holes = _HOLES[tile.family](spec, tile, l2_bytes, sms)
    except Unprintable as problem:
        return Miss(str(problem))
    template = _environment().get_template(TEMPLATES[tile.family])
    body = template.render(holes, header="")
    name = f"fwd_{digest(body)}"
    header = _header(spec, tile, notes)
    return Kernel(spec, tile, template.render(holes, header=header), name)


@dataclass(frozen=True)
class BackwardKernel:
    """The text of one generated module for the gradients of ``spec``; ``tiles`` are those of its two kernels, the one that
    holds queries and the one that holds keys, or of the one kernel that makes all gradients.

    ``otherwise`` is launched instead for gradients that its own ``launch`` does not make, or that must not change from run to
    run.
    """

    spec: AttentionSpec
    tiles: tuple[Tile, ...]
    source: str
    name: str
    otherwise: BackwardKernel | None = None

    @property
    def family(self) -> str:
        return self.tiles[0].family

    @property
    def leaves_rows(self) -> bool:
        """Whether ``otherwise`` has to be launched after it, for rows whose weights do not follow from their log-sum-exp."""
        return hopper.leaves_rows(self.spec, self.tiles[0])


def emit_backward(
    spec: AttentionSpec, tiles: tuple[Tile, ...], *, notes: tuple[str, ...] = (), l2_bytes: int = 50 << 20, sms: int = 132
) -> BackwardKernel | Miss:
    """The module that computes the gradients of ``spec``, or a ``Miss`` if the template cannot express them. What the device
    tells is as in ``emit``."""
    family = tiles[0].family
    try:
        if family == HOPPER:
            holes = hopper_bwd.holes(spec, tiles[0], l2_bytes, sms)
        else:
            holes = portable_bwd.holes(spec, (tiles[0], tiles[1]), l2_bytes)
    except Unprintable as problem:
        return Miss(str(problem))
    file = BACKWARDS[family]
    template = _environment().get_template(file)
    name = f"bwd_{digest(template.render(holes, header=''))}"
    lines = [
        f"Attention, backward: {_SHARE[family]}.",
        "",
        *(f"    {line}" for line in spec.text.splitlines()),
        "",
        *notes,
        f"Written by attngen {attngen.__version__} from {file} ({template_digest(file)}).",
    ]
    return BackwardKernel(spec, tiles, template.render(holes, header="\n".join(lines) + "\n"), name)


def _header(spec: AttentionSpec, tile: Tile, notes: tuple[str, ...]) -> str:
    template = TEMPLATES[tile.family]
    left = ", and a portable one behind it for rows that masks leave nothing of" if hopper.leaves_rows(spec, tile) else ""
    lines = [
        f"Attention, forward: one fused kernel{left}.",
        "",
        *(f"    {line}" for line in spec.text.splitlines()),
        "",
        f"Tile: {tile.rows} queries x {tile.keys} keys, {tile.warps} warps, {tile.stages} stages.",
        *notes,
        f"Written by attngen {attngen.__version__} from {template} ({template_digest(template)}).",
    ]
    return "\n".join(lines) + "\n"
