from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sft_job.model.loss import LogitRule, chunked_cross_entropy, row_losses, rows_of_chunk


def full(hidden, weight, bias, targets, rule):
    logits = torch.nn.functional.linear(hidden, weight, bias) * rule.scale
    if rule.softcap:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(scale=0.25), LogitRule(softcap=5.0), LogitRule(0.5, 3.0)])
@pytest.mark.parametrize("rows", [1, 7, 12])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_full_logits(rule, rows, with_bias) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if with_bias else None
    targets = torch.randint(0, 11, (rows,))
    inputs = [hidden, weight] + ([bias] if bias is not None else [])
    expected = full(hidden, weight, bias, targets, rule)
    reference = torch.autograd.grad(expected, inputs)
    loss = chunked_cross_entropy(hidden, weight, bias, targets, rule, chunk_elements=11 * 5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    for found, wanted in zip(torch.autograd.grad(loss, inputs), reference, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-13)


def test_no_rows_add_exactly_nothing_and_keep_the_graph() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, None, torch.zeros(0, dtype=torch.long), LogitRule())
    assert loss.item() == 0.0
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert grads[0].shape == hidden.shape
    assert torch.equal(grads[1], torch.zeros_like(weight))


def test_bf16_sums_in_fp32() -> None:
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(11, 8).bfloat16()
    assert chunked_cross_entropy(hidden, weight, None, torch.arange(5), LogitRule()).dtype == torch.float32


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes[tuple(out.shape)] += 1
        return out


def inputs(rows: int = 7, dtype: torch.dtype = torch.float64, *, head: bool = True) -> list[torch.Tensor]:
    """Hidden [n, 8], weight [11, 8], bias [11]."""
    torch.manual_seed(0)
    sizes = ((rows, 8), (11, 8), (11,))
    values = [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]
    return [value.requires_grad_(head or place == 0) for place, value in enumerate(values)]


@given(st.integers(0, 9), st.integers(1, 120), st.sampled_from([1.0, 1 / 3, 1e-6]), st.booleans())
def test_chunks_and_scale_change_nothing(rows: int, elements: int, scale: float, capped: bool) -> None:
    """Chunks of any size, the last one shorter; the factor as a factor on the loss would have it."""
    hidden, weight, bias = inputs(rows)
    rule, targets = LogitRule(0.5, 3.0 if capped else None), torch.arange(rows) % 11
    expected = full(hidden, weight, bias, targets, rule) * scale
    found = chunked_cross_entropy(hidden, weight, bias, targets, rule, scale, chunk_elements=elements)
    assert torch.allclose(found, expected, rtol=1e-13, atol=0)
    wanted = torch.autograd.grad(expected, (hidden, weight, bias))
    for mine, reference in zip(torch.autograd.grad(found, (hidden, weight, bias)), wanted, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-12, atol=1e-14 * scale)


def test_the_scale_meets_bf16_gradients_unrounded() -> None:
    """Each is the exact one rounded once; a factor in the backward would round it twice."""
    rows, scale = 64, 1 / 3
    hidden, weight, _ = inputs(rows, torch.bfloat16)
    targets = torch.arange(rows) % 11
    exact = inputs(rows)[:2]
    with torch.no_grad():
        for wide, narrow in zip(exact, (hidden, weight), strict=True):
            wide.copy_(narrow)
    wanted = torch.autograd.grad(full(*exact, None, targets, LogitRule()) * scale, exact)

    def error(*, inside: bool) -> float:
        loss = chunked_cross_entropy(hidden, weight, None, targets, LogitRule(), scale if inside else 1.0)
        found = torch.autograd.grad(loss, (hidden, weight), None if inside else torch.tensor(scale))
        return sum((g.double() - w).square().sum().item() for g, w in zip(found, wanted, strict=True))

    assert error(inside=True) < 0.95 * error(inside=False)


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(0.25), LogitRule(softcap=5.0), LogitRule(0.5, 3.0)])
def test_bf16_is_as_close_as_bf16_can_be(rule) -> None:
    """Against fp64 from the same rounded inputs: what bf16 logits and gradients lose, and no more."""
    rows = 40
    hidden, weight, bias = inputs(rows, torch.bfloat16)
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight, bias)]
    targets = torch.arange(rows) % 11
    expected = full(*exact, targets, rule) / rows
    found = chunked_cross_entropy(hidden, weight, bias, targets, rule, 1 / rows, chunk_elements=11 * 7)
    assert found.item() == pytest.approx(expected.item(), rel=4e-3)
    grads = torch.autograd.grad(found, (hidden, weight, bias))
    for mine, reference in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - reference).abs().max() <= 0.02 * reference.abs().max()


