"""The page that ``attngen optimize`` writes: that it is whole and needs nothing else, that nothing of a model is taken for
markup, and that its pictures show what is the case."""

from __future__ import annotations

from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from specs import BY_NAME, CASES, Case
from test_mask import dense

from attngen import describe
from attngen.choose import Plan, choose
from attngen.device import DEVICES
from attngen.emit import Kernel, emit
from attngen.page import document, masks, roofline, spent
from attngen.prepare import Use
from attngen.report import Report, SiteReport
from attngen.spec import Problem, Tile

H200 = DEVICES["h200"]
HOSTILE = '<script>alert("x")</script>&amp;\'{{ 7 * 7 }}'
LENGTH = 256


def planned(case: Case, length: int = LENGTH) -> tuple[Plan, Use]:
    plan = choose(case.spec, case.problem(length), H200)
    assert isinstance(plan, Plan)
    kernel = emit(case.spec, plan.tile)
    assert isinstance(kernel, Kernel)
    return plan, Use(kernel, plan.problem, ())


def reported(case: Case, *paths: str, **changes: object) -> tuple[list[SiteReport], Use]:
    plan, use = planned(case)
    site = replace(describe.planned(plan, H200, None), status="replaced", kernel=use.kernel.name, error=1e-3, budget=4e-3)
    return [replace(site, where=f"{path} (model.py:7)", **changes) for path in paths], use  # type: ignore[arg-type]


