"""How long attngen's pass takes beside torch.compile itself, in processor time; needs no GPU.

    python examples/benchmark_pass.py [--inner inductor]

GPT-2 with its 12 layers and a Llama with 32, spelt eagerly, with random weights and narrow: what a compiler does depends on
the graph alone. Each in a new process with empty caches. ``--inner eager``: beside the capture only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import fx
from torch._inductor.compile_fx import compile_fx

from attngen import options, pipeline

SMALL = {"vocab_size": 512, "use_cache": False, "attn_implementation": "eager"}
CACHES = ("ATTNGEN_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def gpt2() -> Any:
    return transformers.GPT2Model(transformers.GPT2Config(n_embd=192, n_head=12, n_layer=12, **SMALL))


def llama() -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
    return transformers.LlamaModel(transformers.LlamaConfig(num_hidden_layers=32, **sizes, **SMALL))


MODELS = {"gpt2": gpt2, "llama": llama}


def measure(name: str, inner: str) -> str:
    """One model in this process: the pass beside everything else up to the first result, without and with the compilers."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, tokens = MODELS[name]().eval(), torch.randint(0, 512, (2, 64))
    passes: list[float] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        started = time.process_time()
        pipeline.optimize(gm, example_inputs, options.parse({}))
        passes.append(time.process_time() - started)
        return gm.forward if inner == "eager" else compile_fx(gm, example_inputs)  # type: ignore[no-any-return]

    started = time.process_time()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(tokens)
    own = sum(passes)
    rest = time.process_time() - started - own
    called = sum(os.times()[2:4])
    beside = f"{rest:.2f} s of torch.compile, {called:.2f} s of C++ compiler"
    return f"{name}, {inner}: {own:.2f} s beside {beside}: {100 * own / rest:.1f} or {100 * own / (rest + called):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(measure(args.child, args.inner))
        return
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            caches = {cache: os.path.join(folder, cache.lower()) for cache in CACHES}
            environment = {**os.environ, **caches, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            command = [sys.executable, __file__, "--child", name, "--inner", args.inner]
            subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
