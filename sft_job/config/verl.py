"""Names of verl's files that are no settings of this job: which setting each means, or why it does nothing here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast


def _same(value: Any) -> Any:
    return value


def _anything(_: Any) -> bool:
    return True


@dataclass(frozen=True)
class Alias:
    """Another name of a setting.

    Attributes:
        target: full path of the setting that it means.
        unset: values of the other name that mean "not set".
        convert: from the other name's value to the setting's.
        note: what else to know about it.
    """

    target: str
    unset: tuple[Any, ...] = (None,)
    convert: Callable[[Any], Any] = _same
    note: str = ""


@dataclass(frozen=True)
class Foreign:
    """A key, or a section with all keys below it, that has no counterpart here.

    Attributes:
        why: why a value that is accepted does nothing.
        only: which values are accepted, in words; empty = any. Another value would change what is computed.
        holds: whether a value is accepted.
        fix: what to do about a value that is not.
        each: the rule is one for each item of the list that the key holds.
    """

    why: str
    only: str = ""
    holds: Callable[[Any], bool] = _anything
    fix: str = "leave the key out"
    each: bool = False


_DTYPES: Mapping[str, str] = MappingProxyType({"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"})
_WHOLE = ("model", "optimizer", "extra")
_GROUPS: Mapping[str, str] = MappingProxyType(
    {"model": "hf_model", "engine": "fsdp", "optim": "fsdp", "profiler": "profiler"}
)


def _short_dtype(value: Any) -> Any:
    return _DTYPES.get(value, value) if isinstance(value, str) else value


def _off(value: Any) -> bool:
    return value is None or value is False or value == {}


def _among(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is each or (value == each and type(value) is type(each)) for each in values)


def _half(value: Any) -> bool:
    return not isinstance(value, bool) and value == 0.5


def _nine_tenths(value: Any) -> bool:
    return not isinstance(value, bool) and value == 0.9


def _loads_whole(value: Any) -> bool:
    """Null, verl's own reference to save_contents, or a list that holds all that a run goes on from."""
    if isinstance(value, list):
        return all(each in value for each in _WHOLE)
    return value is None or value in ("${checkpoint.save_contents}", "${trainer.checkpoint.save_contents}")


def _is_model_folder(value: Any) -> bool:
    return value is None or value in ("${model.path}", "${model.partial_pretrain}")


def _own_group(entry: Any) -> bool:
    """An entry of Hydra's defaults list that names one of verl's groups for this trainer, or Hydra's own."""
    if entry == "_self_":
        return True
    if not isinstance(entry, dict) or len(cast("dict[Any, Any]", entry)) != 1:
        return False
    ((group, name),) = cast("dict[Any, Any]", entry).items()
    for word in ("override ", "optional "):
        group = str(group).removeprefix(word)
    group = group.partition("@")[0].strip().strip("/")
    return group.startswith("hydra/") or (group in _GROUPS and name == _GROUPS[group])


ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "data.micro_batch_size": Alias("data.micro_batch_size_per_gpu"),
        "data.messages_key": Alias("data.multiturn.messages_key", note="used with data.multiturn.enable"),
        "data.tools_key": Alias("data.multiturn.tools_key", note="used with data.multiturn.enable"),
        "data.enable_thinking_key": Alias("data.multiturn.enable_thinking_key", note="used with data.multiturn.enable"),
        "model.path": Alias("model.partial_pretrain"),
        "model.custom_chat_template": Alias("data.chat_template"),
        "model.use_remove_padding": Alias("use_remove_padding"),
        "engine.strategy": Alias("model.strategy"),
        "engine.wrap_policy.min_num_params": Alias("model.fsdp_config.wrap_policy.min_num_params"),
        "engine.offload_policy": Alias("model.fsdp_config.cpu_offload", unset=(None, False)),
        "engine.optimizer_offload": Alias(
            "model.fsdp_config.cpu_offload", unset=(None, False), note="weights and gradients go with the states"
        ),
        "engine.param_offload": Alias(
            "model.fsdp_config.offload_params", unset=(None, False), note="optimizer states go with the weights"
        ),
        "engine.reshard_after_forward": Alias("model.fsdp_config.reshard_after_forward"),
        "engine.fsdp_size": Alias("model.fsdp_config.fsdp_size"),
        "engine.model_dtype": Alias("model.fsdp_config.model_dtype", convert=_short_dtype),
        "engine.dtype": Alias("model.fsdp_config.dtype", convert=_short_dtype),
        "engine.full_determinism": Alias("trainer.deterministic"),
        "engine.ulysses_sequence_parallel_size": Alias("ulysses_sequence_parallel_size"),
        "optim.lr_warmup_steps": Alias("optim.warmup_steps", unset=(None, 0, -1)),
        "optim.lr_warmup_steps_ratio": Alias("optim.warmup_steps_ratio"),
        "optim.lr_scheduler_type": Alias("optim.lr_scheduler"),
        "optim.warmup_style": Alias("optim.lr_scheduler"),
        "trainer.resume_from_path": Alias("trainer.resume_path"),
        "checkpoint.save_contents": Alias("trainer.checkpoint.save_contents"),
    }
)
"""Other name -> setting. A new name is one line here."""

