"""The tokens that all sides of a row train on: drawn once, the same rows in the same steps for everyone.

Ids follow a distribution like that of words (the k-th id has a weight of about 1/k), and every second token follows
from the one before it, so that there is something to learn and losses say whether two sides train alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sft_job.data.order import RowOrder

SEED = 1
"""Of the rows, and ``trainer.seed`` of the job, whose row order the file is arranged for."""
_SHORTEST = 16
_SPREAD = 1.0  # of a lognormal: with a median of 2,048 tokens one row in 360 reaches 32,768
_SMALLER = 64
_FRESH_WEIGHT = 20  # the weight of the k-th id is 1 / (k + this)

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tokens:
    """The rows of a step.

    Attributes:
        rows: rows of a global batch.
        length: tokens of each; of rows of mixed lengths: of the longest that may come.
        total: tokens of a step where lengths are mixed, exactly; 0 = all rows have ``length`` tokens.
        median: of mixed lengths, about.
    """

    rows: int
    length: int
    total: int = 0
    median: int = 0

    @property
    def of_step(self) -> int:
        """Tokens of a step, the same in every step."""
        return self.total or self.rows * self.length

    def tiny(self) -> Tokens:
        """The same with rows of a 64th of the length, for trying the scripts on a CPU."""
        return replace(
            self, length=self.length // _SMALLER, total=self.total // _SMALLER, median=self.median // _SMALLER
        )

    def lengths(self, steps: int) -> list[list[int]]:
        """Tokens of each row of each step."""
        if not self.total:
            return [[self.length] * self.rows for _ in range(steps)]
        random = np.random.default_rng(SEED)
        return [self._mixed(random) for _ in range(steps)]

    def _mixed(self, random: np.random.Generator) -> list[int]:
        shortest = min(_SHORTEST, self.total // self.rows)
        drawn = self.median * np.exp(_SPREAD * random.standard_normal(self.rows))
        scaled = drawn * (self.total / drawn.clip(shortest, self.length).sum())
        lengths = scaled.clip(shortest, self.length).astype(np.int64)
        # What rounding and the limits left over is spread over the rows in turn.
        missing = self.total - int(lengths.sum())
        while missing:
            room = (self.length - lengths if missing > 0 else lengths - shortest).clip(0)
            open_rows = np.flatnonzero(room)
            if not len(open_rows):
                raise ValueError(
                    f"{self.rows} rows of {shortest} to {self.length} tokens cannot be {self.total} tokens"
                )
            share = max(1, abs(missing) // len(open_rows))
            for row in open_rows.tolist():
                moved = min(share, int(room[row]), abs(missing))
                lengths[row] += moved if missing > 0 else -moved
                missing -= moved if missing > 0 else -moved
        return lengths.tolist()


def draw_ids(lengths: list[int], vocabulary: int, random: np.random.Generator) -> list[Ids]:
    """Ids of some rows."""
    weights = 1.0 / (np.arange(vocabulary) + _FRESH_WEIGHT)
    edges = np.cumsum(weights / weights.sum())
    names = np.random.default_rng(SEED).permutation(vocabulary).astype(np.int32)
    follower = np.random.default_rng(SEED + 1).permutation(vocabulary).astype(np.int32)
    rows: list[Ids] = []
    for length in lengths:
        ids = names[np.searchsorted(edges, random.random(length)).clip(0, vocabulary - 1)]
        ids[1::2] = follower[ids[: length - 1 : 2]]
        rows.append(ids)
    return rows


def write_tokens(path: Path, tokens: Tokens, vocabulary: int, steps: int) -> Path:
    """Write the rows of so many steps so that the job's row order takes them step by step; keeps a file that is there.

    Args:
        path: parquet file with a column ``input_ids``.
        tokens: what a step holds.
        vocabulary: ids are below this.
        steps: of the run.
    """
    if path.is_file():
        return path
    by_step = tokens.lengths(steps)
    random = np.random.default_rng(SEED)
    drawn = [row for lengths in by_step for row in draw_ids(lengths, vocabulary, random)]
    places = step_order(len(drawn), tokens.rows)
    rows: list[Ids] = [drawn[0]] * len(drawn)
    for place, row in zip(places.tolist(), drawn, strict=True):
        rows[place] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
    draft = path.with_suffix(".draft")
    pq.write_table(pa.table({"input_ids": column}), draft, row_group_size=1024)
    draft.replace(path)
    return path


def step_order(num_rows: int, batch_rows: int) -> npt.NDArray[np.int64]:
    """Places in the file in the order in which the job's steps take them, [num_rows]."""
    order = RowOrder(SEED, num_rows, batch_rows)
    return np.concatenate([order.rows(step) for step in range(order.steps_per_epoch)])


def read_in_step_order(path: Path, batch_rows: int) -> pa.Table:
    """The file's rows in the order in which the job trains on them."""
    table = pq.read_table(path)
    return table.take(pa.array(step_order(table.num_rows, batch_rows)))
