from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.config.fields import leaf_fields, value_at
from sft_job.config.layout import ulysses_fits
from sft_job.config.model_folder import ModelFacts
from sft_job.config.schema import JobConfig
from sft_job.config.topology import Topology
from sft_job.config.validate import ATTENTION_BACKENDS, validate
from sft_job.contract import ExitCode
from sft_job.errors import Problem

ONE_RANK = Topology(1, 1, 0, "127.0.0.1", None)
MODEL = ModelFacts(
    path=Path("/base"),
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    num_attention_heads=28,
    num_key_value_heads=4,
    num_hidden_layers=2,
    hidden_size=3584,
    head_dim=128,
    vocab_size=1000,
    max_position_embeddings=32768,
    rope_type="default",
    rope_positions=None,
    rope_original=None,
    tie_word_embeddings=False,
    has_weights=True,
    is_moe=False,
    parameters=1,
    has_auto_map=False,
)


def config_with(**changes: Any) -> JobConfig:
    config = JobConfig()
    for path, value in changes.items():
        section, _, name = path.replace("__", ".").rpartition(".")
        setattr(value_at(config, section) if section else config, name, value)
    return config


def check(
    config: JobConfig, topology: Topology = ONE_RANK, model: ModelFacts | None = None, is_set: bool = True
) -> tuple[list[Problem], list[str]]:
    before = dataclasses.asdict(config)
    problems, warnings = validate(config, topology, model, lambda key: f"job.yaml:{len(key)}" if is_set else "")
    assert dataclasses.asdict(config) == before, "validate rewrites nothing"
    assert all(problem.code is ExitCode.CONFIG for problem in problems)
    return problems, warnings


def test_defaults_are_valid():
    assert check(JobConfig(), Topology(8, 1, 0, "127.0.0.1", None), MODEL, is_set=False) == ([], [])


