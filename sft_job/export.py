"""From a checkpoint's shards to a Hugging Face folder, in one process that never holds the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from transformers import AutoConfig

from sft_job.checkpoint.folder import newest_whole, published
from sft_job.checkpoint.huggingface import FILE_BYTES, write_companions, write_weights
from sft_job.checkpoint.state import read_state
from sft_job.config.schema import ModelConfig
from sft_job.contract import ExitCode, RunFolder, step_of
from sft_job.data.render import PromptResponseRenderer
from sft_job.data.tokenizer import load_tokenizer, template_text
from sft_job.errors import JobError
from sft_job.model.build import empty_model
from sft_job.model.precision import DTYPES
from sft_job.parallel.fsdp import tied_once


def export_checkpoint(source: Path, output: Path, dtype: str | None, base: Path | None) -> None:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        source: a checkpoint folder, or a run folder (its newest whole checkpoint is taken).
        output: written; must not exist or be empty.
        dtype: bf16, fp32 or fp64; None = as trained.
        base: base model folder; None = the one in the checkpoint's settings.

    Raises:
        JobError: 74 no usable checkpoint, 66 no base folder, 73 the output cannot be written, 2 an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise JobError(ExitCode.CONFIG, f"--dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    folder = _checkpoint(source)
    state = read_state(folder)
    base = base or Path(state.config["model.partial_pretrain"] or "")
    if not (base / "config.json").is_file():
        raise JobError(ExitCode.MODEL, f"base model folder {base}: no config.json\n    fix: name it with --base")
    if output.exists() and any(output.iterdir()):
        raise JobError(ExitCode.CANNOT_CREATE, f"{output} is not empty\n    fix: name a new folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(ExitCode.CANNOT_CREATE, f"{output}: {error}") from error

    trusted = bool(state.config["model.trust_remote_code"])
    stored = DTYPES[state.config["model.fsdp_config.model_dtype"]]
    wanted = DTYPES[dtype] if dtype else stored
    hf_config = AutoConfig.from_pretrained(base, trust_remote_code=trusted)
    lm = empty_model(hf_config, ModelConfig(trust_remote_code=trusted), stored)
    write_weights(output, _read_tensors(folder, tied_once(lm, set()), wanted), write=True)
    tokenizer = load_tokenizer(base, trusted)
    renderer = PromptResponseRenderer(
        tokenizer,
        chat_template=template_text(state.config["data.chat_template"]),
        template_kwargs=state.config["data.apply_chat_template_kwargs"],
    )
    write_companions(output, hf_config, wanted, type(lm).__name__, base, tokenizer, renderer.end_of_turn_id)


def _checkpoint(source: Path) -> Path:
    own = step_of(source.resolve()) is not None
    folder, notes = newest_whole([source.resolve()] if own else published(RunFolder(source)))
    if folder is None:
        raise JobError(ExitCode.NO_CHECKPOINT, "\n".join(notes) or f"{source}: no checkpoint here")
    return folder


def _read_tensors(folder: Path, shapes: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors in the order of their names, read about one output file's worth at a time."""
    waiting: dict[str, Tensor] = {}
    for name in sorted(shapes):
        waiting[name] = torch.empty_like(shapes[name], device="cpu")
        if sum(tensor.nbytes for tensor in waiting.values()) >= FILE_BYTES:
            yield from _read_together(folder, waiting, dtype)
            waiting = {}
    yield from _read_together(folder, waiting, dtype)


def _read_together(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    state = {"model": {f"lm.{name}": tensor for name, tensor in tensors.items()}}
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    except (dcp.CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise JobError(ExitCode.NO_CHECKPOINT, f"{folder} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
