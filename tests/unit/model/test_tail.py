"""The final norm, compiled, and the choice of rows: the plain gradients, and few compilations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

from sft_job.config.schema import ModelConfig
from sft_job.data.batches import PackedBatch, pack_rows
from sft_job.data.cache import TokenRow
from sft_job.model.attention.choose import BACKENDS
from sft_job.model.attention.packed import PACKED, register_packed_attention
from sft_job.model.blocks import Blocks, first_plan, maybe_compiled
from sft_job.model.causal_lm import CausalLMLoss
from sft_job.model.loss import row_losses
from sft_job.model.supported import decoder_blocks
from sft_job.model.tail import compile_final_norm, final_norm, pick_rows
from tests.tiny import model_config

SDPA = next(backend for backend in BACKENDS if backend.name == "sdpa")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def language_model(kind: str = "qwen3") -> Any:
    from transformers import AutoModelForCausalLM

    register_packed_attention()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(model_config(kind, 300), dtype=torch.float64, attn_implementation=PACKED)


def tail_compiled(*, compiled: bool) -> CausalLMLoss:
    """Blocks as they are; norm and loss compiled."""
    lm = language_model()
    blocks = Blocks(decoder_blocks(lm), SDPA, compiled=False)
    blocks.set_plan(first_plan(ModelConfig(), len(decoder_blocks(lm))))
    if compiled:
        assert compile_final_norm(lm, "aot_eager")
    return CausalLMLoss(lm, SDPA, None, blocks, maybe_compiled(row_losses, compiled, "aot_eager")).train()


def pack(random: np.random.Generator, trained: float, *lengths: int) -> PackedBatch:
    rows = [TokenRow(random.integers(3, 290, n).astype(np.int32), random.random(n) < trained) for n in lengths]
    return pack_rows(rows, 1, 0, 0)


@given(st.integers(1, 9), st.data())
def test_picked_rows_and_their_gradients(tokens: int, data: st.DataObject) -> None:
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, tokens - 1)))), dtype=torch.long)
    hidden = torch.arange(tokens * 3.0, dtype=torch.float64).reshape(tokens, 3).requires_grad_()
    weights = torch.linspace(-1, 1, len(rows) * 3, dtype=torch.float64).reshape(-1, 3)
    wanted = torch.autograd.grad((hidden.index_select(0, rows) * weights).sum(), hidden)[0]
    picked = pick_rows(hidden, rows)
    assert torch.equal(picked, hidden[rows])
    assert torch.equal(torch.autograd.grad((picked * weights).sum(), hidden)[0], wanted)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma2"])
def test_the_final_norm_is_found(kind) -> None:
    lm = language_model(kind)
    assert final_norm(lm) is lm.base_model.norm


def test_a_backbone_without_one_norm_of_its_own_stays_as_it_is() -> None:
    lm = language_model()
    lm.base_model.second = nn.LayerNorm(4)
    assert final_norm(lm) is None
    assert not compile_final_norm(lm, "aot_eager")
    assert "forward" not in vars(lm.base_model.norm)


def test_mixed_lengths_and_evaluation_compile_within_the_first_packs() -> None:
    """Losses and gradients are the plain ones; no number of tokens or of trained ones compiles anything later."""
    module, plain = tail_compiled(compiled=True), tail_compiled(compiled=False)
    random = np.random.default_rng(0)
    packs = [pack(random, 1.0, 5, 6), pack(random, 1.0, 1), pack(random, 0.0, 4), pack(random, 1.0, 2, 1)]
    packs += [pack(random, 0.6, *random.integers(2, 40, random.integers(1, 6)).tolist()) for _ in range(26)]
    graphs = []
    for step, batch in enumerate(packs):
        losses = [each(batch, 7) for each in (module, plain)]
        for loss in losses:
            loss.backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
        for (name, mine), reference in zip(module.named_parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None, name
            assert reference.grad is not None, name
            assert torch.allclose(mine.grad, reference.grad, rtol=1e-9, atol=1e-12), name
        module.zero_grad()
        plain.zero_grad()
        if step % 4 == 0:
            module.eval()
            with torch.no_grad():
                assert module(batch, 7).item() == pytest.approx(losses[1].item(), rel=1e-12)
            module.train()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= 3, "norm and loss, trained and evaluated"
    assert len(set(graphs[9:])) == 1, graphs
    assert not counters["graph_break"]
