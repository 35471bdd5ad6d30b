"""Memory of one rank through a step: what is there all the time, and the moment at which most is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft_job.plan.activations import ATTENTION, FULL, LEVELS, NONE, OFFLOAD, in_backward, kept, rebuilt, scores
from sft_job.plan.setup import GIB, Setup
from sft_job.plan.shape import Shape

STATE_COPY = "copy of the state for checkpoints"
CHUNK_ELEMENTS = 2**29
"""Logits that the loss computes at once (rows x vocabulary), as ``model.loss`` has it."""
SMALL = 0.05 * GIB
"""Matrix libraries' workspaces, batches on the device, tables of positions."""
_NCCL = 1.0 * GIB
_NCCL_GROUP = 0.4 * GIB
PROCESS = 4.5 * GIB
"""Host memory of a rank's process: Python, torch, CUDA's libraries and contexts, compiled kernels."""
_MAPPED = 0.5 * GIB
"""Most of the token cache that a rank keeps mapped."""


@dataclass(frozen=True)
class Micro:
    """The largest micro-batch, as one rank sees it.

    Attributes:
        tokens: of this rank, padding included.
        supervised: of these, tokens with a target.
        longest: tokens of the longest document, over all ranks of the group.
    """

    tokens: int
    supervised: int
    longest: int


@dataclass(frozen=True)
class Footprint:
    """Bytes that a rank needs.

    Attributes:
        parts: what the device's memory is for at the moment of the peak, in bytes; they add up to ``peak``.
        peak: most that tensors take on the device at once.
        moment: when that is.
        outside: device memory that communication libraries take beside tensors.
        host: what a node's host memory is for, in bytes, over all its ranks.
        levels: for each block what is computed again.
    """

    parts: dict[str, float]
    peak: float
    moment: str
    outside: float
    host: dict[str, float]
    levels: tuple[str, ...]

    @property
    def host_bytes(self) -> float:
        """Of a node, over all its ranks."""
        return sum(self.host.values())


@dataclass(frozen=True)
class _States:
    """Bytes of parameters and what belongs to them, on the device.

    ``grads`` is all gradients once they are reduced, ``sums`` what is kept of them from one micro-batch to the next
    where that is this rank's shard alone.
    """

    weights: float
    moments: float
    grads: float
    sums: float
    block_trained: float
    root_trained: float
    block_grads: float
    root_gathered: float
    block_gathered: float


def _states(shape: Shape, setup: Setup) -> _States:
    if setup.rank:
        adapters = setup.adapter_parameters(shape.layers)
        dtype = max(4, setup.storage)
        base = setup.storage * shape.parameters / (1 if setup.whole_frozen else setup.shards)
        weights, trained, width = base + dtype * adapters / setup.shards, adapters, dtype
        block, root = adapters / shape.layers, 0.0
        frozen_block, frozen_root = (0.0, 0.0) if setup.whole_frozen else (float(shape.block), float(shape.root))
    else:
        trained, width = shape.parameters, setup.storage
        weights = width * trained / setup.shards
        block, root, frozen_block, frozen_root = shape.block, shape.root, 0.0, 0.0
    here = 0.0 if setup.offload else 1.0
    gathers = setup.managed or bool(setup.rank)
    return _States(
        weights=here * weights,
        moments=here * 2 * width * trained / setup.shards,
        grads=here * width * trained / setup.shards,
        sums=_sums(setup, trained, width) * (1.0 if setup.copies > 1 else here),
        block_trained=block,
        root_trained=root,
        block_grads=here * width * block / setup.shards,
        root_gathered=setup.compute * (root + frozen_root) if gathers else 0.0,
        block_gathered=setup.compute * (block + frozen_block) if gathers else 0.0,
    )


def _sums(setup: Setup, trained: float, width: int) -> float:
    """Bytes of this rank's sums over micro-batches, in fp32 at least."""
    return max(4, width) * trained / setup.shards if setup.sums_shards else 0.0


