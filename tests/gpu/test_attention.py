"""Every attention backend that this machine has against SDPA in fp32: output and gradients of random packed batches.

pytest -m gpu -s tests/gpu/test_attention.py      shows the errors
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from sft_job.model.attention.call import AttentionCall, Backend, Documents, Needs
from sft_job.model.attention.choose import BACKENDS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BY_NAME = {backend.name: backend for backend in BACKENDS}
# head_dim, query heads, key/value heads, window, soft cap
CASES = [
    (64, 14, 2, None, None),
    (128, 28, 4, None, None),
    (128, 8, 8, None, None),
    (256, 4, 2, None, None),
    (128, 8, 2, 512, None),
    (64, 8, 8, 100, None),
    (128, 8, 4, None, 30.0),
]
FAR = 1e-2
"""Relative difference of norms: bf16 has 8 bits, and the probabilities pass through it; 3e-3 to 6e-3 were seen."""


def packing(seed: int) -> Documents:
    """Six documents of 1 to 1,500 tokens, one of a single token, and one long enough for cuDNN to be worth it."""
    lengths = (1, *(int(n) for n in np.random.default_rng(seed).integers(2, 1500, 5)), 4096)
    borders = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device="cuda")
    return Documents(lengths, borders, max(lengths))


def attended(
    backend: Backend, tensors: list[torch.Tensor], slope: torch.Tensor, call: AttentionCall
) -> list[torch.Tensor]:
    """Output, and the gradients of q, k and v, in the dtype of the tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = backend.attend(*leaves, call)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope.to(out.dtype))]


@pytest.mark.parametrize("case", CASES, ids=str)
# Eager is the formula itself, whose scores pass through bf16; the unit tests hold it in fp64.
@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS if backend.name != "eager"])
def test_it_agrees_with_fp32(name, case) -> None:
    head_dim, heads, kv_heads, window, softcap = case
    capability = torch.cuda.get_device_capability()
    needs = Needs(
        "cuda", torch.bfloat16, head_dim, window=window is not None, softcap=softcap is not None,
        capability=capability, longest=4096,
    )  # fmt: skip
    backend = BY_NAME[name]
    if (reason := backend.lacks(needs)) is not None:
        pytest.skip(f"{name}: {reason}")
    torch.manual_seed(head_dim + heads)
    documents = packing(head_dim + heads)
    tokens = sum(documents.lengths)
    # Rounded once, so that both sides begin with the same numbers.
    tensors = [
        torch.randn(1, h, tokens, head_dim, device="cuda").bfloat16().float() for h in (heads, kv_heads, kv_heads)
    ]
    slope = torch.randn(1, tokens, heads, head_dim, device="cuda").bfloat16().float()
    call = AttentionCall(documents, None, 0.0, window, softcap)
    wanted = attended(BY_NAME["eager" if softcap else "sdpa"], tensors, slope, call)
    found = attended(backend, [tensor.bfloat16() for tensor in tensors], slope, call)
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]
    sys.stdout.write(f"{name} {case}: {', '.join(f'{error:.1e}' for error in errors)}\n")
    assert all(a.shape == b.shape for a, b in zip(found, wanted, strict=True))
    assert max(errors) < FAR
