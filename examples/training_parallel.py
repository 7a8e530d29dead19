"""The training of ``training.py`` on several GPUs (without them, in processes on the CPU): data parallel or sharded.

    python examples/training_parallel.py --ranks 2 --parallel ddp,fsdp2 --out parallel.json --plot parallel.png

Each rank reads its part of every batch and drops at random by a seed of its own. What attngen compiles is compared with
eager under the same parallelism. DDP is compiled as a whole, so that Dynamo cuts the graph where gradients are sent; with
FSDP2 each block is compiled on its own, and its parameters are gathered around it. As there, the same command goes on where
one was cut off.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import growing
import torch
import torch.distributed as dist
import training
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import AGAIN, OURS, Setting

from attngen.bench import plot

PARALLEL = ("ddp", "fsdp2")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers: what is in a list of modules that is itself in no other."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    inside = {part for each in lists for layer in each for part in layer.modules()}
    return [layer for each in lists if each not in inside for layer in each]


def distributed(model: nn.Module, parallel: str, bucket_mb: float, compiled: Callable[[nn.Module], Any] | None) -> Any:
    """``model`` over all ranks; ``compiled`` compiles what it is given."""
    if parallel == "ddp":
        copies = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)
        return compiled(copies) if compiled else copies
    for block in blocks(model):
        if compiled:
            block.forward = compiled(block.forward)
        fully_shard(block)
    return fully_shard(model)


def curve(setting: Setting, parallel: str, bucket_mb: float, name: str, options: dict[str, Any]) -> list[float]:
    """The losses of one run, the mean of all ranks. Prints how long it takes."""
    rank, ranks, started = dist.get_rank(), dist.get_world_size(), time.perf_counter()
    torch._dynamo.reset()
    compiled = partial(torch.compile, backend="attngen", options=options) if name == OURS else None
    run = distributed(training.first_model(setting, nudged=name == AGAIN), parallel, bucket_mb, compiled)
    torch.manual_seed((3 if name == AGAIN else 2) + 100 * rank)
    losses = training.train(setting, run, list(run.parameters()), training.batches(setting, rank=rank, ranks=ranks))
    mean = torch.tensor(losses, device=setting.device)
    dist.all_reduce(mean)
    if rank == 0:
        print(f"  {name}: {losses[0]:.4f} -> {losses[-1]:.4f} in {time.perf_counter() - started:.1f} s", flush=True)
    return (mean / ranks).tolist()


def work(rank: int, args: argparse.Namespace, folder: str) -> None:
    """What one process does. The first writes the record, from which all know what is left to do."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=args.ranks)
    record = growing.Record.opened(args.out, head(args))
    dist.barrier()  # all have read it
    if rank != 0:
        record = replace(record, path=None)
    for setting, parallel in left(record, args, device):
        if rank == 0:
            print(f"{setting.task.name} {parallel}, dropout {setting.dropout}", flush=True)
        made = partial(curve, setting, parallel, args.bucket_mb, options={"inner": args.inner})
        record.add({"parallel": parallel, "ranks": args.ranks, **training.compared(setting, made)})
    dist.destroy_process_group()


def head(args: argparse.Namespace) -> dict[str, Any]:
    return {**training.head(args), "bucket_mb": args.bucket_mb}


def left(record: growing.Record, args: argparse.Namespace, device: str) -> list[tuple[Setting, str]]:
    """What was asked for and ``record`` has not."""
    asked = [
        (Setting(task, float(dropout), training.SIZES[args.size], args.steps, device), parallel)
        for task in training.TASKS
        if task.name in args.models.split(",")
        for dropout in args.dropout.split(",")
        for parallel in args.parallel.split(",")
    ]
    return [(s, parallel) for s, parallel in asked if not record.has(**s.told, parallel=parallel, ranks=args.ranks)]


def main(arguments: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parallel", default=",".join(PARALLEL))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--models", default="gpt2")
    parser.add_argument("--dropout", default=f"{training.DROPOUT}")
    parser.add_argument("--steps", type=int, default=training.STEPS)
    parser.add_argument("--size", choices=training.SIZES, default="large" if gpu else "small")
    parser.add_argument("--inner", default="inductor" if gpu else "eager")
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="of gradients that DDP sends at once, at least 1")
    args = parser.parse_args(arguments)
    if args.plot:
        plot.require()
    with tempfile.TemporaryDirectory() as folder:
        args.out = args.out or Path(folder, "record.json")
        torch.multiprocessing.spawn(work, (args, folder), nprocs=args.ranks)
        record = json.loads(args.out.read_text())
    if args.plot:
        training.draw(record, args.plot)
    print(*map(training.show, record["results"]), sep="\n")
    return 0 if all(result["same"] for result in record["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
