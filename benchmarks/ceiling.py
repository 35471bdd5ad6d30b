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


def matmul_ceiling(device: torch.device) -> dict[str, Any]:
    """Rate of a square matrix product in bf16; a small one on a CPU, where the figure means nothing.

    The products run back to back for about a quarter of a second, each between two events, so the clock is about the
    one that a training step sees. Random data: on zeros the card draws less power and runs faster.

    Returns:
        ``tflops`` (median), ``p10`` and ``p90`` in TFLOP/s, and ``size``.
    """
    size = SIZE if device.type == "cuda" else SIZE_ON_CPU
    # Drawn with a generator of its own: a run's random numbers must not depend on whether this was measured.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    seconds = _timed_on_gpu(left, right, out) if device.type == "cuda" else _timed_on_host(left, right, out)
    del left, right, out
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rates = sorted(2 * size**3 / each / 1e12 for each in seconds)
    return {
        "tflops": statistics.median(rates),
        "p10": rates[len(rates) // 10],
        "p90": rates[-1 - len(rates) // 10],
        "size": size,
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
