"""Costs of rows by the model's sizes, and what they mean for the spread of long and short rows over groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.config.schema import JobConfig
from sft_job.costs import ATTENTION_PRICE, packing_of, pair_cost
from sft_job.data.packing import PackSettings, plan_batch
from sft_job.metrics.flops import FlopsShape, model_flops

QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
QWEN_4B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
LONG, SHORT = 128_000, 500


def settings_of(folder: Path, model: dict[str, Any] | None) -> PackSettings:
    config = JobConfig()
    config.model.partial_pretrain = str(folder)
    if model is not None:
        (folder / "config.json").write_text(json.dumps(model))
    return packing_of(config)


@pytest.mark.parametrize("model", [QWEN_7B, QWEN_4B])
def test_costs_are_those_of_the_models_flops(tmp_path, model) -> None:
    """Two lengths' costs stand to each other as their FLOPs do, with attention at its price."""
    settings = settings_of(tmp_path, model)
    shape = FlopsShape.from_config(type("Config", (), model))
    linear = model_flops(shape, [1]) - 3 * 2 * shape.heads * shape.head_dim * shape.layers
    for length in (1, 500, 128_000):
        flops = linear * length + ATTENTION_PRICE * (model_flops(shape, [length]) - linear * length)
        assert settings.cost(np.array([length]))[0] == pytest.approx(flops / linear, rel=1e-9)


def test_with_lora_a_tokens_other_work_is_two_thirds(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    config = JobConfig()
    config.model.partial_pretrain = str(tmp_path)
    plain = packing_of(config).quadratic
    config.model.lora_rank = 8
    assert packing_of(config).quadratic == pytest.approx(1.5 * plain)


def test_where_the_sizes_are_not_told_the_cost_is_a_common_one(tmp_path) -> None:
    assert settings_of(tmp_path, None) == settings_of(tmp_path, {"model_type": "x"}) == PackSettings(rows=4)


def test_a_model_with_a_text_part_and_layers_with_a_window(tmp_path) -> None:
    whole = settings_of(tmp_path, QWEN_7B)
    assert settings_of(tmp_path, {"text_config": QWEN_7B, "model_type": "both"}) == whole
    kinds = ["sliding_attention"] * 21 + ["full_attention"] * 7
    windows = settings_of(tmp_path, {**QWEN_7B, "sliding_window": 4096, "layer_types": kinds})
    assert windows.quadratic == pytest.approx(whole.quadratic / 4)


def rounds_of(lengths: list[int], groups: int, settings: PackSettings) -> list[list[list[int]]]:
    """[round][group] -> lengths of the rows that it works on meanwhile."""
    plan = plan_batch(np.array(lengths, dtype=np.int32), range(len(lengths)), groups, settings)
    return [[[lengths[row] for row in rows] for rows in at_once] for at_once in zip(*plan, strict=True)]


mixtures = st.tuples(st.integers(0, 12), st.integers(0, 1500), st.integers(1, 8), st.integers(0, 2**32 - 1))
COSTS = PackSettings(tokens=131_072, quadratic=pair_cost(FlopsShape.from_config(type("Config", (), QWEN_7B))))


def drawn(mixture: tuple[int, int, int, int]) -> tuple[list[int], int]:
    long, short, groups, seed = mixture
    random = np.random.default_rng(seed)
    lengths = [*random.integers(100_000, LONG, long, endpoint=True), *random.integers(200, SHORT, short, endpoint=True)]
    return [int(length) for length in random.permutation(lengths)], groups


@given(mixtures)
def test_groups_that_work_at_once_cost_the_same_or_are_full(mixture: tuple[int, int, int, int]) -> None:
    """The bound, at full scale: where the costliest pack of a round holds several rows, no other is cheaper by more
    than the cheapest of these, or a thousandth, unless it is full to within its length. A pack of one row cannot be
    cheaper at all."""
    lengths, groups = drawn(mixture)
    for packs in rounds_of(lengths, groups, COSTS):
        costs = [COSTS.cost(np.array(pack)).sum() for pack in packs]
        costliest = packs[int(np.argmax(costs))]
        if len(costliest) < 2:
            continue
        last = min(costliest)
        for pack, cost in zip(packs, costs, strict=True):
            close = max(costs) - cost <= max(COSTS.cost(np.array([last]))[0] * (1 + 1e-9), 1e-3 * max(costs))
            assert close or sum(pack) + last > COSTS.tokens  # type: ignore[operator]


@given(mixtures)
def test_a_step_takes_little_longer_than_it_must(mixture: tuple[int, int, int, int]) -> None:
    """Groups meet in every round, so a step takes the sum of the rounds' costliest packs. It cannot take less than its
    long rows, one in a pack, dealt out to the groups, nor less than an even share of the short ones; and takes at most
    the sum of both, and a short row in each round."""
    lengths, groups = drawn(mixture)
    costs = COSTS.cost(np.array(lengths, dtype=np.int64))
    rounds = rounds_of(lengths, groups, COSTS) if lengths else []
    taken = sum(max(COSTS.cost(np.array(pack)).sum() for pack in packs) for packs in rounds)
    long = sorted((cost for cost, length in zip(costs, lengths, strict=True) if length > SHORT), reverse=True)
    short = costs.sum() - sum(long)
    row = COSTS.cost(np.array([SHORT]))[0]
    assert taken <= sum(long[::groups]) + short / groups + row * len(rounds)


def test_long_rows_meet_long_rows() -> None:
    """Four groups, 128K and 500-token rows in one batch: each round is alike, and nobody is idle."""
    rounds = rounds_of([LONG] * 8 + [SHORT] * 1000, 4, COSTS)
    costs = np.array([[COSTS.cost(np.array(pack)).sum() for pack in packs] for packs in rounds])
    assert all(pack for packs in rounds for pack in packs), "nobody is without rows"
    assert ((costs.max(axis=1) - costs.min(axis=1)) / costs.max(axis=1)).max() < 0.01


def test_balance_by_tokens_alone_would_wait() -> None:
    """What the square in the cost is for: a batch whose groups have equal tokens and unequal work."""
    lengths = [LONG, *([SHORT] * 400)]

    def seconds(quadratic: float) -> float:
        rounds = rounds_of(lengths, 2, PackSettings(tokens=262_144, quadratic=quadratic))
        return sum(max(COSTS.cost(np.array(pack)).sum() for pack in packs) for packs in rounds)

    assert seconds(COSTS.quadratic) == COSTS.cost(np.array([LONG]))[0], "no faster than the long document alone"
    assert seconds(0.0) > 1.08 * seconds(COSTS.quadratic)