NAN, INF = float("nan"), float("inf")
LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    "data.train_batch_size": ([1, 7], [0, -1]),
    "data.micro_batch_size_per_gpu": ([1], [0]),
    "data.max_token_len_per_gpu": ([1], [0]),
    "data.train_files": ([None, "a", ["a", "b"], {"a": "b"}], ["", [], [1], 3, {}, [""]]),
    "data.val_files": ([None, "a", ["a"], {"a": ["b"]}], ["", [], True, {}]),
    "data.train_max_samples": ([-1, 1], [0, -2]),
    "data.val_max_samples": ([-1, 1], [0, -2]),
    "data.prompt_key": (["q", ["q", "context"]], [None, "", [], [1], True]),
    "data.response_key": (["a"], [None]),
    "data.prompt_dict_keys": ([None, ["a"]], [[]]),
    "data.response_dict_keys": ([None, ["a"]], [[]]),
    "data.multiturn.messages_key": (["m"], [""]),
    "data.multiturn.tools_key": (["m"], [""]),
    "data.multiturn.enable_thinking_key": (["m"], [""]),
    "data.multiturn.train_on": (["all", "last"], ["first", ""]),
    "data.max_length": ([2, 128000], [1, 0]),
    "data.max_rejected_fraction": ([0.0, 0.5, 1.0], [-0.1, 1.1, NAN]),
    "data.truncation": (["error", "left", "right", "drop", "turn"], ["Right", "middle", ""]),
    "data.cache_dir": ([None, "/c"], [""]),
    "data.num_workers": ([None, 1], [0]),
    "model.init": (["pretrained", "random"], ["zeros"]),
    "model.fsdp_config.model_dtype": (["bf16", "fp32", "fp64"], ["fp16", "bfloat16", ""]),
    "model.fsdp_config.dtype": ([None, "bf16", "fp32", "fp64"], ["fp16"]),
    "model.lora_rank": ([0, 1, 64], [-1]),
    "model.lora_alpha": ([0.5, 16], [0, -1, NAN, INF]),
    "model.target_modules": (["all-linear", ["q_proj"], r".*\.(q|v)_proj"], ["", [], None, [""], 3, "(", "*x"]),
    "model.exclude_modules": ([None, ["q_proj"], r".*\.0\..*"], ["", [], [1], "("]),
    "model.fsdp_config.fsdp_size": ([-1, 1], [0, -2, 2]),
    "data.chat_template": ([None, "{{ messages }}"], [""]),
    "data.custom_cls.path": ([None, "mine.py"], [""]),  # data/custom.py looks at file and class
    "data.custom_cls.name": ([None, "Rows"], [""]),
    "model.external_lib": ([None, "json", "json.tool"], ["", "no_such_module_here", "a b", "/x.py"]),
    "trainer.default_hdfs_dir": ([None, "/elsewhere", "hdfs://host/a", "s3://a"], ["", "s3://", "://a", "A b://c"]),
    "model.recompute": (["auto", "none", "attention", "full", "offload"], ["some", ""]),
    "model.fp8": (["none", "tensorwise", "rowwise"], ["fp8", ""]),
    "model.compile": (["auto", True, False], ["yes", 1, None]),
    "model.fsdp_config.shard_frozen": (["auto", True, False], ["yes", 1, None]),
    "model.fsdp_config.shard_accumulated": (["auto", True, False], ["yes", 1, None]),
    "model.attention": (["auto", *ATTENTION_BACKENDS], ["flash_attention_2"]),
    "model.strategy": (["fsdp", "fsdp2"], ["ddp"]),
    "optim.lr": ([1e-30, 1], [0.0, -1e-5, NAN, INF]),
    "optim.betas": ([[0.0, 0.999]], [[], [0.9], [0.9, 0.9, 0.9], [0.9, 1.0], [-0.1, 0.9], [NAN, 0.9]]),
    "optim.eps": ([1e-8], [0.0, INF]),
    "optim.weight_decay": ([0.0, 0.1], [-0.1, NAN]),
    "optim.warmup_steps_ratio": ([0.0, 1.0], [-0.1, 1.1, NAN]),
    "optim.warmup_steps": ([None, 0, 5], [-1]),
    "optim.clip_grad": ([0.0, 1.0], [-1.0, INF]),
    "optim.lr_scheduler": (["cosine", "wsd", "constant"], ["linear"]),
    "optim.min_lr_ratio": ([0.0, 1.0], [-0.1, 2.0]),
    "trainer.resume_mode": (["auto", "disable"], ["always"]),
    "trainer.total_epochs": ([1], [0]),
    "trainer.total_training_steps": ([None, 1], [0, -1]),
    "trainer.logger": ([[], ["console", "wandb", "tensorboard", "file"]], [["Tensorboard"], ["console", "mlflow"]]),
    "trainer.seed": ([0, 2**32 - 1], [-1, 2**32]),
    "trainer.save_freq": ([-1, 1], [0, -2]),
    "trainer.test_freq": ([-1, 1, "after_each_epoch"], [0, -2, "each_epoch", None, True, 1.5, [1]]),
    "trainer.max_ckpt_to_keep": ([None, 1], [0]),
    "trainer.checkpoint.save_contents": ([["model", "optimizer", "extra", "hf_model"], []], [["weights"]]),
    "trainer.recovery_minutes": ([0.0, 0.5, 15.0], [-1.0, NAN, INF]),
    "trainer.on_save_failure": (["end", "continue"], ["ignore"]),
    "trainer.log_freq": ([1], [0]),
    "trainer.allow_changed": ([[], ["optim.lr"]], [["lr"], ["optim.lr", "optim.lrr"]]),
    "trainer.non_finite": (["stop", "skip"], ["ignore", ""]),
    "trainer.max_skipped_steps": ([1, 5], [0, -1]),
    "trainer.timeout_seconds": ([1], [0]),
    "trainer.max_wall_seconds": ([None, 1], [0, -1]),
    "trainer.max_starts_without_progress": ([0, 1], [-1]),
    "ulysses_sequence_parallel_size": ([1], [0, -4]),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (good, _) in LIMITS.items() for value in good])
def test_allowed_values(key: str, value: Any):
    assert check(config_with(**{key.replace(".", "__"): value}))[0] == []


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (_, bad) in LIMITS.items() for value in bad])
def test_refused_values(key: str, value: Any):
    (problem,) = check(config_with(**{key.replace(".", "__"): value}))[0]
    assert problem.subject.partition("[")[0] == key
    assert problem.origin.startswith("job.yaml:")
    assert problem.rule


