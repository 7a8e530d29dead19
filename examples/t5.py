"""A T5 as Hugging Face writes it: no scale, a bias looked up by bucketed distance, padding, cross attention.

The bias of N x M pairs becomes a table of N + M - 1 distances for each head.

    attngen optimize examples/t5.py        plan, emit, compile and verify its kernels
    python examples/t5.py                  run it with its attention replaced, beside eager
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

import attngen

torch.manual_seed(0)
config = transformers.T5Config(
    vocab_size=4096,
    d_model=256,
    d_kv=64,
    d_ff=512,
    num_layers=3,
    num_decoder_layers=3,
    num_heads=4,
    use_cache=False,
    attn_implementation="eager",
)
model = transformers.T5Model(config).eval()
padding = torch.ones(2, 512, dtype=torch.long)
padding[1, 400:] = 0


def get_example_inputs() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(0, config.vocab_size, (2, 512)),
        "attention_mask": padding,
        "decoder_input_ids": torch.randint(0, config.vocab_size, (2, 128)),
    }


@torch.no_grad()
def main(**options: Any) -> float:
    """Largest difference between the compiled and the eager model, relative to the largest value."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = {name: value.to(device) for name, value in get_example_inputs().items()}
    eager = model.to(device)(**inputs).last_hidden_state
    with attngen.record() as reports:
        compiled = torch.compile(model, backend="attngen", options=options)(**inputs).last_hidden_state
    difference = float((compiled - eager).abs().max() / eager.abs().max())
    print(*reports, f"largest difference from eager: {difference:.1e}", sep="\n")
    return difference


if __name__ == "__main__":
    main()
