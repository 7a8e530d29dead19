"""Plan files: the choices made for a model, to be made again elsewhere.

A file names specs, problems and tiles and nothing that runs: kernel text is always rendered from the installed templates.
An entry for another version of the template is ignored with a warning; a file that does not read as a plan is refused.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import attngen
from attngen.emit import TEMPLATE, template_digest
from attngen.errors import BadPlan
from attngen.spec import AttentionSpec, Problem, Tile

log = logging.getLogger("attngen")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TileRecord(_Record):
    rows: int = Field(ge=1, le=1024)
    keys: int = Field(ge=1, le=1024)
    warps: int = Field(ge=1, le=32)
    stages: int = Field(ge=1, le=16)


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
        stale = [e for e in same if e.template != template_digest(TEMPLATE)]
        if stale:
            log.warning("the plan's choice for %s was made for another version of %s and is ignored", stale[0].where, TEMPLATE)
            same = [e for e in same if e not in stale]
        sizes = (list(problem.batch), problem.rows, problem.keys)
        exact = [e for e in same if (e.batch, e.rows, e.keys) == sizes]
        chosen = next(iter([*exact, *same]), None)
        return None if chosen is None else Tile(**chosen.tile.model_dump())


def entry(spec: AttentionSpec, problem: Problem, tile: Tile, where: str, kernel: str) -> Entry:
    record = TileRecord(rows=tile.rows, keys=tile.keys, warps=tile.warps, stages=tile.stages)
    return Entry(
        spec=spec.key, batch=list(problem.batch), rows=problem.rows, keys=problem.keys, tile=record,
        template=template_digest(TEMPLATE), where=where, kernel=kernel,
    )  # fmt: skip


def new(device: str, entries: list[Entry]) -> PlanFile:
    return PlanFile(attngen=attngen.__version__, device=device, entries=entries)


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
        raise BadPlan(f"{path} is not a plan file of attngen ({detail}). Write it again with: attngen optimize") from None
