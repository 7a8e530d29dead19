"""Are the gradients of a kernel right? Each may be off float64 by at most three times what eager's own is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attngen import blockwise, gradient, verify
from attngen.emit import BackwardKernel
from attngen.errors import VerificationFailed
from attngen.spec import AttentionSpec, Problem
from attngen.verify import Check

SLACK = 3.0


@dataclass(frozen=True)
class Sample:
    """One call of a backward: inputs, the result and its log-sum-exp, and a gradient of the result; ``extras`` says whether
    what else is loaded needs its gradient too."""

    spec: AttentionSpec
    inputs: tuple[Tensor, ...]
    out: Tensor
    lse: Tensor
    grad: Tensor
    extras: bool = True

    @property
    def arguments(self) -> tuple[Tensor | bool, ...]:
        """What ``launch`` of a backward takes."""
        return self.grad, self.out, self.lse, *self.inputs, *[self.extras] * len(gradient.backward_of(self.spec).extras)

    @property
    def needed(self) -> list[bool]:
        return [x.is_floating_point() and (k < 3 or self.extras) for k, x in enumerate(self.inputs)]


def sample(spec: AttentionSpec, problem: Problem, *, seed: int = 0, device: torch.device | str = "cpu") -> Sample:
    """Random tensors of a problem."""
    inputs = verify.sample_inputs(spec, problem, seed=seed, device=device)
    out, lse = blockwise.forward(spec, inputs)
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    grad = torch.randn(out.shape, generator=generator).to(out)
    return Sample(spec, tuple(inputs), out, lse.float().contiguous(), grad)


def check(buffers: Sequence[Tensor], at: Sample) -> dict[str, Check]:
    """What ``launch`` returned, finished and held against float64 and eager: a verdict on each input's gradient."""
    return judged(buffers, at, reference(at), eager(at))


Gradients = Sequence[Tensor | None]


def judged(buffers: Sequence[Tensor], at: Sample, exacts: Gradients, eagers: Gradients) -> dict[str, Check]:
    """The same where what float64 and eager make of it is known."""
    *made, delta = buffers
    grads = gradient.finish(gradient.backward_of(at.spec), at.inputs, at.needed, made, at.lse, delta)
    verdicts = {}
    for source, ours, exact, eager in zip(at.spec.inputs, grads, exacts, eagers, strict=True):
        if ours is not None and exact is not None and eager is not None:
            verdicts[source.name] = verify.within_budget(ours, exact, eager, slack=SLACK)
    return verdicts


def reference(at: Sample) -> list[Tensor | None]:
    """The gradients in float64."""
    doubled = [x.double() if x.is_floating_point() else x for x in at.inputs]
    return blockwise.backward(replace(at.spec, out_dtype=torch.float64), doubled, at.grad.double(), at.needed)


def eager(at: Sample) -> list[Tensor | None]:
    """The gradients as torch finds them for a careful model, over all pairs at once."""
    leaves = [x.detach().requires_grad_(needed) for x, needed in zip(at.inputs, at.needed, strict=True)]
    with torch.enable_grad():
        out, _ = verify.eager(at.spec, leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, at.grad, allow_unused=True, materialize_grads=True))
    return [next(found) if needed else None for needed in at.needed]


def _sample_for(kernel: BackwardKernel, problem: Problem) -> Sample:
    """What ``kernel`` is checked on: in the interpreter bfloat16 as float16, else without gradients that it does not make."""
    if verify.in_interpreter(kernel):
        return sample(verify.in_half(kernel.spec), problem)
    return replace(sample(kernel.spec, problem), extras=False)


def verify_all_interpreted(jobs: Sequence[tuple[BackwardKernel, Problem]]) -> list[dict[str, Check] | VerificationFailed]:
    """Check each kernel at its problem's size without a GPU, all in one child process."""
    samples = [_sample_for(kernel, problem) for kernel, problem in jobs]
    results = verify.run_interpreted([(kernel, at.arguments) for (kernel, _), at in zip(jobs, samples, strict=True)])
    return [r if isinstance(r, VerificationFailed) else check(r, at) for r, at in zip(results, samples, strict=True)]
