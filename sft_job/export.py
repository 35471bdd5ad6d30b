"""What a run gives away: a Hugging Face folder or a PEFT adapter, from the live model or from a checkpoint.

No process holds the whole model: weights pass one by one, and are written a file at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from sft_job.checkpoint.distributed import first_failure
from sft_job.checkpoint.folder import newest_whole, published
from sft_job.checkpoint.huggingface import FILE_BYTES, WeightsWriter, whole_tensors, write_companions, write_weights
from sft_job.checkpoint.shards import SafeLoadPlanner, SafeReader
from sft_job.checkpoint.state import read_state, saved_config
from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode, RunFolder, step_of
from sft_job.data.render import PromptResponseRenderer
from sft_job.data.tokenizer import load_tokenizer, template_text
from sft_job.errors import JobError
from sft_job.model.build import empty_model
from sft_job.model.lora import (
    ADAPTER_WEIGHTS,
    add_adapters,
    file_name,
    lora_config,
    merged,
    scaling_of,
    uses_lora,
    write_adapter_config,
)
from sft_job.model.precision import DTYPES
from sft_job.model.supported import read_config
from sft_job.parallel.fsdp import tied_once


def export_live(
    folder: Path,
    lm: PreTrainedModel,
    config: JobConfig,
    device: torch.device,
    *,
    write: bool,
    meet: Callable[[], None] | None = None,
) -> str:
    """Write the model as it stands, or its adapters, into an existing folder (a collective call).

    Args:
        folder: where to.
        lm: sharded.
        config: the run's settings.
        device: where the ranks communicate.
        write: this rank writes; the others only take part.
        meet: waits for all ranks as long as the disk takes.

    Returns:
        SHA-256 of the trained weights, '' on ranks that do not write.
    """
    base = Path(config.model.partial_pretrain or "")
    if uses_lora(config.model):
        adapters = {file_name(name): tensor for name, tensor in lm.state_dict().items() if ".lora_" in name}
        digest = _write_adapters(folder, whole_tensors(adapters, device, meet), write=write)
        if write:
            write_adapter_config(folder, lora_config(config.model))
            load_tokenizer(base, config.model.trust_remote_code).save_pretrained(folder)
        return digest
    weights = tied_once(lm, set())
    digest = write_weights(folder, whole_tensors(weights, device, meet), write=write)
    if write:
        _write_companions(folder, lm, next(iter(weights.values())).dtype, config)
    return digest


def export_checkpoint(source: Path, output: Path, dtype: str | None, base: Path | None, *, merge: bool = False) -> None:
    """Write a checkpoint as a Hugging Face folder, or, of a LoRA run, as a PEFT adapter.

    Args:
        source: a checkpoint folder, or a run folder (its newest whole checkpoint is taken).
        output: written; must not exist or be empty.
        dtype: bf16, fp32 or fp64; None = as trained.
        base: base model folder; None = the one in the checkpoint's settings.
        merge: of a LoRA run: the base model with the adapters added instead of the adapters alone.

    Raises:
        JobError: 74 no usable checkpoint, 66 no base folder, 73 the output cannot be written, 2 a wrong option.
    """
    if dtype is not None and dtype not in DTYPES:
        raise JobError(ExitCode.CONFIG, f"--dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    folder = _checkpoint(source)
    config = saved_config(read_state(folder))
    if base is not None:
        config.model.partial_pretrain = str(base)
    base = Path(config.model.partial_pretrain or "")
    if not (base / "config.json").is_file():
        raise JobError(ExitCode.MODEL, f"base model folder {base}: no config.json\n    fix: name it with --base")
    lora = uses_lora(config.model)
    if merge and not lora:
        raise JobError(ExitCode.CONFIG, f"--merge: {folder} is not a LoRA checkpoint, there is nothing to merge")
    if output.exists() and any(output.iterdir()):
        raise JobError(ExitCode.CANNOT_CREATE, f"{output} is not empty\n    fix: name a new folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if lora and not merge:
            _export_adapters(folder, output, config)
        else:
            _export_model(folder, output, DTYPES[dtype] if dtype else None, config)
    except (OSError, SafetensorError) as error:
        raise JobError(ExitCode.CANNOT_CREATE, f"{output}: {error}") from error


def _export_adapters(folder: Path, output: Path, config: JobConfig) -> None:
    _write_adapters(output, iter(sorted(_read_adapters(folder, config).items())), write=True)
    write_adapter_config(output, lora_config(config.model))
    load_tokenizer(config.model.partial_pretrain, config.model.trust_remote_code).save_pretrained(output)


def _export_model(folder: Path, output: Path, wanted: torch.dtype | None, config: JobConfig) -> None:
    stored = DTYPES[config.model.fsdp_config.model_dtype]
    lm = empty_model(read_config(config.model), config.model, stored)
    shapes = tied_once(lm, set())
    if uses_lora(config.model):
        adapters = _read_adapters(folder, config)
        base = _read_base(Path(config.model.partial_pretrain or ""), lm, stored)
        tensors = merged(base, adapters, scaling_of(lora_config(config.model)))
    else:
        tensors = _read_tensors(folder, shapes)
    dtype = wanted or stored
    cast = ((name, tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in tensors)
    write_weights(output, cast, write=True)
    _write_companions(output, lm, dtype, config)


def _write_adapters(folder: Path, tensors: Iterator[tuple[str, Tensor]], *, write: bool) -> str:
    return write_weights(folder, tensors, write=write, writer=WeightsWriter(folder, single=ADAPTER_WEIGHTS))


def _write_companions(folder: Path, lm: PreTrainedModel, dtype: torch.dtype, config: JobConfig) -> None:
    base = Path(config.model.partial_pretrain or "")
    tokenizer = load_tokenizer(base, config.model.trust_remote_code)
    renderer = PromptResponseRenderer(
        tokenizer,
        chat_template=template_text(config.data.chat_template),
        template_kwargs=config.data.apply_chat_template_kwargs,
    )
    write_companions(folder, lm.config, dtype, type(lm).__name__, base, tokenizer, renderer.end_of_turn_id)


def _checkpoint(source: Path) -> Path:
    own = step_of(source.resolve()) is not None
    folder, notes = newest_whole([source.resolve()] if own else published(RunFolder(source)))
    if folder is None:
        raise JobError(ExitCode.NO_CHECKPOINT, "\n".join(notes) or f"{source}: no checkpoint here")
    return folder


def _read_tensors(folder: Path, shapes: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors in the order of their names, read about one output file's worth at a time."""
    waiting: dict[str, Tensor] = {}
    for name in sorted(shapes):
        waiting[name] = torch.empty_like(shapes[name], device="cpu")
        if sum(tensor.nbytes for tensor in waiting.values()) >= FILE_BYTES:
            yield from _read_together(folder, waiting).items()
            waiting = {}
    yield from _read_together(folder, waiting).items()


