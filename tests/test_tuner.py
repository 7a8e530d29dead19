"""The tuner: what is right and fastest is kept and used, within its time, over several cards and several ranks."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from specs import CAUSAL, attention
from test_cache import H200, Layer, asked, inputs, own_cache, wanted
from tuning import fake
from typer.testing import CliRunner

import attngen
from attngen import cli, options
from attngen.aot import Job, layout_of
from attngen.cache.key import BACKWARD
from attngen.cache.lookup import Choice, Choices, tuned
from attngen.cache.store import Store
from attngen.choose import HOPPER_TILES, choose
from attngen.choose_bwd import choose_backward
from attngen.errors import BadOption
from attngen.spec import HOPPER, PORTABLE, Problem
from attngen.tune import session, shared, spread, supervise, tuner
from attngen.tune.candidates import candidates
from attngen.tune.supervise import measured
from attngen.tune.tuner import Budget, Tuner

__all__ = ["own_cache"]  # for every test here


# -------------------------------------------------------------------------------------------------------------- the tuner


def test_candidates_are_the_best_few_of_each_family() -> None:
    spec = attention(mask=CAUSAL, dtype=torch.bfloat16, head_dim=128, lse=True)
    problem = Problem((4, 16), 4096, 4096)
    question = wanted(spec=spec, problem=problem, inputs=tuple(
        layout_of(torch.empty(4, 16, 4096, 128, dtype=torch.bfloat16, device="meta")) for _ in range(3)))  # fmt: skip
    quick, full = candidates(question, 4), candidates(question, 16)
    families = [tiles[0].family for tiles in quick]
    assert families.count(HOPPER) == families.count(PORTABLE) == 4 and set(quick) < set(full)
    plan = choose(spec, problem, H200)
    assert quick[0] == (plan.tile,)  # type: ignore[union-attr]
    unaligned = replace(question, inputs=tuple(replace(x, offset=1) for x in question.inputs))
    assert {tiles[0].family for tiles in candidates(unaligned, 4)} == {PORTABLE}
    back = candidates(replace(question, phase=BACKWARD), 4)
    assert back[0] == choose_backward(spec, problem, H200).tiles  # type: ignore[union-attr]
    assert sorted(len(tiles) for tiles in back) == [1, 1, 2, 2, 2, 2]  # programs that stay, and of one tile
    for tiles in back:
        assert choose_backward(spec, problem, H200, tiles).tiles == tiles  # type: ignore[union-attr]
    assert candidates(wanted(spec=attention(head_dim=600)), 4) == ()
    assert set(HOPPER_TILES) >= {tiles[0] for tiles in full if tiles[0].family == HOPPER}


def test_the_fastest_is_kept_and_known_the_next_time(tmp_path: Path) -> None:
    (question,) = asked()
    made = Tuner("quick", Budget(60.0), command=fake(tmp_path, "30", "crash", "20"))
    choice = made.measure(question)
    assert choice == Choice(candidates(question, 4)[2], "tuned", 20.0)
    kept = tuned(question, Store())
    assert kept == replace(choice, source="cache")
    (text,) = [text for _, text in Store().all()]
    assert b'"model_microseconds":30.0' in text and b'"candidates":2' in text


def test_what_is_measured_is_used_at_once_and_found_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``options={"tune": "quick"}``, with a process that only says that it has measured."""
    monkeypatch.setattr(supervise, "COMMAND", fake(tmp_path, "30", "20", "10"))
    monkeypatch.setattr("attngen.tune.session.Tuner", lambda effort, budget, store, card: Tuner(
        effort, budget, store, card, command=supervise.COMMAND))  # fmt: skip
    monkeypatch.setattr("attngen.backend._card", lambda values: 0)
    sources = []
    for settings in ({"tune": "quick"}, {"cache": "assert"}, {"tune": "quick", "cache": "refresh"}):
        with torch.no_grad(), attngen.record() as reports:
            fast = torch.compile(Layer(), backend="attngen", options={"inner": "eager", "strict": True, **settings})
            torch.testing.assert_close(fast(*inputs()), Layer()(*inputs()))
        sources.append((reports[0].sites[0].source, reports[0].sites[0].measured_ms))
        torch._dynamo.reset()
    assert sources == [("tuned", 0.01), ("cache", 0.01), ("tuned", 0.01)]


