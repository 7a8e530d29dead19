"""What befalls a cache: many writers, kills, damage, disks that are full or read-only, other owners, hostile files.

Every fault ends in a choice that is right and in one line of the log.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cache import H200, OTHER, Layer, asked, compiled, entry, inputs, own_cache, tuned_for, wanted

from attngen import emit, paths
from attngen.cache import files
from attngen.cache.lookup import Choices
from attngen.cache.store import Store
from attngen.errors import BadCache, UnusableCache

PROCESSES = Path(__file__).parent / "cache_processes.py"
NOBODY = 65534
MUTATIONS = 500  # of each kind of file


__all__ = ["own_cache"]  # for every test here too


def test_sixteen_processes_lose_none_of_16000_rows(tmp_path: Path) -> None:
    assert _program("writers", tmp_path / "tuned.db") == "16000 rows"


def test_two_hundred_kills_lose_no_row(tmp_path: Path) -> None:
    assert _program("killed", tmp_path / "tuned.db").startswith("200 kills")


def _program(name: str, path: Path) -> str:
    done = subprocess.run([sys.executable, str(PROCESSES), name, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------------------- damage


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, one stretch removed or doubled, or the end cut off."""
    changed = bytearray(content)
    kind = chance.randrange(4)
    if kind == 0:
        for _ in range(chance.choice((1, 1, 4, 40))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    start = chance.randrange(len(changed))
    end = min(len(changed), start + chance.choice((1, 3, 50, 1000)))
    return bytes(
        (changed[:start], changed[:start] + changed[end:], changed[:end] + changed[start:])[kind - 1]
    )  # fmt: skip


def test_no_damage_to_the_database_gives_a_wrong_choice(tmp_path: Path) -> None:
    path = tmp_path / "sound.db"
    sizes = (128, 256, 512, 1024)
    Store(path).put((made.key.digest, made.text) for made in (entry(rows=rows) for rows in sizes))
    content, chance = path.read_bytes(), random.Random(0)
    assert content.startswith(b"SQLite format 3")
    for number in range(MUTATIONS):
        broken = tmp_path / "tuned.db"
        broken.write_bytes(mutated(content, chance))
        choices = Choices(store=Store(broken))
        for rows in sizes:
            found = choices.find(wanted(rows=rows))
            assert found is None or (found.tiles, found.source) == ((OTHER,), "cache"), number
        for left in tmp_path.glob("tuned.*"):
            left.unlink()


def test_no_damage_to_a_file_gives_a_wrong_choice(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    sound = {made.key.digest: made for made in (entry(rows=rows) for rows in (128, 256, 512))}
    files.written(path, sound.values())
    content, chance = path.read_bytes(), random.Random(1)
    refused = 0
    for number in range(MUTATIONS):
        path.write_bytes(mutated(content, chance))
        try:
            found, _ = files.read(path)
        except BadCache:
            refused += 1
            continue
        assert found.items() <= sound.items(), number
    assert 0 < refused < MUTATIONS


def test_a_damaged_database_is_moved_aside_and_the_next_writes_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "tuned.db")
    store.path.write_bytes(b"this is no database" * 100)
    with caplog.at_level(logging.WARNING, "attngen"):
        assert Choices(store=store).find(wanted()) is None
    assert [
        record.message for record in caplog.records if "damaged" in record.message and "new one is begun" in record.message
    ]
    assert len(caplog.records) == 1
    assert store.path.with_suffix(".damaged").read_bytes().startswith(b"this is no database")
    store.put([(entry().key.digest, entry().text)])
    assert Choices(store=store).find(wanted()) is not None


def test_a_database_of_somebody_else_is_moved_aside(tmp_path: Path) -> None:
    store = Store(tmp_path / "tuned.db")
    with sqlite3.connect(store.path) as db:
        db.execute("CREATE TABLE entries (name TEXT)")
    db.close()
    store.put([("a", "b")])
    assert store.all() == [("a", b"b")]


# ------------------------------------------------------------------------------------------------- disks and owners


def as_another_user(run: Callable[[], None]) -> None:
    """``run`` in a process without the rights of root."""

    def demoted() -> None:
        if os.geteuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        run()

    in_a_child(demoted)


def in_a_child(run: Callable[[], None]) -> None:
    """In a process of its own, which must succeed."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException as problem:
            print(repr(problem), file=sys.stderr, flush=True)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def folder() -> Any:
    """A directory that every user can reach."""
    path = Path("/tmp") / f"attngen-test-{os.getpid()}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o755)
    yield path
    for each in (path, *path.rglob("*")):
        each.chmod(0o755)
    shutil.rmtree(path)


def test_a_read_only_cache_is_read_and_not_written(folder: Path) -> None:
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)

    def run() -> None:
        store = Store(folder / "tuned.db")
        store.put([(entry().key.digest, entry().text)])
        store.path.chmod(0o444)
        folder.chmod(0o555)
        found = Choices(store=store).find(wanted())
        assert found is not None and found.source == "cache"
        with pytest.raises(UnusableCache):
            store.put([("a", "b")])
        os.environ["ATTNGEN_CACHE_DIR"] = str(folder)
        assert paths.kept("kernels/a.py", "text").read_text() == "text"

    as_another_user(run)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
def test_a_cache_of_another_user_is_neither_read_nor_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(folder / "tuned.db")
    store.put([(entry().key.digest, entry().text)])
    os.chown(store.path, NOBODY, NOBODY)
    with caplog.at_level(logging.WARNING, "attngen"):
        assert Choices(store=store).find(wanted()) is None
        assert Choices(store=store).find(wanted(rows=64)) is None
    assert [record.message for record in caplog.records] == [
        f"the cache of tuned choices cannot be used: it belongs to another user ({store.path}); "
        "choices are made by the cost model"
    ]
    os.chown(folder, NOBODY, NOBODY)
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(folder))
    with pytest.raises(PermissionError, match="another user"):
        paths.cache_dir()
    assert Choices().find(wanted()) is None
    kernel = paths.kept("kernels/a.py", "text")
    assert kernel.read_text() == "text" and folder not in kernel.parents


def test_a_full_disk_loses_the_new_row_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this process may not grow: what a full disk does to a write."""
    store = Store(tmp_path / "tuned.db")
    store.put([(entry().key.digest, entry().text)])
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path))

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size, resource.RLIM_INFINITY))
        with pytest.raises(UnusableCache):
            store.put([(f"{number}", "x" * 5000) for number in range(10)])
        found = Choices(store=store).find(wanted())
        assert found is not None and found.tiles == (OTHER,)

    in_a_child(run)
    assert Choices(store=store).find(wanted()) is not None


