"""Emitted kernels: a few are reviewed files; all are deterministic, standalone Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy as sp
import torch
from specs import ALIKE, BY_NAME, CASES, CAUSAL, DISTINCT, FOR_OLDEST, Case, attention, loaded, scaled, softcap, window
from test_hopper import SUITED, tiles_for

from attngen.algebra import Const, Op, op
from attngen.emit import Kernel, emit
from attngen.errors import Miss
from attngen.printer import LOG2E
from attngen.scores import scaled_score
from attngen.spec import HOPPER, KEY, ROW, SCORE, Input, Tile

REVIEWED = (
    "dense_fp32",
    "causal_bf16",
    "grouped",
    "softcap_window",
    "alibi",
    "mask_added_in_half",
    "table_cross",
    "padding_causal",
    "sinks",
    "fill_shows",
    "fill_added_in_half",
    "head_40",
)
BF16 = torch.bfloat16
HOPPER_REVIEWED = (
    Case("hopper_causal", attention(dtype=BF16, head_dim=128, mask=CAUSAL, lse=True), Tile(128, 128, 8, 2, HOPPER, True)),
    Case(
        "hopper_softcap_window",
        attention(dtype=BF16, head_dim=256, score=softcap(50.0, scaled(1 / 16)), mask=window(512)),
        Tile(128, 64, 8, 2, HOPPER),
    ),
    Case(
        "hopper_causal_fp8",
        attention(dtype=BF16, head_dim=128, groups=4, mask=CAUSAL, fp8="rotate"),
        Tile(128, 128, 8, 2, HOPPER, True),
    ),
)
NOTES = (
    "Predicted for h200: 0.120 ms, 33.6 MB of HBM traffic at b=2 h=4 i=1024 j=1024.",
    "First needed by layers.0.attn.",
)


def emitted(case: Case) -> Kernel:
    kernel = emit(case.spec, case.tile)
    assert isinstance(kernel, Kernel), kernel
    return kernel


def lines_of(case: Case) -> set[str]:
    """The lines of a kernel, whatever their numbers."""
    code = emitted(case).source.split('"""')[2]
    return {re.sub(r"\b[0-9.]+(e[-+]?[0-9]+)?\b", "N", line.strip()) for line in code.splitlines()}


def test_cases_that_are_alike_have_no_line_of_their_own() -> None:
    known = set().union(*(lines_of(case) for case in DISTINCT))
    heads = {(case.spec.head_dim, case.spec.value_dim, case.spec.query.dtype) for case in DISTINCT}
    for name in ALIKE:
        spec = BY_NAME[name].spec
        assert not lines_of(BY_NAME[name]) - known, name
        assert (spec.head_dim, spec.value_dim, spec.query.dtype) in heads, name


def test_the_cases_for_the_oldest_triton_call_all_that_is_called() -> None:
    calls = {case.name: set(re.findall(r"[\w.]*\w(?=\()", emitted(case).source.split('"""')[2])) for case in CASES}
    assert set().union(*calls.values()) == set().union(*(calls[name] for name in FOR_OLDEST))


@pytest.mark.parametrize("case", [*(BY_NAME[name] for name in REVIEWED), *HOPPER_REVIEWED], ids=lambda case: case.name)
def test_kernel(case: Case, golden: Callable[[str], None]) -> None:
    kernel = emit(case.spec, case.tile, notes=NOTES)
    assert isinstance(kernel, Kernel)
    golden(without_digest(kernel.source))


def without_digest(source: str) -> str:
    """The digest of the template changes with every edit of its comments; what it produced is compared anyway."""
    lines = source.splitlines(keepends=True)
    return "".join(line.split(" (")[0] + ".\n" if line.startswith("Written by attngen") else line for line in lines)


