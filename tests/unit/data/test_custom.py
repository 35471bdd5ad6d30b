"""A data set class of the user's own, from the config to the token cache."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode, RunFolder
from sft_job.data import build as build_module
from sft_job.data.cache import TokenCache, cache_spec
from sft_job.data.custom_rows import MalformedRowError, rendered
from sft_job.data.files import check_data
from sft_job.data.prepare import prepare
from sft_job.data.render import load_tokenizer
from sft_job.data.sample import check_sample
from sft_job.errors import ProblemsError
from tests.unit.data.conftest import write

EXAMPLE = Path(__file__).parents[3] / "examples" / "custom_dataset.py"
# Row i of this class has i + 2 tokens; the last two are trained.
COUNTING = """
    class Counting:
        def __init__(self, parquet_files, tokenizer, config):
            self.count = 50

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            length = index + 2
            return {"input_ids": [20 + index] * length, "loss_mask": [0] * (length - 2) + [1, 1]}
"""


@pytest.fixture
def make(model_folder: Path, tmp_path: Path) -> Callable[..., JobConfig]:
    """``make(code, name)``: a config whose class is in a file with this code."""

    def config(code: str = COUNTING, name: str | None = "Counting") -> JobConfig:
        (tmp_path / "rows.py").write_text(textwrap.dedent(code))
        config = JobConfig()
        config.model.partial_pretrain = str(model_folder)
        config.data.train_files = str(write(tmp_path / "train.parquet", text=["a", "b"]))
        config.data.custom_cls.path = str(tmp_path / "rows.py")
        config.data.custom_cls.name = name
        return config

    return config


def rows(cache: TokenCache) -> list[tuple[list[int], list[bool]]]:
    return [(cache.row(index).ids.tolist(), cache.row(index).trained.tolist()) for index in range(len(cache))]


def prepared(config: JobConfig, tmp_path: Path) -> TokenCache:
    return prepare(config, RunFolder(tmp_path / "run"))[0]


def refused(config: JobConfig, tmp_path: Path) -> ProblemsError:
    with pytest.raises(ProblemsError) as raised:
        prepare(config, RunFolder(tmp_path / "run"))
    assert "Traceback" not in str(raised.value)
    return raised.value


def test_the_example_end_to_end(make: Callable[..., JobConfig], tmp_path: Path) -> None:
    config = make()
    config.data.custom_cls.path, config.data.custom_cls.name = str(EXAMPLE), "HintedQuestions"
    columns = {"question": ["graph?", "tree?"], "hint": ["node", "root"], "answer": ["edge", "leaf walk"]}
    config.data.train_files = [str(write(tmp_path / "a.parquet", **columns)), str(tmp_path / "a.parquet")]
    config.data.val_files = str(tmp_path / "a.parquet")
    assert check_data(config) == []
    train, val = prepare(config, RunFolder(tmp_path / "run"))
    assert val is not None
    assert (train.num_rows, val.num_rows) == (4, 2)
    tokenizer: Any = load_tokenizer(config.model.partial_pretrain)
    row = train.row(1)
    assert tokenizer.decode(row.ids) == (
        "<|im_start|>user\ntree?<|im_end|>\n<|im_start|>assistant\nHint: root\nleaf walk<|im_end|>"
    )
    assert tokenizer.decode(row.ids[row.trained]) == "leaf walk<|im_end|>"
    assert train.origin(3) == (EXAMPLE, 3)
    assert train.report["files"] == [{**train.report["files"][0], "path": str(EXAMPLE)}]
    assert any("HintedQuestions" in note for note in train.report["notes"])


def test_what_the_constructor_is_given(make: Callable[..., JobConfig], tmp_path: Path) -> None:
    config = make(
        """
        class Given:
            def __init__(self, parquet_files, tokenizer, config):
                self.rows = [
                    parquet_files[0],
                    tokenizer.chat_template,
                    config.get("absent", "default") + str(config.max_length + config["multiturn"].enable),
                ]
                self.tokenizer = tokenizer

            def __len__(self):
                return 3

            def __getitem__(self, index):
                ids = self.tokenizer(self.rows[index])["input_ids"]
                return {"input_ids": ids, "labels": ids}
        """,
        "Given",
    )
    config.data.chat_template = "{{ messages[0].content }}"
    tokenizer: Any = load_tokenizer(config.model.partial_pretrain)
    texts = [tokenizer.decode(ids) for ids, _ in rows(prepared(config, tmp_path))]
    assert texts == [config.data.train_files, "{{ messages[0].content }}", "default1024"]


def test_several_processes_give_the_same_cache(
    make: Callable[..., JobConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(COUNTING.replace("self.count = 50", "self.count = 200"))
    config.data.cache_dir, config.data.num_workers = str(tmp_path / "one"), 1
    one = rows(prepared(config, tmp_path))
    assert [len(ids) for ids, _ in one] == [index + 2 for index in range(200)]
    monkeypatch.setattr(build_module, "_FEW_ROWS", 10)
    config.data.cache_dir, config.data.num_workers = str(tmp_path / "two"), 2
    assert rows(prepared(config, tmp_path)) == one


def test_rows_are_truncated_refused_and_limited_like_all_others(make: Callable[..., JobConfig], tmp_path: Path) -> None:
    config = make()
    config.data.max_length = 40
    error = refused(config, tmp_path)
    assert error.code is ExitCode.DATA
    assert "11 of 50 rows are longer than 40 tokens" in str(error)
    assert f"{tmp_path / 'rows.py'} row 39: 41 tokens" in str(error)
    config.data.truncation = "right"
    cache = prepared(config, tmp_path)
    assert cache.lengths.tolist() == [*range(2, 41), 40]  # from 42 tokens on no trained one is left
    assert cache.targets.tolist() == [1, *[2] * 38, 1]
    assert cache.report["rows_without_target"] == 10
    config.data.train_max_samples = 7
    assert prepared(config, tmp_path).num_rows == 7


def test_the_fingerprint_is_that_of_code_data_and_settings(make: Callable[..., JobConfig], tmp_path: Path) -> None:
    def fingerprint(config: JobConfig) -> str:
        spec = cache_spec(config, "train")
        assert spec is not None
        return spec.fingerprint()

    config = make()
    first = fingerprint(config)
    config.data.num_workers, config.data.micro_batch_size_per_gpu, config.data.use_shm = 3, 9, True
    config.data.cache_dir = "/elsewhere"
    assert fingerprint(config) == first
    config.data.apply_chat_template_kwargs = OmegaConf.create({"style": "short"})  # type: ignore[assignment]
    second = fingerprint(config)
    config.data.prompt_key = "question"
    third = fingerprint(config)
    write(tmp_path / "train.parquet", text=["a", "c"])
    fourth = fingerprint(config)
    (tmp_path / "rows.py").write_text(textwrap.dedent(COUNTING) + "\n# changed\n")
    assert len({first, second, third, fourth, fingerprint(config)}) == 5


class TestRefused:
    def test_file_and_name_without_running_anything(self, make: Callable[..., JobConfig], tmp_path: Path) -> None:
        config = make("raise SystemExit\nclass Counting: ...\n", "Countin")
        (problem,) = check_data(config)
        assert (problem.code, problem.subject) == (ExitCode.CONFIG, "data.custom_cls.name")
        assert problem.fix == "did you mean Counting?"
        assert str(tmp_path / "rows.py") in problem.rule
        config.data.custom_cls.name = None
        assert "must be set, because data.custom_cls.path is" in check_data(config)[0].rule
        config.data.custom_cls.name, config.data.custom_cls.path = "Counting", None
        assert "must be set, because data.custom_cls.name is" in check_data(config)[0].rule
        config.data.custom_cls.path = str(tmp_path / "gone.py")
        (problem,) = refused(config, tmp_path).problems
        assert (problem.code, problem.subject) == (ExitCode.CONFIG, "data.custom_cls.path")
        assert "No such file" in problem.rule
        config.data.custom_cls.path = "/dev/zero"
        assert "not a file" in refused(config, tmp_path).problems[0].rule

    def test_not_python(self, make: Callable[..., JobConfig], tmp_path: Path) -> None:
        error = refused(make("class Counting\n"), tmp_path)
        assert error.code is ExitCode.CONFIG
        assert "is not Python: line 1" in str(error)

    @pytest.mark.parametrize("code", ["from collections import OrderedDict as Counting", "Counting = list"])
    def test_names_that_the_file_gives_otherwise_are_found(self, make: Callable[..., JobConfig], code: str) -> None:
        assert check_data(make(code)) == []

    def test_file_that_fails(self, make: Callable[..., JobConfig], tmp_path: Path) -> None:
        error = refused(make("import json\nimport not_there_at_all\nclass Counting: ..."), tmp_path)
        assert error.code is ExitCode.CONFIG
        assert "ModuleNotFoundError: No module named 'not_there_at_all' (line 2)" in str(error)

    def test_constructor_that_fails(self, make: Callable[..., JobConfig], tmp_path: Path) -> None:
        error = refused(make(COUNTING.replace("self.count = 50", "raise KeyError('question')")), tmp_path)
        assert error.code is ExitCode.CONFIG
        assert "Counting" in str(error)
        assert "cannot be constructed: KeyError: 'question' (line 4)" in str(error)
        assert str(tmp_path / "rows.py") in str(error)

    def test_no_rows(self, make: Callable[..., JobConfig], tmp_path: Path) -> None:
        error = refused(make(COUNTING.replace("= 50", "= 0")), tmp_path)
        assert error.code is ExitCode.DATA
        assert "Counting gives no rows" in str(error)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_rows_that_fail(
        self, make: Callable[..., JobConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
    ) -> None:
        code = COUNTING.replace(
            "length = index + 2",
            "length = index + 2\n            if index % 20 == 3: return {}\n            [][index // 49]",
        )
        monkeypatch.setattr(build_module, "_FEW_ROWS", 10)
        config = make(code)
        config.data.num_workers = workers
        error = refused(config, tmp_path)
        assert error.code is ExitCode.DATA
        (problem,) = error.problems
        assert problem.subject == "data.custom_cls"
        assert "50 of 50 rows" in problem.rule
        file = tmp_path / "rows.py"
        assert f"{file} row 0: Counting[0] raised IndexError: list index out of range (line 12)" in problem.rule
        assert f"{file} row 3: Counting[3]: has no input_ids; found nothing" in problem.rule

    def test_class_that_only_a_worker_cannot_construct(
        self, make: Callable[..., JobConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code = "import multiprocessing\n" + textwrap.dedent(
            COUNTING.replace(
                "self.count = 50", "self.count = 50 if multiprocessing.parent_process() is None else 1 / 0"
            )
        )
        monkeypatch.setattr(build_module, "_FEW_ROWS", 10)
        config = make(code)
        config.data.num_workers = 2
        error = refused(config, tmp_path)
        assert error.code is ExitCode.CONFIG
        assert "ZeroDivisionError" in str(error)


def test_a_sample_spread_over_all_rows(make: Callable[..., JobConfig]) -> None:
    config = make()
    for wanted, read in ((20, 20), (30, 40), (10_000, 50), (3, 3)):
        spec = cache_spec(config, "train")
        assert spec is not None
        counts, notes, problems, _ = check_sample(spec, wanted)
        assert (counts.rows_read, problems) == (read, [])
        assert counts.longest_row > 25
        assert "Counting" in notes[0]


KINDS = [list, tuple, np.array, torch.tensor, lambda values: np.array(values, dtype=np.float32)]


@given(st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=12), st.sampled_from(KINDS), st.data())
def test_every_form_of_a_row_means_the_same(tokens: list[tuple[int, bool]], kind: Any, data: st.DataObject) -> None:
    ids, trained = [token for token, _ in tokens], [is_trained for _, is_trained in tokens]
    left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    padded = [7] * left + ids + [7] * right
    item: dict[str, Any] = {"input_ids": (list if kind is KINDS[-1] else kind)(padded)}
    if data.draw(st.booleans()):
        item["loss_mask"] = kind([0] * left + trained + [0] * right)
    else:
        labels = [token if is_trained else -100 for token, is_trained in tokens]
        item["labels"] = kind([-100] * left + labels + [-100] * right)
    if left or right:
        item["attention_mask"] = kind([0] * left + [1] * len(ids) + [0] * right)
    row = rendered(item, 100)
    assert row.ids == ids
    assert [any(start <= place < end for start, end in row.spans) for place in range(len(ids))] == trained
    assert all(end < start for (_, end), (start, _) in zip(row.spans, row.spans[1:], strict=False))


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ([1, 2], "is list, expected a mapping"),
        ({"ids": [1]}, "has no input_ids; found ids"),
        ({"input_ids": [1, 2]}, "has neither loss_mask nor labels; found input_ids"),
        ({"input_ids": [1], "loss_mask": [1], "labels": [1]}, "has loss_mask and labels"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "loss_mask has 1 entries, input_ids 2"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, r"loss_mask\[1\] is 2, expected 0 or 1"),
        ({"input_ids": [1, 2], "loss_mask": [0, 0.5]}, "loss_mask holds float64, expected whole numbers"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, r"labels\[0\] is 2, input_ids\[0\] 1: .*not shifted"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries, input_ids 2"),
        ({"input_ids": [[1, 2]], "loss_mask": [1, 1]}, r"input_ids has shape \[1, 2\], expected one dimension"),
        ({"input_ids": [[1], [1, 2]], "loss_mask": [1, 1]}, "input_ids is no list of numbers"),
        ({"input_ids": ["a"], "loss_mask": [1]}, "input_ids holds <U1, expected whole numbers"),
        ({"input_ids": None, "loss_mask": [1]}, r"input_ids has shape \[\]"),
        ({"input_ids": [1, 100], "loss_mask": [1, 1]}, r"input_ids\[1\] is 100, expected 0 to 99"),
        ({"input_ids": [-1, 5], "loss_mask": [1, 1]}, r"input_ids\[0\] is -1"),
        (
            {"input_ids": [1, 2, 3], "loss_mask": [1, 1, 1], "attention_mask": [1, 0, 1]},
            "attention_mask has gaps",
        ),
    ],
)
def test_what_is_wrong_with_a_row(item: Any, reason: str) -> None:
    with pytest.raises(MalformedRowError, match=reason):
        rendered(item, 100)


def test_padding_ids_need_not_exist() -> None:
    item = {"input_ids": [5, 6, -1], "labels": [-100, 6, -100], "attention_mask": torch.tensor([True, True, False])}
    assert rendered(item, 10).ids == [5, 6]
