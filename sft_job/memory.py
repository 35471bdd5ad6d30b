"""Where a rank's device memory goes, and what a run that has too little of it can change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sft_job.config.schema import JobConfig
from sft_job.data.batches import PackedBatch

_GIB = 2**30


def memory_by_kind(
    module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, sums: Iterable[Tensor] = ()
) -> dict[str, int]:
    """Bytes on a device by what they are for: this rank's share of everything.

    On a GPU the kinds add up to its whole memory. On the CPU only what the tensors themselves say is known. ``sums``
    are gradients that wait for a step's next micro-batch outside of the parameters.
    """
    parameters = list(module.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    kinds = {
        "weights": _bytes_on(device, parameters),
        "gradients": _bytes_on(device, [*sums, *(p.grad for p in parameters if p.grad is not None)]),
        "optimizer states": _bytes_on(device, states),
    }
    if device.type != "cuda":
        return kinds
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    kinds["activations, gathered weights, temporaries"] = allocated - sum(kinds.values())
    kinds["kept by torch, in pieces that do not fit"] = reserved - allocated
    kinds["CUDA itself and other processes"] = total - free - reserved
    kinds["free"] = free
    return kinds


def _bytes_on(device: torch.device, tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in local if tensor.device.type == device.type)


def memory_table(kinds: Mapping[str, int]) -> str:
    """Lines of a plain table, in GiB."""
    width = max(map(len, kinds))
    return "\n".join(f"      {kind:<{width}}  {count / _GIB:8.2f} GiB" for kind, count in kinds.items())


def shapes_text(batch: PackedBatch, ulysses_size: int) -> str:
    """What a micro-batch is made of."""
    padded = sum(batch.document_lengths) > batch.num_tokens
    documents = batch.document_lengths[: len(batch.document_lengths) - padded] or (0,)
    text = f"a micro-batch of {batch.num_tokens:,} tokens: {len(documents):,} documents, the longest {max(documents):,}"
    return text if ulysses_size == 1 else f"{text}; {batch.input_ids.shape[1]:,} tokens on each of {ulysses_size} ranks"


def remedies(
    config: JobConfig, longest: int, world: int, planned: str = "", *, whole_gradients: bool = False
) -> list[str]:
    """Settings that lower the need, the cheapest in speed first; only those that this config has not used up.

    Args:
        config: the run's settings.
        longest: tokens of the longest document of the batch that did not fit.
        world: ranks of the run.
        planned: what ``plan.guess.planned_remedy`` says; it comes first.
        whole_gradients: each rank keeps gradients of all parameters from one micro-batch to the next.
    """
    data, model, ulysses = config.data, config.model, config.ulysses_sequence_parallel_size
    lines = [planned] if planned else []
    if model.recompute not in ("full", "offload"):
        lines.append("model.recompute=full recomputes every block instead of keeping activations")
    if model.recompute != "offload":
        lines.append("model.recompute=offload keeps the blocks' inputs in host memory too, and works on MLPs in pieces")
    if data.use_dynamic_bsz and data.max_token_len_per_gpu * ulysses > longest:
        lines.append(
            f"data.max_token_len_per_gpu below {data.max_token_len_per_gpu:,} makes micro-batches smaller (down to one "
            f"document of {longest:,} tokens)"
        )
    if not data.use_dynamic_bsz and data.micro_batch_size_per_gpu > 1 and config.use_remove_padding:
        lines.append(f"data.micro_batch_size_per_gpu below {data.micro_batch_size_per_gpu}; the result is the same")
    if whole_gradients and world > 1 and model.fsdp_config.fsdp_size != 1:
        lines.append(
            "model.fsdp_config.shard_accumulated=true adds gradients of micro-batches up in each rank's shard alone, "
            "instead of whole on every rank"
        )
    if 2 * ulysses <= world:
        lines.append(
            f"ulysses_sequence_parallel_size above {ulysses} shares each document between more of the {world} ranks"
        )
    if 0 < model.fsdp_config.fsdp_size < world:
        lines.append("model.fsdp_config.fsdp_size=-1 shards the weights over all ranks")
    if not (model.fsdp_config.cpu_offload or model.fsdp_config.offload_params):
        lines.append("model.fsdp_config.cpu_offload=true keeps weights and optimizer states in host memory (slower)")
    if model.fsdp_config.model_dtype != "bf16":
        lines.append("model.fsdp_config.model_dtype=bf16 halves weights and optimizer states (less exact)")
    if model.lora_rank == 0 and model.lora_adapter_path is None:
        lines.append("model.lora_rank above 0 trains adapters, without gradients and states of the base")
    lines.append(f"data.max_length below {data.max_length:,} leaves out or cuts the longest rows; or use more ranks")
    return lines


def out_of_memory_text(
    error: BaseException,
    where: str,
    kinds: Mapping[str, int] | None = None,
    advice: Iterable[str] = (),
) -> str:
    """What a user needs to know when device memory ran out: where, what for, where it all is, what to change."""
    lines = [f"out of device memory {where}", f"    {' '.join(str(error).split('. If reserved')[0].split())[:300]}"]
    if kinds:
        lines += ["    where this rank's memory is:", memory_table(kinds)]
    advice = list(advice)
    if advice:
        lines += ["    fix, any of:", *(f"      {line}" for line in advice)]
    return "\n".join(lines)


def is_out_of_memory(error: BaseException) -> bool:
    """Device memory ran out: torch says so by type on a GPU, by text alone on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
