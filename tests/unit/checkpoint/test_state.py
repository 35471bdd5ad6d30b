from __future__ import annotations

import dataclasses
import json

import pytest

from sft_job.checkpoint.state import (
    LENGTH_KEYS,
    SAFE_KEYS,
    RunState,
    SourceState,
    compare_config,
    flat_config,
    read_state,
)
from sft_job.config.fields import leaf_fields
from sft_job.config.schema import JobConfig


def state_of(config: JobConfig) -> RunState:
    saved = json.loads(json.dumps(flat_config(config)))
    return RunState(1, 8, 4, 0, 4, 100, 50, 2.0, 1, 1, "d", "m", saved, True, "0")


def test_an_equal_config_has_no_changes() -> None:
    config = JobConfig()
    config.data.train_files = ["a", "b"]
    config.data.apply_chat_template_kwargs = {"enable_thinking": False}
    changes = compare_config(state_of(config), config)
    assert (changes.refused, changes.longer, changes.safe) == ((), (), ())


def test_the_lists_name_only_settings_that_exist() -> None:
    assert SAFE_KEYS | set(LENGTH_KEYS) <= set(leaf_fields())


def test_every_setting_is_sorted_somewhere() -> None:
    """Each setting changed alone is either safe or refused; a new field is refused until somebody decides."""
    for key in leaf_fields():
        config = JobConfig()
        saved = state_of(config)
        saved.config[key] = "something else"
        changes = compare_config(saved, config) if key not in LENGTH_KEYS else None
        if changes is not None:
            named = changes.safe if key in SAFE_KEYS else changes.refused
            assert [change.key for change in named] == [key]


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [((2, None), (3, None), "longer"), ((2, None), (1, None), "refused"), ((2, 10), (2, 12), "longer"),
     ((2, 6), (2, None), "longer"), ((2, 10), (2, None), "refused"), ((2, None), (2, 9), "longer"),
     ((2, None), (2, 8), "safe"), ((2, None), (2, 5), "refused")],
)  # fmt: skip
def test_length_is_judged_by_the_steps_it_means(old, new, kind) -> None:
    """An epoch has 4 steps."""
    before, after = JobConfig(), JobConfig()
    before.trainer.total_epochs, before.trainer.total_training_steps = old
    after.trainer.total_epochs, after.trainer.total_training_steps = new
    saved = dataclasses.replace(state_of(before), total_steps=old[1] or old[0] * 4)
    changes = compare_config(saved, after)
    assert [bool(getattr(changes, name)) for name in ("longer", "refused", "safe")] == [
        kind == name for name in ("longer", "refused", "safe")
    ]


def test_allowed_by_name_or_by_section() -> None:
    before, after = JobConfig(), JobConfig()
    after.optim.lr = 3.0
    for names in (["optim.lr"], ["optim"]):
        after.trainer.allow_changed = names
        assert compare_config(state_of(before), after).refused == ()
    after.trainer.allow_changed = ["optim.l"]
    assert [change.key for change in compare_config(state_of(before), after).refused] == ["optim.lr"]


def test_round_trip(tmp_path) -> None:
    state = state_of(JobConfig())
    (tmp_path / "state.json").write_text(state.to_json())
    assert read_state(tmp_path) == dataclasses.replace(state, config=read_state(tmp_path).config)
    (tmp_path / "state.json").write_text('{"step": 1}')
    with pytest.raises(ValueError, match=r"state\.json"):
        read_state(tmp_path)


def test_states_of_other_versions(tmp_path) -> None:
    """What is not known is left out; what has a default may be missing; what is not a state is said to be none."""
    source = SourceState(1, 2, 3, 4, "f")
    state = dataclasses.replace(state_of(JobConfig()), sources={"a": source})
    fields = json.loads(state.to_json())
    fields["sources"]["a"]["mood"] = "new"
    del fields["contents"], fields["rng"]
    (tmp_path / "state.json").write_text(json.dumps(fields | {"of a later version": [1]}))
    found = read_state(tmp_path)
    assert found.contents == ("model", "optimizer")
    assert found.sources == {"a": source}
    for other in ([], None, 3, {**fields, "sources": []}, {**fields, "contents": 3}, {**fields, "step": "x"}):
        (tmp_path / "state.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"state\.json"):
            read_state(tmp_path)


def test_secrets_of_the_environment_are_in_no_state(monkeypatch) -> None:
    """They stand by the name of their variable; another value of it is no other setting."""
    config = JobConfig()
    config.trainer.experiment_name = "run canary-one"
    config.data.apply_chat_template_kwargs = {"note": ["canary-one"]}
    monkeypatch.setenv("MY_PASSWORD", "canary-one")
    saved = state_of(config)
    assert saved.config["trainer.experiment_name"] == "run <secret MY_PASSWORD>"
    assert "canary-one" not in json.dumps(saved.config)
    monkeypatch.setenv("MY_PASSWORD", "canary-two")
    config.trainer.experiment_name = "run canary-two"
    config.data.apply_chat_template_kwargs = {"note": ["canary-two"]}
    changes = compare_config(saved, config)
    assert (changes.refused, changes.longer, changes.safe) == ((), (), ())
