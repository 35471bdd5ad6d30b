"""Every key of the files that users bring does something that can be seen, or says why it does nothing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_job.config.fields import leaf_fields, value_at
from sft_job.config.keys import FRAGMENTS, KEYS
from sft_job.config.load import Loaded, load_config
from sft_job.config.schema import JobConfig, TrainerConfig
from sft_job.config.verl import ALIASES, FOREIGN, foreign

GOLDEN = Path(__file__).parents[2] / "golden"
SEED = yaml.safe_load((GOLDEN / "seed_sft_trainer.yaml").read_text())
ENVIRON = {"CHECKPOINT_DIR": "/runs", "NPROC_PER_NODE": "1"}

# The guide's examples, as they stand in it.
FRAGMENTS_OF_THE_GUIDE = [
    "data:\n  train_files: /path/to/your/train_data.parquet\n  val_files: /path/to/your/val_data.parquet\n",
    "model:\n  partial_pretrain: /path/to/your/base/model\n",
    "multiturn:\n  enable: true\n  messages_key: messages\n  tools_key: tools\n",
    "lora_rank: 16\nlora_alpha: 32\ntarget_modules: all-linear\n",
    "fsdp_config:\n  cpu_offload: true\n  offload_params: true\n",
]


def paths(tree: Any, above: str = "") -> list[str]:
    if not isinstance(tree, dict) or not tree:
        return [above]
    return [path for name, value in tree.items() for path in paths(value, f"{above}.{name}" if above else name)]


def keys_of_verl() -> list[str]:
    lines = (GOLDEN / "verl_keys.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


WALK = sorted({*paths(SEED), *keys_of_verl()})

# A value other than the default, where none follows from the type.
CHANGED: dict[str, Any] = {
    "data.train_files": "a.parquet",
    "data.val_files": ["b.parquet"],
    "data.train_max_samples": 7,
    "data.val_max_samples": 7,
    "data.prompt_dict_keys": ["question"],
    "data.response_dict_keys": ["answer"],
    "data.truncation": "left",
    "data.apply_chat_template_kwargs": {"enable_thinking": False},
    "data.num_workers": 2,
    "model.fsdp_config.model_dtype": "bf16",
    "model.fsdp_config.dtype": "fp32",
    "model.target_modules": ["q_proj"],
    "model.exclude_modules": ["q_proj"],
    "model.strategy": "fsdp2",
    "optim.betas": [0.8, 0.9],
    "optim.warmup_steps": 3,
    "optim.lr_scheduler": "constant",
    "trainer.resume_mode": "disable",
    "trainer.total_training_steps": 5,
    "trainer.logger": ["wandb"],
    "trainer.save_freq": 2,
    "trainer.test_freq": 2,
    "trainer.max_ckpt_to_keep": 2,
    "trainer.checkpoint.save_contents": ["model"],
    "trainer.on_save_failure": "continue",
}
# Another spelling under the other name, which is read as the value above.
WRITTEN = {"engine.model_dtype": "bfloat16", "engine.dtype": "float32"}
REFUSED: dict[str, Any] = {
    "checkpoint.load_contents": ["model"],
    "trainer.checkpoint.load_contents": ["model"],
    "data.enable_thinking_default": True,
    "data.pad_mode": "left",
    "defaults": [{"model@model": "hf_model"}, {"engine@engine": "megatron"}],
    "engine.forward_only": True,
    "engine.qat.enable": True,
    "model.hf_config_path": "/other",
    "model.tokenizer_path": "/other",
    "model.override_config": {"attn_implementation": "eager"},
    "model.mtp.enable": True,
    "model.mtp.enable_train": True,
    "optim.optimizer": "Adam",
    "optim.optimizer_impl": "bitsandbytes.optim",
    "optim.override_optimizer_config": {"eps": 1},
    "optim.num_cycles": 1.5,
    "optim.lr_wsd_stable_steps_ratio": 0.5,
    "trainer.device": "npu",
}
"""verl's keys without a counterpart that do change what verl computes -> a value for which that is so."""


