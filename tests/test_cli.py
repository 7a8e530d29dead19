"""The command line as its users meet it: what it prints and writes, and how it ends."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

import attngen
from attngen import compat, decide, modelfile, output, show, trial, verify
from attngen.cli import app
from attngen.device import DEVICES
from attngen.emit import Kernel, emit
from attngen.errors import CannotWrite, Unavailable
from attngen.report import Report, SiteReport, groups
from attngen.spec import Problem, Tile

ATTENTION = """
import torch
from torch import nn

class Attention(nn.Module):
    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) * 0.25
        past = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        return torch.softmax(scores.masked_fill(~past, float("-inf")), -1) @ v

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, q, k, v):
        for layer in self.layers:
            q = q + layer(q, k, v)
        return q

print("printed by the file")
model = Net().eval()
example_inputs = tuple(torch.randn(2, 3, 70, 32) for _ in range(3))
"""
PLAIN = "import torch\ndef model(q, k, v): return torch.softmax(q @ k.transpose(-1, -2), -1) @ v\n"


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, and no GPU except for tests that need one."""
    monkeypatch.chdir(tmp_path)
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "100")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_file(text: str = ATTENTION) -> str:
    Path("model.py").write_text(text)
    return "model.py"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def tree(folder: str | Path = ".") -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if "__pycache__" not in str(path)}


# ------------------------------------------------------------------------------------------------------------ optimize


NO_INTERPRETER = compat.interpreter_problem()
interprets = pytest.mark.skipif(NO_INTERPRETER is not None, reason=str(NO_INTERPRETER))


@pytest.fixture(scope="module")
def optimized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder in which ``attngen optimize model.py --json`` ran as its own process, and how that ended."""
    if NO_INTERPRETER:
        pytest.skip(NO_INTERPRETER)
    folder = tmp_path_factory.mktemp("optimized")
    (folder / "model.py").write_text(ATTENTION)
    for library in ("cuda", "numpy"):  # which torch looks for as it is imported, also in processes that compile and verify
        (folder / f"{library}.py").write_text("raise RuntimeError('a file of the user was imported')")
    code = "import sys; sys.path.remove(''); from attngen.cli import main; main()"  # as the installed command begins
    command = [sys.executable, "-c", code, "optimize", "model.py", "--json"]
    environment = {**os.environ, "ATTNGEN_CACHE_DIR": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    return folder, subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_json_alone_is_on_stdout(optimized: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = optimized
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "attngen-out/model/report.json").read_text())
    assert "printed by the file" in done.stderr
    stages = re.findall(r"^  (read|analyse|compile|verify|write) ", done.stderr, re.MULTILINE)
    assert sorted(stages) == sorted(("read", "analyse", "compile", "verify", "write"))
    assert "Planning for NVIDIA H200 (no GPU here)" in done.stderr and "sm_90" in done.stderr


def test_the_report_holds_what_other_tools_read(optimized: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    report = json.loads(optimized[1].stdout)
    assert report["device"] == "NVIDIA H200" and len(report["sites"]) == 3
    for number, site in enumerate(report["sites"]):
        assert set(site) == {field.name for field in fields(SiteReport)}
        assert site["where"] == f"layers.{number} (model.py:9)"
        assert (site["status"], site["reason"], site["family"]) == ("replaced", "", "portable")
        assert site["computes"] == "softmax(qk*0.25; causal), 2x3 heads, 70 x 70, d=32, float32"
        assert re.fullmatch(r"\d+x\d+ w\d s\d", site["tile"])
        assert 0 < site["error"] <= site["budget"] < 1e-4
        assert 0.003 < site["predicted_ms"] < 0.1
        assert site["hbm_bytes"]["after"] == 4 * 6 * 70 * 32 * 4 < site["hbm_bytes"]["before"]
        assert site["sizes"] == {"batch": [2, 3], "rows": 70, "keys": 70}
        assert site["compiled"]["arch"] == 90 and 16 < site["compiled"]["registers"] <= 255


def test_the_directory_holds_kernels_plan_report_and_loader(
    optimized: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder = optimized[0] / "attngen-out/model"
    (kernel,) = {site["kernel"] for site in json.loads((folder / "report.json").read_text())["sites"]}
    assert tree(folder) == {"kernels", f"kernels/{kernel}.py", "plan.json", "report.json", "report.html", "load.py"}
    source = (folder / f"kernels/{kernel}.py").read_text()
    imported = {n.names[0].name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import)}
    assert imported == {"torch", "triton", "triton.language"}
    (entry,) = json.loads((folder / "plan.json").read_text())["entries"]
    assert (entry["kernel"], entry["rows"], entry["batch"]) == (kernel, 70, [2, 3])


def test_the_loader_makes_the_same_choices(optimized: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder = optimized[0] / "attngen-out/model"
    plan = json.loads((folder / "plan.json").read_text())
    plan["entries"][0]["tile"] = {"rows": 16, "keys": 64, "warps": 8, "stages": 1}
    Path("copied").mkdir()
    Path("copied/plan.json").write_text(json.dumps(plan))
    Path("copied/load.py").write_text((folder / "load.py").read_text())
    script = (
        "import attngen, torch, load, runpy\n"
        "file = runpy.run_path(r'{file}')\n"
        "model, inputs = file['model'], file['example_inputs']\n"
        "with torch.no_grad(), attngen.record() as reports:\n"
        "    torch.testing.assert_close(load.compiled(model)(*inputs), model(*inputs))\n"
        "print({{site.tile for report in reports for site in report.sites}})\n"
    ).format(file=optimized[0] / "model.py")
    done = subprocess.run([sys.executable, "-c", script], cwd="copied", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("{'16x64 w8 s1'}")


BOTH_FAMILIES = """
import torch

