from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sft_job.config.fields import Field, leaf_fields, value_at
from sft_job.config.load import dump_config, load_config, load_resolved
from sft_job.errors import problems_text
from tests.yaml_pieces import changed_text

SEED = (Path(__file__).parents[2] / "golden" / "seed_sft_trainer.yaml").read_text()
FIELDS = leaf_fields()
RUNS = {"CHECKPOINT_DIR": "/runs"}

# Interpolations and ??? have a meaning of their own; a text that ends in a backslash before them, too.
_plain_texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="$\ufffe\uffff\ufeff"), max_size=12
).filter(lambda text: "???" not in text)
_yaml_traps = st.sampled_from(
    [
        *(
            "no",
            "Yes",
            "010",
            "12:30",
            "1e-5",
            "1_0",
            "0x1F",
            "null",
            "~",
            "",
            " x ",
            "# a",
            "a: b",
            "[a]",
            "=",
            "<<",
            "-",
        ),
        *("true", ".inf", "1:30.5", "a\nb", "a\tb", "'", '"', "&a", "*a", "!x", "%a", "@", "`", "2020-01-01", "\u2028"),
    ]
)
texts = _plain_texts | _yaml_traps
numbers = st.floats(allow_nan=False)
wholes = st.integers(-(2**63), 2**63)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: wholes,
    float: numbers,
    str: texts,
    dict: st.dictionaries(texts, texts | wholes | numbers | st.booleans() | st.none() | st.lists(texts, max_size=3)),
    Any: st.none() | texts | wholes | st.lists(texts, max_size=3),
}


def values(field: Field) -> st.SearchStrategy[Any]:
    if field.kind is list:
        strategy: st.SearchStrategy[Any] = st.lists(VALUES[field.item], max_size=4)
    else:
        strategy = VALUES[field.kind]
    return st.none() | strategy if "null" in field.expected else strategy


some_settings = st.lists(st.sampled_from([*FIELDS]), unique=True, max_size=12).flatmap(
    lambda keys: st.fixed_dictionaries({key: values(FIELDS[key]) for key in keys})
)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(some_settings)
def test_settings_survive_yaml_load_dump_and_load_again(flat: dict[str, Any]):
    flat = {"trainer.seed": 1, **flat}
    with tempfile.TemporaryDirectory() as folder:
        path, saved = Path(folder) / "job.yaml", Path(folder) / "config.yaml"
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(nested(flat))), encoding="utf-8")
        loaded = load_config(str(path), ["trainer.default_local_dir=/runs"], {})
        assert not loaded.problems, problems_text(loaded.problems)
        saved.write_text(dump_config(loaded), encoding="utf-8")
        again = load_resolved(saved)
    assert again == loaded.config
    for key, field in FIELDS.items():
        expected = flat.get(key, field.default) if key != "trainer.default_local_dir" else "/runs"
        assert value_at(loaded.config, key) == expected, key


def loads_without_raising(text: str | bytes, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        loaded = load_config(str(path), overrides, RUNS)
        if not loaded.problems:
            (Path(folder) / "config.yaml").write_text(dump_config(loaded), encoding="utf-8")
            assert load_resolved(Path(folder) / "config.yaml") == loaded.config
        else:
            assert problems_text(loaded.problems)


@pytest.mark.parametrize("block", range(6))
def test_mutated_files_give_problems_and_never_raise(block: int):
    for seed in range(block * 50, block * 50 + 50):
        loads_without_raising(changed_text(SEED, random.Random(seed)), [])


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda text: f"trainer:\n  project_name: {text}\n"))
@example("data: &a [*a]")
@example("data: {? {a: b} : c}")
@example("trainer: {seed: 0x}")
@example("trainer: {seed: !!int }")
@example("optim: {lr: !!float }")
@example("optim: {lr: !!timestamp x}")
@example("data:\n  train_files: ${data}\n")
@example("data:\n  train_files: ${oc.create:${data}}\n")
@example("data:\n  apply_chat_template_kwargs: ${data}\n")
@example("data:\n  apply_chat_template_kwargs: {a: '???', b: {c: [1, {d: ~}]}}\n")
@example("trainer:\n  project_name: " + "${" * 500 + "\n")
@example("trainer:\n  project_name: " + "${a:" * 500 + "}" * 500 + "\n")
@example("trainer:\n  project_name: \\???\n")
@example("trainer:\n  logger: ${trainer.allow_changed}\n")
def test_any_bytes_give_problems_and_never_raise(content: str | bytes):
    loads_without_raising(content, [])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(max_size=15) | st.builds("{}={}".format, st.sampled_from([*FIELDS]), st.text(max_size=15))))
@example(["data.apply_chat_template_kwargs.a=1", "data.apply_chat_template_kwargs.a.b=1"])
@example(["data.apply_chat_template_kwargs.a.b=1", "data.apply_chat_template_kwargs=null"])
@example(["data.apply_chat_template_kwargs=null", "data.apply_chat_template_kwargs.a=1"])
def test_any_overrides_give_problems_and_never_raise(overrides: list[str]):
    loads_without_raising("trainer: {experiment_name: a}", overrides)
