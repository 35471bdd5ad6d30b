"""An MLP in pieces: the same numbers, gradients within rounding, and no forward more than recomputation has anyway."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from sft_job.model.supported import decoder_blocks
from sft_job.model.tiled import _split, dense_mlp, tile_tokens, tiled
from tests.tiny import model_config

TILE = 256


def block(kind: str = "qwen3", **more: Any) -> Any:
    torch.manual_seed(0)
    return decoder_blocks(AutoModelForCausalLM.from_config(model_config(kind, 300, **more), dtype=torch.float64))[0]


def run(mlp: nn.Module, forward: Any, hidden: Tensor, *, outer: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients behind a residual, as in a block."""
    hidden = hidden.clone().requires_grad_()

    def whole(x: Tensor) -> Tensor:
        return x + forward(mlp, torch.tanh(x))

    out = checkpoint(whole, hidden, use_reentrant=False) if outer else whole(hidden)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    grads = {name: p.grad for name, p in mlp.named_parameters() if p.grad is not None}
    mlp.zero_grad()
    return out, {**grads, "hidden": hidden.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("tokens", [200, 256, 257, 700, 1024])
def test_pieces_give_the_same_gradients(tokens, outer) -> None:
    mlp = block().mlp
    plain = type(mlp).forward
    hidden = torch.randn(1, tokens, 32, dtype=torch.float64)
    out, grads = run(mlp, tiled(plain, plain, TILE), hidden, outer=outer)
    wanted, wanted_grads = run(mlp, plain, hidden)
    assert grads.keys() == wanted_grads.keys()
    if tokens <= TILE:
        assert torch.equal(out, wanted)
        assert all(torch.equal(grads[name], grad) for name, grad in wanted_grads.items())
    assert torch.allclose(out, wanted, rtol=1e-12)
    for name, grad in wanted_grads.items():
        assert torch.allclose(grads[name], grad, rtol=1e-10, atol=1e-13), name


def test_gradients_are_added_up_wide() -> None:
    """bf16 over many pieces: about as exact as one product; added up in bf16 it would be ten times worse."""
    mlp = block().mlp.to(torch.bfloat16)
    plain = type(mlp).forward
    hidden = torch.randn(1, 64 * TILE, 32).bfloat16()
    found, wanted = run(mlp, tiled(plain, plain, TILE), hidden)[1], run(mlp, plain, hidden)[1]
    exact = run(mlp.double(), plain, hidden.double())[1]

    def error(grads: dict[str, Tensor]) -> float:
        return sum(((grads[name].double() - exact[name]).norm() / exact[name].norm()).item() for name in exact)

    assert error(found) < 2 * error(wanted)


def test_no_forward_is_wasted() -> None:
    """A recomputed block runs its MLP twice, whole or in pieces, and never on more than a piece."""
    mlp = block().mlp
    plain = type(mlp).forward
    seen: list[int] = []

    def counting(part: nn.Module, hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[1])
        return plain(part, hidden)

    run(mlp, tiled(counting, counting, TILE), torch.randn(1, 700, 32, dtype=torch.float64), outer=True)
    assert sum(seen) == 2 * 700
    assert max(seen) <= TILE


def test_without_gradients_it_works_in_pieces_too() -> None:
    mlp = block().mlp
    plain = type(mlp).forward
    hidden = torch.randn(1, 700, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(tiled(plain, plain, TILE)(mlp, hidden), plain(mlp, hidden), rtol=1e-12)


@pytest.mark.parametrize("frozen_input", [False, True])
def test_adapters(frozen_input) -> None:
    """Only what is trained gets gradients; also where the MLP's input has none."""
    lm = AutoModelForCausalLM.from_config(model_config("qwen3", 300), dtype=torch.float64)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["gate_proj", "down_proj"]), lm)
    mlp = dense_mlp(decoder_blocks(lm)[0])
    assert mlp is not None
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter)
    plain = type(mlp).forward
    hidden = torch.randn(1, 700, 32, dtype=torch.float64).requires_grad_(not frozen_input)

    def gradients(forward: Any) -> dict[str, Tensor | None]:
        forward(mlp, hidden).square().sum().backward()
        found = {name: p.grad for name, p in mlp.named_parameters()} | {"hidden": hidden.grad}
        mlp.zero_grad()
        hidden.grad = None
        return found

    found, wanted = gradients(tiled(plain, plain, TILE)), gradients(plain)
    assert sum(grad is not None for grad in wanted.values()) == 4 + (not frozen_input)
    for name, grad in wanted.items():
        if grad is None:
            assert found[name] is None, name
        else:
            assert torch.allclose(found[name], grad, rtol=1e-9, atol=1e-12), name  # type: ignore[arg-type]


@given(st.integers(1, 5000), st.integers(1, 8))
@example(3584, 3)
def test_pieces_cover_the_sequence_and_are_alike(tokens: int, tile: int) -> None:
    pieces = [piece.shape[-2] for piece in _split(torch.empty(1, tokens, 0), 256 * tile)]
    assert sum(pieces) == tokens
    assert max(pieces) <= 256 * tile
    fewest = -(-tokens // (256 * tile))
    assert len(pieces) == fewest or (len(set(pieces)) == 1 and fewest < len(pieces) < 2 * fewest)


def test_which_mlps_are_taken() -> None:
    for kind in ("qwen2", "qwen3", "llama", "gemma", "gemma2", "mistral"):
        assert dense_mlp(block(kind)) is block(kind).mlp or isinstance(dense_mlp(block(kind)), nn.Module)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.drop(self.up(hidden))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
            return self.up(hidden) + residual

    for refused in (Experts(), Dropped(), Residual(), nn.LayerNorm(4)):
        assert dense_mlp(SimpleNamespace(mlp=refused)) is None  # type: ignore[arg-type]
    assert dense_mlp(SimpleNamespace()) is None  # type: ignore[arg-type]


def test_pieces_by_the_widest_layer() -> None:
    assert tile_tokens(block("qwen3", intermediate_size=1024).mlp, 2**20) == 1024
    assert tile_tokens(block().mlp, 1) == 256
