"""The largest micro-batch that a run can meet, from the lengths of its rows. Pure, like ``packing``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sft_job.data.packing import PackSettings, plan_batch

_TRIED = 64


def heaviest_rows(lengths: npt.NDArray[np.int32], settings: PackSettings, batch_rows: int) -> list[int]:
    """Rows of the largest micro-batch that a step could meet; with a limit of tokens, of about the largest.

    Args:
        lengths: tokens of every row, by row id.
        settings: how rows become micro-batches.
        batch_rows: rows of a global batch.

    Returns:
        Row ids, the longest first.
    """
    ascending = np.argsort(lengths, kind="stable")
    most = min(batch_rows, len(lengths), 1 if not settings.pack else settings.rows or len(lengths))
    if settings.tokens is None:
        return ascending[::-1][:most].tolist()
    sizes = lengths[ascending].astype(np.int64)
    if sizes[-1] >= settings.tokens:
        return [int(ascending[-1])]
    fills = [_fill(sizes, start, settings.tokens, most) for start in _starts(sizes)]
    return ascending[max(fills, key=lambda places: int(sizes[places].sum()))].tolist()


def _starts(sizes: npt.NDArray[np.int64]) -> list[int]:
    """The last place of each of the largest sizes: the fullest pack need not hold the longest row."""
    return (np.searchsorted(sizes, np.unique(sizes)[-_TRIED:], side="right") - 1).tolist()


def _fill(sizes: npt.NDArray[np.int64], start: int, room: int, most: int) -> list[int]:
    """Places of a pack: from ``start`` downwards, each time the largest size that still fits."""
    places: list[int] = []
    place = start + 1
    while len(places) < most:
        place = min(place, int(np.searchsorted(sizes, room, side="right"))) - 1
        if place < 0:
            break
        places.append(place)
        room -= int(sizes[place])
    return places


def accumulates(lengths: npt.NDArray[np.int32], settings: PackSettings, batch_rows: int, dp_size: int) -> bool:
    """Whether a step can have more than one micro-batch: gradients then wait for the last one, unsharded."""
    longest = np.argsort(lengths, kind="stable")[-batch_rows:]
    return len(plan_batch(lengths, longest, dp_size, settings)[0]) > 1
