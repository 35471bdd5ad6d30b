"""Cross-entropy over the supervised rows only, in chunks: full logits never exist."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**27
"""Logits computed at once (rows x vocabulary): 0.5 GiB in fp32."""


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


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rule: LogitRule,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Sum of the cross-entropies of all rows.

    Each chunk's logits are recomputed in the backward, so at most one chunk of them is in memory.

    Args:
        hidden: [n, E], the supervised rows only; n may be 0 (the sum is then an exact 0 with exact 0 gradients).
        weight: [V, E], the head's whole weight.
        bias: [V] or None.
        targets: [n], the token that follows each row.
        rule: what the model does to its logits.
        chunk_elements: logits (rows x V) computed at once.

    Returns:
        Scalar in fp32, in fp64 where hidden is fp64.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def chunk_sum(rows: Tensor, labels: Tensor) -> Tensor:
        logits = rule.apply(F.linear(rows, weight, bias).to(wide))  # [chunk, V]
        return F.cross_entropy(logits, labels, reduction="sum")

    rows_at_once = max(1, chunk_elements // weight.shape[0])
    # The zero keeps hidden and the head in the graph when this rank has nothing to predict: FSDP's collectives
    # must run on every rank.
    total = (hidden.sum() + weight.sum()).to(wide) * 0.0 if hidden.shape[0] == 0 else hidden.new_zeros((), dtype=wide)
    for start in range(0, hidden.shape[0], rows_at_once):
        rows, labels = hidden[start : start + rows_at_once], targets[start : start + rows_at_once]
        total = total + checkpoint(chunk_sum, rows, labels, use_reentrant=False, preserve_rng_state=False)
    return total