def test_a_kernel_is_kept_elsewhere_if_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path))
    write = paths.write_atomically

    def full(path: Path, text: str) -> None:
        if tmp_path in path.parents:
            raise OSError(28, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(paths, "write_atomically", full)
    with caplog.at_level(logging.WARNING, "attngen"):
        kernels = [paths.kept(f"kernels/{name}.py", name) for name in "ab"]
    assert [kernel.read_text() for kernel in kernels] == ["a", "b"]
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text


def no_database(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.path.write_bytes(b"no database" * 1000)


def no_entry(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put((digest, "{}") for digest, _ in store.all())


def no_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.path.unlink()
    store.path.mkdir()


def never_free(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*about: Any, **more: Any) -> Any:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(sqlite3, "connect", locked)


@pytest.mark.parametrize("fault", [no_database, no_entry, no_file, never_free])
def test_a_fault_of_the_cache_is_one_line_and_the_model_runs(
    fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tuned_for(*asked())
    assert compiled()[1].sites[0].source == "cache"
    fault(Store(), monkeypatch)
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "attngen"):
        out, report = compiled()
    assert report.sites[0].source == "model" and report.sites[0].status == "replaced"
    torch.testing.assert_close(out, Layer()(*inputs()))
    assert len([record for record in caplog.records if record.name == "attngen"]) == 1, caplog.text


# -------------------------------------------------------------------------------------------------------------- hostile

POISON = "');import os;os.system('true')#"


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, each in inside for place in places(each, (*at, key)))]


@pytest.mark.parametrize("poison", [POISON, [POISON], {POISON: 1}, -1, 1e308, 10**30, None, True, "\ud800", "64"], ids=repr)
def test_nothing_of_a_hostile_entry_reaches_a_template(poison: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever writes a file can also make its checksum right: whatever is accepted has tiles of plain numbers."""
    monkeypatch.setattr("attngen.cache.entry._check", lambda made: made.check)
    sound = json.loads(entry().text)
    for at in places(sound)[1:]:
        hostile = json.loads(entry().text)
        target = hostile
        for step in at[:-1]:
            target = target[step]
        target[at[-1]] = poison
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps({"attngen_cache": 1, "entries": [hostile]}))
        try:
            found, wrong = files.read(path)
        except BadCache:  # not even JSON
            continue
        assert len(found) + len(wrong) == 1
        for each in found.values():
            assert all(type(value) in (int, bool) for tile in each.tiles for name, value in tile if name != "family")
            assert {tile.family for tile in each.tiles} <= set(emit.TEMPLATES)


def test_what_is_read_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(files, "LARGEST", 100)
    path.write_text(" " * 101)
    with pytest.raises(BadCache, match="more than"):
        files.read(path)
    path.write_text("[" * 50)
    with pytest.raises(BadCache, match="not a file of tuned choices"):
        files.read(path)


def test_the_device_of_an_entry_is_part_of_what_it_is_for() -> None:
    assert H200.label in entry().key.model_dump_json()
