from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_job.config.fields import leaf_fields, section_paths, suggestion
from sft_job.config.keys import FRAGMENTS, KEYS, keys_table
from sft_job.config.schema import JobConfig
from sft_job.config.verl import ALIASES, FOREIGN, VERL_DEFAULTS

SEED = Path(__file__).parents[2] / "golden" / "seed_sft_trainer.yaml"


def schema_paths(section: type[Any], above: str = "") -> set[str]:
    """All settings, walked over the types, independently of the code under test."""
    paths: set[str] = set()
    for name, hint in typing.get_type_hints(section).items():
        path = f"{above}.{name}" if above else name
        is_section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        paths |= schema_paths(hint, path) if is_section else {path}
    return paths


def yaml_paths(tree: dict[str, Any], above: str = "") -> set[str]:
    paths: set[str] = set()
    for name, value in tree.items():
        path = f"{above}.{name}" if above else name
        paths |= yaml_paths(value, path) if isinstance(value, dict) else {path}
    return paths


def test_every_setting_has_an_entry_and_every_entry_is_a_setting():
    assert set(KEYS) == schema_paths(JobConfig)
    assert set(leaf_fields()) == schema_paths(JobConfig)


def test_every_entry_says_exactly_one_thing():
    for key, entry in KEYS.items():
        assert bool(entry.effect) != bool(entry.ignored), key


def test_every_key_of_the_seed_has_an_entry():
    keys = yaml_paths(yaml.safe_load(SEED.read_text()))
    assert len(keys) == 56
    assert keys <= {*KEYS, *ALIASES}


def test_other_names_point_at_settings_and_are_none_themselves():
    for name, alias in ALIASES.items():
        assert alias.target in leaf_fields()
        assert name not in leaf_fields()
    taken = {*leaf_fields(), *section_paths(leaf_fields()), *ALIASES}
    assert taken.isdisjoint(FOREIGN)


def test_fragments_point_at_settings_or_sections():
    fields = leaf_fields()
    for name, path in FRAGMENTS.items():
        assert path in fields or path in section_paths(fields)
        assert path.endswith(f".{name}")


def test_the_table_has_one_row_a_key():
    table = keys_table()
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in rows] == [*leaf_fields(), *sorted([*ALIASES, *FOREIGN])]
    assert all(line.count("|") == (5 if line.split("`")[1] in KEYS else 3) for line in rows)
    assert "| `data.train_batch_size` | `256` |  | rows of one optimizer step" in table
    assert "| `model.strategy` | `fsdp` | `fsdp2` / `fsdp` | ignored: fsdp and fsdp2 both mean FSDP2 |" in table
    assert "| `optim.lr_warmup_steps_ratio` | `optim.warmup_steps_ratio` |" in table
    assert "| `profiler` | ignored: this job writes no profiles |" in table
    assert "| `optim.optimizer` | only AdamW: the optimizer is always torch.optim.AdamW |" in table


def test_the_table_shows_where_verl_has_other_defaults():
    for key, pair in VERL_DEFAULTS.items():
        row = next(line for line in keys_table().splitlines() if line.startswith(f"| `{key}` |"))
        default, theirs = row.split(" | ")[1:3]
        assert any(text and f"`{text}`" != default for text in pair)
        assert all(f"`{text}`" in theirs for text in pair if text)
    assert "| `optim.lr` | `1e-05` | `1e-05` / `0.001` | peak learning rate |" in keys_table()
    assert "| `data.prompt_key` | `prompt` | `question` / – | column" in keys_table()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("data.train_batchsize", "did you mean data.train_batch_size?"),
        ("max_length", "did you mean data.max_length?"),
        ("model.model_dtype", "did you mean model.fsdp_config.model_dtype?"),
        ("use_shm", "did you mean data.use_shm or model.use_shm?"),
        ("modle", "did you mean model?"),
        ("qqq", ""),
    ],
)
def test_suggestions(key: str, expected: str):
    assert suggestion(key, leaf_fields()) == expected
