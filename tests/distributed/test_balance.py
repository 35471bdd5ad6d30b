"""Long and short documents in one step, spread over Ulysses groups: the loss and gradients of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_job.data.packing import PackSettings, plan_batch
from tests.tiny import save_model

MIXED = [1280, 5, 700, 5, 3, 5, 5, 310, 5, 2, 5, 5]
"""As 128K beside 500 tokens, a hundredth of it."""
CASES = {
    "several long documents of different lengths": ([640, 410, 333, 97, 512, 250], PackSettings(tokens=1100)),
    "documents shorter than the group": ([3, 1, 2, 1, 3], PackSettings(rows=2)),
    "one document shorter than the group": ([2], PackSettings(rows=1)),
    "long and short ones": (MIXED, PackSettings(tokens=1280, quadratic=1 / 100)),
    "long and short ones, one by one": (MIXED, PackSettings(rows=1)),
}
LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four key/value heads, so that a group may have four ranks."""
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, num_key_value_heads=4, max_position_embeddings=2048)


def _steps(folder: Path, ulysses: int) -> dict[str, tuple[float, dict[str, torch.Tensor], list[int]]]:
    """Each case as one step: mean loss, gradients, and the tokens of this rank's micro-batches."""
    import torch.distributed as dist

    from sft_job.data.batches import pack_rows
    from sft_job.parallel.accumulation import Accumulation
    from tests.distributed.runs import whole
    from tests.distributed.test_model import _documents, _module

    module, mesh = _module(folder, ulysses, "fp64")
    place, accumulation = mesh.layout, Accumulation(module)
    found = {}
    for name, (lengths, settings) in CASES.items():
        rows = _documents(lengths)
        plan = plan_batch(np.array(lengths, dtype=np.int32), range(len(lengths)), place.dp_size, settings)
        divisor = sum(length - 1 for length in lengths)
        total: Any = torch.zeros((), dtype=torch.float64)
        sizes = []
        for number, chosen in enumerate(plan[place.dp_rank]):
            last = number == len(plan[place.dp_rank]) - 1
            batch = pack_rows([rows[row] for row in chosen], ulysses, place.ulysses_rank, 0)
            with accumulation.micro_batch(last=last, reshard=True):
                loss = module(batch, divisor)
                loss.backward()
            total += loss.detach()
            sizes.append(batch.input_ids.shape[1])
        dist.all_reduce(total)
        gradients = {key: whole(p.grad) for key, p in module.lm.named_parameters() if p.grad is not None}
        found[name] = (total.item(), gradients, sizes)
        module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("world", "ulysses"), LAYOUTS)
def test_loss_and_gradients_are_those_of_one_rank(model, ranks, world, ulysses) -> None:
    alone = ranks(1, _steps, model, 1)[0]
    together = ranks(world, _steps, model, ulysses)
    for name, (loss, gradients, _) in alone.items():
        for found in together:
            assert found[name][0] == pytest.approx(loss, rel=1e-12), name
        mine = together[0][name][1]
        assert mine.keys() == gradients.keys()
        scale = max(gradient.abs().max().item() for gradient in gradients.values())
        for key, gradient in gradients.items():
            assert (mine[key] - gradient).abs().max().item() <= 1e-12 * scale, (name, key)
        assert len({len(found[name][2]) for found in together}) == 1, "every rank takes part in every round"


def test_nobody_is_idle_beside_a_long_document() -> None:
    """Two groups: while one has the longest document, the other has the next ones or all the short ones."""
    lengths, settings = CASES["long and short ones"]
    for at_once in zip(*plan_batch(np.array(lengths), range(len(lengths)), 2, settings), strict=True):
        assert all(at_once), at_once
