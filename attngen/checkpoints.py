"""Checkpoints in a graph that runs as it was captured: what they compute again is drawn as it was.

In a captured graph torch leaves random numbers to the compiler, and switches off what a checkpoint does to keep them: what it
computes again for the backward would have another dropout mask. Where nothing compiles the graph, the checkpoint does it.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils.checkpoint import checkpoint

from attngen import compat


def keep_random_numbers(gm: fx.GraphModule) -> None:
    """Every checkpoint in ``gm``, those inside others too, keeps the state of random numbers for when it runs again."""
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        found = module.graph.find_nodes(op="call_function", target=compat.CHECKPOINT)
        for node in found:
            node.target = _checkpointed
        if found:
            module.recompile()


def _checkpointed(body: fx.GraphModule, *args: Any, **options: Any) -> Any:
    """Without reentrance, whatever was asked for, as torch runs the checkpoints of a captured graph."""
    selective = body.meta.get("_checkpoint_context_fn")
    changes = {"use_reentrant": False, "preserve_rng_state": True, **({"context_fn": selective} if selective else {})}
    return checkpoint(body, *args, **{**options, **changes})
