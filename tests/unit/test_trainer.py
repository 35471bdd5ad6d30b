"""What a step holds on to."""

from __future__ import annotations

import contextlib
import weakref
from types import SimpleNamespace
from typing import Any

import torch

from sft_job.trainer import Trainer


def test_a_micro_batch_meets_nothing_of_the_one_before() -> None:
    """What its graph still holds would be there twice."""
    weight = torch.ones((), requires_grad=True)
    losses: list[Any] = []

    def forward(batch: Any, targets: int) -> torch.Tensor:
        assert all(loss() is None for loss in losses)
        loss = weight * 2.0
        losses.append(weakref.ref(loss))
        return loss

    trainer: Any = SimpleNamespace(
        _runtime=SimpleNamespace(device=torch.device("cpu"), pulse=SimpleNamespace(beat=lambda: None)),
        accumulation=SimpleNamespace(micro_batch=lambda **_: contextlib.nullcontext()),
        _module=forward,
        _reshard=True,
    )
    batches: Any = [SimpleNamespace(to=lambda device: None)] * 3
    assert Trainer.accumulate(trainer, batches, 1).item() == 6.0
    assert len(losses) == 3
    assert weight.grad == 6.0
