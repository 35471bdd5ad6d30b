"""A run's tensors on disk: torch's distributed checkpoint (DCP), readable at any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sft_job.contract import ExitCode
from sft_job.errors import JobError


def save_tensors(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, *, with_model: bool, with_optimizer: bool
) -> None:
    """Write this rank's shards (a collective call). The folder exists and is not yet published."""
    tensors: dict[str, Any] = {}
    if with_model:
        tensors["model"] = get_model_state_dict(module)
    if with_optimizer:
        tensors["optimizer"] = get_optimizer_state_dict(module, optimizer)
    if tensors:
        dcp.save(tensors, checkpoint_id=folder)


def load_tensors(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer from a checkpoint of any number of ranks (a collective call).

    Raises:
        JobError: the checkpoint lacks tensors or does not fit the model (exit code 74).
    """
    tensors = {"model": get_model_state_dict(module), "optimizer": get_optimizer_state_dict(module, optimizer)}
    try:
        dcp.load(tensors, checkpoint_id=folder)
    except (dcp.CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise JobError(ExitCode.NO_CHECKPOINT, f"{folder} cannot be loaded: {error}") from error
    set_model_state_dict(module, tensors["model"])
    set_optimizer_state_dict(module, optimizer, optim_state_dict=tensors["optimizer"])


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