class Whole(HTMLParser):
    """Every element is closed where it should be; and the attributes of all, by element."""

    VOID = frozenset(["meta", "br", "link", "img", "input"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def page(sites: list[SiteReport], *uses: Use) -> str:
    return document.rendered(Report(H200.label, tuple(sites), notes=("said aside",)), uses, H200, "model.py")


@pytest.fixture(scope="module")
def full() -> str:
    """Three sites of two kinds, one of them in two layers, and two that were left alone."""
    window, first = reported(BY_NAME["window"], "layers.0.attn", "layers.1.attn")
    padding, second = reported(BY_NAME["padding"], "head")
    missed = [
        SiteReport(
            f"layers.{n}.mlp (model.py:9)", "missed", "the softmax runs over queries", advice="turn it",
            blamed={"file": "model.py", "line": 9, "code": "softmax(x, -2)"},
        )
        for n in (0, 1)
    ]  # fmt: skip
    return page([*window, *padding, *missed], first, second)


def test_the_page_is_whole_and_holds_every_site(full: str) -> None:
    whole = Whole(full)
    text = " ".join(whole.text.split())
    for said in (
        "layers.0-1.attn x2", "layers.0.attn (model.py:7)", "head", "softmax(qk*0.125; causal & window(40))", "padding",
        "the softmax runs over queries", "turn it", "softmax(x, -2)", "1.0e-03 of 4.0e-03", "25 %", "said aside",
        "3 of 5 sites replaced by 2 kernels", "def attention_forward(",
    ):  # fmt: skip
        assert said in text, said
    places = {each["id"] for _, each in whole.found if "id" in each}
    links = [each["href"] for each in whole.all("a")]
    assert links and all(str(link).startswith("#") and str(link)[1:] in places for link in links)
    assert len(whole.all("svg")) == 2 * 3 and all(each["aria-label"] for each in whole.all("svg"))


def test_the_page_needs_nothing_else(full: str) -> None:
    whole = Whole(full)
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "use"} & {tag for tag, _ in whole.found}
    assert not [each for _, each in whole.found if {"src", "xlink:href"} & each.keys()]
    assert "@import" not in full and "url(" not in full and "http" not in full


def test_nothing_of_a_model_is_taken_for_markup() -> None:
    sites, use = reported(BY_NAME["causal"], f"a.{HOSTILE}", f"b.{HOSTILE}.c", computes=f"{HOSTILE}, 1, 2, 3, 4")
    hostile = replace(use, kernel=replace(use.kernel, source=f'"""{HOSTILE}"""\n# {HOSTILE}\n'))
    code = {"file": HOSTILE, "line": 1, "code": HOSTILE}
    missed = SiteReport(f"{HOSTILE}.d (x.py:1)", "missed", HOSTILE, advice=HOSTILE, blamed=code)
    report = Report(HOSTILE, (*sites, missed), notes=(HOSTILE,))
    text = document.rendered(report, [hostile], replace(H200, label=HOSTILE), HOSTILE)
    assert "<script" not in text
    assert Whole(text).text.count(HOSTILE) >= 12


def test_source_is_kept_to_the_letter() -> None:
    source = planned(BY_NAME["fill_shows"])[1].kernel.source
    assert Whole(str(document.highlighted(source))).text == source


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kind_of_site_has_its_pictures(case: Case) -> None:
    (site,), use = reported(case, "layer")
    pictures = document.pictures_of(site, use, H200)
    assert sum(pictures.blocks.counts.values()) == pictures.blocks.kinds.size <= 64 * 64
    assert [tag for tag, _ in Whole(str(pictures.mask)).found].count("svg") == 1
    assert pictures.roofline is not None and "nan" not in f"{pictures.mask}{pictures.roofline}{pictures.time}"


# --------------------------------------------------------------------------------------------------------- mask pictures


def brute(case: Case, problem: Problem, rows: int, keys: int) -> np.ndarray:
    kept = dense(case.spec.mask, problem.rows, problem.keys)
    found = []
    for top in range(0, problem.rows, rows):
        parts = [kept[top : top + rows, left : left + keys] for left in range(0, problem.keys, keys)]
        found.append([masks.FULL if p.all() else masks.PARTIAL if p.any() else masks.EMPTY for p in parts])
    return np.array(found)


POSITIONAL = [case for case in CASES if not any(node.__class__.__name__ == "Load" for node in case.spec.mask.walk())]
ROUGH = {"dilated"}  # what is not solved is drawn as partial


@pytest.mark.parametrize("case", POSITIONAL, ids=lambda case: case.name)
def test_cells_are_what_the_mask_leaves(case: Case) -> None:
    problem, tile = case.problem(90), Tile(16, 16, 4, 1)
    found = masks.blocks_of(case.spec, problem, tile).kinds
    expected = brute(case, problem, 16, 16)
    if case.name in ROUGH:
        assert ((found == expected) | (found == masks.PARTIAL)).all()
    else:
        np.testing.assert_array_equal(found, expected)


def test_what_data_decides_is_drawn_so() -> None:
    def kinds(name: str) -> np.ndarray:
        case = BY_NAME[name]
        return masks.blocks_of(case.spec, Problem((2, 2), 4, 4), Tile(1, 1, 4, 1)).kinds

    below, diagonal = np.tri(4, k=-1, dtype=bool), np.eye(4, dtype=bool)
    assert (kinds("padding") == masks.DATA).all() and (kinds("lengths") == masks.DATA).all()
    for name in ("documents", "padding_causal"):
        found = kinds(name)
        assert (found[below | diagonal] == masks.DATA).all() and (found[~(below | diagonal)] == masks.EMPTY).all()


def test_large_problems_have_cells_of_several_blocks() -> None:
    blocks = masks.blocks_of(BY_NAME["causal"].spec, Problem((1, 1), 10_000, 20_000), Tile(64, 64, 4, 1))
    assert (blocks.rows, blocks.keys) == (192, 320) and blocks.kinds.shape == (53, 63)
    assert sum(blocks.counts.values()) == 53 * 63
    drawing = str(masks.drawn(blocks))
    assert len(drawing) < 10_000 and 'class="partial"' in drawing


def test_runs_cover_each_marked_cell_once() -> None:
    marked = np.random.default_rng(0).random((7, 9)) < 0.6
    again = np.zeros((7, 9), dtype=int)
    for row, (first, end) in masks._runs(marked):
        again[row, first:end] += 1
    np.testing.assert_array_equal(again, marked)


# ------------------------------------------------------------------------------------------------------ roofline, parts


def test_points_lie_under_the_roof_and_work_counts_what_the_mask_keeps() -> None:
    case = BY_NAME["causal"]
    plan, _ = planned(case, 4096)
    site = describe.planned(plan, H200, None)
    roof = roofline.of(site, case.spec, plan.problem, H200)
    assert roof is not None and site.hbm_bytes is not None and site.predicted_ms is not None
    pairs = 4 * 4096 * 4097 // 2
    assert roofline.flop(case.spec, plan.problem) == 2 * pairs * (64 + 64)
    before, after = roof.points
    assert before.intensity * site.hbm_bytes["before"] == pytest.approx(after.intensity * site.hbm_bytes["after"])
    assert before.rate == pytest.approx(roof.bandwidth * before.intensity) and before.rate < after.rate < roof.limit(1e9)
    assert after.rate == pytest.approx(2 * pairs * 128 / (site.predicted_ms * 1e-3))
    assert Whole(str(roofline.drawn(roof))).text.count("TFLOP/s") == 2  # of the ceilings


@pytest.mark.parametrize(("name", "rate"), [("dense_bf16", H200.tensor16), ("dense_fp32", H200.fp32)], ids=["bf16", "fp32"])
def test_the_ceiling_is_that_of_the_dtype(name: str, rate: float) -> None:
    spec = BY_NAME[name].spec
    assert roofline.rate_of_products(spec, H200) == rate
    single = spec.query.dtype == torch.float32
    assert not single or roofline.rate_of_products(replace(spec, tf32=True), H200) == H200.tensor32


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parts_make_up_the_predicted_time(case: Case) -> None:
    plan, _ = planned(case)
    chosen, *others = describe.planned(plan, H200, None).candidates
    assert chosen.tile == str(plan.tile) and chosen.predicted_ms == plan.cost.seconds * 1e3 and not chosen.lost
    assert len({each.tile for each in (chosen, *others)}) == 1 + len(others) <= 8
    for each in (chosen, *others):
        busy = max(each.parts_ms[name] for name in ("products", "exponentials", "arithmetic", "loads"))
        whole = busy + sum(each.parts_ms[name] for name in ("waiting", "shares", "launch"))
        assert whole == pytest.approx(each.predicted_ms)
    assert all(each.lost and each.predicted_ms >= chosen.predicted_ms for each in others)
    assert asdict(chosen)["parts_ms"] == chosen.parts_ms


def test_a_measured_time_is_shown_where_there_is_one() -> None:
    (site,), use = reported(BY_NAME["causal"], "layer")
    assert "Measured" not in page([site], use) and "measured" not in str(spent.drawn(site.candidates[0]))
    timed = replace(site.candidates[0], measured_ms=0.75)
    text = page([replace(site, candidates=(timed, *site.candidates[1:]))], use)
    assert "Measured" in text and "750 us" in text and "measured" in str(spent.drawn(timed))
