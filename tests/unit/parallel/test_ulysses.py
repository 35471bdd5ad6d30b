from __future__ import annotations

import pytest
import torch

from sft_job.parallel.mesh import Layout
from sft_job.parallel.ulysses import gather_sequence, kv_repeats, scatter_sequence


def test_layout_puts_ulysses_ranks_side_by_side() -> None:
    places = [Layout.of(rank, 6, 2) for rank in range(6)]
    assert [(p.dp_rank, p.ulysses_rank) for p in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert {(p.dp_size, p.world) for p in places} == {(3, 6)}
    with pytest.raises(ValueError, match="4 does not divide 6"):
        Layout.of(0, 6, 4)


def test_kv_repeats() -> None:
    assert [kv_repeats(kv, u) for kv, u in ((8, 4), (4, 4), (2, 4), (1, 8))] == [1, 1, 2, 8]
    with pytest.raises(ValueError, match="6 key/value heads"):
        kv_repeats(6, 4)


def _exchange(heads: int, kv_heads: int, value_dim: int, world: int) -> dict[str, torch.Tensor]:
    """Heads of this rank over the whole sequence, the way back, and the gradient of a weighted sum."""
    import torch.distributed as dist

    from sft_job.runtime import start_runtime

    rank = start_runtime(60).rank
    torch.manual_seed(0)
    shapes = {"q": (heads, 4), "k": (kv_heads, 4), "v": (kv_heads, value_dim)}
    whole = {name: torch.randn(1, h, 3 * world, d, dtype=torch.float64) for name, (h, d) in shapes.items()}
    mine = {name: x[:, :, 3 * rank : 3 * rank + 3].clone().requires_grad_() for name, x in whole.items()}
    q, k, v = gather_sequence(mine["q"], mine["k"], mine["v"], dist.group.WORLD)
    back = scatter_sequence(q.transpose(1, 2), dist.group.WORLD)
    weight = torch.randn(whole["v"].shape[1], whole["v"].shape[2], dtype=torch.float64)
    per_head = weight.repeat_interleave(v.shape[1] * world // kv_heads, dim=0)
    local = per_head[rank * v.shape[1] : (rank + 1) * v.shape[1]]
    (v * local[None, :, :, None]).sum().backward()
    return {"q": q, "k": k, "v": v, "back": back, "whole": whole, "grad": mine["v"].grad, "weight": weight}  # type: ignore[dict-item]


@pytest.mark.parametrize(("world", "heads", "kv_heads", "value_dim"), [(2, 4, 2, 4), (4, 8, 2, 4), (4, 4, 4, 6)])
def test_exchange_and_its_gradient(ranks, world, heads, kv_heads, value_dim) -> None:
    results = ranks(world, _exchange, heads, kv_heads, value_dim, world)
    repeats = max(1, world // kv_heads)
    for rank, found in enumerate(results):
        whole = found["whole"]
        share, kv_share = heads // world, kv_heads * repeats // world
        assert torch.equal(found["q"], whole["q"][:, rank * share : (rank + 1) * share])
        repeated = whole["k"].repeat_interleave(repeats, dim=1)
        assert torch.equal(found["k"], repeated[:, rank * kv_share : (rank + 1) * kv_share])
        assert torch.equal(found["back"], whole["q"].transpose(1, 2)[:, 3 * rank : 3 * rank + 3])
        # Every copy of a head was weighted alike, so its gradient is the weight, once for each copy.
        expected = found["weight"][None, :, 3 * rank : 3 * rank + 3, None] * repeats
        assert torch.allclose(found["grad"], expected.expand_as(found["grad"]))


def _copies(value_dim: int) -> tuple[dict[str, int], bool, bool]:
    """Ops of an exchange of heads as layers make them, and whether its results lie where they were received."""
    import torch.distributed as dist

    from sft_job.runtime import start_runtime

    start_runtime(60)
    shapes = ((4, 8), (2, 8), (2, value_dim))
    q, k, v = (torch.randn(1, 6, h * d).view(1, 6, h, d).transpose(1, 2) for h, d in shapes)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = gather_sequence(q, k, v, dist.group.WORLD)
    counts = {event.key: event.count for event in profile.key_averages()}
    places = {x.untyped_storage().data_ptr() for x in got}
    return counts, len(places) == 1, all(x.stride(3) == 1 for x in got)


@pytest.mark.parametrize("value_dim", [8, 6])
def test_one_exchange_and_one_copy(ranks, value_dim) -> None:
    for counts, together, dense in ranks(2, _copies, value_dim):
        assert counts["sft_job::all_to_all"] == 1
        assert counts["aten::cat"] == 1
        assert not {"aten::clone", "aten::copy_"} & counts.keys()
        assert together
        assert dense
