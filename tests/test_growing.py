"""Records that grow: nothing is measured twice, nothing is lost, and nothing that may have changed is taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import growing
import pytest
from growing import Record

HEAD = {"device": "D", "steps": 3}


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "out.json", []

    def measured(value: float) -> dict[str, Any]:
        calls.append(value)
        return {"ms": value}

    for _ in range(2):
        record = Record.opened(path, HEAD)
        record.measure(lambda: measured(1.5), model="a", size={"rows": 2})
        record.measure(lambda: measured(2.5), model="b", size={"rows": 2})
        record.measure(lambda: measured(3.5), model="a", size={"rows": 4})
    assert calls == [1.5, 2.5, 3.5]
    written = json.loads(path.read_text())
    assert written == record.content and written.pop("code") == growing.code()
    assert written == {**HEAD, "results": record.results}
    assert [row["ms"] for row in record.results] == calls and record.results[1]["model"] == "b"


def test_a_run_that_ends_early_leaves_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "out.json"

    def cut_off() -> dict[str, Any]:
        assert json.loads(path.read_text())["results"] == [{"model": "a", "ms": 1}]
        raise KeyboardInterrupt

    record = Record.opened(path, HEAD)
    record.measure(lambda: {"ms": 1}, model="a")
    with pytest.raises(KeyboardInterrupt):
        record.measure(cut_off, model="b")
    later = Record.opened(path, HEAD)
    assert later.has(model="a") and not later.has(model="b") and not later.has(model="a", ranks=2)
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("head", [{**HEAD, "steps": 4}, {**HEAD, "inner": "eager"}, {"device": "D"}])
def test_results_of_anything_else_are_not_taken_over(tmp_path: Path, head: dict[str, Any]) -> None:
    path = tmp_path / "out.json"
    Record.opened(path, HEAD).add({"model": "a"})
    assert Record.opened(path, HEAD).has(model="a") and not Record.opened(path, head).results


def test_results_of_other_code_are_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    Record.opened(path, HEAD).add({"model": "a"})
    monkeypatch.setattr(growing, "code", lambda: "other")
    assert not Record.opened(path, HEAD).results


def test_without_a_file_nothing_is_kept() -> None:
    record = Record.opened(None, HEAD)
    record.add({"model": "a"})
    assert record.has(model="a") and not Record.opened(None, HEAD).results
