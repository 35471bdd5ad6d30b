"""``state.json``: where a run stood when it saved, and what may differ when it goes on. Torch-free."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from sft_job.config.schema import JobConfig
from sft_job.config.secrets import SecretMask
from sft_job.config.sets import normal_sets

STATE_FILE = "state.json"
TO_GO_ON = frozenset({"model", "optimizer"})
"""What a checkpoint must hold for a run to go on from it."""

# A run may go on with these changed: they say how it runs and what it shows, not what it computes.
SAFE_KEYS = frozenset(
    {
        "data.train_files",  # paths only: their content is compared
        "data.val_files",
        "data.val_max_samples",
        "data.cache_dir",
        "data.num_workers",
        "data.max_rejected_fraction",  # decides whether a run starts, not on which rows
        "data.use_shm",
        "data.custom_cls.path",  # the path only: the class's text is part of the data's fingerprint
        "data.micro_batch_size_per_gpu",
        "data.use_dynamic_bsz",
        "data.max_token_len_per_gpu",
        "data.balance_dp_token",
        "use_remove_padding",
        "ulysses_sequence_parallel_size",
        "model.partial_pretrain",  # the path only: its config is compared, the weights are the checkpoint's
        "model.init",
        "model.use_shm",
        "model.strategy",
        "model.use_liger",
        "model.enable_gradient_checkpointing",
        "model.recompute",
        "model.compile",
        "model.attention",
        "model.fsdp_config.wrap_policy.min_num_params",
        "model.fsdp_config.fsdp_size",
        "model.fsdp_config.reshard_after_forward",
        "model.fsdp_config.shard_frozen",
        "model.fsdp_config.shard_accumulated",
        "model.external_lib",
        "model.lora_adapter_path",  # where the adapter came from; its weights are the checkpoint's
        "model.fsdp_config.cpu_offload",
        "model.fsdp_config.offload_params",
        "trainer.default_local_dir",
        "trainer.default_hdfs_dir",
        "trainer.resume_mode",
        "trainer.resume_path",
        "trainer.project_name",
        "trainer.experiment_name",
        "trainer.logger",
        "trainer.log_freq",
        "trainer.save_freq",
        "trainer.test_freq",
        "trainer.nnodes",
        "trainer.n_gpus_per_node",
        "trainer.max_ckpt_to_keep",
        "trainer.checkpoint.save_contents",
        "trainer.async_save",
        "trainer.recovery_minutes",
        "trainer.on_save_failure",
        "trainer.allow_changed",
        "trainer.timeout_seconds",
        "trainer.non_finite",
        "trainer.max_skipped_steps",
        "trainer.preflight",
        "trainer.rehearsal",
        "trainer.max_wall_seconds",
        "trainer.max_starts_without_progress",
        "trainer.deterministic",
    }
)

# A run may be made longer; its learning rate then follows the new horizon.
LENGTH_KEYS = ("trainer.total_epochs", "trainer.total_training_steps")


@dataclass(frozen=True)
class SourceState:
    """What a run has seen of one named data set, over all its starts.

    Attributes:
        rows: rows used; one that came up twice counts twice.
        tokens: real tokens.
        supervised_tokens: those of them that had a loss.
        size: usable rows of the set.
        data: fingerprint of its rows and its share; '' where a later start had the set no more.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    size: int
    data: str

    @property
    def epoch(self) -> float:
        """Passes over the set's rows, as a fraction."""
        return self.rows / self.size


