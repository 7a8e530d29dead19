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
from attngen.emit import BACKWARDS, TEMPLATES, Kernel, template_digest
from attngen.errors import BadPlan
from attngen.report import Report
from attngen.spec import AttentionSpec, Problem, Tile

log = logging.getLogger("attngen")


class Record(BaseModel):
    """Of a file that anybody may have written: a field that is none of ours, or of another type, refuses all of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Side = Literal[16, 32, 64, 128, 192, 256]  # powers of two, products at least 16 wide; or three warpgroups of 64


class TileRecord(Record):
    rows: Side
    keys: Side
    warps: Literal[1, 2, 4, 8, 12, 16]
    stages: int = Field(ge=1, le=8)
    family: Literal["portable", "hopper"] = "portable"
    persistent: bool = False

    @classmethod
    def of(cls, tile: Tile) -> TileRecord:
        return cls.model_validate(asdict(tile))

    @property
    def made(self) -> Tile:
        return Tile(**self.model_dump())


class Entry(Record):
    """``backward``: where gradients were asked for, the tiles of their kernels, and ``backward_template`` their digest."""

    spec: str = Field(min_length=12, max_length=12)
    batch: list[int]
    rows: int
    keys: int
    tile: TileRecord
    template: str
    backward: list[TileRecord] = Field(default=[], max_length=2)
    backward_template: str = ""
    where: str = ""
    kernel: str = ""


class PlanFile(Record):
    """``plan.json``. ``device`` is what was planned for, and ``fp8`` the option that it was planned with."""

    attngen: str
    device: str
    entries: list[Entry]
    fp8: Literal["off", "block", "rotate"] = "off"

    def tile_for(self, spec: AttentionSpec, problem: Problem) -> Tile | None:
        """The tile chosen for this spec at these sizes, else at any sizes, else None."""
        chosen = self._chosen(spec, problem)
        if chosen is None or _stale(chosen, TEMPLATES[chosen.tile.family], chosen.template):
            return None
        return chosen.tile.made

    def backward_for(self, spec: AttentionSpec, problem: Problem) -> tuple[Tile, ...] | None:
        """The same for the tiles of its gradients."""
        chosen = self._chosen(spec, problem)
        if chosen is None or not chosen.backward:
            return None
        if _stale(chosen, BACKWARDS[chosen.backward[0].family], chosen.backward_template):
            return None
        return tuple(tile.made for tile in chosen.backward)

    def _chosen(self, spec: AttentionSpec, problem: Problem) -> Entry | None:
        same = [e for e in self.entries if e.spec == spec.key]
        current = [e for e in same if e.template == template_digest(TEMPLATES[e.tile.family])] or same
        sizes = (list(problem.batch), problem.rows, problem.keys)
        exact = [e for e in current if (e.batch, e.rows, e.keys) == sizes]
        return next(iter([*exact, *current]), None)


def _stale(entry: Entry, template: str, made_from: str) -> bool:
    if made_from == template_digest(template):
        return False
    log.warning("the plan's choice for %s was made for another version of %s and is ignored", entry.where, template)
    return True


def entry(
    spec: AttentionSpec, problem: Problem, tile: Tile, where: str, kernel: str, backward: Sequence[Tile] = ()
) -> Entry:  # fmt: skip
    return Entry(
        spec=spec.key, batch=list(problem.batch), rows=problem.rows, keys=problem.keys, tile=TileRecord.of(tile),
        template=template_digest(TEMPLATES[tile.family]), backward=[TileRecord.of(each) for each in backward],
        backward_template=template_digest(BACKWARDS[backward[0].family]) if backward else "", where=where, kernel=kernel,
    )  # fmt: skip


def new(device: str, entries: list[Entry], fp8: str = "off") -> PlanFile:
    return PlanFile.model_validate({"attngen": attngen.__version__, "device": device, "entries": entries, "fp8": fp8})


def of(report: Report, kernels: Sequence[Kernel]) -> PlanFile:
    """The choices of every replaced site of a report, one entry for each kernel and size."""
    by_name = {kernel.name: kernel for kernel in kernels}
    entries: dict[tuple[str, Problem], Entry] = {}
    for site in report.replaced:
        assert site.sizes is not None
        problem = Problem(tuple(site.sizes["batch"]), site.sizes["rows"], site.sizes["keys"])
        kernel = by_name[site.kernel]
        backward = tuple(Tile(**tile) for tile in site.backward_tiles)
        made = entry(kernel.spec, problem, kernel.tile, site.where, site.kernel, backward)
        entries.setdefault((site.kernel, problem), made)
    asked = next((kernel.spec.fp8 for kernel in kernels if kernel.spec.fp8), "off")
    return new(report.device, list(entries.values()), asked)


def read(path: str | Path) -> PlanFile:
    """The plan in a file, or in a directory that ``attngen optimize`` wrote. Raises ``BadPlan``."""
    path = Path(path)
    path = path / "plan.json" if path.is_dir() else path
    try:
        return PlanFile.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise BadPlan(f"{path} does not exist. Write one with: attngen optimize model.py -o DIR") from None
    except (OSError, ValueError) as problem:
        raise BadPlan(
            f"{path} is not a plan file of attngen ({fault(problem)}). Write it again with: attngen optimize"
        ) from None


def fault(problem: Exception) -> str:
    """What is wrong with a file; of a record, the first field that is."""
    if not isinstance(problem, ValidationError):
        return str(problem)
    first = problem.errors(include_url=False, include_input=False)[0]
    return ": ".join(part for part in (".".join(map(str, first["loc"])), first["msg"]) if part)
