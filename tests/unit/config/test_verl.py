"""verl's names: one file as verl's newer trainer has it, and what each layer makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_job.config.load import Loaded, dump_config, load_config, load_resolved
from sft_job.config.verl import FOREIGN

RUNS = {"CHECKPOINT_DIR": "/runs"}

ENGINE = """
defaults:
  - model@model: hf_model
  - engine@engine: fsdp
  - optional optim@optim: fsdp
  - _self_
hydra:
  run: {dir: outputs}
data:
  train_files: a.parquet
  messages_key: chat
  pad_mode: no_padding
  max_length: 64
model:
  _target_: verl.workers.config.HFModelConfig
  path: /base
  tokenizer_path: ${model.path}
  custom_chat_template: "{{ messages }}"
  override_config: {}
  use_remove_padding: true
  fused_kernel_options: {impl_backend: torch}
  mtp: {enable: false, method: mtp}
engine:
  strategy: fsdp2
  param_offload: false
  optimizer_offload: true
  offload_policy: false
  fsdp_size: 2
  model_dtype: bfloat16
  dtype: bfloat16
  forward_prefetch: true
  use_orig_params: false
  ulysses_sequence_parallel_size: 2
  qat: {enable: false}
optim:
  optimizer: AdamW
  lr: 1e-5
  lr_scheduler_type: cosine
  lr_warmup_steps: -1
  lr_warmup_steps_ratio: 0.03
  num_cycles: 0.5
checkpoint:
  save_contents: [model, optimizer, extra, hf_model]
  load_contents: ${checkpoint.save_contents}
trainer:
  project_name: p
  experiment_name: ${trainer.project_name}-${engine.ulysses_sequence_parallel_size}
  resume_from_path: null
  device: cuda
  profile_interval: [-1, -1]
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Loaded:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return load_config(str(path), overrides, RUNS)


def test_a_file_of_the_engine_trainer(tmp_path: Path):
    loaded = load(tmp_path, ENGINE)
    assert loaded.problems == []
    config = loaded.config
    assert (config.model.partial_pretrain, config.model.strategy) == ("/base", "fsdp2")
    assert (config.data.chat_template, config.data.multiturn.messages_key) == ("{{ messages }}", "chat")
    fsdp = config.model.fsdp_config
    assert (fsdp.cpu_offload, fsdp.offload_params, fsdp.fsdp_size) == (True, False, 2)
    assert (fsdp.model_dtype, fsdp.dtype, config.ulysses_sequence_parallel_size) == ("bf16", "bf16", 2)
    assert (config.optim.lr_scheduler, config.optim.warmup_steps_ratio, config.optim.warmup_steps) == (
        "cosine",
        0.03,
        None,
    )
    assert config.trainer.checkpoint.save_contents == ["model", "optimizer", "extra", "hf_model"]
    assert config.trainer.experiment_name == "p-2"
    assert [line.partition(" (")[0] for line in loaded.mappings] == [
        "data.messages_key",
        "model.path",
        "model.custom_chat_template",
        "model.use_remove_padding",
        "engine.strategy",
        "engine.optimizer_offload",
        "engine.fsdp_size",
        "engine.model_dtype = bfloat16",
        "engine.dtype = bfloat16",
        "engine.ulysses_sequence_parallel_size",
        "optim.lr_scheduler_type",
        "optim.lr_warmup_steps_ratio",
        "checkpoint.save_contents",
    ]
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(loaded))
    assert load_resolved(saved) == config


def test_the_lines_about_other_names(tmp_path: Path):
    lines = load(tmp_path, ENGINE).mappings
    assert "engine.dtype = bfloat16 (job.yaml:30) -> model.fsdp_config.dtype = bf16" in lines
    assert (
        "engine.optimizer_offload (job.yaml:26) -> model.fsdp_config.cpu_offload = true; "
        "weights and gradients go with the states" in lines
    )


def test_keys_without_effect_are_listed_once_for_each_reason(tmp_path: Path):
    lines = load(tmp_path, ENGINE).ignored
    assert (
        f"ignored: engine.forward_prefetch (job.yaml:31), engine.use_orig_params (job.yaml:32): "
        f"{FOREIGN['engine.use_orig_params'].why}" in lines
    )
    origins = ", ".join(f"defaults[{at}] (job.yaml:{at + 3})" for at in range(4))
    assert f"ignored: {origins}: {FOREIGN['defaults'].why}" in lines
    assert (
        "ignored: model._target_ (job.yaml:15): names a class of verl's; nothing is built by such names here" in lines
    )
    assert len({line.rpartition("): ")[2] for line in lines}) == len(lines)


