"""A Llama as Hugging Face writes it, spelt eagerly: grouped heads by repeat_kv, a mask tensor, softmax in float32.

Weights are random: what attngen does depends on the computation alone.

    attngen optimize examples/llama.py     plan, emit, compile and verify its kernels
    python examples/llama.py               run it with its attention replaced, beside eager
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

import attngen

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    use_cache=False,
    attn_implementation="eager",
)
model = transformers.LlamaModel(config).eval().to(torch.bfloat16)
example_inputs = {"input_ids": torch.randint(0, config.vocab_size, (2, 1024))}


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
