"""Filling a model: pretrained weights slice by slice into the shards, random ones block by block."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.parallel.fsdp import tied_once


def unit_seed(seed: int, unit: str) -> int:
    """The seed of one part of the model, so that its weights do not depend on how the others were drawn."""
    return zlib.crc32(f"{seed} {unit}".encode())


@torch.no_grad()
def draw(parts: Iterable[nn.Module], lm: PreTrainedModel, device: torch.device, seed: int) -> None:
    """Give modules real parameters, drawn as the model's own rule says."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for part in parts:
            part.to_empty(device=device, recurse=False)
            lm._init_weights(part)


def load_pretrained(lm: PreTrainedModel, folder: Path, name_in_file: Callable[[str], str | None]) -> None:
    """Read a folder's safetensors into the sharded model; each rank reads its own slices only.

    Args:
        lm: sharded, with memory.
        folder: the base model.
        name_in_file: from a name in the model to that in the files; None = not in the files.

    Raises:
        JobError: weights are missing, unreadable or of another shape (exit code 66).
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        on_disk = set(reader.read_metadata().state_dict_metadata)
    except Exception as error:  # safetensors raises its own kinds
        raise JobError(ExitCode.MODEL, f"{folder}: cannot read the safetensors files: {error}") from error
    state = tied_once(lm, on_disk)
    wanted = {file: tensor for name, tensor in state.items() if (file := name_in_file(name)) is not None}
    missing = sorted(set(wanted) - on_disk)
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise JobError(
            ExitCode.MODEL,
            f"{folder}: {len(missing)} of {len(wanted)} weights that {type(lm).__name__} needs are not in the "
            f"safetensors files: {shown}",
        )
    try:
        dcp.load(wanted, storage_reader=reader)
    except (CheckpointException, ValueError, RuntimeError, AssertionError) as error:
        raise JobError(ExitCode.MODEL, f"{folder}: the weights do not fit {type(lm).__name__}: {error}") from error
