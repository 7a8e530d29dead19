"""The kernel of every site of the zoo, in one spelling of each family: right in Triton's interpreter, and compiled for
several GPUs without spills.

In the interpreter each kernel runs twice: on the very tensors that the model passes, the whole batch and whatever its
strides, and on random ones over several tiles of rows and keys, with the heads of one of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
import zoo
from analysis import Analysis, analyse
from specs import WORTH_IT
from test_aot import compiled_here
from test_detect_dynamic import against_float64, masks
from test_models_half import in_dtype, short
from torch import Tensor

from attngen import compat
from attngen.aot import Binary, Job
from attngen.blockwise import sizes_of
from attngen.choose import Plan, choose
from attngen.device import DEVICES
from attngen.emit import Kernel, emit
from attngen.errors import VerificationFailed
from attngen.spec import KEY, ROW, AttentionSpec, Problem
from attngen.verify import check, run_interpreted, sample_inputs

pytest.importorskip("triton")

BY_NAME = {row.name: row for row in zoo.ROWS}
MORE_ROWS = 25  # than the site has, so that tiles of 16 are three and ragged
HEADS = 4  # of one of the batch: two groups of two
# In half precision each family in one spelling, for both have one spec; those that mask by a lowest number mostly as eager.
LIBRARY = ("gpt2", "llama", "llama_padded", "mistral", "vit", "whisper")
FAMILIES = [f"{name}_{'sdpa' if name in LIBRARY else 'eager'}" for name in zoo.MASKS]
PLAIN = [name for name in BY_NAME if not name.endswith(("_eager", "_sdpa"))]
# In float32 half of the plain modules, and models of each kind of score.
MODELS = ("gpt2_padded_eager", "t5_eager", "gemma2_eager", "bloom_padded_eager", "gpt_oss_eager")
WANTED = [(name, torch.float16) for name in (*FAMILIES, *PLAIN)] + [(name, torch.float32) for name in (*MODELS, *PLAIN[::2])]
SITES = [(f"{name}-{n}-{short(d)}", name, n, d) for name, d in WANTED for n in range(len(BY_NAME[name].sites))]


@dataclass(frozen=True)
class SiteKernel:
    """One site of a model: what it computes, the kernel chosen for it, and the tensors that the model passes to it."""

    spec: AttentionSpec
    problem: Problem
    kernel: Kernel
    inputs: list[Tensor]

    @cached_property
    def random(self) -> list[Tensor]:
        rows, keys = self.problem.rows + MORE_ROWS, self.problem.keys + MORE_ROWS
        *others, heads = self.problem.batch
        return sample_inputs(self.spec, Problem((*[1] * len(others), min(heads, HEADS)), rows, keys))


def kernel_for(spec: AttentionSpec, problem: Problem, device: str) -> Kernel:
    plan = choose(spec, problem, DEVICES[device])
    assert isinstance(plan, Plan), str(plan)
    kernel = emit(plan.spec, plan.tile, l2_bytes=DEVICES[device].l2_bytes)
    assert isinstance(kernel, Kernel), str(kernel)
    return kernel


def kernels_of(found: Analysis) -> Iterator[SiteKernel]:
    for site, special in found.hits:
        operands = [found.values[operand.node] for operand in (site.query, site.keys, site.values)]
        inputs = [*operands, *(found.bound(site, binding) for binding in special.bindings)]
        spec, sizes = special.spec, sizes_of(special.spec, inputs)
        problem = Problem(tuple(sizes[axis] for axis in spec.batch), sizes[ROW], sizes[KEY])
        yield SiteKernel(spec, problem, kernel_for(spec, problem, "h100"), inputs)


Sites = dict[tuple[str, int, torch.dtype], SiteKernel]


@pytest.fixture(scope="session")
def analyses() -> dict[tuple[str, torch.dtype], Analysis]:
    return {(name, dtype): analyse(*in_dtype(BY_NAME[name].build(), dtype)) for name, dtype in WANTED}


@pytest.fixture(scope="session")
def sites(analyses: dict[tuple[str, torch.dtype], Analysis]) -> Sites:
    assert all(len(found.hits) == len(BY_NAME[name].sites) for (name, _), found in analyses.items())
    return {(name, n, d): site for (name, d), found in analyses.items() for n, site in enumerate(kernels_of(found))}


@pytest.mark.parametrize("name", FAMILIES)
def test_specs_in_half_precision(name: str, analyses: dict[tuple[str, torch.dtype], Analysis]) -> None:
    """That of float32, and no further from float64 than the model (in bfloat16: ``test_detect_dynamic``)."""
    found = analyses[name, torch.float16]
    assert found.misses == [] and masks(found) == [site.mask for site in BY_NAME[name].sites]
    for site, special in found.hits:
        assert special.spec.query.dtype == special.spec.out_dtype == found.values[site.output].dtype == torch.float16
    for ours, theirs in against_float64(found):
        assert ours <= 2 * theirs + 1e-6


# -------------------------------------------------------------------------------------------------------- interpreter


@pytest.fixture(scope="session")
def outputs(sites: Sites) -> dict[str, list[Tensor] | VerificationFailed]:
    """What each kernel makes of the model's tensors and of random ones, all run in one child process."""
    if problem := compat.interpreter_problem():
        pytest.skip(problem)
    jobs = {}
    for label, name, n, dtype in SITES:
        site = sites[name, n, dtype]
        jobs[f"{label}-own"] = (site.kernel, site.inputs)
        jobs[f"{site.kernel.name}-{site.problem}"] = (site.kernel, site.random)
    return dict(zip(jobs, run_interpreted(list(jobs.values())), strict=True))


