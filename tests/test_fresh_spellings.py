"""Attention as people write it who do not know what is looked for: found with its gradient, and twins that are not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from analysis import Analysis, assert_replaced_with_its_gradient, watched
from test_inductor import EAGER
from torch import Tensor, nn
from torch.nn import functional as F

import attngen
from attngen.algebra import TRUE, Expr, Int, op
from attngen.errors import Miss
from attngen.evaluate import Evaluator
from attngen.spec import KEY, ROW

BATCH, HEADS, LENGTH, SIZE = 2, 3, 20, 8


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * SIZE**-0.5


def mask_of_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Packed images: a full mask, opened block by block."""
    mask = torch.full((1, LENGTH, LENGTH), torch.finfo(q.dtype).min)
    for start, stop in ((0, 5), (5, 9), (9, LENGTH)):
        mask[..., start:stop, start:stop] = 0
    return (scores(q, k) + mask).softmax(-1) @ v


def mask_of_a_tree(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last columns of a causal mask are closed where a small table of truth values says so."""
    tree = torch.ones(6, 6).tril() * (torch.arange(36).view(6, 6) % 3 != 1)
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -1e9)
    mask[-6:, -6:][tree == 0] = mask.min()
    return (scores(q, k) + mask).softmax(-1) @ v


def mask_by_a_view_taken_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(LENGTH, LENGTH)
    turned = mask.t()
    mask[:, 5:] = -3.0
    return (scores(q, k) + turned).softmax(-1) @ v


def mask_changed_after_it_is_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Made of positions and numbers: what it is at each time is known."""
    mask = torch.zeros(LENGTH, LENGTH)
    mask[:, 5:] = -3.0
    s = scores(q, k) + mask
    mask[2] = 100.0
    return s.softmax(-1) @ v


def filled_by_truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows of all heads beside each other, and ``x[mask] = number``."""
    flat = scores(q, k).reshape(-1, LENGTH)
    flat[torch.arange(LENGTH)[None] >= torch.tensor([7, LENGTH]).repeat_interleave(HEADS * LENGTH)[:, None]] = -1e6
    return flat.view(BATCH, HEADS, LENGTH, LENGTH).softmax(-1) @ v


def weights_emptied_by_truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1).clone()
    weights[:, :, torch.arange(LENGTH**2).view(LENGTH, LENGTH) % 7 == 0] = 0
    return weights @ v


def powers_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k) * math.log2(math.e)
    p = torch.exp2(s - s.amax(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True) @ v


def powers_of_any_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.pow(3.0, scores(q, k))
    return p / p.sum(-1, keepdim=True) @ v


def sum_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.einsum("bhid,bhjd->bhij", q, k).mul(0.3).exp()
    return torch.einsum("bhij,bhjd->bhid", p, v) / torch.einsum("bhij->bhi", p)[..., None]


def by_tensordot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tensordot(torch.tensordot(q[0, 0], k[0, 0], ([1], [1])).softmax(1), v[0, 0], 1)


def one_query_without_a_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhd,bhjd->bhj", q[:, :, 3], k).mul(0.3).softmax(-1)
    return torch.einsum("bhj,bhjd->bdh", weights, v)


def decay_over_its_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RetNet: the decay is normalised, not the weights."""
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).float()
    distance = distance.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), math.inf)
    decay = torch.nan_to_num(torch.exp(distance * torch.tensor([-0.1, -0.2, -0.3])[:, None, None]))
    return scores(q, k) * (decay / decay.sum(-1, keepdim=True).sqrt()) @ v


