"""The settings that decide memory and time, as bytes and counts: what the ranks of a run will really do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_job.config.schema import JobConfig, ModelConfig
from sft_job.config.shares import holds_frozen, sums_shards
from sft_job.plan.cards import Card
from sft_job.plan.shape import Linear, Shape, adapted

GIB = 2**30
RECOMPUTE_VALUES = ("none", "attention", "full", "offload")
"""Values of ``model.recompute`` besides auto, by what they keep; auto falls back to the last one."""
_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
# Linear layers that ``model.fp8`` leaves in bf16.
_INTO_HEADS = ("q_proj", "k_proj", "v_proj", "qkv_proj")


@dataclass(frozen=True)
class Ranks:
    """GPUs of a run.

    Attributes:
        gpus: of a node, one rank each.
        nodes: of the run.
        host: bytes of memory that a node has; None = unknown.
    """

    gpus: int
    nodes: int = 1
    host: float | None = None

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Setup:
    """What a run's settings come to.

    Attributes:
        ranks: of the run.
        ulysses: ranks that share a sequence.
        shards: ranks that share one copy of the parameters.
        storage: bytes of a weight, and of each of its two optimizer states.
        compute: bytes of a gathered weight and of an activation.
        reduce: bytes of a gradient while it is summed.
        recompute: none, attention, full, offload (block inputs in host memory), or auto (by the memory).
        compiled: blocks and loss run through torch.compile.
        fp8: none, tensorwise or rowwise.
        rank: of LoRA adapters; 0 = all weights are trained.
        adapters: linear layers of a block that have one.
        offload: weights, gradients and states live in host memory.
        reshard: gathered weights are freed after a block's forward.
        accumulates: a step may have several micro-batches.
        sums_shards: their gradients add up in each rank's shard alone; False = whole on every rank.
        whole_frozen: each rank holds the frozen base whole.
        attention: backend.
        clips: gradients are clipped.
        stages: checkpoints are written from a copy in host memory.
    """

    ranks: Ranks
    ulysses: int
    shards: int
    storage: int
    compute: int
    reduce: int
    recompute: str
    compiled: bool
    fp8: str
    rank: int
    adapters: tuple[Linear, ...]
    offload: bool
    reshard: bool
    accumulates: bool
    sums_shards: bool
    whole_frozen: bool
    attention: str
    clips: bool
    stages: bool

    @property
    def dp(self) -> int:
        """Data-parallel groups."""
        return self.ranks.world // self.ulysses

    @property
    def copies(self) -> int:
        """Copies of the parameters, each shared by ``shards`` ranks."""
        return self.ranks.world // self.shards

    @property
    def managed(self) -> bool:
        """FSDP gathers and reduces the trained weights; False = it would only copy, and is told not to."""
        alone = self.shards == self.ranks.world == 1
        return not (alone and not self.accumulates and not self.offload and self.storage == self.compute)

    def adapter_parameters(self, layers: int) -> int:
        """Parameters of all adapters."""
        return _adapter_parameters(layers, self.rank, self.adapters)

    def in_fp8(self, linear: Linear) -> bool:
        """Whether a layer's products are in fp8."""
        leaf = linear.name.rpartition(".")[2]
        even = linear.wide_in % 16 == 0 and linear.wide_out % 16 == 0
        return self.fp8 != "none" and even and leaf not in _INTO_HEADS


def setup_of(config: JobConfig, shape: Shape, card: Card, ranks: Ranks, *, accumulates: bool = False) -> Setup:
    """What settings come to on such a card, as ``model.build`` and ``job`` take them."""
    model, fsdp, world = config.model, config.model.fsdp_config, ranks.world
    storage = _BYTES[fsdp.model_dtype]
    compute = _BYTES[fsdp.dtype] if fsdp.dtype else (2 if storage < 8 else 8)
    rank = _lora_rank(model)
    offload = fsdp.cpu_offload or fsdp.offload_params
    frozen = shape.parameters * compute
    whole = rank > 0 and not offload and storage == compute
    adapters = adapted(shape, model) if rank else ()
    trained = _adapter_parameters(shape.layers, rank, adapters) if rank else shape.parameters
    shards, reduce, memory = (
        world if fsdp.fsdp_size == -1 else fsdp.fsdp_size,
        8 if storage == 8 else 4,
        card.memory * GIB,
    )
    return Setup(
        ranks=ranks,
        ulysses=config.ulysses_sequence_parallel_size,
        shards=shards,
        storage=storage,
        compute=compute,
        reduce=reduce,
        recompute=_recompute(config),
        compiled=model.compile == "auto" or bool(model.compile),
        fp8=model.fp8,
        rank=rank,
        adapters=adapters,
        offload=offload,
        reshard=fsdp.reshard_after_forward,
        accumulates=accumulates,
        sums_shards=accumulates and sums_shards(fsdp.shard_accumulated, reduce * trained, memory, shards),
        whole_frozen=whole and holds_frozen(fsdp.shard_frozen, frozen, memory, world),
        attention=card.flash if model.attention == "auto" else model.attention,
        clips=config.optim.clip_grad > 0,
        stages=config.trainer.async_save,
    )


def _adapter_parameters(layers: int, rank: int, adapters: tuple[Linear, ...]) -> int:
    return layers * rank * sum(linear.wide_in + linear.wide_out for linear in adapters)


def _recompute(config: JobConfig) -> str:
    model, trainer = config.model, config.trainer
    if model.recompute != "auto":
        return model.recompute
    if not model.enable_gradient_checkpointing:
        return "none"
    return "full" if trainer.deterministic or not trainer.rehearsal else "auto"


def _lora_rank(model: ModelConfig) -> int:
    if model.lora_adapter_path is None:
        return model.lora_rank
    try:
        found: Any = json.loads((Path(model.lora_adapter_path) / "adapter_config.json").read_text(encoding="utf-8"))
        return int(found["r"])
    except (OSError, ValueError, KeyError, TypeError):
        return model.lora_rank or 16
