"""Rules for single settings and between settings, topology and model. Pure, reports everything, rewrites nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sft_job.config.fields import nearest, value_at
from sft_job.config.keys import KEYS
from sft_job.config.layout import check_layout, check_model, check_shards, layout_warnings
from sft_job.config.model_folder import ModelFacts
from sft_job.config.references import adapter_warnings, check_references
from sft_job.config.schema import JobConfig
from sft_job.config.sets import check_sets, owner_of
from sft_job.config.topology import Topology
from sft_job.contract import ExitCode, RunFolder, step_of
from sft_job.errors import Problem


@dataclass(frozen=True)
class _Rule:
    """What a value must be, in words, and the test of it."""

    text: str
    holds: Callable[[Any], bool]


def validate(
    config: JobConfig, topology: Topology, model: ModelFacts | None, origin: Callable[[str], str]
) -> tuple[list[Problem], list[str]]:
    """Check all settings against their rules, the topology and the model.

    Args:
        config: the settings.
        topology: ranks and nodes.
        model: facts about the base model; None skips the rules that need them.
        origin: from a setting's full path to where it was set; an empty text for a default value.

    Returns:
        Problems with exit code 2, or 66 for the adapter's folder, and warnings as lines to show.
    """
    problems = [*_single(config, origin), *_members(config, origin)]
    wrong = {problem.subject for problem in problems}
    problems.extend(check_sets(config, origin))
    problems.extend(_resume(config, origin))
    problems.extend(problem for problem in check_references(config, origin) if problem.subject not in wrong)
    problems.extend(check_layout(config, topology, model, origin))
    problems.extend(check_shards(config, topology, origin))
    problems.extend(check_model(config, model, origin))
    warnings = [*_warnings(config, model, origin), *adapter_warnings(config, origin)]
    return problems, [*warnings, *layout_warnings(config, topology, model, origin)]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _at_least(lowest: int) -> _Rule:
    return _Rule(f"must be a whole number from {lowest}", lambda value: _whole(value) and value >= lowest)


def _or(word: object, rule: _Rule) -> _Rule:
    shown = "null" if word is None else str(word)
    return _Rule(f"{rule.text}, or {shown}", lambda value: value is word or value == word or rule.holds(value))


def _number(text: str, test: Callable[[float], bool]) -> _Rule:
    return _Rule(f"must be {text}", lambda value: math.isfinite(value) and test(value))


def _one_of(*names: str) -> _Rule:
    return _Rule(f"must be one of {', '.join(names)}", lambda value: value in names)


def _some_of(*names: str) -> _Rule:
    return _Rule(f"must be any of {', '.join(names)}", lambda value: value in names)


def _names(what: str) -> _Rule:
    """A text or a list of texts, none of them empty."""

    def holds(value: Any) -> bool:
        texts = cast("list[Any]", value if isinstance(value, list) else [value])
        return bool(texts) and all(isinstance(text, str) and text != "" for text in texts)

    return _Rule(f"must be {what} or a list of them", holds)


def _patterns(what: str) -> _Rule:
    """The same; a text alone is a regular expression over the modules' full names."""
    names = _names(what)

    def holds(value: Any) -> bool:
        try:
            return names.holds(value) and (isinstance(value, list) or bool(re.compile(value)))
        except (re.error, RecursionError, OverflowError):
            return False

    return _Rule(f"{names.text} (a text alone is read as a regular expression)", holds)


_POSITIVE = _number("a finite number above 0", lambda value: value > 0)
_NOT_NEGATIVE = _number("a finite number from 0", lambda value: value >= 0)
_SHARE = _number("a number from 0 to 1", lambda value: 0 <= value <= 1)
_DTYPE = _one_of("bf16", "fp32", "fp64")
_PATHS = _names("a path")
_FILES = _Rule(
    f"{_PATHS.text}, a mapping of named data sets, or null",
    lambda value: value is None or isinstance(value, dict) or _PATHS.holds(value),
)
_NOT_EMPTY = _Rule("must not be empty", lambda value: value != "" and value != [])

_AUTO_OR_BOOL = _Rule("must be auto, true or false", lambda value: value == "auto" or isinstance(value, bool))
ATTENTION_BACKENDS = ("flash4", "cudnn", "flash2", "torch_varlen", "sdpa", "eager")
"""Names of ``model.attention.choose``, which imports torch."""

