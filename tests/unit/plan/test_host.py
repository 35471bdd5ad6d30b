"""Host memory as part of the verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sft_job.plan.activations import OFFLOAD
from sft_job.plan.estimate import FITS, TOO_LARGE
from sft_job.plan.footprint import STATE_COPY
from sft_job.plan.prices import Case, longest_that_fits, smallest_change
from sft_job.plan.setup import GIB
from tests.unit.plan.cases import case

LONG = (524_288,)


def on(one: Case, gib: float | None) -> Case:
    return replace(one, ranks=replace(one.ranks, host=None if gib is None else gib * GIB))


def test_half_a_million_tokens_on_a_host_of_128_gib() -> None:
    """Inputs fit where the checkpoint's copy is given up."""
    free, short = (on(case(lengths=LONG), gib).estimate() for gib in (None, 128))
    assert free.memory.host_bytes / GIB == pytest.approx(142.1, abs=1)
    assert STATE_COPY in free.memory.host
    assert short.verdict == free.verdict
    assert STATE_COPY not in short.memory.host
    assert short.memory.host_bytes < 0.92 * 128 * GIB


@pytest.mark.parametrize("changes", [{}, {"model.recompute": "offload"}])
def test_what_the_host_cannot_hold_does_not_fit(changes: dict) -> None:
    found = on(case(lengths=LONG, **changes), 64).estimate(timed=False)
    assert found.verdict == TOO_LARGE
    assert on(case(lengths=LONG, **changes), 160).estimate(timed=False).verdict != TOO_LARGE


def test_auto_sends_as_many_inputs_out_as_there_is_room_for() -> None:
    """As the run does."""
    one = case(lengths=(196_608,))
    every, some, none = (on(one, gib).estimate(timed=False) for gib in (None, 30, 6))
    counts = [found.memory.levels.count(OFFLOAD) for found in (every, some, none)]
    assert counts[0] == one.shape.layers - 1 > counts[1] > counts[2] == 0
    assert every.least < some.least < none.least
    assert some.memory.host_bytes <= 0.95 * 30 * GIB


def test_the_longest_document_is_one_that_the_host_holds() -> None:
    one = case(lengths=(131_072,))
    longest = [longest_that_fits(on(one, gib)) or 0 for gib in (None, 128, 48)]
    assert longest[2]
    assert longest[0] >= longest[1] > longest[2]


def test_a_remedy_needs_no_more_than_the_host_has() -> None:
    """A 7B's states in host memory of one A100 take 104 GiB and more."""
    one = case(card="a100", lengths=(131_072,))
    offload = "model.fsdp_config.cpu_offload"
    free = smallest_change(one)
    assert free is not None
    assert offload in free.changes
    held = on(one, 64)
    remedy = smallest_change(held)
    assert remedy is not None
    assert offload not in remedy.changes
    assert remedy.found.verdict == FITS
    assert remedy.found.memory.host_bytes < 64 * GIB
