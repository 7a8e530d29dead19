"""Every kernel compiles ahead of time: all kinds for sm_90, a few for sm_80 or sm_89, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from specs import BY_NAME, CASES, CAUSAL, DISTINCT, FOR_OLDEST, HALF, Case, attention
from test_emit import emitted

from attngen import aot, compat
from attngen.aot import Binary, Job, Layout, compile_all, compile_for, layout_of
from attngen.emit import Kernel, emit
from attngen.errors import Unavailable, VerificationFailed
from attngen.spec import HOPPER, Problem, Tile
from attngen.verify import sample_inputs

pytest.importorskip("triton")

OTHER_ARCHS = {
    80: ("causal", "dense_fp32", "softcap_window", "fill_shows"),
    89: ("dense_bf16", "head_96", "table_cross", "sinks"),
}
OLDEST = {(90, name) for name in FOR_OLDEST}
# Tiles for large problems on Hopper: the largest that keep everything in registers.
TYPICAL = (
    Case("d64", attention(dtype=torch.bfloat16, mask=CAUSAL), Tile(128, 64, 4, 3)),
    Case("d128", attention(dtype=torch.bfloat16, mask=CAUSAL, head_dim=128), Tile(128, 64, 8, 3)),
    Case("d256", attention(dtype=torch.bfloat16, mask=CAUSAL, head_dim=256), Tile(128, 32, 8, 2)),
)


def compiled(cases: tuple[Case, ...], folder: Path, arch: int) -> dict[str, Binary | VerificationFailed]:
    jobs = [job_of(emitted(case), case.problem(1024), folder / f"{case.name}.py") for case in cases]
    return dict(zip((case.name for case in cases), compiled_here(jobs, arch), strict=True))


def compiled_here(jobs: Sequence[Job], arch: int) -> list[Binary | VerificationFailed]:
    """As ``compile_all`` does it, in this process: others would have to import torch and Triton first."""
    results: list[Binary | VerificationFailed] = []
    for job in jobs:
        try:
            results.append(compile_for(job, arch))
        except VerificationFailed as failed:
            results.append(failed)
    return results


def job_of(kernel: Kernel, problem: Problem, path: Path) -> Job:
    path.write_text(kernel.source)
    return Job.of(path, sample_inputs(kernel.spec, problem, device="meta"))


@pytest.fixture(scope="session")
def binaries(
    tmp_path_factory: pytest.TempPathFactory, asked: Callable[[str, str], list[dict[str, Any]]]
) -> dict[tuple[int, str], Binary | VerificationFailed]:
    """Everything that tests ask for, by capability and name, compiled from nothing."""
    found: dict[tuple[int, str], Binary | VerificationFailed] = {}
    wanted = {(params["arch"], params["name"]) for params in asked(__name__, "test_kernel_compiles")} | {(90, "d128")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        for arch in sorted({arch for arch, _ in wanted}):
            cases = tuple(case for case in (*DISTINCT, *TYPICAL) if (arch, case.name) in wanted)
            results = compiled(cases, tmp_path_factory.mktemp(f"sm{arch}"), arch)
            found |= {(arch, name): result for name, result in results.items()}
    return found


NAMES = [(90, case.name) for case in (*DISTINCT, *TYPICAL)]
NAMES += [(arch, name) for arch, names in OTHER_ARCHS.items() for name in names]
WANTED = [pytest.param(*each, marks=() if each in OLDEST else pytest.mark.newest) for each in NAMES]


@pytest.mark.parametrize(("arch", "name"), WANTED)
def test_kernel_compiles(arch: int, name: str, binaries: dict[tuple[int, str], Binary | VerificationFailed]) -> None:
    binary = binaries[arch, name]
    assert isinstance(binary, Binary), str(binary)
    assert binary.arch == arch and 0 < binary.registers <= 255
    assert binary.spills == 0
    case = next(case for case in (*CASES, *TYPICAL) if case.name == name)
    assert binary.hgmma == (arch == 90 and case.spec.query.dtype.itemsize == 2 and case.tile.rows >= 64)


def test_binary_says_what_the_tile_asks_for(binaries: dict[tuple[int, str], Binary | VerificationFailed]) -> None:
    binary = binaries[90, "d128"]
    assert isinstance(binary, Binary)
    assert (binary.warps, binary.stages) == (8, 3)
    blocks = 3 * 2 * 64 * 128 * 2  # three stages of keys and values, in bytes
    assert blocks <= binary.shared <= blocks + 2 * 128 * 128
    assert binary.seconds > 0 and binary.cubin_bytes > 1000 and binary.ptx_bytes > 1000


@pytest.mark.parametrize(("count", "shares"), [(7, ["036", "14", "25"]), (2, ["0", "1"]), (0, [])])
def test_kernels_are_compiled_side_by_side(count: int, shares: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each processor has a child process with its share, all begun before anybody waits; results are in order."""
    begun: list[str] = []

    def child(jobs: list[Job], arch: int) -> str:
        begun.append("".join(job.source.name for job in jobs))
        return begun[-1]

    def collect(share: str, *_: object) -> list[VerificationFailed]:
        assert begun == shares
        return [VerificationFailed(name) for name in share]

    monkeypatch.setattr(aot, "_child", child)
    monkeypatch.setattr(aot, "_collect", collect)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    results = aot.begin([Job(Path(str(number)), ()) for number in range(count)], 90).results()
    assert [str(result) for result in results] == [*map(str, range(count))]


