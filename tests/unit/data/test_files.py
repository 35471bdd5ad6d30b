from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode
from sft_job.data.columns import Column, Unreadable, read_texts
from sft_job.data.faults import Fault
from sft_job.data.files import check_data, check_files, resolve_files
from tests.unit.data.conftest import write

KEY = "data.train_files"
PROMPT = Column("data.prompt_key", "prompt")
TEXT = ["a", "b"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.parquet", "a.parquet", "deep/er/c.parquet", ".hidden/x.parquet", "_temporary/y.parquet", "read.me"):
        write(tmp_path / "data" / name, prompt=TEXT)
    return tmp_path / "data"


def names(found: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in found]


def test_a_file_a_folder_a_glob_and_lists_of_these(folder: Path) -> None:
    everything = ["a.parquet", "b.parquet", "deep/er/c.parquet"]
    cases = {
        f"{folder}/a.parquet": ["a.parquet"],
        f"{folder}": everything,
        f"{folder}/[ab].parquet": ["a.parquet", "b.parquet"],
        # A pattern means what it says, also for names that a folder's search leaves out.
        f"{folder}/**/*.parquet": ["_temporary/y.parquet", *everything],
        f"{folder}/de*": ["deep/er/c.parquet"],
    }
    for value, expected in cases.items():
        files, problems = resolve_files(value, KEY)
        assert (names(files, folder), problems) == (expected, []), value
    mixed = [f"{folder}/b.parquet", f"{folder}/deep"]
    for value in (mixed, OmegaConf.create({"files": mixed}).files):
        files, problems = resolve_files(value, KEY)
        assert (names(files, folder), problems) == (["b.parquet", "deep/er/c.parquet"], [])


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    file = write(tmp_path / "part[1].parquet", prompt=TEXT)
    assert resolve_files(str(file), KEY) == ([file], [])


def test_folders_that_link_to_themselves_are_read_once(folder: Path) -> None:
    (folder / "deep" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "linked").symlink_to(folder / "deep" / "er", target_is_directory=True)
    files, problems = resolve_files(str(folder), KEY)
    assert problems == []
    assert sorted(path.name for path in files) == ["a.parquet", "b.parquet", "c.parquet"]


def test_paths_that_are_not_there_are_all_named(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling.parquet").symlink_to(tmp_path / "gone.parquet")
    value = [
        f"{folder}/aa.parquet",
        f"{tmp_path}/nowhere/at/all",
        f"{tmp_path}/empty",
        f"{folder}/*.json",
        f"{tmp_path}/dangling.parquet",
        "hdfs://cluster/data.parquet",
        f"{folder}/a.parquet",
    ]
    files, problems = resolve_files(value, KEY)
    assert names(files, folder) == ["a.parquet"]
    assert {problem.code for problem in problems} == {ExitCode.DATA}
    texts = [problem.text() for problem in problems]
    expected = [
        f"did you mean {folder}/a.parquet?",
        f"the nearest existing folder is {tmp_path}, which holds dangling.parquet, data, empty",
        "folder without *.parquet files: it is empty",
        f"no file matches the pattern; the nearest existing folder is {folder}, which holds",
        f"is a link to {tmp_path}/gone.parquet, which does not exist",
        "is not a local path",
    ]
    assert len(texts) == len(expected)
    for text, part, path in zip(texts, expected, value, strict=False):
        assert KEY in text
        assert path in text
        assert part in text


@pytest.mark.parametrize("value", [None, [], 3, ["a", 3], "", [""]])
def test_values_that_are_no_paths_are_configuration_errors(value: object) -> None:
    files, problems = resolve_files(value, KEY)
    assert files == []
    assert [problem.code for problem in problems] == [ExitCode.CONFIG]


def damaged(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    good = write(tmp_path / "good.parquet", prompt=TEXT).read_bytes()
    zeroed_footer = bytearray(good)
    zeroed_footer[-60:-8] = bytes(52)
    contents = {
        "empty": (b"", "is empty: 0 bytes"),
        "magic": (b"hello, I am no parquet file", "it begins with b'hell'"),
        "cut": (good[:-20], "the end mark of a parquet file is missing"),
        "footer": (bytes(zeroed_footer), "cannot be read as parquet"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
    }
    found = {}
    for name, (content, message) in contents.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(content)
        found[name] = (path, message)
    found["folder"] = (tmp_path / "folder.parquet", "cannot be read as parquet")
    found["folder"][0].mkdir()
    found["gone"] = (tmp_path / "gone.parquet", "cannot be read as parquet")
    return found


@pytest.mark.parametrize("name", ["empty", "magic", "cut", "footer", "lfs", "folder", "gone"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    path, message = damaged(tmp_path)[name]
    (problem,) = check_files([tmp_path / "good.parquet", path], [PROMPT], KEY)
    assert problem.code is ExitCode.DATA
    assert problem.subject == f"{KEY}: {path}"
    assert message in problem.rule
    assert "the other 1 file is good" in problem.rule


@pytest.mark.parametrize("name", ["/dev/zero", "pipe"])
def test_what_has_no_end_is_not_read(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (problem,) = check_files([tmp_path / name], [PROMPT], KEY)
    assert "is no regular file" in problem.rule


def test_no_columns_and_no_rows(tmp_path: Path) -> None:
    bare = tmp_path / "bare.parquet"
    pq.write_table(pa.table({}), bare)
    assert "has no columns" in check_files([bare], [PROMPT], KEY)[0].rule
    none = write(tmp_path / "none.parquet", prompt=pa.array([], pa.string()))
    assert "no rows at all" in check_files([none, none], [PROMPT], KEY)[0].rule
    assert check_files([none, write(tmp_path / "some.parquet", prompt=TEXT)], [PROMPT], KEY) == []


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_types_of_text_are_accepted_and_read(kind: pa.DataType, tmp_path: Path) -> None:
    values = pa.array(["x", None, ""]).cast(kind)
    file = write(tmp_path / "a.parquet", prompt=values)
    assert check_files([file], [PROMPT], KEY) == []
    batch = next(pq.ParquetFile(file).iter_batches())
    assert read_texts(batch, [PROMPT]) == ["x", Unreadable("prompt is null"), ""]


OTHER_TYPES = [pa.array([1, 2]), pa.array([b"x"]), pa.array([["x"]]), pa.array([{"text": "x"}]), pa.nulls(2)]


@pytest.mark.parametrize("values", OTHER_TYPES, ids=lambda values: str(values.type))
def test_other_types_are_refused(values: pa.Array, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", prompt=values)
    (problem,) = check_files([file], [PROMPT], KEY)
    assert problem.subject == "data.prompt_key"
    assert f"prompt is {pq.read_schema(file).field('prompt').type}, expected text" in problem.rule
    assert str(file) in problem.rule


def test_a_missing_column_lists_the_found_ones_and_the_nearest(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.parquet", Prompts=TEXT, answer=TEXT) for n in range(12)]
    good = write(tmp_path / "good.parquet", prompt=TEXT, response=TEXT)
    columns = [PROMPT, Column("data.response_key", "response")]
    prompt, response = check_files([*files, good], columns, KEY)
    assert prompt.subject == "data.prompt_key"
    assert "no column 'prompt'; found Prompts, answer" in prompt.rule
    assert "did you mean 'Prompts'?" in prompt.fix
    assert f"{files[0]}, {files[1]}" in prompt.rule
    assert "and 2 more" in prompt.rule
    assert "the other 1 file is good" in prompt.rule
    assert response.subject == "data.response_key"


def test_files_that_disagree_are_named(tmp_path: Path) -> None:
    text = write(tmp_path / "text.parquet", prompt=TEXT)
    number = write(tmp_path / "number.parquet", prompt=[1, 2])
    view = write(tmp_path / "view.parquet", prompt=pa.array(TEXT, pa.large_string()))
    (problem,) = check_files([text, number, view], [PROMPT], KEY)
    assert str(number) in problem.rule
    assert str(text) not in problem.rule
    assert "the other 2 files are good" in problem.rule


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    file = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(TEXT)] * 2, names=["prompt", "prompt"]), file)
    assert "2 columns are called 'prompt'" in check_files([file], [PROMPT], KEY)[0].rule


NESTED = Column("data.prompt_key", "extra", ("info", "question"))


def test_struct_keys_are_walked_and_single_element_lists_unwrapped(tmp_path: Path) -> None:
    rows = [
        [{"info": {"question": "one"}}],
        [{"info": {"question": None}}],
        [{"info": None}],
        [],
        [{"info": {"question": "a"}}, {"info": {"question": "b"}}],
        None,
    ]
    file = write(tmp_path / "a.parquet", extra=rows)
    assert check_files([file], [NESTED], KEY) == []
    texts = read_texts(next(pq.ParquetFile(file).iter_batches()), [NESTED])
    reasons = [text if isinstance(text, str) else text.reason for text in texts]
    assert reasons == [
        "one",
        "extra.info.question is null",
        "extra.info is null",
        "extra is a list of 0 elements, expected exactly one",
        "extra is a list of 2 elements, expected exactly one",
        "extra is null",
    ]


@pytest.mark.parametrize(
    ("keys", "option", "message"),
    [
        (("info", "questions"), "data.prompt_dict_keys", "extra.info has no key 'questions'; found question, n"),
        (("info", "question", "x"), "data.prompt_dict_keys", "extra.info.question is string, expected a struct"),
        (("info", "n"), "data.prompt_key", "extra.info.n is int64, expected text"),
        ((), "data.prompt_key", "data.prompt_dict_keys descends into structs"),
    ],
)
def test_struct_keys_that_lead_nowhere(keys: tuple[str, ...], option: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", extra=[{"info": {"question": "q", "n": 1}}])
    (problem,) = check_files([file], [Column("data.prompt_key", "extra", keys)], KEY)
    assert problem.subject == option
    assert message in problem.rule


def test_several_columns_are_joined_by_a_line_break() -> None:
    batch = pa.record_batch({"a": ["1", "2"], "b": ["x", None]})
    columns = [Column("data.prompt_key", "a"), Column("data.prompt_key", "b")]
    assert read_texts(batch, columns) == ["1\nx", Unreadable("b is null")]


def test_bytes_that_are_no_utf8_spoil_their_cell_only() -> None:
    raw = pa.array([b"good", b"\xed\xa0\x80", b"fine"]).view(pa.string())
    texts = read_texts(pa.record_batch({"prompt": raw}), [PROMPT])
    assert texts == ["good", Unreadable("not valid UTF-8 at byte 0", Fault.UNDECODABLE), "fine"]


def test_check_data_collects_both_splits_and_takes_null_for_no_validation(tmp_path: Path) -> None:
    config = JobConfig()
    config.data.train_files = str(write(tmp_path / "a.parquet", prompt=TEXT))
    config.data.val_files = str(tmp_path / "gone.parquet")
    subjects = [problem.subject for problem in check_data(config)]
    assert subjects == ["data.response_key", "data.val_files"]
    config.data.val_files = None
    config.data.response_key = OmegaConf.create(["prompt", "prompt"])
    assert check_data(config) == []


def test_checking_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, sft_job.data.files, sft_job.data.prepare; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
