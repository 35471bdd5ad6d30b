"""What is shown: the packs of a step exactly as the ranks get them, cut back into their rows. Pure data, no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from sft_job.checkpoint.state import total_steps
from sft_job.config.schema import JobConfig
from sft_job.costs import packing_of
from sft_job.data.batches import IGNORED, Int64, PackedBatch, pack_rows
from sft_job.data.mixture import Rows, training_order
from sft_job.data.order import RowIds
from sft_job.data.packing import plan_batch

# What the loader of the ranks pads with.
_PAD_ID = 0


def _nothing() -> Int64:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Slot:
    """Where a micro-batch belongs.

    Attributes:
        step: optimizer step, from 1 as in the logs.
        epoch: from 1.
        dp_rank: the Ulysses group that works on it, from 0.
        dp_size: Ulysses groups.
        ulysses_size: ranks of a group.
        micro_batch: from 1.
        micro_batches: of this group in this step.
    """

    step: int
    epoch: int
    dp_rank: int
    dp_size: int
    ulysses_size: int
    micro_batch: int
    micro_batches: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global numbers of the ranks that share the micro-batch."""
        first = self.dp_rank * self.ulysses_size
        return tuple(range(first, first + self.ulysses_size))


@dataclass(frozen=True, eq=False)
class PreviewRow:
    """One row as it is trained, or why it is not.

    Attributes:
        file: file that it came from.
        number: its number in that file, from 0.
        index: its number in the token cache; None where it is not in it.
        input_ids: [tokens] int64.
        position_ids: [tokens] int64, as the model gets them.
        labels: [tokens] int64, the token itself where it is trained, otherwise -100: not shifted.
        start: position of its first token in the pack.
        document: its place in the pack, from 1.
        reject_reason: why it is not trained; None for a row that is.
    """

    file: Path
    number: int
    index: int | None = None
    input_ids: Int64 = field(default_factory=_nothing)
    position_ids: Int64 = field(default_factory=_nothing)
    labels: Int64 = field(default_factory=_nothing)
    start: int = 0
    document: int = 0
    reject_reason: str | None = None

    @property
    def name(self) -> str:
        """``FILE:ROW``, which ``--row`` takes."""
        return f"{self.file}:{self.number}"

    @cached_property
    def trained_tokens(self) -> int:
        """Tokens that the loss is made of."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, eq=False)
class Pack:
    """One micro-batch: rows behind one another, and padding where the Ulysses size does not divide their tokens.

    Attributes:
        slot: which ranks work on it and when.
        rows: its documents, in order.
        padding: tokens of padding at its end.
    """

    slot: Slot
    rows: tuple[PreviewRow, ...]
    padding: int

    @property
    def tokens(self) -> int:
        """All tokens with the padding: what the forward pass works on."""
        return sum(len(row.input_ids) for row in self.rows) + self.padding

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss is made of."""
        return sum(row.trained_tokens for row in self.rows)

    @property
    def share(self) -> int:
        """Tokens of each rank of the Ulysses group."""
        return self.tokens // self.slot.ulysses_size

    def ranks_of(self, row: PreviewRow) -> tuple[int, ...]:
        """Ranks that hold tokens of a row."""
        first, last = row.start // self.share, (row.start + len(row.input_ids) - 1) // self.share
        return self.slot.ranks[first : last + 1]


@dataclass(frozen=True)
class StepPlan:
    """All micro-batches of a step.

    Attributes:
        row_ids: rows of the global batch.
        slots: [micro-batch of any group] their places, group by group.
        rows: row ids of each.
        tokens: tokens of each, without padding.
        targets: trained tokens of each.
    """

    row_ids: RowIds
    slots: tuple[Slot, ...]
    rows: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    targets: tuple[int, ...]


