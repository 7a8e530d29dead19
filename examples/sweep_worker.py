"""The process that measures a batch of the sweep: sites that share kernels, one after the other, and a reference before them.

Each site is measured as the tuner measures a choice (``attngen.tune.worker``): what is held against float64 first counts. The
parent is the tuner's too; to it a batch is one task whose candidates are those of all sites.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attngen import measure
from attngen.cache.key import Wanted
from attngen.spec import Tile
from attngen.tune import worker
from attngen.tune.messages import Message, Task
from attngen.tune.worker import Machine, Say


@dataclass(frozen=True)
class Batch(Task):
    """``parts``: each choice, and how many of the candidates are for it, in order."""

    parts: tuple[tuple[Wanted, int], ...] = ()

    @classmethod
    def of(cls, parts: Sequence[tuple[Wanted, Sequence[tuple[Tile, ...]]]], rounds: int) -> Batch:
        candidates = tuple(tiles for _, several in parts for tiles in several)
        counted = tuple((wanted, len(several)) for wanted, several in parts)
        return cls(parts[0][0], candidates, rounds, parts=counted)

    def tasks(self) -> list[tuple[int, Task]]:
        """The task of each choice, and the number of its first candidate."""
        found, first = [], 0
        for wanted, count in self.parts:
            lost = {number - first: why for number, why in self.lost.items() if first <= number < first + count}
            found.append((first, Task(wanted, self.candidates[first : first + count], self.rounds, lost)))
            first += count
        return found


def work(batch: Batch, machine: Machine, say: Say) -> None:
    """Measure every choice. One that cannot be measured fails alone."""
    for first, task in batch.tasks():
        clock = replace(machine.clock, flushes=measure.FLUSHES)  # what one site needed longer for is not the next one's
        worker.work(task, replace(machine, clock=clock), _renumbered(say, first, task))
        gc.collect()
        if machine.device == "cuda":
            torch.cuda.empty_cache()
    say(Message(event="done"))


def _renumbered(say: Say, first: int, task: Task) -> Say:
    def shifted(message: Message) -> None:
        if message.event == "broke":
            for number in range(len(task.candidates)):
                say(Message(event="failed", candidate=first + number, reason=message.reason))
        elif message.event != "done":
            say(message.model_copy(update={"candidate": first + message.candidate}))

    return shifted


def on_gpu(task: Task) -> Machine:
    """As the tuner has it, but the parent has compiled everything."""
    return replace(worker.on_gpu(task), ahead=len)


if __name__ == "__main__":
    worker.serve(on_gpu, work)
