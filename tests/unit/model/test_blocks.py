"""Decoder blocks, compiled or not, under every plan of recomputation: the same gradients as the plain ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch._dynamo.utils import counters

from sft_job.config.schema import ModelConfig
from sft_job.data.batches import PackedBatch, pack_rows
from sft_job.data.cache import TokenRow
from sft_job.model.attention.call import Backend
from sft_job.model.attention.choose import BACKENDS
from sft_job.model.attention.packed import PACKED, register_packed_attention
from sft_job.model.blocks import Blocks, compiles, first_plan, maybe_compiled
from sft_job.model.causal_lm import CausalLMLoss
from sft_job.model.compilations import compilations, given_up
from sft_job.model.loss import row_losses
from sft_job.model.recompute import Recompute, recomputing
from sft_job.model.supported import decoder_blocks
from tests.tiny import model_config
from tests.traced import CALLS, TRACED

NONE, ATTENTION, FULL, OFFLOAD = Recompute
SDPA, EAGER = (next(b for b in BACKENDS if b.name == name) for name in ("sdpa", "eager"))
PLANS = [(NONE, NONE), (ATTENTION, ATTENTION), (FULL, FULL), (FULL, ATTENTION), (ATTENTION, NONE)]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # type: ignore[attr-defined]
        yield
    torch._dynamo.reset()
    counters.clear()


def model(
    backend: Backend = TRACED,
    *,
    compiled: bool = False,
    plan: Sequence[Recompute] = PLANS[0],
    kind: str = "qwen3",
    lora: bool = False,
    **more: Any,
) -> CausalLMLoss:
    """Two blocks of qwen3 in fp64, the same weights each time; compiled without inductor, which adds nothing here."""
    from transformers import AutoModelForCausalLM

    register_packed_attention()
    torch.manual_seed(0)
    config = model_config(kind, 300, **more)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=PACKED)
    if lora:
        inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), lm)
        lm.double()
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    blocks = Blocks(decoder_blocks(lm), backend, compiled=compiled, compiler="aot_eager")
    blocks.set_plan(plan)
    return CausalLMLoss(lm, backend, None, blocks, maybe_compiled(row_losses, compiled, "aot_eager")).train()


def pack(*lengths: int) -> PackedBatch:
    random = np.random.default_rng(lengths)
    rows = [TokenRow(random.integers(3, 290, n).astype(np.int32), np.ones(n, bool)) for n in lengths]
    return pack_rows(rows, 1, 0, 0)


def loss_and_gradients(module: CausalLMLoss, batch: PackedBatch) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    loss = module(batch, 7)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    return loss.item(), grads


def assert_same(found: tuple[float, dict], wanted: tuple[float, dict]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-13)
    assert found[1].keys() == wanted[1].keys()
    scale = max(gradient.abs().max().item() for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).abs().max().item() <= 1e-13 * scale, name


def calls() -> int:
    return CALLS["attend"]


@pytest.mark.parametrize("compiled", [False, True])
def test_every_plan_gives_the_plain_gradients(compiled) -> None:
    """Each plan set on the way, on the same model; the attention op runs as often as the plan says."""
    batch, plain = pack(9, 1, 4), loss_and_gradients(model(SDPA), pack(9, 1, 4))
    module = model(compiled=compiled)
    # Compiled, what matters is seen at three, and each costs seconds.
    for plan in (PLANS[1], PLANS[2], PLANS[4]) if compiled else PLANS:
        module.blocks.set_plan(plan)
        before = calls()
        assert_same(loss_and_gradients(module, batch), plain)
        assert calls() - before == 2 + plan.count(FULL), plan


@pytest.mark.parametrize(("backend", "compiled"), [(SDPA, False), (EAGER, False), (SDPA, True)])
def test_backends_that_cannot_be_traced(backend, compiled) -> None:
    """Compiled, they stand between two graphs."""
    batch, plain = pack(9, 1, 4), loss_and_gradients(model(), pack(9, 1, 4))
    module = model(backend, compiled=compiled)
    for plan in PLANS[1:3] if compiled else PLANS:
        module.blocks.set_plan(plan)
        found = loss_and_gradients(module, batch)
        assert found[0] == pytest.approx(plain[0], rel=1e-13)
        for name, gradient in plain[1].items():
            # Softmax of one token has no slope: what is left there is rounding.
            assert torch.allclose(found[1][name], gradient, rtol=1e-9, atol=1e-12), name


def mixed_packs(count: int) -> list[PackedBatch]:
    """Packs of one token and of none that is trained among them, which torch takes for cases of their own."""
    random = np.random.default_rng(0)
    packs = [pack(5, 6), pack(1), pack(2), pack(3, 1)]
    return packs + [pack(*(int(n) for n in random.integers(3, 24, random.integers(1, 7)))) for _ in range(count - 4)]


def compiled_by_pack(module: CausalLMLoss, packs: Sequence[PackedBatch]) -> list[int]:
    """Compilations after each pack; every eighth is evaluated too."""
    counts = []
    for step, batch in enumerate(packs):
        found, _ = loss_and_gradients(module, batch)
        if step % 8 == 0:
            module.eval()
            with torch.no_grad():
                assert module(batch, 7).item() == pytest.approx(found, rel=1e-12)
            module.train()
        counts.append(compilations())
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "kind", "lora"), [
    (TRACED, "qwen3", False), (SDPA, "qwen3", False), (TRACED, "gemma2", False), (TRACED, "gemma2", True),
])  # fmt: skip
def test_two_hundred_packs_of_mixed_lengths_compile_within_the_first_ten(backend, kind, lora) -> None:
    """With every plan that fitting goes through, and two kinds of layers in gemma2; nothing falls back to Python."""
    module = model(backend, compiled=True, plan=[FULL] * 4, kind=kind, lora=lora, num_hidden_layers=4)
    for plan in ((FULL, FULL, ATTENTION, NONE), (FULL, FULL, ATTENTION, ATTENTION)):
        module.blocks.set_plan(plan)
        loss_and_gradients(module, pack(40, 30))
    counts = compiled_by_pack(module, mixed_packs(200))
    assert counts[0] > 0
    assert len(set(counts[9:])) == 1, counts
    assert given_up() == ""
    assert bool(counters["graph_break"]) is not backend.traced


@pytest.mark.parametrize("traced", [True, False])
def test_a_traced_backend_is_told_no_number_of_documents(traced) -> None:
    """Where it is among a graph's inputs, each number of documents may cost a compilation."""
    seen = []

    def attend(q, k, v, call):
        seen.append(call.documents.lengths)
        return TRACED.attend(q, k, v, call)

    batch = pack(3, 4, 5)
    loss_and_gradients(model(replace(TRACED, attend=attend, traced=traced)), batch)
    assert set(seen) == {() if traced else batch.document_lengths}


