"""Named data sets: what an entry means, and everything that can be wrong with one, with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.checkpoint.state import RunState, compare_config, flat_config
from sft_job.config.load import Loaded, dump_config, load_config, load_resolved, origins_text
from sft_job.config.schema import DataConfig, JobConfig, MultiturnConfig
from sft_job.config.sets import check_sets, data_sets, with_part

ENVIRON = {"CHECKPOINT_DIR": "/runs"}


def load(tmp_path: Path, text: str, *overrides: str) -> Loaded:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return load_config(str(path), overrides, ENVIRON)


def faults(loaded: Loaded) -> dict[str, tuple[str, str, str]]:
    """Subject -> origin, rule, fix."""
    problems = [*loaded.problems, *check_sets(loaded.config, loaded.origin)]
    return {each.subject: (each.origin, each.rule, each.fix) for each in problems}


def shares(loaded: Loaded) -> dict[str, tuple[Any, Any, Any]]:
    return {
        each.name: (each.entry.files, each.entry.weight, each.entry.repeat)
        for each in data_sets(loaded.config.data, "train")
    }


SETS = """
data:
  prompt_key: question
  train_files:
    math: {files: [a.parquet, b.parquet], weight: 3}
    code:
      files: code/*.parquet
      weight: 0.5
  val_files:
    held-out: v.parquet
    2024: {files: w.parquet, max_samples: 5}
"""


def test_a_single_set_has_no_name():
    (only,) = data_sets(DataConfig(train_files=["a", "b"]), "train")
    assert (only.name, only.option, only.entry.files, only.data.train_files) == (
        "",
        "data.train_files",
        ["a", "b"],
        ["a", "b"],
    )
    assert data_sets(DataConfig(), "val") == ()


def test_sets_by_name_with_the_place_of_every_part(tmp_path: Path):
    loaded = load(tmp_path, SETS)
    assert faults(loaded) == {}
    assert shares(loaded) == {
        "code": ("code/*.parquet", 0.5, None),
        "math": (["a.parquet", "b.parquet"], 3, None),
    }
    names = [(each.name, each.option, each.data.val_max_samples) for each in data_sets(loaded.config.data, "val")]
    assert names == [("2024", "data.val_files.2024", 5), ("held-out", "data.val_files.held-out", -1)]
    assert loaded.origin("data.train_files.math.weight") == "job.yaml:5"
    assert loaded.origin("data.train_files.math.files[1]") == "job.yaml:5"
    assert loaded.origin("data.train_files.code.weight") == "job.yaml:8"
    assert loaded.origin("data.train_files.code.max_samples") == "job.yaml:6", "the set's, where a key is not set"
    lines = origins_text(loaded).splitlines()
    assert lines[0].split() == ["data.train_files.math.files", "=", "['a.parquet',", "'b.parquet']", "(job.yaml:5)"]
    assert "data.val_files.held-out = v.parquet" in origins_text(loaded)


def test_settings_with_sets_survive_being_saved(tmp_path: Path):
    loaded = load(tmp_path, SETS, "data.train_files.code.weight=2")
    (tmp_path / "saved.yaml").write_text(dump_config(loaded))
    assert load_resolved(tmp_path / "saved.yaml") == loaded.config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train_files.math.weight=2", {"math": (["a.parquet", "b.parquet"], 2, None)}),
        ("data.train_files.math.files=c.parquet", {"math": ("c.parquet", 3, None)}),
        ("data.train_files.more={files: m.parquet, weight: 1}", {"more": ("m.parquet", 1, None)}),
        ("data.train_files={only: o.parquet}", {"only": ("o.parquet", None, None), "math": None, "code": None}),
        ("data.train_files=o.parquet", {"": ("o.parquet", None, None), "math": None, "code": None}),
    ],
)
def test_the_command_line_reaches_into_sets(tmp_path: Path, override: str, expected: dict[str, Any]):
    loaded = load(tmp_path, SETS, override)
    assert faults(loaded) == {}
    assert shares(loaded) == {k: v for k, v in (shares(load(tmp_path, SETS)) | expected).items() if v is not None}
    key = override.partition("=")[0]
    assert loaded.origin(key) == "command line"
    assert f"{key.partition('{')[0]}" in origins_text(loaded)


def test_an_override_of_a_path_keeps_the_path_and_of_a_name_with_dots_finds_it(tmp_path: Path):
    text = "data:\n  train_files: {qwen2.5: a, qwen2.5.more: b, qwen2: c}\n"
    loaded = load(tmp_path, text, "data.train_files.qwen2.5.repeat=2", "data.train_files.qwen2.5.more.repeat=0.5")
    assert faults(loaded) == {}
    assert shares(loaded) == {"qwen2": ("c", None, None), "qwen2.5": ("a", None, 2), "qwen2.5.more": ("b", None, 0.5)}


@pytest.mark.parametrize("files", ["a.parquet", "[a.parquet]"])
def test_a_part_of_a_set_that_is_not_there(tmp_path: Path, files: str):
    loaded = load(tmp_path, f"data:\n  train_files: {files}\n", "data.train_files.math.weight=2")
    ((subject, (origin, rule, _)),) = faults(loaded).items()
    assert (subject, origin) == ("data.train_files.math.weight", "command line")
    assert "no named data sets" in rule
    loaded = load(tmp_path, SETS, "data.train_files.mth.weight=2")
    assert faults(loaded) == {
        "data.train_files.mth.files": ("command line", "must be set", "did you mean data.train_files.math?")
    }


WRONG = """
data:
  train_files:
    math: {files: a, wieght: 1, repeat: .inf}
    Math: b
    both: {files: c, weight: 1, repeat: 2}
    a b: d
    none:
    empty: {files: []}
    zero: {files: e, weight: 0, max_samples: 0}
    chat: {files: f, prompt_key: 3, multiturn: {messages_key: m, mesages: n, enable: yes}, messages_key: k}
    unclear: {files: g, response_key: r, tools_key: t}
    section: {files: h, multiturn: on}
    twice: i
    twice: j
    word: {files: no}
  val_files:
    held: {files: v, weight: 2}
"""


def test_everything_that_is_wrong_at_once_with_its_line(tmp_path: Path):
    found = faults(load(tmp_path, WRONG))
    train = "data.train_files"
    assert {subject: origin for subject, (origin, _, _) in found.items()} == {
        f"{train}.math.wieght": "job.yaml:4",
        f"{train}.math.repeat": "job.yaml:4",
        f"{train}.Math": "job.yaml:5",
        f"{train}.both.repeat": "job.yaml:6",
        f"{train}.a b": "job.yaml:7",
        f"{train}.none": "job.yaml:8",
        f"{train}.empty.files": "job.yaml:9",
        f"{train}.zero.weight": "job.yaml:10",
        f"{train}.zero.max_samples": "job.yaml:10",
        f"{train}.chat.prompt_key": "job.yaml:11",
        f"{train}.chat.multiturn.mesages": "job.yaml:11",
        f"{train}.chat.multiturn.messages_key": "job.yaml:11",
        f"{train}.unclear": "job.yaml:12",
        f"{train}.section.multiturn": "job.yaml:13",
        f"{train}.twice": "job.yaml:15",
        f"{train}.word.files": "job.yaml:16",
        train: "job.yaml:3",
        "data.val_files.held.weight": "job.yaml:18",
    }
    assert found[f"{train}.math.wieght"][2] == f"did you mean {train}.math.weight?"
    assert found[f"{train}.chat.multiturn.mesages"][2] == f"did you mean {train}.chat.multiturn.messages_key?"
    assert "zero with weight, math with repeat" in found[train][1]
    assert "duplicate key" in found[f"{train}.twice"][1]


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3), lambda of: st.lists(of, max_size=2)))
def test_no_value_of_a_key_raises(value: Any):
    keys = ("files", "weight", "repeat", "prompt_key", "prompt_dict_keys", "max_samples", "multiturn", "train_on", "x")
    config = JobConfig(data=DataConfig(train_files={key: {"files": "a"} | {key: value} for key in keys} | {"y": value}))
    subjects = {problem.subject for problem in check_sets(config, lambda _: "")}
    assert "data.train_files.x.x" in subjects
    if subjects == {"data.train_files.x.x"}:
        config.data.train_files.pop("x")
        assert data_sets(config.data, "train")


BOTH = DataConfig(prompt_key="q", prompt_dict_keys=["text"], multiturn=MultiturnConfig(messages_key="m"))


@pytest.mark.parametrize(
    ("entry", "on", "off"),
    [
        ({}, True, False),
        ({"messages_key": "c"}, True, True),
        ({"multiturn": {"train_on": "last"}}, True, True),
        ({"multiturn": {"enable": False, "messages_key": "c"}}, False, False),
        ({"prompt_key": "p"}, False, False),
        ({"prompt_key": "p", "multiturn": {"enable": True}}, True, True),
        ({"max_samples": 3}, True, False),
    ],
)
def test_what_an_entry_leaves_out_is_as_data_says(entry: dict[str, Any], on: bool, off: bool):
    for enable, expected in ((True, on), (False, off)):
        data = DataConfig(**vars(BOTH) | {"multiturn": MultiturnConfig(enable=enable, messages_key="m")})
        data.train_files = {"a": {"files": "f", **entry}}
        (found,) = data_sets(data, "train")
        assert found.data.multiturn.enable is expected
        assert found.data.train_files == "f"
        assert found.data.prompt_key == entry.get("prompt_key", "q")
        assert found.data.prompt_dict_keys == ["text"]
        assert found.data.multiturn.messages_key in ("m", "c")
        assert found.data.train_max_samples == entry.get("max_samples", -1)


def test_an_entry_takes_a_path_into_structs_back():
    data = DataConfig(prompt_dict_keys=["text"], train_files={"a": {"files": "f", "prompt_dict_keys": None}, "b": "g"})
    assert [each.data.prompt_dict_keys for each in data_sets(data, "train")] == [None, ["text"]]


def test_a_part_of_nothing_makes_a_set():
    assert with_part(None, "a.multiturn.enable", True) == {"a": {"multiturn": {"enable": True}}}
    assert with_part({"a": "f"}, "a.weight", 2) == {"a": {"files": "f", "weight": 2}}
    assert with_part("f", "a.weight", 2) is None


def state_of(config: JobConfig) -> RunState:
    return RunState(1, 2, 2, 0, 1, 1, 1, 0.5, 1, 1, "", "", flat_config(config), True, "")


def test_what_may_change_when_a_run_goes_on():
    base = JobConfig(data=DataConfig(train_files={"a": "f", "b": {"files": "g", "weight": 1}}, val_files={"v": "w"}))
    state = state_of(base)

    def refused(sets: Any, val: Any = None, allowed: tuple[str, ...] = ()) -> list[str]:
        config = JobConfig(data=DataConfig(train_files=sets, val_files=val))
        config.trainer.allow_changed = list(allowed)
        return [change.key for change in compare_config(state, config).refused]

    assert refused({"b": {"weight": 1.0, "files": "elsewhere"}, "a": {"files": ["f"]}}) == []
    changed = {"a": "f", "b": {"files": "g", "weight": 2, "multiturn": {"messages_key": "m"}}}
    assert refused(changed) == ["data.train_files.b.messages_key", "data.train_files.b.weight"]
    assert refused(changed, allowed=("data.train_files",)) == []
    assert refused(changed, allowed=("data.train_files.b.weight",)) == ["data.train_files.b.messages_key"]
