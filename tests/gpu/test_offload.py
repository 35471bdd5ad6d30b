"""Blocks' inputs in host memory on a real GPU: the gradients of recomputation, less device memory, and about its speed.

pytest -m gpu -s tests/gpu/test_offload.py      shows the figures
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.test_training import assert_close, inputs, losses, on_cpu, train, two_gpus

__all__ = ["inputs", "on_cpu"]  # fixtures
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LAYERS, TOKENS, HIDDEN, INNER = 12, 32_768, 2048, 8192
LENGTHS = [TOKENS - 4096, 4000, 96]
SHORT = [4096] * (TOKENS // 4096 - 1) + [4000, 96]
"""As many tokens: in fp32 SDPA has whole matrices of scores where heads share keys."""
GIB = 2**30


@dataclass
class Measured:
    """A step of forward and backward."""

    loss: float
    gradients: dict[str, torch.Tensor]
    seconds: float
    peak: int
    host: int


def _module(plan: str, *, compiled: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The same weights for every ``dtype``: drawn in bf16."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from sft_job.model.attention.choose import choose_backend
    from sft_job.model.attention.packed import PACKED, register_packed_attention
    from sft_job.model.blocks import Blocks, maybe_compiled, offload_plan
    from sft_job.model.build import attention_needs
    from sft_job.model.causal_lm import CausalLMLoss
    from sft_job.model.loss import row_losses
    from sft_job.model.offload import InputStore
    from sft_job.model.recompute import Recompute
    from sft_job.model.supported import decoder_blocks

    register_packed_attention()
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    config = Qwen2Config(
        vocab_size=32_000, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    with device:
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=PACKED).to(dtype)
    backend = choose_backend(attention_needs(config, device, dtype, TOKENS)).backend
    # Pieces of 8,192 tokens, so that this size has some.
    store = InputStore(device)
    blocks = Blocks(decoder_blocks(lm), backend, compiled=compiled, store=store, tile_elements=8192 * INNER)
    kinds = offload_plan(LAYERS, LAYERS - 1) if plan == "offload" else [Recompute(plan)] * LAYERS
    blocks.set_plan(kinds)
    return CausalLMLoss(lm, backend, None, blocks, maybe_compiled(row_losses, compiled)).train()


def _batch(lengths: Sequence[int]) -> Any:
    from sft_job.data.batches import pack_rows
    from sft_job.data.cache import TokenRow

    random = np.random.default_rng(0)
    rows = [TokenRow(random.integers(3, 31_000, n).astype(np.int32), np.ones(n, bool)) for n in lengths]
    return pack_rows(rows, 1, 0, 0).to("cuda")


def _first_step(module: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    loss = module(batch, TOKENS)
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in module.named_parameters()}
    module.zero_grad()
    return loss, gradients


def _measured(plan: str, *, compiled: bool = True, steps: int = 6) -> Measured:
    """Loss and gradients of the first step, then the median time and the peak of some more."""
    _collect()
    before = torch.cuda.memory_allocated()
    module = _module(plan, compiled=compiled)
    loss, gradients = _first_step(module, _batch(SHORT))
    batch = _batch(LENGTHS)
    times = []
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        module(batch, TOKENS).backward()
        end.record()
        module.zero_grad()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    store = module.blocks.store
    # What was there before counts for nothing: a module is a cycle, and goes when it is collected.
    peak = torch.cuda.max_memory_allocated() - before
    found = Measured(loss.item(), gradients, median(times[2:]), peak, store.pages.held)
    assert store.pages.in_use == 0, "although the first step's loss is held"
    sys.stdout.write(
        f"{plan}, compiled {compiled}: {found.seconds:.3f} s, peak {found.peak / GIB:.2f} GiB, "
        f"host {found.host / GIB:.2f} GiB\n"
    )
    store.clear()
    del module, loss, store, batch
    _collect()
    return found


def _collect() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    _collect()


def _errors(gradients: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """The relative difference of each weight's gradient."""
    return {
        name: ((gradients[name] - grad).norm() / grad.norm().clamp_min(1e-12)).item() for name, grad in wanted.items()
    }


@pytest.fixture(scope="module")
def measured() -> dict[str, Measured]:
    return {plan: _measured(plan) for plan in ("none", "full", "offload")}


