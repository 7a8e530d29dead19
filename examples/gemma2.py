"""A Gemma-2 as Hugging Face writes it: scores through 50*tanh(x/50), heads of 256, every second layer sees a window.

The mask of each kind of layer becomes loop bounds: of 768 keys, a row of the window layers reads at most 256.

    attngen optimize examples/gemma2.py    plan, emit, compile and verify its kernels
    python examples/gemma2.py              run it with its attention replaced, beside eager
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

import attngen

torch.manual_seed(0)
config = transformers.Gemma2Config(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=256,
    sliding_window=256,
    use_cache=False,
    attn_implementation="eager",
)
model = transformers.Gemma2Model(config).eval().to(torch.bfloat16)
example_inputs = {"input_ids": torch.randint(0, config.vocab_size, (2, 768))}


@torch.no_grad()
def main(**options: Any) -> float:
    """Largest difference between the compiled and the eager model, relative to the largest value."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = {name: value.to(device) for name, value in example_inputs.items()}
    eager = model.to(device)(**inputs).last_hidden_state
    with attngen.record() as reports:
        compiled = torch.compile(model, backend="attngen", options=options)(**inputs).last_hidden_state
    difference = float((compiled - eager).abs().max() / eager.abs().max())
    print(*reports, f"largest difference from eager: {difference:.1e}", sep="\n")
    return difference


if __name__ == "__main__":
    main()
