"""AdamW with clipping in one kernel: what surrounds the kernel, and the kernel itself where Triton is there."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sft_job.config.schema import OptimConfig
from sft_job.optimizer import ClippingAdamW, build_optimizer
from tests.unit import adamw_interpreted, adamw_reference

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sft_job.adamw_kernel", adamw_reference.module())


def one_step(optimizer: ClippingAdamW, loss: float = 1.0, norm: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step(loss=torch.tensor(loss), norm=torch.tensor(norm), clip=1.0)


def made(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], ClippingAdamW]:
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    return parameters, ClippingAdamW([{"params": parameters}], OptimConfig(lr=0.1))


@pytest.mark.usefixtures("reference")
def test_it_is_torchs_with_clipped_gradients_and_skips_what_is_not_finite() -> None:
    adamw_interpreted.compare()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes with CUDA")
def test_the_kernel_is_torchs_under_the_interpreter() -> None:
    variables = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.unit.adamw_interpreted"]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_a_step_that_is_not_taken_changes_nothing_and_does_not_count(loss: float, norm: float) -> None:
    (weights,), optimizer = made((3, 2))
    one_step(optimizer, loss=1.0, norm=2.0)
    before = [value.clone() for value in (weights, *optimizer.state[weights].values())]
    one_step(optimizer, loss=loss, norm=norm)
    optimizer.take_back()
    optimizer.take_back()  # only the last step's count goes
    after = [weights, *optimizer.state[weights].values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert optimizer.state[weights]["step"] == 1


@pytest.mark.usefixtures("reference")
def test_hooks_come_once_and_before_the_weights_move() -> None:
    (weights,), optimizer = made((4,))
    nn_adamw = torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # its step is hooked too, once one of its kind is made
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weights[0].item()))
    one_step(optimizer)
    assert seen == [1.0]
    assert weights[0].item() != 1.0
    assert not nn_adamw.state


@pytest.mark.usefixtures("reference")
def test_states_are_those_of_torch_also_those_of_a_fused_one() -> None:
    parameters, optimizer = made((3, 2), (0, 2), dtype=torch.bfloat16)
    one_step(optimizer)
    state = optimizer.state[parameters[0]]
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    assert [value.dtype for value in state.values()] == [torch.float32, torch.bfloat16, torch.bfloat16]
    other = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in parameters], fused=True)
    other.load_state_dict(optimizer.state_dict())
    again = ClippingAdamW([{"params": parameters}], OptimConfig())
    again.load_state_dict(other.state_dict())
    one_step(again)
    assert again.state[parameters[0]]["step"] == 2
    assert again.state[parameters[0]]["step"].device.type == "cpu"


@pytest.mark.usefixtures("reference")
def test_parameters_without_a_gradient_stay_and_do_not_count() -> None:
    (moved, kept), optimizer = made((2,), (2,))
    moved.grad = torch.ones(2)
    optimizer.step()
    assert kept not in optimizer.state
    assert torch.equal(kept, torch.ones(2))
    assert not torch.equal(moved, torch.ones(2))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_parameters_in_host_memory_have_torchs_own(device_type: str) -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(no_decay_on_norms_and_biases=True), device_type)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [OptimConfig().weight_decay, 0.0]
    assert optimizer.param_groups[0]["fused"] is (device_type == "cuda")