def state_space_duality(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mamba-2: all of it in one einsum."""
    passed = q[..., 0].cumsum(-1)
    between = passed[..., :, None] - passed[..., None, :]
    decay = between.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf).exp()
    return torch.einsum("bhln,bhsn,bhls,bhsp->bhlp", q, k, decay, v)


def silu_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """HSTU."""
    return F.silu(scores(q, k)) / LENGTH * torch.ones(LENGTH, LENGTH).tril() @ v


def masked_then_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.transpose(-1, -2)).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -1e9)
    return (s / SIZE**0.5 * 0.9).softmax(-1) @ v


def diagonal_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Nobody looks at themselves, nor at whom comes next."""
    s = scores(q, k)
    s.diagonal(dim1=-2, dim2=-1).fill_(-5e4)
    s.diagonal(1, -2, -1).mul_(0.5)
    return s.softmax(-1) @ v


def masked_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Masks of zeros and ones multiply what the exponentials give."""
    keep = torch.arange(LENGTH)[None] < torch.tensor([7, LENGTH])[:, None]
    e = scores(q, k).exp() * keep[:, None, None] * torch.ones(LENGTH, LENGTH).tril()
    return e / (e.sum(-1, keepdim=True) + 1e-9) @ v


def masked_exponentials_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.where(_future(), 0.0, scores(q, k).exp()) * torch.ones(LENGTH, LENGTH).triu(-9)
    return e @ v / e.sum(-1, keepdim=True)


def logarithm_of_the_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias that is subtracted as a logarithm divides exponentials, but is not the sum that they are divided by."""
    place = torch.arange(LENGTH)
    return (scores(q, k) - torch.log1p((place[:, None] - place).abs().float())).softmax(-1) @ v


FOUND: list[Callable[..., Tensor]] = [
    mask_of_blocks, mask_of_a_tree, mask_by_a_view_taken_before, mask_changed_after_it_is_added, filled_by_truth,
    weights_emptied_by_truth, powers_of_two, powers_of_any_number, sum_by_einsum, by_tensordot, one_query_without_a_row,
    decay_over_its_sum, state_space_duality, silu_weights, masked_then_scaled, diagonal_filled,
    masked_exponentials, masked_exponentials_late, logarithm_of_the_distance,
]  # fmt: skip


def inputs() -> list[Tensor]:
    made = [torch.randn(BATCH, HEADS, LENGTH, SIZE, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Callable[..., Tensor]) -> None:
    assert_replaced_with_its_gradient(function, inputs)


def _analysed(function: Callable[..., Tensor], *tensors: Tensor) -> Analysis:
    class Call(nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return function(*given)

    module, analyses = watched(Call())
    with torch.no_grad():
        module(*(tensors or [x.detach() for x in inputs()]))
    (analysis,) = analyses
    return analysis


def test_what_their_specs_say() -> None:
    ((_, special),) = _analysed(mask_of_blocks).hits
    assert not special.spec.extras and _kept(special.spec.mask) == 5 * 5 + 4 * 4 + 11 * 11  # no tensor of all pairs
    ((_, special),) = _analysed(powers_of_two).hits
    assert special.spec.softmax and "exp2" not in str(special.spec.score)
    ((_, special),) = _analysed(one_query_without_a_row).hits
    assert special.spec.output[0] == ROW and ROW not in [place for x in special.spec.inputs for place in x.index]
    ((_, special),) = _analysed(state_space_duality).hits
    assert not special.spec.softmax and all(len(extra.index) == 3 for extra in special.spec.extras)
    causal = op("lt", Int(KEY), Int(ROW + 1))
    assert special.spec.mask == causal
    ((_, special),) = _analysed(masked_then_scaled).hits
    assert special.spec.mask == causal
    ((_, special),) = _analysed(masked_exponentials_late).hits
    assert _kept(special.spec.mask) == sum(min(row, 9) + 1 for row in range(LENGTH))
    ((_, special),) = _analysed(lambda q, k, v: (-0.5 * scores(q, k).masked_fill(_future(), -1e9)).softmax(-1) @ v).hits
    assert special.spec.mask == TRUE  # turned round, what was filled is all that counts


def _kept(mask: Expr) -> int:
    positions = {ROW: torch.arange(LENGTH)[:, None], KEY: torch.arange(LENGTH)}
    return int(torch.broadcast_to(Evaluator(positions, lambda source: source)(mask), (LENGTH, LENGTH)).sum())


def _future() -> Tensor:
    return torch.ones(LENGTH, LENGTH).triu(1).bool()


@pytest.mark.parametrize("power", [lambda s: torch.pow(3.0, s), torch.exp2, lambda s: torch.exp(0.9 * s)])
def test_nothing_is_left_of_a_row_of_fills_that_is_not_lifted(power: Callable[[Tensor], Tensor]) -> None:
    """Zero over zero, where a softmax, which takes the maximum off, gives the mean of the values."""

    def dead_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = power(scores(q, k).masked_fill(torch.ones(LENGTH, LENGTH).triu(-3).bool(), -1e9))
        return p / p.sum(-1, keepdim=True) @ v

    analysis = _analysed(dead_rows)
    assert len(analysis.hits) == 1 and analysis.results[0].isnan().any() and max(analysis.errors()) < 1e-5


# ------------------------------------------------------------------------------------------------------ negative twins


def mask_of_data_changed_after_it_is_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = q[0, 0] @ k[1, 1].mT
    mask[:, 5:] = v[0, 0, 0, 0]
    s = scores(q, k) + mask.cumsum(-1)
    t = s + mask
    mask[2] = v[0, 0, 0, 1]
    return t.softmax(-1) @ v


def mask_of_data_read_at_two_times(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(LENGTH, LENGTH)
    mask[:, 5:] = q[0, 0, :, :1]
    s = scores(q, k) + mask
    mask[:, :3] = q[0, 0, :, 1:2]
    return (s + mask).softmax(-1) @ v


def filled_at_listed_places(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    places = torch.arange(5)
    s[:, :, places, places] = -5.0
    return s.softmax(-1) @ v


def added_up_by_truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s.index_put_((torch.ones(BATCH, HEADS, LENGTH, LENGTH).tril().bool(),), torch.tensor(2.0), accumulate=True)
    return s.softmax(-1) @ v


def powers_over_another_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.exp2(s) / torch.exp(s).sum(-1, keepdim=True) @ v


def logarithm_in_the_sum_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - torch.log1p(torch.arange(LENGTH).float())).exp()
    return s.exp() / e.sum(-1, keepdim=True) @ v


def exponentials_masked_in_the_sum_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e / (e * torch.ones(LENGTH, LENGTH).tril()).sum(-1, keepdim=True) @ v


def powers_of_a_negative_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.pow(-2.0, scores(q, k).round())
    return p / p.sum(-1, keepdim=True) @ v


def few_keys_for_each_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    near = k[:, :, :6].unsqueeze(2).expand(-1, -1, LENGTH, -1, -1) * q[..., None, :1]
    return torch.einsum("bhij,bhijd->bhid", torch.einsum("bhid,bhijd->bhij", q, near).softmax(-1), near)


def three_in_one_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd,bhje->bhie", q, k, v)


@pytest.mark.parametrize(
    "function",
    [
        mask_of_data_changed_after_it_is_added, mask_of_data_read_at_two_times, filled_at_listed_places, added_up_by_truth,
        powers_over_another_sum, exponentials_masked_in_the_sum_alone, logarithm_in_the_sum_alone,
        powers_of_a_negative_number, few_keys_for_each_query, three_in_one_einsum,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_left_alone(function: Callable[..., Tensor]) -> None:
    tensors = [x.detach() for x in inputs()]
    torch._dynamo.reset()
    with attngen.record() as reports, torch.no_grad():
        ours = torch.compile(function, backend="attngen", options=EAGER)(*tensors)
    assert not [site for report in reports for site in report.replaced]
    torch.testing.assert_close(ours, function(*tensors), equal_nan=True)


def test_a_cache_written_by_statements_is_read_where_it_is() -> None:
    """``cache[:, :, places] = k`` has no value of its own: whoever reads the cache later sees what it wrote."""

    def step(q: Tensor, k: Tensor, v: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys[:, :, places], values[:, :, places] = k, v
        first = (scores(q, keys).masked_fill(torch.arange(32) > places[:, None], -math.inf)).softmax(-1) @ values
        keys[:, :, places - 7], values[:, :, places - 7] = 2 * k, 3 * v
        return first, scores(q, keys).softmax(-1) @ values

    def tensors() -> list[Tensor]:
        made = [torch.randn(BATCH, HEADS, 4, SIZE, generator=torch.Generator().manual_seed(n)) for n in range(3)]
        return [*made, torch.arange(7, 11), *torch.zeros(2, BATCH, HEADS, 32, SIZE)]

    ours, theirs = tensors(), tensors()
    torch._dynamo.reset()
    with attngen.record() as reports, torch.no_grad():
        results = torch.compile(step, backend="attngen", options=EAGER)(*ours)
        torch.testing.assert_close(results, step(*theirs))
    torch.testing.assert_close(ours, theirs)
    assert [site.status for report in reports for site in report.sites] == ["replaced"] * 2


def test_a_miss_of_few_keys_says_so() -> None:
    (found,) = _analysed(few_keys_for_each_query).found
    assert isinstance(found, Miss) and "queries alone" in found.reason