_NO_PADDING = "rows are never padded to one another, so there is nothing to choose or to trim"
_FSDP1 = "a knob of FSDP1; FSDP2 gathers the next block ahead by itself and has only original parameters"
_SPEED = "changes speed and memory only; this job does it its own way"
_RL = "belongs to reinforcement learning"
_PROFILE = "this job writes no profiles"
_MTP = "this job trains no heads for multi-token prediction"
_QAT = "this job does not train for quantization"
_IN_FOLDER = "config and tokenizer are those of the model folder"
_WHOLE_WHY = "a checkpoint is always loaded whole: weights, optimizer states and position"
_WHOLE_FIX = "to start anew from its weights, sft-job export it and name the folder as model.partial_pretrain"
_TEXT_ONLY = "this job trains on text only"
_ADAMW = "the optimizer is always torch.optim.AdamW"
_TARGET = Foreign("names a class of verl's; nothing is built by such names here")

FOREIGN: Mapping[str, Foreign] = MappingProxyType(
    {
        "defaults": Foreign(
            "verl's own defaults do not come along: what this file leaves out has the default that sft-job keys shows",
            "_self_, model: hf_model, engine: fsdp, optim: fsdp or profiler: profiler",
            _own_group,
            "sft-job reads one file and trains with FSDP2: write the values that you rely on into this file",
            each=True,
        ),
        "hydra": Foreign("this job does not run under Hydra"),
        "data.pad_mode": Foreign(
            _NO_PADDING, "no_padding, right or left_right", _among(None, "no_padding", "right", "left_right")
        ),
        "data.ignore_input_ids_mismatch": Foreign("a row is rendered as a whole, so there are no parts to mismatch"),
        "data.enable_thinking_default": Foreign(
            "without it a template gets what data.apply_chat_template_kwargs holds",
            "none",
            _among(None, "none", "None"),
            "set data.apply_chat_template_kwargs.enable_thinking",
        ),
        "data.image_key": Foreign(_TEXT_ONLY, "null", _off),
        "data.video_key": Foreign(_TEXT_ONLY, "null", _off),
        "model.hf_config_path": Foreign(
            _IN_FOLDER, "null", _is_model_folder, "put the files into one folder and name it as model.partial_pretrain"
        ),
        "model.tokenizer_path": Foreign(
            _IN_FOLDER, "null", _is_model_folder, "put the files into one folder and name it as model.partial_pretrain"
        ),
        "model.override_config": Foreign(
            "the model folder's config.json holds as it is", "empty", _off, "change config.json in the model folder"
        ),
        "model.enable_activation_offload": Foreign(
            "activations are recomputed; model.recompute=offload moves blocks' inputs to the host; results are the same"
        ),
        "model.truncate_padding": Foreign(_NO_PADDING),
        "model.use_fused_kernels": Foreign("the loss is always computed in chunks, which saves the same memory"),
        "model.fused_kernel_options": Foreign("the loss is always computed in chunks, which saves the same memory"),
        "model.tiled_mlp": Foreign(_SPEED),
        "model.mtp": Foreign(_MTP),
        "model.mtp.enable": Foreign(_MTP, "false", _off),
        "model.mtp.enable_train": Foreign(_MTP, "false", _off),
        "engine.forward_prefetch": Foreign(_FSDP1),
        "engine.use_orig_params": Foreign(_FSDP1),
        "engine.seed": Foreign("trainer.seed drives everything"),
        "engine.forward_only": Foreign("this job trains", "false", _off),
        "engine.use_torch_compile": Foreign(_SPEED),
        "engine.per_layer_optimizer_step": Foreign(_SPEED),
        "engine.optimizer_step_prefetch_layers": Foreign(_SPEED),
        "engine.use_no_sync_for_gradient_accumulation": Foreign("model.fsdp_config.shard_accumulated says it here"),
        "engine.pad_to_length": Foreign(_SPEED),
        "engine.pad_to_length_bucket": Foreign(_SPEED),
        "engine.entropy_from_logits_with_chunking": Foreign(_RL),
        "engine.entropy_from_logits_chunk_size": Foreign(_RL),
        "engine.entropy_checkpointing": Foreign(_RL),
        "engine.qat": Foreign(_QAT),
        "engine.qat.enable": Foreign(_QAT, "false", _off),
        "engine.turbo_config": Foreign("belongs to verl's strategy fsdp_turbo, which this job does not have"),
        "optim.optimizer": Foreign(_ADAMW, "AdamW", _among(None, "AdamW")),
        "optim.optimizer_impl": Foreign(_ADAMW, "torch.optim", _among(None, "torch.optim")),
        "optim.override_optimizer_config": Foreign(_ADAMW, "empty", _off, "set optim.betas, eps or weight_decay"),
        "optim.total_training_steps": Foreign("the rate's horizon is the run's length (trainer.total_training_steps)"),
        "optim.num_cycles": Foreign(
            "cosine is half a wave, from the peak to min_lr_ratio", "0.5", lambda value: value is None or _half(value)
        ),
        "optim.lr_wsd_stable_steps_ratio": Foreign(
            "wsd holds the peak for nine tenths of the steps after the warm-up",
            "0.9",
            lambda value: value is None or _nine_tenths(value),
        ),
        "optim.zero_indexed_step": Foreign("steps count from 1, so that the first update is not one at a rate of 0"),
        "checkpoint.load_contents": Foreign(_WHOLE_WHY, "model, optimizer and extra", _loads_whole, _WHOLE_FIX),
        "trainer.checkpoint.load_contents": Foreign(_WHOLE_WHY, "model, optimizer and extra", _loads_whole, _WHOLE_FIX),
        "checkpoint.mbridge_config": Foreign("belongs to Megatron"),
        "trainer.balance_batch": Foreign("rows are always balanced over the ranks"),
        "trainer.device": Foreign("the GPUs are used where there are any", "cuda or cpu", _among(None, "cuda", "cpu")),
        "trainer.gc_freq": Foreign("changes speed only; Python collects garbage as it always does"),
        "trainer.profile_interval": Foreign(_PROFILE),
        "profiler": Foreign(_PROFILE),
        "global_profiler": Foreign(_PROFILE),
    }
)
"""Keys and sections of verl's files without a counterpart. An entry for a key beats that of a section around it."""

