"""Clipping and AdamW in one kernel against torch's fused AdamW, and the seconds of both.

pytest -m gpu -s tests/gpu/test_optimizer.py      shows the figures

torch's takes clipping (``grad_scale``) and a skip (``found_inf``) too, in the same arithmetic, as ``GradScaler`` uses
them; it writes the scaled gradients as well.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sft_job.config.schema import OptimConfig
from sft_job.optimizer import ClippingAdamW, build_optimizer, gradient_norm, scale_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda", 0)
SHAPES = [(1,), (0, 8), (17, 33), (1001, 999), (4096,), (2048, 1536), (3, 1_000_001)]
CLIP = 1.0


class Weights(nn.Module):
    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        self.all = nn.ParameterList(
            nn.Parameter((torch.randn(shape, device=DEVICE) * 0.02).to(dtype)) for shape in shapes
        )


def twins(
    shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> tuple[Weights, ClippingAdamW, Weights, torch.optim.AdamW]:
    """The same weights twice, under our optimizer and under torch's fused one, with groups of their own decay."""
    torch.manual_seed(0)
    config = OptimConfig(lr=1e-3, weight_decay=0.1, no_decay_on_norms_and_biases=True)
    ours, theirs = Weights(shapes, dtype), Weights(shapes, dtype)
    theirs.load_state_dict(ours.state_dict())
    mine = build_optimizer(ours, config, "cuda")
    assert isinstance(mine, ClippingAdamW)
    groups = []
    at = {id(p): i for i, p in enumerate(ours.all)}
    for group in mine.param_groups:
        own = [theirs.all[at[id(p)]] for p in group["params"]]
        groups.append({"params": own, "weight_decay": group["weight_decay"]})
    betas = (config.betas[0], config.betas[1])
    return ours, mine, theirs, torch.optim.AdamW(groups, lr=1e-3, betas=betas, eps=config.eps, fused=True)


def fused_step(optimizer: torch.optim.AdamW, norm: Tensor, *, skip: bool) -> None:
    optimizer.grad_scale = torch.clamp(norm / CLIP, min=1.0)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = torch.full((), float(skip), device=DEVICE)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()


def assert_same(found: Tensor, expected: Tensor, bits: int) -> None:
    """Within a unit in the last place, of the value or, where terms cancel, of the tensor's size; in bf16 seldom.

    Gradients in bf16 have 128 mantissas: where one of them, scaled, falls on the edge between two roundings, all its
    elements, up to 1.1 % of a tensor, may go the other way.
    """
    if not expected.numel():
        return
    ulp = 2.0**-bits
    size = expected.float().square().mean().sqrt().item()
    torch.testing.assert_close(found, expected, rtol=ulp, atol=ulp * size)
    if found.dtype == torch.bfloat16 and found.numel() > 1000:
        assert (found != expected).float().mean().item() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_steps_are_those_of_torchs_fused_one(dtype: torch.dtype) -> None:
    ours, mine, theirs, fused = twins(SHAPES, dtype)
    # Above and below the largest norm; the third and fourth are not taken.
    for step, size in enumerate((1.0, 1e-6, 1.0, 1.0, 0.1, 1e-5)):
        for one, other in zip(ours.all, theirs.all, strict=True):
            one.grad = (torch.randn(one.shape, device=DEVICE) * size).to(dtype)
            other.grad = one.grad.clone()
        grads = [one.grad.float().flatten() for one in ours.all if one.grad is not None]
        norm = torch.cat(grads).norm() if step != 3 else torch.full((), math.inf, device=DEVICE)
        loss = torch.full((), math.nan if step == 2 else 1.0, device=DEVICE)
        bad = step in (2, 3)
        kept = [one.grad.clone() for one in ours.all if one.grad is not None]
        mine.step(loss=loss, norm=norm, clip=CLIP)
        if bad:
            mine.take_back()
        assert all(
            torch.equal(before, one.grad) for before, one in zip(kept, ours.all, strict=True) if one.grad is not None
        )
        fused_step(fused, torch.ones_like(norm) if bad else norm, skip=bad)
    bits = 7 if dtype == torch.bfloat16 else 17
    for one, other in zip(ours.all, theirs.all, strict=True):
        assert_same(one.detach(), other.detach(), bits)
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same(mine.state[one][name], fused.state[other][name], bits)
        assert mine.state[one]["step"].item() == fused.state[other]["step"].item() == 4