def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

def model(q, k, v, few):
    return attend(q, k, v), attend(few, few, few)

example_inputs = (*(torch.empty(4, 16, 2048, 64, dtype=torch.bfloat16) for _ in range(3)), torch.empty(1, 2, 40, 64))
"""


@interprets
def test_kernels_that_no_interpreter_runs_are_checked_in_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", "cache")
    done = run("optimize", model_file(BOTH_FAMILIES), "--json")
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "checked at small sizes on the CPU" in said
    assert "2 kernels in Triton's interpreter and the simulator: within the error budget" in said and "as float16" not in said
    large, small = json.loads(done.stdout)["sites"]
    assert (large["family"], small["family"]) == ("hopper", "portable")
    for site in (large, small):
        assert site["status"] == "replaced" and 0 < site["error"] <= site["budget"]
    assert large["error"] > 1e-4 and large["compiled"]["hgmma"] and not large["compiled"]["spills"]


@interprets
def test_a_kernel_that_is_off_is_named_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Kernel:
        kernel = emit(*args, **kwargs)
        assert isinstance(kernel, Kernel)
        source = kernel.source.replace("scale = 0.", "scale = 1.05 * 0.")
        assert source != kernel.source
        return replace(kernel, source=source, name="fwd_broken")

    monkeypatch.setattr(decide, "emit", broken)
    monkeypatch.setattr(decide, "_EMITTED", {})
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", "cache")
    done = run("optimize", model_file(ATTENTION.replace("0.25", "0.2371")), "-o", "out/here")
    assert done.exit_code == 7
    assert "1 kernel failed, so nothing was written" in done.stderr
    assert "layers.0-2: fwd_broken" in done.stderr and "the kernel's result is off: error" in done.stderr
    assert "Left as it was" in done.stdout and "its kernel failed" in done.stdout
    assert Path("cache/kernels/fwd_broken.py").exists() and not Path("out").exists()


def test_without_triton_kernels_are_written_and_said_to_be_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "has_triton", lambda: False)
    done = run("optimize", model_file(), "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert [note.split(":")[0] for note in report["notes"]] == ["Not compiled ahead of time", "Not verified"]
    assert all("triton is not installed" in note for note in report["notes"])
    assert {(site["status"], site["error"], site["compiled"]) for site in report["sites"]} == {("replaced", None, None)}
    assert len(list(Path("attngen-out/model/kernels").iterdir())) == 1


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_checked_there_at_the_sizes_of_the_model() -> None:
    done = run("optimize", model_file(), "--json")
    assert done.exit_code == 0, done.stderr
    assert f"Planning for the {torch.cuda.get_device_name()} here" in done.stderr and "on the GPU" in done.stderr
    for each in json.loads(done.stdout)["sites"]:
        assert each["status"] == "replaced" and 0 < each["error"] <= each["budget"] < 1e-4


# ------------------------------------------------------------------------------------------------------------- explain


def test_explain_registers_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("attngen.runtime.operator", "attngen.paths.write_atomically"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("changed something"))
    done = run("explain", model_file())
    assert done.exit_code == 0 and tree() == {"model.py"}
    assert "layers.0-2  x3" in done.stdout and "softmax(qk*0.25; causal)" in done.stdout
    assert "3 of 3 sites can be replaced." in done.stdout and "printed by the file" not in done.stdout


def test_formula_is_printed_with_numbers() -> None:
    done = run("explain", model_file(), "--formula")
    text = " ".join(done.stdout.split())
    assert re.search(r"programs = heads\*tiles = 6\*\d+ = \d+", text) and "seconds = launch" in text


def explained(text: str, *arguments: str) -> list[dict[str, Any]]:
    sites: list[dict[str, Any]] = json.loads(run("explain", model_file(text), "--json", *arguments).stdout)["sites"]
    return sites


def test_only_and_skip_select_sites() -> None:
    def statuses(*arguments: str) -> list[str]:
        return [site["status"] for site in explained(ATTENTION, *arguments)]

    assert statuses("--only", "layers.1") == ["missed", "found", "missed"]
    assert statuses("--skip", "layers.1", "--skip", "layers.2") == ["found", "missed", "missed"]


def test_train_plans_for_gradients() -> None:
    """A kernel for training also writes one number per row."""
    text = ATTENTION.replace("torch.randn(2, 3, 70, 32)", "torch.randn(2, 3, 70, 32, requires_grad=True)")
    plain, training = (explained(text, *extra)[0]["hbm_bytes"]["after"] for extra in ((), ("--train",)))
    assert training - plain == 2 * 3 * 70 * 4


def test_deterministic_plans_for_gradients_that_add_nothing_up_in_memory() -> None:
    """The one kernel in which programs add to each other's results is left out; inference has nothing to choose."""
    text = BOTH_FAMILIES.replace("dtype=torch.bfloat16)", "dtype=torch.bfloat16, requires_grad=True)")
    usual, asked, inference = (
        explained(text, *extra)[0] for extra in (("--train",), ("--train", "--deterministic"), ("--deterministic",))
    )
    assert "hopper" in usual["backward"] and "hopper" not in asked["backward"] and asked["backward"]
    assert inference["backward"] == ""