@pytest.mark.parametrize(("label", "name", "n", "dtype"), SITES, ids=[label for label, *_ in SITES])
def test_kernel_is_within_budget(
    label: str, name: str, n: int, dtype: torch.dtype, sites: Sites, outputs: dict[str, list[Tensor] | VerificationFailed]
) -> None:
    site = sites[name, n, dtype]
    for key, inputs in ((f"{label}-own", site.inputs), (f"{site.kernel.name}-{site.problem}", site.random)):
        result = outputs[key]
        assert isinstance(result, list), str(result)
        verdict = check(result, site.spec, inputs)
        assert verdict.ok, f"{key}: {verdict}"


# ---------------------------------------------------------------------------------------------------- ahead of time

# A site of each kind of score, mask and operand, by GPU; some also for about a thousand queries and keys.
COMPILED = {
    90: ("h100", ("gpt2_padded_eager", "mistral_sdpa", "gemma2_eager", "bloom_padded_eager", "t5_eager", "gpt_oss_eager")),
    89: ("l4", ("llama_padded_sdpa", "mpt_eager", "sdpa_mask", "mha_weights_padding")),
    80: ("a100", ("bert_eager", "whisper_sdpa", "mha_both", "sdpa_gqa")),
}
LONG = {
    90: ("gemma2_eager", "t5_eager", "gpt_oss_eager", "sdpa_bias"),
    89: ("mha_weights_padding", "sdpa_mask"),
    80: ("bert_eager", "mha_both"),
}
LENGTH = 1000
TRADED = 8  # bytes of stack per thread
WANTED_BINARIES: list[tuple[int, str, int | None]] = [
    (arch, name, None) for arch, (_, names) in COMPILED.items() for name in names
]
WANTED_BINARIES += [(arch, name, LENGTH) for arch, names in LONG.items() for name in names]

Binaries = dict[tuple[int, str, int | None], Binary | VerificationFailed]


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory, sites: Sites) -> Binaries:
    """All of them compiled from nothing."""
    found: Binaries = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        for arch, (device, _) in COMPILED.items():
            folder = tmp_path_factory.mktemp(f"sm{arch}")
            wanted = [key for key in WANTED_BINARIES if key[0] == arch]
            jobs = [job(sites[key[1], 0, torch.float16], device, key[2], folder) for key in wanted]
            for key, each, made in zip(wanted, jobs, compiled_here(jobs, arch), strict=True):
                found[key] = again(each, made, arch) if key[2] is None else made
        return found


def again(job: Job, made: Binary | VerificationFailed, arch: int) -> Binary | VerificationFailed:
    """What was ``made``, or what is made where all registers may be taken, if a word or two was spilled to take fewer.

    NVIDIA's assembler spills that much where one more program then fits on a multiprocessor: 64 registers and 8 bytes in
    place of 76, say. It does not if it is told of a limit: what is spilled even then is for lack of registers.
    """
    if not isinstance(made, Binary) or not 0 < made.spills <= TRADED:
        return made
    text = job.source.read_text()
    path = job.source.with_stem(f"{job.source.stem}_limited")
    path.write_text(text.replace("num_warps=NUM_WARPS,", "num_warps=NUM_WARPS, maxnreg=255,"))
    assert path.read_text() != text
    (limited,) = compiled_here([replace(job, source=path)], arch)
    return limited


def job(site: SiteKernel, device: str, length: int | None, folder: Path) -> Job:
    more = length - site.problem.rows if length else 0
    problem = replace(site.problem, rows=site.problem.rows + more, keys=site.problem.keys + more)
    kernel = kernel_for(site.spec, problem, device)
    path = folder / f"{kernel.name}.py"
    path.write_text(kernel.source)
    return Job.of(path, sample_inputs(site.spec, problem, device="meta") if length else site.inputs)


@pytest.mark.parametrize(("arch", "name", "length"), WANTED_BINARIES)
def test_kernel_compiles_without_spills(arch: int, name: str, length: int | None, binaries: Binaries) -> None:
    binary = binaries[arch, name, length]
    assert isinstance(binary, Binary), str(binary)
    assert binary.spills <= (WORTH_IT if length else 0)
    assert 0 < binary.registers <= 255
