"""Time of a step by part: matrix products, attention, what is computed again, memory traffic, communication.

Work over rates: each kind of work over what such a card reaches in a training step (``cards``). Waiting for data is
taken as none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sft_job.plan.activations import FULL, NONE, OFFLOAD
from sft_job.plan.cards import Card
from sft_job.plan.setup import Setup
from sft_job.plan.shape import Shape

_TERA = 1e12
_GIGA = 1e9
_LAUNCH = (0.3e-3, 1.8e-3)
"""Seconds in which the CPU has launched a block's forward and backward: compiled, or operation by operation."""
_EAGER_TRAFFIC = 2.5
"""Memory traffic of element-wise work operation by operation, over that of fused kernels."""
_ROWWISE = 0.66
"""Rate of fp8 products with a scale for each row, casts included, over that of tensorwise ones."""
_CALL = 45e-6
"""Seconds of a small collective's launch."""
_REDUCING = "reducing gradients"
_STOLEN = 0.15
"""Share of the time of a collective behind computation by which the computation gets slower."""
_HOST_ADAM = 60.0
"""GB/s at which a node's cores update offloaded weights and states, all ranks together."""

Parts = dict[str, float]


@dataclass(frozen=True)
class Work:
    """A micro-batch, as one rank of its group computes it.

    Attributes:
        tokens: of this rank, padding included.
        documents: tokens of each document of the whole pack, over all ranks of the group.
        supervised: tokens of this rank with a target.
    """

    tokens: int
    documents: Sequence[int]
    supervised: float


def _attention_flops(shape: Shape, setup: Setup, work: Work) -> tuple[float, float]:
    """Forward FLOPs of one layer of this rank (mean over layers), and the length at which its rate is looked up."""
    full, windowed, total = 0.0, 0.0, 0
    for length in work.documents:
        window = min(length, shape.window)
        full += length * length / 2
        windowed += length * window - window * window / 2
        total += length
    pairs = full
    if shape.sliding_layers:
        pairs = full + (windowed - full) * shape.sliding_layers / shape.layers
    mean = 2 * full / total if total else 0.0  # of a token's document
    return 4.0 * shape.queries * pairs / setup.ulysses, mean


def _product_rate(card: Card, setup: Setup, *, fp8: bool) -> float:
    if setup.compute > 2:
        return card.fp32 * _TERA
    if fp8 and card.fp8:
        return card.fp8 * _TERA * (1.0 if setup.fp8 == "tensorwise" else _ROWWISE)
    return card.bf16 * _TERA


def _products(shape: Shape, card: Card, setup: Setup) -> tuple[float, float]:
    """Seconds that a token takes in one pass through a block's matrix products; and without its last one."""
    each = [2.0 * linear.weights / _product_rate(card, setup, fp8=setup.in_fp8(linear)) for linear in shape.linears]
    return sum(each), sum(each[:-1])


def _traffic(shape: Shape, setup: Setup) -> float:
    """Bytes that a token's element-wise work moves in one forward through a block."""
    heads = shape.queries + shape.keys
    fused = 3.0 * shape.norms * shape.hidden + (6 if shape.qk_norm else 4) * heads + 3 * shape.intermediate
    adapters = sum(linear.wide_in + 2 * linear.wide_out for linear in setup.adapters)
    return setup.compute * (fused * (1.0 if setup.compiled else _EAGER_TRAFFIC) + adapters)


def micro_seconds(shape: Shape, card: Card, setup: Setup, work: Work, levels: Sequence[str]) -> Parts:
    """Seconds of a micro-batch's forward and backward, by part.

    Args:
        shape: of the model.
        card: of every rank.
        setup: of the run.
        work: the micro-batch.
        levels: for each block what is computed again.
    """
    blocks = len(levels)
    recomputed, attends_again = (
        sum(level != NONE for level in levels),
        sum(level in (FULL, OFFLOAD) for level in levels),
    )
    once, but_last = _products(shape, card, setup)
    passes = 2 if setup.rank else 3
    flops, mean = _attention_flops(shape, setup, work)
    forward = flops / (card.attention_rate(setup.attention, int(mean), backward=False) * _TERA)
    both = 3.5 * flops / (card.attention_rate(setup.attention, int(mean), backward=True) * _TERA)
    slower = card.bf16 / card.fp32 if setup.compute > 2 else 1.0
    moved = _traffic(shape, setup) * work.tokens / (card.bandwidth * _TERA)
    head = 2.0 * work.supervised * shape.table * passes / _product_rate(card, setup, fp8=False)
    # Softmax and its gradient go over the logits three times, where they are one kernel.
    logits = work.supervised * shape.vocab * setup.compute * (3 if setup.compiled else 16) / (card.bandwidth * _TERA)
    parts: Parts = {
        "matrix products": passes * once * work.tokens * blocks + head,
        "attention": both * slower * blocks,
        "computed again": recomputed * (but_last * work.tokens + moved) + attends_again * forward * slower,
        "element-wise": 3 * moved * blocks + logits,
    }
    launch = _LAUNCH[0 if setup.compiled else 1] * blocks
    parts["waiting for launches"] = max(0.0, launch - sum(parts.values()))
    computing = sum(parts.values())
    parts["Ulysses exchanges"] = _ulysses(shape, card, setup, work.tokens, blocks, recomputed)
    gathering, copied = _gathers(shape, card, setup)
    parts["gathering weights"] = copied + max(0.0, gathering - computing) + _STOLEN * min(gathering, computing)
    if setup.sums_shards:
        reduction = _reduce_scatter(shape, card, setup)
        cover = computing * 2 / 3
        parts[_REDUCING] = max(0.0, reduction - cover) + _STOLEN * min(reduction, cover)
    if OFFLOAD in levels:
        copies = 2 * setup.compute * shape.hidden * work.tokens * levels.count(OFFLOAD) / (card.host * _GIGA)
        parts["copies to host memory"] = max(0.0, copies - computing) + _STOLEN * min(copies, computing)
    return parts


