"""A GPT-2 and a T5 trained on the sources of Python's own library, eager and by attngen: one loss curve.

    python examples/training.py --out training.json --plot training.png     on a GPU in bfloat16, else small, on the CPU
    python examples/training.py --show training.json [--plot training.png]

Each model is built from a config with random weights and trained without and with dropout (also of the attention weights) by
AdamW on the same bytes in the same order: in eager, compiled by attngen, and in eager again with other dropout masks and
first weights that are off by one rounding. How far the two eager runs are apart is the noise that attngen's is held against.
The record is written after each of them; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import growing
import torch
import transformers
from torch import Tensor, nn

import attngen
from attngen.bench import plot

STEPS, WARM_UP = 300, 20
DROPOUT = 0.1
EAGER, OURS, AGAIN = "eager", "attngen", "eager again"
SLACK = 2.0  # attngen's curve may be that much of the noise away from eager's
EXACT = 1e-5  # and this much in any case: a loss is not known any better in float32
TEXT_BYTES = 1 << 23


@dataclass(frozen=True)
class Size:
    """Of a model and of its batches: ``length`` bytes are read, of which T5 writes the second half."""

    width: int
    heads: int
    layers: int
    length: int
    batch: int


LARGE, SMALL, TINY = Size(768, 12, 6, 512, 16), Size(64, 2, 2, 48, 4), Size(192, 3, 2, 24, 4)
SIZES = {"large": LARGE, "small": SMALL, "tiny": TINY}


@dataclass(frozen=True)
class Task:
    """A model in training: how it is built, and what it is called with for a batch of bytes ``[batch, length]``."""

    name: str
    build: Callable[[Size, float], nn.Module]
    inputs: Callable[[Tensor], dict[str, Tensor]]
    rate: float  # of learning


def _gpt2(size: Size, dropout: float) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=size.width, n_layer=size.layers, n_head=size.heads, n_positions=size.length, vocab_size=256,
            attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout, use_cache=False, attn_implementation="eager",
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _t5(size: Size, dropout: float) -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=size.width, d_kv=size.width // size.heads, d_ff=4 * size.width, num_layers=size.layers,
            num_heads=size.heads, vocab_size=256, dropout_rate=dropout, use_cache=False, attn_implementation="eager",
            pad_token_id=0, decoder_start_token_id=0,
        )
    )  # fmt: skip


def _halves(text: Tensor) -> dict[str, Tensor]:
    first, second = text.chunk(2, -1)
    return {"input_ids": first, "labels": second.contiguous()}


TASKS = (
    Task("gpt2", _gpt2, lambda text: {"input_ids": text, "labels": text}, 6e-4),
    Task("t5", _t5, _halves, 5e-4),
)


@dataclass(frozen=True)
class Setting:
    """What runs that are compared have in common."""

    task: Task
    dropout: float
    size: Size
    steps: int
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def told(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"model": self.task.name, "dropout": self.dropout, "size": asdict(self.size)}


# ----------------------------------------------------------------------------------------------------------------- data


def library_text() -> Tensor:
    """The sources of the standard library, in the order of their names, as bytes."""
    parts, size = [], 0
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size > TEXT_BYTES:
            break
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def batches(setting: Setting, *, rank: int = 0, ranks: int = 1) -> list[dict[str, Tensor]]:
    """The same for every run: what each step reads; of ``ranks`` equal parts the one of ``rank``."""
    text, size = library_text(), setting.size
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, len(text) - size.length, (setting.steps, size.batch, 1), generator=generator)
    places = starts.chunk(ranks, 1)[rank] + torch.arange(size.length)
    return [setting.task.inputs(rows.long().to(setting.device)) for rows in text[places]]


# ------------------------------------------------------------------------------------------------------------- training


def first_model(setting: Setting, *, nudged: bool = False) -> nn.Module:
    """With the same random weights each time; ``nudged`` has each of them off by about one rounding."""
    torch.manual_seed(0)
    model = setting.task.build(setting.size, setting.dropout).train()
    with torch.no_grad():
        for parameter in model.parameters() if nudged else ():
            parameter.mul_(1 + torch.finfo(setting.dtype).eps / 2 * torch.randn_like(parameter).sign())
    return model.to(setting.device)


def train(setting: Setting, run: Callable[..., Any], parameters: Sequence[nn.Parameter], data: Sequence[Any]) -> list[float]:
    """The loss at every step."""
    optimizer = torch.optim.AdamW(parameters, lr=setting.task.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    losses = []
    for inputs in data:
        with torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32):
            loss = run(**inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return [round(loss, 6) for loss in torch.stack(losses).tolist()]


def curve(setting: Setting, name: str, options: dict[str, Any]) -> list[float]:
    """The losses of one run from the first weights on. Prints how long it takes."""
    started = time.perf_counter()
    model = first_model(setting, nudged=name == AGAIN)
    torch._dynamo.reset()
    run = torch.compile(model, backend="attngen", options=options) if name == OURS else model
    torch.manual_seed(3 if name == AGAIN else 2)
    losses = train(setting, run, list(model.parameters()), batches(setting))
    print(f"  {name}: {losses[0]:.4f} -> {losses[-1]:.4f} in {time.perf_counter() - started:.1f} s", flush=True)
    return losses


def apart(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How far two curves are from each other: at most, and on average over the steps."""
    distances = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return {"largest": max(distances), "mean": sum(distances) / len(distances)}


