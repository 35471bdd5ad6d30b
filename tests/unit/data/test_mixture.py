from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode, RunFolder
from sft_job.data.batches import BatchLoader
from sft_job.data.cache import CacheSpec, TokenCache, open_or_build
from sft_job.data.files import check_data
from sft_job.data.mixture import (
    EpochEntries,
    JoinedNumbers,
    MixedSet,
    Mixture,
    SourceCounts,
    repeated_entries,
    training_order,
    weighted_entries,
)
from sft_job.data.order import RowOrder, epoch_order
from sft_job.data.packing import PackSettings
from sft_job.data.places import open_places, write_places
from sft_job.data.prepare import prepare
from sft_job.errors import ProblemsError
from tests.unit.data.conftest import rows_file, write

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=5)
numbers = st.floats(0.01, 50, allow_nan=False)


@st.composite
def sized(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    rows = draw(sizes)
    return rows, draw(st.lists(numbers, min_size=len(rows), max_size=len(rows)))


@given(sized())
def test_weights_share_out_exactly_as_many_entries_as_there_are_rows(case: tuple[list[int], list[float]]) -> None:
    rows, weights = case
    entries = weighted_entries(rows, weights)
    assert sum(entries) == sum(rows)
    for count, weight in zip(entries, weights, strict=True):
        assert abs(count - sum(rows) * weight / sum(weights)) < 1 + 1e-9


@given(sized())
def test_repeats_add_up_to_the_rounded_sum(case: tuple[list[int], list[float]]) -> None:
    rows, repeats = case
    entries = repeated_entries(rows, repeats)
    exact = [size * Fraction(repr(repeat)) for size, repeat in zip(rows, repeats, strict=True)]
    assert abs(sum(entries) - sum(exact)) <= Fraction(1, 2)
    assert all(math.floor(share) <= count <= math.ceil(share) for count, share in zip(entries, exact, strict=True))


def test_largest_remainders() -> None:
    assert weighted_entries([5, 5], [1, 2]) == (3, 7)
    assert weighted_entries([4, 3], [0.1, 0.1]) == (4, 3), "a tie goes to the first"
    assert weighted_entries([100, 100, 100], [0.7, 0.2, 0.1]) == (210, 60, 30)
    assert repeated_entries([10, 10], [0.1, 2.5]) == (1, 25)
    assert repeated_entries([10**8, 10], [1 / 3, 1]) == (33333333, 10)


@given(sized(), st.integers(-(2**40), 2**40), st.integers(2, 6))
def test_no_row_comes_up_oftener_than_another_by_more_than_one(
    case: tuple[list[int], list[float]], seed: int, epochs: int
) -> None:
    """Within an epoch, and over any number of epochs."""
    rows, weights = case
    counts = weighted_entries(rows, weights)
    entries = EpochEntries(seed, rows, counts)
    ends = np.cumsum(rows)
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        taken = entries.rows(epoch, np.arange(sum(counts)))
        assert taken.dtype == np.int64
        each = Counter(taken.tolist())
        seen += each
        for start, size, count in zip([0, *ends], rows, counts, strict=False):
            mine = [each[row] for row in range(start, start + size)]
            assert sum(mine) == count
            assert max(mine) - min(mine) <= 1
    for start, size in zip([0, *ends], rows, strict=False):
        mine = [seen[row] for row in range(start, start + size)]
        assert max(mine) - min(mine) <= 1


@given(st.integers(0, 2**40), st.integers(1, 60), st.data())
def test_every_row_is_seen_over_the_epochs(seed: int, size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size))
    entries = EpochEntries(seed, [size], [count])
    epochs = math.ceil(size / count)
    seen = {int(row) for epoch in range(epochs) for row in entries.rows(epoch, np.arange(count))}
    assert seen == set(range(size))


@given(sized(), st.integers(0, 2**40), st.integers(1, 30), st.integers(0, 80))
def test_any_step_can_be_asked_for_at_once(
    case: tuple[list[int], list[float]], seed: int, batch: int, step: int
) -> None:
    rows, weights = case
    counts = weighted_entries(rows, weights)

    def order() -> RowOrder:
        entries = EpochEntries(seed, rows, counts)
        return RowOrder(seed, entries.count, batch, entries.rows)

    walked = order()
    for earlier in range(max(0, step - 4), step):
        walked.rows(earlier)
    assert walked.rows(step).tolist() == order().rows(step).tolist()


def test_the_choice_is_this_one_for_good_and_depends_on_the_seed() -> None:
    def chosen(seed: int, epoch: int) -> list[int]:
        return sorted(EpochEntries(seed, [8, 8], [3, 3]).rows(epoch, np.arange(6)).tolist())

    assert chosen(1, 0) == CHOSEN
    assert chosen(1, 1) != CHOSEN
    assert chosen(2, 0) != CHOSEN
    assert [row - 8 for row in CHOSEN[3:]] != CHOSEN[:3], "sets of one size are not taken alike"


