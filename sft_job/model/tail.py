"""What stands between the last decoder block and the head: the final norm, and the choice of rows with a target."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from sft_job.model.blocks import INDUCTOR, maybe_compiled


class _PickedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = hidden.shape
        return hidden.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, rows, grad), None


def pick_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the hidden state, each at most once: then a gradient is copied where ``index_select`` would add it.

    Args:
        hidden: [T, E].
        rows: [n] int64, no two alike.

    Returns:
        [n, E].
    """
    return _PickedRows.apply(hidden, rows)


def final_norm(lm: PreTrainedModel) -> nn.Module | None:
    """The norm behind the last block; None where the backbone holds none of its own, or several."""
    norms = [child for child in lm.base_model.children() if _is_norm(child)]
    return norms[0] if len(norms) == 1 else None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def compile_final_norm(lm: PreTrainedModel, compiler: str = INDUCTOR) -> bool:
    """Run the final norm through torch.compile, as blocks run: one kernel each way instead of six.

    Its ``forward`` is replaced on the module, inside FSDP's hooks. It sees all tokens of a rank, so it is compiled when
    blocks are: for the first number of tokens, and once more for any; apart for evaluation.

    Args:
        lm: not sharded yet.
        compiler: torch.compile's backend.

    Returns:
        Whether there is one.
    """
    norm = final_norm(lm)
    if norm is None:
        return False
    norm.forward = partial(maybe_compiled(type(norm).forward, compiler=compiler), norm)
    return True
