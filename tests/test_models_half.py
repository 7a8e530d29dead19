"""Every model of the zoo in half precision: all of its attention replaced, with no more error than eager makes.

A model's largest error is one draw from the few thousand values that rounding put there, and later layers enlarge it; its
root mean square is steady. Both must stay within twice eager's and one rounding of the result.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import attngen
from attngen.verify import within_budget

HALF = (torch.float16, torch.bfloat16)
EAGER: dict[str, Any] = {"inner": "eager", "strict": True}
BY_NAME = {row.name: row for row in zoo.ROWS}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def in_dtype(example: zoo.Example, dtype: torch.dtype, device: str = "cpu") -> zoo.Example:
    """The model and its inputs with floating-point values in ``dtype``."""
    model, inputs = example
    moved = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}
    return model.to(device, dtype), moved


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def exact(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's result in float64 on the CPU, from the same (rounded) weights and inputs.

    In float32 where float64 is impossible: grouped products know no float64, and sums of two of its lowest numbers,
    which are masks in Hugging Face's models, are infinite there.
    """
    try:
        result = _computed_in(torch.float64, model, inputs)
    except RuntimeError:
        return _computed_in(torch.float32, model, inputs)
    single = _computed_in(torch.float32, model, inputs)
    return result if torch.equal(result.isnan(), single.isnan()) else single


def _computed_in(dtype: torch.dtype, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    wide, inputs = in_dtype((copy.deepcopy(model), inputs), dtype)
    with torch.no_grad():
        return first(wide(**inputs))


def cases() -> list[Any]:
    """Families take turns in their spellings (``test_detect_dynamic`` has the other turns), plain modules in their types."""
    families = [case.values for case in zoo.spread(zoo.MASKS, *HALF, first=1)]
    pairs = [(f"{name}_{how}", dtype) for name, how, dtype in families]
    plain = [name for name in BY_NAME if not name.endswith(("_eager", "_sdpa"))]
    pairs += [(name, HALF[place % 2]) for place, name in enumerate(plain)]
    return [pytest.param(name, dtype, id=f"{name}-{short(dtype)}") for name, dtype in pairs]


@pytest.mark.parametrize(("name", "dtype"), cases())
def test_error_is_within_budget(name: str, dtype: torch.dtype) -> None:
    model, inputs = in_dtype(BY_NAME[name].build(), dtype)
    with torch.no_grad(), attngen.record() as reports:
        eager = first(model(**inputs))
        ours = first(torch.compile(model, backend="attngen", options=EAGER)(**inputs))
    assert sum(len(report.replaced) for report in reports) == len(BY_NAME[name].sites)
    assert ours.dtype == eager.dtype
    verdict = within_budget(ours, exact(model, inputs).double(), eager)
    assert verdict.ok, verdict


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, HALF[place % 2])
        for place, name in enumerate(["llama_eager", "bert_sdpa", "gemma2_eager", "gpt_oss_eager", "whisper_eager"])
    ],
)
def test_the_budget_notices_a_wrong_scale(name: str, dtype: torch.dtype) -> None:
    """What the models make of rounding is small beside what a scale wrong by a quarter makes of them."""
    model, inputs = in_dtype(BY_NAME[name].build(), dtype)
    skewed = copy.deepcopy(model)
    scaled: list[Any] = [m for m in skewed.modules() if hasattr(m, "scaling")]
    for module in scaled:
        module.scaling *= 1.25
    with torch.no_grad():
        verdict = within_budget(first(skewed(**inputs)), exact(model, inputs).double(), first(model(**inputs)))
    assert scaled and not verdict.ok