VERL_DEFAULTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "data.use_dynamic_bsz": ("", "true"),
        "data.prompt_key": ("question", ""),
        "data.response_key": ("answer", ""),
        "data.multiturn.enable": ("false", "always true"),
        "data.num_workers": ("", "8"),
        "model.strategy": ("fsdp2", "fsdp"),
        "optim.lr": ("1e-05", "0.001"),
        "optim.betas": ("[0.9, 0.95]", "[0.9, 0.999]"),
        "optim.warmup_steps_ratio": ("0.1", "0.0"),
        "optim.lr_scheduler": ("cosine", "constant"),
        "use_remove_padding": ("false", "true"),
        "trainer.default_local_dir": ("checkpoints/PROJECT/EXPERIMENT", "checkpoints/PROJECT/EXPERIMENT"),
        "trainer.project_name": ("gsm8k-sft", "gsm8k-sft"),
        "trainer.experiment_name": ("test", "test"),
        "trainer.logger": ("[console, wandb]", "[console, wandb]"),
        "trainer.n_gpus_per_node": ("8", "1"),
    }
)
"""Setting -> its default in verl's ``sft_trainer.yaml`` and in ``sft_trainer_engine.yaml``, where one of them differs
from this job's; an empty text where that file has no such key."""


def foreign(path: str) -> Foreign | None:
    """What verl's key at this path is here, by its own entry or that of the nearest section around it."""
    parts = path.split(".")
    paths = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
    is_class = len(parts) > 1 and parts[-1] == "_target_"
    return next((FOREIGN[each] for each in paths if each in FOREIGN), _TARGET if is_class else None)
