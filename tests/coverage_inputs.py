"""Inputs for a model of transformers, made from the names of its parameters and of its configuration's fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, WIDTH = 2, 12, 64


@dataclass
class Sizes:
    """What inputs are made of: the configuration and those in it, and how many placeholders stand for which features."""

    config: Any
    length: int = LENGTH
    placeholders: int = 1

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first of the fields that the configuration or one inside it has."""
        for config in nested(self.config):
            for key in keys:
                value = getattr(config, key, None)
                if value is not None:
                    return value
        return default


def nested(config: Any) -> list[Any]:
    inner = [v for k, v in vars(config).items() if hasattr(v, "to_dict") and not k.startswith("_")]
    return [config, *(deep for each in inner for deep in nested(each))]


def running_inputs(module: nn.Module, config: Any, *, optional: bool) -> dict[str, Any]:
    """Inputs on which the module runs; placeholder tokens are counted as its complaint asks."""
    sizes = Sizes(config, length=64 if "bird" in config.model_type or config.model_type == "led" else LENGTH)
    for _ in range(3):
        inputs = example_inputs(module, sizes, optional=optional)
        try:
            with torch.no_grad():
                module(**inputs)
            return inputs
        except Exception as problem:
            asked = re.search(r"features:? (?:torch.Size\(\[)?(\d+)", str(problem))
            tokens = re.search(r"tokens: (\d+)", str(problem))
            if asked is None or tokens is None or int(asked[1]) == int(tokens[1]):
                raise
            sizes.placeholders = max(1, int(asked[1]) // BATCH)
            sizes.length = LENGTH + sizes.placeholders
    raise ValueError("the number of placeholder tokens could not be found")


def example_inputs(module: nn.Module, sizes: Sizes, *, optional: bool) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters
    torch.manual_seed(1)
    main = module.main_input_name
    mains = set(main if isinstance(main, (list, tuple)) else [main])
    inputs: dict[str, Any] = {}
    for key, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL,
        )  # fmt: skip
        wanted = required or key in mains or key in _ALWAYS or (optional and key in _OPTIONAL)
        if key in ("pixel_values", "hidden_states") and {"grid_thw", "image_grid_thw"} & set(parameters):
            inputs[key] = _patches(sizes)
        elif key == "pixel_values" and "spatial_shapes" in parameters:
            inputs[key] = _patches(sizes).unflatten(0, (BATCH, 16))
        elif wanted and (make := _INPUTS.get(key)) is not None and (value := make(sizes)) is not None:
            inputs[key] = value
    if "query_embeds" in inputs:
        inputs.pop("attention_mask", None)
    if "input_features" in inputs and "input_ids" not in inputs and "attention_mask" in inputs:
        inputs["attention_mask"] = _padding(sizes, inputs["input_features"].shape[1])
    if "attention_mask" in inputs and "input_values" in inputs and inputs["input_values"].dim() == 2:
        samples = inputs["input_values"].shape[1]
        inputs["attention_mask"] = _padding(sizes, samples, samples // 4)
    return inputs


def _tokens(sizes: Sizes, length: int | None = None) -> Tensor:
    """Random tokens with, in each row, the placeholders of images or sound where the model has such."""
    length = length or sizes.length
    tokens = torch.randint(5, 90, (BATCH, length))
    key = _placeholder(sizes)
    if isinstance(key, int) and length > sizes.placeholders:
        tokens[:, 1 : 1 + sizes.placeholders] = key
    return tokens


def _placeholder(sizes: Sizes) -> Any:
    return sizes.get("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "video_token_id")


def _padding(sizes: Sizes, length: int | None = None, padded: int = 3) -> Tensor:
    mask = torch.ones(BATCH, length or sizes.length, dtype=torch.long)
    mask[1, -padded:] = 0
    return mask


def _pixels(sizes: Sizes, *lead: int) -> Tensor:
    """Images; several at a time for models of video."""
    if not lead and sizes.config.model_type in _VIDEO:
        lead = (sizes.get("num_frames", "frames_per_clip", default=2),)
    size = sizes.get("image_size", "input_size", "img_size", default=64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = sizes.get("num_channels", "in_channels", "in_chans", default=3)
    return torch.randn(BATCH, *lead, channels, height, width)


def _features(sizes: Sizes) -> Tensor:
    """A spectrogram, [batch, mel bins, frames] where the encoder has a fixed number of positions."""
    bins = sizes.get("num_mel_bins", "feature_size", "input_feat_per_channel", "feat_in", "n_mels", default=80)
    positions = sizes.get("max_source_positions")
    if positions is not None and sizes.config.model_type not in ("speech_to_text",):
        return torch.randn(BATCH, bins, 2 * positions)
    if sizes.config.model_type.startswith("clap"):
        return torch.randn(BATCH, 1, 64, bins)
    return torch.randn(BATCH, 64, bins)


def _sound(sizes: Sizes) -> Tensor:
    """Samples, or a spectrogram for models that look at one as an image."""
    if sizes.config.model_type == "audio-spectrogram-transformer":
        return torch.randn(BATCH, sizes.get("max_length"), sizes.get("num_mel_bins"))
    if sizes.config.model_type == "speecht5":
        return torch.randn(BATCH, sizes.length, WIDTH)
    return torch.randn(BATCH, *([1] if sizes.config.model_type in _CODECS else []), 3840)


def _width(sizes: Sizes) -> int:
    return int(sizes.get("hidden_size", "d_model", "embed_dim", default=WIDTH))


def _states(sizes: Sizes, length: int | None = None) -> Tensor:
    return torch.randn(BATCH, length or sizes.length, _width(sizes))


def _series(sizes: Sizes) -> Tensor:
    return torch.randn(BATCH, sizes.get("context_length", default=32), sizes.get("num_input_channels", default=1))


def _grid(sizes: Sizes) -> Tensor:
    """Frames, rows and columns of patches of each image."""
    return torch.tensor([[1, 4, 4]] * BATCH)


def _patches(sizes: Sizes) -> Tensor:
    """The patches of all images, flat."""
    patch, frames = sizes.get("patch_size", default=14), sizes.get("temporal_patch_size", default=1)
    channels = sizes.get("in_channels", "in_chans", "num_channels", default=3)
    return torch.randn(BATCH * 16, channels * frames * patch**2)


def _ones(dtype: torch.dtype, *shape: int) -> Callable[[Sizes], Tensor]:
    return lambda sizes: torch.ones(BATCH, *shape, dtype=dtype)


_INPUTS: dict[str, Callable[[Sizes], Any]] = {
    "input_ids": _tokens,
    "attention_mask": _padding,
    "decoder_input_ids": partial(_tokens, length=7),
    "decoder_attention_mask": partial(_padding, length=7),
    "token_type_ids": lambda sizes: torch.zeros(BATCH, sizes.length, dtype=torch.long),
    "inputs_embeds": _states,
    "hidden_states": _states,
    "encoder_hidden_states": partial(_states, length=9),
    "bbox": lambda sizes: torch.tensor([1, 2, 5, 9]).expand(BATCH, sizes.length, 4).clone(),
    "pixel_values": _pixels,
    "pixel_values_videos": lambda sizes: _pixels(sizes, sizes.get("num_frames", "frames_per_clip", default=4)),
    "input_features": _features,
    "input_values": _sound,
    "spectrogram": lambda sizes: torch.randn(BATCH, 20, sizes.get("model_in_dim", "num_mel_bins", default=80)),
    "past_values": _series,
    "query_embeds": lambda sizes: torch.randn(BATCH, 4, _width(sizes)),
    "input_boxes": lambda sizes: torch.tensor([[[2.0, 2.0, 20.0, 20.0]]]).repeat(BATCH, 1, 1),
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "mm_token_type_ids": lambda sizes: (_tokens(sizes) == _placeholder(sizes)).long(),
    "image": _pixels,
    "spatial_shapes": lambda sizes: torch.tensor([[4, 4]] * BATCH),
    "pixel_attention_mask": lambda sizes: torch.ones(BATCH, 16, dtype=torch.long),
    "past_values_padding": lambda sizes: torch.zeros_like(_series(sizes)),
    "freq": lambda sizes: torch.zeros(BATCH, 1, dtype=torch.long),
    "num_patches": lambda sizes: 16,
    "flattened_patches": lambda sizes: torch.rand(BATCH, 12, 2 + 3 * sizes.get("patch_size", default=16) ** 2),
    "is_longer": _ones(torch.bool, 1),
    "input_features_mask": lambda sizes: torch.ones(BATCH, _features(sizes).shape[-1], dtype=torch.long),
    "pixel_mask": lambda sizes: torch.ones(BATCH, *_pixels(sizes).shape[-2:], dtype=torch.long),
    "task_inputs": lambda sizes: torch.zeros(BATCH, sizes.get("task_seq_len", default=77), dtype=torch.long),
    "aspect_ratio_ids": lambda sizes: torch.ones(BATCH, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda sizes: torch.ones(BATCH, 1, sizes.get("max_num_tiles", default=4), dtype=torch.long),
    "image_sizes": lambda sizes: torch.tensor([_pixels(sizes).shape[-2:]] * BATCH),
    "states": lambda sizes: torch.randn(BATCH, 6, sizes.get("state_dim", default=17)),
    "actions": lambda sizes: torch.randn(BATCH, 6, sizes.get("act_dim", default=4)),
    "rewards": lambda sizes: torch.randn(BATCH, 6, 1),
    "returns_to_go": lambda sizes: torch.randn(BATCH, 6, 1),
    "timesteps": lambda sizes: torch.arange(6).expand(BATCH, 6),
    "xpath_tags_seq": lambda sizes: torch.zeros(BATCH, sizes.length, sizes.get("max_depth", default=50), dtype=torch.long),
    "xpath_subs_seq": lambda sizes: torch.zeros(BATCH, sizes.length, sizes.get("max_depth", default=50), dtype=torch.long),
    "visual_feats": lambda sizes: torch.randn(BATCH, 5, sizes.get("visual_feat_dim", default=2048)),
    "visual_pos": lambda sizes: torch.rand(BATCH, 5, 4),
    "prompt_pixel_values": _pixels,
    "prompt_masks": _pixels,
    "padding_mask": lambda sizes: torch.ones(BATCH, 3840, dtype=torch.long),
    "image_embeddings": lambda sizes: torch.randn(BATCH, _width(sizes), 4, 4),
    "langs": lambda sizes: torch.zeros(BATCH, sizes.length, dtype=torch.long),
}
_VIDEO = ("xclip", "videomae", "vivit", "timesformer", "vjepa2", "efficientloftr", "superglue", "lightglue")
_CODECS = ("mimi", "encodec", "dac", "xcodec", "xcodec2", "higgs_audio_v2_tokenizer", "vibevoice_acoustic_tokenizer")
_ALWAYS = frozenset(
    ["input_ids", "decoder_input_ids", "bbox", "task_inputs", "states", "actions", "returns_to_go", "timesteps"]
)
_OPTIONAL = frozenset({
    "attention_mask", "decoder_attention_mask", "token_type_ids", "pixel_values", "image_grid_thw",
    "mm_token_type_ids", "input_features", "input_features_mask", "is_longer", "aspect_ratio_ids",
    "aspect_ratio_mask", "visual_feats", "visual_pos", "input_boxes", "encoder_hidden_states",
})  # fmt: skip