def _read_together(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {"model": {f"lm.{name}": tensor for name, tensor in tensors.items()}}
    try:
        dcp.load(state, storage_reader=SafeReader(folder), planner=SafeLoadPlanner(), no_dist=True)
    except dcp.CheckpointException as error:
        raise JobError(ExitCode.NO_CHECKPOINT, f"{folder} cannot be read: {first_failure(error)}") from error
    return tensors


def _read_adapters(folder: Path, config: JobConfig) -> dict[str, Tensor]:
    """The adapters of a checkpoint by PEFT's names."""
    stored = DTYPES[config.model.fsdp_config.model_dtype]
    lm = empty_model(read_config(config.model), config.model, stored)
    add_adapters(lm, lora_config(config.model), torch.promote_types(stored, torch.float32))
    shapes = {name: torch.empty_like(p, device="cpu") for name, p in lm.state_dict().items() if ".lora_" in name}
    return {file_name(name): tensor for name, tensor in _read_together(folder, shapes).items()}


def _read_base(base: Path, lm: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The base model's weights in the order of their names, one at a time."""
    places = {name: file for file in sorted(base.glob("*.safetensors")) for name in _names_in(file)}
    for name in sorted(tied_once(lm, set(places))):
        with safe_open(places[name], framework="pt") as file:
            yield name, file.get_tensor(name).to(dtype)


def _names_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
