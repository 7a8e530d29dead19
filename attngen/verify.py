"""Is a kernel right? Its error against float64 may be at most twice what eager makes in the same dtype: in 8 bits, twice what
eager makes of operands and weights that are rounded to them.

Kernels run where they can: on a GPU, or in a child process at small sizes, plain Triton in Triton's interpreter and Gluon in
the simulator.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import sympy as sp
import torch
from torch import Tensor

from attngen import blockwise, boxes, compat, fp8, processes
from attngen.algebra import ONE, TRUE, Load, Op
from attngen.emit import BackwardKernel, Kernel
from attngen.errors import AttngenError, Unavailable, VerificationFailed
from attngen.index import Axis, span
from attngen.interpret import AGAIN
from attngen.layout import memory_order
from attngen.spec import FEATURE, INNER, KEY, PORTABLE, ROW, AttentionSpec, Input, Problem

SLACK = 2.0
INTERPRETER_SECONDS = 120.0  # for one kernel at a small size


# ------------------------------------------------------------------------------------------------------------- budget


@dataclass(frozen=True)
class Check:
    """Largest and root-mean-square error against float64, and what each may be; ``lse`` checks the second output."""

    error: float
    budget: float
    rms: float
    rms_budget: float
    lse: Check | None = None

    @property
    def ok(self) -> bool:
        return self.error <= self.budget and self.rms <= self.rms_budget and (self.lse is None or self.lse.ok)

    def __str__(self) -> str:
        text = f"error {self.error:.2e} (budget {self.budget:.2e}), rms {self.rms:.2e} ({self.rms_budget:.2e})"
        return text if self.lse is None else f"{text}; log-sum-exp: {self.lse}"


def within_budget(actual: Tensor, exact: Tensor, eager: Tensor, *, slack: float = SLACK) -> Check:
    """Compare with ``exact`` (float64): at most ``slack`` times the error of ``eager`` and one rounding of the result.

    Infinities and NaN must stand exactly where they stand in ``exact``.
    """
    rounding = torch.finfo(actual.dtype).eps
    exact = exact.to(actual.device)
    error, rms = _errors(actual, exact)
    eager_error, eager_rms = _errors(eager.to(actual.device), exact)
    finite = exact[exact.isfinite()]
    largest, typical = (finite.abs().max().item(), _rms(finite)) if finite.numel() else (0.0, 0.0)
    return Check(error, slack * eager_error + rounding * largest, rms, slack * eager_rms + rounding * typical)


def _errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference; infinite if a value that is not finite differs."""
    if actual.shape != exact.shape:
        raise VerificationFailed(f"the result has shape {tuple(actual.shape)} instead of {tuple(exact.shape)}")
    odd = ~exact.isfinite()
    same = torch.equal(actual[odd].nan_to_num(), exact[odd].to(actual.dtype).nan_to_num())
    if not same or not torch.equal(actual.isnan(), exact.isnan()):
        return torch.inf, torch.inf
    difference = (actual.double() - exact)[~odd]
    return (difference.abs().max().item(), _rms(difference)) if difference.numel() else (0.0, 0.0)


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def check(actual: Tensor | Sequence[Tensor], spec: AttentionSpec, inputs: Sequence[Tensor]) -> Check:
    """What a kernel of ``spec`` returned for ``inputs``, held against float64 and eager."""
    return judged(actual, reference(spec, inputs), eager(spec, inputs))


def judged(actual: Tensor | Sequence[Tensor], exact: Sequence[Tensor], naive: Sequence[Tensor]) -> Check:
    """The same where what float64 and eager make of it is known: output and log-sum-exp."""
    results = (actual,) if isinstance(actual, Tensor) else tuple(actual)
    verdict, *rest = [within_budget(*each) for each in zip(results, exact, naive, strict=False)]
    return replace(verdict, lse=rest[0]) if rest else verdict