def test_every_setting_that_can_be_wrong_has_limits_here():
    always_fine = {
        "data.use_dynamic_bsz",
        "data.multiturn.enable",
        "data.allow_control_tokens",
        "data.apply_chat_template_kwargs",
        "data.balance_dp_token",
        "data.use_shm",
        "model.lora_adapter_path",  # has tests of its own
        "model.use_shm",
        "model.fsdp_config.cpu_offload",
        "model.fsdp_config.offload_params",
        "optim.no_decay_on_norms_and_biases",
        "model.partial_pretrain",
        "model.fsdp_config.wrap_policy.min_num_params",
        "model.fsdp_config.reshard_after_forward",
        "model.enable_gradient_checkpointing",
        "model.trust_remote_code",
        "model.use_liger",
        "use_remove_padding",
        "trainer.default_local_dir",
        "trainer.resume_path",  # has tests of its own
        "trainer.project_name",
        "trainer.experiment_name",
        "trainer.async_save",
        "trainer.nnodes",
        "trainer.n_gpus_per_node",
        "trainer.deterministic",
        "trainer.preflight",
        "trainer.rehearsal",
    }
    assert set(leaf_fields()) == set(LIMITS) | always_fine


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data__truncation", "rigth", "must be one of error, left, right, drop, turn\n    fix: did you mean right?"),
        ("trainer__logger", ["console", "wandbb"], "trainer.logger[1] = 'wandbb'"),
        ("trainer__logger", ["console", "wandbb"], "fix: did you mean wandb?"),
        ("trainer__logger", ["tensorbord"], "did you mean tensorboard?"),
        ("model__target_modules", "(", "a text alone is read as a regular expression"),
        ("trainer__allow_changed", ["optim.lrr"], "did you mean optim.lr?"),
        ("trainer__test_freq", "after_epoch", "did you mean after_each_epoch?"),
        ("optim__betas", [0.9], "must be two numbers, each from 0 to below 1"),
    ],
)
def test_messages(key: str, value: Any, message: str):
    (problem,) = check(config_with(**{key: value}))[0]
    assert message in problem.text()


# Ulysses


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 32), st.integers(1, 32))
def test_ulysses_is_accepted_exactly_where_the_formula_holds(groups: int, kv_heads: int, size: int, world: int):
    heads = groups * kv_heads
    model = dataclasses.replace(MODEL, num_attention_heads=heads, num_key_value_heads=kv_heads)
    config = config_with(ulysses_sequence_parallel_size=size)
    problems, _ = check(config, Topology(world, 1, 0, "127.0.0.1", None), model)
    divides = world % size == 0 and heads % size == 0
    fits = divides and (kv_heads % size == 0 or size % kv_heads == 0)
    assert (problems == []) == fits == ulysses_fits(size, heads, kv_heads, world)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "world", "said"),
    [
        (28, 4, 4, 8, None),
        (32, 8, 16, 16, None),
        (32, 1, 8, 8, None),
        (28, 4, 1, 3, None),
        (28, 4, 8, 8, ["attention heads: 28 heads / 8 = 3.5", "on 8 ranks: 1, 2, 4"]),
        (32, 8, 4, 6, ["number of ranks: 6 ranks / 4 = 1.5", "on 6 ranks: 1, 2"]),
        (24, 6, 4, 4, ["key/value heads or be a multiple of them: 6 heads / 4 = 1.5, 4 / 6 = 0.6667", "ranks: 1, 2"]),
        (12, 12, 5, 8, ["8 ranks / 5 = 1.6", "12 heads / 5 = 2.4", "12 heads / 5 = 2.4, 5 / 12"]),
        (12, 12, 2, 1, ["1 rank / 2 = 0.5", "on 1 rank: 1"]),
    ],
)
def test_ulysses_messages_show_the_arithmetic(heads: int, kv_heads: int, size: int, world: int, said: list[str] | None):
    model = dataclasses.replace(MODEL, num_attention_heads=heads, num_key_value_heads=kv_heads)
    config = config_with(ulysses_sequence_parallel_size=size)
    problems, _ = check(config, Topology(world, 1, 0, "127.0.0.1", None), model)
    if said is None:
        assert problems == []
    else:
        (problem,) = problems
        assert problem.subject == "ulysses_sequence_parallel_size"
        assert all(each in problem.text() for each in said), problem.text()


def test_ulysses_without_a_model_and_over_nodes():
    config = config_with(ulysses_sequence_parallel_size=3)
    (problem,) = check(config, Topology(4, 2, 1, "10.0.0.1", 29500))[0]
    assert "2 nodes x 4 ranks / 3 = 2.667" in problem.rule
    assert problem.fix == "sizes that fit 8 ranks: 1, 2, 4, 8"


def test_ulysses_without_packing_is_allowed():
    config = config_with(ulysses_sequence_parallel_size=2, use_remove_padding=False)
    assert check(config, Topology(2, 1, 0, "127.0.0.1", None), MODEL)[0] == []


# FSDP groups


@pytest.mark.parametrize("size", [-1, 1, 2, 4, 8])
def test_groups_that_divide_the_ranks(size: int):
    config = config_with(model__fsdp_config__fsdp_size=size, ulysses_sequence_parallel_size=4)
    assert check(config, Topology(4, 2, 0, "127.0.0.1", 1), MODEL)[0] == []


@pytest.mark.parametrize(
    ("size", "rule"),
    [
        (3, "it must divide the number of ranks: 8 ranks / 3 = 2.667"),
        (16, "it must divide the number of ranks: 8 ranks / 16 = 0.5"),
        (0, "must be a whole number from 1, or -1 for all ranks"),
    ],
)
def test_groups_that_do_not_fit(size: int, rule: str):
    (problem,) = check(config_with(model__fsdp_config__fsdp_size=size), Topology(8, 1, 0, "127.0.0.1", None))[0]
    assert (problem.subject, problem.rule) == ("model.fsdp_config.fsdp_size", rule)
    assert problem.fix == "-1, or one of 1, 2, 4, 8"


