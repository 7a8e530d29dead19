"""What is timed of a peer: its forward, its gradient alone, or both; and what each has to give.

Gradients are those of queries, keys and values, and of what the scores load where the problem trains it. Each is asked for
once, of a graph of its own, as in a training step: compiled gradients may write over what they were given, and no graph of
a peer's stands in memory beside those of others. Of a gradient alone, the forward before it is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attngen import fp8, verify, verify_bwd
from attngen.bench import spelling as s
from attngen.bench.problems import Problem
from attngen.bench.terms import BOTH, FORWARD, GRADIENT, NotSpelled
from attngen.measure import Staged
from attngen.report import Report, SiteReport
from attngen.spec import HOPPER, PORTABLE
from attngen.verify import Check

Call = Callable[[], Sequence[Tensor]]
SHARE, NOISE = 0.01, 0.05  # of a result with dropout; see ``_of_a_draw``
CHANCE = 10.0  # standard deviations


# ---------------------------------------------------------------------------------------------------------------- calls


def call_of(run: Callable[[], Tensor], problem: Problem, inputs: s.Inputs, phase: str) -> Call:
    """The call that is timed, made of a peer's forward on ``inputs``. It gives what ``expected`` lists.

    The gradient of the result lies in memory as the peer lays out its result. Raises ``NotSpelled`` where a peer has no
    gradient.
    """
    if phase == FORWARD:
        return lambda: (run(),)
    out, leaves = run(), inputs.leaves
    if not out.requires_grad:
        raise NotSpelled("it has no gradient")
    grad = torch.empty_like(out.detach()).copy_(s.gradient_of_result(problem, inputs))

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        made = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
        if missing := [name for name, each in zip(leaves, made, strict=True) if each is None]:
            raise NotSpelled(f"it has no gradient of {', '.join(missing)}")
        return made

    def both() -> tuple[Tensor, ...]:
        result = run()
        return result.detach(), *gradients(result)

    return both if phase == BOTH else Staged(run, gradients)


def kernels(reports: Sequence[Report], problem: Problem, phase: str) -> str:
    """Which kernels of ours are timed: family and tiles."""
    trained = problem.trained and problem.alibi
    sites = [site for report in reports for site in report.replaced]
    parts = [f"forward {site.family} ({site.tile})" for site in sites if phase != GRADIENT]
    parts += [f"gradient {_backward(site, trained)}" for site in sites if phase != FORWARD and site.backward_tiles]
    return ", ".join(dict.fromkeys(parts))


def _backward(site: SiteReport, trained: bool) -> str:
    family = site.backward_tiles[0]["family"]
    if trained and family == HOPPER:
        return f"{PORTABLE} (the {HOPPER} kernels make no gradient of slopes)"
    return f"{family} ({site.backward})"


# ----------------------------------------------------------------------------------------------------------- references


@dataclass(frozen=True)
class Expected:
    """What a call gives, in float64 and as eager has it, whose error may be exceeded ``slack`` times. ``drawn``: weights are
    dropped at random, so ``exact`` is the mean over all draws and ``eager`` one of them."""

    name: str
    exact: Tensor
    eager: Tensor
    slack: float
    drawn: bool = False

    def check(self, actual: Tensor) -> Check:
        if self.drawn:
            return _of_a_draw(actual, self.exact, self.eager)
        return verify.within_budget(actual, self.exact, self.eager, slack=self.slack)


def _of_a_draw(actual: Tensor, exact: Tensor, eager: Tensor) -> Check:
    """Where weights are dropped at random: how far what is in it of the mean over all draws is from all of that (``error``),
    and how far what it has beside that is from as much as another draw has (``rms``), as shares.

    A factor that was forgotten shows in the first, weights that were not dropped, or too many of them, in the second. Both
    may be off by what chance makes of so many numbers, and a little more.
    """
    mean, other, draw = exact.double(), eager.double(), actual.double()
    if draw.shape != mean.shape or not draw.isfinite().all():
        return Check(torch.inf, SHARE, torch.inf, NOISE)
    share = ((draw * mean).sum() / mean.square().sum()).item()
    noise, usual = ((x - mean).square().mean().sqrt().item() for x in (draw, other))
    beside = usual / mean.square().mean().sqrt().item()
    of_share = CHANCE / mean.numel() ** 0.5
    of_noise = of_share * mean.shape[-1] ** 0.5  # the features of a row share its weights
    return Check(abs(share - 1.0), SHARE + of_share * beside, abs(noise / usual - 1.0), NOISE + of_noise)


def expected(problem: Problem, inputs: s.Inputs, phase: str) -> list[Expected]:
    """Everything that a call of ``phase`` gives, in order."""
    found, drawn = [], problem.dropout is not None
    mean = replace(problem, dropout=None)
    if phase != GRADIENT:
        found.append(Expected("result", *s.references(problem, inputs), verify.SLACK, drawn))
    if phase != FORWARD:
        names = [f"gradient of {name}" for name in inputs.wanting(trained=problem.trained).leaves]
        grad = s.gradient_of_result(problem, inputs)
        each = ((mean, inputs.double()), (problem, inputs))
        exact, eager = (gradients(p, x, grad.to(x.query.dtype)) for p, x in each)
        found += [Expected(*of, verify_bwd.SLACK, drawn) for of in zip(names, exact, eager, strict=True)]
    return found


def expected_in_eighths(problem: Problem, inputs: s.Inputs, wanted: Sequence[Expected]) -> list[Expected]:
    """The same of peers that multiply 8-bit numbers: eager is given operands that have been rounded to these."""
    query, keys, values = (fp8.rounded(x.float()).to(x.dtype) for x in inputs.operands)
    coarse = replace(inputs, query=query, keys=keys, values=values)
    return [replace(each, eager=s.result_of_eager(problem, coarse)) for each in wanted]


def gradients(problem: Problem, inputs: s.Inputs, grad: Tensor) -> list[Tensor]:
    """Of the plain spelling, a few rows of queries at a time; what several of these add to is summed in float32 or wider."""
    attend, queries = s.spelled(problem), []
    whole = list(inputs.wanting(trained=problem.trained).leaves.values())[1:]
    sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in whole]
    for first, last in s.chunks(problem, inputs.query.device.type):
        part = replace(inputs, query=s.rows(inputs.query, first, last, problem)).wanting(trained=problem.trained)
        with torch.enable_grad():
            out = attend(*part.operands, part.tensors, first=first)
        query, *others = torch.autograd.grad(out, list(part.leaves.values()), s.rows(grad, first, last, problem))
        queries.append(query)
        for total, each in zip(sums, others, strict=True):
            total += each
    return [torch.cat(queries, 1 if problem.views else 2), *(a.to(x.dtype) for a, x in zip(sums, whole, strict=True))]


def verdict(made: Sequence[Tensor], wanted: Sequence[Expected]) -> tuple[str, Check]:
    """The name and the check of what is wrong or, if nothing is, of what is nearest to its budget."""
    pairs = zip(made, wanted, strict=True)
    checks = [(each.name, each.check(x)) for x, each in pairs]
    return max(checks, key=lambda named: (not named[1].ok, named[1].error / (named[1].budget or 1.0)))
