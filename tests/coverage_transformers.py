"""Every model type of transformers, built small from its own configuration, with inputs made from its signature.

Sizes are set by the names of configuration fields, in every nested configuration alike, so that parts keep fitting together.
Where that fails, only depths and vocabularies are cut and the widths stay as published.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import transformers as hf
from coverage_inputs import nested, running_inputs
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

Example = tuple[nn.Module, dict[str, Any]]
VOCABULARY, WIDTH, HEADS, HEAD = 160, 64, 4, 16
LARGEST = 300_000_000


def names() -> list[str]:
    """Every model type of the installed release."""
    return sorted(configuration_auto.CONFIG_MAPPING_NAMES)


def build(name: str, attention: str) -> Example:
    """The model in eval mode and keyword inputs on which it runs. Raises the last problem if no attempt ran."""
    problem: Exception | None = None
    for shrink in (_all_small, _all_small_and_filled, _shallow):
        try:
            config = _config(name, shrink)
            module = _module(config, attention)
        except Exception as error:
            problem = problem or error
            continue
        for optional in (True, False):
            try:
                return module, running_inputs(module, config, optional=optional)
            except Exception as error:
                problem = problem or error
    assert problem is not None
    raise problem


# -------------------------------------------------------------------------------------------------------- configurations

Rule = tuple[str, Callable[[Any], Any]]


def _at_most(limit: int) -> Callable[[Any], Any]:
    def rule(old: Any) -> Any:
        return [rule(o) for o in old] if isinstance(old, (list, tuple)) else min(old, limit)

    return rule


def _fixed(value: int) -> Callable[[Any], Any]:
    return lambda old: old if isinstance(old, (list, tuple)) else value


_DEPTHS: tuple[Rule, ...] = (
    (r"(num_|n_)?(encoder_|decoder_|hidden_|mtp_|global_|local_)*(layers?|blocks)|num_hidden_layers|depths?", _at_most(2)),
    (r".*_(num_)?(hidden_)?layers|.*_depths?|num_.*_layers|num_.*_blocks|layers_.*", _at_most(2)),
    (r"first_k_dense_replace|num_nextn_predict_layers", _at_most(1)),
    (r"(.*_)?vocab_size(_.*)?", _at_most(VOCABULARY)),
    (r"(num|n)_(routed_|local_)?experts|moe_num_experts|num_moe_experts|n_expert", _at_most(4)),
    (r"num_experts_per_tok|(moe_)?top_?k|moe_topk|num_selected_experts|moe_k", _at_most(2)),
    (r"n_group|topk_group|num_expert_group(s)?", _at_most(1)),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_sequence_length)", _at_most(512)),
)
_SIZES: tuple[Rule, ...] = (
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|emb_dim|embedding_dim)", _fixed(WIDTH)),
    (r"(.*_)?(projection_dim|out_hidden_size|projector_hidden_size|project_dim|proj_dim|d_embed|output_dim)", _fixed(WIDTH)),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|feedforward_dim|mlp_dim|dim_feedforward)", _at_most(96)),
    (r"(.*_)?(num_(attention_)?heads|attention_heads|n_heads?|num_attention_heads_.*)", _fixed(HEADS)),
    (r"(.*_)?(head_dim|d_kv|d_head|attention_head_size|kv_channels|head_size|v_head_dim|qk_nope_head_dim)", _fixed(HEAD)),
    (r"qk_rope_head_dim|rotary_dim", _fixed(8)),
    (r"qk_head_dim", _fixed(24)),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", _fixed(32)),
    (r"index_n_heads", _fixed(HEADS)),
    (r"index_topk", _fixed(8)),
    (r"(sliding_window|attention_window_size|window_attn_.*|attention_chunk_size)", _at_most(8)),
    (r"max_source_positions", _at_most(20)),
    (r"max_length", _at_most(64)),
    (r"window_size", _at_most(4)),
    (r"decoder_in_channels", lambda old: [WIDTH] * len(old) if isinstance(old, (list, tuple)) else old),
)


# Heads of keys and values: two if several queries share one, else as many as there are queries.
_SHARED = r"(.*_)?(num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|num_query_groups)"
_OF_ALL = ("key_value_heads", "attention_heads")


def _config(name: str, shrink: Callable[[Any], None]) -> Any:
    kind = configuration_auto.CONFIG_MAPPING[name]
    try:
        config = kind()
    except ValueError:  # series have no length by default
        config = kind(prediction_length=8)
    shrink(config)
    _fit_features(config)
    return config


def _shallow(config: Any) -> None:
    """Raises ``ValueError`` for models that are large even so."""
    _shrunk(config, _DEPTHS)
    with torch.device("meta"):
        size = sum(p.numel() for p in _model_class(config)(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters with two layers")


def _all_small_and_filled(config: Any) -> None:
    """Also gives values to fields that have no default but are needed."""
    for each in nested(config):
        for key, value in _FILLED.items():
            if getattr(each, key, 0) is None:
                _assign(each, key, value)
    _all_small(config)


def _all_small(config: Any) -> None:
    _shrunk(config, (*_SIZES, *_DEPTHS))


_FILLED = {
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "prediction_length": 8,
    "first_k_dense_replace": 1, "vocab_size": VOCABULARY, "attn_layer_indices": [1], "head_dim": HEAD,
    "q_lora_rank": 32, "router_top_k": 2,
}  # fmt: skip


def _shrunk(config: Any, rules: tuple[Rule, ...]) -> None:
    """``config`` and all configurations in it, changed in place."""
    deep, kept = _depth(config), _needed_depth(config)
    fields = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    for key, value in fields.items():
        if getattr(value, "model_type", "") in ("timm_backbone", "timm_wrapper"):
            _assign(config, key, _small_resnet())
        elif hasattr(value, "to_dict"):
            _shrunk(value, rules)
        elif (new := _changed(key, value, rules, kept)) is not value:
            _assign(config, key, new)
    for key, value in fields.items():
        if re.fullmatch(_SHARED, key) and isinstance(value, int) and rules is not _DEPTHS:
            _assign(config, key, HEADS if value == fields.get(key.replace(*_OF_ALL)) else min(value, 2))
        if isinstance(value, (list, tuple)) and deep is not None and len(value) == deep > kept and "stage" not in key:
            _assign(config, key, value[:kept])
    if getattr(config, "languages", None) and not getattr(config, "default_language", "known"):
        _assign(config, "default_language", config.languages[0])
    if getattr(config, "num_kv_shared_layers", None):
        _assign(config, "num_kv_shared_layers", 0)
    _fit_stages(config)
    _fit_rope(config)
    _fit_image(config)
    _fit_tokens(config)


def _assign(config: Any, key: str, value: Any) -> None:
    """Past the validation of single fields: sizes fit again only when all are set."""
    object.__setattr__(config, key, value)


def _changed(key: str, value: Any, rules: tuple[Rule, ...], kept: int) -> Any:
    numbers = value if isinstance(value, (list, tuple)) and value else [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers):
        return value
    if key in ("num_hidden_layers", "n_layer", "num_layers") and isinstance(value, int):
        return min(value, kept)
    rule = next((change for pattern, change in rules if re.fullmatch(pattern, key)), None)
    if rule is None:
        return value
    return type(value)(rule(value)) if isinstance(value, tuple) else rule(value)


def _depth(config: Any) -> int | None:
    if isinstance(getattr(config, "depths", None), (list, tuple)):
        return None
    return next((n for k in ("num_hidden_layers", "n_layer", "num_layers") if (n := getattr(config, k, None))), None)


def _needed_depth(config: Any) -> int:
    """Two layers, or as many as it takes to see every kind of layer, up to eight."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not isinstance(kinds, (list, tuple)) or not kinds:
        return 2
    firsts = [list(kinds).index(kind) + 1 for kind in set(map(str, kinds)) if kind in kinds]
    return max(2, *(n for n in [*firsts, 2] if n <= 8))


