"""What each setting costs in memory and time, and the smallest change that makes a run fit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sft_job.config.layout import ulysses_fits
from sft_job.config.schema import JobConfig
from sft_job.plan.cards import Card
from sft_job.plan.estimate import FITS, Estimate, Rows, estimate, largest_micro, planned_setup
from sft_job.plan.setup import RECOMPUTE_VALUES, Ranks, Setup
from sft_job.plan.shape import Shape

Changes = Mapping[str, Any]
RECOMPUTE, SUMS = "model.recompute", "model.fsdp_config.shard_accumulated"
_ROWS, _TOKENS = "data.micro_batch_size_per_gpu", "data.max_token_len_per_gpu"
_ULYSSES, _SHARDS = "ulysses_sequence_parallel_size", "model.fsdp_config.fsdp_size"
_OFFLOAD, _DTYPE, _LORA = "model.fsdp_config.cpu_offload", "model.fsdp_config.model_dtype", "model.lora_rank"
_RESHARD, _FP8, _FROZEN = "model.fsdp_config.reshard_after_forward", "model.fp8", "model.fsdp_config.shard_frozen"
_RANK = 16
_MORE_RANKS, _NODE = 512, 8


@dataclass(frozen=True)
class Case:
    """All that an estimate is made from."""

    config: JobConfig
    shape: Shape
    card: Card
    ranks: Ranks
    rows: Rows

    def estimate(self, changes: Changes | None = None, *, timed: bool = True) -> Estimate:
        """The estimate with some settings changed."""
        config = with_changes(self.config, changes) if changes else self.config
        return estimate(config, self.shape, self.card, self.ranks, self.rows, timed=timed)

    def setup(self) -> Setup:
        """What the settings come to."""
        return planned_setup(self.config, self.shape, self.card, self.ranks, self.rows)


@dataclass(frozen=True)
class Price:
    """What a change of settings does.

    Attributes:
        changes: full path -> value.
        found: the estimate with it.
    """

    changes: Changes
    found: Estimate

    def words(self) -> str:
        """As it is written on a command line."""
        return change_words(self.changes)


@dataclass(frozen=True)
class Remedy:
    """The smallest change that fits.

    Attributes:
        changes: settings to change; empty = only more GPUs.
        ranks: more GPUs than were asked for; None = the same ones.
        note: what it costs besides time; '' = the same result.
        found: the estimate with it.
    """

    changes: Changes
    ranks: Ranks | None
    note: str
    found: Estimate

    def words(self) -> str:
        """Settings as they are pasted on the command line, and GPUs where more are needed."""
        more = [] if self.ranks is None else [f"--gpus {self.ranks.gpus} --nodes {self.ranks.nodes}"]
        return " ".join([*more, change_words(self.changes)]).strip()


def change_words(changes: Changes) -> str:
    """``key=value key=value``."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()
    )


def with_changes(config: JobConfig, changes: Changes) -> JobConfig:
    """A copy with these settings."""
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        place: Any = changed
        for section in sections:
            place = getattr(place, section)
        setattr(place, leaf, value)
    return changed


def _legal_ulysses(shape: Shape, ranks: Ranks) -> list[int]:
    sizes = range(1, ranks.world + 1)
    return [size for size in sizes if ulysses_fits(size, shape.heads, shape.kv_heads, ranks.world)]


