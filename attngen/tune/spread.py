"""Many choices over the GPUs of one host: each card measures one at a time, all candidates of it on the same card."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence

import torch

from attngen.cache.key import Wanted
from attngen.device import Device, from_properties
from attngen.errors import BadOption
from attngen.tune.tuner import Result, Tuner


def spread(questions: Sequence[Wanted], tuners: Sequence[Tuner], done: Callable[[Result], None]) -> list[Result]:
    """What came of each choice, in order of completion; fewer where the budget was spent before."""
    waiting: queue.SimpleQueue[Wanted] = queue.SimpleQueue()
    for question in questions:
        waiting.put(question)
    results: list[Result] = []
    lock = threading.Lock()

    def work(tuner: Tuner) -> None:
        while tuner.budget.left > 0:
            try:
                question = waiting.get_nowait()
            except queue.Empty:
                return
            result = tuner.tuned(question)
            with lock:
                results.append(result)
                done(result)

    threads = [threading.Thread(target=work, args=(tuner,), daemon=True) for tuner in tuners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def cards(which: str, device: Device) -> list[str]:
    """The GPUs asked for, "auto", "all" or numbers, as CUDA_VISIBLE_DEVICES has them. Raises ``BadOption``.

    Of "all", those that are like ``device``: a choice counts for one kind of card.
    """
    count = torch.cuda.device_count()
    if which == "auto":
        numbers = [torch.cuda.current_device()]
    elif which == "all":
        numbers = [number for number in range(count) if _like(number, device)]
    else:
        numbers = [int(part) for part in which.split(",") if part.strip().isdigit()]
        if not numbers or len(numbers) != len(which.split(",")) or not all(n < count and _like(n, device) for n in numbers):
            raise BadOption(f'--devices {which}: not "auto", "all" or numbers of GPUs like the {device.label} here, "0,1".')
    return list(map(visible, numbers))


def visible(number: int) -> str:
    """What another process that is to see this GPU alone gets as CUDA_VISIBLE_DEVICES."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names[number] if number < len(names) else str(number)


def _like(number: int, device: Device) -> bool:
    return from_properties(torch.cuda.get_device_properties(number), hip=bool(torch.version.hip)) == device
