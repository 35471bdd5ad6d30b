"""Spreads the rows of a global batch over data-parallel ranks and micro-batches. Pure: every rank computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sft_job.config.schema import JobConfig
from sft_job.data.evening import Limits, even_out

Floats = npt.NDArray[np.float64]
Plan = list[list[list[int]]]
"""[data-parallel rank][micro-batch] -> row ids."""


@dataclass(frozen=True)
class PackSettings:
    """How rows become micro-batches.

    Attributes:
        rows: most rows in a micro-batch; None = any number.
        tokens: most tokens in a micro-batch, but a longer row goes alone; None = any number.
        pack: several rows may share a forward pass; False = one row each.
        linear: cost of a token apart from attention.
        quadratic: cost of a pair of tokens in attention, in the same unit. The default is that of a decoder with a
            hidden size of 4,096: with causal attention, both costs are equal at about 12 times the hidden size.
    """

    rows: int | None = None
    tokens: int | None = None
    pack: bool = True
    linear: float = 1.0
    quadratic: float = 1.0 / (12 * 4096)

    def cost(self, lengths: npt.NDArray[Any]) -> Floats:
        """Estimated cost of rows: linear * length + quadratic * length**2."""
        exact = lengths.astype(np.float64)
        return self.linear * exact + self.quadratic * exact * exact


def pack_settings(config: JobConfig) -> PackSettings:
    """The settings that a config asks for."""
    if config.data.use_dynamic_bsz:
        tokens = config.data.max_token_len_per_gpu * config.ulysses_sequence_parallel_size
        return PackSettings(tokens=tokens, pack=config.use_remove_padding)
    return PackSettings(rows=config.data.micro_batch_size_per_gpu, pack=config.use_remove_padding)


class Lengths(Protocol):
    """Tokens of each row, looked up for many rows at once; an array, or several that stand for one."""

    def __getitem__(self, rows: npt.NDArray[np.int64], /) -> npt.NDArray[np.int32]:
        """Lengths of these rows."""
        ...


def plan_batch(
    lengths: Lengths, rows: Sequence[int] | npt.NDArray[np.int64], dp_size: int, settings: PackSettings
) -> Plan:
    """Give each row of a global batch to a rank and a micro-batch.

    All ranks together work on ``dp_size`` micro-batches at a time, and as few times as the limits allow. The rows go,
    the costliest first, each to the micro-batch that costs least so far and has room; then rows move and change places
    between micro-batches where all ranks would wait less for one another. The micro-batches are dealt out by their
    cost: at the same time all ranks work on alike ones, the costliest first, and their sums are alike.

    Args:
        lengths: tokens of every row, by row id.
        rows: row ids of the global batch.
        dp_size: data-parallel ranks (Ulysses groups).
        settings: limits and costs.

    Returns:
        [rank][micro-batch] -> row ids, in the order of ``rows``. Every rank has the same number of micro-batches, some
        of them empty where rows are few.
    """
    if not len(rows):
        return [[] for _ in range(dp_size)]
    batch_lengths = np.asarray(lengths[np.asarray(rows)], dtype=np.int64)
    costs = settings.cost(batch_lengths)
    most_rows = 1 if not settings.pack else settings.rows or len(rows)
    if settings.tokens is None:
        num_bins = _round_up(_ceil(len(rows), most_rows), dp_size)
        full: list[list[int]] = []
    else:
        full = _first_fit(batch_lengths, most_rows, settings.tokens)
        num_bins = _round_up(len(full), dp_size)
    limits = Limits(batch_lengths, costs, most_rows, settings.tokens or int(batch_lengths.sum()))
    # Where the budget is so tight that even costs leave no room for some row, the bins filled to the brim stand.
    bins = _fill(limits, num_bins) or full
    bins += [[] for _ in range(num_bins - len(bins))]
    bins = even_out(bins, dp_size, limits)
    return _deal([[int(rows[place]) for place in sorted(places)] for places in bins], _bin_costs(bins, costs), dp_size)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _round_up(count: int, size: int) -> int:
    return _ceil(count, size) * size


def _first_fit(lengths: npt.NDArray[np.int64], most_rows: int, most_tokens: int) -> list[list[int]]:
    """As few bins as first-fit finds, the longest rows first; a row longer than the budget has one for itself."""
    bins: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)  # tokens that still fit; 0 for bins that are full or not begun
    for place in np.argsort(-lengths, kind="stable").tolist():
        chosen = int(np.argmax(room >= lengths[place]))
        if room[chosen] < lengths[place]:
            chosen = len(bins)
            bins.append([])
            room[chosen] = most_tokens
        bins[chosen].append(place)
        room[chosen] = room[chosen] - lengths[place] if len(bins[chosen]) < most_rows else 0
    return bins


def _fill(limits: Limits, num_bins: int) -> list[list[int]] | None:
    """Greedy, longest processing time first; None where a row finds no bin with room. Ties go to the first."""
    lengths, costs, most_rows, most_tokens = limits.lengths, limits.costs, limits.rows, limits.tokens
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    bin_costs = np.zeros(num_bins)
    bin_rows = np.zeros(num_bins, dtype=np.int64)
    bin_tokens = np.zeros(num_bins, dtype=np.int64)
    for place in np.argsort(-costs, kind="stable").tolist():
        has_room = (bin_rows == 0) | ((bin_rows < most_rows) & (bin_tokens + lengths[place] <= most_tokens))
        chosen = int(np.argmin(np.where(has_room, bin_costs, np.inf)))
        if not has_room[chosen]:
            return None
        bins[chosen].append(place)
        bin_costs[chosen] += costs[place]
        bin_rows[chosen] += 1
        bin_tokens[chosen] += lengths[place]
    return bins


def _bin_costs(bins: list[list[int]], costs: Floats) -> list[float]:
    return [float(costs[places].sum()) for places in bins]


def _deal(bins: list[list[int]], costs: list[float], dp_size: int) -> Plan:
    """Round by round, the costliest bins first; in a round the costliest goes to the rank that has least so far."""
    plan: Plan = [[] for _ in range(dp_size)]
    sums = [0.0] * dp_size
    order = sorted(range(len(bins)), key=lambda number: -costs[number])
    for first in range(0, len(order), dp_size):
        ranks = sorted(range(dp_size), key=lambda rank: sums[rank])
        for rank, number in zip(ranks, order[first : first + dp_size], strict=True):
            plan[rank].append(bins[number])
            sums[rank] += costs[number]
    return plan