CHOSEN = [1, 4, 6, 10, 11, 13]


@given(st.lists(st.lists(st.integers(0, 1000), max_size=5), min_size=1, max_size=4), st.data())
def test_joined_numbers(parts: list[list[int]], data: st.DataObject) -> None:
    whole = [number for part in parts for number in part]
    joined = JoinedNumbers([np.array(part, dtype=np.int32) for part in parts])
    places = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8)) if whole else []
    assert joined[np.array(places, dtype=np.int64)].tolist() == [whole[place] for place in places]
    assert (len(joined), joined.sum(dtype="int64")) == (len(whole), sum(whole))


@pytest.fixture
def caches(spec: Callable[..., CacheSpec], tmp_path: Path) -> list[TokenCache]:
    files = [rows_file(tmp_path / f"{count}.parquet", count, seed=count) for count in (9, 4, 14)]
    return [open_or_build(spec(file), tmp_path / "cache", 1) for file in files]


def mixture(caches: list[TokenCache], *shares: float, kind: str = "repeat") -> Mixture:
    names = ("b", "a", "c")
    return Mixture([MixedSet(n, c, **{kind: s}) for n, c, s in zip(names, caches, shares, strict=True)])  # type: ignore[arg-type]


def test_a_mixture_is_a_view_over_its_caches(caches: list[TokenCache]) -> None:
    mixed = mixture(caches, 1, 1, 1)
    b, a, c = caches
    assert mixed.names == ("a", "b", "c")
    assert len(mixed) == mixed.num_rows == 27
    for index in range(27):
        cache, local = (a, index) if index < 4 else (b, index - 4) if index < 13 else (c, index - 13)
        assert mixed.row(index).ids.tolist() == cache.row(local).ids.tolist()
        assert mixed.origin(index) == cache.origin(local)
        assert mixed.source(index) == {id(a): "a", id(b): "b", id(c): "c"}[id(cache)]
        one = np.array([index])
        assert (mixed.lengths[one], mixed.targets[one]) == (cache.lengths[local], cache.targets[local])
    for index in (-1, 27):
        with pytest.raises(IndexError):
            mixed.row(index)


def test_the_fingerprint_is_of_names_rows_and_shares(caches: list[TokenCache]) -> None:
    same = mixture(caches, 1, 2, 1).fingerprint
    assert Mixture(list(reversed(mixture(caches, 1, 2, 1).sets))).fingerprint == same
    others = [
        mixture(caches, 1, 2, 1.0000001),
        mixture(caches, 1, 2, 1, kind="weight"),
        mixture(caches, 1, 2, 1.0000001, kind="weight"),
        mixture([caches[1], caches[0], caches[2]], 1, 2, 1),
        Mixture(mixture(caches, 1, 2, 1).sets[1:]),
    ]
    assert len({same, *(each.fingerprint for each in others)}) == 6
    assert Mixture([MixedSet("a", caches[0])]).fingerprint == Mixture([MixedSet("a", caches[0], repeat=1)]).fingerprint


def test_a_share_without_a_row_is_refused(caches: list[TokenCache]) -> None:
    with pytest.raises(ProblemsError) as raised:
        mixture(caches, 1, 1e-3, 1, kind="weight")
    (problem,) = raised.value.problems
    assert (problem.code, problem.subject, problem.value) == (ExitCode.CONFIG, "data.train_files.a.weight", 1e-3)


def test_one_set_in_whole_has_the_order_of_a_set_without_a_name(caches: list[TokenCache]) -> None:
    named, plain = (training_order(rows, 3, 4) for rows in (Mixture([MixedSet("a", caches[2])]), caches[2]))
    assert plain.rows(0).tolist() == epoch_order(3, 0, 14)[:4].tolist()
    for step in range(9):
        assert named.rows(step).tolist() == plain.rows(step).tolist()


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_batches_count_what_they_take_of_each_set_at_any_number_of_ranks(
    caches: list[TokenCache], dp_size: int
) -> None:
    mixed = mixture(caches, 1, 2.5, 0.5)
    assert mixed.entries == (10, 9, 7)
    order = training_order(mixed, 1, 5)
    settings = PackSettings(rows=2)

    def loader(rank: int) -> BatchLoader:
        places = {"dp_rank": rank, "dp_size": dp_size, "ulysses_rank": 0, "ulysses_size": 1}
        return BatchLoader(mixed, training_order(mixed, 1, 5), settings, **places, pad_id=0)

    loaders = [loader(rank) for rank in range(dp_size)]
    total: Counter[str] = Counter()
    for step in range(order.steps_per_epoch):
        batches = [each.batch(step) for each in loaders]
        rows = order.rows(step).tolist()
        for batch in batches:
            assert batch.row_ids.tolist() == rows
            expected = {
                name: SourceCounts(
                    len(mine), int(mixed.lengths[np.array(mine)].sum()), int(mixed.targets[np.array(mine)].sum())
                )
                for name in mixed.names
                if (mine := [row for row in rows if mixed.source(row) == name])
            }
            assert batch.sources == expected
            assert sum(each.tokens for each in batch.sources.values()) == batch.num_tokens
            assert sum(each.targets for each in batch.sources.values()) == batch.num_targets
        # What the ranks computed on together: a row that is twice in a batch is twice there.
        documents = [
            micro.input_ids[0, start : start + length].tolist()
            for batch in batches
            for micro in batch.micro_batches
            for start, length in zip(micro.cu_seqlens.tolist(), micro.document_lengths, strict=False)
            if micro.num_tokens
        ]
        assert sorted(documents) == sorted(mixed.row(row).ids.tolist() for row in rows)
        for name, counts in batches[0].sources.items():
            total[name] += counts.rows
    assert total == dict(zip(mixed.names, mixed.entries, strict=True))