def reference(spec: AttentionSpec, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64."""
    return blockwise.forward(replace(spec, out_dtype=torch.float64), inputs, dtype=torch.float64)


def eager(spec: AttentionSpec, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp as a careful model computes them, over all pairs at once.

    Both products are in the model's dtype, scores and softmax at least in float32. Where ``spec.fp8`` asks for it, what is
    multiplied has been rounded to 8 bits; products of such numbers are exact.
    """
    call = blockwise.arrange(spec, inputs, inputs[0].dtype)
    precise = torch.promote_types(call.dtype, torch.float32)
    if spec.fp8:
        query, keys, values = (fp8.rounded(x.to(precise)) for x in (call.query, call.keys, call.values))
        call = replace(call, query=query, keys=keys, values=values)
    qk = (call.query @ call.keys.transpose(-1, -2)).to(precise)
    evaluate = blockwise.evaluator(replace(call, dtype=precise), 0, call.sizes[ROW], qk)
    scores = evaluate(spec.score if spec.whole is None else spec.whole)
    if not spec.softmax:
        weights = scores.masked_fill(~evaluate(spec.mask), 0.0) if spec.mask != TRUE else scores
        out = weights.to(call.dtype) @ call.values
        return blockwise.laid_out(call, out), out.new_zeros(out.shape[:-1], dtype=precise)
    if spec.whole is None and spec.mask != TRUE:
        scores = scores.masked_fill(~evaluate(spec.mask), -torch.inf)
    scores = call.whole(scores, call.sizes[ROW])
    sinks = [evaluate(sink).expand(*scores.shape[:-1], 1) for sink in spec.sinks]
    logits = torch.cat([scores, *sinks], -1)
    weights = torch.softmax(logits, -1)[..., : call.sizes[KEY]]
    if spec.empty != "nan":
        weights = weights.nan_to_num(0.0)
    if spec.gain != ONE:
        weights = weights * evaluate(spec.gain)
    out = fp8.weighed(weights) @ call.values if spec.fp8 else weights.to(call.dtype) @ call.values
    return blockwise.laid_out(call, out), torch.logsumexp(logits, -1)


# ------------------------------------------------------------------------------------------------------ sample inputs


def sample_inputs(
    spec: AttentionSpec, problem: Problem, *, seed: int = 0, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Random tensors for each input of ``spec``; on the meta device, their shapes and strides alone.

    Operands lie in memory the way the output does (heads beside features in a ``[B, N, H, D]`` layout). What scores are
    divided by is one or more, as sums of weights are: beside a few results divided by next to nothing others would not count.
    """
    sizes, divisors = extents(spec, problem), _divisors(spec)
    generator = torch.Generator("cpu").manual_seed(seed)
    samples = []
    for source in spec.inputs:
        shape, order = shape_of(source, sizes), memory_order(spec, source)
        stored = [shape[d] for d in order]
        if torch.device(device).type == "meta":
            values = torch.empty(stored, dtype=source.dtype, device="meta")
        else:
            values = _random(source, stored, order, problem, generator).to(device)
            values = values.abs() + 1 if source.name in divisors else values
        samples.append(values.permute([order.index(d) for d in range(len(order))]))
    return samples


def _divisors(spec: AttentionSpec) -> set[str]:
    """The inputs that something is divided by."""
    divisors = [n.args[1] for e in (spec.score, spec.gain) for n in e.walk() if isinstance(n, Op) and n.name == "div"]
    return {str(n.source) for divisor in divisors for n in divisor.walk() if isinstance(n, Load) and n.kind == "float"}


def samples_for(kernel: Kernel, problem: Problem, *, seed: int = 0, device: torch.device | str = "cpu") -> list[Tensor]:
    """Random tensors that ``kernel`` takes: where it needs that, rows begin at multiples of 16 bytes."""
    samples = sample_inputs(kernel.spec, problem, seed=seed, device=device)
    if kernel.family == PORTABLE:
        return samples
    planes = boxes.planes(kernel.spec)
    return [_with_padded_rows(x) if source in planes else x for source, x in zip(kernel.spec.inputs, samples, strict=True)]


def _with_padded_rows(values: Tensor) -> Tensor:
    *outer, last = values.shape
    unit = 16 // values.element_size()
    return values.new_zeros([*outer, -(-last // unit) * unit])[..., :last].copy_(values)


def extents(spec: AttentionSpec, problem: Problem) -> dict[Axis, int]:
    """The extent of every axis of ``spec`` in ``problem``."""
    sizes = dict(zip(spec.batch, problem.batch, strict=True))
    return {**sizes, ROW: problem.rows, KEY: problem.keys, INNER: spec.head_dim, FEATURE: spec.value_dim}


def shape_of(source: Input, sizes: dict[Axis, int]) -> tuple[int, ...]:
    """The smallest shape in which every position that ``source`` is read at exists."""
    known = {axis.extent: sp.Integer(size) for axis, size in sizes.items()}
    return tuple(int(span(place)[1].xreplace(known)) + 1 for place in source.index)


def _random(source: Input, stored: list[int], order: list[int], problem: Problem, generator: torch.Generator) -> Tensor:
    if source.dtype.is_floating_point:
        return torch.randn(stored, generator=generator).to(source.dtype)
    keys = next((place for place, d in enumerate(order) if source.index[d].has(KEY)), None)
    if source.dtype == torch.bool:  # three of four pairs stay, and never none of a row
        kept = torch.rand(stored, generator=generator) < 0.75
        return kept if keys is None else kept.index_fill(keys, torch.tensor([0]), True)
    if any(place.has(ROW, KEY) for place in source.index):  # segment numbers, in order; the same for queries and keys
        numbers = torch.randint(0, 3, stored, generator=torch.Generator("cpu").manual_seed(problem.keys))
        return numbers.sort(dim=-1).values.to(source.dtype)
    return torch.randint(1, problem.keys + 1, stored, generator=generator).to(source.dtype)  # lengths


# -------------------------------------------------------------------------------------------------------- interpreter


def verify_interpreted(kernel: Kernel, problem: Problem, *, timeout: float = INTERPRETER_SECONDS) -> Check:
    """Run the text of ``kernel`` in a child process; see ``verify_all_interpreted``."""
    (result,) = verify_all_interpreted([(kernel, problem)], timeout=timeout)
    if isinstance(result, AttngenError):
        raise result
    return result


def verify_all_interpreted(
    jobs: Sequence[tuple[Kernel, Problem]], *, timeout: float = INTERPRETER_SECONDS, seed: int = 0
) -> list[Check | VerificationFailed]:
    """Check each kernel at its problem size, all in one child process of at most ``timeout`` seconds per kernel.

    For the interpreter bfloat16 becomes float16 on the way: its bfloat16 product is wrong. Raises ``Unavailable`` where
    there is no interpreter.
    """
    kernels = [replace(kernel, spec=in_half(kernel.spec)) if in_interpreter(kernel) else kernel for kernel, _ in jobs]
    samples = [samples_for(kernel, problem, seed=seed) for kernel, (_, problem) in zip(kernels, jobs, strict=True)]
    results = run_interpreted(list(zip(kernels, samples, strict=True)), timeout)
    return [_verdict(result, k.spec, x) for result, k, x in zip(results, kernels, samples, strict=True)]


def _verdict(
    result: list[Tensor] | VerificationFailed, spec: AttentionSpec, inputs: list[Tensor]
) -> Check | VerificationFailed:
    if isinstance(result, VerificationFailed):
        return result
    try:
        verdict = check(result, spec, inputs)
    except VerificationFailed as failed:
        return failed
    return verdict if verdict.ok else VerificationFailed(f"the kernel's result is off: {verdict}")


def run_interpreted(
    jobs: Sequence[tuple[Kernel | BackwardKernel, Sequence[Tensor | bool]]], timeout: float = INTERPRETER_SECONDS
) -> list[list[Tensor] | VerificationFailed]:
    """What each kernel returns for its inputs, or why it returned nothing; the interpreter takes no bfloat16 inputs."""
    if problem := compat.interpreter_problem():
        raise Unavailable(f"kernels cannot be checked in Triton's interpreter here: {problem}")
    with tempfile.TemporaryDirectory(prefix="attngen-") as name:
        folder = Path(name)
        for number, (kernel, inputs) in enumerate(jobs):
            (folder / f"{number}.py").write_text(_interpretable(kernel))
            if kernel.leaves_rows and kernel.otherwise:
                (folder / AGAIN).mkdir(exist_ok=True)
                (folder / AGAIN / f"{number}.py").write_text(_interpretable(kernel.otherwise))
            torch.save(list(inputs), folder / f"{number}.in.pt")
        ending = _interpret(folder, timeout * len(jobs))
        return [_result(kernel, folder, number, ending) for number, (kernel, _) in enumerate(jobs)]


def _interpretable(kernel: Kernel | BackwardKernel) -> str:
    return kernel.source.replace("torch.bfloat16", "torch.float16") if in_interpreter(kernel) else kernel.source


def in_interpreter(kernel: Kernel | BackwardKernel) -> bool:
    """Whether a kernel is checked in Triton's interpreter; the others are in the simulator."""
    return kernel.family == PORTABLE


def place(kernel: Kernel | BackwardKernel) -> str:
    """Where a kernel is checked without a GPU, in words."""
    return "Triton's interpreter" if in_interpreter(kernel) else "the simulator"


def _result(kernel: Kernel | BackwardKernel, folder: Path, number: int, ending: str) -> list[Tensor] | VerificationFailed:
    failure, result = folder / f"{number}.error", folder / f"{number}.out.pt"
    if failure.exists():
        return VerificationFailed(f"the kernel does not run in {place(kernel)}: {failure.read_text()}")
    if not result.exists():
        return VerificationFailed(ending)
    outputs: list[Tensor] = torch.load(result, weights_only=True)
    return outputs


def _interpret(folder: Path, timeout: float) -> str:
    """Run the child process over ``folder``; how it ended, if that was early."""
    command = processes.command("attngen.interpret", str(folder))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"the interpreter was stopped after {timeout:.0f} s"
    lines = child.stderr.strip().splitlines() or ["no message"]
    return f"the interpreter's process ended with code {child.returncode}: {lines[-1]}"


def in_half(spec: AttentionSpec) -> AttentionSpec:
    """``spec`` with float16 in place of bfloat16."""

    def half(dtype: torch.dtype) -> torch.dtype:
        return torch.float16 if dtype == torch.bfloat16 else dtype

    def converted(source: Input) -> Input:
        return replace(source, dtype=half(source.dtype))

    return replace(
        spec,
        query=converted(spec.query),
        keys=converted(spec.keys),
        values=converted(spec.values),
        extras=tuple(map(converted, spec.extras)),
        out_dtype=half(spec.out_dtype),
    )