def test_fp8_says_what_is_in_8_bits_and_why_the_rest_is_not() -> None:
    usual, asked = (explained(BOTH_FAMILIES, *extra) for extra in ((), ("--fp8", "rotate")))
    assert "fp8" not in usual[0]["computes"] + usual[1]["computes"]
    assert asked[0]["computes"].endswith("bfloat16 in fp8 (rotate)") and "hopper" in asked[0]["tile"]
    assert asked[1]["computes"].endswith("float32, not fp8: TMA and warpgroups take 16-bit operands")
    assert asked[1]["tile"] == usual[1]["tile"]
    training = BOTH_FAMILIES.replace("dtype=torch.bfloat16)", "dtype=torch.bfloat16, requires_grad=True)")
    assert "not fp8: gradients are asked for" in explained(training, "--train", "--fp8", "block")[0]["computes"]
    assert run("explain", model_file(BOTH_FAMILIES), "--fp8", "always").exit_code == 2


@interprets
def test_what_was_planned_in_8_bits_is_loaded_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", "cache")
    done = run("optimize", model_file(BOTH_FAMILIES), "-o", "out", "--json", "--fp8", "block")
    assert done.exit_code == 0, done.stderr
    (site, _) = json.loads(done.stdout)["sites"]
    assert site["error"] <= site["budget"] and site["compiled"]["spills"] <= 8
    assert json.loads(Path("out/plan.json").read_text())["fp8"] == "block"
    q = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad(), attngen.record() as reports:
        torch.compile(lambda x: attend(x, x, x), backend=attngen.load("out", inner="eager", target="h200"))(q)
    assert "fp8 (block)" in reports[0].sites[0].computes


