"""Matrix products in fp8, emulated: the same values rounded as on a GPU, in wider dtypes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.model.fp8 import MULTIPLE, check_fp8, convert_to_fp8, token_multiple, uses_fp8
from tests.tiny import model_config

pytest.importorskip("torchao")
RECIPES = ["tensorwise", "rowwise"]


class Adapted(nn.Module):
    """A frozen layer with an adapter beside it, named as PEFT names them."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(32, 32, bias=False).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(32, 16, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(16, 32, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Block(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.thin = nn.Linear(48, 8)  # not a multiple of 16
        self.second = nn.Linear(48, 32, bias=False)
        self.adapted = Adapted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(self.first(x))
        return self.adapted(self.second(hidden)) + self.thin(hidden).mean(-1, keepdim=True)


def pair(recipe: str) -> tuple[Block, Block, int]:
    """The same block in fp32 and in emulated fp8, and how many layers were swapped."""
    torch.manual_seed(0)
    plain, block = Block(), Block()
    block.load_state_dict(plain.state_dict())
    return plain, block, convert_to_fp8([block], recipe, emulate=True)


def swapped(block: nn.Module) -> set[str]:
    from torchao.float8.float8_linear import Float8Linear

    return {name for name, part in block.named_modules() if isinstance(part, Float8Linear)}


def gradients(block: Block, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    x = x.clone().requires_grad_()
    out = block(x)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    return out.detach(), {"x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}


@pytest.mark.parametrize("recipe", RECIPES)
def test_thick_layers_are_swapped_and_parameters_stay(recipe) -> None:
    torch.manual_seed(0)
    block = Block()
    before = {name: (id(p), p.dtype, p.requires_grad) for name, p in block.named_parameters()}
    assert convert_to_fp8([block], recipe, emulate=True) == 3
    assert {name: (id(p), p.dtype, p.requires_grad) for name, p in block.named_parameters()} == before
    assert swapped(block) == {"first", "second", "adapted.base_layer"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_near_those_of_fp32_and_not_equal(recipe) -> None:
    """Within what three bits of mantissa lose; a frozen layer passes a gradient on and has none itself."""
    plain, block, _ = pair(recipe)
    x = torch.randn(MULTIPLE * 2, 32)
    wanted_out, wanted = gradients(plain, x)
    out, found = gradients(block, x)
    assert 0 < (out - wanted_out).norm() < 0.1 * wanted_out.norm()
    assert found.keys() == wanted.keys()
    assert found["adapted.base_layer.weight"] is None
    for name, gradient in wanted.items():
        if gradient is None:
            continue
        mine = found[name]
        assert mine is not None, name
        assert mine.dtype == torch.float32
        assert (mine - gradient).norm() < 0.15 * gradient.norm(), name
    # A layer's own products are in fp8 in both directions.
    assert not torch.equal(found["second.weight"], wanted["second.weight"])
    assert not torch.equal(found["x"], wanted["x"])


def test_a_models_blocks_and_nothing_else() -> None:
    """Head, embedding and projections into heads stay in bf16; a block's other layers are swapped, on meta too."""
    from transformers import AutoModelForCausalLM

    from sft_job.model.supported import decoder_blocks

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(model_config("llama", 320, hidden_size=64))
    assert convert_to_fp8(decoder_blocks(lm), "tensorwise") == 2 * 4
    assert {name.rpartition(".")[2] for name in swapped(lm)} == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(parameter.is_meta for parameter in lm.parameters())


def test_what_it_is_off_for() -> None:
    assert not uses_fp8("none")
    assert all(uses_fp8(recipe) for recipe in RECIPES)
    assert (token_multiple("none"), token_multiple("rowwise")) == (1, MULTIPLE)
    check_fp8("none", torch.device("cpu"), torch.float32)


class Card:
    """What is asked of a GPU."""

    type = "cuda"


@pytest.mark.parametrize(("capability", "dtype", "shown"), [
    (None, torch.bfloat16, "needs a GPU with fp8 units"),
    ((8, 0), torch.bfloat16, "needs a GPU with fp8 units"),
    ((9, 0), torch.float32, r"needs bf16 as the compute dtype \(model.fsdp_config.dtype\)"),
    ((8, 9), torch.bfloat16, None),
])  # fmt: skip
def test_where_it_cannot_be_had(monkeypatch, capability, dtype, shown) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device: Any = torch.device("cpu") if capability is None else Card()
    if shown is None:
        check_fp8("rowwise", device, dtype)
        return
    with pytest.raises(JobError, match=rf"model.fp8 = 'rowwise': {shown}.*\n    fix: model.fp8=none") as caught:
        check_fp8("rowwise", device, dtype)
    assert caught.value.code == ExitCode.CONFIG


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(JobError, match=r"needs the package torchao\n    fix: pip install 'sft_job\[fp8\]'") as caught:
        convert_to_fp8([Block()], "tensorwise")
    assert caught.value.code == ExitCode.CONFIG
