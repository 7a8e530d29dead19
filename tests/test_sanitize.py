"""What ``sanitize.py`` makes of the sanitizer's words, and that no golden kernel is left out."""

from __future__ import annotations

import inspect

import pytest
import sanitize
from conftest import GOLDEN

pytest.importorskip("triton")

WORDS = """========= COMPUTE-SANITIZER
== kernel causal 1
== kernel causal 77
========= Invalid __global__ write of size 4 bytes
=========     at attention_forward+0x80 in k.py:12
=========     Address 0x7f0 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x700 of size 240 bytes
========= Invalid __global__ read of size 2 bytes
=========     at attention_forward+0x20 in k.py:10
== kernel grouped 1
========= Error: Race reported between Read access at attention_forward+0x1f0 in k.py:123
=========     and Write access at attention_forward+0x2a0 in k.py:130 [16 hazards]
=========
========= Warning: Race reported between Write access at attention_forward+0x430 in k.py:46
=========     and Read access at attention_forward+0x770 in k.py:55 [248 hazards]
=========     and Write access at attention_forward+0x7a0 in k.py:57 [8 hazards]
=========
== kernel grouped 77
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
========= ERROR SUMMARY: 2 errors
"""


def test_findings_belong_to_the_launch_before_them() -> None:
    assert sanitize.findings(WORDS) == {
        "causal 77": ["Invalid __global__ write of size 4 bytes", "Invalid __global__ read of size 2 bytes"],
        "grouped 1": [
            "Error: Race reported between Read access at attention_forward+0x1f0 in k.py:123"
            " and Write access at attention_forward+0x2a0 in k.py:130 [16 hazards]",
            "Warning: Race reported between Write access at attention_forward+0x430 in k.py:46"
            " and Read access at attention_forward+0x770 in k.py:55 [248 hazards]"
            " and Write access at attention_forward+0x7a0 in k.py:57 [8 hazards]",
        ],
    }


def test_an_access_that_a_launch_cuts_from_its_race_is_not_lost() -> None:
    other = "and Write access at attention_forward+0x2a0 in k.py:130 [16 hazards]"
    assert sanitize.findings(f"== kernel shared 1\n=========     {other}\n") == {"shared 1": [other]}


def test_every_golden_kernel_is_among_them() -> None:
    names = {path.stem.replace("backward_kernel_", "kernel_backward_") for path in GOLDEN.glob("*kernel_*.txt")}
    assert {f"kernel_{name}" for name in sanitize.kernels()} == names | {"kernel_backward_hopper_causal"}


def test_launches_have_what_their_kernels_take() -> None:
    names = []
    for name, arguments, module in sanitize.launches("cpu"):
        names.append(name)
        inspect.signature(module.launch).bind(*arguments)
    assert len(names) == len(sanitize.ROWS) * len(sanitize.kernels())