def test_target_decides_what_is_planned_for() -> None:
    reports = [json.loads(run("explain", model_file(), "--json", "--target", t).stdout) for t in ("a100", "h200")]
    assert [report["device"] for report in reports] == ["NVIDIA A100 80GB", "NVIDIA H200"]
    assert reports[0]["sites"][0]["predicted_ms"] != reports[1]["sites"][0]["predicted_ms"]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        pytest.param("import nowhere_at_all", 3, "ModuleNotFoundError", id="import"),
        pytest.param("import torch", 3, "names no model", id="no model"),
        pytest.param("model = print", 3, "names no inputs", id="no inputs"),
        pytest.param(
            f"{PLAIN}example_inputs = torch.ones(2)",
            4, "TypeError: model() missing 2 required positional arguments: 'k' and 'v'\n  It is called as model(q, k, v).",
            id="too few inputs",
        ),
        pytest.param(
            "import torch\nmodel = torch.nn.Linear(2, 2)\nexample_inputs = {'x': torch.ones(2)}",
            4, "unexpected keyword argument 'x'\n  It is called as model(input).", id="another keyword",
        ),
        pytest.param(
            "import torch\ndef model(x):\n    raise ValueError('too long')\nexample_inputs = torch.ones(2)",
            4, "ValueError: too long\n  at {path}:3", id="model raises",
        ),
        pytest.param(
            f"{PLAIN}example_inputs = (torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3))",
            4, "must have same reduction dim", id="shapes do not fit",
        ),
        pytest.param(
            "import torch\ndef model(x): return 3\nexample_inputs = torch.ones(2)", 4, "no graph", id="no graph"
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["explain", "optimize"])
def test_bad_files_end_with_one_message(command: str, text: str, code: int, said: str) -> None:
    done = run(command, model_file(text))
    assert done.exit_code == code
    assert said.format(path=Path("model.py").resolve()) in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert tree() == {"model.py"}


def test_a_cache_that_cannot_be_written_is_found_before_the_file_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", "/dev/null/cache")
    done = run("optimize", model_file("raise RuntimeError('it ran')"))
    assert done.exit_code == 5 and "ATTNGEN_CACHE_DIR" in done.stderr and "/dev/null/cache" in done.stderr
    assert "it ran" not in done.stderr and tree() == {"model.py"}


def test_kernels_are_compiled_ahead_for_nvidia_only() -> None:
    with pytest.raises(Unavailable, match="not for AMD"):
        trial.begin([], DEVICES["mi300x"])


def test_traceback_is_shown_if_asked_for() -> None:
    done = run("explain", model_file("import nowhere_at_all"), "--traceback")
    assert done.exit_code == 3 and "Traceback (most recent call last)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("explain", "absent.py"), 3, "does not exist"),
        (("explain", "model.py", "--target", "h300"), 2, 'unknown target "h300". Known: auto, h200'),
        (("optimize", "model.py", "--tile", "64"), 2, "No such option"),
        (("optimize", "model.py", "-o", "model.py/out"), 5, "cannot be written"),
        (("optimize", "model.py", "-o", "/dev/null/out"), 5, "cannot be written"),
        (("optimize", "model.py", "-o", "."), 5, "is not empty and was not written by attngen"),
    ],
)
def test_bad_arguments_are_found_before_the_file_runs(arguments: tuple[str, ...], code: int, said: str) -> None:
    model_file("raise RuntimeError('it ran')")
    done = run(*arguments)
    assert done.exit_code == code and said in done.stderr
    assert "it ran" not in done.stderr and tree() == {"model.py"}


@pytest.mark.parametrize(
    ("sample", "said"),
    [("torch.ones(1, 1, 600, 520)", "head size is 520"), ("torch.ones(1, 2, 8, 64).double()", "float64")],
)
def test_what_kernels_do_not_do_is_a_reason_and_no_error(sample: str, said: str) -> None:
    done = run("optimize", model_file(f"{PLAIN}example_inputs = ({sample},) * 3"))
    assert done.exit_code == 0
    assert said in done.stdout and "Nothing was replaced: 1 site left as it was" in done.stdout
    assert "Written to" in done.stdout and "Use it" not in done.stdout
    assert json.loads(Path("attngen-out/model/plan.json").read_text())["entries"] == []


