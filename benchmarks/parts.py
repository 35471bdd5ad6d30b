"""A step's time on the device by what it is for, from a trace of torch.profiler; and the least that each part needs."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GEMM, ATTENTION, BLOCKS, LOSS = "matrix products", "attention", "element-wise work of blocks", "loss and final norm"
ADAMW, NORM, CLIP = "AdamW", "gradient norm", "clipping"
COMMUNICATION, OTHER, IDLE = "communication", "other", "idle"
PARTS = (GEMM, ATTENTION, BLOCKS, LOSS, ADAMW, CLIP, NORM, COMMUNICATION, OTHER, IDLE)
BANDWIDTH = 4.3e12
"""Bytes a second that element-wise kernels reach on an H200 (SwiGLU); the memory's own rate is 4.8e12."""
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# The first that matches a kernel's name counts.
_NAMES = (
    (ATTENTION, re.compile(r"flash|fmha|attention", re.IGNORECASE)),
    (COMMUNICATION, re.compile(r"nccl", re.IGNORECASE)),
    (ADAMW, re.compile(r"fused_?adam|FusedOptimizer", re.IGNORECASE)),
    (CLIP, re.compile(r"multi_tensor.*BinaryOpScalar|multi_tensor")),
    (NORM, re.compile(r"NormTwoOps|pow_tensor_scalar_kernel_impl<float")),
    (GEMM, re.compile(r"nvjet|gemm|cutlass.*device_kernel|splitK", re.IGNORECASE)),
    (BLOCKS, re.compile(r"^triton")),
)


@dataclass(frozen=True)
class Kernel:
    """Something that ran on the device; times in microseconds."""

    name: str
    start: float
    took: float

    @property
    def end(self) -> float:
        """When it was over."""
        return self.start + self.took


def kernels_of(path: Path) -> list[Kernel]:
    """All kernels and copies of a trace (.json, .json.gz), in the order in which they began."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        events = json.load(file)["traceEvents"]
    found = [Kernel(each["name"], each["ts"], each["dur"]) for each in events if each.get("cat") in _ON_DEVICE]
    return sorted(found, key=lambda each: each.start)


def part_of(name: str) -> str:
    """What a kernel is for, as far as its name says."""
    return next((part for part, pattern in _NAMES if pattern.search(name)), OTHER)


def totals(kernels: Sequence[Kernel]) -> dict[str, dict[str, float]]:
    """Milliseconds and kernels of each part.

    What stands between the last block's attention and its backward, but for matrix products, counts as loss and final
    norm; the last block's MLP is in it. Idle is the time in which nothing runs.
    """
    attends = [index for index, each in enumerate(kernels) if part_of(each.name) == ATTENTION]
    backward = [index for index in attends if re.search(r"bwd|backward", kernels[index].name, re.IGNORECASE)]
    first = backward[0] if backward else len(kernels)
    last = max((index for index in attends if index < first), default=first)
    took: defaultdict[str, float] = defaultdict(float)
    count: Counter[str] = Counter()
    for index, each in enumerate(kernels):
        part = part_of(each.name)
        if last < index < first and part not in (GEMM, COMMUNICATION):
            part = LOSS
        took[part] += each.took / 1e3
        count[part] += 1
    took[IDLE] = (kernels[-1].start - kernels[0].start) / 1e3 - _busy(kernels[:-1], kernels[-1].start) if kernels else 0
    return {part: {"ms": took[part], "kernels": count[part]} for part in PARTS if took[part]}


def _busy(kernels: Iterable[Kernel], until: float) -> float:
    """Milliseconds in which something runs."""
    total, end = 0.0, float("-inf")
    for each in kernels:
        stop = min(each.end, until)
        total += max(0.0, stop - max(end, each.start))
        end = max(end, stop)
    return total / 1e3


def span(kernels: Sequence[Kernel]) -> float:
    """Milliseconds from the first kernel's start to the last one's end."""
    return (max(each.end for each in kernels) - kernels[0].start) / 1e3 if kernels else 0.0


def top(kernels: Sequence[Kernel], count: int = 25) -> list[dict[str, Any]]:
    """The kernels that take most, by name."""
    took: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for each in kernels:
        took[each.name] += each.took / 1e3
        calls[each.name] += 1
    names = sorted(took, key=lambda name: -took[name])[:count]
    return [{"name": name[:120], "ms": took[name], "calls": calls[name], "part": part_of(name)} for name in names]


@dataclass(frozen=True)
class Work:
    """What a step has to do on one device.

    Attributes:
        gemm_flops: of the matrix products, by the model's definition.
        attention_flops: likewise.
        tokens: of the step.
        supervised: of these, tokens with a target.
        parameters: trained, in bf16 with bf16 states.
        vocabulary: rows of the head.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        layers: decoder blocks.
    """

    gemm_flops: float
    attention_flops: float
    tokens: int
    supervised: int
    parameters: float
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int


def floors(work: Work, ceiling: float, bandwidth: float = BANDWIDTH) -> dict[str, float]:
    """The least milliseconds of each part that can be counted: every tensor read and written once, in bf16.

    Args:
        work: of the step.
        ceiling: FLOP/s of matrix products.
        bandwidth: bytes a second.
    """
    # In both directions a block reads and writes the residual stream 26 times (norms, sums, RoPE), the MLP's width 8.
    blocks = 2 * work.tokens * work.layers * (26 * work.hidden + 8 * work.intermediate)
    # Logits are read for their norm, read and written as gradients; the head's sum in fp32 is made, read and rounded.
    loss = 2 * work.supervised * work.vocabulary * 3 + work.vocabulary * work.hidden * 10
    loss += 2 * work.tokens * work.hidden * 12
    return {
        GEMM: 1e3 * work.gemm_flops / ceiling,
        BLOCKS: 1e3 * blocks / bandwidth,
        LOSS: 1e3 * loss / bandwidth,
        ADAMW: 1e3 * 14 * work.parameters / bandwidth,  # weight, gradient, two moments; three of them written
        CLIP: 0.0,  # AdamW can take the factor
        NORM: 1e3 * 2 * work.parameters / bandwidth,
        IDLE: 0.0,
    }


def table(found: Mapping[str, Mapping[str, float]], work: Work, least: Mapping[str, float]) -> str:
    """Parts, milliseconds, rates, floors and what is between."""
    whole = sum(each["ms"] for each in found.values())
    flops = {GEMM: work.gemm_flops, ATTENTION: work.attention_flops}
    lines = ["| part | ms | share | kernels | TFLOP/s | floor ms | room ms |", "|---|---|---|---|---|---|---|"]
    for part, each in found.items():
        rate = f"{flops[part] / each['ms'] / 1e9:.0f}" if flops.get(part) else "-"
        floor, room = (f"{least[part]:.1f}", f"{each['ms'] - least[part]:.1f}") if part in least else ("-", "-")
        share = f"{each['ms'] / whole:.1%}"
        lines.append(f"| {part} | {each['ms']:.1f} | {share} | {each['kernels']:.0f} | {rate} | {floor} | {room} |")
    rate = (work.gemm_flops + work.attention_flops) / whole / 1e9
    lines.append(f"| sum | {whole:.1f} | 100 % | | {rate:.0f} | | |")
    return "\n".join(lines) + "\n"
