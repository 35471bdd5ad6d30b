"""Which rows each optimizer step trains on: pure functions of seed, step, number of rows and batch size.

World size plays no part, so a run that goes on with another number of ranks sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

RowIds = npt.NDArray[np.int64]


class StepRows(Protocol):
    """What a loader asks an order for. Steps and epochs count from 0."""

    def rows(self, step: int) -> RowIds:
        """Row ids of a step's global batch."""
        ...

    def epoch(self, step: int) -> int:
        """Epoch that a step belongs to."""
        ...


def epoch_order(seed: int, epoch: int, num_rows: int) -> RowIds:
    """The permutation of all row ids in which an epoch sees them.

    Rows are sorted by random keys that come straight from the bit generator: numpy promises its stream for good, but
    not that of ``Generator.permutation``, and a run may go on after numpy was upgraded.

    Args:
        seed: any integer; it counts modulo 2**64.
        epoch: from 0.
        num_rows: rows in an epoch.

    Returns:
        [num_rows] int64.
    """
    generator = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch]))
    keys = np.asarray(generator.random_raw(num_rows), dtype=np.uint64)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Optimizer steps of an epoch; the last one may be smaller than the others."""
    if num_rows < 1 or batch_size < 1:
        raise ValueError(f"needs rows and a batch size of at least 1, got {num_rows} and {batch_size}")
    return -(-num_rows // batch_size)


def step_rows(seed: int, step: int, num_rows: int, batch_size: int) -> tuple[int, RowIds]:
    """Epoch and row ids of one optimizer step, all counted from 0."""
    order = RowOrder(seed, num_rows, batch_size)
    return order.epoch(step), order.rows(step)


class RowOrder:
    """``step_rows`` for many steps: keeps the permutation of the last epoch that was asked for. For one thread.

    Attributes:
        steps_per_epoch: optimizer steps of an epoch.
    """

    def __init__(
        self, seed: int, num_rows: int, batch_size: int, rows_of: Callable[[int, RowIds], RowIds] | None = None
    ) -> None:
        """Set up; the first permutation is made when it is asked for.

        Args:
            seed: any integer.
            num_rows: entries of an epoch.
            batch_size: entries of a step.
            rows_of: from an epoch and some of its entries to the rows that these stand for; None = the entries are the
                rows.
        """
        self.seed = seed
        self.rows_of = rows_of
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch(num_rows, batch_size)
        self._epoch = -1
        self._permutation: RowIds = np.empty(0, dtype=np.int64)

    def epoch(self, step: int) -> int:
        """Epoch that a step belongs to."""
        return step // self.steps_per_epoch

    def rows(self, step: int) -> RowIds:
        """Row ids of a step's global batch, in the order of the epoch's permutation."""
        epoch = self.epoch(step)
        if epoch != self._epoch:
            self._permutation = epoch_order(self.seed, epoch, self.num_rows)
            self._epoch = epoch
        first = step % self.steps_per_epoch * self.batch_size
        entries = self._permutation[first : first + self.batch_size]
        return entries if self.rows_of is None else self.rows_of(epoch, entries)


class FileOrder:
    """Rows as they stand in the files, once: the order of a validation.

    Attributes:
        steps_per_epoch: batches that hold every row once.
    """

    def __init__(self, num_rows: int, batch_size: int) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch(num_rows, batch_size)

    def epoch(self, step: int) -> int:
        """Always the first."""
        del step
        return 0

    def rows(self, step: int) -> RowIds:
        """Row ids of a batch; none past the end."""
        first = step * self.batch_size
        return np.arange(first, max(first, min(first + self.batch_size, self.num_rows)), dtype=np.int64)