def required(function: ast.FunctionDef) -> list[str]:
    names = [argument.arg for argument in function.args.args]
    return names[: len(names) - len(function.args.defaults)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_are_standalone(case: Case) -> None:
    tree = ast.parse(emitted(case).source)
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imports == {"torch", "triton", "triton.language"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    launch = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "launch")
    assert required(launch) == [source.name for source in case.spec.inputs]


@pytest.mark.parametrize("case", SUITED, ids=lambda case: case.name)
def test_kernels_of_the_hopper_family_import_torch_and_triton_alone(case: Case) -> None:
    tree = ast.parse(emitted(replace(case, tile=tiles_for(case.spec)[0][0])).source)
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports - {"triton.language"} == {"torch", "triton"} and {module.split(".")[0] for module in modules} == {"triton"}
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for name in ("launch", "suits"):
        assert required(functions[name]) == [source.name for source in case.spec.inputs]


def test_name_depends_on_the_text_and_not_on_the_notes() -> None:
    case = BY_NAME["causal"]
    kernel = emitted(case)
    assert emitted(case) == kernel
    noted = emit(case.spec, case.tile, notes=("First needed by layers.3.attn.",))
    assert noted.name == kernel.name and noted.source != kernel.source
    assert emit(case.spec, Tile(128, 32, 4, 2)).name != kernel.name
    assert emit(replace(case.spec, lse=True), case.tile).name != kernel.name


@pytest.mark.parametrize(
    ("score", "scale"),
    [
        (SCORE, LOG2E),
        (scaled(0.125), 0.125 * LOG2E),
        (scaled(-0.125), LOG2E),
        (softcap(50.0, scaled(0.125)), 50 * LOG2E),
        (op("add", scaled(0.125), loaded("t0", ROW, KEY)), 0.125 * LOG2E),
        (op("add", SCORE, op("mul", SCORE, Const(2.0))), LOG2E),
    ],
    ids=["plain", "scaled", "negative", "softcap", "bias", "two terms"],
)
def test_scale_is_folded_into_the_exponent(score: Op, scale: float) -> None:
    assert scaled_score(score)[0] == pytest.approx(scale)


def test_what_no_kernel_computes_is_a_miss() -> None:
    spec = attention(score=Op("digamma", (SCORE,)))
    assert emit(spec, Tile(64, 32, 4, 2)) == Miss("a kernel has no digamma")
    uneven = replace(
        attention(), query=Input("q", (*attention().query.index[:2], 2 * ROW, sp.Integer(0)), attention().out_dtype)
    )
    assert "more than plain positions" in emit(uneven, Tile(64, 32, 4, 2)).reason
    per_key = attention(sinks=(loaded("t0", KEY),), extras={"t0": (attention().out_dtype, (KEY,))})
    assert "key to key" in emit(per_key, Tile(64, 32, 4, 2)).reason


def test_what_is_loaded_per_pair_comes_before_the_product_and_vectors_stay_vectors() -> None:
    """Otherwise Triton computes softmax twice: in the layout of the load as well as in that of the product."""
    bias = emitted(BY_NAME["bias"]).source
    for loop in bias.split("    for block in range(")[1:]:
        assert loop.index("t0_block = tl.load(") < loop.index("qk = tl.dot(") < loop.index("t0_block.to(tl.float32)")
    documents = emitted(BY_NAME["documents"]).source
    assert "tl.load(t0_base + rows * t0_stride_1, mask=rows < size_i, other=0)[:, None]" in documents
    assert "tl.load(t1_base + cols * t1_stride_1, mask=cols < size_j, other=0)[None, :]" in documents


def test_full_blocks_load_without_masks() -> None:
    """The loop over blocks that every row sees is the hot one: no guard, no comparison, one product each way."""
    source = emitted(BY_NAME["causal_bf16"]).source
    full = source.split("for block in range(full_start, full_stop, BLOCK_J):")[1].split("    for block")[0]
    assert "mask=" not in full and "tl.where" not in full
    assert full.count("tl.dot") == 2 and full.count("tl.load") == 2 and full.count("tl.exp2") == 2
