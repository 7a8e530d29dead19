"""The models whose attention is counted, by source: each built small with random weights, and inputs on which it runs."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import coverage_diffusers
import torch
from torch import nn

Example = tuple[nn.Module, dict[str, Any]]
SOURCES = ("transformers", "timm", "diffusers", "x-transformers")


def names(source: str) -> list[str]:
    if source == "transformers":
        import coverage_transformers

        return coverage_transformers.names()
    return {"timm": list(TIMM), "x-transformers": list(X_TRANSFORMERS), "diffusers": coverage_diffusers.names()}[source]


def build(source: str, name: str, attention: str) -> Example:
    """The model in eval mode and keyword inputs. ``attention``: "eager" spells it out, "sdpa" is PyTorch's own call."""
    if source == "transformers":
        import coverage_transformers

        return coverage_transformers.build(name, attention)
    torch.manual_seed(0)
    return {"timm": _timm, "x-transformers": _x_transformers, "diffusers": coverage_diffusers.build}[source](name, attention)


# ------------------------------------------------------------------------------------------------------------------ timm

# One model or more of each file that computes attention; the smallest that shows each way of computing it.
TIMM = (
    "aimv2_1b_patch14_224", "bat_resnext26ts", "beit3_base_patch16_224", "beit_base_patch16_224",
    "beitv2_base_patch16_224", "botnet26t_256", "caformer_s18", "cait_xxs24_224", "coat_lite_tiny", "coat_tiny",
    "coatnet_0_rw_224", "coatnet_nano_rw_224", "coatnet_rmlp_nano_rw_224", "convit_tiny", "cpubone_nano",
    "crossvit_9_240", "crossvit_9_dagger_240", "csatv2", "davit_tiny", "deepseek_vit_412m",
    "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224", "eca_halonext26ts", "edgenext_xx_small",
    "efficientformer_l1", "efficientformerv2_s0", "efficientvim_m1", "efficientvit_b0", "efficientvit_l1",
    "efficientvit_m0", "eva02_tiny_patch14_224", "eva_large_patch14_196", "fastvit_ma36", "fastvit_sa12",
    "flexivit_small", "gcresnet33ts", "gcvit_xxtiny", "gemma4_vit_167m", "halo2botnet50ts_256", "hieradet_small",
    "hiera_small_abswin_256", "hiera_tiny_224", "iformer_t", "lambda_resnet26t", "lambda_resnet26rpt_256",
    "levit_128s", "levit_conv_128s", "lowformer_b0", "maxvit_nano_rw_256", "maxvit_rmlp_pico_rw_256",
    "maxxvitv2_nano_rw_256", "mobilenetv4_hybrid_medium", "mobilenetv5_300m", "mobilevit_xxs", "mobilevitv2_050",
    "mvitv2_small_cls", "mvitv2_tiny", "naflexvit_base_patch16_gap", "naflexvit_base_patch16_map", "nest_tiny",
    "nextvit_small", "pit_ti_224", "pvt_v2_b0", "pvt_v2_b2_li", "qwen3_vit_88m", "resnest14d", "resnet50_clip",
    "sam2_hiera_tiny", "samvit_base_patch16_224", "shvit_s1", "skresnet18", "swiftformer_xs", "swin_s3_tiny_224",
    "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_cr_tiny_ns_224", "swinv2_tiny_window8_256",
    "test_vit", "test_vit2", "test_vit3", "test_vit4", "test_vit_relpos", "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224", "tnt_s_patch16_224", "twins_pcpvt_small", "twins_svt_small", "visformer_tiny",
    "vit_base_patch16_rope_mixed_224", "vit_base_patch16_xp_224", "vit_pe_core_tiny_patch16_384",
    "vit_relpos_medium_patch16_cls_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_ape_224",
    "vit_small_r26_s32_224", "vit_so150m_patch16_reg4_map_256", "vit_srelpos_small_patch16_224",
    "vit_tiny_patch16_224", "vit_wee_patch16_reg1_gap_256", "vitamin_small_224", "volo_d1_224",
    "xcit_nano_12_p16_224",
)  # fmt: skip


def _timm(name: str, attention: str) -> Example:
    with _stand_in_for("torchvision"):
        import timm
        from timm.layers import set_fused_attn

    set_fused_attn(attention == "sdpa")
    model: Any = None
    for fewer in ({"depth": 2}, {}):
        try:
            model = timm.create_model(name, pretrained=False, **fewer)
            break
        except (TypeError, IndexError, AssertionError, ValueError, RuntimeError):
            if not fewer:
                raise
    size = model.default_cfg["input_size"]
    return model.eval(), {"x": torch.randn(2, *size)}


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (nn.Module,), {})


