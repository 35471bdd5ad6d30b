"""What crosses between Ulysses ranks, and how often attention is computed, in each layer and under each plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

LAYERS = 3
EXCHANGE, ATTEND, BACK = "c10d::alltoall_base_", "attend", "backward"


def _counts(plans: list[str], compiled: bool) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Calls of a layer in the forward and in the backward of a micro-batch, on this rank, under each plan."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from sft_job.data.batches import pack_rows
    from sft_job.model.attention.packed import PACKED, register_packed_attention
    from sft_job.model.blocks import Blocks, offload_plan
    from sft_job.model.causal_lm import CausalLMLoss
    from sft_job.model.offload import InputStore
    from sft_job.model.recompute import Recompute
    from sft_job.model.supported import decoder_blocks
    from sft_job.runtime import start_runtime
    from tests.distributed.test_model import _documents
    from tests.tiny import model_config
    from tests.traced import TRACED

    runtime = start_runtime(60)
    register_packed_attention()
    torch.manual_seed(0)
    config = model_config("qwen3", 300, num_hidden_layers=LAYERS)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=PACKED)
    store = InputStore(torch.device("cpu"))
    blocks = Blocks(decoder_blocks(lm), TRACED, compiled=compiled, compiler="aot_eager", store=store)
    module = CausalLMLoss(lm, TRACED, dist.group.WORLD, blocks).train()
    batch = pack_rows(_documents([9, 1, 4]), 2, runtime.rank, 0)
    found = {}
    for plan in plans:
        blocks.set_plan(offload_plan(LAYERS, LAYERS - 1) if plan == "offload" else [Recompute(plan)] * LAYERS)
        module(batch, 7).backward()  # compiles
        losses: list[Any] = []
        forward = _counted(lambda: losses.append(module(batch, 7)))  # noqa: B023  called at once
        found[plan] = (forward, _counted(lambda: losses[0].backward()))  # noqa: B023
    return found


def _counted(action: Callable[[], Any]) -> dict[str, float]:
    from tests.traced import CALLS

    before = dict(CALLS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    calls = {event.key: event.count for event in profile.key_averages()}
    calls |= {name: CALLS[name] - before.get(name, 0) for name in (ATTEND, BACK)}
    return {name: calls.get(name, 0) / LAYERS for name in (EXCHANGE, ATTEND, BACK)}


@pytest.mark.parametrize(("compiled", "plans"), [
    (False, ["none", "attention", "full", "offload"]), pytest.param(True, ["attention"], marks=pytest.mark.slow),
])  # fmt: skip
def test_exchanges_of_a_layer(ranks, compiled, plans) -> None:
    """One for q, k and v together and one for the result, each way; recomputation repeats these two and no more.

    What is computed again: q, k and v, because attention's backward reads them, and the result after its exchange,
    because the output projection's does. Attention itself is not, where its result is kept.
    """
    for found in ranks(2, _counts, plans, compiled, timeout=200):
        for plan, (forward, backward) in found.items():
            assert forward == {EXCHANGE: 2, ATTEND: 1, BACK: 0}, plan
            again, attends = {"none": (0, 0), "attention": (2, 0)}.get(plan, (2, 1))
            assert backward == {EXCHANGE: 2 + again, ATTEND: attends, BACK: 1}, plan
