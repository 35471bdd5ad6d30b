"""From a Hugging Face folder to a sharded model: skeleton on the meta device, blocks sharded, weights read in parts.

No process ever holds the whole model: pretrained weights are read slice by slice into the shards; random weights
are drawn block by block, each block being sharded before the next one is made.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sft_job.config.schema import ModelConfig
from sft_job.config.shares import holds_frozen
from sft_job.data.shm import to_shm
from sft_job.model.attention.call import Needs
from sft_job.model.attention.choose import AttentionChoice, choose_backend
from sft_job.model.attention.packed import PACKED, register_packed_attention
from sft_job.model.blocks import Blocks, compiles, first_plan, maybe_compiled
from sft_job.model.causal_lm import CausalLMLoss
from sft_job.model.fp8 import check_fp8, convert_to_fp8, uses_fp8
from sft_job.model.lora import add_adapters, base_name, draw_adapters, load_adapters, lora_config, uses_lora
from sft_job.model.loss import row_losses
from sft_job.model.offload import InputStore
from sft_job.model.precision import Precision
from sft_job.model.supported import check_architecture, decoder_blocks
from sft_job.model.tail import compile_final_norm
from sft_job.model.weights import draw, load_pretrained, unit_seed
from sft_job.parallel.fsdp import Sharding, shard_module, sum_gradients
from sft_job.parallel.mesh import Mesh


def build_model(
    config: ModelConfig,
    mesh: Mesh,
    device: torch.device,
    precision: Precision,
    seed: int,
    *,
    load: bool,
    longest: int = 0,
    accumulates: bool = True,
) -> tuple[CausalLMLoss, AttentionChoice]:
    """Build, shard and fill the model (a collective call).

    Args:
        config: the model's settings.
        mesh: process groups.
        device: where the shards live.
        precision: dtypes.
        seed: for ``init: random``.
        load: fill the trained weights; False leaves them undefined, for a checkpoint to fill. A frozen base is always
            filled.
        longest: tokens of the longest row, by which an attention backend may be chosen.
        accumulates: a step may have several micro-batches.

    Returns:
        The module whose forward is the loss sum, in training mode, and which attention backend it has, with the reason.

    Raises:
        JobError: 2 where the model needs what this job does not offer, 66 where its weights cannot be read.
    """
    assert config.partial_pretrain is not None
    folder = Path(config.partial_pretrain)
    adapters = lora_config(config) if uses_lora(config) else None
    hf_config = check_architecture(config)
    attention = choose_backend(attention_needs(hf_config, device, precision.compute, longest), config.attention)
    backend = attention.backend
    lm = empty_model(hf_config, config, precision.storage)
    if adapters is not None:
        add_adapters(lm, adapters, torch.promote_types(precision.storage, torch.float32))
    check_fp8(config.fp8, device, precision.compute)
    if uses_fp8(config.fp8):
        convert_to_fp8(decoder_blocks(lm), config.fp8)
    compiled = compiles(config, device)
    blocks = Blocks(decoder_blocks(lm), backend, compiled=compiled, store=InputStore(device))
    blocks.set_plan(first_plan(config, len(decoder_blocks(lm))))
    if compiled:
        compile_final_norm(lm)
    module = CausalLMLoss(lm, backend, mesh.ulysses, blocks, maybe_compiled(row_losses, compiled))
    # A checkpoint of adapters does not hold the frozen base.
    fill_base = load or adapters is not None
    draw_base = fill_base and config.init == "random"
    fsdp = config.fsdp_config
    sharding = Sharding(
        mesh.fsdp,
        precision.compute,
        precision.reduce,
        reshard=fsdp.reshard_after_forward,
        offload=fsdp.cpu_offload or fsdp.offload_params,
        accumulates=accumulates,
        whole_frozen=adapters is not None and _whole_frozen(lm, fsdp.shard_frozen, mesh, device, precision.compute),
    )
    shard_model(module, sharding, device, seed if draw_base else None)
    if fill_base and not draw_base:
        source = to_shm([folder])[0] if config.use_shm else folder
        load_pretrained(lm, source, lambda name: None if ".lora_" in name else base_name(name))
    if adapters is not None and load:
        if config.lora_adapter_path is not None:
            load_adapters(lm, Path(config.lora_adapter_path))
        else:
            draw_adapters(lm, seed)
    return module.train(), attention


def _whole_frozen(
    lm: PreTrainedModel, shard_frozen: str | bool, mesh: Mesh, device: torch.device, dtype: torch.dtype
) -> bool:
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    frozen = sum(parameter.numel() for parameter in lm.parameters() if not parameter.requires_grad)
    return holds_frozen(shard_frozen, frozen * dtype.itemsize, memory, mesh.layout.world)


def attention_needs(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, longest: int = 0) -> Needs:
    """What the model's attention layers will ask a backend for."""
    heads = config.num_attention_heads
    return Needs(
        device=device.type,
        dtype=dtype,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        window=bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True),
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        dropout=bool(getattr(config, "attention_dropout", 0.0)),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
        longest=longest,
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


def shard_model(module: CausalLMLoss, sharding: Sharding, device: torch.device, seed: int | None) -> None:
    """Make every decoder block and the rest FSDP groups, with memory.

    Args:
        module: on the meta device.
        sharding: how.
        device: where the module computes; the shards live there too, unless they are offloaded.
        seed: draw random weights, the same for every layout; None = leave them undefined.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    home = torch.device("cpu") if sharding.offload else device
    blocks = decoder_blocks(module.lm)
    for index, block in enumerate(blocks):
        if seed is not None:
            draw(block.modules(), module.lm, home, unit_seed(seed, f"block {index}"))
        shard_module(block, sharding)
    if seed is None:
        shard_module(module, sharding.as_root())
        module.to_empty(device=home)
        module.lm.tie_weights()  # to_empty gives tied modules a parameter each
    else:
        inside = {id(part) for block in blocks for part in block.modules()}
        rest = [part for part in module.lm.modules() if id(part) not in inside]
        draw(rest, module.lm, home, unit_seed(seed, "root"))
        module.lm.tie_weights()
        shard_module(module, sharding.as_root())
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        parent.register_buffer(leaf, buffer.to(device), persistent=leaf not in parent._non_persistent_buffers_set)
    sum_gradients(module.modules(), sharding)
