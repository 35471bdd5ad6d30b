"""How much host memory blocks' inputs take, and what is said where it is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.host import HostNeed, host_need, offload_text
from sft_job.model.recompute import Recompute

GIB = 2**30


def need_of(tokens: int, ulysses: int, monkeypatch: pytest.MonkeyPatch, ranks: int) -> HostNeed:
    config: Any = JobConfig()
    config.ulysses_sequence_parallel_size = ulysses
    model = SimpleNamespace(hidden_size=3584, num_hidden_layers=28)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    return host_need(config, SimpleNamespace(get_text_config=lambda: model), torch.bfloat16, tokens)


@pytest.mark.parametrize(("tokens", "ulysses", "ranks", "gib"), [
    (524_288, 1, 1, 94.5), (131_072, 1, 1, 23.625), (131_072, 2, 2, 23.625), (1_048_576, 2, 2, 189.0),
])  # fmt: skip
def test_a_7b(tokens, ulysses, ranks, gib, monkeypatch) -> None:
    """27 inputs of 7,168 bytes a token: no copy is held twice, and nothing is rounded up to a power of two."""
    assert need_of(tokens, ulysses, monkeypatch, ranks).node_bytes == gib * GIB


def test_a_host_with_128_gib_holds_half_a_million_tokens(monkeypatch) -> None:
    need_of(524_288, 1, monkeypatch, 1).check(120 * GIB)
    with pytest.raises(JobError, match=r"27 blocks at 524,288 tokens .* 94\.5 GiB .* 90\.0 GiB left") as caught:
        need_of(524_288, 1, monkeypatch, 1).check(90 * GIB)
    assert caught.value.code is ExitCode.OUT_OF_MEMORY
    need_of(524_288, 1, monkeypatch, 1).check(None)


@given(st.integers(1, 2**32), st.integers(0, 80), st.integers(1, 8), st.integers(0, 2**40))
def test_blocks_that_fit(size: int, blocks: int, ranks: int, room: int) -> None:
    found = HostNeed(size, blocks, ranks, 1, 2).blocks_within(room)
    assert found <= blocks
    assert found * size * ranks <= room
    assert found == blocks or (found + 1) * size * ranks > 0.94 * room - 1


def test_the_line_for_the_log() -> None:
    need = HostNeed(GIB, 3, 2, 1, 2)
    plan = [Recompute.OFFLOAD] * 2 + [Recompute.FULL] * 2
    text = offload_text(plan, need, 4, 0)
    assert text == (
        "offload: the inputs of 2 of 4 blocks wait in host memory: 2.0 GiB for each rank, 4.0 GiB on a node of 2"
    )
    assert offload_text([Recompute.FULL], need, 0, 0) == ""


def test_what_stayed_is_not_said_to_have_gone() -> None:
    need, plan = HostNeed(GIB, 3, 2, 1, 2), [Recompute.OFFLOAD] * 2 + [Recompute.FULL] * 2
    assert "of 0 of 4 blocks wait in host memory: 0.0 GiB" in offload_text(plan, need, 0, 2)
    assert "of 1 of 4 blocks" in (text := offload_text(plan, need, 2, 2))
    assert "those of 1 more stay on the device" in text
