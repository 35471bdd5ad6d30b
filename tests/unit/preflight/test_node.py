"""What a node finds out alone: GPUs by the driver, marks of files, tokens in the run folder, room on the disk."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.config.schema import JobConfig
from sft_job.preflight import facts
from sft_job.preflight.facts import versions
from sft_job.preflight.gpus import Gpu, read_gpus
from sft_job.preflight.inputs import data_marks, mark, model_marks
from sft_job.preflight.shared import Token, own_token, unseen
from sft_job.preflight.space import space_needed

LINE = "0, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 0, Not Active, Active"


def test_gpus_as_the_driver_lists_them() -> None:
    found = read_gpus(
        lambda _: f"{LINE}\n1, A, 550, 1, 0, [N/A], Not Active, [N/A]\n\nnonsense\n2, B, 5, x, 0, 0, 0, 0\n"
    )
    assert found == (
        Gpu(0, "NVIDIA H100 80GB HBM3", "550.54.15", 81559 * 2**20, 4 * 2**20, 0, "thermal slowdown"),
        Gpu(1, "A", "550", 2**20, 0, None, ""),
    )


def test_an_old_driver_is_asked_by_its_own_names_and_none_is_no_gpu() -> None:
    asked: list[str] = []

    def run(command: Sequence[str]) -> str | None:
        asked.append(command[1])
        return LINE if "clocks_throttle_reasons" in command[1] else None

    assert len(read_gpus(run)) == 1
    assert len(asked) == 2
    assert read_gpus(lambda _: None) == ()


@given(st.binary(max_size=50), st.integers(0, 200_000), st.binary(max_size=50))
def test_a_mark_tells_size_beginning_and_end(tmp_path_factory, head: bytes, middle: int, tail: bytes) -> None:
    path: Path = tmp_path_factory.mktemp("mark") / "file"
    path.write_bytes(head + b"\0" * middle + tail)
    first = mark(path)
    assert first.startswith(f"{path.stat().st_size} bytes, ")
    path.write_bytes(head + b"\0" * middle + tail + b"x")
    assert mark(path) != first
    path.write_bytes(b"x" + head + b"\0" * middle + tail)
    assert mark(path) != first


def test_a_mark_sees_a_footer_of_the_same_size(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"0" * 300_000 + b"1")
    (tmp_path / "b").write_bytes(b"0" * 300_000 + b"2")
    assert mark(tmp_path / "a") != mark(tmp_path / "b")


def test_marks_of_data_and_model_do_not_depend_on_their_place(tmp_path) -> None:
    marks = []
    for place in ("here", "there"):
        (tmp_path / place / "model").mkdir(parents=True)
        (tmp_path / place / "train.parquet").write_bytes(b"rows")
        (tmp_path / place / "model" / "config.json").write_text("{}")
        config = JobConfig()
        config.data.train_files = str(tmp_path / place / "train.parquet")
        config.data.val_files = None
        config.model.partial_pretrain = str(tmp_path / place / "model")
        marks.append((data_marks(config), model_marks(config)))
    assert marks[0] == marks[1]
    (data, no_problems), (model, none) = marks[0]
    assert list(data) == ["data.train_files file 0"]
    assert list(model) == ["model.partial_pretrain/config.json"]
    assert no_problems == none == []


def test_inputs_that_are_not_there_are_problems(tmp_path) -> None:
    config = JobConfig()
    config.data.train_files = str(tmp_path / "none.parquet")
    config.model.partial_pretrain = str(tmp_path / "none")
    assert [problem.code for problem in data_marks(config)[1]] == [65]
    assert [problem.code for problem in model_marks(config)[1]] == [66]


def test_tokens_of_two_nodes_in_one_folder_and_in_two(tmp_path) -> None:
    one, two = tmp_path / "ckpt" / "sft", tmp_path / "other"
    with own_token(one) as first, own_token(one) as second, own_token(two) as alien:
        assert unseen(one, {0: first, 1: second}, 0) == {}
        assert unseen(one, {0: first, 1: alien}, 0) == {1: "is not there"}
        (one / second.name).write_text("stale")
        assert unseen(one, {0: first, 1: second}, 0) == {1: "holds something else"}
        assert unseen(one, {1: Token("", fault="full")}, 0) == {}
    assert list(one.iterdir()) == list(two.iterdir()) == []


def test_a_token_that_shows_late_is_waited_for(tmp_path) -> None:
    token = Token(".preflight.late", "x")
    timer = threading.Timer(0.3, (tmp_path / token.name).write_text, ["x"])
    timer.start()
    try:
        assert unseen(tmp_path, {1: token}, 30) == {}
    finally:
        timer.join()


def test_a_folder_that_cannot_be_written_says_why(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with own_token(tmp_path / "file" / "sft") as token:
        assert token.name == ""
        assert "Not a directory" in token.fault


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4), ("fp64", 8)])
def test_space_by_parameters_and_data(tmp_path, dtype: str, size: int) -> None:
    config = JobConfig()
    config.data.train_files = str(tmp_path / "train.parquet")
    config.data.val_files = None
    (tmp_path / "train.parquet").write_bytes(b"0" * 1000)
    config.model.fsdp_config.model_dtype = dtype
    needed = space_needed(config, SimpleNamespace(parameters=10**6))  # pyright: ignore[reportArgumentType]
    assert (needed.checkpoint, needed.export, needed.cache) == (3 * size * 10**6, size * 10**6, 4000)
    assert needed.total == 7 * size * 10**6 + 4000


def test_versions_name_what_computes() -> None:
    found = versions({"SFT_JOB_COMMIT": "abc"})
    assert {"python", "sft_job", "torch", "transformers"} <= found.keys()
    assert found["commit"] == "abc"


@pytest.mark.parametrize(
    ("listed", "left"), [(None, [0, 1, 2]), ("1", [1]), ("2,0", [0, 2]), ("", []), ("-1", []), ("GPU-abc", [0, 1, 2])]
)
def test_gpus_that_are_hidden_are_not_looked_at(monkeypatch, listed: str | None, left: list[int]) -> None:
    monkeypatch.setattr(facts, "count_gpus", lambda environ: 1 if environ["CUDA_VISIBLE_DEVICES"] == "GPU-abc" else 0)
    gpus = tuple(Gpu(index, "A", "5", 1, 0) for index in range(3))
    environ = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert [gpu.index for gpu in facts._visible(gpus, environ)] == left