def test_a_factor_on_the_loss_reaches_the_gradients() -> None:
    hidden, weight, bias = inputs()
    loss = chunked_cross_entropy(hidden, weight, bias, torch.arange(7), LogitRule())
    once = torch.autograd.grad(loss, (hidden, weight, bias))
    again = chunked_cross_entropy(hidden, weight, bias, torch.arange(7), LogitRule()) * 0.3
    for mine, reference in zip(torch.autograd.grad(again, (hidden, weight, bias)), once, strict=True):
        assert torch.allclose(mine, reference * 0.3, rtol=1e-14)


def test_a_second_backward_is_refused() -> None:
    hidden, weight, _ = inputs()
    loss = chunked_cross_entropy(hidden, weight, None, torch.arange(7), LogitRule())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second one has none"):
        loss.backward()


def test_what_is_not_trained_costs_no_product() -> None:
    """Per chunk: the logits, the gradient of hidden, that of the weight."""
    for head, wanted in ((True, {(3, 11): 2, (3, 8): 2, (11, 8): 2}), (False, {(3, 11): 2, (3, 8): 2})):
        hidden, weight, bias = inputs(6, head=head)
        with Products() as products:
            loss = chunked_cross_entropy(hidden, weight, bias, torch.arange(6), LogitRule(), chunk_elements=33)
            loss.backward()
        assert products.shapes == wanted
        assert (weight.grad is None, bias.grad is None) == (not head, not head)


def test_evaluation_makes_no_gradients() -> None:
    """The weight is trained, and nobody asks for its gradient."""
    hidden, weight, bias = inputs(6)
    expected = full(hidden, weight, bias, torch.arange(6), LogitRule()).item()
    with torch.no_grad(), Products() as products:
        loss = chunked_cross_entropy(hidden, weight, bias, torch.arange(6), LogitRule(), chunk_elements=33)
    assert products.shapes == {(3, 11): 2}
    assert loss.grad_fn is None
    assert loss.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(0.25), LogitRule(0.5, 3.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_of_logits_are_rounded_once_also_at_the_targets(dtype, rule) -> None:
    """To the bit what one formula over the whole chunk gives; sure rows among them, where 1 - p is nearly nothing."""
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 11).mul(3).to(dtype), torch.arange(6)
    logits[0, 0] = logits[1, 1] = 12.0
    wide = rule.apply(logits.to(torch.promote_types(dtype, torch.float32)))
    scale = torch.tensor(1 / 3, dtype=wide.dtype)
    one_hot = torch.nn.functional.one_hot(targets, 11)
    wanted = ((wide - wide.logsumexp(1, keepdim=True)).exp() - one_hot) * (rule.slope(wide) * scale)
    losses = torch.nn.functional.cross_entropy(wide, targets, reduction="sum") * scale
    total, of_targets = row_losses(logits, targets, scale, rule, True)
    assert of_targets is not None
    assert torch.equal(logits.scatter(1, targets[:, None], of_targets), wanted.to(dtype))
    assert torch.allclose(total, losses, rtol=1e-6)


def test_a_factor_in_the_backward_meets_the_heads_sum_before_it_is_rounded() -> None:
    hidden, weight, _ = inputs(20, torch.bfloat16)
    targets, factor = torch.arange(20) % 11, torch.tensor(1 / 3)
    logits = torch.nn.functional.linear(hidden, weight).detach()
    of_targets = row_losses(logits, targets, torch.tensor(1.0), LogitRule(), True)[1]
    assert of_targets is not None
    exact = logits.scatter(1, targets[:, None], of_targets).float().T @ hidden.detach().float()
    loss = chunked_cross_entropy(hidden, weight, None, targets, LogitRule())
    found = torch.autograd.grad(loss, weight, factor)[0]
    assert torch.equal(found, (exact * factor).bfloat16())
    assert not torch.equal(found, exact.bfloat16() * factor.bfloat16())


@given(st.integers(0, 40_000), st.integers(1, 9_000))
def test_chunks_are_as_few_as_may_be_and_even(rows: int, most: int) -> None:
    size = rows_of_chunk(rows, most)
    assert 1 <= size <= most
    chunks = -(-rows // size)
    assert chunks <= -(-rows // most), "no more chunks than of the largest size"
    if size % 256:
        assert size * chunks - rows < max(1, chunks), "even, where multiples of 256 do not fit"


def test_chunks_of_a_7b() -> None:
    assert rows_of_chunk(16_384, 2**29 // 152_064) == 3_328
