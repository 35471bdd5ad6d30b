from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sft_job.data.batches import IGNORED, BatchLoader, PackedBatch, pack_rows
from sft_job.data.cache import CacheSpec, TokenCache, TokenRow, open_or_build
from sft_job.data.order import FileOrder, RowOrder
from sft_job.data.packing import PackSettings
from tests.unit.data.conftest import rows_file

PAD = 999


def token_row(trained: list[bool], first: int) -> TokenRow:
    return TokenRow(np.arange(first, first + len(trained), dtype=np.int32), np.array(trained, dtype=np.bool_))


def documents(draws: list[list[bool]]) -> list[TokenRow]:
    # All ids of a pack differ, so that a token from another place or document shows.
    return [token_row(trained, 1000 * (number + 1)) for number, trained in enumerate(draws)]


drawn = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), max_size=6).map(documents)
sizes = st.sampled_from([1, 2, 3, 4, 8])


def joined(parts: list[PackedBatch], name: str) -> list[int]:
    return torch.cat([getattr(part, name) for part in parts], dim=1)[0].tolist()


@given(drawn, sizes)
def test_the_ranks_stretches_join_to_the_whole(rows: list[TokenRow], size: int) -> None:
    parts = [pack_rows(rows, size, rank, PAD) for rank in range(size)]
    real = [int(token) for row in rows for token in row.ids]
    ids = joined(parts, "input_ids")
    padding = len(ids) - len(real)
    assert ids == real + [PAD] * padding
    assert 0 <= padding < size or (padding == size and not rows)
    assert len({part.input_ids.shape for part in parts}) == 1
    whole = pack_rows(rows, 1, 0, PAD) if rows else None
    for name in ("input_ids", "position_ids", "targets"):
        assert whole is None or joined(parts, name)[: len(real)] == joined([whole], name)
    for part in parts:
        assert part.input_ids.dtype == part.position_ids.dtype == part.targets.dtype == torch.int64
        assert part.cu_seqlens.dtype == torch.int32
        assert torch.equal(part.cu_seqlens, parts[0].cu_seqlens)
        assert part.num_tokens == len(real)


@given(drawn, sizes)
def test_documents_begin_where_cu_seqlens_says(rows: list[TokenRow], size: int) -> None:
    parts = [pack_rows(rows, size, rank, PAD) for rank in range(size)]
    starts = parts[0].cu_seqlens.tolist()
    total = size * parts[0].input_ids.shape[1]
    assert starts[0] == 0
    assert starts[-1] == total
    lengths = np.diff(starts)
    assert lengths[: len(rows)].tolist() == [len(row.ids) for row in rows]
    assert (lengths > 0).all()
    assert len(lengths) - len(rows) in (0, 1)
    assert parts[0].max_seqlen == max(lengths)
    assert joined(parts, "position_ids") == [place for length in lengths for place in range(length)]


@given(drawn, sizes)
def test_targets_are_the_next_trained_token_of_the_same_document(rows: list[TokenRow], size: int) -> None:
    targets = joined([pack_rows(rows, size, rank, PAD) for rank in range(size)], "targets")
    expected: list[int] = []
    for row in rows:
        pairs = zip(row.ids[1:].tolist(), row.trained[1:].tolist(), strict=True)
        expected += [token if trained else IGNORED for token, trained in pairs]
        expected.append(IGNORED)
    assert targets == expected + [IGNORED] * (len(targets) - len(expected))


@given(drawn, sizes, st.sampled_from([2, 16]))
def test_each_ranks_tokens_are_a_multiple(rows: list[TokenRow], size: int, multiple: int) -> None:
    """Padding is a document of its own at the end, as little as does it; what is trained is the same."""
    parts = [pack_rows(rows, size, rank, PAD, multiple) for rank in range(size)]
    assert all(part.input_ids.shape[1] % multiple == 0 for part in parts)
    ids, real = joined(parts, "input_ids"), sum(len(row.ids) for row in rows)
    padding = len(ids) - real
    assert padding < size * multiple or not rows
    assert ids[real:] == [PAD] * padding
    assert joined(parts, "targets")[real:] == [IGNORED] * padding
    lengths = [len(row.ids) for row in rows] + [padding] * bool(padding)
    for part in parts:
        assert part.document_lengths == tuple(lengths)
        assert part.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
        assert part.max_seqlen == max(lengths)
        assert part.num_tokens == real
    plain = [pack_rows(rows, size, rank, PAD) for rank in range(size)]
    assert joined(parts, "targets")[:real] == joined(plain, "targets")[:real]
    assert joined(parts, "position_ids")[:real] == joined(plain, "position_ids")[:real]


def test_golden_pack_over_two_ranks() -> None:
    rows = [token_row([False, True, True], 10), token_row([True, True], 20)]
    first, second = (pack_rows(rows, 2, rank, 0) for rank in range(2))
    assert first.input_ids.tolist() == [[10, 11, 12]]
    assert first.targets.tolist() == [[11, 12, IGNORED]]
    assert first.position_ids.tolist() == [[0, 1, 2]]
    assert second.input_ids.tolist() == [[20, 21, 0]]
    assert second.targets.tolist() == [[21, IGNORED, IGNORED]]
    assert second.position_ids.tolist() == [[0, 1, 0]]
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert (first.max_seqlen, first.num_tokens) == (3, 5)


def test_a_rank_without_rows_gets_padding() -> None:
    batch = pack_rows([], 4, 3, PAD)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.targets.tolist() == [[IGNORED]]
    assert (batch.cu_seqlens.tolist(), batch.max_seqlen, batch.num_tokens) == ([0, 4], 4, 0)


