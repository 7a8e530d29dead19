"""Philox 4x32-7 with torch: the random bits that kernels draw with ``tl.philox``, bit for bit.

A counter-based generator: a number depends on the seed and on its own place alone, so that any tiling, forward and backward
draw the same ones (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 31  # of a number; so kernels compare it as a signed one
ROUNDS = 7  # the fewest that no test of randomness tells from chance; FlashAttention takes as many
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def random(seed: Tensor, *counter: Tensor) -> Tensor:
    """``BITS`` random bits for each place of the four counters, which broadcast; one seed of 64 bits for all.

    Four places share the words of one counter: those whose first and second numbers differ in their bits of eight alone.
    Tensor cores give rows that are eight apart, and such columns, to one thread, which then draws for four at once.
    """
    c0, c1, *others = counter
    w0, w1, w2, w3 = philox(seed, c0 & ~8, c1 & ~8, *others)
    low, high = (c0 & 8) == 0, (c1 & 8) == 0
    word = torch.where(high, torch.where(low, w0, w1), torch.where(low, w2, w3))
    return word >> (32 - BITS)


def philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, ...]:
    """Four words of 32 random bits for each place, in int64."""
    c0, c1, c2, c3 = (word.to(torch.int64) & _WORD for word in counter)
    k0, k1 = seed & _WORD, _high(seed)
    for _ in range(ROUNDS):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # all 64 bits of the products: integers wrap around
        c0, c1, c2, c3 = _high(b) ^ c1 ^ k0, b & _WORD, _high(a) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _WORD
