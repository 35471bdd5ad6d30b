"""The measured ceiling: how fast this card multiplies two 8192 x 8192 matrices in bf16, on random data."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

import torch

SIZE = 8192
SIZE_ON_CPU = 256
WARM, TIMED = 20, 100
LOAD, LOAD_ON_CPU = 1500, 3
"""Products before the rate under load is taken: two and a half seconds, in which an H200 comes to its power limit."""


def matmul_ceiling(device: torch.device) -> dict[str, Any]:
    """Rate of a square matrix product in bf16; a small one on a CPU, where the figure means nothing.

    The products run back to back for about a quarter of a second, each between two events. A card that was idle
    before is cool and has a high clock then, higher than a training step's; so they are measured once more after two
    seconds of load (``warm``). Random data: on zeros the card draws less power and runs faster.

    Returns:
        ``tflops`` (median), ``p10`` and ``p90`` in TFLOP/s, ``products``; ``warm``: the same four; ``size``.
    """
    size = SIZE if device.type == "cuda" else SIZE_ON_CPU
    # Drawn with a generator of its own: a run's random numbers must not depend on whether this was measured.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    timed = _timed_on_gpu if device.type == "cuda" else _timed_on_host
    found: dict[str, Any] = _rates(timed(left, right, out), size)
    for _ in range(LOAD if device.type == "cuda" else LOAD_ON_CPU):
        torch.mm(left, right, out=out)
    found["warm"] = _rates(timed(left, right, out), size)
    del left, right, out
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {**found, "size": size}


def _rates(seconds: list[float], size: int) -> dict[str, float]:
    rates = sorted(2 * size**3 / each / 1e12 for each in seconds)
    return {
        "tflops": statistics.median(rates),
        "p10": rates[len(rates) // 10],
        "p90": rates[-1 - len(rates) // 10],
        "products": len(rates),
    }


def _timed_on_gpu(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED + 1)]
    for _ in range(WARM):
        torch.mm(left, right, out=out)
    events[0].record()
    for event in events[1:]:
        torch.mm(left, right, out=out)
        event.record()
    torch.cuda.synchronize(left.device)
    return [first.elapsed_time(second) / 1e3 for first, second in pairwise(events)]


def _timed_on_host(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> list[float]:
    seconds: list[float] = []
    for _ in range(3):
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - begin)
    return seconds
