"""Attention over all documents of a pack in one call: flash-attention 4, flash-attention 2, torch's varlen."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sft_job.model.attention.call import AttentionCall, Needs

FLASH4_OP = "sft_job::flash4"
VARLEN_OP = "torch_attn::_varlen_attn"
FLASH2_OP = "flash_attn::_flash_attn_varlen_forward"


@torch.library.custom_op(FLASH4_OP, mutates_args=())
def flash4_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Flash-attention 4 (CuTe DSL), forward.

    A registered op, so that torch.compile does not look inside and selective recomputation can keep its results.

    Args:
        q: [T, H, D] bf16 or fp16.
        k: [T, K, D].
        v: [T, K, Dv].
        cu_seqlens: int32 [documents + 1].
        max_seqlen: the longest document. An int: as a tensor it would make every backward compile anew.
        scale: factor on the scores.
        window: tokens that a query sees, itself included; 0 = all before it.
        softcap: scores are bent to +-softcap by tanh; 0 = not.

    Returns:
        [T, H, Dv], and the log-sum-exps [H, T] in fp32.
    """
    from flash_attn.cute.interface import _flash_attn_fwd  # noqa: PLC0415  # pyright: ignore  an optional package

    out, lse, *_ = _flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=True,
        softcap=softcap or None,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
        return_lse=True,
    )
    return out, lse


@flash4_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    return q.new_empty(tokens, heads, v.shape[2]), q.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("sft_job::flash4_backward", mutates_args=())
def flash4_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Flash-attention 4, backward: the gradients of q, k and v, shaped as they are."""
    from flash_attn.cute.interface import _flash_attn_bwd  # noqa: PLC0415  # pyright: ignore  an optional package

    grads = _flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad,
        lse,
        scale,
        True,
        softcap,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        deterministic=deterministic,
    )
    return grads[0], grads[1], grads[2]


@flash4_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *other: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    assert lse_grad is None
    if grad is None:
        return (None,) * 8
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = flash4_backward_op(grad.contiguous(), q, k, v, out, lse, cu_seqlens, *ctx.options, deterministic)
    return *grads, None, None, None, None, None


flash4_op.register_autograd(_backward, setup_context=_save_for_backward)


def _token_major(x: Tensor) -> Tensor:
    """[1, h, T, d] -> [T, h, d], contiguous; free where the layer made its heads out of token rows."""
    return x[0].transpose(0, 1).contiguous()


def flash4(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Flash-attention 4: fastest on Hopper and Blackwell."""
    scale = call.scale if call.scale is not None else q.shape[3] ** -0.5
    documents = call.documents
    out, _ = flash4_op(
        _token_major(q),
        _token_major(k),
        _token_major(v),
        documents.cu_seqlens,
        documents.max_seqlen,
        scale,
        call.window or 0,
        call.softcap or 0.0,
    )
    return out[None]


def flash2(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Flash-attention 2, for Ampere, called directly: ``flash_attn_varlen_func``.

    The authors had no card of that generation and no build of the package: written by its interface, held in tests to
    the same cases as the others where it is installed (``tests/gpu/test_attention.py``), never run by them.
    """
    from flash_attn import flash_attn_varlen_func  # noqa: PLC0415  # pyright: ignore  an optional package

    documents = call.documents
    out: Tensor = flash_attn_varlen_func(
        _token_major(q),
        _token_major(k),
        _token_major(v),
        documents.cu_seqlens,
        documents.cu_seqlens,
        documents.max_seqlen,
        documents.max_seqlen,
        dropout_p=call.dropout,
        softmax_scale=call.scale,
        causal=True,
        window_size=(call.window - 1, 0) if call.window else (-1, -1),
        softcap=call.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out[None]


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Torch's own, flash-attention 2's kernels inside."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  only where CUDA is

    documents = call.documents
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = varlen_attn(
        _token_major(q),
        _token_major(k),
        _token_major(v),
        documents.cu_seqlens,
        documents.cu_seqlens,
        documents.max_seqlen,
        documents.max_seqlen,
        window_size=(-1, 0),
        scale=call.scale,
    )
    assert isinstance(out, Tensor)
    return out[None]


def _lacks(needs: Needs, missing: tuple[str, ...]) -> str | None:
    if needs.device != "cuda":
        return "CUDA only"
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return "bf16 only"
    if needs.head_dim > 256 or needs.head_dim % 8:
        return f"head_dim {needs.head_dim}: multiples of 8 up to 256 only"
    for name in missing:
        if getattr(needs, name):
            return f"no {name}"
    return None


def flash4_lacks(needs: Needs) -> str | None:
    """What flash-attention 4 does not offer here."""
    if (reason := _lacks(needs, ("dropout",))) is not None:
        return reason
    if needs.capability < (9, 0):
        return "Hopper or later only"
    if _missing("flash_attn.cute"):
        return "the package flash-attn-4 is not installed"
    return None


def flash2_lacks(needs: Needs) -> str | None:
    """What flash-attention 2 does not offer here."""
    if (reason := _lacks(needs, ())) is not None:
        return reason
    return "the package flash-attn is not installed" if _missing("flash_attn.flash_attn_interface") else None


def torch_varlen_lacks(needs: Needs) -> str | None:
    """What torch's varlen does not offer."""
    return _lacks(needs, ("window", "softcap", "dropout", "deterministic"))


def slow_after_ampere(needs: Needs) -> str | None:
    """Kernels of the Ampere generation reach about half of what a Hopper card can do."""
    if needs.capability < (9, 0):
        return None
    return f"this card can do about twice as much{_install_flash4()}"


def slow_beside_flash4(needs: Needs) -> str | None:
    """cuDNN has the speed of Hopper, but a call for each document, and torch.compile stops before it."""
    if needs.capability < (9, 0):
        return None
    return f"flash-attention 4 makes steps 5 to 14 % faster{_install_flash4()}"


def _install_flash4() -> str:
    missing = _missing("flash_attn.cute")
    return "; install flash-attn-4 (pip install 'sft_job[fa4]')" if missing else ""


def _missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:
        return True