class TrainingStream:
    """What the steps of a run train on, by the functions that its ranks use.

    Attributes:
        cache: the rows.
        total_steps: steps of the whole run.
        dp_size: Ulysses groups.
        ulysses_size: ranks of a group.
    """

    def __init__(self, config: JobConfig, cache: Rows, world: int) -> None:
        self.cache = cache
        self.ulysses_size = config.ulysses_sequence_parallel_size
        self.dp_size = world // self.ulysses_size
        self._settings = packing_of(config)
        self._order = training_order(cache, config.trainer.seed, config.data.train_batch_size)
        self.total_steps = total_steps(config, self._order.steps_per_epoch)

    def plan(self, step: int) -> StepPlan:
        """Rows, ranks and micro-batches of a step (from 1)."""
        row_ids = self._order.rows(step - 1)
        plan = plan_batch(self.cache.lengths, row_ids, self.dp_size, self._settings)
        epoch = self._order.epoch(step - 1) + 1
        slots: list[Slot] = []
        rows: list[tuple[int, ...]] = []
        for rank, micro_batches in enumerate(plan):
            for number, ids in enumerate(micro_batches, start=1):
                slots.append(Slot(step, epoch, rank, self.dp_size, self.ulysses_size, number, len(micro_batches)))
                rows.append(tuple(ids))
        return StepPlan(
            row_ids,
            tuple(slots),
            tuple(rows),
            tuple(int(self.cache.lengths[np.asarray(ids, dtype=np.int64)].sum(dtype=np.int64)) for ids in rows),
            tuple(int(self.cache.targets[np.asarray(ids, dtype=np.int64)].sum(dtype=np.int64)) for ids in rows),
        )

    def packs(self, step: int) -> Iterator[Pack]:
        """Packs of a step and of the later ones of its epoch; without those that hold no row."""
        for later in range(step, min(self._epoch_end(step), self.total_steps) + 1):
            plan = self.plan(later)
            yield from (self._pack(slot, ids) for slot, ids in zip(plan.slots, plan.rows, strict=True) if ids)

    def first_rows(self, step: int, count: int) -> list[tuple[Pack, list[PreviewRow]]]:
        """The first ``count`` rows from a step on, pack by pack, as far as its epoch goes: none twice."""
        chosen: list[tuple[Pack, list[PreviewRow]]] = []
        for pack in self.packs(step):
            rows = list(islice(pack.rows, count))
            chosen.append((pack, rows))
            count -= len(rows)
            if count <= 0:
                break
        return chosen

    def pack_of(self, index: int, step: int) -> tuple[Pack, PreviewRow]:
        """The pack in which a row is trained, in the epoch of ``step``, by its number in the cache."""
        end = self._epoch_end(step)
        steps = range(end - self._order.steps_per_epoch + 1, end + 1)
        plan = self.plan(next(number for number in steps if index in self._order.rows(number - 1)))
        slot, ids = next((slot, ids) for slot, ids in zip(plan.slots, plan.rows, strict=True) if index in ids)
        pack = self._pack(slot, ids)
        return pack, next(row for row in pack.rows if row.index == index)

    def _epoch_end(self, step: int) -> int:
        """Last step of the epoch that a step belongs to."""
        per_epoch = self._order.steps_per_epoch
        return -(-step // per_epoch) * per_epoch

    def _pack(self, slot: Slot, ids: Sequence[int]) -> Pack:
        tokens = [self.cache.row(index) for index in ids]
        size = self.ulysses_size
        shares = [pack_rows(tokens, size, rank, _PAD_ID) for rank in range(size)]
        inputs, positions, targets = (_joined(shares, name) for name in ("input_ids", "position_ids", "targets"))
        starts = shares[0].cu_seqlens.tolist()
        rows: list[PreviewRow] = []
        for place, index in enumerate(ids):
            here = slice(starts[place], starts[place + 1])
            file, number = self.cache.origin(index)
            # The pack's targets name the next token; shifted back they stand on the token that is trained.
            labels = np.concatenate([[IGNORED], targets[here][:-1]])
            rows.append(PreviewRow(file, number, index, inputs[here], positions[here], labels, here.start, place + 1))
        return Pack(slot, tuple(rows), len(inputs) - shares[0].num_tokens)


def lone_row(cache: Rows, index: int) -> PreviewRow:
    """A row by itself, as validation computes its loss: its positions and labels do not depend on its neighbours."""
    tokens = cache.row(index)
    batch = pack_rows([tokens], 1, 0, _PAD_ID)
    here = slice(0, len(tokens.ids))
    inputs, positions, targets = (_joined([batch], name)[here] for name in ("input_ids", "position_ids", "targets"))
    file, number = cache.origin(index)
    labels = np.concatenate([[IGNORED], targets[:-1]])
    return PreviewRow(file, number, index, inputs, positions, labels)


def _joined(shares: Sequence[PackedBatch], name: str) -> Int64:
    """[T]: the stretches of all ranks of a Ulysses group behind one another."""
    return np.concatenate([getattr(share, name)[0].numpy() for share in shares])