# Resuming


@pytest.mark.parametrize("mode", ["auto", "resume_path"])
def test_resume_path_is_a_checkpoint_folder(tmp_path: Path, mode: str):
    (tmp_path / "global_step_3").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "global_step_4").touch()
    (tmp_path / "final").symlink_to("global_step_3")
    for name, said in [
        ("global_step_3", None),
        ("global_step_3/", None),
        ("final", None),
        ("other", "its name must be global_step_N"),
        ("global_step_4", "there is no such folder"),
        ("global_step_5", "there is no such folder"),
        ("\0", ""),
    ]:
        path = f"{tmp_path}/{name}"
        problems, _ = check(config_with(trainer__resume_mode=mode, trainer__resume_path=path))
        if said is None:
            assert problems == []
        else:
            (problem,) = problems
            assert problem.subject == "trainer.resume_path"
            assert said in problem.rule


def test_resume_mode_resume_path_needs_a_path():
    (problem,) = check(config_with(trainer__resume_mode="resume_path"))[0]
    assert "must be set, because trainer.resume_mode is resume_path" in problem.rule


def test_a_resume_path_that_is_not_used():
    problems, warnings = check(config_with(trainer__resume_mode="disable", trainer__resume_path="/nowhere"))
    assert problems == []
    assert any("not used" in line for line in warnings)


# Warnings


@pytest.mark.parametrize(
    ("rope_type", "positions", "said"),
    [
        ("default", None, "angles that the model was never trained on"),
        ("yarn", 65536, "yarn stretches"),
        ("other", None, "other RoPE"),
        (None, None, "names no RoPE"),
        ("yarn", 131072, None),
    ],
)
def test_rows_beyond_the_models_positions(rope_type: str | None, positions: int | None, said: str | None):
    model = dataclasses.replace(MODEL, rope_type=rope_type, rope_positions=positions)
    problems, warnings = check(config_with(data__max_length=128000), model=model, is_set=False)
    assert problems == []
    lines = [line for line in warnings if line.startswith("data.max_length = 128,000 is beyond the model's")]
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


def test_max_length_at_the_limit_is_no_warning():
    config = config_with(data__max_length=32768)
    assert check(config, Topology(8, 1, 0, "", None), model=MODEL, is_set=False)[1] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainer__nnodes": 2}, "trainer.nnodes = 2 (job.yaml:14), but the launcher started 1"),
        ({"trainer__n_gpus_per_node": 8}, "but the launcher started 4"),
        ({"data__train_batch_size": 3}, "less than the 4 groups of ranks (4 ranks / Ulysses 1): 1 of them idle"),
        ({"data__use_dynamic_bsz": True, "data__max_length": 9000}, "8,192 x 1 = 8,192 is less than data.max_length"),
        ({"trainer__checkpoint__save_contents": ["model"]}, "leaves out optimizer, extra"),
        ({"optim__warmup_steps": 3}, "optim.warmup_steps = 3 wins over optim.warmup_steps_ratio = 0.1"),
        ({"optim__warmup_steps": 3, "trainer__total_training_steps": 3}, "never comes down"),
    ],
)
def test_warnings(changes: dict[str, Any], said: str):
    base = {"trainer__n_gpus_per_node": 4}
    topology = Topology(4, 1, 0, "127.0.0.1", None)
    assert not any(said in line for line in check(config_with(**base), topology)[1])
    problems, warnings = check(config_with(**{**base, **changes}), topology)
    assert problems == []
    assert any(said in line for line in warnings), warnings


def test_code_in_the_model_folder_that_does_not_run():
    model = dataclasses.replace(MODEL, has_auto_map=True)
    assert any("auto_map" in line for line in check(JobConfig(), model=model)[1])
    assert not any("auto_map" in line for line in check(config_with(model__trust_remote_code=True), model=model)[1])


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"is_moe": True}, "is a mixture of experts"),
        ({"rope_type": "dynamic"}, "rope_type dynamic"),
        ({"rope_type": "longrope", "rope_original": 1000}, "up to 1,000 tokens and another for longer"),
    ],
)
def test_models_that_would_be_trained_wrong_are_refused(changes: dict[str, Any], shown: str) -> None:
    config = config_with(data__max_length=1024)
    (problem,) = check(config, model=dataclasses.replace(MODEL, **changes))[0]
    assert shown in problem.rule
    short = dataclasses.replace(MODEL, rope_type="longrope", rope_original=1024)
    assert check(config, model=short)[0] == []
