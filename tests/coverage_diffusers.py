"""Models of diffusers, with the attention processors that spell attention out, or those that call PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, dict[str, Any]]
CHANNELS, TEXT = 32, 32


def names() -> list[str]:
    return sorted(ROWS)


def build(name: str, attention: str) -> Example:
    """In "sdpa" the processors are the model's own."""
    import diffusers
    from diffusers.models import attention_processor as processors

    kind, processor, sizes, inputs = ROWS[name]
    model: Any = getattr(diffusers, kind)(**sizes)
    if attention == "eager":
        made = getattr(processors, processor or "AttnProcessor")
        for module in model.modules():
            if isinstance(module, processors.Attention):
                module.set_processor(made(2) if processor == "SlicedAttnProcessor" else made())
    return model.eval(), inputs()


def _image(size: int = 16, channels: int = 4, frames: int = 0) -> Tensor:
    return torch.randn(2, channels, *([frames] if frames else []), size, size)


def _text(width: int = TEXT, length: int = 7) -> Tensor:
    return torch.randn(2, length, width)


def _conditioned(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"sample": _image(), "timestep": torch.tensor([3, 5]), "encoder_hidden_states": _text()} | more


def _padded_text() -> Tensor:
    return (torch.arange(7).expand(2, 7) < torch.tensor([[7], [4]])).long()


_UNET: dict[str, Any] = {
    "block_out_channels": (CHANNELS, 2 * CHANNELS), "layers_per_block": 1, "cross_attention_dim": TEXT, "sample_size": 16,
    "attention_head_dim": 8, "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
_SIMPLE: dict[str, Any] = _UNET | {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}
_TRANSFORMER: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16}
_VAE: dict[str, Any] = {
    "block_out_channels": (CHANNELS, 2 * CHANNELS), "norm_num_groups": 8, "sample_size": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip

Row = tuple[str, str, dict[str, Any], Callable[[], dict[str, Any]]]
ROWS: dict[str, Row] = {
    "unet": ("UNet2DConditionModel", "", _UNET, _conditioned()),
    "unet padded text": ("UNet2DConditionModel", "", _UNET, _conditioned(encoder_attention_mask=_padded_text())),
    "unet linear projection": ("UNet2DConditionModel", "", _UNET | {"use_linear_projection": True}, _conditioned()),
    "unet self attention only": ("UNet2DConditionModel", "", _UNET | {"only_cross_attention": True}, _conditioned()),
    "unet fp32 attention": ("UNet2DConditionModel", "", _UNET | {"upcast_attention": True}, _conditioned()),
    "unet sliced": ("UNet2DConditionModel", "SlicedAttnProcessor", _UNET, _conditioned()),
    "unet added keys": ("UNet2DConditionModel", "AttnAddedKVProcessor", _SIMPLE, _conditioned()),
    "unet unconditional": (
        "UNet2DModel", "", {
            "block_out_channels": (CHANNELS, 2 * CHANNELS), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
        lambda: {"sample": _image(channels=3), "timestep": torch.tensor([3, 5])},
    ),
    "unet video": (
        "UNet3DConditionModel", "", _UNET | {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda: _conditioned()() | {"sample": _image(frames=4)},
    ),
    "controlnet": (
        "ControlNetModel", "", {key: _UNET[key] for key in _UNET if key not in ("up_block_types", "sample_size")} | {
            "conditioning_embedding_out_channels": (8, 16),
        },
        lambda: _conditioned()() | {"controlnet_cond": _image(32, 3)},
    ),
    "autoencoder": ("AutoencoderKL", "", _VAE, lambda: {"sample": _image(32, 3)}),
    "autoencoder asymmetric": (
        "AsymmetricAutoencoderKL", "", {
            "down_block_types": ("DownEncoderBlock2D",), "down_block_out_channels": (CHANNELS,), "norm_num_groups": 8,
            "up_block_types": ("UpDecoderBlock2D",), "up_block_out_channels": (CHANNELS,),
        },
        lambda: {"sample": _image(32, 3)},
    ),
    "autoencoder video": (
        "AutoencoderKLTemporalDecoder", "", {
            "block_out_channels": (CHANNELS, 2 * CHANNELS), "down_block_types": ("DownEncoderBlock2D",) * 2,
        },
        lambda: {"sample": _image(32, 3), "num_frames": 2},
    ),
    "autoencoder discrete": ("VQModel", "", _VAE, lambda: {"sample": _image(32, 3)}),
    "transformer 2d": (
        "Transformer2DModel", "", _TRANSFORMER | {"in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": TEXT},
        lambda: {"hidden_states": _image(8, 32), "encoder_hidden_states": _text()},
    ),
    "dit": (
        "DiTTransformer2DModel", "", _TRANSFORMER | {"in_channels": 4, "patch_size": 4},
        lambda: {"hidden_states": _image(), "timestep": torch.tensor([3, 5]), "class_labels": torch.tensor([1, 2])},
    ),
    "pixart": (
        "PixArtTransformer2DModel", "", _TRANSFORMER | {
            "in_channels": 4, "patch_size": 4, "cross_attention_dim": 64, "caption_channels": TEXT,
            "use_additional_conditions": False,
        },
        lambda: {
            "hidden_states": _image(), "timestep": torch.tensor([3, 5]), "encoder_hidden_states": _text(),
            "encoder_attention_mask": _padded_text(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "latte": (
        "LatteTransformer3DModel", "", _TRANSFORMER | {
            "in_channels": 4, "out_channels": 8, "patch_size": 4, "cross_attention_dim": 64, "caption_channels": TEXT,
            "video_length": 4,
        },
        lambda: {"hidden_states": _image(frames=4), "timestep": torch.tensor([3, 5]), "encoder_hidden_states": _text()},
    ),
    "prior": (
        "PriorTransformer", "", {
            "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": TEXT, "num_embeddings": 7,
        },
        lambda: {
            "hidden_states": torch.randn(2, TEXT), "timestep": torch.tensor([3, 5]), "proj_embedding": torch.randn(2, TEXT),
            "encoder_hidden_states": _text(), "attention_mask": _padded_text().bool(),
        },
    ),
}  # fmt: skip