@dataclass(frozen=True)
class RunState:
    """A run after ``step`` optimizer steps.

    The row order, the learning rate and every random number are functions of the seed, the step and the rank, so
    the step is the whole position: nothing else has to be restored.

    Attributes:
        step: optimizer steps done.
        total_steps: steps of the whole run, by the config it was saved under.
        steps_per_epoch: optimizer steps of an epoch.
        epoch: epochs begun, as a number from 0.
        rows_done: rows of that epoch that were used.
        tokens: real tokens trained on so far.
        supervised_tokens: those of them that had a loss.
        loss: training loss of the last step.
        world: ranks that saved it.
        ulysses: size of their Ulysses groups.
        data: fingerprint of the training rows' content, tokenizer and template.
        model: fingerprint of the model's config.
        config: the settings, flat: full path -> value.
        skipped_steps: steps that were not taken because loss or gradient were not finite.
        kept: made by ``save_freq`` or at the end; otherwise for recovery or at a stop.
        rng: how random numbers come about.
        contents: which tensors the checkpoint holds: model, optimizer.
        weights_sha256: of the trained weights, where they were exported with the checkpoint.
        version: of sft_job.
        sources: named data sets, by name.
    """

    step: int
    total_steps: int
    steps_per_epoch: int
    epoch: int
    rows_done: int
    tokens: int
    supervised_tokens: int
    loss: float | None
    world: int
    ulysses: int
    data: str
    model: str
    config: dict[str, Any]
    kept: bool
    version: str
    skipped_steps: int = 0
    contents: tuple[str, ...] = ("model", "optimizer")
    weights_sha256: str = ""
    sources: Mapping[str, SourceState] = field(default_factory=dict[str, SourceState])
    rng: str = field(default="torch: function of (trainer.seed, step, rank)")

    @property
    def resumable(self) -> bool:
        """Whether a run can go on from the checkpoint."""
        return set(self.contents) >= TO_GO_ON

    def to_json(self) -> str:
        """The text of ``state.json``."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)


def read_state(folder: Path) -> RunState:
    """Read a checkpoint's state.

    Raises:
        OSError: there is none.
        ValueError: it is not what any version writes. Fields that this version does not know are left out, and those
            that have a default may be missing.
    """
    try:
        fields = _known(RunState, json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        sources = {n: SourceState(**_known(SourceState, source)) for n, source in fields.pop("sources", {}).items()}
        if "contents" in fields:
            fields["contents"] = tuple(map(str, fields["contents"]))
        if not isinstance(fields["step"], int) or not isinstance(fields["config"], dict):
            raise TypeError("step or config are of another kind")
        return RunState(**fields, sources=sources)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / STATE_FILE}: {error}") from error


def _known(kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    names = {each.name for each in dataclasses.fields(kind)}
    return {name: value for name, value in fields.items() if name in names}


def saved_config(state: RunState) -> JobConfig:
    """The settings that a checkpoint was made with."""
    tree: Any = OmegaConf.structured(JobConfig)
    known = flat_config(JobConfig())
    for key, value in state.config.items():
        if key in known:
            OmegaConf.update(tree, key, value, merge=False)
    return cast(JobConfig, OmegaConf.to_object(tree))


def flat_config(config: JobConfig) -> dict[str, Any]:
    """All settings by their full path, in values that JSON keeps as they are; secrets of the environment are hidden.

    What this gives is stored, sent to trackers and compared when a run goes on: a new key is no other setting.
    """
    tree = dataclasses.asdict(config)
    for key in ("train_files", "val_files"):
        tree["data"][key] = normal_sets(tree["data"][key])
    mask = SecretMask(os.environ)
    return {key: mask.tree(value) for key, value in _flatten("", tree)}


def _flatten(prefix: str, tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True)
class Change:
    """One setting that differs from the checkpoint's."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} in the checkpoint, {self.new!r} now"


@dataclass(frozen=True)
class Changes:
    """How the settings differ from those of a checkpoint.

    Attributes:
        refused: a run with these is another run.
        longer: the run was made longer.
        safe: of no consequence for what is computed, or allowed by ``trainer.allow_changed``.
    """

    refused: tuple[Change, ...]
    longer: tuple[Change, ...]
    safe: tuple[Change, ...]


def compare_config(saved: RunState, config: JobConfig) -> Changes:
    """Sort every difference between a checkpoint's settings and the present ones."""
    now, defaults = flat_config(config), flat_config(JobConfig())
    allowed = set(config.trainer.allow_changed)
    refused: list[Change] = []
    longer: list[Change] = []
    safe: list[Change] = []
    for key in sorted(now.keys() | saved.config.keys()):
        # A setting that is newer than the checkpoint had its default then.
        change = Change(key, saved.config.get(key, defaults.get(key)), now.get(key, defaults.get(key)))
        if change.old == change.new:
            continue
        if key in LENGTH_KEYS:
            grows = total_steps(config, saved.steps_per_epoch) - saved.total_steps
            (longer if grows > 0 else safe if grows == 0 or key in allowed else refused).append(change)
        elif is_safe(key) or any(key == name or key.startswith(f"{name}.") for name in allowed):
            safe.append(change)
        else:
            refused.append(change)
    return Changes(tuple(refused), tuple(longer), tuple(safe))


def is_safe(key: str) -> bool:
    """Whether a setting may change between two starts of a run."""
    # Of named data sets the paths may change, as those of a single one may.
    paths = key.startswith("data.train_files.") and key.endswith(".files")
    return key in SAFE_KEYS or paths or key.startswith("data.val_files.")


def total_steps(config: JobConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: ``total_training_steps`` may be less or more than the epochs give."""
    return config.trainer.total_training_steps or config.trainer.total_epochs * steps_per_epoch
