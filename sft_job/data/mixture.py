"""Several named data sets as one: a view over their token caches, and which rows an epoch takes of each.

An epoch is a list of entries, each used once. A set's entries are whole passes over its rows, and for the rest of its
share a stretch of one fixed permutation of them, which moves on from epoch to epoch: within an epoch no row comes up
more than once oftener than another, and over the epochs all rows come up equally often (within one). All of it is a
function of seed and epoch; ranks and batches play no part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sft_job.contract import ExitCode
from sft_job.data.cache import TokenCache, TokenRow
from sft_job.data.order import RowOrder
from sft_job.errors import Problem, raise_problems

Int64 = npt.NDArray[np.int64]


class Numbers(Protocol):
    """A number for each row, looked up for many rows at once; numpy arrays are such."""

    def __getitem__(self, rows: Int64, /) -> npt.NDArray[np.int32]:
        """Numbers of these rows."""
        ...

    def sum(self, *, dtype: Any = None) -> Any:
        """Their sum over all rows."""
        ...


class Rows(Protocol):
    """What training and validation need of their rows: a token cache, or a mixture of several."""

    @property
    def num_rows(self) -> int:
        """Usable rows."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of all that the rows, and how often they come up, depend on."""
        ...

    @property
    def lengths(self) -> Numbers:
        """Tokens of each row."""
        ...

    @property
    def targets(self) -> Numbers:
        """Trained tokens of each row."""
        ...

    def row(self, index: int) -> TokenRow:
        """Tokens of a row."""
        ...

    def origin(self, index: int) -> tuple[Path, int]:
        """File of a row, and its number there."""
        ...


@dataclass(frozen=True)
class MixedSet:
    """One set of a mixture.

    Attributes:
        name: its name.
        cache: its rows.
        weight: share of an epoch, in proportion to the other sets'; None = by ``repeat``.
        repeat: how often an epoch takes each row, where no set has a weight.
    """

    name: str
    cache: TokenCache
    weight: float | None = None
    repeat: float | None = None

    @property
    def fingerprint(self) -> str:
        """Of its rows, its weight and its repeat."""
        return f"{self.cache.fingerprint} weight={self.weight} repeat={self.repeat or 1}"


class Mixture:
    """Rows of several sets, numbered through in the order of the sets' names.

    Attributes:
        sets: by name.
        num_rows: usable rows of all sets.
        fingerprint: of every set's name, rows and share.
        lengths: tokens of each row.
        targets: trained tokens of each row.
        entries: rows that an epoch takes of each set; a row that comes up twice counts twice.
    """

    def __init__(self, sets: Sequence[MixedSet], option: str = "data.train_files") -> None:
        """Join sets; reads nothing.

        Args:
            sets: at least one; in any order.
            option: what names them, for messages.

        Raises:
            ProblemsError: exit 2, where a set's share of an epoch is no row at all.
        """
        self.sets = tuple(sorted(sets, key=lambda each: each.name))
        caches = [each.cache for each in self.sets]
        sizes = [cache.num_rows for cache in caches]
        self.num_rows = sum(sizes)
        self.lengths = JoinedNumbers([cache.lengths for cache in caches])
        self.targets = JoinedNumbers([cache.targets for cache in caches])
        # [sets + 1]: number of the first row of each set, and of all rows.
        self.starts: Int64 = np.cumsum([0, *sizes], dtype=np.int64)
        weighted = any(each.weight is not None for each in self.sets)
        if weighted:
            weights = [1.0 if each.weight is None else each.weight for each in self.sets]
            self.entries = weighted_entries(sizes, weights)
        else:
            self.entries = repeated_entries(sizes, [each.repeat or 1.0 for each in self.sets])
        parts = [(each.name, each.fingerprint, weighted) for each in self.sets]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        never = [each for each, count in zip(self.sets, self.entries, strict=True) if not count]
        raise_problems([_no_entry(each, option) for each in never])

    @property
    def names(self) -> tuple[str, ...]:
        """The sets' names; ``source`` gives places in it."""
        return tuple(each.name for each in self.sets)

    def __len__(self) -> int:
        return self.num_rows

    def row(self, index: int) -> TokenRow:
        """Tokens of a row, by its number from 0. Any thread may call this."""
        which, local = self._locate(index)
        return self.sets[which].cache.row(local)

    def origin(self, index: int) -> tuple[Path, int]:
        """Where a row came from: its file, and its number in that file from 0."""
        which, local = self._locate(index)
        return self.sets[which].cache.origin(local)

    def source(self, index: int) -> str:
        """Name of the set that a row belongs to."""
        return self.sets[self._locate(index)[0]].name

    def sources(self, rows: Int64) -> Int64:
        """Places in ``names`` of the sets that rows belong to: [rows] -> [rows]."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        return which, int(index - self.starts[which])


class JoinedNumbers:
    """Arrays one after the other, looked up as one without being copied: they are memory-mapped and shared."""

    def __init__(self, arrays: Sequence[npt.NDArray[np.int32]]) -> None:
        self._arrays = arrays
        self._starts = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: Int64) -> npt.NDArray[np.int32]:
        """Numbers of these rows: [rows] int64 -> [rows] int32."""
        numbers = np.empty(len(rows), dtype=np.int32)
        which = np.searchsorted(self._starts, rows, side="right") - 1
        for at in np.unique(which).tolist():
            mine = which == at
            numbers[mine] = self._arrays[at][rows[mine] - self._starts[at]]
        return numbers

    def sum(self, *, dtype: Any = np.int64) -> int:
        """Their sum."""
        return sum(int(array.sum(dtype=dtype)) for array in self._arrays)


def _no_entry(each: MixedSet, option: str) -> Problem:
    key = "weight" if each.weight is not None else "repeat"
    rule = f"is too small for an epoch to take a single one of this set's {each.cache.num_rows:,} rows"
    subject, value = f"{option}.{each.name}.{key}", each.weight or each.repeat
    return Problem(ExitCode.CONFIG, subject, rule, "raise it, or leave the set out", value)


def weighted_entries(sizes: Sequence[int], weights: Sequence[float]) -> tuple[int, ...]:
    """Entries of an epoch for each set where an epoch has as many as there are rows, shared out by weight."""
    exact = [_exact(weight) for weight in weights]
    return _whole_shares([Fraction(sum(sizes)) * weight / sum(exact) for weight in exact])


def repeated_entries(sizes: Sequence[int], repeats: Sequence[float]) -> tuple[int, ...]:
    """Entries of an epoch for each set where it takes each row of a set so many times."""
    return _whole_shares([size * _exact(repeat) for size, repeat in zip(sizes, repeats, strict=True)])


def _exact(number: float) -> Fraction:
    """The number as people wrote it: 0.1 is a tenth."""
    return Fraction(repr(float(number)))


def _whole_shares(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Whole numbers that add up to the rounded sum: the largest remainders are rounded up, among equals the first."""
    whole = [int(share) for share in shares]
    left = int(sum(shares) + Fraction(1, 2)) - sum(whole)
    by_remainder = sorted(range(len(shares)), key=lambda at: whole[at] - shares[at])
    for at in by_remainder[:left]:
        whole[at] += 1
    return tuple(whole)


