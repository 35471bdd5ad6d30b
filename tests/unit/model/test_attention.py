from __future__ import annotations

import pytest
import torch

from sft_job.errors import JobError
from sft_job.model.attention.call import AttentionCall, Documents, Needs, Packed
from sft_job.model.attention.choose import BACKENDS, choose_backend
from sft_job.model.attention.packed import packed_attention

SDPA, EAGER = (next(b for b in BACKENDS if b.name == name) for name in ("sdpa", "eager"))


def documents(*lengths: int) -> Documents:
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Documents(lengths, borders, max(lengths))


def qkv(heads: int, kv_heads: int, length: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sizes = [(1, h, length, 8) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def masked(q, k, v, packing: Documents, window: int | None, softcap: float | None, scale: float):
    """All documents at once under one big mask."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    owner = torch.repeat_interleave(torch.arange(len(packing.lengths)), torch.tensor(packing.lengths))
    place = torch.arange(q.shape[2])
    seen = (owner[:, None] == owner[None]) & (place[:, None] >= place[None])
    if window:
        seen &= place[:, None] - place[None] < window
    scores = q @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("backend", "window", "softcap"), [
    (SDPA, None, None), (SDPA, 3, None), (EAGER, None, None), (EAGER, 3, None), (EAGER, None, 2.0), (EAGER, 3, 2.0),
])  # fmt: skip
def test_equals_one_masked_attention(backend, window, softcap, kv_heads) -> None:
    packing = documents(5, 1, 9, 2)
    inputs = qkv(4, kv_heads, 17)
    expected = masked(*inputs, packing, window, softcap, 0.3)
    found = backend.attend(*inputs, AttentionCall(packing, 0.3, 0.0, window, softcap))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(mine, reference, rtol=1e-9, atol=1e-11)


def test_the_choice_says_what_was_passed_over() -> None:
    backend, why = choose_backend(Needs("cpu", torch.float32, 64, softcap=True))
    assert backend.name == "eager"
    assert "torch_varlen: CUDA only" in why
    assert "sdpa: no logit soft cap" in why
    assert choose_backend(Needs("cuda", torch.bfloat16, 128))[0].name == "torch_varlen"
    assert choose_backend(Needs("cuda", torch.float32, 128))[0].name == "sdpa"
    assert choose_backend(Needs("cuda", torch.bfloat16, 128, window=True))[0].name == "sdpa"


def test_needs_that_nothing_offers_are_refused() -> None:
    with pytest.raises(JobError, match="no attention backend serves this model: sdpa: no logit soft cap"):
        choose_backend(Needs("cpu", torch.float32, 64, softcap=True), backends=[SDPA])


@pytest.mark.parametrize("more", [{"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, {"is_causal": False}])
def test_what_a_layer_asks_for_is_never_dropped(more) -> None:
    packed = Packed(documents(4), SDPA, None)
    with pytest.raises(JobError, match="not supported"):
        packed_attention(torch.nn.Identity(), *qkv(4, 4, 4), None, packed=packed, **more)
