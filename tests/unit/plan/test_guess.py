"""What the plan tells a run that has begun."""

from __future__ import annotations

import re

from sft_job.plan.guess import keeps_everything, planned_remedy
from sft_job.plan.setup import GIB, Ranks
from tests.tiny import model_config
from tests.unit.plan.cases import MODELS, settings

SEVEN = MODELS["qwen2.5-7b"]
USABLE = 138.5 * GIB
ONCE = {"accumulates": False, "sums_shards": False}


def sure(*documents: int, model: dict = SEVEN, gpus: int = 1, usable: float = USABLE) -> bool:
    return keeps_everything(settings(), model, Ranks(gpus), documents, usable, accumulates=False)


def test_everything_is_kept_where_there_is_room() -> None:
    assert sure(8192, 8192)  # measured: 115.2 of 138.5 GiB
    assert not sure(16384, 16384)
    assert not sure(8192, 8192, usable=120 * GIB)


def test_of_several_ranks_or_another_model_nothing_is_sure() -> None:
    assert not sure(64, gpus=2)
    assert not sure(64, model={**SEVEN, "model_type": "novel"})
    assert not sure()


def test_a_remedy_after_memory_ran_out() -> None:
    config = settings(**{"model.recompute": "none"})
    line = planned_remedy(config, SEVEN, Ranks(1), (16384, 16384), USABLE, **ONCE)
    assert line.startswith(("model.recompute=", "data.micro_batch_size_per_gpu="))
    assert "smallest change that fits" in line


def test_what_the_plan_had_said_to_fit_gets_another_remedy() -> None:
    """By the plan there is room; the run knows better."""
    line = planned_remedy(settings(**{"model.recompute": "full"}), SEVEN, Ranks(1), (8192, 8192), USABLE, **ONCE)
    found = re.search(r"about (\d+) GiB", line)
    assert found is not None
    assert int(found[1]) < 0.93 * 60.3  # what it needs by the plan as it is
    assert not line.startswith("model.recompute=full")
    assert planned_remedy(settings(), SEVEN, Ranks(1), (), USABLE, **ONCE) == ""
    assert planned_remedy(settings(), {"model_type": "novel"}, Ranks(1), (8,), USABLE, **ONCE) == ""


def test_the_config_of_a_built_model() -> None:
    """As ``job`` hands it over."""
    for kind, known in (("qwen2", True), ("qwen3", True), ("llama", True), ("gemma2", False)):
        assert sure(64, 64, model=model_config(kind, 320).to_dict()) == known
    assert not sure(8192, 8192, model={**SEVEN, "attn_logit_softcapping": 50.0})


def test_a_remedy_for_gradients_that_add_up_whole() -> None:
    """What auto chose for the card holds, also where less memory is assumed so that the advice surely fits."""
    config, usable = settings(1, **{"model.recompute": "full"}), 45 * GIB
    ways = {alone: planned_remedy(config, SEVEN, Ranks(8), (4096,), usable, accumulates=True, sums_shards=alone)
            for alone in (False, True)}  # fmt: skip
    assert ways[False].startswith("model.fsdp_config.shard_accumulated=true is the smallest change")
    assert "shard_accumulated" not in ways[True]


def test_the_remedy_says_what_it_costs_and_keeps_to_the_host() -> None:
    config, documents = settings(1, **{"model.recompute": "offload"}), (131_072,)
    slow = planned_remedy(config, SEVEN, Ranks(1), documents, 75 * GIB, **ONCE)
    assert slow.startswith("model.fsdp_config.cpu_offload=true is")
    assert "slower" in slow
    assert re.search(r"\d+ GiB of host memory on a node", slow)
    held = planned_remedy(config, SEVEN, Ranks(1), documents, 75 * GIB, **ONCE, host=60 * GIB)
    assert held
    assert "cpu_offload" not in held


def test_more_gpus_are_no_options_of_plan() -> None:
    """``train`` knows neither --gpus nor --nodes."""
    line = planned_remedy(settings(1), SEVEN, Ranks(1), (1_048_576,), 75 * GIB, **ONCE)
    assert re.match(r"\d+ GPUs instead of 1 with .*ulysses_sequence_parallel_size=", line)
    assert "--" not in line
