"""Counts rows that equal an earlier row, by hashes of 128 bits, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

# 16 bytes a row, and about four times as much while they are sorted.
_ROWS_AT_ONCE = 1 << 22


def later_duplicates(path: Path, rows: int) -> npt.NDArray[np.int64]:
    """Numbers of the rows whose hash an earlier row has too, in no order.

    Args:
        path: [rows, 2] uint64 in a plain file.
        rows: how many it holds; beyond 4 million of them the file is read more than once.
    """
    if not rows:
        return np.zeros(0, dtype=np.int64)
    hashes = np.memmap(path, dtype=np.uint64, mode="r", shape=(rows, 2))
    # Equal hashes fall into the same share, and a hash falls into each with the same probability.
    shares = -(-rows // _ROWS_AT_ONCE)
    found = [_of_share(hashes, share, shares) for share in range(shares)]
    return np.concatenate(found)


def _of_share(hashes: npt.NDArray[np.uint64], share: int, shares: int) -> npt.NDArray[np.int64]:
    numbers: list[npt.NDArray[np.int64]] = []
    for first in range(0, len(hashes), _ROWS_AT_ONCE):
        chunk = hashes[first : first + _ROWS_AT_ONCE, 0]
        numbers.append(first + np.flatnonzero(chunk % np.uint64(shares) == share))
    mine = np.concatenate(numbers)
    keys = np.asarray(hashes[mine])
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal hashes the earliest row comes first
    keys, mine = keys[order], mine[order]
    return mine[1:][(keys[1:] == keys[:-1]).all(axis=1)]
