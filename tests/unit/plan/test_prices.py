"""Verdicts, what changes cost, and the change that is advised."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_job import fitting
from sft_job.config.layout import ulysses_fits
from sft_job.plan import estimate
from sft_job.plan.cards import CARDS
from sft_job.plan.estimate import FITS, MARGIN, TIGHT, TOO_LARGE, Rows, largest_micro
from sft_job.plan.prices import Case, longest_that_fits, prices, smallest_change, with_changes
from sft_job.plan.setup import Ranks
from tests.unit.plan.cases import LORA, case, rows_of

FP32 = {"model.fsdp_config.model_dtype": "fp32"}


@pytest.mark.parametrize(("card", "verdict"), [("h200", FITS), ("h100", FITS), ("l40s", TOO_LARGE)])
def test_verdicts(card: str, verdict: str) -> None:
    assert case(card=card).estimate(timed=False).verdict == verdict


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_is_tight_is_not_said_to_fit(gpus: int) -> None:
    """The margin is that of the least memory that the run can get along with."""
    one = case(ranks=Ranks(gpus), lengths=(8192,) * 2 * gpus, **{"data.micro_batch_size_per_gpu": 2})
    least = one.estimate(timed=False)
    beside = least.memory.outside / 2**30
    for share, verdict in ((1 / (1 - MARGIN) + 0.01, FITS), (1.05, TIGHT), (1.001, TIGHT), (0.999, TOO_LARGE)):
        card = CARDS["h200"].__class__(**{**one.card.__dict__, "memory": share * least.least / 2**30 + beside})
        found = Case(one.config, one.shape, card, one.ranks, one.rows).estimate(timed=False)
        assert found.verdict == verdict, share


@pytest.mark.parametrize(("length", "spares_much"), [(24576, False), (65536, True)])
def test_of_several_ranks_what_is_measured_first_must_fit(length: int, spares_much: bool) -> None:
    """They cannot go on after one ran out of memory; inputs go to the host first only where that spares much."""
    for world, falls_back in ((1, True), (2, spares_much)):
        some = case(ranks=Ranks(world), lengths=(length,) * 2 * world, **{"data.micro_batch_size_per_gpu": 2})
        offloaded = some.estimate({"model.recompute": "offload"}, timed=False)
        memory = (1.01 * offloaded.least + offloaded.memory.outside) / 2**30
        card = replace(some.card, memory=memory)
        found = Case(some.config, some.shape, card, some.ranks, some.rows).estimate(timed=False)
        assert (found.verdict != TOO_LARGE) is falls_back, world


def test_on_older_torch_one_rank_is_planned_as_several_are(monkeypatch) -> None:
    """It cannot go on after memory ran out, unless FSDP holds nothing, as where no micro-batches add up."""
    one = case(lengths=(24576,) * 2, **{"data.micro_batch_size_per_gpu": 1})
    offloaded = one.estimate({"model.recompute": "offload"}, timed=False)
    card = replace(one.card, memory=1.01 * offloaded.least / 2**30)
    tight = Case(one.config, one.shape, card, one.ranks, one.rows)
    assert tight.estimate(timed=False).verdict != TOO_LARGE
    monkeypatch.setattr(estimate, "torch_resets", lambda: False)
    assert tight.estimate(timed=False).verdict == TOO_LARGE
    once = {"data.micro_batch_size_per_gpu": 2}
    least = one.estimate({**once, "model.recompute": "offload"}, timed=False).least
    whole = Case(one.config, one.shape, replace(card, memory=1.01 * least / 2**30), one.ranks, one.rows)
    assert whole.estimate(once, timed=False).verdict != TOO_LARGE


def test_the_plan_takes_for_tight_what_the_run_does() -> None:
    assert estimate._AUTO_MARGIN == fitting._MARGIN


def test_auto_never_plans_beyond_what_it_may() -> None:
    found = case("qwen3-4b", (32768,)).estimate(timed=False)
    assert found.memory.peak <= 0.95 * found.usable
    assert found.least < found.memory.peak


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["qwen2.5-7b", "qwen3-4b", "llama-3-8b"]),
    st.sampled_from([2048, 32768, 131072]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from(["h200", "h100", "a100-40gb"]),
    st.sampled_from([{}, FP32, LORA, {"model.recompute": "none"}]),
)
def test_what_is_advised_really_fits(model: str, length: int, gpus: int, card: str, changes: dict[str, Any]) -> None:
    one = case(model, (length,) * 8, Ranks(gpus), card, **{"data.micro_batch_size_per_gpu": 4, **changes})
    if one.estimate(timed=False).verdict == FITS:
        return
    remedy = smallest_change(one)
    assert remedy is not None
    ranks = remedy.ranks or one.ranks
    again = Case(with_changes(one.config, remedy.changes), one.shape, one.card, ranks, one.rows)
    assert again.estimate(timed=False).verdict == FITS
    ulysses = again.config.ulysses_sequence_parallel_size
    assert ulysses_fits(ulysses, one.shape.heads, one.shape.kv_heads, ranks.world)
    for word in shlex.split(remedy.words()):
        assert "=" in word or word.startswith("--") or word.isdecimal()


def test_the_same_result_comes_before_another_training() -> None:
    """Smaller micro-batches, not adapters."""
    one = case(lengths=(32768,) * 2, **{"model.recompute": "none"})
    remedy = smallest_change(one)
    assert remedy is not None
    assert remedy.note == ""
    assert set(remedy.changes) <= {"model.recompute", "data.micro_batch_size_per_gpu"}


def test_all_rows_at_once_may_need_less() -> None:
    """Over several micro-batches FSDP adds gradients up in fp32, as a whole on every rank."""
    rows = {"data.micro_batch_size_per_gpu": 1, "model.recompute": "full"}
    one = case("llama-3-8b", (1024, 1024), **rows)
    tight = CARDS["h200"].__class__(**{**one.card.__dict__, "memory": 76.0})
    remedy = smallest_change(Case(one.config, one.shape, tight, one.ranks, one.rows))
    assert remedy is not None
    assert remedy.words() == "data.micro_batch_size_per_gpu=2"


def test_more_gpus_are_the_last_resort() -> None:
    """A million tokens are too many for a card at any of these settings."""
    remedy = smallest_change(case("llama-3-8b", (1_048_576,)))
    assert remedy is not None
    assert remedy.ranks is not None
    assert remedy.words().startswith("--gpus")
    assert "ulysses_sequence_parallel_size=" in remedy.words()


def test_nothing_helps_a_card_that_is_too_small() -> None:
    small = CARDS["rtx4090"].__class__(**{**CARDS["rtx4090"].__dict__, "memory": 1.0})
    one = case()
    assert smallest_change(Case(one.config, one.shape, small, one.ranks, one.rows)) is None


def test_prices_of_what_matters() -> None:
    one = case(lengths=(8192,) * 8, ranks=Ranks(4), **{"data.micro_batch_size_per_gpu": 2})
    now = one.estimate()
    found = {price.words(): price.found for price in prices(one)}
    for words in (
        "model.recompute=full", "data.micro_batch_size_per_gpu=1", "ulysses_sequence_parallel_size=4",
        "model.fp8=tensorwise", "model.lora_rank=16", "model.fsdp_config.cpu_offload=true",
        "model.fsdp_config.reshard_after_forward=false", "model.fsdp_config.fsdp_size=2",
    ):  # fmt: skip
        assert words in found
    assert now.step is not None
    for words, faster in (("model.recompute=full", False), ("model.fp8=tensorwise", True)):
        step = found[words].step
        assert step is not None
        assert (step.seconds < now.step.seconds) == faster
    assert found["model.fsdp_config.cpu_offload=true"].memory.peak < now.memory.peak
    assert not any("fp8" in price.words() for price in prices(case(card="a100")))


def test_the_longest_document() -> None:
    one = case()
    longest = longest_that_fits(one)
    assert longest is not None
    fits = case(lengths=(longest,) * 2, **{"data.micro_batch_size_per_gpu": 1}).estimate(timed=False)
    longer = case(lengths=(longest + 8192,) * 2, **{"data.micro_batch_size_per_gpu": 1}).estimate(timed=False)
    assert (fits.verdict, longer.verdict != FITS) == (FITS, True)
    assert longest_that_fits(case(card="l40s")) is None


def test_a_sample_is_planned_for_the_longest_row_that_may_come() -> None:
    exact, sample = rows_of(10, 20, 30), rows_of(10, 20, 30, exact=False, longest=4096)
    config = case(**{"data.micro_batch_size_per_gpu": 2, "data.train_batch_size": 8}).config
    assert largest_micro(config, exact)[0].tokens == 50
    assert largest_micro(config, sample)[0].tokens == 8192
    assert largest_micro(config, sample)[0].longest == 4096


@pytest.mark.parametrize("packs", [
    {"data.use_dynamic_bsz": True, "data.max_token_len_per_gpu": 65_536}, {"data.micro_batch_size_per_gpu": 8},
])  # fmt: skip
def test_of_very_many_rows_the_longest_stand_for_all(packs: dict[str, Any]) -> None:
    lengths = np.random.default_rng(2).lognormal(7.0, 1.0, 300_000).clip(16, 40_000).astype(np.int32)
    config = case(**{"data.train_batch_size": 256, **packs}).config
    few = Rows.of_all(lengths, 300_000, 1.0, "all", 0)
    every = Rows(lengths, 300_000, True, int(lengths.max()), 1.0, "all")
    assert len(few.lengths) < 30_000
    assert few.heavy is not None
    assert len(few.heavy) < 30_000
    assert largest_micro(config, few)[0] == largest_micro(config, every)[0]
    assert few.lengths.mean() == pytest.approx(lengths.mean(), rel=0.05)
    assert Rows.of_all(lengths[:100], 100, 1.0, "all", 0).heavy is None


def test_mixed_lengths_in_packs_by_tokens() -> None:
    lengths = np.random.default_rng(1).lognormal(7.6, 1.0, 2000).clip(16, 32768).astype(np.int32)
    rows = Rows(lengths, 2000, True, int(lengths.max()), 0.5, "drawn")
    packs = {"data.use_dynamic_bsz": True, "data.max_token_len_per_gpu": 32768, "data.train_batch_size": 256}
    one = case("qwen3-4b", ranks=Ranks(8), **packs)
    found = Case(one.config, one.shape, one.card, one.ranks, rows).estimate()
    assert found.step is not None
    assert found.run is not None
    assert found.step.tokens == pytest.approx(256 * lengths.mean(), rel=0.2)
    assert 2 <= found.step.micro_batches <= 5
    assert found.run.steps == 8 * 4
    assert found.run.stepping == pytest.approx(32 * found.step.seconds)
    assert found.setup.accumulates


SUMS = "model.fsdp_config.shard_accumulated"
eight = partial(case, lengths=(4096,) * 64, ranks=Ranks(8), card="a100-40gb")
ONE_ROW: dict[str, Any] = {"data.micro_batch_size_per_gpu": 1}
ALL_ROWS: dict[str, Any] = {"data.micro_batch_size_per_gpu": 8}
TOLD_WHOLE: dict[str, Any] = {SUMS: False}


def test_gradients_that_are_too_large_whole_add_up_in_shards() -> None:
    """A 7B on eight A100 with 40 GB: 28.4 GiB of gradients in fp32."""
    assert eight(**ONE_ROW).estimate(timed=False).verdict == FITS
    told = eight(**ONE_ROW, **TOLD_WHOLE)
    assert told.estimate(timed=False).verdict == TOO_LARGE
    remedy = smallest_change(told)
    assert remedy is not None
    assert remedy.changes == {SUMS: True}
    assert remedy.note == ""


@pytest.mark.parametrize(
    ("card", "changes", "shards"),
    [("h200", {}, False), ("h100", {}, True), ("a100-40gb", {}, True), ("a100-40gb", LORA, False),
     ("h100", {"model.fsdp_config.fsdp_size": 1}, False), ("h100", {"data.micro_batch_size_per_gpu": 8}, False)],
)  # fmt: skip
def test_what_auto_makes_of_gradients(card: str, changes: dict[str, Any], shards: bool) -> None:
    one = eight(card=card, **{**ONE_ROW, **changes})
    assert one.setup().sums_shards is shards


def test_the_price_of_adding_up_in_shards() -> None:
    one = eight(card="h200", **ONE_ROW)
    now, found = one.estimate(), {price.words(): price.found for price in prices(one)}[f"{SUMS}=true"]
    assert now.step is not None
    assert found.step is not None
    assert found.memory.peak < now.memory.peak - 3.0 * one.shape.parameters
    assert 1.0 < found.step.seconds / now.step.seconds < 1.05
    reducing = "reducing gradients"
    assert found.step.parts[reducing] == pytest.approx(8 * now.step.parts[reducing], rel=0.05)
    at_once = eight(**ALL_ROWS)
    assert not any(SUMS in price.words() for price in prices(at_once))
