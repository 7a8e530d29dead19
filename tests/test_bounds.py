"""What the loops of emitted kernels read, in Triton's interpreter: NaN lies wherever no key can matter."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from specs import BOOLEANS, CAUSAL, DOCUMENTS, HALF, LENGTHS, PADDING, QK, SAME_DOCUMENT, B, attention, loaded, where, window
from torch import Tensor

from attngen.algebra import Const, Expr, Int, integer, negate, op
from attngen.emit import Kernel, emit
from attngen.errors import VerificationFailed
from attngen.spec import KEY, ROW, AttentionSpec, Tile
from attngen.verify import check, run_interpreted

pytest.importorskip("triton")

TILE = Tile(32, 16, 4, 1)
OFFSET = KEY.extent - ROW.extent  # queries are the last ones of the keys
BEFORE = op("le", Int(KEY), Int(ROW + OFFSET))
LENGTH = op("lt", Int(KEY), loaded("t0", B, kind="int"))
BEGIN = op("ge", Int(KEY), loaded("t0", B, kind="int"))
POSITION = {"t0": (torch.int64, (ROW,))}
CACHED = op("le", Int(KEY), loaded("t0", ROW, kind="int"))
SLIDING = op("and", CACHED, op("gt", Int(KEY), op("sub", loaded("t0", ROW, kind="int"), integer(40))))
FILL = -1e9


def masked(mask: Expr, extras: dict | None = None, fill: float | None = None) -> AttentionSpec:
    spec = attention(head_dim=16, mask=mask, extras=extras)
    if fill is None:
        return spec
    return replace(spec, whole=where(mask, spec.score, Const(fill)), redo_below=fill + 104.0)


def operands(rows: int, keys: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows + keys)
    return [torch.randn(batch, 2, size, 16, generator=generator).to(HALF) for size in (rows, keys, keys)]


def poisoned(inputs: list[Tensor], batch: int, start: int, stop: int) -> list[Tensor]:
    """Copies of the operands with NaN in keys and values ``start .. stop`` of one row of the batch."""
    q, k, v, *rest = inputs
    k, v = k.clone(), v.clone()
    k[batch, :, start:stop], v[batch, :, start:stop] = torch.nan, torch.nan
    return [q, k, v, *rest]


def results(jobs: list[tuple[AttentionSpec, list[Tensor]]]) -> list[Tensor]:
    kernels = [emit(spec, TILE) for spec, _ in jobs]
    assert all(isinstance(kernel, Kernel) for kernel in kernels), kernels
    found = run_interpreted([(kernel, inputs) for kernel, (_, inputs) in zip(kernels, jobs, strict=True)])
    assert not any(isinstance(each, VerificationFailed) for each in found), [str(each) for each in found]
    return [each[0] for each in found]


# ------------------------------------------------------------------------------------------------ what is never read


@dataclass(frozen=True)
class Case:
    """``unread``: for each row of the batch, stretches of keys that lie in blocks that matter to none of the rows."""

    mask: Expr
    extras: dict | None
    data: tuple[Tensor, ...]
    unread: tuple[tuple[tuple[int, int], ...], ...]
    rows: int = 32
    keys: int = 150


def flags(*stretches: tuple[int, int], keys: int = 150) -> Tensor:
    found = torch.zeros(2, keys, dtype=torch.bool)
    for batch, (start, stop) in enumerate(stretches):
        found[batch, start:stop] = True
    return found


def segments(*sizes: int) -> Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).expand(2, -1).contiguous()


BLOCKS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 3, 3]).repeat_interleave(15)
SKIPPED = {
    "padded at the end": Case(PADDING, BOOLEANS, (flags((0, 70), (0, 150)),), (((80, 150),), ())),
    "padded in front": Case(PADDING, BOOLEANS, (flags((70, 150), (149, 150)),), (((0, 64),), ((0, 144),))),
    "numbers as flags": Case(
        op("ne", loaded("t0", B, KEY, kind="int"), integer(0)),
        {"t0": (torch.int64, (B, KEY))},
        (flags((0, 70), (32, 64)).long(),),
        (((80, 150),), ((0, 32), (64, 150))),
    ),
    "padded and causal": Case(
        op("and", BEFORE, PADDING), BOOLEANS, (flags((40, 150), (0, 90)),), (((0, 32),), ((96, 150),))
    ),
    "all padded but one": Case(PADDING, BOOLEANS, (flags((100, 101), (0, 1)),), (((0, 96), (112, 150)), ((16, 150),))),
    "lengths": Case(LENGTH, LENGTHS, (torch.tensor([70, 1]),), (((80, 150),), ((16, 150),))),
    "first keys": Case(BEGIN, LENGTHS, (torch.tensor([70, 149]),), (((0, 64),), ((0, 144),))),
    "positions": Case(CACHED, POSITION, (torch.arange(40, 72),), (((80, 150),), ((80, 150),))),
    "positions and a window": Case(
        SLIDING, POSITION, (torch.arange(90, 122),), (((0, 48), (128, 150)), ((0, 48), (128, 150)))
    ),
    "documents": Case(
        SAME_DOCUMENT, DOCUMENTS, (segments(50, 40, 60)[:, 50:82], segments(50, 40, 60)), (((0, 48), (96, 150)),) * 2
    ),
    "documents and causal": Case(
        op("and", BEFORE, SAME_DOCUMENT), DOCUMENTS, (segments(50, 68, 32)[:, 118:], segments(50, 68, 32)), (((0, 112),),) * 2
    ),
    "documents in no order": Case(  # of three kinds of tokens, what lies before the first and after the last of this one
        SAME_DOCUMENT, DOCUMENTS, (torch.full((2, 32), 1), BLOCKS.expand(2, -1).contiguous()), (((80, 150), ),) * 2
    ),
    "the first and the nearest": Case(
        op("or", op("and", BEFORE, op("gt", Int(KEY), Int(ROW + OFFSET - 20))), op("lt", Int(KEY), integer(4))),
        None, (), (((16, 96),),) * 2,
    ),
    "the nearest left out": Case(
        op("gt", op("abs", Int(ROW - KEY + 50)), integer(40)), None, (), (((48, 80),),) * 2,
    ),
}  # fmt: skip


def job(case: Case) -> tuple[AttentionSpec, list[Tensor], list[Tensor]]:
    """The spec, its inputs, and the inputs with NaN where nothing may be read."""
    spec = masked(case.mask, case.extras)
    inputs = [*operands(case.rows, case.keys), *case.data]
    spoilt = inputs
    for batch, stretches in enumerate(case.unread):
        for start, stop in stretches:
            spoilt = poisoned(spoilt, batch, start, stop)
    return spec, inputs, spoilt


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    jobs = {name: job(case) for name, case in SKIPPED.items()}
    found = results([(spec, spoilt) for spec, _, spoilt in jobs.values()])
    return dict(zip(jobs, found, strict=True))


@pytest.mark.parametrize("name", SKIPPED)
def test_blocks_that_matter_to_no_row_are_never_read(name: str, outputs: dict[str, Tensor]) -> None:
    spec, inputs, _ = job(SKIPPED[name])
    verdict = check(outputs[name], spec, inputs)
    assert verdict.ok, verdict


def test_what_is_read_would_show() -> None:
    case = SKIPPED["padded at the end"]
    spec, inputs, _ = job(case)
    (out,) = results([(spec, poisoned(inputs, 0, 72, 80))])  # masked, and in a block that is visited
    assert not check(out, spec, inputs).ok


# ------------------------------------------------------------------------------------------------------- empty rows


@pytest.mark.parametrize("fill", [None, FILL])
def test_rows_without_any_key_are_as_in_eager(fill: float | None) -> None:
    """NaN, or with a finite fill the mean of all values, where the whole row of the batch is padding."""
    kept = flags((0, 0), (0, 40))
    documents = torch.tensor([[7] * 20 + [8] * 20, [0] * 40]), torch.tensor([[8] * 70, [0] * 30 + [9] * 40])
    jobs = [
        (masked(PADDING, BOOLEANS, fill), [*operands(40, 150), kept]),
        (masked(op("and", CAUSAL, PADDING), BOOLEANS, fill), [*operands(40, 150), kept.flip(1)]),
        (masked(LENGTH, LENGTHS, fill), [*operands(40, 50), torch.tensor([0, 17])]),
        (masked(LENGTH, LENGTHS, fill), [*operands(40, 50), torch.tensor([-(2**40), 2**40])]),
        (masked(BEGIN, LENGTHS, fill), [*operands(40, 50), torch.tensor([2**40, -(2**40)])]),
        (masked(SAME_DOCUMENT, DOCUMENTS, fill), [*operands(40, 70), *documents]),
    ]
    for (spec, inputs), out in zip(jobs, results(jobs), strict=True):
        verdict = check(out, spec, inputs)
        assert verdict.ok, verdict
        assert out[0, :, 0].isnan().all() == (fill is None)


# ------------------------------------------------------------------------------------------------------ random masks

EXTRAS = {
    "t0": (torch.int64, (B, ROW)),
    "t1": (torch.int32, (B, KEY)),
    "t2": (torch.int64, (B,)),
    "t3": (torch.bool, (B, KEY)),
    "t4": (torch.bool, (B, ROW)),
}
IDS_I, IDS_J = loaded("t0", B, ROW, kind="int"), loaded("t1", B, KEY, kind="int")
LEAVES = [
    op("eq", IDS_I, IDS_J),
    op("le", IDS_J, IDS_I),
    op("lt", op("sub", IDS_I, IDS_J), integer(2)),
    op("lt", Int(KEY), loaded("t2", B, kind="int")),
    op("ge", op("add", Int(ROW), loaded("t2", B, kind="int")), Int(KEY)),
    op("le", Int(KEY), op("mul", IDS_I, integer(20))),
    op("lt", Int(ROW), loaded("t2", B, kind="int")),
    loaded("t3", B, KEY, kind="bool"),
    loaded("t4", B, ROW, kind="bool"),
    CAUSAL,
    window(20),
    op("lt", Int(KEY), integer(5)),
]


def drawn(r: random.Random) -> Expr:
    mask = r.choice(LEAVES)
    for _ in range(r.choice([0, 1, 1, 2])):
        mask = op(r.choice(["and", "or"]), mask, r.choice(LEAVES))
        mask = negate(mask) if r.random() < 0.25 else mask
    return mask


def random_job(seed: int) -> tuple[AttentionSpec, list[Tensor]]:
    r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, keys = r.choice([(70, 70), (33, 120), (90, 50)])
    ids = [torch.randint(-1, 4, (2, size), generator=generator) for size in (rows, keys)]
    if r.random() < 0.7:
        ids = [each.sort(-1).values for each in ids]
    flagged = [torch.rand(2, size, generator=generator) < r.choice([0.1, 0.9]) for size in (keys, rows)]
    mask = drawn(r)
    used = {node.source for node in mask.walk() if hasattr(node, "source")}
    data = dict(zip(EXTRAS, [ids[0], ids[1].int(), torch.tensor([r.randint(-5, 60), 20]), *flagged], strict=True))
    spec = masked(mask, {name: extra for name, extra in EXTRAS.items() if name in used}, r.choice([None, FILL]))
    return replace(spec, score=QK), [*operands(rows, keys), *(data[name] for name in EXTRAS if name in used)]


def test_random_masks_of_positions_and_data_come_out_as_in_eager() -> None:
    jobs = [random_job(seed) for seed in range(30)]
    for seed, ((spec, inputs), out) in enumerate(zip(jobs, results(jobs), strict=True)):
        verdict = check(out, spec, inputs)
        assert verdict.ok, f"seed {seed}: {spec.text}\n{verdict}"


def test_a_position_that_a_kernel_cannot_bound_is_dropped() -> None:
    """Loaded per pair: all keys are visited, all blocks masked."""
    pairs = masked(loaded("t0", ROW, KEY, kind="bool"), {"t0": (torch.bool, (ROW, KEY))})
    kernel = emit(pairs, TILE)
    assert isinstance(kernel, Kernel)
    assert "start = 0\n    stop = size_j\n" in kernel.source and kernel.source.count("tl.dot(q,") == 1
