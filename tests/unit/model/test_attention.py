from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sft_job.config.validate import ATTENTION_BACKENDS
from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.model.attention import flash
from sft_job.model.attention.call import AttentionCall, Documents, Needs, Packed
from sft_job.model.attention.choose import BACKENDS, choose_backend
from sft_job.model.attention.packed import packed_attention
from tests.traced import attend_op

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
    backend, why, _ = choose_backend(Needs("cpu", torch.float32, 64, softcap=True))
    assert backend.name == "eager"
    assert "torch_varlen: CUDA only" in why
    assert "sdpa: no logit soft cap" in why
    assert choose_backend(Needs("cuda", torch.bfloat16, 128))[0].name == "torch_varlen"
    assert choose_backend(Needs("cuda", torch.float32, 128))[0].name == "sdpa"
    assert choose_backend(Needs("cuda", torch.bfloat16, 128, window=True))[0].name == "sdpa"


def test_needs_that_nothing_offers_are_refused() -> None:
    with pytest.raises(JobError, match="no attention backend serves this model: sdpa: no logit soft cap"):
        choose_backend(Needs("cpu", torch.float32, 64, softcap=True), backends=[SDPA])


AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
FLASH4, FLASH2 = "flash_attn.cute", "flash_attn.flash_attn_interface"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """``installed(*modules)``: what can be imported of the optional packages."""

    def install(*modules: str) -> None:
        monkeypatch.setattr(flash, "_missing", lambda module: module not in modules)

    return install


def chosen(capability: tuple[int, int], longest: int, **more: Any) -> tuple[str, str, str]:
    found = choose_backend(Needs("cuda", torch.bfloat16, 128, capability=capability, longest=longest, **more))
    return found.backend.name, found.text, found.slow


@pytest.mark.parametrize(("capability", "packages", "longest", "name", "slow"), [
    (AMPERE, (), 32768, "torch_varlen", False),
    (AMPERE, (FLASH2,), 32768, "flash2", False),
    (AMPERE, (FLASH4, FLASH2), 512, "flash2", False),
    (HOPPER, (FLASH4, FLASH2), 512, "flash4", False),
    (HOPPER, (), 4096, "cudnn", True),
    (BLACKWELL, (), 4096, "cudnn", True),
    (HOPPER, (), 4095, "torch_varlen", True),
    (HOPPER, (FLASH2,), 2048, "flash2", True),
    (BLACKWELL, (FLASH4,), 32768, "flash4", False),
    (BLACKWELL, (), 2048, "torch_varlen", True),
])  # fmt: skip
def test_the_choice_by_card_and_packages(installed, capability, packages, longest, name, slow) -> None:
    installed(*packages)
    found, text, why_slow = chosen(capability, longest)
    assert found == name
    assert ("pip install 'sft_job[fa4]'" in why_slow) is bool(why_slow) is slow
    assert ("never run by this project's authors" in text) is (name == "flash2")


def test_a_package_that_is_there_is_not_advised(installed) -> None:
    installed(FLASH4, FLASH2)
    found, _, slow = chosen(HOPPER, 8192, dropout=True)
    assert found == "flash2"
    assert "twice as much" in slow
    assert "install" not in slow


@pytest.mark.parametrize(("more", "name"), [
    ({"window": True}, "flash4"), ({"softcap": True}, "flash4"), ({"deterministic": True}, "flash4"),
    ({"dropout": True}, "flash2"),
])  # fmt: skip
def test_what_a_model_needs_rules_backends_out(installed, more, name) -> None:
    installed(FLASH4, FLASH2)
    assert chosen(HOPPER, 8192, **more)[0] == name
    installed()
    plain = "eager" if "softcap" in more else "sdpa"
    found, text, _ = chosen(HOPPER, 8192, **more)
    assert found == plain
    assert "flash4: " in text
    assert f"cudnn: no {next(iter(more))}" in text


@pytest.mark.parametrize(("head_dim", "dtype", "shown"), [
    (512, torch.bfloat16, "head_dim 512"), (36, torch.bfloat16, "head_dim 36"), (64, torch.float32, "bf16 only"),
])  # fmt: skip
def test_shapes_that_kernels_cannot_do(installed, head_dim, dtype, shown) -> None:
    installed(FLASH4, FLASH2)
    backend, text, _ = choose_backend(Needs("cuda", dtype, head_dim, capability=HOPPER, longest=8192))
    assert backend.name == "sdpa"
    assert text.count(shown) == 4


