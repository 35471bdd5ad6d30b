"""How much is recomputed: by the memory that was measured, and by what happens when that was wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sft_job import fitting
from sft_job.fitting import Attempt, Guess, Room, Trial, fit_recompute, least_recompute, plan_text, probe_plan, trials
from sft_job.metrics.meters import GIB
from sft_job.model.attention.choose import BACKENDS
from sft_job.model.blocks import Blocks
from sft_job.model.offload import InputStore
from sft_job.model.recompute import Recompute

NONE, ATTENTION, FULL, OFFLOAD = Recompute
SIZES = st.integers(0, 400)


@st.composite
def rooms(draw: st.DrawFn) -> Room:
    """Blocks keep more the less they recompute; what the probe needed is in its peak."""
    full, more, most = draw(SIZES), draw(SIZES), draw(SIZES)
    blocks = draw(st.integers(2, 40))
    peak = draw(st.integers(0, 3000)) + blocks * full + 2 * more + most
    return Room(blocks, draw(st.integers(0, 30000)), peak, full, full + more, full + more + most)


def needed(room: Room, plan: list[Recompute]) -> int:
    """Peak of a plan: that of the probe, with other blocks kept."""
    size = {FULL: room.full, ATTENTION: room.attention, NONE: room.none}
    return room.peak + sum(size[kind] for kind in plan) - sum(size[kind] for kind in probe_plan(room.blocks))


@given(rooms())
def test_a_plan_is_within_the_limit_and_none_that_keeps_more_is(room: Room) -> None:
    plan = least_recompute(room)
    assert len(plan) == room.blocks
    assert plan == sorted(plan, key=[FULL, ATTENTION, NONE].index), "the last blocks keep most"
    assert not (FULL in plan and NONE in plan), "attention first"
    if plan != [FULL] * room.blocks:
        assert needed(room, plan) <= room.limit
    if FULL in plan:
        kept = plan.count(ATTENTION) + 1
        assert needed(room, [FULL] * (room.blocks - kept) + [ATTENTION] * kept) > room.limit
    elif ATTENTION in plan:
        kept = plan.count(NONE) + 1
        assert needed(room, [ATTENTION] * (room.blocks - kept) + [NONE] * kept) > room.limit


@given(rooms(), st.integers(0, 5000))
def test_more_memory_never_recomputes_more(room: Room, more: int) -> None:
    before, after = least_recompute(room), least_recompute(replace(room, limit=room.limit + more))
    for kinds in ((NONE,), (NONE, ATTENTION)):
        assert sum(kind in kinds for kind in after) >= sum(kind in kinds for kind in before)


@given(st.integers(2, 60))
def test_the_probe_has_every_kind_and_keeps_little(blocks: int) -> None:
    plan = probe_plan(blocks)
    assert len(plan) == blocks
    assert (plan.count(NONE), plan.count(ATTENTION)) == (1, 1)


def test_the_line_for_the_log() -> None:
    text = plan_text((FULL, FULL, ATTENTION, NONE), int(1.5 * GIB), 80 * GIB)
    assert text == "recomputation of 4 blocks: 1 nothing, 1 all but attention, 2 all; peak 1.5 of 80.0 GiB"
    assert "2 nothing; peak" in plan_text((NONE, NONE), GIB, GIB)


@dataclass
class Card:
    """A device whose memory is counted here: blocks take what their plan says, a rehearsal takes the rest."""

    size: int
    weights: int = 100
    keeps: dict[Recompute, int] = field(default_factory=lambda: {OFFLOAD: 0, FULL: 10, ATTENTION: 20, NONE: 50})
    pieces: int = 0
    """Memory lost between tensors wherever more than blocks' inputs is kept: the measure does not know of it."""
    taken: int = 0
    most: int = 0
    given_back: int = 0
    recoverable: bool = True
    tried: list[tuple[Recompute, ...]] = field(default_factory=list)
    recovered: int = 0
    held: int = 0
    """Gradients that a rehearsal which broke off left behind."""

    def usable(self) -> int:
        return self.size

    def allocated(self) -> int:
        return self.taken

    def peak(self) -> int:
        return self.most

    def reset_peak(self) -> None:
        self.most = self.taken

    def retries(self) -> int:
        return self.given_back

    def release(self) -> None:
        pass

    def take(self, size: int, lost: int = 0) -> None:
        if self.taken + self.held + size + lost > self.size + (self.size // 50 if lost else 0):
            self.held = 1
            raise torch.OutOfMemoryError("the card is full")
        self.given_back += self.taken + size + lost > self.size
        self.taken += size
        self.most = max(self.most, self.taken)

    def recover(self) -> bool:
        self.recovered += 1
        self.taken = self.held = 0
        return self.recoverable


class Block(nn.Module):
    """Takes memory of the card."""

    card: Card
    blocks: Blocks
    place: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self.blocks.plan
        keeps_more = any(kind not in (FULL, OFFLOAD) for kind in plan) and plan != tuple(probe_plan(len(plan)))
        self.card.take(self.card.keeps[plan[self.place]], self.card.pieces if keeps_more else 0)
        return x


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fitted(
    card: Card, count: int = 8, host: int = 0, spared: int = 0, *, measuring: int = 0, keeps_all: bool = False
) -> tuple[str, tuple[Recompute, ...]]:
    modules = [Block() for _ in range(count)]
    sdpa = next(b for b in BACKENDS if b.name == "sdpa")
    blocks = Blocks(modules, sdpa, compiled=False, store=InputStore(torch.device("cpu")))
    blocks.set_plan([FULL] * count)
    for place, module in enumerate(modules):
        module.card, module.blocks, module.place = card, blocks, place

    @torch.no_grad()
    def rehearse() -> None:
        card.tried.append(blocks.plan)
        card.take(card.weights)
        for module in modules:
            module(torch.zeros(()))
        card.taken = 0

    guess = Guess(keeps_all, spared, measuring or spared)
    attempt = Attempt(rehearse, card.recover, card.recoverable, card, torch.device("cpu"), lambda: host, guess)
    text = fit_recompute(blocks, attempt)
    assert card.tried[-1] == blocks.plan, "the plan was gone through"
    assert card.held == 0
    assert not any("watching" in repr(module.forward) for module in modules)
    return text, blocks.plan


@pytest.mark.parametrize(("size", "none", "attention"), [
    (530, 8, 0), (520, 7, 1), (400, 4, 4), (275, 0, 8), (270, 0, 7), (235, 0, 4),
])  # fmt: skip
def test_as_little_as_the_memory_allows(size, none, attention) -> None:
    """Weights of 100 and eight blocks of 10, 20 or 50, of which 5 % stay free."""
    card = Card(size)
    text, plan = fitted(card)
    assert (plan.count(NONE), plan.count(ATTENTION)) == (none, attention)
    # Once to compile, once to measure, once to prove.
    assert len(card.tried) == 3
    assert f"peak {card.most / GIB:.1f} of" in text
    assert card.most == 100 + sum(card.keeps[kind] for kind in plan)


def test_where_pieces_do_not_fit_less_is_kept() -> None:
    """Torch gave memory back and asked anew, or none was left: each time a larger margin."""
    smooth = fitted(Card(400))[1]
    card = Card(400, pieces=50)
    rough = fitted(card)[1]
    assert rough.count(NONE) < smooth.count(NONE)
    assert 3 < len(card.tried) <= 2 + fitting._TRIES
    assert card.given_back or card.recovered


def test_memory_that_ran_out_is_recovered_from() -> None:
    card = Card(400, pieces=80)
    plan = fitted(card)[1]
    assert card.recovered > 0
    assert plan.count(NONE) < 3


def test_when_nothing_helps_everything_is_recomputed() -> None:
    card = Card(400, pieces=300)
    text, plan = fitted(card)
    assert plan == (FULL,) * 8
    assert len(card.tried) == 2 + fitting._TRIES + 1
    assert card.most == 180, "the peak that is shown is that of the plan that is used"
    assert "8 all; peak" in text


def test_a_probe_that_does_not_fit_recomputes_everything() -> None:
    """Two blocks that keep more take 50 more than none: too much here."""
    card = Card(200)
    assert fitted(card)[1] == (FULL,) * 8
    assert card.recovered == 1


@pytest.mark.parametrize(("size", "recoverable"), [(170, True), (200, False)])
def test_a_batch_that_does_not_fit_is_an_error(size, recoverable) -> None:
    """Not even with everything recomputed; or this torch cannot go on after it."""
    with pytest.raises(torch.OutOfMemoryError):
        fitted(Card(size, recoverable=recoverable))


def test_where_the_plan_is_sure_nothing_is_probed() -> None:
    card = Card(600)
    text, plan = fitted(card, keeps_all=True)
    assert plan == (NONE,) * 8
    assert card.tried == [plan] * 2
    assert "8 nothing; peak" in text


@pytest.mark.parametrize("size", [505, 515, 400])
def test_a_plan_that_was_wrong_costs_no_more_than_its_rehearsals(size) -> None:
    """Weights of 100 and eight blocks of 50 need 500: little would be left free, or there is not so much."""
    card = Card(size)
    plan = fitted(card, keeps_all=True)[1]
    assert plan == fitted(Card(size))[1]
    assert len(card.tried) == 3 + (1 if size < 500 else 2)


@pytest.mark.parametrize(("size", "host", "moved"), [(170, 7, 7), (130, 7, 7), (170, 2, 2), (200, 7, 0)])
def test_what_does_not_fit_recomputed_goes_to_the_host(size, host, moved) -> None:
    """As many inputs as the host has room for; none where the card is large enough."""
    card = Card(size)
    text, plan = fitted(card, host=host)
    assert plan == (OFFLOAD,) * moved + (FULL,) * (8 - moved)
    assert card.most == 100 + 10 * (8 - moved)
    assert ("inputs in host memory" in text) is bool(moved)


@pytest.mark.parametrize(("size", "host"), [(105, 7), (130, 2)])
def test_nor_with_inputs_in_host_memory(size, host) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        fitted(Card(size), host=host)


def test_where_inputs_are_large_the_least_is_tried_first() -> None:
    """Without running out of memory once: several ranks could not go on after it."""
    card = Card(170, recoverable=False)
    assert fitted(card, host=7, spared=70)[1] == (OFFLOAD,) * 7 + (FULL,)
    assert card.recovered == 0
    assert len(card.tried) == 2, "once to compile, once to measure"


def test_where_large_inputs_fit_as_much_is_kept_as_ever() -> None:
    wanted = fitted(Card(300))[1]
    card = Card(300)
    assert fitted(card, host=7, spared=70)[1] == wanted
    assert card.tried[0] == (OFFLOAD,) * 7 + (FULL,)
    card = Card(300)
    assert fitted(card, host=7, spared=20)[1] == wanted
    assert OFFLOAD not in card.tried[0], "inputs are a small part here"


def test_the_order_of_trials() -> None:
    rest = [Trial.MEASURED, Trial.FULL, Trial.OFFLOAD]
    assert trials(sure=False, large=False) == rest
    assert trials(sure=True, large=False) == [Trial.EVERYTHING, *rest]
    assert trials(sure=False, large=True) == [Trial.LEAST, *rest]


def test_where_full_just_fits_one_that_recovers_takes_it() -> None:
    """180 of 200 with everything recomputed; the measuring plan needs 230. What cannot recover stays with offload."""
    card = Card(200)
    assert fitted(card, host=7, spared=70, measuring=120)[1] == (FULL,) * 8
    assert card.recovered == 1, "of the measuring plan"
    card = Card(200, recoverable=False)
    assert fitted(card, host=7, spared=70, measuring=120)[1] == (OFFLOAD,) * 7 + (FULL,)


def test_where_the_measuring_plan_fits_nothing_need_be_recovered_from() -> None:
    card = Card(300, recoverable=False)
    assert fitted(card, host=7, spared=70, measuring=120)[1] == fitted(Card(300))[1]


def test_what_cannot_recover_is_not_daring() -> None:
    """Older torch: on one rank too, what the plan is sure of is measured first."""
    card = Card(600, recoverable=False)
    fitted(card, keeps_all=True)
    assert card.tried[0] == tuple(probe_plan(8))


def _worst(values: list[int]) -> int:
    from sft_job.runtime import start_runtime

    return fitting._most(values[start_runtime(60).rank], torch.device("cpu"))


def test_ranks_agree_on_the_worst(ranks) -> None:
    assert ranks(2, _worst, [-3, 8 * 2**40]) == [8 * 2**40] * 2


def test_one_block_is_only_rehearsed() -> None:
    card = Card(200)
    assert fitted(card, 1) == ("", (FULL,))
    assert len(card.tried) == 1


def _agreed_plans(plans: list[list[Recompute]]) -> list[Recompute]:
    from sft_job.runtime import start_runtime

    return fitting._agreed(plans[start_runtime(60).rank], torch.device("cpu"))


def test_ranks_take_the_plan_of_the_one_with_least_room(ranks) -> None:
    plans = [[FULL, ATTENTION, ATTENTION, ATTENTION], [ATTENTION, ATTENTION, NONE, NONE]]
    assert ranks(2, _agreed_plans, plans) == [plans[0]] * 2