def test_on_a_cpu_nothing_is_measured_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad(), caplog.at_level(logging.WARNING, "attngen"), attngen.record() as reports:
        torch.compile(Layer(), backend="attngen", options={"inner": "eager", "tune": "full"})(*inputs())
    assert reports[0].sites[0].source == "model" and "not on a GPU" in caplog.text


def test_nothing_is_measured_while_a_graph_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = Tuner("quick", Budget(60.0), command=fake(tmp_path, "30"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert made.measure(wanted()) is None and "captured" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert made.measure(wanted()) is not None


def test_a_budget_that_is_spent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Tuner("quick", Budget(1.0), command=fake(tmp_path, "late"))
    assert made.measure(wanted()) is None and "there was no time" in caplog.text
    assert made.budget.left == 0
    assert made.measure(wanted(rows=16)) is None and "are spent" in caplog.text
    assert tuner.budget_of_process(7.0) is tuner.budget_of_process(7.0)


def test_without_a_cache_what_is_measured_is_still_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", "/dev/null/cache")
    made = Tuner("quick", Budget(60.0), command=fake(tmp_path, "30", "20"))
    choice = made.measure(wanted())
    assert choice is not None and choice.microseconds == 20.0
    assert len([r for r in caplog.records if "used in this process alone" in r.message]) == 1


@pytest.mark.parametrize("wrong", [{"tune": "slow"}, {"tune_seconds": 0.0}, {"tune_seconds": -1.0}])
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="tune"):
        options.parse(wrong)


# ------------------------------------------------------------------------------------------------------------ many cards


def test_work_is_spread_and_nothing_is_done_twice(tmp_path: Path) -> None:
    questions = [wanted(rows=1 << power) for power in range(4, 10)]
    tuners = []
    for card in ("0", "1", "2"):
        folder = tmp_path / card
        folder.mkdir()
        tuners.append(Tuner("quick", Budget(60.0), card=card, command=fake(folder, "30", "20")))
    done: list[Any] = []
    results = spread.spread(questions, tuners, done.append)
    assert sorted(result.wanted.problem.rows for result in results) == [16, 32, 64, 128, 256, 512]
    assert done == results and len(Store().all()) == 6


def test_a_card_that_is_lost_leaves_its_work_to_the_others(tmp_path: Path) -> None:
    good = Tuner("quick", Budget(60.0), command=fake(tmp_path, "30"))
    spent = Tuner("quick", Budget(0.0), command=["/nowhere"])
    assert len(spread.spread([wanted(rows=64), wanted(rows=128)], [spent, good], lambda result: None)) == 2


def test_cards_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(spread, "_like", lambda number, device: number != 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (spread.cards("auto", H200), spread.cards("all", H200), spread.cards("1,0", H200)) == (
        ["1"],
        ["0", "1"],
        ["1", "0"],
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-x,7")
    assert spread.cards("all", H200) == ["4", "GPU-x"]
    for wrong in ("2", "3", "x", "0,,1", ""):
        with pytest.raises(BadOption):
            spread.cards(wrong, H200)


# ----------------------------------------------------------------------------------------------------------- many ranks


def as_rank(rank: int, group: Path, cache: Path) -> list[Choice | None]:
    """What rank 0 chooses, and what rank 1 hears of it; of two more rank 0 says nothing."""
    os.environ["ATTNGEN_CACHE_DIR"] = str(cache)
    torch.distributed.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=2)
    choices = session.choices(Choices(), "quick", 60.0)
    answers = [choices.find(wanted(rows=64))]
    if rank == 1:
        shared.BEYOND = 0.2
        tuner.budget_of_process(60.0).spent = 59.5
        began = time.monotonic()
        answers += [choices.find(wanted(rows=1024)), choices.find(wanted(rows=2048))]
        assert 0.5 < time.monotonic() - began < 3
    torch.distributed.barrier()
    return answers


def test_rank_0_decides_and_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = fake(tmp_path, "30", "20")
    monkeypatch.setattr(session, "Tuner", lambda *about: Tuner(*about, command=command))
    expected = Choice(candidates(wanted(rows=64), 4)[1], "tuned", 20.0)
    ranks = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            threading.Timer(60, lambda: os._exit(2)).start()
            try:
                answers = as_rank(rank, tmp_path / "group", tmp_path / f"{rank}")
                os._exit(0 if answers == [expected, None, None][: len(answers)] else 1)
            except BaseException as problem:
                print(repr(problem), file=sys.stderr, flush=True)
                os._exit(1)
        ranks.append(child)
    assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0, 0]
    assert Store(tmp_path / "0" / Store().path.name).all() and not Store(tmp_path / "1" / Store().path.name).all()


class Group:
    """A store that holds what a rank said, or breaks."""

    def __init__(self, text: bytes | None) -> None:
        self.text = text

    def check(self, names: list[str]) -> bool:
        if self.text is None:
            raise RuntimeError("Connection reset by peer")
        return True

    def get(self, name: str) -> bytes:
        return self.text or b""


@pytest.mark.parametrize(
    "text", [None, b"", b"[]", b'{"tiles": [{"rows": 3}]}', b'{"tiles": [], "code": 1}', b'{"tiles": []}']
)
def test_what_makes_no_sense_is_left_to_the_cost_model(text: bytes | None) -> None:
    assert shared.Shared(1, Group(text), Budget(1.0), lambda _: None).measure(wanted()) is None


# -------------------------------------------------------------------------------------------------------------- commands


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "model.py").write_text("raise SystemExit('ran')")
    done = CliRunner().invoke(cli.app, ["tune", str(tmp_path / "model.py")])
    assert done.exit_code == 8 and "no GPU here to measure on" in done.output and "attngen cache import" in done.output