class EpochEntries:
    """From an epoch's entries to row numbers: a function of seed and epoch.

    Entries are numbered through, set by set. Memory: one permutation for each set that is not taken in whole passes.
    """

    def __init__(self, seed: int, sizes: Sequence[int], entries: Sequence[int]) -> None:
        """Set up; permutations are made when they are needed.

        Args:
            seed: any integer; it counts modulo 2**64.
            sizes: rows of each set.
            entries: how many of an epoch's entries each set has.
        """
        self.count = sum(entries)
        self._seed = seed
        self._sizes = tuple(sizes)
        self._entries = tuple(entries)
        self._row_starts = np.cumsum([0, *sizes], dtype=np.int64)
        self._starts = np.cumsum([0, *entries], dtype=np.int64)
        self._permutations: dict[int, Int64] = {}

    def rows(self, epoch: int, entries: Int64) -> Int64:
        """Rows that entries of an epoch stand for: [entries] -> [entries], both numbered through over all sets."""
        rows = np.empty(len(entries), dtype=np.int64)
        which = np.searchsorted(self._starts, entries, side="right") - 1
        for at in np.unique(which).tolist():
            mine = which == at
            rows[mine] = self._set_rows(at, epoch, entries[mine] - self._starts[at]) + self._row_starts[at]
        return rows

    def _set_rows(self, at: int, epoch: int, entries: Int64) -> Int64:
        size = self._sizes[at]
        passes, rest = divmod(self._entries[at], size)
        rows = entries % size
        beyond = entries >= passes * size
        if rest and beyond.any():
            # Python's integers: after many epochs of a large set the product may not fit 64 bits.
            first = epoch * rest % size
            rows[beyond] = self._permutation(at)[(rows[beyond] + first) % size]
        return rows

    def _permutation(self, at: int) -> Int64:
        if at not in self._permutations:
            # A spawn key keeps the stream apart from that of every epoch's order.
            seed = np.random.SeedSequence(self._seed % 2**64, spawn_key=(at,))
            keys = np.asarray(np.random.PCG64(seed).random_raw(self._sizes[at]), dtype=np.uint64)
            self._permutations[at] = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
        return self._permutations[at]


def training_order(rows: Rows, seed: int, batch_size: int) -> RowOrder:
    """The order in which training sees rows: each once in an epoch, or as often as a mixture says."""
    if not isinstance(rows, Mixture):
        return RowOrder(seed, rows.num_rows, batch_size)
    entries = EpochEntries(seed, [each.cache.num_rows for each in rows.sets], rows.entries)
    return RowOrder(seed, entries.count, batch_size, entries.rows)


def named_caches(rows: Rows | None) -> dict[str, TokenCache]:
    """The caches behind rows, by name; a single one has an empty name."""
    if isinstance(rows, Mixture):
        return {each.name: each.cache for each in rows.sets}
    return {"": rows} if isinstance(rows, TokenCache) else {}


@dataclass(frozen=True)
class SourceCounts:
    """What a batch takes of one set: rows, real tokens, trained tokens."""

    rows: int
    tokens: int
    targets: int


def count_sources(rows: Rows, row_ids: Int64) -> dict[str, SourceCounts]:
    """What a batch takes of each set that it takes any row of; nothing where the sets have no names."""
    if not isinstance(rows, Mixture):
        return {}
    which = rows.sources(row_ids)
    lengths, targets = rows.lengths[row_ids].astype(np.int64), rows.targets[row_ids].astype(np.int64)
    counts: dict[str, SourceCounts] = {}
    for at in np.unique(which).tolist():
        mine = which == at
        counts[rows.sets[at].name] = SourceCounts(int(mine.sum()), int(lengths[mine].sum()), int(targets[mine].sum()))
    return counts
