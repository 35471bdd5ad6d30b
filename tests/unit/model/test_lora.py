"""The adapters' layer: PEFT's own function, scaled where it is narrow, and what that spares."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from sft_job.data.batches import pack_rows
from sft_job.data.cache import TokenRow
from sft_job.model.attention.choose import choose_backend
from sft_job.model.attention.packed import PACKED, register_packed_attention
from sft_job.model.blocks import Blocks, maybe_compiled
from sft_job.model.build import attention_needs
from sft_job.model.causal_lm import CausalLMLoss
from sft_job.model.lora import NarrowScaled, add_adapters
from sft_job.model.loss import row_losses
from sft_job.model.recompute import Recompute
from sft_job.model.supported import decoder_blocks

TOKENS, HIDDEN, INNER = 2048, 224, 1184


def _pair(**changes: Any) -> tuple[nn.Module, nn.Module]:
    """Two layers with an adapter, PEFT's and ours, with the same weights."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20, bias=True, dtype=torch.float64))
    layers = []
    for own in (False, True):
        config = LoraConfig(r=3, lora_alpha=7, target_modules=["0"], **changes)
        if own:
            config._register_custom_module({nn.Linear: NarrowScaled})
        layers.append(inject_adapter_in_model(config, copy.deepcopy(base), "default").double())
    theirs, ours = layers
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    (out**2).sum().backward()
    return [out, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=["plain", "rslora", "bias"])
def test_it_computes_what_pefts_layer_computes(changes: dict[str, Any]) -> None:
    theirs, ours = _pair(**changes)
    assert type(ours[0]) is NarrowScaled  # pyright: ignore[reportIndexIssue]
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for found, wanted in zip(_gradients(ours, x), _gradients(theirs, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_merged_or_switched_off_it_is_pefts_own() -> None:
    theirs, ours = _pair()
    x = torch.randn(4, 12, dtype=torch.float64)
    with_adapter = ours(x)
    for layer in (theirs, ours):
        layer[0].enable_adapters(False)  # pyright: ignore[reportIndexIssue, reportCallIssue]
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert not torch.allclose(ours(x), with_adapter)
    ours[0].enable_adapters(True)  # pyright: ignore[reportIndexIssue, reportCallIssue]
    ours[0].merge()  # pyright: ignore[reportIndexIssue, reportCallIssue]
    torch.testing.assert_close(ours(x), with_adapter)


def test_dropout_is_applied() -> None:
    _, ours = _pair(lora_dropout=0.5)
    x = torch.randn(64, 12, dtype=torch.float64)
    assert not torch.allclose(ours.train()(x), ours(x))
    assert torch.equal(ours.eval()(x), ours(x))


def _lm() -> Any:
    config = Qwen2Config(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=7,
        num_key_value_heads=1, max_position_embeddings=TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    register_packed_attention()
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=PACKED)


def test_every_layer_with_an_adapter_is_ours() -> None:
    with torch.device("meta"):
        lm = _lm()
    add_adapters(lm, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"), torch.float32)
    adapted = [module for module in lm.modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 7
    assert {type(module) for module in adapted} == {NarrowScaled}


def _peak(recompute: Recompute, *, adapters: bool) -> float:
    """Most that a compiled step allocates, in tensors of [tokens, intermediate_size]."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    lm = _lm()
    if adapters:
        lm.requires_grad_(False)
        config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        config._register_custom_module({nn.Linear: NarrowScaled})
        inject_adapter_in_model(config, lm, "default")
    sdpa = choose_backend(attention_needs(lm.config, torch.device("cpu"), torch.float32, TOKENS), "sdpa").backend

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: object) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    # One document, and attention that torch.compile sees through, as it does flash4.
    backend = replace(sdpa, attend=attend, traced=True)
    blocks = Blocks(decoder_blocks(lm), backend, compiled=True)
    blocks.set_plan([recompute])
    module = CausalLMLoss(lm, backend, None, blocks, maybe_compiled(row_losses, compiled=False)).train()
    ids = np.random.default_rng(0).integers(3, 500, TOKENS).astype(np.int32)
    batch = pack_rows([TokenRow(ids, np.ones(TOKENS, bool))], 1, 0, 0)
    module(batch, TOKENS).backward()
    module.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        module(batch, TOKENS).backward()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(np.cumsum(sizes)) / (TOKENS * INNER * 4)


@pytest.mark.slow
def test_what_adapters_add_to_a_compiled_block() -> None:
    """As sft_job.plan.activations has it: nothing where all is kept, three wide tensors where all is computed again."""
    none = _peak(Recompute.NONE, adapters=True) - _peak(Recompute.NONE, adapters=False)
    full = _peak(Recompute.FULL, adapters=True) - _peak(Recompute.FULL, adapters=False)
    assert none < 0.1
    assert full == pytest.approx(3.0, abs=0.25)
