"""Plan files: the choices made for a model, to be made again elsewhere.

A file names specs, problems and tiles and nothing that runs: kernel text is always rendered from the installed
templates. An entry for another version of the template is ignored with a warning. A file that is no plan is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import attngen
from attngen.emit import TEMPLATES, Kernel, template_digest
from attngen.errors import BadPlan
from attngen.report import Report
from attngen.spec import AttentionSpec, Problem, Tile

log = logging.getLogger("attngen")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Side = Literal[16, 32, 64, 128, 192, 256]  # powers of two, products at least 16 wide; or three warpgroups of 64


class TileRecord(_Record):
    rows: Side
    keys: Side
    warps: Literal[1, 2, 4, 8, 12, 16]
    stages: int = Field(ge=1, le=8)
    family: Literal["portable", "hopper"] = "portable"
    persistent: bool = False


class Entry(_Record):
    spec: str = Field(min_length=12, max_length=12)
    batch: list[int]
    rows: int
    keys: int
    tile: TileRecord
    template: str
    where: str = ""
    kernel: str = ""


class PlanFile(_Record):
    """``plan.json``. ``device`` is what was planned for."""

    attngen: str
    device: str
    entries: list[Entry]

    def tile_for(self, spec: AttentionSpec, problem: Problem) -> Tile | None:
        """The tile chosen for this spec at these sizes, else at any sizes, else None."""
        same = [e for e in self.entries if e.spec == spec.key]
        stale = [e for e in same if e.template != template_digest(TEMPLATES[e.tile.family])]
        if stale:
            name = TEMPLATES[stale[0].tile.family]
            log.warning("the plan's choice for %s was made for another version of %s and is ignored", stale[0].where, name)
            same = [e for e in same if e not in stale]
        sizes = (list(problem.batch), problem.rows, problem.keys)
        exact = [e for e in same if (e.batch, e.rows, e.keys) == sizes]
        chosen = next(iter([*exact, *same]), None)
        return None if chosen is None else Tile(**chosen.tile.model_dump())


def entry(spec: AttentionSpec, problem: Problem, tile: Tile, where: str, kernel: str) -> Entry:
    record = TileRecord.model_validate(asdict(tile))
    return Entry(
        spec=spec.key, batch=list(problem.batch), rows=problem.rows, keys=problem.keys, tile=record,
        template=template_digest(TEMPLATES[tile.family]), where=where, kernel=kernel,
    )  # fmt: skip


def new(device: str, entries: list[Entry]) -> PlanFile:
    return PlanFile(attngen=attngen.__version__, device=device, entries=entries)


def of(report: Report, kernels: Sequence[Kernel]) -> PlanFile:
    """The choices of every replaced site of a report, one entry for each kernel and size."""
    by_name = {kernel.name: kernel for kernel in kernels}
    entries: dict[tuple[str, Problem], Entry] = {}
    for site in report.replaced:
        assert site.sizes is not None
        problem = Problem(tuple(site.sizes["batch"]), site.sizes["rows"], site.sizes["keys"])
        kernel = by_name[site.kernel]
        made = entry(kernel.spec, problem, kernel.tile, site.where, site.kernel)
        entries.setdefault((site.kernel, problem), made)
    return new(report.device, list(entries.values()))


def read(path: str | Path) -> PlanFile:
    """The plan in a file, or in a directory that ``attngen optimize`` wrote. Raises ``BadPlan``."""
    path = Path(path)
    path = path / "plan.json" if path.is_dir() else path
    try:
        return PlanFile.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise BadPlan(f"{path} does not exist. Write one with: attngen optimize model.py -o DIR") from None
    except (OSError, ValidationError, ValueError) as problem:
        first = problem.errors()[0] if isinstance(problem, ValidationError) else None
        detail = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(problem)
        raise BadPlan(
            f"{path} is not a plan file of attngen ({detail}). Write it again with: attngen optimize"
        ) from None
