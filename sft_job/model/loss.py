"""Cross-entropy over the supervised rows only, in chunks: full logits never exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**29
"""Logits computed at once (rows x vocabulary): 1 GiB in bf16."""
_TILE = 256
"""Rows that a matrix product works on at a time: what is left over of it costs as much as a whole one."""


@dataclass(frozen=True)
class LogitRule:
    """What a model does to its logits after the head: ``softcap * tanh(logits * scale / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """The logits as the model means them, any shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def slope(self, applied: Tensor) -> Tensor | float:
        """Derivative of ``apply`` where its result is ``applied``."""
        return self.scale if self.softcap is None else self.scale * (1.0 - (applied / self.softcap).square())


RowLosses = Callable[[Tensor, Tensor, Tensor, LogitRule, bool], tuple[Tensor, Tensor | None]]


def row_losses(
    logits: Tensor, targets: Tensor, scale: Tensor, rule: LogitRule, into_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """Scaled sum of the rows' cross-entropies; the logits become its gradients, in place, but for those of the targets.

    The targets' own are given back and not written: where every element is compared with its row's target, the pass
    over the logits takes three times as long as reading and writing them. They are no differences of what was written,
    which is rounded.

    Args:
        logits: [chunk, V] as the head gives them; overwritten where ``into_gradients``.
        targets: [chunk].
        scale: factor on the sum; a tensor, because a compiled form would be made anew for every number.
        rule: what the model does to its logits.
        into_gradients: overwrite the logits with the gradients that the scaled sum would have without its targets.

    Returns:
        Scalar in fp32, in fp64 where the logits are fp64; and, where ``into_gradients``, the gradients of the targets'
        logits, [chunk, 1] in the logits' dtype, which belong in their places.
    """
    wide = rule.apply(logits.to(torch.promote_types(logits.dtype, torch.float32)))  # [chunk, V]
    norms = wide.logsumexp(dim=1, keepdim=True)  # [chunk, 1]
    chosen = wide.gather(1, targets[:, None])  # [chunk, 1]
    total = (norms - chosen).sum() * scale
    if not into_gradients:
        return total, None
    of_targets = ((chosen - norms).exp() - 1.0) * (rule.slope(chosen) * scale)
    logits.copy_((wide - norms).exp() * (rule.slope(wide) * scale))
    return total, of_targets.to(logits.dtype)


def rows_of_chunk(rows: int, most: int) -> int:
    """Rows of each chunk but the last: as few chunks as may be, nearly even, in multiples of 256 where these fit.

    Args:
        rows: all of them.
        most: at once.
    """
    chunks = max(1, -(-rows // most))
    even = max(1, -(-rows // chunks))
    round_up = -(-even // _TILE) * _TILE
    return round_up if round_up <= most else even


class _LossSum(torch.autograd.Function):
    """Gradients are made beside the loss, chunk by chunk: the logits are in memory once, and never computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        rule: LogitRule,
        rows_at_once: int,
        each: RowLosses,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need = ctx.needs_input_grad[:3]
        total = hidden.new_zeros((), dtype=wide)
        factor = hidden.new_full((), scale, dtype=wide)
        # Weight and bias collect over the chunks, so in fp32 at least; each row of hidden is written once.
        grads = (
            torch.empty_like(hidden) if need[0] else None,
            torch.zeros_like(weight, dtype=wide) if need[1] else None,
            torch.zeros_like(bias, dtype=wide) if bias is not None and need[2] else None,
        )
        for start in range(0, hidden.shape[0], rows_at_once):
            rows, labels = hidden[start : start + rows_at_once], targets[start : start + rows_at_once]
            logits = F.linear(rows, weight, bias)  # [chunk, V]
            part, of_targets = each(logits, labels, factor, rule, any(need))
            total += part
            if of_targets is not None:
                logits.scatter_(1, labels[:, None], of_targets)
            if grads[0] is not None:
                torch.mm(logits, weight, out=grads[0][start : start + rows_at_once])  # [chunk, E]
            if grads[1] is not None:
                _add_product(grads[1], logits.T, rows)  # [V, E]
            if grads[2] is not None:
                grads[2].add_(logits.sum(dim=0, dtype=wide))
        ctx.grads, ctx.dtype = grads, hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the loss's gradients were given away by its first backward: a second one has none")
        return *(None if each is None else _scaled(each, grad, ctx.dtype) for each in grads), *(None,) * 5


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient times what comes from above, in one pass: sums in fp32 are rounded here, once, and not before."""
    if gradient.dtype == dtype:
        return gradient.mul_(factor.to(dtype))
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with a wider total than factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a.to(total.dtype) @ b.to(total.dtype))


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rule: LogitRule,
    scale: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
    each: RowLosses = row_losses,
) -> Tensor:
    """Scaled sum of the cross-entropies of all rows.

    Args:
        hidden: [n, E], the supervised rows only; n may be 0 (the sum is then an exact 0 with exact 0 gradients).
        weight: [V, E], the head's whole weight.
        bias: [V] or None.
        targets: [n], the token that follows each row.
        rule: what the model does to its logits.
        scale: factor on the sum. Here, and not on what is returned, it meets the gradients in fp32: what is returned
            should be differentiated as it is, because a factor in the backward is rounded to the gradients' dtype.
        chunk_elements: logits (rows x V) computed at once.
        each: ``row_losses``, or a compiled form of it.

    Returns:
        Scalar in fp32, in fp64 where hidden is fp64. Its backward may run once.
    """
    if not torch.is_grad_enabled():
        # Or the function below would make gradients of whatever weight is trained, for nobody.
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    rows_at_once = rows_of_chunk(hidden.shape[0], max(1, chunk_elements // weight.shape[0]))
    return _LossSum.apply(hidden, weight, bias, targets, scale, rule, rows_at_once, each)
