"""Small models with real structure, one function per family or spelling: a module in eval mode and its inputs.

Weights are random; sizes are the smallest that keep what matters apart (heads from groups, lengths from widths).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

Example = tuple[nn.Module, dict[str, Any]]
Build = Callable[[], Example]
LENGTH = 12


def token_ids(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(length))


def _left_padded(length: int = LENGTH) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :3] = 0
    return mask


def _right_padded(length: int = LENGTH) -> Tensor:
    return _left_padded(length).flip(-1)


def _model(kind: str, config: Any, how: str) -> nn.Module:
    torch.manual_seed(0)
    config._attn_implementation = how
    model: nn.Module = getattr(hf, kind)(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # the usual 0.02 leaves every softmax nearly uniform, whatever its scores
            nn.init.normal_(parameter, std=0.25)
    return model.eval()


# ------------------------------------------------------------------------------------------- Hugging Face, by family

_COMMON: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def gpt2(how: str, *, padded: bool = False) -> Example:
    config = hf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, use_cache=False)
    inputs = {"input_ids": token_ids()}
    return _model("GPT2Model", config, how), inputs | ({"attention_mask": _left_padded()} if padded else {})


def bert(how: str) -> Example:
    config = hf.BertConfig(**_COMMON, num_hidden_layers=2, max_position_embeddings=64)
    return _model("BertModel", config, how), {"input_ids": token_ids(), "attention_mask": _right_padded()}


def llama(how: str, *, padded: bool = False) -> Example:
    config = hf.LlamaConfig(**_COMMON, num_hidden_layers=2, num_key_value_heads=2, use_cache=False)
    inputs = {"input_ids": token_ids()}
    return _model("LlamaModel", config, how), inputs | ({"attention_mask": _left_padded()} if padded else {})


def mistral(how: str) -> Example:
    config = hf.MistralConfig(
        **_COMMON, num_hidden_layers=2, num_key_value_heads=2, sliding_window=4, use_cache=False
    )  # fmt: skip
    return _model("MistralModel", config, how), {"input_ids": token_ids()}


def gemma2(how: str) -> Example:
    config = hf.Gemma2Config(
        **_COMMON, num_hidden_layers=2, num_key_value_heads=2, head_dim=256, sliding_window=4, use_cache=False
    )  # fmt: skip
    return _model("Gemma2Model", config, how), {"input_ids": token_ids()}


def bloom(how: str, *, padded: bool = False) -> Example:
    config = hf.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4, use_cache=False)
    inputs = {"input_ids": token_ids()}
    return _model("BloomModel", config, how), inputs | ({"attention_mask": _left_padded()} if padded else {})


def mpt(how: str) -> Example:
    config = hf.MptConfig(vocab_size=96, d_model=64, n_layers=2, n_heads=4, max_seq_len=64, use_cache=False)
    return _model("MptModel", config, how), {"input_ids": token_ids()}


def _t5_config() -> Any:
    return hf.T5Config(
        vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_decoder_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=10, use_cache=False,
    )  # fmt: skip


def t5_encoder(how: str) -> Example:
    return _model("T5EncoderModel", _t5_config(), how), {"input_ids": token_ids(), "attention_mask": _right_padded()}


def t5(how: str) -> Example:
    inputs = {"input_ids": token_ids(), "attention_mask": _right_padded(), "decoder_input_ids": token_ids(7)}
    return _model("T5Model", _t5_config(), how), inputs


def vit(how: str) -> Example:
    config = hf.ViTConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, image_size=16, patch_size=4
    )  # fmt: skip
    return _model("ViTModel", config, how), {"pixel_values": torch.randn(2, 3, 16, 16)}


def whisper(how: str) -> Example:
    config = hf.WhisperConfig(
        vocab_size=96, num_mel_bins=8, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=10,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        use_cache=False,
    )  # fmt: skip
    return _model("WhisperModel", config, how), {
        "input_features": torch.randn(2, 8, 20),
        "decoder_input_ids": token_ids(7),
    }


def gpt_oss(how: str) -> Example:
    config = hf.GptOssConfig(
        **_COMMON, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, sliding_window=4, num_local_experts=2,
        num_experts_per_tok=1, use_cache=False,
    )  # fmt: skip
    return _model("GptOssModel", config, how), {"input_ids": token_ids()}


# ------------------------------------------------------------------------------------------------- plain torch modules


class NanoGPT(nn.Module):
    """The textbook block: one projection for q, k and v, a registered triangle, masked_fill, softmax."""

    bias: Tensor

    def __init__(self, width: int = 32, heads: int = 4, longest: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(longest, longest)).view(1, 1, longest, longest))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y = torch.softmax(att, dim=-1) @ v
        out: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return out


def nanogpt() -> Example:
    torch.manual_seed(0)
    return NanoGPT().eval(), {"x": torch.randn(2, LENGTH, 32)}


class Attend(nn.Module):
    """``nn.MultiheadAttention`` of a sequence on itself, used for its output only."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.weights = options.pop("need_weights", False)
        self.mha = nn.MultiheadAttention(32, 4, **options)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        out: Tensor = self.mha(x, x, x, need_weights=self.weights, **masks)[0]
        return out