_RULES: Mapping[str, _Rule] = {
    "data.train_batch_size": _at_least(1),
    "data.micro_batch_size_per_gpu": _at_least(1),
    "data.max_token_len_per_gpu": _at_least(1),
    "data.train_files": _FILES,
    "data.val_files": _FILES,
    "data.train_max_samples": _or(-1, _at_least(1)),
    "data.val_max_samples": _or(-1, _at_least(1)),
    "data.prompt_key": _names("a column name"),
    "data.response_key": _names("a column name"),
    "data.prompt_dict_keys": _NOT_EMPTY,
    "data.response_dict_keys": _NOT_EMPTY,
    "data.multiturn.messages_key": _NOT_EMPTY,
    "data.multiturn.tools_key": _NOT_EMPTY,
    "data.multiturn.enable_thinking_key": _NOT_EMPTY,
    "data.multiturn.train_on": _one_of("all", "last"),
    "data.max_length": _at_least(2),
    "data.truncation": _one_of("error", "left", "right", "drop", "turn"),
    "data.max_rejected_fraction": _SHARE,
    "data.cache_dir": _NOT_EMPTY,
    "data.num_workers": _or(None, _at_least(1)),
    "model.init": _one_of("pretrained", "random"),
    "model.fsdp_config.model_dtype": _DTYPE,
    "model.fsdp_config.dtype": _or(None, _DTYPE),
    "model.lora_rank": _at_least(0),
    "model.lora_alpha": _POSITIVE,
    "model.target_modules": _patterns("all-linear, a module name, a pattern"),
    "model.exclude_modules": _or(None, _patterns("a module name, a pattern")),
    "model.lora_adapter_path": _NOT_EMPTY,
    "data.chat_template": _NOT_EMPTY,
    "data.custom_cls.path": _NOT_EMPTY,
    "data.custom_cls.name": _NOT_EMPTY,
    "model.external_lib": _NOT_EMPTY,
    "trainer.default_hdfs_dir": _NOT_EMPTY,
    "model.recompute": _one_of("auto", "none", "attention", "full", "offload"),
    "model.fp8": _one_of("none", "tensorwise", "rowwise"),
    "model.compile": _AUTO_OR_BOOL,
    "model.fsdp_config.shard_frozen": _AUTO_OR_BOOL,
    "model.fsdp_config.shard_accumulated": _AUTO_OR_BOOL,
    "model.attention": _one_of("auto", *ATTENTION_BACKENDS),
    "model.strategy": _one_of("fsdp", "fsdp2"),
    "optim.lr": _POSITIVE,
    "optim.betas": _Rule(
        "must be two numbers, each from 0 to below 1", lambda value: len(value) == 2 and all(0 <= b < 1 for b in value)
    ),
    "optim.eps": _POSITIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.warmup_steps_ratio": _SHARE,
    "optim.warmup_steps": _or(None, _at_least(0)),
    "optim.clip_grad": _NOT_NEGATIVE,
    "optim.lr_scheduler": _one_of("cosine", "wsd", "constant"),
    "optim.min_lr_ratio": _SHARE,
    "trainer.resume_mode": _one_of("auto", "disable", "resume_path"),
    "trainer.total_epochs": _at_least(1),
    "trainer.total_training_steps": _or(None, _at_least(1)),
    "trainer.seed": _Rule("must be a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32),
    "trainer.save_freq": _or(-1, _at_least(1)),
    "trainer.test_freq": _or("after_each_epoch", _or(-1, _at_least(1))),
    "trainer.max_ckpt_to_keep": _or(None, _at_least(1)),
    "trainer.recovery_minutes": _NOT_NEGATIVE,
    "trainer.on_save_failure": _one_of("end", "continue"),
    "trainer.log_freq": _at_least(1),
    "trainer.non_finite": _one_of("stop", "skip"),
    "trainer.max_skipped_steps": _at_least(1),
    "trainer.timeout_seconds": _at_least(1),
    "trainer.max_wall_seconds": _or(None, _at_least(1)),
    "trainer.max_starts_without_progress": _at_least(0),
}
"""Rules of single values. Types are checked when loading, except for settings that take values of several types."""

_MEMBER_RULES: Mapping[str, _Rule] = {
    "trainer.checkpoint.save_contents": _some_of("model", "optimizer", "extra", "hf_model"),
    "trainer.logger": _some_of("console", "wandb", "tensorboard", "file"),
}


def _single(config: JobConfig, origin: Callable[[str], str]) -> list[Problem]:
    values = {key: value_at(config, key) for key in _RULES}
    return [
        Problem(ExitCode.CONFIG, key, rule.text, _hint(values[key], rule), values[key], origin(key))
        for key, rule in _RULES.items()
        if not rule.holds(values[key])
    ]


def _hint(value: Any, rule: _Rule) -> str:
    """The allowed word that looks like the one given."""
    close = nearest(value, rule.text.replace(",", " ").split()) if isinstance(value, str) else None
    return f"did you mean {close}?" if close else ""


def _members(config: JobConfig, origin: Callable[[str], str]) -> list[Problem]:
    """Rules for each member of a list."""
    known_key = _Rule("must be the full path of a setting", lambda key: key in KEYS or owner_of(key) is not None)
    problems: list[Problem] = []
    for key, rule in {**_MEMBER_RULES, "trainer.allow_changed": known_key}.items():
        for index, member in enumerate(cast("list[str]", value_at(config, key))):
            if not rule.holds(member):
                close = nearest(member, KEYS) if rule is known_key else None
                hint = f"did you mean {close}?" if close else _hint(member, rule)
                subject = f"{key}[{index}]"
                problems.append(Problem(ExitCode.CONFIG, subject, rule.text, hint, member, origin(subject)))
    return problems


def _resume(config: JobConfig, origin: Callable[[str], str]) -> list[Problem]:
    """``resume_path`` where it is used."""
    key, mode, path = "trainer.resume_path", config.trainer.resume_mode, config.trainer.resume_path
    if mode == "resume_path" and not path:
        rule, fix = "must be set, because trainer.resume_mode is resume_path", "name a folder global_step_N"
        return [Problem(ExitCode.CONFIG, key, rule, fix, path, origin("trainer.resume_mode"))]
    if not path or mode == "disable":
        return []
    try:
        folder = Path(path).resolve()
        there = folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        return [Problem(ExitCode.CONFIG, key, f"cannot be looked at: {error}", "check the path", path, origin(key))]
    if there and step_of(folder) is not None:
        return []
    own = RunFolder(Path(config.trainer.default_local_dir or "")).latest
    if not there and config.trainer.default_local_dir and own.is_file():
        return []  # it has served: the run goes on from its own checkpoints
    rule = "is no checkpoint: its name must be global_step_N" if there else "there is no such folder"
    fix = "name one of the folders global_step_N in a run's checkpoints/"
    return [Problem(ExitCode.CONFIG, key, rule, fix, path, origin(key))]


def _warnings(config: JobConfig, model: ModelFacts | None, origin: Callable[[str], str]) -> list[str]:
    """What is allowed, but perhaps not meant."""
    trainer, optim = config.trainer, config.optim
    lines: list[str] = []
    if trainer.resume_path and trainer.resume_mode == "disable":
        lines.append("trainer.resume_path is set but not used, because trainer.resume_mode is disable")
    lacking = [name for name in ("model", "optimizer", "extra") if name not in trainer.checkpoint.save_contents]
    if lacking:
        lines.append(
            f"trainer.checkpoint.save_contents leaves out {', '.join(lacking)}: a stopped run cannot go on from such "
            "a checkpoint"
        )
    if optim.warmup_steps is not None and origin("optim.warmup_steps_ratio"):
        lines.append(
            f"optim.warmup_steps = {optim.warmup_steps} wins over optim.warmup_steps_ratio = {optim.warmup_steps_ratio}"
        )
    total = trainer.total_training_steps
    if optim.warmup_steps is not None and total is not None and optim.warmup_steps >= total:
        lines.append(
            f"optim.warmup_steps = {optim.warmup_steps} is not below trainer.total_training_steps = {total}: the "
            "learning rate never comes down from its peak"
        )
    if model is not None and model.has_auto_map and not config.model.trust_remote_code:
        lines.append(
            "the model folder brings its own Python code (auto_map in config.json), which does not run because "
            "model.trust_remote_code is false: transformers' own implementation is used, if it has one"
        )
    return lines