def changed(key: str) -> Any:
    target = ALIASES[key].target if key in ALIASES else key
    default = leaf_fields()[target].default
    if target in CHANGED:
        return CHANGED[target]
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default + 1
    return f"{default or ''}x"


def load(tmp_path: Path, key: str, value: Any) -> Loaded:
    tree: Any = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    # The environment beats this key.
    return load_config(str(path), [], {} if key == "trainer.default_local_dir" else ENVIRON)


def test_the_walk_is_complete():
    assert len(paths(SEED)) == 56
    assert len(set(keys_of_verl())) == 216
    assert not {*CHANGED} - {*leaf_fields()}
    assert set(REFUSED) == {key for key, entry in FOREIGN.items() if entry.only and key in WALK}


@pytest.mark.parametrize("key", WALK)
def test_every_key_is_in_exactly_one_class(key: str):
    is_own, is_alias = key in KEYS, key in ALIASES
    assert [is_own, is_alias, not is_own and foreign(key) is not None].count(True) == 1


@pytest.mark.parametrize("key", [key for key in WALK if key in KEYS or key in ALIASES])
def test_a_changed_setting_reaches_the_config_or_is_listed(tmp_path: Path, key: str):
    target = ALIASES[key].target if key in ALIASES else key
    value, before = changed(key), leaf_fields()[target].default
    loaded = load(tmp_path, key, WRITTEN.get(key, value))
    assert loaded.problems == []
    assert value_at(loaded.config, target) == value != before
    assert loaded.origin(target) == f"job.yaml:{1 + key.count('.')}"
    mappings = [line for line in loaded.mappings if line.startswith(f"{key} ") and f"-> {target} = " in line]
    assert len(mappings) == len(loaded.mappings) == (key in ALIASES)
    listed = [line for line in loaded.ignored if line.startswith(f"{target} = ") and KEYS[target].ignored in line]
    assert len(listed) == len(loaded.ignored) == bool(KEYS[target].ignored)


IGNORED = [key for key in WALK if foreign(key) and key not in {*KEYS, *ALIASES, *REFUSED}]


@pytest.mark.parametrize(
    ("key", "value"), [*zip(IGNORED, itertools.cycle([None, True, 3, "some text", ["a"], {"a": 1}]), strict=False)]
)
def test_a_key_without_counterpart_is_listed_with_its_reason(tmp_path: Path, key: str, value: Any):
    entry = foreign(key)
    assert entry is not None
    loaded = load(tmp_path, key, value)
    assert (loaded.problems, loaded.mappings) == ([], [])
    (line,) = loaded.ignored
    assert line.startswith("ignored: ")
    assert line.endswith(f": {entry.why}")
    name = line.removeprefix("ignored: ").partition(" (job.yaml:")[0]
    assert f"{key}.".startswith(f"{name}.") or name == f"{key}.a"
    assert loaded.config == JobConfig(trainer=TrainerConfig(default_local_dir="/runs/sft"))


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_without_counterpart_that_would_change_the_result_is_a_problem(tmp_path: Path, key: str):
    (problem,) = load(tmp_path, key, REFUSED[key]).problems
    assert problem.subject == (f"{key}[1]" if key == "defaults" else key)
    assert problem.rule == f"only {FOREIGN[key].only}: {FOREIGN[key].why}"
    assert problem.origin.startswith("job.yaml:")
    assert problem.fix


@pytest.mark.parametrize("text", FRAGMENTS_OF_THE_GUIDE)
def test_the_guides_fragments_below_their_section_or_as_a_problem(tmp_path: Path, text: str):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    for key in paths(yaml.safe_load(text)):
        top = key.partition(".")[0]
        if top in FRAGMENTS:
            subjects = [each.subject for each in load_config(str(path), [], ENVIRON).problems]
            assert top in subjects
            key = FRAGMENTS[top] + key.removeprefix(top)
            given = load(tmp_path, key, changed(key))
            path.write_text(text)
        else:
            given = load_config(str(path), [], ENVIRON)
        assert given.problems == []
        assert value_at(given.config, key) != leaf_fields()[key].default
        assert KEYS[key].effect or KEYS[key].refused
