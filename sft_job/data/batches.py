"""Packed micro-batches as tensors, and the loader that makes them ahead of the training loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sft_job.data.cache import TokenRow
from sft_job.data.evening import waited
from sft_job.data.mixture import Rows, SourceCounts, count_sources
from sft_job.data.order import StepRows
from sft_job.data.packing import PackSettings, Plan, plan_batch

IGNORED = -100
"""Target where nothing is trained."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch as one Ulysses rank sees it. T = tokens of the whole pack with its padding, u = Ulysses size.

    Attributes:
        input_ids: [1, T/u] int64, this rank's stretch of the pack.
        position_ids: [1, T/u] int64, from 0 in each document.
        targets: [1, T/u] int64, the token to predict at each position (already shifted), or IGNORED.
        target_rows: [n] int64, the positions of this stretch that have a target; found here, where the CPU has the
            values, because finding them on a GPU would make the CPU wait for it.
        cu_seqlens: [documents + 1] int32, where documents begin in the whole pack, and T. Padding is the last document.
        document_lengths: tokens of each document, the padding's last.
        max_seqlen: tokens of the longest document.
        num_tokens: real tokens in the whole pack.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    target_rows: torch.Tensor
    cu_seqlens: torch.Tensor
    document_lengths: tuple[int, ...]
    max_seqlen: int
    num_tokens: int

    def to(self, device: torch.device | str) -> PackedBatch:
        """A copy on a device; from pinned memory it does not wait."""
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()})

    def pin_memory(self) -> PackedBatch:
        """A copy in page-locked memory, from which a GPU reads without the CPU's help."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def pack_rows(
    rows: Sequence[TokenRow], ulysses_size: int, ulysses_rank: int, pad_id: int, multiple: int = 1
) -> PackedBatch:
    """Concatenate rows and cut out one rank's stretch.

    Args:
        rows: documents of the pack; none gives padding alone, so that a rank without rows still takes part in every
            collective.
        ulysses_size: ranks that share the pack.
        ulysses_rank: which stretch.
        pad_id: any id of the vocabulary.
        multiple: each rank's tokens are padded to a multiple of this.
    """
    lengths = [len(row.ids) for row in rows]
    num_tokens = sum(lengths)
    unit = ulysses_size * multiple
    padding = -num_tokens % unit if rows else unit
    if padding:
        lengths.append(padding)
    total = num_tokens + padding

    input_ids = np.full(total, pad_id, dtype=np.int64)  # [T]
    position_ids = np.empty(total, dtype=np.int64)  # [T]
    targets = np.full(total, IGNORED, dtype=np.int64)  # [T]
    starts = np.zeros(len(lengths) + 1, dtype=np.int32)  # [documents + 1]
    np.cumsum(lengths, out=starts[1:])
    for start, length in zip(starts.tolist(), lengths, strict=False):
        position_ids[start : start + length] = np.arange(length)
    for start, row in zip(starts.tolist(), rows, strict=False):
        end = start + len(row.ids)
        input_ids[start:end] = row.ids
        # Shifted here, before the split: position t of a document predicts its token t + 1, its last one nothing.
        targets[start : end - 1] = np.where(row.trained[1:], row.ids[1:], IGNORED)

    share = total // ulysses_size
    mine = slice(ulysses_rank * share, (ulysses_rank + 1) * share)
    return PackedBatch(
        input_ids=_row_tensor(input_ids[mine]),
        position_ids=_row_tensor(position_ids[mine]),
        targets=_row_tensor(targets[mine]),
        target_rows=torch.from_numpy(np.flatnonzero(targets[mine] != IGNORED)),
        cu_seqlens=torch.from_numpy(starts),
        document_lengths=tuple(lengths),
        max_seqlen=max(lengths),
        num_tokens=num_tokens,
    )


def _row_tensor(values: Int64) -> torch.Tensor:
    # [T/u] -> [1, T/u]; a copy, so that the rest of the pack is freed.
    return torch.from_numpy(values.copy()).unsqueeze(0)


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step's share of a data-parallel rank.

    Attributes:
        step: from 0.
        epoch: from 0.
        row_ids: rows of the global batch, over all ranks.
        micro_batches: those of this rank; all ranks have equally many.
        num_targets: trained tokens of the global batch: the loss's divisor.
        num_tokens: real tokens of the global batch.
        sources: what the global batch takes of each named data set.
        padding: share of padding in the tokens that all ranks compute on.
        imbalance: share of time that ranks wait for one another, by the rows' costs.
    """

    step: int
    epoch: int
    row_ids: Int64
    micro_batches: list[PackedBatch]
    num_targets: int
    num_tokens: int
    sources: Mapping[str, SourceCounts] = field(default_factory=dict[str, SourceCounts])
    padding: float = 0.0
    imbalance: float = 0.0


