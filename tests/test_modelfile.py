"""A user's file names a model and inputs; what is missing or wrong in it is said with the line to write."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from attngen import modelfile
from attngen.errors import BadModelFile

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, x, y=None):
        return 2 * x if y is None else x + y
"""
GETTERS = """
def get_model():
    return Net()

def get_example_inputs():
    return torch.ones(3)
"""
MODEL = f"{NET}\nmodel = Net()\n"
INPUTS = "example_inputs = (torch.ones(3), torch.ones(3))\n"


def written(folder: Path, text: str, name: str = "model.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def result(path: Path) -> torch.Tensor:
    with modelfile.opened(path) as example:
        out: torch.Tensor = example.model(*example.args, **example.kwargs)
        return out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(f"{MODEL}example_inputs = torch.ones(3)", 2.0, id="one tensor"),
        pytest.param(f"{MODEL}{INPUTS}", 2.0, id="a tuple"),
        pytest.param(f"{MODEL}example_inputs = [torch.ones(3)]", 2.0, id="a list"),
        pytest.param(f"{MODEL}example_inputs = dict(x=torch.ones(3), y=torch.ones(3) * 4)", 5.0, id="keywords"),
        pytest.param(f"{NET}{GETTERS}", 2.0, id="getters"),
        pytest.param("import torch\ndef model(x): return 7 * x\nexample_inputs = torch.ones(3)", 7.0, id="a function"),
        pytest.param(f"{MODEL}model = torch.compile(model)\nexample_inputs = torch.ones(3)", 2.0, id="compiled"),
        pytest.param(
            f"{MODEL}from collections import UserDict\nexample_inputs = UserDict(x=torch.ones(3))", 2.0, id="mapping"
        ),
    ],
)
def test_what_a_file_may_name(tmp_path: Path, text: str, expected: float) -> None:
    assert torch.equal(result(written(tmp_path, text)), torch.full((3,), expected))


def test_compiled_models_are_unwrapped(tmp_path: Path) -> None:
    for ending in ("model = torch.compile(model)\n", "@torch.compile\ndef model(x, y): return x\n"):
        with modelfile.opened(written(tmp_path, f"{MODEL}{INPUTS}{ending}")) as example:
            assert not hasattr(example.model, "_orig_mod")
            assert not hasattr(example.model, "_torchdynamo_orig_callable")


def test_the_file_sees_its_folder_and_its_own_arguments(tmp_path: Path) -> None:
    written(tmp_path, "FACTOR = 3", "helper_beside_the_model.py")
    text = "import sys\nimport torch\nfrom helper_beside_the_model import FACTOR\nassert len(sys.argv) == 1\n"
    path = written(tmp_path, f"{text}def model(x): return FACTOR * x\nexample_inputs = torch.ones(3)")
    before = list(sys.path), sys.argv
    assert torch.equal(result(path), torch.full((3,), 3.0))
    assert (sys.path, sys.argv) == before


def test_what_stands_under_main_does_not_run(tmp_path: Path) -> None:
    path = written(tmp_path, f'{MODEL}{INPUTS}if __name__ == "__main__":\n    raise RuntimeError("ran")\n')
    assert result(path).shape == (3,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("model = (", ["fails to import", "model.py", "line 1", "SyntaxError"], id="syntax"),
        pytest.param(
            "import torch\nimport nowhere_at_all", ["line 2", "ModuleNotFoundError", "nowhere_at_all"], id="import"
        ),
        pytest.param(
            NET, ["names no model", "It defines Net", "model = Net().eval()", "get_model()"], id="a class only"
        ),
        pytest.param(f"{NET}\nnet = Net()", ["It has `net`", "    model = net\n"], id="under another name"),
        pytest.param("x = 1", ["names no model", "model = Net().eval()"], id="nothing"),
        pytest.param(f"{NET}\nmodel = Net", ["is the class Net", "    model = Net().eval()"], id="the class itself"),
        pytest.param("model = 3", ["is a int", "cannot be called"], id="a number"),
        pytest.param(
            MODEL, ["names no inputs", "example_inputs = (torch.", 'example_inputs = {"input_ids"'], id="no inputs"
        ),
        pytest.param(f"{MODEL}example_inputs = 'text'", ["has a str as `example_inputs`"], id="inputs of another kind"),
        pytest.param("import sys\nsys.exit(2)", ["ends the process (exit code 2)", "__main__"], id="exits"),
        pytest.param(
            "def get_model():\n    return 1 / 0",
            ["fails in get_model()", "line 2", "ZeroDivisionError"],
            id="getter raises",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(BadModelFile) as wrong, modelfile.opened(path):
        pass
    assert all(part in str(wrong.value) for part in said), str(wrong.value)
    assert str(path) in str(wrong.value)


def test_an_error_below_shows_the_line_of_the_user_and_the_line_that_raised(tmp_path: Path) -> None:
    written(tmp_path, "def deep():\n    raise KeyError('weights')\n", "helper_that_raises.py")
    path = written(tmp_path, "import helper_that_raises\n\nmodel = helper_that_raises.deep()\n")
    with pytest.raises(BadModelFile) as wrong, modelfile.opened(path):
        pass
    text = str(wrong.value)
    assert "line 3" in text and "helper_that_raises.py" in text and "KeyError: 'weights'" in text
    assert "importlib" not in text and "modelfile.py" not in text


@pytest.mark.parametrize(("name", "said"), [("absent.py", "does not exist"), ("", "is not a file")])
def test_no_such_file(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(BadModelFile, match=said), modelfile.opened(tmp_path / name):
        pass


def test_file_names_that_are_no_identifiers(tmp_path: Path) -> None:
    assert result(written(tmp_path, f"{MODEL}{INPUTS}", "my-model 2.txt")).shape == (3,)