def test_what_rows_are_left_to_is_compiled_as_it_is_launched_behind(tmp_path: Path) -> None:
    """Into the results of the first, with flags; and compiled alone it is another kernel."""
    case = BY_NAME["fill_shows"]
    first = emit(case.spec, Tile(128, 128, 8, 2, HOPPER))
    assert isinstance(first, Kernel) and first.leaves_rows
    job = job_of(first, Problem((2, 4), 100, 100), tmp_path / "first.py")
    (tmp_path / "second.py").write_text(emitted(case).source)
    behind = aot.import_file(tmp_path / "second.py")
    call = aot.standby_launches_of(aot.import_file(job.source), behind, job.inputs)[aot.KERNEL]
    alone = aot.launch_of(behind, job.inputs)
    *_, flags = (x for x in call.args if isinstance(x, torch.Tensor))
    assert (flags.dtype, flags.shape) == (torch.int32, (2, 4, 100))
    assert (call.args[-1], alone.args[-1]) == (True, False) and call.grid == alone.grid
    assert isinstance(compile_for(replace(job, again=tmp_path / "second.py"), 90), Binary)


# ------------------------------------------------------------------------------------------------------ specialisation


def test_launch_is_recorded_and_the_module_left_alone(tmp_path: Path) -> None:
    case = BY_NAME["causal"]
    job = job_of(emitted(case), Problem((2, 4), 100, 100), tmp_path / "kernel.py")
    module = aot.import_file(job.source)
    kernel = module.attention_forward
    call = aot.launch_of(module, job.inputs)
    assert module.attention_forward is kernel
    assert call.grid == (2 * 8, 1, 1)
    assert call.options == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert [x.shape for x in call.args[:3]] == [(2, 4, 100, 64)] * 3


def test_lengths_do_not_specialise_but_strides_do(tmp_path: Path) -> None:
    """One binary serves all lengths; a stride of one, or one that is no multiple of 16, makes another."""
    kernel = emitted(BY_NAME["causal"])

    def source_of(inputs: list[torch.Tensor]) -> tuple[dict[str, str], dict[tuple[int, ...], int]]:
        path = tmp_path / "kernel.py"
        path.write_text(kernel.source)
        module = aot.import_file(path)
        call = aot.launch_of(module, [layout_of(x) for x in inputs])
        source, *_ = compat.specialised(module.attention_forward, call.args, call.options, 90)
        return source.signature, source.attrs

    def sample(rows: int, features: int = 64) -> list[torch.Tensor]:
        return [torch.empty(2, 4, rows, features, device="meta", dtype=torch.half)[..., :64] for _ in range(3)]

    assert source_of(sample(1024)) == source_of(sample(1000)) == source_of(sample(1))
    assert source_of(sample(1024)) != source_of(sample(1024, 65))
    assert source_of(sample(1024))[0]["q_stride_3"] == "constexpr"


@pytest.mark.parametrize(("offset", "aligned"), [(0, True), (8, True), (1, False)])
def test_alignment_is_that_of_the_view(offset: int, aligned: bool, tmp_path: Path) -> None:
    """A slice of a fused projection may begin anywhere; only multiples of 16 bytes load in whole vectors."""
    path = tmp_path / "kernel.py"
    path.write_text(emitted(BY_NAME["causal"]).source)
    module = aot.import_file(path)
    q = torch.empty(2 * 4 * 64 * 64 + 16, dtype=torch.half)[offset : offset + 2 * 4 * 64 * 64].view(2, 4, 64, 64)
    call = aot.launch_of(module, [layout_of(q)] * 3)
    source, *_ = compat.specialised(module.attention_forward, call.args, call.options, 90)
    assert bool(source.attrs.get((0,))) == aligned