MODEL = """
import torch
from torch import nn

class Two(nn.Module):
    def forward(self, q, k, v):
        q = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        q = q + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return nn.functional.scaled_dot_product_attention(q, k, v)

model = Two()
example_inputs = tuple(torch.randn(2, 3, 80, 32) for _ in range(3))
"""


class Compilers:
    """Says at once that all compiles."""

    def __init__(self, workers: int, arch: int) -> None:
        assert workers >= 1 and arch == 90

    def submit(self, job: Job) -> Future[str]:
        future: Future[str] = Future()
        future.set_result("")
        return future

    def close(self) -> None:
        pass


def test_the_command_tunes_each_distinct_site_once_and_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a card that is pretended, and processes that only say that they measured."""
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    monkeypatch.setattr("attngen.cli_tune._card", lambda progress: H200)
    monkeypatch.setattr(spread, "cards", lambda which, device: ["0", "1"])
    monkeypatch.setattr("attngen.tune.compilers.Compilers", Compilers)
    commands: list[list[str]] = [fake(tmp_path, "30", "20")]
    monkeypatch.setattr(supervise, "measured", lambda *about, command, **more: measured(*about, command=commands[0], **more))

    def run(*flags: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli.app, ["tune", str(path), *flags], env={"COLUMNS": "200"})
        assert done.exit_code == code, done.output
        return done.output

    first = run()
    assert (
        "2 choices tuned, 0 known before." in first
        and first.count("at 20.0 us (the cost model's pick: 30.0 us), best of 2") == 2
    )
    assert "0 choices tuned, 2 known before." in run()
    commands[0] = fake(tmp_path, *["wrong"] * 4)
    assert "no kernel could be measured" in run("--refresh", code=7)
    commands[0] = fake(tmp_path, "late")
    assert "run it again" in run("--refresh", "--seconds", "0.2")
    assert "must be positive" in run("--seconds", "0", code=2)