@pytest.fixture(scope="module")
def in_fp32() -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the same weights and rows in fp32, by SDPA, nothing compiled and nothing away."""
    _collect()
    module = _module("full", compiled=False, dtype=torch.float32)
    loss, gradients = _first_step(module, _batch(SHORT))
    return loss.item(), gradients


def test_gradients_are_as_near_to_fp32_as_those_of_recomputation(measured, in_fp32) -> None:
    """Weight by weight: bf16 beside bf16 compares one rounding with another, and a key's bias nearly cancels out."""
    loss, wanted = in_fp32
    errors = {plan: _errors(found.gradients, wanted) for plan, found in measured.items()}
    for name in sorted(wanted, key=lambda name: -errors["offload"][name])[:5]:
        sys.stdout.write(f"{name}: " + ", ".join(f"{plan} {each[name]:.4f}" for plan, each in errors.items()) + "\n")
    for found in measured.values():
        assert found.loss == pytest.approx(loss, rel=1e-3)
    for name in wanted:
        assert errors["offload"][name] < 1.5 * max(errors["none"][name], errors["full"][name]) + 2e-3, name


def test_it_takes_less_device_memory(measured) -> None:
    """All inputs but three are away, and the MLP's tensors are a quarter of their size."""
    inputs_size = (LAYERS - 3) * TOKENS * HIDDEN * 2
    assert measured["offload"].peak < measured["full"].peak - inputs_size
    assert measured["full"].peak < measured["none"].peak
    assert measured["offload"].host == pytest.approx((LAYERS - 1) * TOKENS * HIDDEN * 2, rel=0.3)


def test_copies_are_hidden_behind_the_computation(measured) -> None:
    """Two copies of 11 inputs of 128 MiB take 0.05 s at 55 GB/s; shown with -s, and no more than a tenth on top."""
    assert measured["offload"].seconds < 1.1 * measured["full"].seconds


def test_copies_run_beside_kernels() -> None:
    """By the profiler: more than half of the time of copies between device and host lies under kernels."""
    module, batch = _module("offload", compiled=True), _batch([TOKENS])
    for _ in range(2):
        module(batch, TOKENS).backward()
        module.zero_grad()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        module(batch, TOKENS).backward()
        torch.cuda.synchronize()
    copies, kernels = [], []
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        span = (event.time_range.start, event.time_range.end)
        pinned = "Memcpy" in event.name and "Pinned" in event.name
        if pinned:
            copies.append(span)
        elif "Mem" not in event.name:
            kernels.append(span)
    total = sum(end - begin for begin, end in copies)
    under = sum(max(0.0, min(end, last) - max(begin, first)) for begin, end in copies for first, last in kernels)
    sys.stdout.write(f"copies {total / 1e3:.1f} ms, under kernels {under / 1e3:.1f} ms\n")
    module.blocks.store.clear()
    assert total > 0
    assert under > 0.5 * total


def test_stores_that_nobody_cleared_unlock_their_pages() -> None:
    """One after the other at the same addresses: the next would get CUDA error 712 (already registered)."""
    from sft_job.model.offload import HostPages

    for _ in range(3):
        HostPages(torch.cuda.cudart()).take(4)
        gc.collect()


def test_steps_in_a_row_give_the_same_gradients() -> None:
    """Where a buffer was used again too early, some step would differ: 20 without waiting for the device in between."""
    module, batch = _module("offload", compiled=False), _batch([4096, 1000])
    sums = []
    for _ in range(20):
        loss = module(batch, 100)
        loss.backward()
        sums.append(torch.stack([p.grad.float().norm() for p in module.parameters()]))
        module.zero_grad()
    table = torch.stack(sums).cpu()
    module.blocks.store.clear()
    # Flash-attention's backward adds up in any order.
    assert torch.allclose(table, table[:1].expand_as(table), rtol=1e-2)


def test_the_job_with_offload_follows_the_cpu(inputs, tmp_path, on_cpu) -> None:
    lines, _ = train(inputs, tmp_path / "gpu", "model.recompute=offload")
    assert_close(losses(lines), on_cpu)


@pytest.mark.multigpu
@two_gpus
@pytest.mark.parametrize("more", [["ulysses_sequence_parallel_size=2"], ["data.micro_batch_size_per_gpu=1"]])
def test_two_gpus_with_offload_follow_the_cpu(inputs, tmp_path, on_cpu, more) -> None:
    lines, _ = train(inputs, tmp_path / "gpu", "model.recompute=offload", *more, ranks=2)
    assert_close(losses(lines), on_cpu)
