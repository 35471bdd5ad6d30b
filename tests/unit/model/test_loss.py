from __future__ import annotations

import pytest
import torch

from sft_job.model.loss import LogitRule, chunked_cross_entropy


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
