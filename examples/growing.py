"""A record of measurements that grows: each result is written as soon as it is there, and is not measured again.

So a run that is cut off loses only what it was at, and the same command goes on from there. That holds where nothing of what
results depend on has changed: the device, the versions, the code, and whatever else is the same for all of a record's
results. A file of anything else is begun anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

CODE = {"attngen": ".py", "attngen.passes": ".py", "attngen.templates": ".jinja"}


@dataclass(frozen=True)
class Record:
    """``head`` is what all ``results`` have in common. Where there is a ``path``, all of it is there at any time."""

    path: Path | None
    head: dict[str, Any]
    results: list[dict[str, Any]]

    @classmethod
    def opened(cls, path: Path | None, head: dict[str, Any]) -> Record:
        """With what ``path`` holds under the same ``head``."""
        common = json.loads(json.dumps({**head, "code": code()}))
        found = json.loads(path.read_text()) if path is not None and path.exists() else {}
        results = found.pop("results", [])
        return cls(path, common, results if found == common else [])

    def has(self, **setting: Any) -> bool:
        """Whether there is a result whose fields say this."""
        return any(all(row.get(name) == value for name, value in setting.items()) for row in self.results)

    def measure(self, measured: Callable[[], dict[str, Any]], **setting: Any) -> None:
        """Have a result of ``setting``: by ``measured``, if there is none yet."""
        if not self.has(**setting):
            self.add({**setting, **measured()})

    def add(self, *results: dict[str, Any]) -> None:
        self.results.extend(results)
        if self.path is not None:
            beside = self.path.with_suffix(".part")
            lines = ",\n ".join(map(json.dumps, self.results))
            beside.write_text(f'{json.dumps(self.head)[:-1]}, "results": [\n {lines}\n]}}\n')
            os.replace(beside, self.path)

    @property
    def content(self) -> dict[str, Any]:
        return {**self.head, "results": self.results}


def code() -> str:
    """Tells apart what attngen and the examples were when something was measured."""
    roots = [(files(package), suffix) for package, suffix in CODE.items()] + [(Path(__file__).parent, ".py")]
    texts = [path.read_bytes() for root, suffix in roots for path in sorted(Path(str(root)).rglob(f"*{suffix}"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:12]
