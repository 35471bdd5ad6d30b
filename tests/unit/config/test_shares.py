"""What every GPU holds whole: by the setting, or by the memory there is."""

from __future__ import annotations

import pytest

from sft_job.config import shares
from sft_job.config.shares import (
    FROZEN_SHARE,
    GRADIENTS_SHARE,
    holds_frozen,
    recovers,
    sums_shards,
    torch_resets,
)

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


@pytest.mark.parametrize(("world", "managed", "resets", "wanted"), [
    (1, True, True, True), (1, True, False, False), (1, False, False, True), (2, False, True, False),
])  # fmt: skip
def test_who_goes_on_after_memory_ran_out(world, managed, resets, wanted) -> None:
    assert recovers(world, managed=managed, resets=resets) is wanted


@pytest.mark.parametrize(("version", "wanted"), [("2.11.1+cu130", False), ("2.13.0", True), ("3.0.0a0", True)])
def test_which_torch_resets_fsdp(version, wanted, monkeypatch) -> None:
    monkeypatch.setattr(shares, "version", lambda _: version)
    assert torch_resets() is wanted


def test_it_is_what_this_torch_says() -> None:
    from torch.distributed.fsdp import FSDPModule

    assert torch_resets() is hasattr(FSDPModule, "reset_iter_state")
