"""Twins of one attention, in which an input or a value in between is changed in place: before, amid or after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_inductor import EAGER
from torch import Tensor
from torch.nn import functional as F

import attngen


def read_afterwards(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores_of(q, k).masked_fill(mask, -9.0).softmax(-1) @ v


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * 0.25


def queries_before(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q.mul_(0.5)
    return read_afterwards(q, k, v, mask)


def queries_before_through_a_view(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    turned = q.transpose(1, 2)
    turned.add_(1)
    return read_afterwards(q, k, v, mask)


def a_view_taken_before(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The view shows what is written to the tensor later."""
    turned = k.transpose(-1, -2)
    k.mul_(0.5)
    return (q @ turned).softmax(-1) @ v


def keys_filled_before(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A cache: new keys are written among old ones."""
    k[:, :, 2:5].copy_(v[:, :, :3])
    return read_afterwards(q, k, v, mask)


def keys_filled_by_index(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k.index_copy_(2, torch.tensor([1, 6]), v[:, :, :2])
    return read_afterwards(q, k, v, mask)


def keys_put_together(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """DeepSeek: a part without positions, and one that all heads share; then comes the library's attention."""
    keys = k.new_empty(2, 3, 8, 16)
    keys[..., :12] = k[..., :12]
    keys[..., 12:] = k[:, :1, :, 12:]
    return F.scaled_dot_product_attention(q, keys, v, mask)


def keys_put_together_anew(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Each layer in the same memory: the first reads what is in it before the second writes."""
    keys = k.new_zeros(2, 3, 8, 16)
    keys[..., :12] = k[..., :12]
    first = F.scaled_dot_product_attention(q, keys, v)
    keys[..., 4:] = v[..., 4:]
    return F.scaled_dot_product_attention(first, keys, v, mask)


def mask_before(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mask.logical_not_()
    return read_afterwards(q, k, v, mask)


def keys_between(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores_of(q, k)
    k.zero_()
    return s.softmax(-1) @ v


def queries_between_through_a_view(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores_of(q, k)
    q[:, :, 0].fill_(7.0)
    return s.softmax(-1) @ v


def mask_between(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores_of(q, k).masked_fill(mask, -9.0)
    mask.zero_()
    return s.softmax(-1) @ v


def values_between(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Before they are read."""
    w = scores_of(q, k).softmax(-1)
    v.mul_(2)
    return w @ v


def scaled_queries_between(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The kernel would read below the scale, where something else is by then."""
    scaled = q * 0.5
    q.zero_()
    return scores_of(scaled, k).softmax(-1) @ v


def values_after(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    y = read_afterwards(q, k, v, mask)
    v.zero_()
    return y


def keys_after_through_a_view(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    y = read_afterwards(q, k, v, mask)
    k.view(-1)[:9].fill_(3.0)
    return y


def mask_after(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    y = read_afterwards(q, k, v, mask)
    mask.zero_()
    return y


def result_over_the_values(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return v.copy_(read_afterwards(q, k, v, mask))


def scores_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    s.mul_(0.25).masked_fill_(mask, -9.0)
    s += 1
    return s.softmax(-1) @ v


def softmax_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores_of(q, k)
    s.sub_(s.amax(-1, keepdim=True)).exp_()
    s.div_(s.sum(-1, keepdim=True))
    return s @ v


def a_part_of_the_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores_of(q, k)
    s[..., 0] = 4.0
    return s.softmax(-1) @ v


def scores_through_a_kept_view(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores_of(q, k)
    flat = s.view(6, 8, 8)
    s.masked_fill_(mask, -9.0)
    return flat.softmax(-1).view(2, 3, 8, 8) @ v


def scores_after_the_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores_of(q, k)
    w = s.softmax(-1)
    s.zero_()
    return w @ v + s[..., :1]


def a_part_of_the_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    w = scores_of(q, k).softmax(-1)
    w[:, 0].zero_()
    return w @ v


def weights_after_the_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    w = scores_of(q, k).softmax(-1)
    y = w @ v
    w.zero_()
    return y + w.sum(-1, keepdim=True)


def scores_turned_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores_of(k, q)
    s.transpose_(-1, -2)
    return s.softmax(-1) @ v


def scores_into_a_buffer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    buffer = torch.empty(2, 3, 8, 8)
    torch.matmul(q, k.transpose(-1, -2), out=buffer)
    return buffer.softmax(-1) @ v


def values_swapped_with_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores_of(q, k)
    kept = v.clone()
    v.copy_(k)
    k.copy_(kept)
    return s.softmax(-1) @ v


def a_chunk_before_and_all_after(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Two readers of one view, of which one reads through a part of it, before the write."""
    memory = torch.stack([mask, ~mask]).float()
    view = memory.view(2, 8, 8)
    before = view.chunk(2)[0].exp()
    memory[0].mul_(3)
    return (scores_of(q, k) + before[0] + view.exp()[0]).softmax(-1) @ v


def weights_kept_for_nobody(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """BigBird puts its weights together for somebody who need not have asked for them."""
    weights, kept = scores_of(q, k).softmax(-1), torch.zeros(2, 3, 16, 8)
    out = weights @ v
    kept[:, :, :8] = weights
    kept[:, :, 8:].add_(weights[:, :, :, :1])
    return out


def weights_kept_and_read(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights, kept = scores_of(q, k).softmax(-1), torch.zeros(2, 3, 16, 8)
    shown = kept[:, :, 5]
    out = weights @ v
    kept[:, :, :8] = weights
    return out + shown.sum()


def weights_kept_by_the_caller(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    out = weights @ v
    mask.copy_(weights[0, 0] > 0.1)
    return out


# Whether the site is still replaced. Where it is not, a kernel would read what was written, or might.
TWINS: dict[Callable[..., Tensor], bool] = {
    queries_before: True,
    queries_before_through_a_view: True,
    a_view_taken_before: True,
    keys_filled_before: True,
    keys_filled_by_index: True,
    keys_put_together: True,
    keys_put_together_anew: True,
    mask_before: True,
    keys_between: False,
    queries_between_through_a_view: False,
    mask_between: True,
    values_between: True,
    scaled_queries_between: False,
    values_after: True,
    keys_after_through_a_view: True,
    mask_after: True,
    result_over_the_values: True,
    scores_in_place: True,
    softmax_in_place: True,
    a_part_of_the_scores: True,
    scores_through_a_kept_view: True,
    scores_after_the_softmax: False,
    a_part_of_the_weights: True,
    weights_after_the_product: False,
    scores_turned_in_place: True,
    scores_into_a_buffer: True,
    values_swapped_with_keys: False,
    a_chunk_before_and_all_after: True,
    weights_kept_for_nobody: True,
    weights_kept_and_read: False,
    weights_kept_by_the_caller: False,
}


@pytest.mark.parametrize(("step", "found"), TWINS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_changes_in_place(step: Callable[..., Tensor], found: bool) -> None:
    """Results, gradients and what is left in the inputs are as without us, replaced or not."""
    tensors = [torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(3)) > 0.6
    for train in (False, True):
        torch._dynamo.reset()
        try:
            plain = seen(step, tensors, mask, train)
        except RuntimeError:
            assert train  # eager says that a value the backward needs was changed
            continue
        with attngen.record() as reports:
            ours = seen(torch.compile(step, backend="attngen", options=EAGER), tensors, mask, train)
        replaced = sum(len(report.replaced) for report in reports)
        assert train or bool(replaced) == found, [site.reason for report in reports for site in report.missed]
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def seen(step: Callable[..., Tensor], tensors: list[Tensor], mask: Tensor, train: bool) -> list[Tensor]:
    """The result, the inputs as they are left, and gradients."""
    leaves = [x.clone().requires_grad_(train) for x in tensors]
    with torch.set_grad_enabled(train):
        inputs = [*(x.clone() for x in leaves), mask.clone()]
        y = step(*inputs)
    values = [x.detach().clone() for x in (y, *inputs)]
    if not train:
        return values
    grads = torch.autograd.grad((y * torch.arange(y.numel()).cos().view(y.shape)).sum(), leaves, allow_unused=True)
    return [*values, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))]