def test_places_of_a_mixture(caches: list[TokenCache], tmp_path: Path) -> None:
    mixed = mixture(caches, 0.7, 0.2, 0.1, kind="weight")
    write_places(tmp_path, mixed, Mixture([MixedSet("v", caches[0])]))
    train, val = open_places(tmp_path)
    assert isinstance(train, Mixture)
    assert isinstance(val, Mixture)
    assert (train.fingerprint, train.entries, val.names) == (mixed.fingerprint, mixed.entries, ("v",))


def config_of(model: Path, train: object, val: object = None) -> JobConfig:
    config = JobConfig()
    config.model.partial_pretrain = str(model)
    config.data.train_files, config.data.val_files = train, val
    return config


def test_sets_of_other_columns_share_their_caches_with_other_runs(model_folder: Path, tmp_path: Path) -> None:
    plain = str(rows_file(tmp_path / "plain.parquet", 6))
    other = str(write(tmp_path / "other.parquet", q=["one", "two", "three"], a=["1", "2", "3"]))
    entry = {"files": other, "prompt_key": "q", "response_key": "a", "max_samples": 2}
    run = RunFolder(tmp_path / "run")
    train, val = prepare(config_of(model_folder, {"x": entry, "y": plain}, {"x": entry}), run)
    assert isinstance(train, Mixture)
    assert isinstance(val, Mixture)
    assert [(each.name, each.cache.num_rows) for each in train.sets] == [("x", 2), ("y", 6)]
    assert val.names == ("x",)
    single, _ = prepare(config_of(model_folder, plain), run)
    assert isinstance(single, TokenCache)
    assert single.folder == train.sets[1].cache.folder
    assert len(list(run.cache.glob("train-*"))) == 2


def test_conversations_beside_prompts(model_folder: Path, tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "node"}, {"role": "assistant", "content": word}] for word in ("tree", "leaf")]
    chat = str(write(tmp_path / "chat.parquet", talk=turns))
    plain = str(write(tmp_path / "plain.parquet", prompt=["node", "node"], response=["tree", "leaf"]))
    config = config_of(model_folder, {"chat": {"files": chat, "messages_key": "talk"}, "plain": plain})
    train, _ = prepare(config, RunFolder(tmp_path / "run"))
    assert isinstance(train, Mixture)
    assert (train.names, train.num_rows) == (("chat", "plain"), 4)
    ids = [train.row(row).ids.tolist() for row in range(4)]
    assert [each[: len(ids[2])] for each in ids[:2]] == ids[2:], "the same words in the same template"
    config.data.train_files["chat"]["messages_key"] = "messages"
    assert [each.subject for each in check_data(config)] == ["data.train_files.chat.messages_key"]


def test_what_is_wrong_with_all_sets_at_once(model_folder: Path, tmp_path: Path) -> None:
    other = str(write(tmp_path / "other.parquet", q=["one"], a=["1"]))
    sets = {"gone": str(tmp_path / "gone.parquet"), "x": {"files": other, "prompt_key": "p", "response_key": "a"}}
    config = config_of(model_folder, sets, {"v": str(tmp_path / "neither.parquet"), "w": other})
    with pytest.raises(ProblemsError) as raised:
        prepare(config, RunFolder(tmp_path / "run"))
    assert [each.subject for each in raised.value.problems] == ["data.train_files.gone", "data.val_files.v"]
    subjects = [problem.subject for problem in check_data(config)]
    columns = ["data.prompt_key", "data.response_key"]
    assert subjects == ["data.train_files.gone", "data.train_files.x.prompt_key", "data.val_files.v", *columns]
    config.data.val_files = {"v": {"fils": other}}
    assert [each.subject for each in check_data(config)] == subjects[:2], "what validate refuses is not looked at"
