"""A run's tensors on disk: torch's distributed checkpoint (DCP), readable at any number of ranks."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sft_job.checkpoint.files import Content
from sft_job.checkpoint.shards import SafeLoadPlanner, SafeReader, ShardWriter
from sft_job.contract import ExitCode
from sft_job.errors import JobError

# What is frozen is the base model's, and stays in its own files.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def trained_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, *, with_model: bool, with_optimizer: bool
) -> dict[str, Any]:
    """What a checkpoint holds of this rank: nested dicts of live tensors, no copies."""
    tensors: dict[str, Any] = {}
    if with_model:
        tensors["model"] = _trained_state(module)
    if with_optimizer:
        tensors["optimizer"] = get_optimizer_state_dict(module, optimizer, options=_TRAINED)
    return tensors


def save_tensors(tensors: dict[str, Any], writer: ShardWriter, group: dist.ProcessGroup) -> dict[str, Content]:
    """Write this rank's shards (a collective call over ``group``, on any thread).

    Returns:
        The files that this rank wrote, durable, by name.

    Raises:
        Exception: what the first rank met that failed, on all ranks alike.
    """
    if not tensors:
        return {}
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:  # a BaseException
        raise first_failure(error) from error
    return writer.written


def _trained_state(module: nn.Module) -> dict[str, Any]:
    """The model's tensors without what is frozen.

    torch leaves frozen parameters out by one name each; a tied one (the head) would stay in under its other name.
    """
    state = get_model_state_dict(module, options=_TRAINED)
    variables = module.state_dict(keep_vars=True)
    frozen = {id(p) for p in module.parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in state.items() if id(variables.get(name)) not in frozen}


def load_tensors(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None
) -> None:
    """Fill model and optimizer from a checkpoint of any number of ranks (a collective call).

    Args:
        folder: whole, by its manifest.
        module: filled.
        optimizer: filled; its settings stay.
        group: over which the ranks agree; None = the default group.

    Raises:
        JobError: the checkpoint lacks tensors or does not fit the model (exit code 74).
    """
    tensors = {
        "model": _trained_state(module),
        "optimizer": get_optimizer_state_dict(module, optimizer, options=_TRAINED),
    }
    try:
        dcp.load(tensors, storage_reader=SafeReader(folder), planner=SafeLoadPlanner(), process_group=group)
    except dcp.CheckpointException as error:
        raise JobError(ExitCode.NO_CHECKPOINT, f"{folder} cannot be loaded: {first_failure(error)}") from error
    # The settings of this start hold, not those of the checkpoint's.
    settings = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
    set_model_state_dict(module, tensors["model"], options=_TRAINED)
    set_optimizer_state_dict(module, optimizer, tensors["optimizer"], options=_TRAINED)
    for settings_of_group, own in zip(optimizer.param_groups, settings, strict=True):
        settings_of_group.update(own)


def first_failure(error: dcp.CheckpointException) -> Exception:
    """What went wrong on the first rank that failed, without the traceback that torch puts into its text."""
    failures: dict[int, Any] = error.failures
    cause = next(iter(failures.values()))[0] if failures else None
    return cause if isinstance(cause, Exception) else RuntimeError("the ranks could not agree on a checkpoint")


# How torch's and safetensors' writers say that the disk is full; Python itself says OSError.
_DISK_SIGNS = ("unexpected pos", "No space left", "Disk quota", "File too large", "enforce fail", "os error")


def is_disk_failure(error: Exception) -> bool:
    """A file could not be written; memory that ran out is no such thing, however it is said."""
    if isinstance(error, torch.OutOfMemoryError) or is_host_memory(error):
        return False
    return isinstance(error, OSError) or any(sign in str(error) for sign in _DISK_SIGNS)


def is_host_memory(error: Exception) -> bool:
    """Memory of the host, not of the device, ran out: Python, torch and the system each say so in their own way."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def on_first_rank(action: Callable[..., Any], *arguments: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Run something on rank 0 only and give every rank its result, or its error (a collective call).

    File systems may show ranks different things; only rank 0 looks at the run folder.
    """
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        box[0] = _attempt(action, *arguments)
    dist.broadcast_object_list(box, src=0, group=group)
    value, error = box[0]
    if error is not None:
        raise error
    return value


def on_every_rank(action: Callable[..., Any], *arguments: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Run something on every rank and give each all results, or the first rank's error (a collective call)."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, _attempt(action, *arguments), group=group)
    for _, error in found:
        if error is not None:
            raise error
    return [value for value, _ in found]


def _attempt(action: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    try:
        return action(*arguments), None
    except Exception as error:
        # It must survive the journey to the other ranks, or they would wait for ever.
        if isinstance(error, (OSError, JobError, MemoryError)):
            return None, error
        text = f"{type(error).__name__}: {error}"
        return None, torch.OutOfMemoryError(text) if isinstance(error, torch.OutOfMemoryError) else RuntimeError(text)