def compared(setting: Setting, made: Callable[[str], list[float]]) -> dict[str, Any]:
    """The curves that ``made`` gives by name, how far they are apart, and whether ours is no more than noise."""
    with attngen.record() as reports:
        curves = {name: made(name) for name in (EAGER, OURS, AGAIN)}
    ours, noise = (apart(curves[name], curves[EAGER]) for name in (OURS, AGAIN))
    return {
        **setting.told,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "graphs": len(reports),
        "replaced": sum(len(report.replaced) for report in reports),
        "missed": [f"{site.where}: {site.reason}" for report in reports for site in report.missed],
        "curves": curves,
        "difference": ours,
        "noise": noise,
        "same": ours["mean"] <= SLACK * noise["mean"] + EXACT,
    }


# --------------------------------------------------------------------------------------------------------------- output


def show(result: dict[str, Any]) -> str:
    ours, noise, losses = result["difference"], result["noise"], result["curves"]
    ends = ", ".join(f"{name} {sum(values[-20:]) / len(values[-20:]):.3f}" for name, values in losses.items())
    distances = f"{ours['mean']:.1e} (largest {ours['largest']:.1e}), noise {noise['mean']:.1e} ({noise['largest']:.1e})"
    found = f"{result['replaced']} sites replaced, {len(result['missed'])} missed"
    verdict = "" if result["same"] else "  APART"
    return f"{titled(result)}: {found}; last losses: {ends}; distance from eager {distances}{verdict}"


def titled(result: dict[str, Any]) -> str:
    parallel = f" {result['parallel']} on {result['ranks']}" if "parallel" in result else ""
    return f"{result['model']}{parallel}, dropout {result['dropout']}"


def draw(record: dict[str, Any], path: Path) -> None:
    """The curves above, their distance from eager's below."""
    pyplot = plot.require()
    results = record["results"]
    layout = {"squeeze": False, "sharex": True, "layout": "constrained", "gridspec_kw": {"height_ratios": [2, 1]}}
    figure, axes = pyplot.subplots(2, len(results), figsize=(3.6 * len(results), 5), **layout)
    for (above, below), result in zip(axes.T, results, strict=True):
        curves = result["curves"]
        for place, (name, losses) in enumerate(curves.items()):
            above.plot(losses, label=name, color=f"C{place}", linewidth=0.9, linestyle="--" if name == AGAIN else "-")
            if name != EAGER:
                distance = [abs(a - b) for a, b in zip(losses, curves[EAGER], strict=True)]
                below.semilogy(distance, color=f"C{place}", linewidth=0.7)
        above.set_title(titled(result), fontsize=10)
        below.set_xlabel("step")
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("distance from eager")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(f"{record['device']}, {record['results'][0]['dtype']}", fontsize=10)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--show", type=Path, help="a record made before")
    parser.add_argument("--models", default=",".join(task.name for task in TASKS))
    parser.add_argument("--dropout", default=f"0.0,{DROPOUT}")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--size", choices=SIZES, default="large" if torch.cuda.is_available() else "small")
    parser.add_argument("--inner", default="inductor" if torch.cuda.is_available() else "eager")
    args = parser.parse_args(arguments)
    if args.plot:
        plot.require()
    record = json.loads(args.show.read_text()) if args.show else _recorded(args)
    if args.plot:
        draw(record, args.plot)
    print(*map(show, record["results"]), sep="\n")
    return 0 if all(result["same"] for result in record["results"]) else 1


def _recorded(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = [
        Setting(task, float(dropout), SIZES[args.size], args.steps, device)
        for task in TASKS
        if task.name in args.models.split(",")
        for dropout in args.dropout.split(",")
    ]
    record = growing.Record.opened(args.out, head(args))
    for setting in settings:
        if not record.has(**setting.told):
            print(f"{setting.task.name}, dropout {setting.dropout}", flush=True)
            record.add(compared(setting, partial(curve, setting, options={"inner": args.inner})))
    return record.content


def head(args: argparse.Namespace) -> dict[str, Any]:
    return {"device": device_name(), "versions": versions(), "steps": args.steps, "inner": args.inner}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "attngen": attngen.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    sys.exit(main())