class BatchLoader:
    """Makes the batches of coming steps on a thread, while the caller works on the present one."""

    def __init__(
        self,
        cache: Rows,
        order: StepRows,
        settings: PackSettings,
        *,
        dp_rank: int,
        dp_size: int,
        ulysses_rank: int,
        ulysses_size: int,
        pad_id: int,
        multiple: int = 1,
        prefetch: int = 2,
        pin_memory: bool | None = None,
    ) -> None:
        """Set up; nothing is read yet.

        Args:
            cache: the rows.
            order: which rows a step takes: ``RowOrder`` for training, ``FileOrder`` for validation.
            settings: how they become micro-batches.
            dp_rank: this rank's Ulysses group.
            dp_size: Ulysses groups.
            ulysses_rank: place in the group.
            ulysses_size: ranks of a group.
            pad_id: any id of the vocabulary.
            multiple: tokens of a rank are padded to a multiple of this.
            prefetch: steps that are made ahead, at least 1.
            pin_memory: page-locked memory; None = where there is a GPU.
        """
        self._cache = cache
        self._order = order
        self._settings = settings
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._ulysses_rank, self._ulysses_size = ulysses_rank, ulysses_size
        self._pad_id = pad_id
        self._multiple = multiple
        self._prefetch = max(1, prefetch)
        self._pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory

    def batch(self, step: int) -> StepBatch:
        """One step's batch, made here and now."""
        row_ids = self._order.rows(step)
        plan = plan_batch(self._cache.lengths, row_ids, self._dp_size, self._settings)
        padding, imbalance = self._waste(plan)
        return StepBatch(
            step=step,
            epoch=self._order.epoch(step),
            row_ids=row_ids,
            micro_batches=[self.pack(rows) for rows in plan[self._dp_rank]],
            num_targets=int(self._cache.targets[row_ids].sum(dtype=np.int64)),
            num_tokens=int(self._cache.lengths[row_ids].sum(dtype=np.int64)),
            sources=count_sources(self._cache, row_ids),
            padding=padding,
            imbalance=imbalance,
        )

    def _waste(self, plan: Plan) -> tuple[float, float]:
        """Share of padding, and of waiting, in a step of all ranks."""
        lengths = [[np.asarray(self._cache.lengths[np.array(ids, dtype=np.int64)]) for ids in rank] for rank in plan]
        real = np.array([[each.sum(dtype=np.int64) for each in rank] for rank in lengths])
        unit = self._ulysses_size * self._multiple
        computed = np.maximum(-(-real // unit), 1) * unit
        costs = np.array([[self._settings.cost(each).sum() for each in rank] for rank in lengths])
        return float(1 - real.sum() / computed.sum()), waited(costs)

    def steps(self, start_step: int, end_step: int) -> Generator[StepBatch, None, None]:
        """Batches of the steps from ``start_step`` up to, not including, ``end_step``.

        An error in the thread is raised here. Closing the generator, or leaving it to be collected, ends the thread.
        """
        ready: queue.Queue[StepBatch | BaseException] = queue.Queue(self._prefetch)
        closed = threading.Event()
        arguments = (start_step, end_step, ready, closed)
        thread = threading.Thread(target=self._produce, args=arguments, name="batches", daemon=True)
        thread.start()
        try:
            for _ in range(start_step, end_step):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            _drain(ready)
            thread.join()

    def pack(self, rows: Sequence[int]) -> PackedBatch:
        """Rows as one micro-batch, this rank's stretch of it."""
        tokens = [self._cache.row(row) for row in rows]
        packed = pack_rows(tokens, self._ulysses_size, self._ulysses_rank, self._pad_id, self._multiple)
        return packed.pin_memory() if self._pin_memory else packed

    def _produce(
        self, start: int, end: int, ready: queue.Queue[StepBatch | BaseException], closed: threading.Event
    ) -> None:
        for step in range(start, end):
            if closed.is_set():
                return
            try:
                item: StepBatch | BaseException = self.batch(step)
            except BaseException as error:  # it belongs to the caller, whatever it is
                item = error
            ready.put(item)
            if isinstance(item, BaseException):
                return


def _drain(ready: queue.Queue[Any]) -> None:
    """Make room, so that a thread that waits to put its batch goes on and sees that nobody wants it."""
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            return