def _ulysses(shape: Shape, card: Card, setup: Setup, tokens: int, blocks: int, recomputed: int) -> float:
    """All-to-alls, which nothing hides: q, k, v and back, forward, backward, and again where that is computed again."""
    size = setup.ulysses
    if size == 1:
        return 0.0
    rate = (card.link if size <= setup.ranks.gpus else card.network) * _GIGA
    keys = max(shape.kv_heads, size) * shape.head_dim
    share = (size - 1) / size
    sent = setup.compute * tokens * share * (2 * shape.queries + 2 * keys)
    once = 2 * _CALL + sent / rate
    return once * (2 * blocks + recomputed)


def _collective_rate(card: Card, setup: Setup, ranks: int) -> float:
    return (card.link if ranks <= setup.ranks.gpus else min(card.link, card.network * setup.ranks.gpus)) * _GIGA


def _gathers(shape: Shape, card: Card, setup: Setup) -> tuple[float, float]:
    """Gathering all weights for a micro-batch's forward and backward: on the way, and copied out of FSDP's buffers."""
    adapters = setup.adapter_parameters(shape.layers)
    gathered = setup.compute * (adapters if setup.whole_frozen else shape.parameters + adapters)
    shards, passes = setup.shards, 2 if setup.reshard else 1
    seconds = 0.0
    if setup.offload:
        seconds += 2 * gathered / shards / (card.host * _GIGA)
    if shards > 1:
        per_pass = gathered * (shards - 1) / shards / _collective_rate(card, setup, shards) + _CALL * shape.layers
        seconds += passes * per_pass
    copied = 2 * passes * gathered / (card.bandwidth * _TERA) if setup.managed or setup.rank else 0.0
    return seconds, copied


def _trained(shape: Shape, setup: Setup) -> int:
    return setup.adapter_parameters(shape.layers) if setup.rank else shape.parameters


def _reduce_scatter(shape: Shape, card: Card, setup: Setup) -> float:
    """Seconds in which all gradients are summed over the ranks of a copy, each rank getting its shard."""
    shards = setup.shards
    if shards == 1:
        return 0.0
    sent = setup.reduce * _trained(shape, setup) * (shards - 1) / shards
    return sent / _collective_rate(card, setup, shards)


def step_end(shape: Shape, card: Card, setup: Setup) -> Parts:
    """Seconds once a step: reduction of gradients and the optimizer, by part; the reduction before what hides it.

    Where every micro-batch is reduced that is in its own time, but for the sum over copies.
    """
    trained = _trained(shape, setup)
    width = max(4, setup.storage) if setup.rank else setup.storage
    world, shards = setup.ranks.world, setup.shards
    reduction = 0.0 if setup.sums_shards else _reduce_scatter(shape, card, setup)
    if world > shards:
        copies = world // shards
        reduction += 2 * setup.reduce * trained / shards * (copies - 1) / copies / _collective_rate(card, setup, world)
    # AdamW reads weight, gradient and two states and writes three of them; the norm reads. Clipping reads
    # and writes once more in host memory alone.
    moved = width * trained / shards * (8 + 2 * (setup.clips and setup.offload))
    rate = _HOST_ADAM * _GIGA / setup.ranks.gpus if setup.offload else card.bandwidth * _TERA
    if setup.managed:
        # Into FSDP's buffers in the wider dtype, and back into gradients.
        moved += trained * (setup.compute + 2 * setup.reduce) * (0.0 if setup.offload else 1.0)
    return {_REDUCING: reduction, "optimizer": moved / rate + 2e-3}


def joined(micros: Sequence[Mapping[str, float]], end: Mapping[str, float]) -> Parts:
    """A step's parts from its micro-batches and its end; a reduction is hidden behind the last backward."""
    total: Parts = {}
    for parts in micros:
        for name, seconds in parts.items():
            total[name] = total.get(name, 0.0) + seconds
    reduction = end[_REDUCING]
    cover = sum(micros[-1].values()) * 2 / 3 if micros else 0.0
    last = max(0.0, reduction - cover) + _STOLEN * min(reduction, cover)
    total[_REDUCING] = total.get(_REDUCING, 0.0) + last
    total["optimizer"] = end["optimizer"]
    return {name: seconds for name, seconds in total.items() if seconds > 0}