def test_to_a_device() -> None:
    batch = pack_rows(documents([[True, False]]), 1, 0, PAD)
    moved = batch.to("meta")
    assert {moved.input_ids.device.type, moved.targets.device.type, moved.cu_seqlens.device.type} == {"meta"}
    assert moved.max_seqlen == batch.max_seqlen


@pytest.fixture
def cache(spec: Callable[..., CacheSpec], tmp_path: Path) -> TokenCache:
    return open_or_build(spec(rows_file(tmp_path / "a.parquet", 23)), tmp_path / "cache", 1)


def loader(cache: TokenCache, rank: int = 0, dp_size: int = 2, **options: int) -> BatchLoader:
    sizes = {"ulysses_rank": 0, "ulysses_size": 1, **options}
    order = RowOrder(1, len(cache), 5)
    return BatchLoader(cache, order, PackSettings(rows=2), dp_rank=rank, dp_size=dp_size, pad_id=PAD, **sizes)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 7])
def test_the_ranks_together_train_each_row_once(cache: TokenCache, dp_size: int) -> None:
    ranks = [list(loader(cache, rank, dp_size).steps(0, 10)) for rank in range(dp_size)]
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert {batch.step for batch in batches} == {step}
        assert {batch.epoch for batch in batches} == {step // 5}
        assert len({len(batch.micro_batches) for batch in batches}) == 1
        packs = [pack for batch in batches for pack in batch.micro_batches]
        rows = batches[0].row_ids
        assert all(batch.row_ids.tolist() == rows.tolist() for batch in batches)
        assert sum(pack.num_tokens for pack in packs) == batches[0].num_tokens == cache.lengths[rows].sum()
        trained = sum(int((pack.targets != IGNORED).sum()) for pack in packs)
        assert trained == batches[0].num_targets == cache.targets[rows].sum()
    for epoch in range(2):
        seen = [row for batch in ranks[0][epoch * 5 : epoch * 5 + 5] for row in batch.row_ids.tolist()]
        assert sorted(seen) == list(range(23))


def test_starting_later_gives_the_same_batches(cache: TokenCache) -> None:
    through = list(loader(cache).steps(0, 12))
    for first, second in zip(through[7:], loader(cache).steps(7, 12), strict=True):
        assert first.step == second.step
        assert first.row_ids.tolist() == second.row_ids.tolist()
        for pack, other in zip(first.micro_batches, second.micro_batches, strict=True):
            assert torch.equal(pack.input_ids, other.input_ids)


def test_validation_sees_every_row_once(cache: TokenCache) -> None:
    order = FileOrder(len(cache), 10)
    subject = BatchLoader(
        cache, order, PackSettings(tokens=100), dp_rank=0, dp_size=1, ulysses_rank=0, ulysses_size=2, pad_id=PAD
    )
    batches = list(subject.steps(0, order.steps_per_epoch))
    assert [row for batch in batches for row in batch.row_ids.tolist()] == list(range(23))
    assert sum(batch.num_targets for batch in batches) == cache.targets.sum()


@pytest.mark.parametrize(("fp8", "multiple"), [("none", 1), ("tensorwise", 16), ("rowwise", 16)])
def test_a_run_with_fp8_pads_every_batch_that_it_makes(cache: TokenCache, fp8: str, multiple: int) -> None:
    """Training, validation and the rehearsal take their batches of the loader that a job makes."""
    from sft_job.config.schema import JobConfig
    from sft_job.job import _loader
    from sft_job.parallel.mesh import Layout

    config = JobConfig()
    config.model.fp8 = fp8
    config.data.micro_batch_size_per_gpu = 2
    mesh: Any = SimpleNamespace(layout=Layout.of(1, 4, 2))
    for order in (RowOrder(0, len(cache), 5), FileOrder(len(cache), 5)):
        subject = _loader(config, cache, order, mesh)
        lengths = [pack.input_ids.shape[1] for batch in subject.steps(0, 3) for pack in batch.micro_batches]
        lengths.append(subject.pack([0]).input_ids.shape[1])
        assert all(length % multiple == 0 for length in lengths)
        assert multiple > 1 or any(length % 16 for length in lengths)


def batch_threads() -> int:
    return sum(thread.name == "batches" for thread in threading.enumerate())


def test_an_error_on_the_thread_reaches_the_caller(cache: TokenCache, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = loader(cache)
    real = subject.batch

    def fails_at_three(step: int) -> object:
        if step == 3:
            raise OSError("the disk is gone")
        return real(step)

    monkeypatch.setattr(subject, "batch", fails_at_three)
    steps = subject.steps(0, 10)
    assert [next(steps).step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)
    assert batch_threads() == 0


def test_closing_ends_the_thread(cache: TokenCache) -> None:
    steps = loader(cache).steps(0, 1_000_000)
    assert next(steps).step == 0
    assert batch_threads() == 1
    steps.close()
    assert batch_threads() == 0


def test_no_steps(cache: TokenCache) -> None:
    assert list(loader(cache).steps(4, 4)) == []


def test_few_steps_are_made_ahead(cache: TokenCache, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = loader(cache, prefetch=2)
    real, made, fourth = subject.batch, [], threading.Event()

    def noted(step: int) -> object:
        made.append(step)
        if len(made) == 4:
            fourth.set()
        return real(step)

    monkeypatch.setattr(subject, "batch", noted)
    steps = subject.steps(0, 100)
    next(steps)
    # One is with the caller, two wait, and the thread holds the next one in its hand.
    assert fourth.wait(10)
    assert made == [0, 1, 2, 3]
    steps.close()