class _Finder:
    """Finds every module of one missing package, and gives whatever name is asked of it a class."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        mine = name.split(".")[0] == self.package
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mine else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def _stand_in_for(package: str) -> Iterator[None]:
    """timm imports torchvision for its data sets and transforms; its models do not need it."""
    if importlib.util.find_spec(package) is not None:
        yield
        return
    finder: Any = _Finder(package)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]


# -------------------------------------------------------------------------------------------------------- x-transformers

Flags = dict[str, Any]
X_TRANSFORMERS: dict[str, Flags] = {
    "decoder": {},
    "encoder": {"encoder": True},
    "encoder masked": {"encoder": True, "masked": True},
    "decoder masked": {"masked": True},
    "cross attention": {"cross_attend": True},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "t5 relative bias": {"rel_pos_bias": True},
    "dynamic bias": {"dynamic_pos_bias": True},
    "dynamic bias log": {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": True},
    "rotary": {"rotary_pos_emb": True},
    "rotary xpos": {"rotary_xpos": True},
    "polar": {"polar_pos_emb": True},
    "one kv head": {"attn_one_kv_head": True},
    "grouped kv heads": {"attn_kv_heads": 2},
    "memory keys": {"attn_num_mem_kv": 4},
    "zero key": {"attn_add_zero_kv": True},
    "learned sink": {"attn_head_learned_sink": True},
    "qk norm": {"attn_qk_norm": True},
    "qk norm learned": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "qk rmsnorm": {"attn_qk_rmsnorm": True},
    "softclamp": {"attn_softclamp_logits": True},
    "talking heads before": {"attn_pre_talking_heads": True},
    "talking heads after": {"attn_post_talking_heads": True},
    "talking heads both": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "talking heads scaled": {"attn_pre_scale_post_talking_heads": True},
    "sparse top-k": {"attn_sparse_topk": 4},
    "l2 distance": {"attn_l2_distance": True},
    "sigmoid": {"attn_sigmoid": True},
    "signed": {"attn_cog_signed": True},
    "selective": {"attn_selective": True},
    "hard": {"attn_hard": True},
    "inverted": {"attn_inverted_attention": True, "encoder": True},
    "window of the past": {"attn_max_attend_past": 4},
    "data-dependent alibi": {"attn_data_dependent_alibi": True},
    "data-dependent alibi per row": {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_per_row": True},
    "relative projected": {"attn_use_rel_proj_pos_bias": True},
    "contextual positions": {"attn_use_cope": True},
    "contextual positions talking": {"attn_use_cope": True, "attn_cope_talking_heads": True},
    "head scale": {"attn_head_scale": True},
    "gated values": {"attn_gate_values": True},
    "values of another size": {"attn_value_dim_head": 24},
    "latent queries and keys": {
        "attn_use_latent_q": True, "attn_dim_latent_q": 32, "attn_use_latent_kv": True, "attn_dim_latent_kv": 32,
    },
    "laser": {"attn_laser": True},
    "orthogonal values": {"attn_orthog_projected_values": True},
    "residual attention": {"residual_attn": True},
    "macaron": {"macaron": True},
    "value residual": {"add_value_residual": True},
    "prefix decoder": {"prefix": True},
    "memory tokens": {"num_memory_tokens": 3},
    "attention pool": {"encoder": True, "attn_pool": True},
    "onnxable": {"attn_onnxable": True},
}  # fmt: skip


def _x_transformers(name: str, attention: str) -> Example:
    import x_transformers as xt

    flags = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16, "attn_flash": attention == "sdpa"} | X_TRANSFORMERS[name]
    encoder, masked, prefix = (flags.pop(key, False) for key in ("encoder", "masked", "prefix"))
    outer = {key: flags.pop(key) for key in ("num_memory_tokens", "attn_pool") if key in flags}
    layers = (xt.Encoder if encoder else xt.PrefixDecoder if prefix else xt.Decoder)(**flags, verbose=False)
    model = xt.TransformerWrapper(num_tokens=96, max_seq_len=32, attn_layers=layers, **outer)
    inputs: dict[str, Any] = {"x": torch.randint(0, 96, (2, 12))}
    if masked:
        inputs["mask"] = torch.arange(12).expand(2, 12) < torch.tensor([[12], [9]])
    if flags.get("cross_attend"):
        inputs["context"] = torch.randn(2, 9, 64)
    if prefix:
        inputs["prefix_attn_len"] = torch.tensor([4, 6])
    return model.eval(), inputs
