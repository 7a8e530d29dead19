"""What explain says of real models, as a person reads it: the formula of each kind of site, and what is loaded into it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
import zoo
from zoo import Example, token_ids

from attngen import capture
from attngen.report import SiteReport

_COMMON = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def _pixels(size: int, channels: int = 3) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, channels, size, size)}


def swin() -> Example:
    sizes = {"embed_dim": 24, "depths": [2], "num_heads": [2], "window_size": 4}
    return hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=2, attn_implementation="eager", **sizes)), _pixels(32)


def xlnet() -> Example:
    config = hf.XLNetConfig(vocab_size=96, d_model=64, n_layer=1, n_head=4, d_inner=96)
    return hf.XLNetModel(config), {"input_ids": token_ids()}


def deberta() -> Example:
    more = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "max_position_embeddings": 64}
    return hf.DebertaV2Model(hf.DebertaV2Config(**_COMMON, num_hidden_layers=1, **more)), {"input_ids": token_ids()}


def longformer() -> Example:
    config = hf.LongformerConfig(**_COMMON, num_hidden_layers=1, attention_window=8)
    return hf.LongformerModel(config), {"input_ids": token_ids(24)}


def mobilevit() -> Example:
    config = hf.MobileViTConfig(image_size=64, hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 80])
    return hf.MobileViTModel(config), _pixels(64)


MODELS: dict[str, Callable[[], Example]] = {
    "gpt2": lambda: zoo.gpt2("eager"),
    "bert": lambda: zoo.bert("sdpa"),
    "gemma2": lambda: zoo.gemma2("eager"),
    "gpt_oss": lambda: zoo.gpt_oss("eager"),
    "t5": lambda: zoo.t5("eager"),
    **{function.__name__: function for function in (swin, xlnet, deberta, longformer, mobilevit)},
}
# Each line once, in the order of the sites: the formula, and what is loaded.
READ = {
    "gpt2": ["softmax(qk*0.25; causal)"],
    "bert": ["softmax(qk*0.25; padding)", "attention_mask"],
    "gemma2": ["softmax(tanh(qk*0.0625/50)*50; causal & window(4))", "softmax(tanh(qk*0.0625/50)*50; causal)"],
    "gpt_oss": [
        "softmax(qk*0.25; causal & window(4); sinks t0[h])", "layers.0.self_attn.sinks",
        "softmax(qk*0.25; causal; sinks t0[h])", "layers.1.self_attn.sinks",
    ],
    "t5": [
        "softmax(qk + t0[h, j - i]; padding)",
        "a table of encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "attention_mask",
        "softmax(qk + t0[h, j - i]; causal)",
        "a table of decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "softmax(qk; padding)",
    ],
    "swin": [
        "softmax(qk*0.288675 + t0[16*i + j, h])",
        "relative_position_bias = self.relative_position_bias_table[self.relative_position_index]",
        "softmax(qk*0.288675 + t0[b, h, i, j])", "combined_mask = relative_position_bias + attention_mask",
    ],
    "xlnet": [
        "softmax((qk + t0[b, h, i, j])*0.25)", 'bd = torch.einsum("ibnd,jbnd->bnij", q_head + self.r_r_bias, k_head_r)',
    ],
    "deberta": ["softmax(qk*0.144338 + t0[4*b + h, i, j])", "score += p2c_att / scale.to(dtype=p2c_att.dtype)"],
    "longformer": ["softmax(qk; window(±4) & padding; zero where t1[b, i])", "attention_mask", "is_index_masked"],
    "mobilevit": ["softmax(qk/2.82843)", "softmax(qk/3.4641)", "there is only one key"],
}  # fmt: skip


def lines(site: SiteReport) -> list[str]:
    """Its formula without sizes, and what it loads without the lines' numbers; or why it is left."""
    if site.status == "missed":
        return [site.reason]
    return [site.computes.split("), ")[0] + ")", *(load.split("  ")[-1] for load in site.loads.values())]


@pytest.mark.parametrize("name", MODELS)
def test_what_a_person_reads(name: str) -> None:
    """Of ten models, from plain causal attention to bands, sinks, tables and a second product."""
    model, inputs = MODELS[name]()
    report = capture.explain(model.eval(), (), inputs, {}, may_run=True)
    assert list(dict.fromkeys(line for site in report.sites for line in lines(site))) == READ[name]
    assert all("attn" in site.module or "ttention" in site.module for site in report.sites)
    count = len(report.sites)
    assert str(report).startswith(f"{len(report.replaced)} of {count} site{'s' * (count > 1)} can be replaced, for ")