@pytest.mark.parametrize(("row", "unit"), [(40, 8), (41, 1)])
def test_heads_of_40_are_read_in_units_of_16_bytes_where_their_strides_allow_it(row: int, unit: int, tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(emitted(BY_NAME["head_40"]).source)
    inputs = [torch.empty(2, 64, 4, row, dtype=torch.half)[..., :40].transpose(1, 2) for _ in range(3)]
    call = aot.launch_of(aot.import_file(path), [layout_of(x) for x in inputs])
    assert call.args[-1] == unit


@pytest.mark.parametrize(("keys", "unit"), [(1000, 8), (1001, 1)])
def test_a_bias_is_read_in_units_where_rows_and_the_last_block_are_whole(keys: int, unit: int, tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(emitted(BY_NAME["bias"]).source)
    q, k = (torch.empty(2, 4, n, 64, dtype=torch.half) for n in (64, keys))
    bias = torch.empty(1, 4, 64, keys, dtype=torch.half)
    call = aot.launch_of(aot.import_file(path), [layout_of(x) for x in (q, k, k, bias)])
    assert call.args[-1] == unit


def test_layouts_survive_the_journey() -> None:
    tensor = torch.randn(2, 5, 3, 8)[:, 1:, 1].transpose(0, 1)
    layout = layout_of(tensor)
    assert layout == Layout((4, 2, 8), (24, 120, 1), 32, "float32")
    meta = layout.meta()
    assert (meta.shape, meta.stride(), meta.storage_offset()) == (tensor.shape, tensor.stride(), 32)


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_does_not_compile_is_said_in_its_place(tmp_path: Path) -> None:
    kernel = emitted(BY_NAME["dense"])
    good = job_of(kernel, Problem((1, 1), 64, 64), tmp_path / "good.py")
    (tmp_path / "bad.py").write_text(kernel.source.replace("tl.exp2", "tl.exp3"))
    (tmp_path / "empty.py").write_text("import torch\n")
    bad, empty = (Job(tmp_path / name, good.inputs) for name in ("bad.py", "empty.py"))
    first, second, third = compile_all([bad, good, empty], 90, workers=1)
    assert isinstance(first, VerificationFailed) and "bad.py does not compile for sm_90" in str(first)
    assert isinstance(second, Binary)
    assert isinstance(third, VerificationFailed) and "launch" in str(third)


def test_compiler_that_dies_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "crash.py"
    path.write_text("import os\nos._exit(4)\n")
    (result,) = compile_all([Job(path, ())], 90)
    assert isinstance(result, VerificationFailed) and "code 4" in str(result)


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("attngen.compat.has_triton", lambda: False)
    with pytest.raises(Unavailable, match="triton is not installed"):
        compile_all([Job(tmp_path / "kernel.py", ())], 90)


def test_nothing_to_compile() -> None:
    assert compile_all([], 90) == []


@pytest.mark.parametrize("tile", [BY_NAME["alibi"].tile, Tile(128, 128, 8, 2, HOPPER)], ids=str)
def test_what_was_compiled_serves_only_what_triton_would_not_tell_apart(tile: Tile, tmp_path: Path) -> None:
    kernel = emit(BY_NAME["alibi"].spec, tile)
    assert isinstance(kernel, Kernel)
    path = tmp_path / "kernel.py"
    path.write_text(kernel.source)
    module = aot.import_file(path)
    looked_up: list[object] = []

    class Compiled:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args: None

    class Compiler:
        def __getitem__(self, grid: object) -> Callable[..., Compiled]:
            looked_up.append(grid)
            return lambda *args, **options: Compiled()

    vars(module)["attention_forward"] = Compiler()
    q, k, v = (torch.empty(2, 2, 64, 64, dtype=HALF, device="meta") for _ in range(3))
    slopes = torch.empty(2, device="meta")
    for inputs, compilations in (
        ((q, k, v, slopes), 1),
        ((q, k, v, slopes), 1),
        ((q, k, v, slopes.double()), 2),
        ((q, k, v, torch.empty(2, 2, device="meta")[:, 0]), 3),
        ((q.bfloat16(), k.bfloat16(), v.bfloat16(), slopes), 4),
    ):
        module.launch(*inputs)
        assert len(looked_up) == compilations
