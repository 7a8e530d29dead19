"""The models that are measured: built from configs with random weights, at sizes of models that people use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 1000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Size:
    """Of a model and of what it is called with; ``keys`` is the number of heads that keys have, where it is another."""

    batch: int
    length: int
    layers: int
    width: int
    heads: int
    keys: int = 0

    @property
    def small(self) -> Size:
        """Just enough to see that everything works."""
        keys = 2 if self.keys else 0
        return replace(self, batch=2, length=64, layers=1, width=128, heads=4, keys=keys)


@dataclass(frozen=True)
class Case:
    """A model and what to call it with; ``build`` is given the size and the probability of dropout."""

    name: str
    build: Callable[[Size, float], nn.Module]
    size: Size
    dropout: float = 0.0
    padded: bool = False
    sdpa: bool = True  # whether it has such a spelling
    exact: str = "sdpa"  # the spelling of the float32 reference: one that computes the same and needs little memory

    def model(self) -> nn.Module:
        return self.build(self.size, self.dropout).to(DEVICE, torch.bfloat16)

    def inputs(self) -> dict[str, Tensor]:
        """Random tokens; sequences of between half and the whole length if they are padded."""
        batch, length = self.size.batch, self.size.length
        tokens = {"input_ids": torch.randint(0, VOCABULARY, (batch, length), device=DEVICE)}
        if not self.padded:
            return tokens
        lengths = torch.linspace(length // 2, length, batch, device=DEVICE).long()
        return {**tokens, "attention_mask": (torch.arange(length, device=DEVICE) < lengths[:, None]).long()}


def llama(size: Size, dropout: float) -> nn.Module:
    return transformers.LlamaModel(
        transformers.LlamaConfig(
            hidden_size=size.width, intermediate_size=4 * size.width, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, num_key_value_heads=size.keys, vocab_size=VOCABULARY,
            max_position_embeddings=size.length, attention_dropout=dropout, use_cache=False,
        )
    )  # fmt: skip


def gemma2(size: Size, dropout: float) -> nn.Module:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            hidden_size=size.width, intermediate_size=4 * size.width, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, num_key_value_heads=size.keys, head_dim=256, vocab_size=VOCABULARY,
            sliding_window=size.length // 4, attention_dropout=dropout, use_cache=False,
        )
    )  # fmt: skip


def bloom(size: Size, dropout: float) -> nn.Module:
    return transformers.BloomModel(
        transformers.BloomConfig(
            hidden_size=size.width, n_layer=size.layers, n_head=size.heads, vocab_size=VOCABULARY,
            hidden_dropout=dropout, attention_dropout=dropout, use_cache=False,
        )
    )  # fmt: skip


def mpt(size: Size, dropout: float) -> nn.Module:
    return transformers.MptModel(
        transformers.MptConfig(
            d_model=size.width, n_layers=size.layers, n_heads=size.heads, max_seq_len=size.length,
            vocab_size=VOCABULARY, attn_config={"attn_pdrop": dropout or 0}, use_cache=False,
        )
    )  # fmt: skip


def t5(size: Size, dropout: float) -> nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=size.width, d_kv=size.width // size.heads, d_ff=4 * size.width, num_layers=size.layers,
            num_heads=size.heads, vocab_size=VOCABULARY, dropout_rate=dropout, use_cache=False,
        )
    )  # fmt: skip


def gpt2(size: Size, dropout: float) -> nn.Module:
    return transformers.GPT2Model(
        transformers.GPT2Config(
            n_embd=size.width, n_layer=size.layers, n_head=size.heads, n_positions=size.length,
            vocab_size=VOCABULARY, attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout, use_cache=False,
        )
    )  # fmt: skip


def bert(size: Size, dropout: float) -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=size.heads,
            intermediate_size=4 * size.width, vocab_size=VOCABULARY, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def deberta(size: Size, dropout: float) -> nn.Module:
    """With relative positions from keys to queries and back, as DeBERTa-v3 has them."""
    return transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=size.heads,
            intermediate_size=4 * size.width, vocab_size=VOCABULARY, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout, relative_attention=True, position_buckets=256,
            pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
        )
    )  # fmt: skip
