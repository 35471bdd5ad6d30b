"""Does the longest batch fit? It is gone through before the first step; where memory runs out it is said what for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sft_job.checkpoint.checkpointer import Checkpointer
from sft_job.checkpoint.distributed import on_every_rank
from sft_job.config.schema import JobConfig
from sft_job.config.shares import recovers
from sft_job.contract import ExitCode
from sft_job.data.batches import PackedBatch
from sft_job.errors import JobError
from sft_job.fitting import Attempt, CudaMemory, Guess, fit_recompute
from sft_job.host import HostNeed, offload_text
from sft_job.memory import is_out_of_memory, memory_by_kind, out_of_memory_text, remedies, shapes_text
from sft_job.metrics.loggers import Loggers
from sft_job.metrics.meters import GIB
from sft_job.model.causal_lm import CausalLMLoss
from sft_job.model.recompute import Recompute
from sft_job.parallel.fsdp import can_reset, forget_broken_step
from sft_job.plan.guess import keeps_everything, needs_above_offload, planned_remedy
from sft_job.plan.setup import Ranks
from sft_job.processes import host_room
from sft_job.rehearsal import rehearse
from sft_job.runtime import Runtime, peak_memory
from sft_job.trainer import Trainer


@dataclass(frozen=True)
class Capacity:
    """What a run needs at its longest batch, against what there is.

    Attributes:
        config: the run's settings.
        runtime: this rank.
        module: what is trained.
        optimizer: over its parameters.
        trainer: the loop.
        checkpointer: may hold a copy of the state in host memory.
        longest: micro-batches of the rehearsal, the largest that the run will meet; empty = none.
        host: host memory that blocks' inputs can take.
        loggers: on rank 0, None elsewhere.
    """

    config: JobConfig
    runtime: Runtime
    module: CausalLMLoss
    optimizer: torch.optim.Optimizer
    trainer: Trainer
    checkpointer: Checkpointer
    longest: list[PackedBatch]
    host: HostNeed
    loggers: Loggers | None

    def rehearse(self) -> None:
        """Go through the longest batch, and choose what is recomputed (a collective call).

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        if not self.longest:
            return
        if chooses_recompute(self.config, self.runtime.device):
            self._choose()
        else:
            self._once()
        ulysses, peak = self.config.ulysses_sequence_parallel_size, peak_memory(self.runtime.device)
        used = f", peak memory {peak / GIB:.1f} GiB" if peak is not None else ""
        self._say(f"rehearsal: {shapes_text(self.longest[0], ulysses)}{used}")
        blocks = self.module.blocks
        if blocks.store is not None:
            self._say(offload_text(blocks.plan, self.host, blocks.store.sent, blocks.store.stayed))

    def recover(self) -> bool:
        """After a rehearsal that broke off; what it left of gradients would be added to the first step's."""
        self.optimizer.zero_grad()
        self.trainer.accumulation.forget()
        return forget_broken_step(self.module)

    def host_blocks(self) -> int:
        """For how many blocks' inputs every rank has locked memory now (a collective call).

        Where that is not all of them and a copy of the state for checkpoints holds host memory too, the copy goes.
        """
        if not self.module.blocks.can_offload:
            return 0
        while not self.checkpointer.ready:
            time.sleep(0.1)
        found = self._locked()
        if found < self.host.blocks and self.checkpointer.copies:
            on_every_rank(self.checkpointer.give_up_copy)
            found = self._locked()
        return found

    @contextlib.contextmanager
    def explained(self, stage: str) -> Iterator[None]:
        """Turn a lack of device memory into what it was for, where all of it is, and what would need less (88)."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batch, config, rank = self.trainer.working_on, self.config, self.runtime.rank
            where = f"{stage} {self.trainer.state.step + 1} on rank {rank}"
            if batch is not None:
                where += f": {shapes_text(batch, config.ulysses_sequence_parallel_size)}"
            kinds = memory_by_kind(self.module, self.optimizer, self.runtime.device, self.trainer.accumulation.sums)
            longest = batch.max_seqlen if batch else config.data.max_length
            advice = remedies(
                config, longest, self.runtime.world, self._planned_remedy(batch), whole_gradients=self._sums_whole
            )
            raise JobError(ExitCode.OUT_OF_MEMORY, out_of_memory_text(error, where, kinds, advice)) from error

    def _once(self) -> None:
        rehearse(self.trainer.accumulate, self.module, self.optimizer, self.longest)

    def _choose(self) -> None:
        device, blocks = self.runtime.device, self.module.blocks
        memory = CudaMemory(device)
        managed = any(isinstance(parameter, DTensor) for parameter in self.module.parameters())
        goes_on = recovers(self.runtime.world, managed=managed, resets=can_reset(self.module))
        had_copy = self.checkpointer.copies
        guess = self._guess(memory.usable())
        self._say(
            fit_recompute(blocks, Attempt(self._once, self.recover, goes_on, memory, device, self.host_blocks, guess))
        )
        moved = Recompute.OFFLOAD in blocks.plan
        if not moved and blocks.store is not None:
            blocks.store.clear()
        if had_copy and not self.checkpointer.copies:
            if moved:
                self._say("trainer.async_save: host memory holds blocks' inputs, and no copy of the state: not used")
            else:
                self.checkpointer.take_copy()

    def _guess(self, usable: int) -> Guess:
        given, accumulates = self._for_plan(self.longest[0]), len(self.longest) > 1
        sure = keeps_everything(*given, usable, accumulates=accumulates)
        counted = self.module.blocks.spared(self.host.tokens, self.host.input_bytes, self.host.element_bytes)
        known = needs_above_offload(*given, usable, accumulates=accumulates)
        return Guess(sure, *(known or (counted, counted)))

    def _locked(self) -> int:
        """Lock memory for as many blocks' inputs as every node has room for, and every rank can lock."""
        store = self.module.blocks.store
        assert store is not None
        on_every_rank(store.clear)  # of all, before any looks at the room
        asked = min(on_every_rank(lambda: self.host.blocks_within(host_room())))
        found = min(on_every_rank(lambda: store.reserve(asked, self.host.input_bytes)))
        store.keep(found, self.host.input_bytes)
        return found

    def _for_plan(self, batch: PackedBatch) -> tuple[JobConfig, dict[str, Any], Ranks, tuple[int, ...]]:
        ranks = Ranks(self.host.ranks, max(1, self.runtime.world // self.host.ranks))
        return self.config, self.module.lm.config.to_dict(), ranks, batch.document_lengths

    def _planned_remedy(self, batch: PackedBatch | None) -> str:
        """The smallest change that fits by the plan; a fault in it must not hide what went wrong."""
        if batch is not None and self.runtime.device.type == "cuda":
            with contextlib.suppress(Exception):
                usable = CudaMemory(self.runtime.device).usable()
                return planned_remedy(
                    *self._for_plan(batch),
                    usable,
                    accumulates=len(self.longest) > 1,
                    sums_shards=self.trainer.accumulation.shard_alone,
                    host=host_room(),
                )
        return ""

    @property
    def _sums_whole(self) -> bool:
        """Every rank adds up gradients of all parameters, as far as the rehearsal tells."""
        return len(self.longest) > 1 and not self.trainer.accumulation.shard_alone

    def _say(self, text: str) -> None:
        if self.loggers is not None and text:
            self.loggers.message(text)


def chooses_recompute(config: JobConfig, device: torch.device) -> bool:
    """Whether memory decides what is recomputed; not where bits count: another plan adds up in another order."""
    model, free = config.model, device.type == "cuda" and not config.trainer.deterministic
    return free and model.recompute == "auto" and model.enable_gradient_checkpointing
