"""What every key of the YAML does, or why it does nothing, and the table of them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from sft_job.config.fields import leaf_fields
from sft_job.config.verl import ALIASES, FOREIGN, VERL_DEFAULTS


@dataclass(frozen=True)
class KeyEffect:
    """What a key does: exactly one of the two is set.

    Attributes:
        effect: what the job does with it.
        ignored: why the job accepts it and does nothing with it.
    """

    effect: str = ""
    ignored: str = ""


FRAGMENTS: Mapping[str, str] = MappingProxyType(
    {
        "multiturn": "data.multiturn",
        "lora_rank": "model.lora_rank",
        "lora_alpha": "model.lora_alpha",
        "target_modules": "model.target_modules",
        "fsdp_config": "model.fsdp_config",
    }
)
"""Keys that the SFT guide shows without their parent -> full path."""

_DOES: Mapping[str, str] = {
    "data.train_batch_size": "rows of one optimizer step, over all ranks; the last step of an epoch may have fewer",
    "data.micro_batch_size_per_gpu": "rows that a Ulysses group works on at once; the result does not depend on it",
    "data.use_dynamic_bsz": "fills micro-batches by tokens instead of rows",
    "data.max_token_len_per_gpu": "tokens of a micro-batch per rank, with use_dynamic_bsz",
    "data.train_files": "parquet to train on: a file, a folder, a glob pattern or a list of these, or a "
    "mapping of named data sets that are mixed; must be set",
    "data.val_files": "parquet to validate on, or a mapping of named data sets, each with its own loss; null = no "
    "validation",
    "data.train_max_samples": "uses only the first rows of the training files, of each named set; -1 = all",
    "data.val_max_samples": "uses only the first rows of the validation files, of each named set; -1 = all",
    "data.prompt_key": "column of the prompt; several are joined by a line break",
    "data.response_key": "column of the response; several are joined by a line break",
    "data.prompt_dict_keys": "path into a prompt column that holds structs",
    "data.response_dict_keys": "path into a response column that holds structs",
    "data.multiturn.enable": "trains on a column of messages instead of prompt and response columns",
    "data.multiturn.messages_key": "column of messages, with multiturn.enable",
    "data.multiturn.tools_key": "column of tools, with multiturn.enable",
    "data.multiturn.enable_thinking_key": "column that switches thinking row by row, with multiturn.enable",
    "data.multiturn.train_on": "assistant turns that are trained: all, or only the last one of a conversation",
    "data.max_length": "longest row in tokens; nothing is padded to it",
    "data.truncation": "what happens to a longer row: error (exit 65), left (its start is cut), right (its end is "
    "cut), drop (it is left out), turn (its oldest turns are left out)",
    "data.max_rejected_fraction": "share of unusable rows above which the run is refused (exit 65)",
    "data.allow_control_tokens": "control tokens in a row's text act as control tokens; false = they are plain text",
    "data.apply_chat_template_kwargs": "extra variables for the chat template",
    "data.chat_template": "chat template to use instead of the tokenizer's: its text, or a file",
    "data.custom_cls.path": "Python file with a data set class of the user's own, which makes the rows",
    "data.custom_cls.name": "class in custom_cls.path",
    "data.use_shm": "copies the data files to /dev/shm first and reads them there",
    "data.cache_dir": "folder of the token cache; null = cache/ in the run folder",
    "data.num_workers": "processes that tokenise; null = the cores this process may use",
    "model.partial_pretrain": "folder of the base model and its tokenizer; must be set",
    "model.init": "pretrained = reads the weights; random = draws them from trainer.seed",
    "model.use_shm": "copies the model folder to /dev/shm first and reads it there",
    "model.external_lib": "Python module that every rank imports before the model is built",
    "model.fsdp_config.cpu_offload": "keeps weights, gradients and optimizer states in host memory",
    "model.fsdp_config.offload_params": "the same as cpu_offload; either alone is enough",
    "model.fsdp_config.fsdp_size": "ranks that share one copy of the weights (HSDP between the copies); -1 = all",
    "model.fsdp_config.model_dtype": "dtype of weights and optimizer states: bf16, fp32 or fp64",
    "model.fsdp_config.dtype": "dtype of the computation; null = bf16 on CUDA, model_dtype on CPU",
    "model.fsdp_config.reshard_after_forward": "frees a block's gathered weights after its forward; false keeps them "
    "for the step's backwards and further micro-batches",
    "model.fsdp_config.shard_frozen": "with LoRA: shards the base too; false = each GPU holds it whole; auto = "
    "whole in up to a third of its memory",
    "model.fsdp_config.shard_accumulated": "gradients of a step's micro-batches add up in each GPU's shard alone, "
    "reduced every time; false = whole on each GPU, reduced once a step; auto = whole in up to a quarter of its memory",
    "model.enable_gradient_checkpointing": "recomputes decoder blocks in the backward to save memory",
    "model.recompute": "what is computed again in the backward: auto = as little as the GPU's memory allows; none; "
    "attention = all but attention; full = whole blocks; offload = whole blocks, whose inputs wait in host memory",
    "model.compile": "runs decoder blocks and loss through torch.compile; auto = on a GPU",
    "model.fp8": "matrix products of the decoder blocks in fp8, on H100 and later: none; tensorwise; rowwise",
    "model.attention": "attention backend: auto = the fastest that offers what the model needs; flash4, cudnn, "
    "flash2, torch_varlen, sdpa, eager",
    "model.trust_remote_code": "runs Python code that the model folder brings",
    "model.lora_rank": "rank of the LoRA adapters; 0 = trains all weights",
    "model.lora_alpha": "scale of the LoRA adapters: lora_alpha / lora_rank, with lora_rank > 0",
    "model.target_modules": "modules that get adapters: all-linear, a list of names, or a pattern",
    "model.exclude_modules": "modules that get none although target_modules names them: names, or a pattern",
    "model.lora_adapter_path": "folder of a PEFT LoRA adapter to go on from; its rank, alpha and modules hold",
    "optim.lr": "peak learning rate",
    "optim.betas": "AdamW's decay rates",
    "optim.eps": "AdamW's epsilon",
    "optim.weight_decay": "AdamW's decoupled weight decay, on every trained weight",
    "optim.no_decay_on_norms_and_biases": "leaves weights of one dimension out of the weight decay",
    "optim.warmup_steps_ratio": "share of all steps over which the rate rises",
    "optim.warmup_steps": "the same in steps; wins over the ratio",
    "optim.clip_grad": "largest global gradient norm; 0 = no clipping",
    "optim.lr_scheduler": "cosine, wsd (stable, then down over the last tenth) or constant",
    "optim.min_lr_ratio": "share of the peak rate at which cosine and wsd end",
    "ulysses_sequence_parallel_size": "ranks that share each sequence",
    "use_remove_padding": "packs the rows of a micro-batch into one sequence; false = one row a forward pass",
    "trainer.default_local_dir": "run folder, where the environment does not set CHECKPOINT_DIR",
    "trainer.default_hdfs_dir": "folder or fsspec URL to which published checkpoints are uploaded in the background; "
    "auto-resume reads it where the run folder is empty",
    "trainer.resume_mode": "auto = newest checkpoint of the run folder; disable; resume_path",
    "trainer.resume_path": "checkpoint folder global_step_N to start from",
    "trainer.project_name": "project in wandb",
    "trainer.experiment_name": "name of the run in wandb",
    "trainer.total_epochs": "passes over the training rows",
    "trainer.total_training_steps": "ends after this many steps, the learning rate with it; null = by total_epochs",
    "trainer.logger": "any of console, wandb, tensorboard and file; file is metrics.jsonl, which is always written",
    "trainer.seed": "drives row order, dropout and random initialisation",
    "trainer.save_freq": "steps between kept checkpoints; -1 = only the last one",
    "trainer.test_freq": "steps between validations, or after_each_epoch; -1 = only at the end",
    "trainer.max_ckpt_to_keep": "kept checkpoints, the newest ones; null = all",
    "trainer.checkpoint.save_contents": "any of model, optimizer, extra, hf_model",
    "trainer.async_save": "writes checkpoints while training goes on, from a copy of the state in host memory",
    "trainer.recovery_minutes": "minutes between recovery checkpoints, each replaced by the next one; 0 = none",
    "trainer.on_save_failure": "after a kept checkpoint that cannot be written: end (exit 73) or continue",
    "trainer.log_freq": "steps between logged lines",
    "trainer.allow_changed": "keys that may differ from the checkpoint's when a run goes on",
    "trainer.non_finite": "a step whose loss or gradient is not finite: stop (exit 87) or skip",
    "trainer.max_skipped_steps": "most steps that non_finite: skip leaves out",
    "trainer.preflight": "of several nodes, compares software, settings, data, model and run folder before weights are "
    "loaded; `sft-job preflight` looks at more",
    "trainer.rehearsal": "goes through the longest batch once before the first step, to see that it fits",
    "trainer.timeout_seconds": "a collective that takes longer, or ranks that stand still for longer, end the run "
    "with 137",
    "trainer.max_wall_seconds": "saves and leaves (143) in time for the run to end so many seconds after its start; "
    "null = no limit",
    "trainer.max_starts_without_progress": "after so many starts in a row without a new step the next ends with 86; "
    "0 = no limit",
    "trainer.deterministic": "only deterministic kernels on the GPU",
}

_IGNORED: Mapping[str, str] = {
    "data.balance_dp_token": "rows are always balanced over the ranks and the loss always counts every token once",
    "model.fsdp_config.wrap_policy.min_num_params": "the FSDP groups are always the decoder blocks",
    "model.use_liger": "compiled blocks and the job's own loss are faster: on an H200, 16,384 tokens, 82 ms against "
    "Liger's 88 for the loss alone, 318 against 327 for 4 blocks of a 7B with it (benchmarks/results)",
    "model.strategy": "fsdp and fsdp2 both mean FSDP2",
    "trainer.nnodes": "the launcher decides (NNODES); a difference is a warning",
    "trainer.n_gpus_per_node": "the launcher decides (NPROC_PER_NODE); a difference is a warning",
}


def _all_keys() -> dict[str, KeyEffect]:
    keys = {key: KeyEffect(effect=text) for key, text in _DOES.items()}
    return keys | {key: KeyEffect(ignored=text) for key, text in _IGNORED.items()}


KEYS: Mapping[str, KeyEffect] = MappingProxyType(_all_keys())
"""Full path of every setting -> what it does."""

_INTRO = """The column Default holds, whichever of verl's files a key comes from. The column after it shows verl's own
defaults where they differ: of `sft_trainer.yaml` / of `sft_trainer_engine.yaml` (– = no such key).
"""
_VERL_INTRO = """
Further names of verl's files. What is ignored is listed when the job starts; a value other than those accepted is a
problem, because leaving it out would change what is computed.
"""


def keys_table() -> str:
    """Every key as Markdown: the settings in the order of ``schema.py``, then verl's other names."""
    lines = [_INTRO, "| Key | Default | verl's | Effect |", "|---|---|---|---|"]
    for key, field in leaf_fields().items():
        entry = KEYS[key]
        text = f"ignored: {entry.ignored}" if entry.ignored else entry.effect
        lines.append(f"| `{key}` | `{_yaml_text(field.default)}` | {_verl_default(key)} | {text} |")
    lines += [_VERL_INTRO, "| verl's name | Here |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in _other_names().items()]
    return "\n".join(lines) + "\n"


def _verl_default(key: str) -> str:
    if key not in VERL_DEFAULTS:
        return ""
    old, engine = (f"`{text}`" if text else "–" for text in VERL_DEFAULTS[key])
    return old if old == engine else f"{old} / {engine}"


def _other_names() -> dict[str, str]:
    names = {name: f"`{alias.target}`" + (f"; {alias.note}" if alias.note else "") for name, alias in ALIASES.items()}
    for name, entry in FOREIGN.items():
        names[name] = (f"only {entry.only}: " if entry.only else "ignored: ") + entry.why
    return dict(sorted(names.items()))


def _yaml_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(str, cast('list[Any]', value)))}]"
    return str(value)
