"""From a Hugging Face folder to a sharded model: skeleton on the meta device, blocks sharded, weights read in parts.

No process ever holds the whole model: pretrained weights are read slice by slice into the shards; random weights
are drawn block by block, each block being sharded before the next one is made.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sft_job.config.schema import ModelConfig
from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.model.attention import PACKED, Needs, choose_backend, register_packed_attention
from sft_job.model.causal_lm import CausalLMLoss
from sft_job.model.precision import Precision
from sft_job.model.recompute import recompute_blocks
from sft_job.parallel.fsdp import shard_module, sum_gradients, tied_once
from sft_job.parallel.mesh import Mesh


def build_model(
    config: ModelConfig, mesh: Mesh, device: torch.device, precision: Precision, seed: int, *, load: bool
) -> tuple[CausalLMLoss, str]:
    """Build, shard and fill the model (a collective call).

    Args:
        config: the model's settings.
        mesh: process groups.
        device: where the shards live.
        precision: dtypes.
        seed: for ``init: random``.
        load: fill the weights; False leaves them undefined, for a checkpoint to fill.

    Returns:
        The module whose forward is the loss sum, in training mode, and a line for the log on the attention backend.

    Raises:
        JobError: 2 where the model needs what this job does not offer, 66 where its weights cannot be read.
    """
    assert config.partial_pretrain is not None
    folder = Path(config.partial_pretrain)
    hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    refuse_unsupported(hf_config)
    backend, why = choose_backend(attention_needs(hf_config, device.type, precision.compute))
    module = CausalLMLoss(empty_model(hf_config, config, precision.storage), backend, mesh.ulysses)
    if config.enable_gradient_checkpointing:
        recompute_blocks(decoder_blocks(module.lm))
    draw = load and config.init == "random"
    shard_model(module, mesh, precision, config.fsdp_config.reshard_after_forward, device, seed if draw else None)
    if load and not draw:
        load_pretrained(module.lm, folder)
    return module.train(), why


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Refuse by name what would be trained silently wrong.

    Raises:
        JobError: exit code 2.
    """
    experts = next(
        (n for n in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(config, n, None)), ""
    )
    if experts:
        raise JobError(
            ExitCode.CONFIG,
            f"{config.model_type} is a mixture of experts ({experts}: {getattr(config, experts)}): not supported yet, "
            "because its files and its modules hold the expert weights in different shapes",
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) == "dynamic":
        raise JobError(
            ExitCode.CONFIG,
            "rope_type 'dynamic' makes a document's positions depend on the longest one beside it: not supported; "
            "set a fixed type (yarn, linear, default) in the model's config.json",
        )


def attention_needs(config: PretrainedConfig, device: str, dtype: torch.dtype) -> Needs:
    """What the model's attention layers will ask a backend for."""
    heads = config.num_attention_heads
    return Needs(
        device=device,
        dtype=dtype,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        window=bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True),
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        dropout=bool(getattr(config, "attention_dropout", 0.0)),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def empty_model(hf_config: PretrainedConfig, config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on the meta device and real buffers (RoPE tables are in no file)."""
    register_packed_attention()
    with init_empty_weights(include_buffers=False):
        lm = AutoModelForCausalLM.from_config(
            hf_config, dtype=dtype, attn_implementation=PACKED, trust_remote_code=config.trust_remote_code
        )
    # Moving parameters to the meta device unties them, and FSDP must see a tied one as one: sharded as two, its
    # copies would drift apart after the first step while its gradients still look right.
    lm.tie_weights()
    return lm


def decoder_blocks(lm: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder blocks, first to last: the one list of modules that is as long as the config says.

    Raises:
        JobError: there is none (exit code 2).
    """
    count = lm.config.num_hidden_layers
    for module in lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise JobError(ExitCode.CONFIG, f"{lm.config.model_type}: found no list of {count} decoder blocks to shard")


def shard_model(
    module: CausalLMLoss,
    mesh: Mesh,
    precision: Precision,
    reshard: bool,
    device: torch.device,
    seed: int | None,
) -> None:
    """Make every decoder block and the rest FSDP groups, with memory on the device.

    Args:
        module: on the meta device.
        mesh: process groups.
        precision: dtypes.
        reshard: free a block's gathered weights after its forward.
        device: where the shards live.
        seed: draw random weights, the same for every layout; None = leave them undefined.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    blocks = decoder_blocks(module.lm)
    for index, block in enumerate(blocks):
        if seed is not None:
            _draw(list(block.modules()), module.lm, device, _unit_seed(seed, f"block {index}"))
        shard_module(block, mesh.fsdp, precision.compute, precision.reduce, reshard)
    if seed is None:
        shard_module(module, mesh.fsdp, precision.compute, precision.reduce, None)
        module.to_empty(device=device)
        module.lm.tie_weights()  # to_empty gives tied modules a parameter each
    else:
        inside = {id(part) for block in blocks for part in block.modules()}
        rest = [part for part in module.lm.modules() if id(part) not in inside]
        _draw(rest, module.lm, device, _unit_seed(seed, "root"))
        module.lm.tie_weights()
        shard_module(module, mesh.fsdp, precision.compute, precision.reduce, None)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        parent.register_buffer(leaf, buffer.to(device), persistent=leaf not in parent._non_persistent_buffers_set)
    sum_gradients(module.modules())


def _unit_seed(seed: int, unit: str) -> int:
    return zlib.crc32(f"{seed} {unit}".encode())


@torch.no_grad()
def _draw(parts: list[nn.Module], lm: PreTrainedModel, device: torch.device, seed: int) -> None:
    """Give modules real parameters, drawn as the model's own rule says."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for part in parts:
            part.to_empty(device=device, recurse=False)
            lm._init_weights(part)


def load_pretrained(lm: PreTrainedModel, folder: Path) -> None:
    """Read a folder's safetensors into the sharded model; each rank reads its own slices only.

    Raises:
        JobError: weights are missing, unreadable or of another shape (exit code 66).
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        on_disk = set(reader.read_metadata().state_dict_metadata)
    except Exception as error:  # safetensors raises its own kinds
        raise JobError(ExitCode.MODEL, f"{folder}: cannot read the safetensors files: {error}") from error
    wanted = tied_once(lm, on_disk)
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