@pytest.mark.parametrize(
    ("text", "subject", "said"),
    [
        ("defaults:\n  - engine: megatron", "defaults[0]", "only _self_, model: hf_model"),
        ("defaults:\n  - sft_trainer", "defaults[0]", "write the values that you rely on into this file"),
        ("defaults:\n  - _self_\n  - data: other", "defaults[1]", "trains with FSDP2"),
        ("defaults: ppo_trainer", "defaults", "only _self_"),
        ("engine: {fsdp_sise: 3}", "engine.fsdp_sise", "did you mean engine.fsdp_size?"),
        ("checkpoint: {save_content: [model]}", "checkpoint.save_content", "did you mean checkpoint.save_contents?"),
        ("optim: {lr_scheduler_typ: cosine}", "optim.lr_scheduler_typ", "did you mean optim.lr_scheduler?"),
        ("engine: {dtype: [1]}", "engine.dtype", "must be a text or null; this is a list"),
        ("engine: {fsdp_size: x}", "engine.fsdp_size", "must be a whole number"),
        ("engine: 3", "engine", "must be a mapping of settings"),
        ("optim: {num_cycles: true}", "optim.num_cycles", "only 0.5"),
        ("optim: {num_cycles: 1}", "optim.num_cycles", "only 0.5"),
        ("trainer: {device: npu}", "trainer.device", "only cuda or cpu"),
        ("checkpoint: {load_contents: [model]}", "checkpoint.load_contents", "sft-job export"),
        ("model: {tokenizer_path: /t}", "model.tokenizer_path", "put the files into one folder"),
        ("model: {mtp: {enable: true}}", "model.mtp.enable", "only false"),
        ("data: {image_key: images}", "data.image_key", "text only"),
        ("trainer: {device: !mine x}", "trainer.device", "the tag !mine is not allowed"),
    ],
)
def test_problems_with_verls_names(tmp_path: Path, text: str, subject: str, said: str):
    (problem,) = load(tmp_path, text).problems
    assert problem.subject == subject
    assert problem.origin.startswith("job.yaml:")
    assert said in problem.text()


@pytest.mark.parametrize(
    "entry", ["_self_", "/optim: fsdp", "override engine@engine: fsdp", "override hydra/job_logging: disabled"]
)
def test_entries_of_the_defaults_list(tmp_path: Path, entry: str):
    loaded = load(tmp_path, f"defaults:\n  - {entry}")
    assert (loaded.problems, len(loaded.ignored)) == ([], 1)


def test_the_command_line_mends_what_the_file_has_wrong(tmp_path: Path):
    text = "optim: {optimizer: Adam}"
    assert [each.subject for each in load(tmp_path, text).problems] == ["optim.optimizer"]
    loaded = load(tmp_path, text, "optim.optimizer=AdamW")
    assert loaded.problems == []
    assert loaded.ignored == ["ignored: optim.optimizer (command line): the optimizer is always torch.optim.AdamW"]


@pytest.mark.parametrize(
    ("text", "override", "key", "value"),
    [
        ("engine: {offload_policy: true}", "engine.offload_policy=false", "cpu_offload", False),
        ("engine: {offload_policy: false}", "engine.offload_policy=true", "cpu_offload", True),
        ("engine: {dtype: bfloat16}", "engine.dtype=null", "dtype", None),
        ("engine: {dtype: bfloat16}", "engine.dtype=float32", "dtype", "fp32"),
        ("engine: {dtype: bfloat16}", "model.fsdp_config.dtype=fp32", "dtype", "fp32"),
    ],
)
def test_a_later_layer_takes_back_what_an_earlier_one_set(
    tmp_path: Path, text: str, override: str, key: str, value: Any
):
    loaded = load(tmp_path, text, override)
    assert loaded.problems == []
    assert getattr(loaded.config.model.fsdp_config, key) == value
    assert loaded.origin(f"model.fsdp_config.{key}") == ("command line" if value else "")


def test_a_later_layer_that_unsets_another_name_says_that_the_value_holds(tmp_path: Path):
    loaded = load(tmp_path, "optim: {warmup_steps: 5}", "optim.lr_warmup_steps=-1")
    assert loaded.config.optim.warmup_steps == 5
    assert loaded.mappings == [
        "optim.lr_warmup_steps = -1 (command line) sets nothing: optim.warmup_steps = 5 (job.yaml:1) holds"
    ]


def test_a_conflict_is_one_also_after_conversion(tmp_path: Path):
    agree = "model: {fsdp_config: {dtype: bf16}}\nengine: {dtype: bfloat16}"
    assert load(tmp_path, agree).problems == []
    (problem,) = load(tmp_path, agree.replace("bfloat16", "float32")).problems
    assert problem.subject == "engine.dtype"
    assert "means the same as model.fsdp_config.dtype = 'bf16' (job.yaml:1), which differs" in problem.rule