def test_a_model_without_attention() -> None:
    done = run("explain", model_file("import torch\nmodel = torch.nn.Linear(4, 4)\nexample_inputs = torch.ones(2, 4)"))
    assert done.exit_code == 0 and "No attention was found" in done.stdout


def test_a_model_that_decides_by_values_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"{PLAIN.replace('model', 'part')}def model(q, k, v):\n    q = part(q, k, v)\n"
    text += "    return part(q, k, v) if q.sum() < 1e9 else q\nexample_inputs = (torch.ones(1, 2, 8, 16),) * 3"
    with monkeypatch.context() as patch:
        patch.setattr(compat, "has_triton", lambda: False)  # nothing need be compiled for this
        explained, made = (run(command, model_file(text), "--json") for command in ("explain", "optimize"))
    first, both = json.loads(explained.stdout), json.loads(made.stdout)
    assert (len(first["sites"]), len(both["sites"])) == (2, 2)
    assert not first["partial"] and not both["partial"]
    api = attngen.explain(*_example("model.py"))
    assert api.partial and len(api.sites) == 1 and "decides by values" in api.notes[0]


def _example(path: str) -> tuple[Any, ...]:
    with modelfile.opened(Path(path)) as example:
        return (example.model, *example.args)


def test_dropout_left_on_by_mistake_is_said() -> None:
    text = ATTENTION.replace(".eval()", "").replace('float("-inf"))', 'float("-inf")').replace(", -1) @", "), -1), 0.1) @")
    text = text.replace("torch.softmax", "nn.functional.dropout(torch.softmax")
    done = run("explain", model_file(text))
    assert done.exit_code == 0 and "call model.eval()" in " ".join(done.stdout.split())


# -------------------------------------------------------------------------------------------------------------- output


def fill(folder: Path, kernel: str) -> None:
    with output.staged(folder) as stage:
        output.write(stage, "model.py", "NVIDIA H200", "{}", "{}", "page", [(kernel, "text")])


def test_a_later_run_replaces_an_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    fill(folder, "fwd_1")
    (folder / "kernels/mine.py").write_text("kept")
    fill(folder, "fwd_2")
    files = {"plan.json", "report.json", "report.html", "load.py"}
    assert tree(folder) == files | {"kernels", "kernels/fwd_2.py", "kernels/mine.py"}
    ast.parse((folder / "load.py").read_text())


def test_nothing_stays_if_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), output.staged(tmp_path / "a/b") as stage:
        output.write(stage, "model.py", "NVIDIA H200", "{}", "{}", "page", [])
        raise RuntimeError
    assert tree(tmp_path) == set()
    fill(tmp_path / "a", "fwd_1")
    before = tree(tmp_path)
    with pytest.raises(RuntimeError), output.staged(tmp_path / "a") as stage:
        output.write(stage, "model.py", "NVIDIA H200", "{}", "{}", "page", [("fwd_2", "text")])
        raise RuntimeError
    assert tree(tmp_path) == before


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text("mine")
    with pytest.raises(CannotWrite, match="was not written by attngen"):
        fill(tmp_path, "fwd_1")
    assert (tmp_path / "load.py").read_text() == "mine" and tree(tmp_path) == {"load.py"}


# ---------------------------------------------------------------------------------------------------------------- table


def site(where: str, **changes: Any) -> SiteReport:
    known = {"computes": "softmax(qk*0.125; causal), 2x8 heads, 1024 x 1024, d=64, bfloat16", "tile": "64x64 w4 s2"}
    numbers = {"predicted_ms": 0.5, "hbm_bytes": {"before": 2 * 10**9, "after": 10**7}, "error": 1e-3, "budget": 6e-3}
    return SiteReport(where, "replaced", **{**known, **numbers, "kernel": "fwd_0123456789ab", **changes})


