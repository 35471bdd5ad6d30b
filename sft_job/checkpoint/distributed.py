"""A run's tensors on disk: torch's distributed checkpoint (DCP), readable at any number of ranks."""

from __future__ import annotations

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

from sft_job.contract import ExitCode
from sft_job.errors import JobError

# What is frozen is the base model's, and stays in its own files.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_tensors(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, *, with_model: bool, with_optimizer: bool
) -> None:
    """Write this rank's shards (a collective call). The folder exists and is not yet published."""
    tensors: dict[str, Any] = {}
    if with_model:
        tensors["model"] = _trained_state(module)
    if with_optimizer:
        tensors["optimizer"] = get_optimizer_state_dict(module, optimizer, options=_TRAINED)
    if not tensors:
        return
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except dcp.CheckpointException as error:  # a BaseException
        raise first_failure(error) from error


def _trained_state(module: nn.Module) -> dict[str, Any]:
    """The model's tensors without what is frozen.

    torch leaves frozen parameters out by one name each; a tied one (the head) would stay in under its other name.
    """
    state = get_model_state_dict(module, options=_TRAINED)
    variables = module.state_dict(keep_vars=True)
    frozen = {id(p) for p in module.parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in state.items() if id(variables.get(name)) not in frozen}


def load_tensors(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer from a checkpoint of any number of ranks (a collective call).

    Raises:
        JobError: the checkpoint lacks tensors or does not fit the model (exit code 74).
    """
    tensors = {
        "model": _trained_state(module),
        "optimizer": get_optimizer_state_dict(module, optimizer, options=_TRAINED),
    }
    try:
        dcp.load(tensors, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        raise JobError(ExitCode.NO_CHECKPOINT, f"{folder} cannot be loaded: {first_failure(error)}") from error
    # The settings of this start hold, not those of the checkpoint's.
    settings = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
    set_model_state_dict(module, tensors["model"], options=_TRAINED)
    set_optimizer_state_dict(module, optimizer, tensors["optimizer"], options=_TRAINED)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def first_failure(error: dcp.CheckpointException) -> Exception:
    """What went wrong on the first rank that failed, without the traceback that torch puts into its text."""
    failures: dict[int, Any] = error.failures
    cause = next(iter(failures.values()))[0] if failures else None
    return cause if isinstance(cause, Exception) else RuntimeError("the ranks could not agree on a checkpoint")


# How torch's and safetensors' writers say that the disk is full; Python itself says OSError.
_DISK_SIGNS = ("unexpected pos", "No space left", "Disk quota", "File too large", "enforce fail", "os error")


def is_disk_failure(error: Exception) -> bool:
    """A file could not be written."""
    return isinstance(error, OSError) or any(sign in str(error) for sign in _DISK_SIGNS)


def on_first_rank(action: Any, *arguments: Any) -> Any:
    """Run something on rank 0 only and give every rank its result, or its error (a collective call).

    File systems may show ranks different things; only rank 0 looks at the run folder.
    """
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = (action(*arguments), None)
        except Exception as error:
            box[0] = (None, error)
    dist.broadcast_object_list(box, src=0)
    value, error = box[0]
    if error is not None:
        raise error
    return value
