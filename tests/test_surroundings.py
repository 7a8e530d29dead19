"""Around a replaced site nothing changes: who may write where, who shares memory, where gradients end, how DDP cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import zoo
from test_inductor import EAGER, STRICT, handed
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attngen


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, scale=0.25)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[Attend, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def changed_in_place(attend: Attend, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    y = attend(q, k, v)
    y.add_(1).relu_()
    return (y * 2,)


def views_of_the_result(attend: Attend, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    y = attend(q, k, v)
    return y, y.transpose(1, 2), y[:, 0]


def a_view_is_changed(attend: Attend, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    y = attend(q, k, v)
    y[:, 0].mul_(3)
    return y, y.sum(-1)


def a_reshape_is_changed(attend: Attend, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    """Whether that changes ``y`` too depends on the strides of ``y``."""
    y = attend(q, k, v).transpose(1, 2)
    y.reshape(2, 8, 48).mul_(3)
    return y, y.contiguous().add_(1), y.sum(-1)


def written_to_an_input(attend: Attend, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    kept.copy_(attend(q, k, v).detach())
    return kept, kept.view(-1)


def inputs_changed_afterwards(attend: Attend, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    """What the products have read is a copy of ``kept``, so gradients are still defined."""
    y = attend(q, kept.repeat_interleave(2, 1)[:, ::2].contiguous(), v)
    kept.mul_(2)
    return y, kept


def inputs_returned(attend: Attend, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    return attend(q, k, v), v, q.transpose(1, 2)


STEPS: list[Step] = [
    changed_in_place,
    views_of_the_result,
    a_view_is_changed,
    a_reshape_is_changed,
    written_to_an_input,
    inputs_changed_afterwards,
    inputs_returned,
]


# In training the library itself refuses that its result be changed.
WAYS = {"spelt": (attend, False), "library": (library, False), "training": (attend, True)}


@pytest.mark.parametrize(("how", "train"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("step", STEPS, ids=[step.__name__ for step in STEPS])
def test_mutation_and_aliases(step: Step, how: Attend, train: bool) -> None:
    """Results, gradients, what was written to inputs, and who shares memory with whom, as without us."""
    tensors = [torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    plain = outcome(partial(step, how), tensors, train)
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        with handed(), attngen.record() as reports:
            run = torch.compile(partial(step, how), backend="attngen", options={**STRICT, "inner": inner})
            results, shared = outcome(run, tensors, train)
        replaced = [len(report.replaced) for report in reports] == [1]
        assert replaced or step in (a_view_is_changed, a_reshape_is_changed, inputs_changed_afterwards)
        if not replaced and inner == "inductor" and train:
            continue  # Inductor's own fusion keeps the result for the backward, without noticing that it is changed
        assert shared == plain[1]
        torch.testing.assert_close(results, plain[0], rtol=1e-4, atol=2e-4)


def outcome(step: Callable[..., Any], tensors: list[Tensor], train: bool) -> tuple[list[Tensor], list[int]]:
    """All that can be seen of a step, and for each result the first of inputs and results that it shares memory with.

    Results are written to before the backward, as the caller may.
    """
    q, k, v = (x.clone().requires_grad_(train) for x in tensors[:3])
    kept = tensors[3].clone()
    results = step(q, k, v, kept)
    held = [x.untyped_storage().data_ptr() for x in (q, k, v, kept, *results)]
    seen = [r.detach().clone() for r in results]
    for result in results:
        if not result.is_leaf and result.untyped_storage().data_ptr() not in held[:4]:
            result.mul_(2)
    differentiable = [r * torch.arange(r.numel()).cos().view(r.shape) for r in results if r.grad_fn is not None]
    if differentiable:
        torch.autograd.backward([r.sum() for r in differentiable])
    grads = [x.grad for x in (q, k, v) if x.grad is not None]
    return [*seen, kept, *grads], [held.index(pointer) for pointer in held[4:]]


def a_part_is_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v.repeat_interleave(2, 1).detach()[:, ::2].contiguous())


def values_are_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Nothing has to be read below them."""
    return attend(q, k, v.detach())


