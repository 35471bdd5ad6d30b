from __future__ import annotations

import pytest

from benchmarks.plan import Run, RunSpec, data_steps, runs_of
from benchmarks.rows import REFERENCE, ROWS, Row, rows_named, sittings
from benchmarks.shapes import SHAPES
from benchmarks.tokens import Tokens
from benchmarks.trl_side import sft_arguments, step_lengths


def parts(runs: list[Run]) -> list[tuple[str, str]]:
    return [(run.part, run.side.name) for run in runs]


def by_name(name: str) -> Row:
    return rows_named([name])[0]


def test_a_row_is_measured_a_b_a_and_then_its_reference() -> None:
    row = by_name("qwen4b_full_1x32768")
    runs = runs_of([row], 20, 8, partners=True, reference=True)
    assert [run.part for run in runs] == ["A", "B", "A'", "R"]
    assert [run.side for run in runs[:3]] == [row.subject, row.partners[0], row.subject]
    assert (runs[0].steps, runs[0].warmup) == (20, 8)
    assert (runs[3].steps, runs[3].warmup) == (row.reference_steps, 0)


def test_rows_with_the_same_partners_share_their_runs() -> None:
    sitting = sittings(rows_named(["qwen7b_full_2x8192", "qwen7b_full_2x8192_fp8", "qwen4b_mixed"]))
    assert [[row.name for row in each] for each in sitting] == [
        ["qwen7b_full_2x8192", "qwen7b_full_2x8192_fp8"],
        ["qwen4b_mixed"],
    ]
    runs = runs_of(sitting[0], 20, 8, partners=True, reference=True)
    assert [run.part for run in runs] == ["A", "A", "B", "B", "A'", "A'", "R"]
    names = [run.side.name for run in runs]
    assert names[:2] == names[5:3:-1]


def test_what_is_not_asked_for_does_not_run() -> None:
    runs = runs_of([by_name("qwen7b_full_2x8192")], 3, 1, partners=False, reference=False)
    assert parts(runs) == [("A", "ours")]


def test_a_row_of_long_steps_takes_fewer() -> None:
    row = by_name("qwen4b_mixed")
    runs = runs_of([row], 20, 8, partners=True, reference=True)
    assert {(run.steps, run.warmup) for run in runs if run.part != "R"} == {(row.steps, row.warmup)}
    assert data_steps([row], 20, 8) == (row.steps or 0) + (row.warmup or 0) + 1
    assert data_steps([row], 2, 1) == 4


def test_an_unknown_row_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no such row: nonsense; there are qwen7b_full_2x8192"):
        rows_named(["qwen4b_mixed", "nonsense"])


def test_names_are_unique_and_shapes_known() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.shape for row in ROWS} <= set(SHAPES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_reference_differs_in_the_path_alone(row: Row) -> None:
    reference, subject = row.reference(), row.subject
    assert reference.tokens == subject.tokens
    assert reference.ranks == subject.ranks
    changed = {name for name in reference.settings if reference.settings[name] != subject.settings.get(name)}
    assert changed <= set(REFERENCE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_partners_train_as_many_tokens_a_gpu(row: Row) -> None:
    per_gpu = row.subject.tokens.of_step / row.subject.ranks
    assert {side.tokens.of_step / side.ranks for side in row.partners} <= {per_gpu}


def spec(**settings: object) -> RunSpec:
    return RunSpec(dict(settings), Tokens(2, 64), "rows.parquet", "model", "out", 3, 1, 1, on_gpu=True)


def test_a_spec_survives_its_file(tmp_path) -> None:
    written = spec(gradient_checkpointing=True)
    written.write(tmp_path / "spec.json")
    assert RunSpec.read(tmp_path / "spec.json") == written


def test_the_peer_gets_arguments_of_its_own_and_none_that_it_does_not_know() -> None:
    arguments = sft_arguments(spec(gradient_checkpointing=False, lora_rank=16, lora_alpha=32, bf16=True, liger=False))
    assert arguments["max_steps"] == 4
    assert arguments["padding_free"]
    assert arguments["max_length"] is None
    assert arguments["bf16"]
    assert not arguments["use_liger_kernel"]
    assert not {"lora_rank", "lora_alpha", "liger"} & set(arguments)
    assert sft_arguments(spec(packing=True))["max_length"] == 64


def test_documents_of_the_peers_steps() -> None:
    rows = [[3, 4], [5], [6], [7], [8, 1], [9], [10], [11]]
    steps = step_lengths(rows, 3, micro_batches=2, batch=1, groups=2)
    assert steps == [[3, 4, 5, 6, 7], [8, 1, 9, 10, 11], [3, 4, 5, 6, 7]]