def _small_resnet() -> Any:
    """In place of a backbone that needs timm, which in transformers needs torchvision."""
    return hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def _fit_stages(config: Any) -> None:
    """Heads double with the width from stage to stage."""
    heads = getattr(config, "num_heads", None)
    if isinstance(heads, (list, tuple)) and getattr(config, "embed_dim", None) == WIDTH:
        _assign(config, "num_heads", [2 << stage for stage in range(len(heads))])


def _fit_features(config: Any) -> None:
    """A backbone that should give what layers compute that were cut off gives what its last layer computes."""
    depth, names = getattr(config, "num_hidden_layers", None), getattr(config, "stage_names", None) or ()
    if isinstance(depth, int) and len(names) > depth + 1 and not set(config.out_features) & set(names[: depth + 1]):
        config.set_output_features_output_indices(out_features=[names[depth]], out_indices=[depth])


def _fit_rope(config: Any) -> None:
    """Sections of a rotary embedding add up to half of the head size."""
    ropes = [rope for key in ("rope_parameters", "rope_scaling") if isinstance(rope := getattr(config, key, None), dict)]
    for rope in [*ropes, *(r for each in ropes for r in each.values() if isinstance(r, dict))]:
        if isinstance(rope.get("mrope_section"), (list, tuple)) or config.model_type.startswith("glm"):
            half = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
            half = int(half * rope.get("partial_rotary_factor", 1))
            parts = len(rope.get("mrope_section", (1, 1, 1)))
            rope["mrope_section"] = [half - (parts - 1) * (half // parts), *([half // parts] * (parts - 1))]


def _fit_image(config: Any) -> None:
    """Four by four patches, or more pixels where stages shrink them further."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if size is None:
        return
    across = patch[0] if isinstance(patch, (list, tuple)) else patch
    staged = any(isinstance(getattr(config, key, None), (list, tuple)) for key in ("depths", "hidden_sizes", "embed_dims"))
    new = 128 if staged or not isinstance(across, int) else max(4 * across, 16)
    if isinstance(size, (list, tuple)) and all(isinstance(s, int) for s in size):
        _assign(config, "image_size", type(size)([min(new, s) for s in size]))
    elif isinstance(size, int):
        _assign(config, "image_size", min(new, size))


def _fit_tokens(config: Any) -> None:
    """Special tokens lie in the vocabulary, each at a place of its own."""
    place = VOCABULARY - 1
    for key, value in sorted(vars(config).items()):
        if re.fullmatch(r".*(_token_id|_token_index|_token_idx|_token)", key) and isinstance(value, int):
            if value >= VOCABULARY and not isinstance(value, bool):
                _assign(config, key, place)
                place -= 1
        elif re.fullmatch(r".*_token_ids?", key) and isinstance(value, (list, tuple)):
            _assign(config, key, [v % 100 for v in value if isinstance(v, int)])


# --------------------------------------------------------------------------------------------------------------- modules


def _module(config: Any, attention: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = _model_class(config)._from_config(config, attn_implementation=attention)
    return model.eval()


def _model_class(config: Any) -> Any:
    """What ``AutoModel`` would take, else the first model of the module that is made for this configuration."""
    with suppress(KeyError, ValueError):
        found = modeling_auto.MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    home = type(config).__module__.replace("configuration_", "modeling_")
    module = importlib.import_module(home)
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, hf.PreTrainedModel)]
    fitting = [c for c in classes if getattr(c, "config_class", None) is type(config) and c.__module__ == home]
    if not fitting:
        raise LookupError(f"no model class for {type(config).__name__}")
    return min(fitting, key=lambda c: (not hasattr(c, "forward"), c.__name__.endswith("PreTrainedModel"), len(c.__name__)))