def test_a_backend_by_name(installed) -> None:
    """It is taken or refused, never replaced; whoever named it needs no warning."""
    installed()
    hopper = Needs("cuda", torch.bfloat16, 128, capability=HOPPER, longest=8192)
    backend, text, slow = choose_backend(hopper, "sdpa")
    assert (backend.name, text, slow) == ("sdpa", "attention: sdpa (as set)", "")
    for name, why in (("flash4", "the package flash-attn-4 is not installed"), ("flash2", "flash-attn is not")):
        with pytest.raises(JobError, match=rf"model.attention = '{name}': no attention backend .*{why}") as caught:
            choose_backend(hopper, name)
        assert caught.value.code == ExitCode.CONFIG
    with pytest.raises(JobError, match=r"model.attention = 'cudnn'.*cudnn: Hopper or later only$"):
        choose_backend(Needs("cpu", torch.float32, 64), "cudnn")


def test_settings_name_the_backends_that_there_are() -> None:
    assert tuple(backend.name for backend in BACKENDS) == ATTENTION_BACKENDS


def test_a_package_that_is_not_there_is_missing() -> None:
    assert flash._missing("nonesuch_package.part")
    assert flash._missing("torch.nonesuch")
    assert not flash._missing("torch.nn")


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("need", [(True, True, True), (True, False, True)])
def test_flash4_under_fake_tensors(kv_heads, need) -> None:
    """What torch.compile sees: shapes, dtypes, strides of results and gradients, at a head dim of its own
    for the values."""
    with FakeTensorMode():
        sizes = ((17, 4, 16), (17, kv_heads, 16), (17, kv_heads, 8))
        tensors = [
            torch.empty(size, dtype=torch.bfloat16, requires_grad=needed)
            for size, needed in zip(sizes, need, strict=True)
        ]
        borders = torch.empty(4, dtype=torch.int32)
        out, lse = flash.flash4_op(*tensors, borders, 9, 0.25, 0, 0.0)
        assert (out.shape, out.dtype) == ((17, 4, 8), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((4, 17), torch.float32)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        # A gradient as a layer gives it: heads and tokens transposed.
        out.backward(torch.empty(4, 17, 8, dtype=torch.bfloat16).transpose(0, 1))
        for tensor, needed in zip(tensors, need, strict=True):
            if not needed:
                assert tensor.grad is None
                continue
            assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, tensor.dtype)
            assert tensor.grad.stride() == tensor.stride()


def test_flash4_takes_what_a_layer_gives() -> None:
    """[1, h, T, d] in, [1, T, H, Dv] out, with the options of the call; nothing is computed here."""
    with FakeTensorMode():
        q, k, v = (torch.empty(1, h, 17, d, dtype=torch.bfloat16) for h, d in ((4, 16), (2, 16), (2, 8)))
        packing = Documents((9, 8), torch.empty(3, dtype=torch.int32), 9)
        for call in (AttentionCall(packing, None, 0.0, None, None), AttentionCall(packing, 0.3, 0.0, 5, 20.0)):
            assert flash.flash4(q, k, v, call).shape == (1, 17, 4, 8)


def test_the_tests_own_op_is_a_proper_one() -> None:
    """Schema, fake kernel, autograd formula and compiled form agree with what it computes."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, h, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    torch.library.opcheck(attend_op, (q, k, v, torch.tensor([0, 3, 7], dtype=torch.int32), 0.5))
    assert torch.autograd.gradcheck(lambda *x: attend_op(*x, torch.tensor([0, 3, 7]), 0.5), (q, k, v))


@pytest.mark.parametrize("more", [{"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, {"is_causal": False}])
def test_what_a_layer_asks_for_is_never_dropped(more) -> None:
    packed = Packed(documents(4), SDPA, None)
    with pytest.raises(JobError, match="not supported"):
        packed_attention(torch.nn.Identity(), *qkv(4, 4, 4), None, packed=packed, **more)
