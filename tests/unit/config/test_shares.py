"""What every GPU holds whole: by the setting, or by the memory there is."""

from __future__ import annotations

import pytest

from sft_job.config.shares import FROZEN_SHARE, GRADIENTS_SHARE, holds_frozen, sums_shards

GIB = 2**30


@pytest.mark.parametrize(
    ("setting", "size", "memory", "world", "whole"),
    [
        ("auto", 20 * GIB, 80 * GIB, 8, True),
        ("auto", 30 * GIB, 80 * GIB, 8, False),
        ("auto", 80 * GIB * FROZEN_SHARE, 80 * GIB, 8, False),
        ("auto", 1, None, 8, False),
        ("auto", 30 * GIB, 80 * GIB, 1, True),
        (True, 1, 80 * GIB, 8, False),
        (False, 79 * GIB, 80 * GIB, 8, True),
        (True, 1, None, 1, True),
    ],
)
def test_frozen_weights(setting: str | bool, size: float, memory: float | None, world: int, whole: bool) -> None:
    assert holds_frozen(setting, size, memory, world) is whole


@pytest.mark.parametrize(
    ("setting", "size", "memory", "shards", "alone"),
    [
        ("auto", 28.4 * GIB, 141 * GIB, 8, False),
        ("auto", 28.4 * GIB, 80 * GIB, 8, True),
        ("auto", 80 * GIB * GRADIENTS_SHARE, 80 * GIB, 8, False),
        ("auto", 1e12, None, 8, False),
        ("auto", 28.4 * GIB, 40 * GIB, 1, False),
        (True, 1, 80 * GIB, 2, True),
        (True, 1, None, 2, True),
        (True, 1, 80 * GIB, 1, False),
        (False, 79 * GIB, 80 * GIB, 8, False),
    ],
)
def test_accumulated_gradients(
    setting: str | bool, size: float, memory: float | None, shards: int, alone: bool
) -> None:
    assert sums_shards(setting, size, memory, shards) is alone
