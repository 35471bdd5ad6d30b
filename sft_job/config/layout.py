"""Rules between batch, sequence length, ranks and the model's shape and kind."""

from __future__ import annotations

from collections.abc import Callable

from sft_job.config.model_folder import ModelFacts
from sft_job.config.schema import JobConfig
from sft_job.config.topology import Topology
from sft_job.contract import ExitCode
from sft_job.errors import Problem

_ULYSSES = "ulysses_sequence_parallel_size"
_SHARDS = "model.fsdp_config.fsdp_size"
_MODEL = "model.partial_pretrain"
_BEYOND = {
    "default": "RoPE goes on to angles that the model was never trained on; what it does there it learns in this run "
    "only. To stretch the trained range, set rope_parameters (yarn) in config.json",
    "longrope": "longrope uses its table for long rows, and beyond its end goes on to angles that were never trained",
    "linear": "positions are squeezed by the factor in config.json, and that reaches less far than max_length",
    "yarn": "yarn stretches the trained range by the factor in config.json, and that reaches less far than max_length",
    "llama3": "llama3 RoPE stretches the trained range by the factor in config.json, and that reaches less far than "
    "max_length",
}


def ulysses_fits(size: int, heads: int, kv_heads: int, world: int) -> bool:
    """Whether ranks, attention heads and key/value heads allow a Ulysses size.

    Query heads are dealt out evenly. Key/value heads are too, or where there are fewer of them than ranks in the
    group each is repeated up to the group's size.
    """
    return world % size == 0 and heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def check_layout(
    config: JobConfig, topology: Topology, model: ModelFacts | None, origin: Callable[[str], str]
) -> list[Problem]:
    """The Ulysses size against ranks and attention heads, with the arithmetic and the sizes that would do."""
    size, world = config.ulysses_sequence_parallel_size, topology.world
    where = origin(_ULYSSES)
    if size < 1:
        rule = "must be a whole number from 1"
        return [Problem(ExitCode.CONFIG, _ULYSSES, rule, "1 = no sequence parallelism", size, where)]
    heads, kv_heads = (model.num_attention_heads, model.num_key_value_heads) if model else (0, 0)
    reasons: list[str] = []
    if world % size:
        ranks = f"{topology.nnodes} nodes x {topology.nproc_per_node} ranks" if topology.nnodes > 1 else _ranks(world)
        reasons.append(f"it must divide the number of ranks: {ranks} / {size} = {_quotient(world, size)}")
    if model and heads % size:
        reasons.append(f"it must divide the model's attention heads: {heads} heads / {size} = {_quotient(heads, size)}")
    if model and kv_heads % size and size % kv_heads:
        reasons.append(
            f"it must divide the model's key/value heads or be a multiple of them: {kv_heads} heads / {size} = "
            f"{_quotient(kv_heads, size)}, {size} / {kv_heads} = {_quotient(size, kv_heads)}"
        )
    if not reasons:
        return []
    sizes = range(1, world + 1)
    if model:
        legal = [each for each in sizes if ulysses_fits(each, heads, kv_heads, world)]
        fix = f"sizes that fit this model on {_ranks(world)}: {_listed(legal)}"
    else:
        fix = f"sizes that fit {_ranks(world)}: {_listed([each for each in sizes if world % each == 0])}"
    return [Problem(ExitCode.CONFIG, _ULYSSES, "; ".join(reasons), fix, size, where)]


def check_shards(config: JobConfig, topology: Topology, origin: Callable[[str], str]) -> list[Problem]:
    """The size of an FSDP group against the ranks, with the arithmetic and the sizes that would do."""
    size, world = config.model.fsdp_config.fsdp_size, topology.world
    if size == -1 or (size >= 1 and world % size == 0):
        return []
    sizes = _listed([each for each in range(1, world + 1) if world % each == 0])
    if size < 1:
        rule = "must be a whole number from 1, or -1 for all ranks"
    else:
        rule = f"it must divide the number of ranks: {_ranks(world)} / {size} = {_quotient(world, size)}"
    return [Problem(ExitCode.CONFIG, _SHARDS, rule, f"-1, or one of {sizes}", size, origin(_SHARDS))]