def _loss_stage(shape: Shape, setup: Setup, micro: Micro) -> dict[str, float]:
    """The head's part: logits of a chunk, gradients of the head and of the hidden rows."""
    size, rows = setup.compute, micro.supervised
    chunk = min(rows, max(1, CHUNK_ELEMENTS // shape.vocab)) * shape.vocab
    # Compiled, softmax and its gradient are one kernel over the logits; else they exist in fp32 three times.
    logits = chunk * (size if setup.compiled else size + 3.25 * max(4, size))
    hidden = size * shape.hidden * (2 * micro.tokens + 2 * rows)
    head = 0.0 if setup.rank else shape.table * (max(4, size) + size * (max(4, size) > size))
    return {"logits and the loss": logits + hidden, "gradient of the head, in fp32 and rounded": head}


def _moments_of_step(shape: Shape, setup: Setup, micro: Micro, levels: Sequence[str]) -> dict[str, dict[str, float]]:
    """What the device holds at each moment that can be the peak."""
    states, blocks = _states(shape, setup), len(levels)
    by_level = {level: kept(shape, setup, level).device * micro.tokens for level in LEVELS}
    whole = scores(shape, setup, micro.longest)
    by_level[NONE] += whole
    sizes = [by_level[level] for level in levels]
    base = {"weights": states.weights, "optimizer states": states.moments}
    buffers = states.root_gathered + states.block_gathered * (2 if setup.reshard else blocks)
    unsharded = setup.managed or bool(setup.rank)
    waiting = setup.reduce if setup.accumulates and unsharded and not setup.sums_shards else 0
    trained = states.block_trained * blocks + states.root_trained
    common = {**base, "gathered weights": buffers}
    found: dict[str, dict[str, float]] = {
        "at the loss": {
            **common,
            "activations": sum(sizes),
            "gradients": waiting * trained + states.sums,
            **_loss_stage(shape, setup, micro),
        }
    }
    # Two block inputs are on their way between device and host at a time.
    in_flight = 2.0 * setup.compute * shape.hidden * micro.tokens if OFFLOAD in levels else 0.0
    head = 0.0 if setup.rank else setup.compute * shape.table
    # What a block's gradients take until they are reduced: as computed, and in the reduction's buffer.
    reducing = (
        states.block_trained * (setup.compute + setup.reduce * (2 if setup.shards > 1 else 1)) if unsharded else 0.0
    )
    before = [0.0]
    for size in sizes:
        before.append(before[-1] + size)
    pieces = OFFLOAD in levels
    there = rebuilt(shape, setup, micro.tokens, pieces=pieces) + whole
    backward = in_backward(shape, setup, micro.tokens, pieces=pieces) + 2 * whole
    for block in range(blocks - 1, -1, -1):
        gradients = (blocks - block) * states.block_grads + waiting * (
            states.block_trained * (block + 1) + states.root_trained
        )
        if setup.sums_shards:
            # A sum goes when its gradient stays, in the last backward; before, a block's gradients go when they are in.
            gradients = states.sums + states.block_grads
        moment = {
            **common,
            "activations": before[block] + max(sizes[block], there) + in_flight,
            "gradients": gradients + head,
            "buffers of the backward": backward + reducing + setup.compute * shape.hidden * micro.tokens,
        }
        found[f"in the backward of block {block + 1} of {blocks}"] = moment
    root = states.root_trained * ((setup.compute + setup.reduce) if unsharded else 0)
    root += head if shape.tied else 0.0  # the embedding's own gradient, before it joins the head's
    found["at the end of the backward"] = {
        **base,
        "gathered weights": states.root_gathered,
        "gradients": max(states.grads, states.sums),
        "buffers of the backward": root,
    }
    return found


def footprint(shape: Shape, setup: Setup, micro: Micro, levels: Sequence[str]) -> Footprint:
    """What a rank needs with this recomputation.

    Args:
        shape: of the model.
        setup: of the run.
        micro: the largest micro-batch.
        levels: for each block one of ``LEVELS``.
    """
    moments = _moments_of_step(shape, setup, micro, levels)
    when = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size for name, size in moments[when].items() if size}
    parts["workspaces"] = SMALL
    outside = 0.0
    if setup.ranks.world > 1:
        outside = _NCCL + _NCCL_GROUP * ((setup.ulysses > 1) + (setup.shards < setup.ranks.world))
    return Footprint(parts, sum(parts.values()), when, outside, _host(shape, setup, micro, levels), tuple(levels))


def _host(shape: Shape, setup: Setup, micro: Micro, levels: Sequence[str]) -> dict[str, float]:
    gpus = setup.ranks.gpus
    trained = setup.adapter_parameters(shape.layers) if setup.rank else shape.parameters
    width = max(4, setup.storage) if setup.rank else setup.storage
    inputs = sum(kept(shape, setup, level).host for level in levels) * micro.tokens
    parts = {
        "processes": PROCESS * gpus,
        "token cache and batches": (_MAPPED + 3 * 32.0 * micro.tokens * setup.ulysses) * gpus,
        STATE_COPY: 3.0 * width * trained / setup.shards * gpus if setup.stages else 0.0,
        "offloaded weights, gradients, states": 0.0,
        "offloaded block inputs": inputs * gpus,
    }
    if setup.offload:
        frozen = setup.storage * shape.parameters if setup.rank else 0.0
        sums = 0.0 if setup.copies > 1 or width >= 4 else _sums(setup, trained, width)
        parts["offloaded weights, gradients, states"] = ((4.0 * width * trained + frozen) / setup.shards + sums) * gpus
    return {name: size for name, size in parts.items() if size}


def levels_of(recompute: str, layers: int) -> tuple[str, ...]:
    """What each block does for a value of ``model.recompute``; the last block's input is never worth moving."""
    if recompute == OFFLOAD:
        return (OFFLOAD,) * (layers - 1) + (FULL,)
    return (recompute,) * layers


def ladder(layers: int) -> list[tuple[str, ...]]:
    """What ``model.recompute: auto`` chooses from, least memory first: attention kept block by block, then all."""
    kept_more = [(FULL,) * (layers - n) + (ATTENTION,) * n for n in range(layers + 1)]
    return kept_more + [(ATTENTION,) * (layers - n) + (NONE,) * n for n in range(1, layers + 1)]


def least_recompute(shape: Shape, setup: Setup, micro: Micro, room: float) -> Footprint:
    """The footprint of the plan that keeps most of what fits in so many bytes; that of the least where none does."""
    plans = ladder(shape.layers)
    low, high = 0, len(plans) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if footprint(shape, setup, micro, plans[middle]).peak <= room:
            low = middle
        else:
            high = middle - 1
    return footprint(shape, setup, micro, plans[low])