def a_scale_is_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q * q.amax().detach(), k, v)


def keys_are_copied_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k.repeat_interleave(2, 1)[:, ::2].contiguous()
    return attend(q, k, v)


def the_result_is_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).detach().transpose(1, 2).contiguous() + q.transpose(1, 2)


def all_of_it_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        y = attend(q, k, v)
    return y.transpose(1, 2).contiguous() + q.transpose(1, 2)


def the_shift_is_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * 0.25
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (a_part_is_detached, False),
        (values_are_detached, True),
        (a_scale_is_detached, False),
        (keys_are_copied_without_gradients, False),
        (the_result_is_detached, True),
        (all_of_it_without_gradients, True),
        (the_shift_is_detached, True),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_gradients_end_where_they_did(step: Callable[..., Tensor], found: bool) -> None:
    """Kernels read below copies, but never below a value that was cut off from gradients."""
    tensors = [torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)]

    def gradients(run: Callable[..., Tensor]) -> list[Tensor | None]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        y = run(*leaves)
        (y * torch.arange(y.numel()).cos().view(y.shape)).sum().backward()
        return [x.grad for x in leaves]

    with attngen.record() as reports:
        ours = gradients(torch.compile(step, backend="attngen", options=EAGER))
    assert sum(len(report.replaced) for report in reports) == found
    for mine, theirs in zip(ours, gradients(step), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), attngen.record() as reports:
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(step, backend="attngen", options=EAGER)(*tensors), step(*tensors))
    assert sum(len(report.replaced) for report in reports) == 1


@pytest.mark.parametrize("added", [False, True], ids=["compared", "added"])
def test_a_mask_that_is_only_compared_has_no_gradient(added: bool) -> None:
    """Not even zeros: optimisers tell the two apart. Added to the scores as well, it has one."""

    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * 0.25 + (mask if added else 0.0)
        return torch.softmax(scores.masked_fill(mask > 0.5, -1e9), -1) @ v

    for run in (model, torch.compile(model, backend="attngen", options=STRICT)):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(2, 3, 8, 16, generator=generator) for _ in range(3)] + [torch.rand(8, 8, generator=generator)]
        inputs = [x.requires_grad_() for x in inputs]
        run(*inputs).sum().backward()
        assert [x.grad is not None for x in inputs] == [True, True, True, added]


def test_under_ddp() -> None:
    """DDP cuts the graph where its buckets end and hands each part to the backend with fake inputs."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    model, inputs = zoo.llama("eager")
    expected = model(**inputs)[0]
    weights = torch.arange(expected.numel()).cos().view_as(expected)
    theirs = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        with pytest.MonkeyPatch.context() as patch, attngen.record() as reports:
            patch.setattr(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1 << 14)
            parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.03)
            out = torch.compile(parallel, backend="attngen", options=EAGER)(**inputs)[0]
            (out * weights).sum().backward()
    finally:
        distributed.destroy_process_group()
    assert len(reports) > 2 and sum(len(report.replaced) for report in reports) == 2
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(theirs), rtol=1e-3, atol=1e-3)


def test_an_attention_reads_the_result_of_another_as_it_is() -> None:
    """It is not computed again, from what may have changed since."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = q.clone()
        y = attend(first, k, v)
        first.neg_()
        return attend(y, k, v) + first

    tensors = [torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    with torch.no_grad(), attngen.record() as reports:
        out = torch.compile(step, backend="attngen", options=EAGER)(*tensors)
    assert sum(len(report.replaced) for report in reports) == 2
    torch.testing.assert_close(out, step(*tensors))


def test_a_table_of_a_slope_that_is_one_number() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        distance = torch.arange(8) - torch.arange(8)[:, None]
        return (q @ k.transpose(-1, -2) + slope * distance).softmax(-1) @ v

    tensors = [torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    with torch.no_grad(), attngen.record() as reports:
        out = torch.compile(step, backend="attngen", options=EAGER)(*tensors, torch.full((1, 1, 1), 0.3))
    assert sum(len(report.replaced) for report in reports) == 1
    torch.testing.assert_close(out, step(*tensors, torch.full((1, 1, 1), 0.3)))
