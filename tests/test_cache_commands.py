"""``attngen cache``: what was tuned is listed, carried to other machines, looked at and cleared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cache import entry, own_cache, put
from typer.testing import CliRunner, Result

import attngen
from attngen import cli
from attngen.cache import contents, files
from attngen.cache import entry as entries
from attngen.cache.store import Store
from attngen.device import DEVICES
from attngen.errors import BadCache
from attngen.spec import Tile

__all__ = ["own_cache"]  # for every test here


# -------------------------------------------------------------------------------------------------------------- commands


def test_commands_go_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``assert`` ends a program with an exit code of its own, before anything is written."""
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(
        "import torch\n"
        "def model(q, k, v):\n    return torch.nn.functional.scaled_dot_product_attention(q, k, v)\n"
        "example_inputs = tuple(torch.zeros(2, 3, 80, 32) for _ in range(3))\n"
    )
    monkeypatch.setenv("ATTNGEN_CACHE", "assert")
    for command in ("explain", "optimize"):
        done = CliRunner().invoke(cli.app, [command, "model.py"])
        assert done.exit_code == 9 and "no tile of its forward has been tuned" in done.output, done.output
    assert {path.name for path in tmp_path.iterdir()} - {"cache", "__pycache__"} == {"model.py"}
    monkeypatch.setenv("ATTNGEN_CACHE", "perhaps")
    assert CliRunner().invoke(cli.app, ["explain", "model.py"]).exit_code == 2


def run(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(cli.app, ["cache", *arguments])
    assert done.exit_code == code, done.output
    return done


def test_list_and_show() -> None:
    assert "0 tuned choices" in run("list").output
    put(entry(), entry(rows=1000, device=DEVICES["h100"]))
    listed = run("list").output
    assert "2 tuned choices" in listed and "16x32 w8 s1" in listed and "128 x 128" in listed and "12.5" in listed
    for name in ("NVIDIA H200", "h200"):
        assert "1 tuned choice " in run("list", "--device", name).output
    digest = entry().key.digest
    assert entries.parsed(run("show", digest[:8]).output) == entry()
    assert "0 entries begin with" in run("show", "zzz", code=2).output


def test_what_is_exported_is_imported_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put(entry(), entry(rows=1000))
    file = str(tmp_path / "mine.json")
    assert "2 tuned choices written" in run("export", file).output
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "other"))
    put(entry(us=20.0, tiles=(Tile(32, 32, 4, 1),)))
    assert "1 new, 1 faster than before, 0 not" in run("import", file).output
    assert "0 new, 0 faster than before, 2 not" in run("import", file).output
    assert contents.contents(Store()).entries == {one.key.digest: one for one in (entry(), entry(rows=1000))}


def test_the_faster_one_is_merged(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{name}.json") for name in "abc"]
    files.written(Path(names[0]), [entry(us=3.0), entry(rows=1000)])
    files.written(Path(names[1]), [entry(us=2.0)])
    assert "2 tuned choices written" in run("merge", *names[:2], "-o", names[2]).output
    assert {one.microseconds for one in files.read(names[2])[0].values()} == {2.0, 12.5}


def test_a_damaged_entry_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    files.written(path, [entry(), entry(rows=1000)])
    content = json.loads(path.read_text())
    content["entries"][0]["candidates"] = 7
    path.write_text(json.dumps(content))
    done = run("import", str(path))
    assert "1 new" in done.output and "entry 0: Value error, the entry was changed" in done.output
    assert "changed after" in run("verify", str(path), code=6).output


def test_verify_and_prune() -> None:
    put(entry())
    assert "1 tuned choice, nothing wrong" in run("verify").output
    put(entry(rows=1000, tiles=(Tile(256, 16, 16, 8),)))
    Store().put([("damaged", "{")])
    wrong = run("verify", code=6).output
    assert "256x16 w16 s8 is none of the tiles" in wrong and "damaged: " in wrong
    assert "1 damaged" in run("list").output
    assert "1 tuned choice taken out" in run("prune").output
    assert "2 tuned choices taken out" in run("prune", "--all").output
    assert "0 tuned choices" in run("list").output


@pytest.mark.parametrize("content", ["", "[]", "{", '{"attngen_cache": 2, "entries": []}', '{"entries": [], "code": "x"}'])
def test_files_that_are_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    assert "is not a file of tuned choices" in run("import", str(path), code=6).output
    with pytest.raises(BadCache, match="cannot be read"):
        files.read(tmp_path / "none.json")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in run("export", str(tmp_path / "file" / "x.json"), code=5).output


# --------------------------------------------------------------------------------------------------------------- shipped


@pytest.mark.parametrize("path", sorted((Path(attngen.__file__).parent / "tuned").glob("*.json")), ids=lambda path: path.stem)
def test_what_comes_with_attngen_is_sound(path: Path) -> None:
    device = DEVICES[path.stem]
    found, wrong = files.read(path)
    assert not wrong
    assert not [reason for one in found.values() if (reason := contents.unknown(one))]
    assert {(one.key.device, one.key.sms) for one in found.values()} <= {(device.label, device.sms)}
    assert files.shipped(path.stem) == found
    assert not files.shipped("no-such-device")