def check_model(config: JobConfig, model: ModelFacts | None, origin: Callable[[str], str]) -> list[Problem]:
    """Models that would be trained wrong, refused by name."""
    if model is None:
        return []
    where = origin(_MODEL)
    problems: list[Problem] = []
    if model.is_moe:
        rule = (
            f"{model.model_type} is a mixture of experts, which this version does not train: its files and its modules "
            "hold the experts' weights in different shapes"
        )
        problems.append(Problem(ExitCode.CONFIG, _MODEL, rule, "a dense model", str(model.path), where))
    if model.rope_type == "dynamic":
        rule = "rope_type dynamic: the angles of a row depend on the longest row beside it, which is not supported"
        fix = "set a fixed type (yarn, linear, default) in the model's config.json"
        problems.append(Problem(ExitCode.CONFIG, _MODEL, rule, fix, str(model.path), where))
    if model.rope_type == "longrope" and model.rope_original and config.data.max_length > model.rope_original:
        rule = (
            f"rope_type longrope has one table for rows up to {model.rope_original:,} tokens and another for longer "
            f"ones, and a pack can hold both; data.max_length = {config.data.max_length:,}"
        )
        fix = f"data.max_length up to {model.rope_original}, or a model with yarn"
        problems.append(Problem(ExitCode.CONFIG, _MODEL, rule, fix, str(model.path), where))
    return problems


def layout_warnings(
    config: JobConfig, topology: Topology, model: ModelFacts | None, origin: Callable[[str], str]
) -> list[str]:
    """What works, but perhaps not as meant."""
    lines: list[str] = []
    data, size, world = config.data, max(config.ulysses_sequence_parallel_size, 1), topology.world
    for key, said, real in (
        ("trainer.nnodes", config.trainer.nnodes, topology.nnodes),
        ("trainer.n_gpus_per_node", config.trainer.n_gpus_per_node, topology.nproc_per_node),
    ):
        if said != real and origin(key):
            lines.append(f"{key} = {said} ({origin(key)}), but the launcher started {real}: {real} it is")
    groups = world // size
    if 0 < data.train_batch_size < groups:
        lines.append(
            f"data.train_batch_size = {data.train_batch_size} is less than the {groups} groups of ranks "
            f"({_ranks(world)} / Ulysses {size}): {groups - data.train_batch_size} of them idle at every step"
        )
    capacity = data.max_token_len_per_gpu * size
    if data.use_dynamic_bsz and capacity < data.max_length:
        lines.append(
            f"data.max_token_len_per_gpu x Ulysses = {data.max_token_len_per_gpu:,} x {size} = {capacity:,} is less "
            f"than data.max_length = {data.max_length:,}: a longer row goes alone, and memory must hold it"
        )
    if model is not None:
        lines.extend(_positions_warning(data.max_length, model))
    return lines


def _positions_warning(max_length: int, model: ModelFacts) -> list[str]:
    limits = [each for each in (model.max_position_embeddings, model.rope_positions) if each is not None]
    if not limits or max_length <= max(limits):
        return []
    if model.rope_type is None:
        meaning = "config.json names no RoPE; with a table of learned positions longer rows fail"
    else:
        meaning = _BEYOND.get(model.rope_type, f"what {model.rope_type} RoPE does there is up to the model")
    return [f"data.max_length = {max_length:,} is beyond the model's {max(limits):,} positions: {meaning}"]


def _ranks(count: int) -> str:
    return f"{count} rank" + ("s" if count > 1 else "")


def _quotient(number: int, by: int) -> str:
    return f"{number / by:.4g}"


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
