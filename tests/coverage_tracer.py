"""Count attention in a model by running it: an observer of every operator that shares no code with attngen.

A site is a normaliser whose input comes from a contraction and whose output reaches another, both ways through operators
that work element by element or only move elements. Each tensor carries marks of where it came from; nothing is proved, so
this finds too much rather than too little.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from coverage_marks import NOTHING, Chain, Factor, Marked, Marks, covers, extent, factor_of, joined, longer, union
from coverage_uses import Uses
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

CONTRACTIONS = {
    "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "linear": (0, 1), "matmul": (0, 1), "_grouped_mm": (0, 1),
    "addmm": (1, 2), "baddbmm": (1, 2), "addbmm": (1, 2), "addmv": (1, 2), "_addmm_activation": (1, 2),
}  # fmt: skip
WHOLE = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
)  # fmt: skip
# They rearrange, copy, cast or drop elements.
MOVES = frozenset({
    "view", "_unsafe_view", "reshape", "_reshape_alias", "view_as_real", "view_as_complex", "permute", "transpose",
    "t", "numpy_T", "movedim", "expand", "repeat", "slice", "select", "narrow", "diagonal", "unfold", "as_strided",
    "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind", "chunk", "cat", "stack",
    "constant_pad_nd", "unsqueeze", "squeeze", "alias", "lift_fresh", "detach", "clone", "contiguous", "copy",
    "copy_", "_to_copy", "flip", "roll", "slice_scatter", "select_scatter", "tril", "triu", "dropout",
    "native_dropout",
})  # fmt: skip
# Element by element, though not all of their overloads are tagged so.
UNTAGGED = frozenset(["masked_fill", "where", "rsub", "add", "mul", "div", "sub", "log_sigmoid_forward"])
# They also choose elements by position: part of a score, but weights that went through them no longer sum to one.
GATHERS = frozenset(["gather", "index", "index_select", "take_along_dim", "embedding", "index_put", "index_put_"])
SOFTMAX = frozenset(["_softmax", "_safe_softmax", "softmax", "_masked_softmax"])
LOG_SOFTMAX = frozenset(["_log_softmax", "log_softmax"])
SUMS = frozenset(["sum", "nansum", "cumsum", "mean"])


@dataclass(frozen=True)
class Traced:
    """One site. ``kind`` is the normaliser: softmax, log_softmax, exp, sigmoid or sdpa.

    ``learned``: the scores are a product with weights, not of two activations. ``path`` and ``line``: of the product with
    the values. ``scores`` and ``weights``: the operators before and after the normaliser. ``dead``: nothing that the model
    returns or decides by is made of it.
    """

    kind: str
    path: str
    line: str
    learned: bool = False
    scores: Chain = ()
    weights: Chain = ()
    dead: bool = False


@dataclass
class _Normaliser:
    kind: str
    learned: bool
    scores: Chain
    traced: Traced | None = None


class Tracer(TorchDispatchMode):
    """``with Tracer(model) as tracer: model(...)``, then ``tracer.sites``, in the order in which they were finished."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self._paths = {id(module): name for name, module in model.named_modules()} if model is not None else {}
        self._marks: Any = WeakTensorKeyDictionary()
        self._memory: dict[int, Marks] = {}
        self._alive: list[Tensor] = []
        self._modules: list[nn.Module] = []
        self._learned: dict[int, bool] = {}
        self._normalisers: list[_Normaliser] = []
        self.sites: list[Traced] = []
        self.uses = Uses()
        for tensor in model.parameters() if model is not None else ():
            self._marks[tensor] = Marks(learned=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        known = len(self.sites)
        self._observe(name, func, args, kwargs or {}, result)
        self.uses.add(list(_tensors((args, kwargs or {}))), list(_tensors(result)), range(known, len(self.sites)))
        return result

    # ------------------------------------------------------------------------------------------------------- operators

    def _observe(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        outputs = [r for r in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(r, Tensor)]
        if not outputs:
            return
        inputs = [t for t in _tensors((args, kwargs)) if t.is_floating_point() or t.is_complex()]
        marks = [self._of(t) for t in inputs]
        made = self._made(name, func, args, inputs, marks, outputs[0])
        for output in outputs:
            self._set(output, made, in_place=any(output is t for t in inputs))

    def _made(self, name: str, func: Any, args: Any, inputs: list[Tensor], marks: list[Marks], output: Tensor) -> Marks:
        plain = name.rstrip("_")
        if name in WHOLE:
            return self._whole(name)
        if name in CONTRACTIONS:
            return self._contraction(name, [self._of(args[k]) for k in CONTRACTIONS[name]])
        if name in SOFTMAX or name in LOG_SOFTMAX:
            return self._softmax(name, marks[0])
        if name == "logsumexp":
            return Marks(logsums=frozenset(marks[0].scores))
        if plain in SUMS:
            return self._summed(plain, args, inputs[0], marks[0], output) if marks else NOTHING
        if plain in ("exp", "exp2"):
            return self._exponential(plain, marks[0])
        if plain == "sigmoid":
            return self._sigmoid(marks[0])
        if torch.Tag.pointwise in func.tags or plain in MOVES | UNTAGGED | GATHERS:
            return self._through(name, plain, inputs, marks, output)
        return NOTHING

    def _whole(self, name: str) -> Marks:
        self.sites.append(Traced("sdpa", self._path(), _line(), scores=(name,)))
        return self._fresh(name, learned=False)

    def _contraction(self, name: str, operands: list[Marks]) -> Marks:
        for operand in operands:
            self._finish(operand.weights)
        late = {e: chain for operand in operands for e, chain in operand.exps.items()}
        return replace(self._fresh(name, learned=any(operand.learned for operand in operands)), late=late)

    def _fresh(self, name: str, *, learned: bool) -> Marks:
        number = len(self._learned)
        self._learned[number] = learned
        return Marks(scores={number: (name,)})

    def _softmax(self, name: str, source: Marks) -> Marks:
        if not source.scores:
            return NOTHING
        kind = "softmax" if name in SOFTMAX else "log_softmax"
        made = self._normalised(kind, source.scores)
        return Marks(weights=made) if kind == "softmax" else Marks(logs=made)

    def _normalised(self, kind: str, scores: Marked) -> Marked:
        """A new normaliser over ``scores``; of several products, one of activations counts."""
        number = len(self._normalisers)
        chain = max(scores.items(), key=lambda item: (not self._learned[item[0]], item[0]))[1]
        self._normalisers.append(_Normaliser(kind, all(self._learned[c] for c in scores), chain))
        return {number: ()}

    def _exponential(self, name: str, source: Marks) -> Marks:
        if source.logs:
            return Marks(weights=source.logs)
        shared = {c: chain for c, chain in source.scores.items() if c in source.logsums}
        if shared:
            return Marks(weights=self._normalised("exp", shared))
        if not source.scores:
            return NOTHING
        return Marks(exps=self._normalised("exp", longer(source.scores, name)))

    def _sigmoid(self, source: Marks) -> Marks:
        """Scored by activations alone: gates are sigmoids of a product with weights."""
        scores = {c: chain for c, chain in source.scores.items() if not self._learned[c]}
        return Marks(weights=self._normalised("sigmoid", scores)) if scores else NOTHING

    def _summed(self, name: str, args: Any, source: Tensor, marks: Marks, output: Tensor) -> Marks:
        if name == "sum" and marks.product is not None:
            dims = args[1] if len(args) > 1 else None
            made = self._multiplied_and_summed(source, marks.product, dims)
            if made is not None:
                return made
        return Marks(totals=frozenset(marks.exps), logsums=marks.logsums)

    def _multiplied_and_summed(self, source: Tensor, factors: tuple[Factor, Factor], dims: Any) -> Marks | None:
        """A product summed over one dimension is a contraction if some factor lacks another dimension of it."""
        summed = {d % source.dim() for d in (dims if isinstance(dims, (tuple, list)) else [dims]) if d is not None}
        kept = [d for d in range(source.dim()) if d not in summed and source.shape[d] > 1]
        lacking = [any(extent(f, d, source) == 1 for d in kept) for f in factors]
        if len(summed) != 1 or not any(lacking):
            return None
        for factor, lacks in zip(factors, lacking, strict=True):
            if lacks:
                self._finish(factor.marks.weights)
        return self._fresh("mul-sum", learned=any(f.marks.learned for f in factors))

    def _through(self, name: str, plain: str, inputs: list[Tensor], marks: list[Marks], output: Tensor) -> Marks:
        if plain in ("copy", "fill", "zero"):  # what was there is gone
            inputs, marks = inputs[1:], marks[1:]
        if plain in ("div", "mul", "true_divide") and len(marks) == 2:
            divided = self._divided(plain, marks)
            if divided is not None:
                return divided
        moved = plain in MOVES
        product = marks[0].product if moved and len(marks) == 1 else None
        if plain == "mul" and len(inputs) == 2 and output.dim() > 1:
            product = (factor_of(inputs[0], marks[0], output), factor_of(inputs[1], marks[1], output))
        full = [m for t, m in zip(inputs, marks, strict=True) if plain not in GATHERS and covers(t, output, moved)]
        return Marks(
            scores=joined([m.scores for m in marks], name),
            exps=joined([m.exps for m in marks], name),
            totals=frozenset().union(*(m.totals for m in marks)) if plain != "exp" else frozenset(),
            logsums=frozenset().union(*(m.logsums for m in marks)),
            logs=joined([m.logs for m in marks], name),
            weights=joined([m.weights for m in full], name),
            late=joined([m.late for m in full], name),
            product=product,
            learned=bool(marks) and all(m.learned for m in marks),
        )

    def _divided(self, name: str, marks: list[Marks]) -> Marks | None:
        """An exponential over its own sum, before or after the product with the values."""
        over, under = marks if name != "mul" or not marks[0].totals else marks[::-1]
        self._finish({e: chain for e, chain in over.late.items() if e in under.totals})
        own = {e: chain for e, chain in over.exps.items() if e in under.totals}
        return Marks(weights=longer(own, name)) if own else None

    # --------------------------------------------------------------------------------------------------------- records

    def _finish(self, weights: Marked) -> None:
        for number, chain in weights.items():
            normaliser = self._normalisers[number]
            if normaliser.traced is None:
                normaliser.traced = Traced(
                    normaliser.kind, self._path(), _line(), normaliser.learned, normaliser.scores, chain
                )
                self.sites.append(normaliser.traced)

    def _of(self, value: Any) -> Marks:
        if not isinstance(value, Tensor):
            return NOTHING
        own: Marks = self._marks.get(value, NOTHING)
        below = self._memory.get(_storage(value)) if self._memory else None
        return own if below is None else union(own, below)

    def _set(self, output: Tensor, made: Marks, *, in_place: bool) -> None:
        self._marks[output] = made
        if not in_place:
            return
        key = _storage(output)
        whole = output.numel() * output.element_size() == output.untyped_storage().nbytes()
        below = self._memory.get(key)
        self._memory[key] = made if whole or below is None else union(below, made)
        self._alive.append(output)

    def _path(self) -> str:
        known = [self._paths[id(m)] for m in self._modules if id(m) in self._paths]
        return known[-1] if known else ""

    def __enter__(self) -> Tracer:
        module = nn.modules.module
        self._hooks = (
            module.register_module_forward_pre_hook(lambda m, _: self._modules.append(m)),
            module.register_module_forward_hook(self._leave, always_call=True),
        )
        super().__enter__()
        return self

    def _leave(self, module: nn.Module, *_: Any) -> None:
        while self._modules and self._modules.pop() is not module:
            pass

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        for hook in self._hooks:
            hook.remove()


def trace(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Traced]:
    """The sites of one call of ``model``."""
    with Tracer(model if isinstance(model, nn.Module) else None) as tracer:
        result = model(*args, **kwargs)
    kept = [*model.buffers(), result] if isinstance(model, nn.Module) else result
    used = tracer.uses.of(list(_held(kept)))
    return [replace(site, dead=number not in used) for number, site in enumerate(tracer.sites)]


# ------------------------------------------------------------------------------------------------------------- helpers


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _held(value: Any, seen: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """The tensors in a result, also in objects such as caches."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen |= {id(value)}
        inner = list(vars(value).values()) if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) else []
        inner += list(value.values()) if isinstance(value, dict) else []
        inner += list(value) if isinstance(value, (tuple, list)) else []
        for part in inner:
            yield from _held(part, seen)


_LIBRARY = (torch.__path__[0], __file__, "<")


def _line() -> str:
    """``modeling_llama.py:197``: the innermost line outside torch."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """``nn.MultiheadAttention`` spells its attention out."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