def layers(*numbers: int, **changes: Any) -> list[SiteReport]:
    return [site(f"model.layers.{n}.self_attn (modeling_x.py:200)", **changes) for n in numbers]


def shown(report: Report, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(show.sites(report), show.summary(report))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize(
    ("numbers", "path"),
    [
        ([0], "model.layers.0.self_attn"),
        ([*range(12)], "model.layers.0-11.self_attn"),
        ([0, 1, 2, 6], "model.layers.0-2,6.self_attn"),
        ([*range(0, 26, 2)], "model.layers.0,2..24.self_attn"),
    ],
)
def test_sites_that_differ_in_their_layer_are_one_row(numbers: list[int], path: str) -> None:
    (group,) = groups(layers(*numbers))
    assert (group.path, group.line, len(group.sites)) == (path, "modeling_x.py:200", len(numbers))


def test_sites_that_differ_in_more_are_rows_of_their_own() -> None:
    found = [*layers(0, 2), *layers(1, 3, computes="softmax(qk), 2x8 heads, 9 x 9, d=64, bfloat16"), site("model.py:3")]
    assert [(g.path, g.line) for g in groups(found)] == [
        ("model.layers.0,2.self_attn", "modeling_x.py:200"),
        ("model.layers.1,3.self_attn", "modeling_x.py:200"),
        ("", "model.py:3"),
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_says_everything(width: int) -> None:
    missed = [
        SiteReport(f"model.layers.{n}.mlp (modeling_x.py:9)", "missed", "the softmax runs over queries") for n in (0, 1)
    ]
    text = shown(Report("NVIDIA H200", (*layers(*range(12)), *missed)), width)
    assert max(map(len, text.splitlines())) <= width
    for part in (
        "model.layers.0-11.self_attn  x12", "modeling_x.py:200", "softmax(qk*0.125; causal)", "fwd_0123456789ab",
        "64x64 w4 s2", "0.500 ms", "2 GB -> 10 MB", "error 1.0e-03", "of 6.0e-03", "model.layers.0-1.mlp  x2",
        "the softmax runs over queries",
    ):  # fmt: skip
        assert part in text, part
    flat = " ".join(text.split())
    assert "12 of 14 sites replaced by 1 kernel. Predicted for NVIDIA H200: 6 ms" in flat
    assert "HBM traffic 24 GB -> 120 MB, 200x less." in flat


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (33_554_432, "33.6 MB"), (10**12, "1 TB")]
)
def test_sizes_have_three_digits(count: int, text: str) -> None:
    assert show.size(count) == text


# --------------------------------------------------------------------------------------------------------------- small


def test_problems_for_the_interpreter_keep_whole_groups_of_heads() -> None:
    query = torch.randn(3, 12, 200, 32)
    keys, values = torch.randn(3, 3, 200, 32), torch.randn(3, 3, 200, 32)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    from attngen import capture

    with torch.no_grad():
        _, (use,) = capture.generate(model, (query, keys, values), {}, {})
    reduced = trial.small(use.kernel.spec, use.problem, Tile(64, 32, 4, 2))
    assert reduced == Problem((2, 8), 81, 81)
    samples = verify.sample_inputs(use.kernel.spec, reduced)
    assert [tuple(sample.shape) for sample in samples] == [(2, 8, 81, 32), (2, 2, 81, 32), (2, 2, 81, 32)]


# ---------------------------------------------------------------------------------------------------------- everything


def test_help_says_what_a_file_names_that_it_runs_and_how_it_ends() -> None:
    for command in ("optimize", "explain"):
        text = " ".join(run(command, "--help").stdout.split())
        assert "RUNS it" in text and "example_inputs" in text and "get_model()" in text
        assert "7 a kernel failed verification" in text
    assert attngen.__version__ in run("--version").stdout


def test_help_loads_nothing_heavy() -> None:
    code = "import sys\nfrom attngen.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'triton', 'sympy', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_info_lists_versions_and_every_device() -> None:
    done = run("info")
    assert done.exit_code == 0 and torch.__version__ in done.stdout and attngen.__version__ in done.stdout
    for device in DEVICES.values():
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{device.name} "))
        assert device.label in line and line.rstrip().endswith("calibrated" if device.calibrated else "datasheet")