def mha(masks: str = "", **options: Any) -> Example:
    torch.manual_seed(0)
    shape = (2, LENGTH, 32) if options.get("batch_first") else (LENGTH, 2, 32)
    inputs = {"x": torch.randn(shape)}
    if "padding" in masks:
        inputs["key_padding_mask"] = _right_padded() == 0
    if "bool" in masks:
        inputs["attn_mask"] = torch.rand(LENGTH, LENGTH) > 0.8
        inputs["attn_mask"].fill_diagonal_(False)
    if "float" in masks:
        inputs["attn_mask"] = torch.randn(LENGTH, LENGTH)
    return Attend(**options).eval(), inputs


class Library(nn.Module):
    """``F.scaled_dot_product_attention`` with fixed options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, **self.options)


def library(mask: str = "", heads: int = 4, **options: Any) -> Example:
    """Four query heads on ``heads`` key heads, 12 queries, 9 keys, values of another width."""
    torch.manual_seed(0)
    inputs = {"q": torch.randn(2, 4, 12, 16), "k": torch.randn(2, heads, 9, 16), "v": torch.randn(2, heads, 9, 24)}
    if mask == "bool":
        inputs["mask"] = torch.rand(2, 1, 12, 9) > 0.3
        inputs["mask"][0, 0, 5] = False  # a row without any key
    if mask == "additive":
        inputs["mask"] = torch.randn(4, 12, 9)
    return Library(**options).eval(), inputs


# --------------------------------------------------------------------------------------------------- what must be found


@dataclass(frozen=True)
class Expected:
    """One site: its mask by name (None: loaded per pair), its score, and what the keys are read at beside (j, d)."""

    mask: str | None
    score: str = "qk*0.25"
    keys: str = "b, h"
    sinks: int = 0
    tables: int = 0


@dataclass(frozen=True)
class Row:
    name: str
    build: Build
    sites: tuple[Expected, ...]

    def __str__(self) -> str:
        return self.name


_GROUPED = "b, (h//2), 0"
_SOFTCAP = "tanh(qk*0.0625/50)*50"
_BUCKETS: dict[str, Any] = {"score": "qk + t0[h, j + size_i - 1 - i]", "tables": 1}
_T5_LAYER = (Expected("causal", **_BUCKETS), Expected("padding", "qk"))
_CAUSAL, _WINDOW = Expected("causal", keys=_GROUPED), Expected("causal & window(4)", keys=_GROUPED)

_FAMILIES: dict[str, tuple[Callable[[str], Example], tuple[Expected, ...]]] = {
    "gpt2": (gpt2, (Expected("causal"),) * 2),
    "gpt2_padded": (partial(gpt2, padded=True), (Expected("causal & padding"),) * 2),
    "bert": (bert, (Expected("padding"),) * 2),
    "llama": (llama, (_CAUSAL,) * 2),
    "llama_padded": (partial(llama, padded=True), (Expected("causal & padding", keys=_GROUPED),) * 2),
    "mistral": (mistral, (_WINDOW,) * 2),
    "t5_encoder": (t5_encoder, (Expected("padding", **_BUCKETS),)),
    "t5": (t5, (Expected("padding", **_BUCKETS), *_T5_LAYER, *_T5_LAYER)),
    "vit": (vit, (Expected(""),) * 2),
    "whisper": (whisper, (Expected("", "qk"), Expected("causal", "qk"), Expected("", "qk"))),
}
_EAGER_ONLY: dict[str, tuple[Callable[[str], Example], tuple[Expected, ...]]] = {
    "gemma2": (
        gemma2,
        (Expected("causal & window(4)", _SOFTCAP, _GROUPED), Expected("causal", _SOFTCAP, _GROUPED)),
    ),
    "bloom": (bloom, (Expected("causal", "t0[h]*j + qk*0.25"),) * 2),
    "bloom_padded": (
        partial(bloom, padded=True),
        (Expected("causal & padding", "t0[h]*(t1[b, j] - 1)*t2[b, j] + qk*0.25"),) * 2,
    ),
    "mpt": (mpt, (Expected("causal", "qk*0.25 + (j - 11)*t0[h]"),) * 2),
    "gpt_oss": (
        gpt_oss,
        (Expected("causal & window(4)", keys=_GROUPED, sinks=1), Expected("causal", keys=_GROUPED, sinks=1)),
    ),
}

_EIGHTH = "qk*0.353553"  # heads of 8
_MHA: dict[str, tuple[dict[str, Any], Expected]] = {
    "mha": ({}, Expected("", _EIGHTH)),
    "mha_batch_first": ({"batch_first": True}, Expected("", _EIGHTH)),
    "mha_padding": ({"masks": "padding"}, Expected("padding", _EIGHTH)),
    "mha_mask": ({"masks": "bool", "batch_first": True}, Expected(None, _EIGHTH)),
    "mha_bias": ({"masks": "float"}, Expected("", f"{_EIGHTH} + t0[i, j]")),
    "mha_both": ({"masks": "padding bool", "batch_first": True}, Expected(None, _EIGHTH)),
    "mha_weights": ({"need_weights": True}, Expected("", _EIGHTH, "b")),
    "mha_weights_padding": ({"need_weights": True, "masks": "padding"}, Expected("padding", _EIGHTH, "b")),
    "mha_extra_keys": ({"add_bias_kv": True, "add_zero_attn": True}, Expected("", _EIGHTH)),
}
_LIBRARY: dict[str, tuple[dict[str, Any], Expected]] = {
    "sdpa": ({}, Expected("")),
    "sdpa_causal": ({"is_causal": True}, Expected("causal")),
    "sdpa_scale": ({"scale": 0.3}, Expected("", "qk*0.3")),
    "sdpa_mask": ({"mask": "bool"}, Expected(None)),
    "sdpa_bias": ({"mask": "additive"}, Expected("", "qk*0.25 + t0[h, i, j]")),
    "sdpa_gqa": ({"heads": 2, "enable_gqa": True, "is_causal": True}, Expected("causal", keys="b, (h//2)")),
    "sdpa_mqa": ({"heads": 1, "enable_gqa": True}, Expected("", keys="b, 0")),
}

ROWS: list[Row] = [
    *(
        Row(f"{name}_{how}", partial(f, how), sites)
        for name, (f, sites) in _FAMILIES.items()
        for how in ("eager", "sdpa")
    ),
    *(Row(f"{name}_eager", partial(f, "eager"), sites) for name, (f, sites) in _EAGER_ONLY.items()),
    Row("nanogpt", nanogpt, (Expected(None, _EIGHTH),)),
    *(Row(name, partial(mha, **options), (site,)) for name, (options, site) in _MHA.items()),
    *(Row(name, partial(library, **options), (site,)) for name, (options, site) in _LIBRARY.items()),
]

MASKS = {name: [site.mask for site in sites] for name, (_, sites) in {**_FAMILIES, **_EAGER_ONLY}.items()}
HOWS = {name: ("eager", "sdpa") if name in _FAMILIES else ("eager",) for name in MASKS}


def spread(names: Iterable[str], *values: Any, first: int = 0) -> list[Any]:
    """Every family with each of two ``values``, one in each of its spellings; the two take turns from family to family.

    Spellings and such values do not interact. Another ``first`` gives what this leaves out of their product.
    """
    given = []
    for name in names:
        place = [*MASKS].index(name) + first
        hows = HOWS[name] if len(HOWS[name]) == len(values) else HOWS[name] * len(values)
        given += [(name, how, values[(n + place) % len(values)]) for n, how in enumerate(hows)]
    return [pytest.param(*each, id="-".join(map(_short, each))) for each in given]


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")


def build(name: str, how: str) -> Example:
    return {**_FAMILIES, **_EAGER_ONLY}[name][0](how)
