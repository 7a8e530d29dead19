"""Which attention is measured: records of numbers, and the registry of those that have a name.

The grid holds batch times length at 16k tokens and heads times head size at 2048.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from attngen.errors import BadOption

DTYPES = ("bfloat16", "float16", "float32")
TOKENS, WIDTH = 16384, 2048
SMALL_LENGTH = 192  # of problems that are run on a CPU to try the command


@dataclass(frozen=True)
class Problem:
    """One attention call. Positions of queries end where those of keys end, as with a cache.

    ``kv_heads``, ``key_length`` and ``value_size`` are as many as heads, queries and features unless given. ``window`` keeps
    pairs less than that far apart; ``prefix`` is visible to all and the rest causal; ``documents`` is how many are packed
    in a sequence; ``buckets`` of relative distance, as in T5; ``dropout`` is the share of weights that are set to zero, at
    random, in each call. ``views``: operands are stored ``[B, N, H, D]``. ``trained``:
    where gradients are measured, those of a bias, buckets, slopes and sinks are among them.
    """

    name: str
    batch: int = 4
    heads: int = 16
    kv_heads: int | None = None
    length: int = 4096
    key_length: int | None = None
    head_size: int = 128
    value_size: int | None = None
    dtype: str = "bfloat16"
    causal: bool = False
    window: int | None = None
    prefix: int | None = None
    documents: int | None = None
    alibi: bool = False
    softcap: float | None = None
    bias: bool = False
    buckets: int | None = None
    sinks: bool = False
    sigmoid: bool = False
    dropout: float | None = None
    views: bool = False
    trained: bool = False

    @property
    def sources(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def keys(self) -> int:
        """How many there are."""
        return self.length if self.key_length is None else self.key_length

    @property
    def width(self) -> int:
        """Features of a value."""
        return self.head_size if self.value_size is None else self.value_size

    @property
    def offset(self) -> int:
        """The position of the first query."""
        return self.keys - self.length

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.sources == self.heads else f"{self.heads}/{self.sources}"
        features = f"{self.head_size}" if self.width == self.head_size else f"{self.head_size}/{self.width}"
        sizes = f"{self.batch}x{heads} heads, {self.length} x {self.keys}, d={features}, {self.dtype}"
        return ", ".join([sizes, *described(self)])

    def checked(self) -> Problem:
        """Itself. Raises ``BadOption`` where its numbers contradict each other."""
        for problem in _contradictions(self):
            raise BadOption(f"{self.name}: {problem}")
        return self


# What is done to the scores, or to the weights, from the field that asks for it.
FEATURES = ("causal", "window", "prefix", "documents", "alibi", "softcap", "bias", "buckets", "sinks", "sigmoid", "dropout")
LEARNT = ("alibi", "bias", "buckets", "sinks")  # those that load numbers which a model may train


def described(problem: Problem) -> list[str]:
    """Every feature in few words: ``causal``, ``window 512``."""
    asked = {name: getattr(problem, name) for name in (*FEATURES, "views", "trained") if getattr(problem, name)}
    return [name if value is True else f"{name} {value}" for name, value in asked.items()]


def _contradictions(p: Problem) -> list[str]:
    sizes = (p.batch, p.heads, p.sources, p.length, p.keys, p.head_size, p.width)
    given = [number for number in (p.window, p.prefix, p.documents, p.softcap, p.buckets) if number is not None]
    past = p.causal or p.window is not None or p.prefix is not None
    wrong = {
        "every number must be positive": min(*sizes, *given) <= 0,
        f"{p.heads} heads cannot share {p.sources} heads of keys evenly": p.heads % max(p.sources, 1) != 0,
        f'unknown dtype "{p.dtype}". Known: {", ".join(DTYPES)}': p.dtype not in DTYPES,
        "rows without any key: a mask of positions needs at least as many keys as queries": past and p.keys < p.length,
        "documents need as many keys as queries": bool(p.documents) and p.keys != p.length,
        "there are more documents than positions": (p.documents or 0) > p.length,
        "buckets come in fours: near and far, before and after": (p.buckets or 0) % 4 != 0,
        "causal leaves nothing for a prefix to add": p.causal and p.prefix is not None,
        "sinks belong to a softmax, not to a sigmoid": p.sinks and p.sigmoid,
        "dropout is a share of weights, more than none and less than all": p.dropout is not None and not 0 < p.dropout < 1,
        f"trained needs something to train: {', '.join(LEARNT)}": p.trained and not any(getattr(p, x) for x in LEARNT),
    }
    return [text for text, holds in wrong.items() if holds]


# ------------------------------------------------------------------------------------------------------------- registry


def _grid() -> list[Problem]:
    return [
        Problem(
            f"dense_d{size}_n{length}_{'causal' if causal else 'full'}",
            batch=TOKENS // length,
            heads=WIDTH // size,
            length=length,
            head_size=size,
            causal=causal,
        )
        for size in (64, 128, 256)
        for length in (1024, 4096, 16384)
        for causal in (False, True)
    ]


# Softcaps in models are around 50; this one is small against the scores of random inputs, so that leaving it out would show.
_VARIANTS: dict[str, dict[str, Any]] = {
    "alibi": {"causal": True, "alibi": True},
    "softcap": {"causal": True, "softcap": 5.0},
    "window": {"causal": True, "window": 512},
    "document": {"documents": 8},
    "document_causal": {"documents": 8, "causal": True},
    "bias": {"bias": True},
    "bias_trained": {"bias": True, "trained": True},
    "relative": {"buckets": 32},
    "relative_trained": {"buckets": 32, "trained": True},
    "prefix": {"prefix": 1024},
    "sinks": {"causal": True, "window": 128, "sinks": True},
    "sigmoid": {"sigmoid": True},
    "dropout": {"dropout": 0.1},
}


def _variants(size: int) -> list[Problem]:
    return [Problem(f"{name}_d{size}", head_size=size, **fields) for name, fields in _VARIANTS.items()]


DEFAULT = "dense_d128_n4096_causal"
PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        *_grid(),
        *_variants(128),
        *_variants(64),
        Problem("gqa", heads=32, kv_heads=8, causal=True),
        Problem("mla", head_size=192, value_size=128, causal=True),
        Problem("ragged", length=4000),
        Problem("ragged_causal", length=4000, causal=True),
        Problem("views", causal=True, views=True),
        Problem("cross", length=1024, key_length=16384),
        Problem("long", batch=1, length=131072, causal=True),
    )
}


def selected(patterns: Sequence[str]) -> list[Problem]:
    """The problems whose name matches a pattern, in the order of the registry. Raises ``BadOption`` for one without any."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in PROBLEMS):
            near = ", ".join(get_close_matches(pattern, PROBLEMS, n=3)) or "--list names all"
            raise BadOption(f'no problem is called "{pattern}". Perhaps: {near}.')
    return [p for name, p in PROBLEMS.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]


def changed(problem: Problem, flags: dict[str, Any]) -> Problem:
    """``problem`` with other numbers, and a name that says which. Raises ``BadOption`` where they contradict each other."""
    given = {name: value for name, value in flags.items() if value is not None and value != getattr(problem, name)}
    if not given:
        return problem.checked()
    name = f"{problem.name}[{','.join(f'{name}={value}' for name, value in given.items())}]"
    return replace(problem, **{**given, "name": name}).checked()


def small(problem: Problem) -> Problem:
    """The same attention at sizes that a CPU computes in milliseconds."""
    shrink = max(problem.length, problem.keys) / SMALL_LENGTH

    def shorter(length: int | None) -> int | None:
        return None if length is None else max(1, int(length / shrink))

    heads = 4
    return replace(
        problem,
        batch=min(problem.batch, 2),
        heads=heads,
        kv_heads=max(1, heads * problem.sources // problem.heads) if problem.kv_heads else None,
        length=shorter(problem.length) or 1,
        key_length=shorter(problem.key_length),
        window=shorter(problem.window),
        prefix=shorter(problem.prefix),
        documents=min(problem.documents, 3) if problem.documents else None,
    )