def test_a_limit_that_was_hit_is_told() -> None:
    """One compilation is not enough for training and evaluation, so the second runs as it is, with a warning."""
    module, batch = model(compiled=True), pack(5, 6)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=False):  # type: ignore[attr-defined]
        trained, _ = loss_and_gradients(module, batch)
        assert given_up() == ""
        with torch.no_grad():
            assert module.eval()(batch, 7).item() == pytest.approx(trained, rel=1e-12)
    assert "runs a part of the model uncompiled" in given_up()


def test_levels_of_recomputation_do_not_share_a_limit() -> None:
    codes = {recomputing(torch.nn.Identity.forward, level, frozenset(), False).__code__ for level in (FULL, ATTENTION)}
    assert {code.co_name for code in codes} == {"run_full", "run_attention"}


def test_blocks_share_their_graphs() -> None:
    """Five blocks cost no more compilations than two."""
    counts = []
    for blocks in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        module = model(compiled=True, plan=[NONE] * blocks, num_hidden_layers=blocks)
        loss_and_gradients(module, pack(3, 4))
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", [SDPA, TRACED])
def test_dropout_draws_the_same_again(backend, compiled) -> None:
    """A block that is computed again drops what it dropped: the gradients are those of one that keeps everything."""
    batch = pack(9, 1, 4)
    kept = loss_and_gradients(model(backend, attention_dropout=0.3), batch)
    assert kept[0] != loss_and_gradients(model(backend), batch)[0]
    module = model(backend, compiled=compiled, attention_dropout=0.3)
    for plan in (PLANS[4], PLANS[2]):
        module.blocks.set_plan(plan)
        assert_same(loss_and_gradients(module, batch), kept)


@pytest.mark.parametrize(
    ("plan", "compiled"), [(PLANS[0], False), (PLANS[1], False), (PLANS[2], False), (PLANS[3], True)]
)
def test_evaluation_computes_once_and_keeps_nothing(compiled, plan) -> None:
    batch = pack(5, 6)
    module = model(compiled=compiled, plan=plan).eval()
    before = calls()
    with torch.no_grad():
        loss = module(batch, 7)
    assert loss.grad_fn is None
    assert calls() - before == 2
    assert loss.item() == pytest.approx(model(SDPA)(batch, 7).item(), rel=1e-13)


def test_what_the_settings_ask_for() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [compiles(ModelConfig(compile=value), cpu) for value in ("auto", True, False)] == [False, True, False]
    assert [compiles(ModelConfig(compile=value), gpu) for value in ("auto", True, False)] == [True, True, False]
    assert first_plan(ModelConfig(), 3) == [FULL] * 3
    assert first_plan(ModelConfig(enable_gradient_checkpointing=False), 3) == [NONE] * 3
    assert first_plan(ModelConfig(recompute="offload"), 3) == [OFFLOAD, OFFLOAD, FULL], "the last is needed at once"
    for plan in (NONE, ATTENTION, FULL):
        assert first_plan(ModelConfig(recompute=plan.value, enable_gradient_checkpointing=False), 2) == [plan] * 2