def _alternatives(case: Case) -> Iterator[Changes]:
    """Every change that the table shows, one after the other."""
    config, data, model = case.config, case.config.data, case.config.model
    fsdp, offloads = model.fsdp_config, model.fsdp_config.cpu_offload or model.fsdp_config.offload_params
    for level in RECOMPUTE_VALUES:
        if model.recompute != level:
            yield {RECOMPUTE: level}
    if data.use_dynamic_bsz:
        yield {_TOKENS: max(1, data.max_token_len_per_gpu // 2)}
        yield {_TOKENS: data.max_token_len_per_gpu * 2}
    elif config.use_remove_padding:
        if data.micro_batch_size_per_gpu > 1:
            yield {_ROWS: data.micro_batch_size_per_gpu // 2}
        if data.micro_batch_size_per_gpu < data.train_batch_size:
            yield {_ROWS: data.micro_batch_size_per_gpu * 2}
    for size in _legal_ulysses(case.shape, case.ranks):
        if size != config.ulysses_sequence_parallel_size:
            yield {_ULYSSES: size}
    if case.card.fp8 and fsdp.dtype in (None, "bf16"):
        yield from ({_FP8: recipe} for recipe in ("tensorwise", "rowwise") if model.fp8 == "none")
    if model.fp8 != "none":
        yield {_FP8: "none"}
    if model.lora_rank == 0 and model.lora_adapter_path is None:
        yield {_LORA: _RANK}
    yield {_OFFLOAD: not offloads}
    if fsdp.model_dtype == "fp32":
        yield {_DTYPE: "bf16"}
    elif fsdp.model_dtype == "bf16":
        yield {_DTYPE: "fp32"}
    if case.ranks.world > 1:
        yield {_RESHARD: not fsdp.reshard_after_forward}
        sums = _sums_shards(case)
        if sums is not None:
            yield {SUMS: not sums}
        if fsdp.fsdp_size == -1 and case.ranks.world > 2:
            yield {_SHARDS: case.ranks.gpus if case.ranks.nodes > 1 else case.ranks.world // 2}
        elif fsdp.fsdp_size not in (-1, case.ranks.world):
            yield {_SHARDS: -1}


def _sums_shards(case: Case) -> bool | None:
    """Whether gradients add up in each rank's shard alone; None where nothing adds up, or there is one shard."""
    setup = case.setup()
    return setup.sums_shards if setup.accumulates and setup.shards > 1 else None


def prices(case: Case) -> list[Price]:
    """Each setting that matters, changed by itself."""
    return [Price(changes, case.estimate(changes)) for changes in _alternatives(case)]


def _smaller(case: Case) -> list[tuple[int, list[Changes]]]:
    """For each setting its values that need less memory, with the rank of what they change.

    The rank of a change: 0 gives the same result; 1 is slow (weights in host memory); 2 is less exact; 3 trains
    something else (adapters).
    """
    config, data, model = case.config, case.config.data, case.config.model
    fsdp = model.fsdp_config
    choices: list[tuple[int, list[Changes]]] = []
    if model.recompute == "auto" and not model.enable_gradient_checkpointing:
        choices.append((0, [{"model.enable_gradient_checkpointing": True}]))
    elif model.recompute == "auto":
        choices.append((0, [{RECOMPUTE: value} for value in RECOMPUTE_VALUES[2:]]))
    else:
        lower = RECOMPUTE_VALUES[RECOMPUTE_VALUES.index(model.recompute) + 1 :]
        choices.append((0, [{RECOMPUTE: value} for value in lower]))
    if data.use_dynamic_bsz:
        sizes = [data.max_token_len_per_gpu // 2**n for n in range(1, 6)]
        choices.append((0, [{_TOKENS: size} for size in sizes if size >= 256]))
    elif config.use_remove_padding:
        choices.append((0, [{_ROWS: size} for size in _other_rows(case)]))
    now = config.ulysses_sequence_parallel_size
    choices.append((0, [{_ULYSSES: size} for size in _legal_ulysses(case.shape, case.ranks) if size > now]))
    if 0 < fsdp.fsdp_size < case.ranks.world:
        choices.append((0, [{_SHARDS: -1}]))
    if model.lora_rank and fsdp.shard_frozen != True and case.ranks.world > 1:  # noqa: E712  "auto" is no bool
        choices.append((0, [{_FROZEN: True}]))
    if _sums_shards(case) is False:
        choices.append((0, [{SUMS: True}]))
    if not (fsdp.cpu_offload or fsdp.offload_params):
        choices.append((1, [{_OFFLOAD: True}]))
    if fsdp.model_dtype != "bf16":
        choices.append((2, [{_DTYPE: "bf16"}]))
    if model.lora_rank == 0 and model.lora_adapter_path is None:
        choices.append((3, [{_LORA: _RANK}]))
    return [choice for choice in choices if choice[1]]


def _other_rows(case: Case) -> list[int]:
    """Fewer rows at once; or all of a step: nothing is then added up in fp32 over micro-batches."""
    now, batch = case.config.data.micro_batch_size_per_gpu, case.config.data.train_batch_size
    groups = max(1, case.ranks.world // case.config.ulysses_sequence_parallel_size)
    fewer = sorted({max(1, now // 2**n) for n in range(1, 8)} - {now}, reverse=True)
    at_once = -(-batch // groups)
    return [*fewer, *([at_once] if at_once > now else [])]


_NOTES = {
    0: "",
    1: "weights and optimizer states in host memory: slower",
    2: "weights and optimizer states are less exact",
    3: "trains adapters instead of all weights",
}


def _combinations(case: Case) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Changes with their ranks, those that change least first."""
    choices = _smaller(case)
    options: list[list[tuple[int, Changes]]] = [
        [(0, {}), *((rank, each) for each in values)] for rank, values in choices
    ]
    found: list[tuple[tuple[int, ...], dict[str, Any]]] = []
    for picked in itertools.product(*options):
        ranks = tuple(sorted((rank for rank, each in picked if each), reverse=True))
        if ranks:
            found.append((ranks, {key: value for _, each in picked for key, value in each.items()}))
    return sorted(found, key=lambda each: (sum(each[0]) and max(each[0]), sum(each[0]), len(each[0])))


def smallest_change(case: Case, *, more_ranks: bool = True) -> Remedy | None:
    """The change that fits and costs least: result first, then the number of settings, then time.

    Args:
        case: what does not fit as it is.
        more_ranks: also look at more GPUs where no setting helps.
    """
    group: tuple[int, int, int] | None = None
    fitting: list[Changes] = []
    for ranks, changes in _combinations(case):
        this = (max(ranks), sum(ranks), len(ranks))
        if fitting and this != group:
            break
        if case.estimate(changes, timed=False).verdict == FITS:
            group = this
            fitting.append(changes)
    if fitting:
        timed = [(changes, case.estimate(changes)) for changes in fitting]
        changes, found = min(timed, key=lambda each: _rate(each[1]))
        return Remedy(changes, None, _NOTES[group[0]] if group else "", found)
    if more_ranks:
        return _more_gpus(case)
    return None


def _rate(found: Estimate) -> float:
    return found.step.seconds / max(1.0, found.step.tokens) if found.step else 0.0


def _more_gpus(case: Case) -> Remedy | None:
    """More GPUs with the same result where that is enough, else with settings that change it too."""
    sizes: list[Ranks] = []
    gpus, nodes = case.ranks.gpus, case.ranks.nodes
    while gpus * nodes * 2 <= _MORE_RANKS:
        gpus, nodes = (gpus * 2, nodes) if gpus < _NODE else (gpus, nodes * 2)
        sizes.append(replace(case.ranks, gpus=gpus, nodes=nodes))
    second: Remedy | None = None
    for ranks in sizes:
        more = Case(case.config, case.shape, case.card, ranks, case.rows)
        found = more.estimate()
        if found.verdict == FITS:
            return Remedy({}, ranks, "more GPUs", found)
        remedy = smallest_change(more, more_ranks=False)
        if remedy is None:
            continue
        note = "; ".join(filter(None, ("more GPUs", remedy.note)))
        remedy = Remedy(remedy.changes, ranks, note, remedy.found)
        if note == "more GPUs":
            return remedy
        second = second or remedy
    return second


def longest_that_fits(case: Case) -> int | None:
    """Tokens of the longest document that fits alone in a micro-batch with everything else as it is."""
    _, documents = largest_micro(case.config, case.rows)
    low, high, batch = 0, max(documents) * 2, case.config.data.train_batch_size

    def fits(length: int) -> bool:
        rows = Rows(np.full(batch, length, np.int32), None, True, length, case.rows.trained, "")
        config = with_changes(case.config, {_ROWS: 1, _TOKENS: 1})
        return estimate(config, case.shape, case.card, case.ranks, rows, timed=False).verdict == FITS

    while fits(high) and high < 2**24:
        low, high = high, high * 2
    while high - low > max(256, high // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low // 256 * 256 or None
