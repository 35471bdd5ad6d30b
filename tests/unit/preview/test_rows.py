from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_job.data.batches import IGNORED, BatchLoader
from sft_job.data.cache import TokenCache
from sft_job.data.order import RowOrder
from sft_job.data.packing import pack_settings
from sft_job.preview.rows import Pack, TrainingStream
from tests.unit.preview.conftest import MakeStream, job_config


def loader(config, cache: TokenCache, dp_size: int, dp_rank: int, ulysses_rank: int) -> BatchLoader:
    order = RowOrder(config.trainer.seed, cache.num_rows, config.data.train_batch_size)
    size = config.ulysses_sequence_parallel_size
    place = {"dp_rank": dp_rank, "dp_size": dp_size, "ulysses_rank": ulysses_rank, "ulysses_size": size}
    return BatchLoader(cache, order, pack_settings(config), pad_id=0, **place)


@settings(max_examples=40)
@given(data=st.data())
def test_packs_are_what_the_ranks_get(cache: TokenCache, data: st.DataObject) -> None:
    ulysses, dp_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    tokens = data.draw(st.one_of(st.none(), st.integers(20, 400)))
    config = job_config(data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5)), ulysses, tokens)
    stream = TrainingStream(config, cache, ulysses * dp_size)
    step = data.draw(st.integers(1, stream.total_steps))
    packs = [pack for pack in stream.packs(step) if pack.slot.step == step]
    plan = stream.plan(step)
    for dp_rank in range(dp_size):
        shares = [loader(config, cache, dp_size, dp_rank, rank).batch(step - 1) for rank in range(ulysses)]
        mine = [pack for pack in packs if pack.slot.dp_rank == dp_rank]
        trained = [
            number for number in range(len(shares[0].micro_batches)) if shares[0].micro_batches[number].num_tokens
        ]
        assert len(mine) == len(trained)
        for pack, number in zip(mine, trained, strict=True):
            assert pack.slot.micro_batch == number + 1
            assert pack.slot.micro_batches == len(shares[0].micro_batches)
            _compare(pack, [share.micro_batches[number] for share in shares])
        assert plan.row_ids.tolist() == shares[0].row_ids.tolist()
        assert sum(plan.targets) == shares[0].num_targets
        assert sum(plan.tokens) == shares[0].num_tokens
    assert sorted(row.index for pack in packs for row in pack.rows if row.index is not None) == sorted(plan.row_ids)


def _compare(pack: Pack, shares: list) -> None:
    def joined(name: str) -> np.ndarray:
        return torch.cat([getattr(share, name)[0] for share in shares]).numpy()

    real = shares[0].num_tokens
    assert np.concatenate([row.input_ids for row in pack.rows]).tolist() == joined("input_ids")[:real].tolist()
    assert np.concatenate([row.position_ids for row in pack.rows]).tolist() == joined("position_ids")[:real].tolist()
    shifted = [np.append(row.labels[1:], IGNORED) for row in pack.rows]
    assert np.concatenate(shifted).tolist() == joined("targets")[:real].tolist()
    assert all(row.labels[0] == IGNORED for row in pack.rows)
    assert pack.tokens == len(joined("input_ids"))
    assert pack.tokens % len(shares) == 0
    assert [row.start for row in pack.rows] == shares[0].cu_seqlens[: len(pack.rows)].tolist()


def test_rows_go_on_with_the_next_pack_and_step_but_not_the_next_epoch(stream: MakeStream, cache: TokenCache) -> None:
    chosen = stream(batch=8, micro=3).first_rows(1, 1000)
    names = [row.name for _, rows in chosen for row in rows]
    assert len(names) == len(set(names)) == len(cache)
    assert {pack.slot.step for pack, _ in chosen} == {1, 2, 3}
    few = stream(batch=8, micro=3).first_rows(1, 4)
    assert [len(rows) for _, rows in few] == [3, 1]
    assert [row.name for _, rows in few for row in rows] == names[:4]


def test_every_row_is_found_where_it_is_trained(stream: MakeStream, cache: TokenCache) -> None:
    subject = stream(world=4, ulysses=2, batch=5)
    for step in (1, 6):  # of the first and of the second epoch
        for index in range(len(cache)):
            pack, row = subject.pack_of(index, step)
            assert row in pack.rows
            assert row.input_ids.tolist() == cache.row(index).ids.tolist()
            assert (row.file, row.number) == cache.origin(index)
            assert pack.slot.epoch == (1 if step == 1 else 2)
            assert index in subject.plan(pack.slot.step).row_ids


def test_ranks_of_a_row(stream: MakeStream) -> None:
    pack, _ = stream(world=4, ulysses=2, batch=23, micro=23).first_rows(1, 1)[0]
    assert pack.slot.ranks == (0, 1)
    for row in pack.rows:
        positions = np.arange(row.start, row.start + len(row.input_ids))
        assert pack.ranks_of(row) == tuple(np.unique(positions // pack.share).tolist())