def test_it_goes_on_from_torchs_states() -> None:
    ours, mine, theirs, fused = twins([(300, 7)], torch.bfloat16)
    one, other = ours.all[0], theirs.all[0]
    other.grad = torch.randn_like(other)
    fused.step()
    with torch.no_grad():
        one.copy_(other)
    mine.load_state_dict(copy.deepcopy(fused.state_dict()))  # tensors are taken over as they are
    other.grad = torch.randn_like(other)
    one.grad = other.grad.clone()
    norm = other.grad.float().norm()
    mine.step(loss=norm, norm=norm, clip=CLIP)
    fused_step(fused, norm, skip=False)
    assert_same(one.detach(), other.detach(), 7)
    assert mine.state[one]["step"].device.type == "cpu"
    assert mine.state[one]["step"].item() == 2


def test_it_is_equal_to_itself() -> None:
    found = []
    for _ in range(2):
        ours, mine, _, _ = twins([(1001, 999)], torch.bfloat16)
        torch.manual_seed(1)
        ours.all[0].grad = torch.randn_like(ours.all[0])
        norm = torch.linalg.vector_norm(ours.all[0].grad, dtype=torch.float32)
        mine.step(loss=norm, norm=norm, clip=CLIP)
        found.append(ours.all[0].detach().clone())
    assert torch.equal(*found)


def seconds(work: Callable[[], object], times: int = 10) -> float:
    work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(torch.cuda.current_stream())
    for _ in range(times):
        work()
    end.record(torch.cuda.current_stream())
    end.synchronize()
    return start.elapsed_time(end) / times / 1e3


def test_how_long_both_take() -> None:
    """Eight blocks of a 7B model in bf16, each with all its gradients clipped. Shown, not judged."""
    block = [(3584, 3584), (512, 3584), (512, 3584), (3584, 3584), (18944, 3584), (18944, 3584), (3584, 18944), (3584,)]
    ours, mine, theirs, fused = twins(block * 8, torch.bfloat16)
    for one, other in zip(ours.all, theirs.all, strict=True):
        one.grad = other.grad = torch.randn_like(one)
    norm = torch.full((), 1.0001, device=DEVICE)
    moved = sum(p.numel() for p in ours.all) * 14
    in_one = seconds(lambda: mine.step(loss=norm, norm=norm, clip=CLIP))
    in_two = seconds(lambda: (scale_gradients(theirs.parameters(), 0.9999), fused.step()))
    sys.stdout.write(
        f"clipping and AdamW, {moved / 1e9:.1f} GB: {in_one * 1e3:.2f} ms in one kernel "
        f"({moved / in_one / 1e12:.2f} TB/s), {in_two * 1e3:.2f} ms in torch's two passes\n"
    )
    assert all(p.isfinite().all() for p in ours.all)


def test_the_norm_is_that_of_every_gradient() -> None:
    import torch.distributed as dist

    ours, *_ = twins(SHAPES, torch.bfloat16)
    for one in ours.all:
        one.grad = torch.randn_like(one)
    expected = torch.cat([one.grad.double().flatten() for one in ours.all if one.grad is not None]).norm().item()
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=DEVICE)
    try:
        assert dist.group.WORLD is not None
        assert gradient_norm(ours.parameters(), dist.group.WORLD).item() == pytest.approx(expected, rel=1e-5)
    finally:
        dist.destroy_process_group()
