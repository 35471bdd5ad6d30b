"""Evens out micro-batches that ranks work on at the same time. Pure: every rank computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bins = list[list[int]]
"""Micro-batches: places of their rows in the batch."""

_EVEN = 1e-3
"""Share of its costliest micro-batch that a round may be uneven by: less is lost in the measured prices anyway."""
_CHANGES = 40
"""Changes for each micro-batch after which a round is left as it is."""
_LOOKED_AT = 64
"""Rows of a micro-batch that are tried against those of another, spread over its costs."""


@dataclass(frozen=True)
class Limits:
    """What micro-batches are made of, and how much one takes.

    Attributes:
        lengths: tokens of each row of the batch.
        costs: of each row.
        rows: most rows in a micro-batch.
        tokens: most tokens in one; a longer row goes alone.
    """

    lengths: Ints
    costs: Floats
    rows: int
    tokens: int


def even_out(bins: Bins, at_once: int, limits: Limits) -> Bins:
    """Move and swap rows so that less time is waited.

    ``at_once`` micro-batches are computed at the same time, alike ones by their cost, and take as long as the
    costliest. Where that is one long row, its companions are filled up to it, so that later rounds have less left.

    Args:
        bins: the micro-batches, a multiple of ``at_once`` of them, within the limits.
        at_once: data-parallel ranks.
        limits: of each.

    Returns:
        As many, in the order of their cost, whose rounds take no longer in sum.
    """
    if at_once == 1:
        return bins
    state = _Evening([list(rows) for rows in bins], limits)
    best, least = state.copy(), state.taken(at_once)
    for first in range(0, len(bins), at_once):
        order = state.order()
        state.even(order[first : first + at_once])
        if first + at_once < len(bins):
            state.fill_up(order[first : first + at_once], order[first + at_once :])
            state.even(order[first + at_once :])
        taken = state.taken(at_once)
        if taken < least:
            best, least = state.copy(), taken
    state = _Evening(best, limits)
    order = state.order()
    for first in range(0, len(bins), at_once):
        state.even(order[first : first + at_once])
    return [state.bins[number] for number in state.order()]


class _Evening:
    """Micro-batches on the way, with their sums."""

    def __init__(self, bins: Bins, limits: Limits) -> None:
        self.bins = bins
        self._limits = limits
        self._costs = np.array([limits.costs[rows].sum() for rows in bins])
        self._tokens = np.array([limits.lengths[rows].sum() for rows in bins], dtype=np.int64)

    def copy(self) -> Bins:
        return [list(rows) for rows in self.bins]

    def order(self) -> list[int]:
        return np.argsort(-self._costs, kind="stable").tolist()

    def taken(self, at_once: int) -> float:
        """Sum of what each round waits for."""
        return float(np.sort(self._costs)[::-1][::at_once].sum())

    def even(self, numbers: list[int]) -> None:
        """Bring the costliest of these micro-batches down, change by change, as far as it goes."""
        for _ in range(_CHANGES * len(numbers)):
            ordered = sorted(numbers, key=lambda number: self._costs[number])
            top = ordered[-1]
            if self._costs[top] - self._costs[ordered[0]] <= _EVEN * self._costs[top]:
                return
            if not any(self._relieve(top, other) for other in ordered[:-1]):
                return

    def _relieve(self, top: int, other: int) -> bool:
        """Move a row of ``top`` to ``other``, or swap two, so that both are as alike as one change makes them."""
        gap = self._costs[top] - self._costs[other]
        if gap <= 0 or not self.bins[top]:
            return False
        limits = self._limits
        mine, theirs = self._looked_at(top), self._looked_at(other)
        # The last column is nothing: a move.
        cost = limits.costs[mine][:, None] - np.append(limits.costs[theirs], 0.0)[None]
        length = limits.lengths[mine][:, None] - np.append(limits.lengths[theirs], 0)[None]
        allowed = (cost > 0) & (cost < gap * (1 - 1e-9))
        allowed &= self._tokens[other] + length <= limits.tokens
        allowed &= self._tokens[top] - length <= limits.tokens
        if len(self.bins[other]) >= limits.rows:
            allowed[:, -1] = False
        if not allowed.any():
            return False
        best = int(np.argmin(np.where(allowed, np.abs(cost - gap / 2), np.inf)))
        row, column = divmod(best, cost.shape[1])
        self._move(int(mine[row]), top, other)
        if column < len(theirs):
            self._move(int(theirs[column]), other, top)
        return True

    def fill_up(self, round_: list[int], later: list[int]) -> None:
        """Give the companions of the round's costliest micro-batch what still fits beside it, of later rounds' rows."""
        limits = self._limits
        most = self._costs[round_].max()
        owners = {place: number for number in later for place in self.bins[number]}
        places = sorted(owners, key=lambda place: (-limits.costs[place], place))
        costs = limits.costs[places]
        for at, place in enumerate(places):
            room = (most - self._costs[round_]).max()
            if room < costs[-1]:
                return
            if costs[at] > room:
                continue
            for number in sorted(round_, key=lambda number: self._costs[number]):
                fits = self._costs[number] + costs[at] <= most and len(self.bins[number]) < limits.rows
                if fits and self._tokens[number] + limits.lengths[place] <= limits.tokens:
                    self._move(place, owners[place], number)
                    break

    def _looked_at(self, number: int) -> Ints:
        rows = np.array(self.bins[number], dtype=np.int64)
        if len(rows) <= _LOOKED_AT:
            return rows
        rows = rows[np.argsort(self._limits.costs[rows], kind="stable")]
        return rows[np.linspace(0, len(rows) - 1, _LOOKED_AT).astype(np.int64)]

    def _move(self, place: int, source: int, target: int) -> None:
        self.bins[source].remove(place)
        self.bins[target].append(place)
        for number, sign in ((source, -1), (target, 1)):
            self._costs[number] += sign * self._limits.costs[place]
            self._tokens[number] += sign * self._limits.lengths[place]


def waited(costs: npt.NDArray[Any]) -> float:
    """Share of time that ranks wait for one another: what the rounds' costliest take over an even share, less 1.

    Args:
        costs: [rank, round]; ranks meet in every round, because weights are gathered by all.
    """
    even = costs.mean(axis=0).sum()
    return float(costs.max(axis=0).sum() / even - 1) if even else 0.0
