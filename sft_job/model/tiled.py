"""A block's MLP in pieces of the sequence: what it widens a token to exists for some tokens only, also in the backward.

At 524,288 tokens of a 7B each of gate, up and product is 18.5 GiB, and a backward has seven such tensors. The MLP works
on each token alone, so pieces give the same numbers, but for the weights' gradients, which are added up in fp32 over
the pieces. Inside a recomputed block it costs nothing: its input is kept first, at which the recomputation stops, and
the forward that gives the piece's gradients is the one that a recomputed block has anyway.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MlpForward = Callable[[nn.Module, Tensor], Tensor]
"""(mlp, [..., T, E]) -> [..., T, E]"""

TILE_ELEMENTS = 2**30
"""Elements of the widest intermediate tensor of a piece: 2 GiB in bf16."""
_MULTIPLE = 256
_NAMES = ("mlp", "feed_forward")
_ROUTED = ("moe", "expert", "router", "sparse")


def dense_mlp(block: nn.Module) -> nn.Module | None:
    """The block's MLP where it works on each token alone and draws nothing at random; None where there is none.

    A mixture of experts is none: its router counts tokens.
    """
    mlp = next((part for name in _NAMES if isinstance(part := getattr(block, name, None), nn.Module)), None)
    if mlp is None or len(inspect.signature(type(mlp).forward).parameters) != 2:
        return None
    for name, part in mlp.named_modules():
        text = f"{name}.{type(part).__name__}".lower()
        if any(word in text for word in _ROUTED):
            return None
        if isinstance(part, nn.Dropout) and part.p > 0.0:
            return None
        own = any(True for _ in part.parameters(recurse=False))
        if own and not (isinstance(part, nn.Linear) or "Conv1D" in type(part).__name__):
            return None
    return mlp


def tile_tokens(mlp: nn.Module, elements: int = TILE_ELEMENTS) -> int:
    """Tokens of a piece at most, by the MLP's widest layer."""
    return max(_MULTIPLE, elements // widest(mlp) // _MULTIPLE * _MULTIPLE)


def widest(mlp: nn.Module) -> int:
    """Numbers that the MLP makes of a token in its widest layer."""
    return max(max(weight.shape) for weight in mlp.parameters())


def tiled(forward: MlpForward, piecewise: MlpForward, tokens: int) -> MlpForward:
    """The same forward in pieces of at most ``tokens`` tokens; of one piece it is the forward itself.

    Args:
        forward: of the MLP.
        piecewise: the same for a piece, such as its compiled form.
        tokens: of a piece at most.
    """

    def run(mlp: nn.Module, hidden: Tensor) -> Tensor:
        if hidden.shape[-2] <= tokens:
            return forward(mlp, hidden)
        return _apart(mlp, piecewise, hidden, tokens)

    return run


def _pieces(mlp: nn.Module, forward: MlpForward, hidden: Tensor, tokens: int) -> Tensor:
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        return _forward(mlp, forward, hidden, tokens)
    kept = _Keep.apply(hidden, mlp, forward, tokens, *trained)
    return _Pieces.apply(kept, mlp, forward, tokens)


# Between two compiled graphs; the pieces' forward may be compiled itself.
_apart: Any = torch.compiler.disable(_pieces)


def _split(hidden: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """Pieces of a multiple of tokens that products like: of one size, which compiles once, or else as few as may be."""
    total = hidden.shape[-2]
    count = -(-total // tokens)
    for more in range(count, 2 * count):
        if total % (more * _MULTIPLE) == 0:
            return hidden.split(total // more, dim=-2)
    even = -(-total // count)
    return hidden.split(min(tokens, -(-even // _MULTIPLE) * _MULTIPLE), dim=-2)


def _forward(mlp: nn.Module, forward: MlpForward, hidden: Tensor, tokens: int) -> Tensor:
    out: Tensor | None = None
    start = 0
    for piece in _split(hidden, tokens):
        part = forward(mlp, piece)
        if out is None:
            out = part.new_empty(*hidden.shape[:-1], part.shape[-1])
        out.narrow(-2, start, piece.shape[-2]).copy_(part)
        start += piece.shape[-2]
    assert out is not None
    return out


class _Keep(torch.autograd.Function):
    """Keeps the input and does the backward of ``_Pieces``, piece by piece with a forward of its own.

    A function of its own before the forward, so that a recomputation stops here, where the last tensor is kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mlp: nn.Module, forward: MlpForward, tokens: int, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.mlp, ctx.run, ctx.tokens = mlp, forward, tokens
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """``grad``: of the MLP's output, which ``_Pieces`` hands on as it is."""
        (hidden,) = ctx.saved_tensors
        # Looked up again: FSDP may have put other tensors in the place of those of the forward.
        trained = [parameter for parameter in ctx.mlp.parameters() if parameter.requires_grad]
        totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        whole = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        start = 0
        for piece, slope in zip(_split(hidden, ctx.tokens), _split(grad, ctx.tokens), strict=True):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_(whole is not None)
                out = ctx.run(ctx.mlp, leaf)
            wanted = [*([leaf] if whole is not None else []), *trained]
            found = list(torch.autograd.grad(out, wanted, slope.to(out.dtype)))
            del out
            if whole is not None:
                whole.narrow(-2, start, piece.shape[-2]).copy_(found.pop(0))
            for total, part in zip(totals, found, strict=True):
                total.add_(part)
            start += piece.shape[-2]
        grads = (total.to(parameter.dtype) for total, parameter in zip(totals, trained, strict=True))
        return whole, None, None, None, *grads


class _Pieces(torch.autograd.Function):
    """Forward piece by piece without keeping anything. Input and output are of one shape, as around a residual."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, mlp: nn.Module, forward: MlpForward, tokens: int) -> Tensor:
        return _forward(mlp, forward, kept, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None
