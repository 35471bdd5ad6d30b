"""From settings and lengths to a verdict: does it fit, how long does a step take, how long the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sft_job.config.schema import JobConfig
from sft_job.config.shares import LARGE_INPUTS, recovers, torch_resets
from sft_job.data.heaviest import accumulates, heaviest_rows
from sft_job.data.packing import pack_settings, plan_batch
from sft_job.metrics.flops import model_flops
from sft_job.plan.activations import ATTENTION, FULL, NONE, OFFLOAD
from sft_job.plan.cards import Card
from sft_job.plan.footprint import STATE_COPY, Footprint, Micro, footprint, least_recompute, levels_of
from sft_job.plan.host import holds, spared, within
from sft_job.plan.seconds import Parts, Work, joined, micro_seconds, step_end
from sft_job.plan.setup import GIB, Ranks, Setup, setup_of
from sft_job.plan.shape import Shape

FITS, TIGHT, TOO_LARGE = "fits", "tight", "does not fit"
MARGIN = 0.08
"""Share of the memory that must be left free before a plan is said to fit: how far the model may be off."""
_AUTO_MARGIN = 0.05
"""Share that ``model.recompute: auto`` leaves free at its first try, as ``fitting`` has it."""
_BATCHES, _ROUNDS = 4, 16
_MANY = 20_000
_START_SECONDS = 60.0
_DISK = 1.0e9
"""Bytes a second that a rank writes of its checkpoint: 42.6 GiB in 43 s (H200 host, shared memory as the disk)."""


@dataclass(frozen=True)
class Rows:
    """Lengths of the rows that a run trains on.

    Attributes:
        lengths: tokens of each row: of all, or of a sample.
        total: rows of an epoch; None where that is not known.
        exact: they are the lengths of all rows; False = a sample, and longer rows than it shows may come.
        longest: tokens of the longest row that may come.
        trained: share of the tokens that have a target.
        source: where this comes from, for people.
        validation: rows of validation.
        heavy: of many lengths those that the largest micro-batch is looked for among; None = all.
        several: a step has several micro-batches, of which the lengths show one.
    """

    lengths: npt.NDArray[np.int32]
    total: int | None
    exact: bool
    longest: int
    trained: float
    source: str
    validation: int = 0
    heavy: npt.NDArray[np.int32] | None = None
    several: bool = False

    @classmethod
    def of_all(cls, lengths: npt.NDArray[np.int32], total: int, trained: float, source: str, validation: int) -> Rows:
        """Rows whose lengths are all known; of very many the longest, and a selection, stand for all."""
        longest = int(lengths.max())
        if len(lengths) <= _MANY:
            return cls(lengths, total, True, longest, trained, source, validation)
        ascending = np.sort(lengths)
        rest = ascending[: -_MANY // 2]
        heavy = np.concatenate([rest[:: -(-len(rest) // (_MANY // 2))], ascending[-_MANY // 2 :]])
        drawn = np.random.default_rng(0).choice(lengths, _MANY, replace=False)
        return cls(drawn, total, True, longest, trained, source, validation, heavy)


@dataclass(frozen=True)
class Step:
    """A mean optimizer step.

    Attributes:
        parts: seconds of the slowest rank, by what they are spent on.
        seconds: their sum.
        tokens: real tokens of a global batch.
        micro_batches: of each rank.
        flops: model FLOPs of a global batch.
    """

    parts: Parts
    seconds: float
    tokens: float
    micro_batches: float
    flops: float


@dataclass(frozen=True)
class Run:
    """The whole run, in seconds. ``total`` adds up steps, validation, saves and the start."""

    steps: int
    stepping: float
    validating: float
    saving: float
    starting: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.stepping + self.validating + self.saving + self.starting


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        setup: its settings as bytes and counts.
        micro: its largest micro-batch.
        memory: with the recomputation that it would choose, or has set.
        least: bytes on the device with the least that it can get along with: by this it fits or not.
        usable: bytes that its tensors can have.
        verdict: fits, tight or does not fit, by both memories where that of the host is known.
        host_least: bytes of host memory of a node with the least on the device.
        step: None where time was not asked for.
        run: None where the number of steps is not known.
    """

    setup: Setup
    micro: Micro
    memory: Footprint
    least: float
    usable: float
    verdict: str
    host_least: float
    step: Step | None = None
    run: Run | None = None


def largest_micro(config: JobConfig, rows: Rows) -> tuple[Micro, list[int]]:
    """The largest micro-batch as a rank of its group sees it, and the tokens of its documents."""
    settings, batch = pack_settings(config), config.data.train_batch_size
    lengths = rows.lengths if rows.heavy is None else rows.heavy
    if not rows.exact:
        # A sample does not show the longest rows; several of them may meet.
        together = 1 if not settings.pack else settings.rows or 1
        lengths = np.append(lengths, np.full(min(together, batch), rows.longest, np.int32)).astype(np.int32)
    documents = lengths[heaviest_rows(lengths, settings, batch)].tolist()
    tokens = math.ceil(sum(documents) / config.ulysses_sequence_parallel_size)
    return Micro(tokens, math.ceil(tokens * rows.trained), max(documents)), documents


def _accumulates(config: JobConfig, rows: Rows, dp: int) -> bool:
    batch, lengths = config.data.train_batch_size, rows.lengths if rows.heavy is None else rows.heavy
    if rows.several:
        return True
    if not rows.exact and (rows.total is None or rows.total > len(lengths)):
        lengths = np.full(batch, max(rows.longest, 1), dtype=np.int32)
    return accumulates(lengths, pack_settings(config), batch, dp)


def planned_setup(config: JobConfig, shape: Shape, card: Card, ranks: Ranks, rows: Rows) -> Setup:
    """What a run's settings come to with these rows; the arguments are those of ``estimate``."""
    dp = max(1, ranks.world // config.ulysses_sequence_parallel_size)
    return setup_of(config, shape, card, ranks, accumulates=_accumulates(config, rows, dp))


def estimate(config: JobConfig, shape: Shape, card: Card, ranks: Ranks, rows: Rows, *, timed: bool = True) -> Estimate:
    """What a run with these settings will take.

    Args:
        config: its settings, valid for these ranks.
        shape: of its model.
        card: of every rank.
        ranks: of the run.
        rows: that it trains on.
        timed: also say how long it takes.
    """
    setup = planned_setup(config, shape, card, ranks, rows)
    micro, _ = largest_micro(config, rows)
    levels = levels_of(NONE if setup.recompute == "auto" else setup.recompute, shape.layers)
    memory = footprint(shape, setup, micro, levels)
    usable = card.memory * GIB - memory.outside
    last = memory
    if setup.recompute == "auto":
        room = usable * (1 - _AUTO_MARGIN)
        memory = least_recompute(shape, setup, micro, room)
        last = within(shape, setup, micro, _last_resort(shape, setup, micro, usable))
        if memory.peak > room:
            memory = last
    memory, last, host = spared(memory, ranks.host), spared(last, ranks.host), ranks.host
    if last.peak <= usable * (1 - MARGIN) and holds(memory, host, MARGIN) and holds(last, host, MARGIN):
        verdict = FITS
    else:
        verdict = TIGHT if last.peak <= usable and holds(memory, host) and holds(last, host) else TOO_LARGE
    found = Estimate(setup, micro, memory, last.peak, usable, verdict, last.host_bytes)
    if not timed:
        return found
    step = _step(config, shape, card, found, rows)
    return Estimate(**{**found.__dict__, "step": step, "run": _run(config, shape, card, found, rows, step)})


def _last_resort(shape: Shape, setup: Setup, micro: Micro, usable: float) -> Footprint:
    """What ``auto`` falls back to, as ``fitting`` does.

    Where a run cannot go on after it ran out of memory (several ranks, older torch), what is measured first must fit,
    and that is the plan with inputs in host memory only where it spares much.
    """
    moved = footprint(shape, setup, micro, levels_of(OFFLOAD, shape.layers))
    whole = footprint(shape, setup, micro, levels_of(FULL, shape.layers))
    goes_on = recovers(setup.ranks.world, managed=_managed(setup), resets=torch_resets())
    if goes_on or shape.layers < 2 or whole.peak - moved.peak >= LARGE_INPUTS * usable:
        return moved
    return footprint(shape, setup, micro, (FULL,) * (shape.layers - 2) + (ATTENTION, NONE))


def _managed(setup: Setup) -> bool:
    """FSDP holds some parameter: of LoRA the adapters, unless they are computed with as they are."""
    if not setup.rank:
        return setup.managed
    return setup.offload or setup.accumulates or max(4, setup.storage) != setup.compute


def _step(config: JobConfig, shape: Shape, card: Card, found: Estimate, rows: Rows) -> Step:
    """Mean over some global batches, drawn from the lengths."""
    setup, settings = found.setup, pack_settings(config)
    generator = np.random.default_rng(0)
    count = len(rows.lengths)
    batch = config.data.train_batch_size if not rows.exact else min(config.data.train_batch_size, count)
    end = step_end(shape, card, setup)
    flat = bool((rows.lengths == rows.lengths[0]).all())
    draws = 1 if flat or batch == count else _BATCHES
    total: Parts = {}
    tokens, micros, flops = 0.0, 0.0, 0.0
    for _ in range(draws):
        ids = generator.choice(count, batch, replace=batch > count)
        plan = plan_batch(rows.lengths, ids, setup.dp, settings)
        rounds = len(plan[0])
        taken = range(0, rounds, max(1, math.ceil(rounds / _ROUNDS)))
        each = [_round(shape, card, setup, [plan[dp][at] for dp in range(setup.dp)], rows, found) for at in taken]
        parts = joined([{k: v * rounds / len(each) for k, v in one.items()} for one in each], end)
        for name, seconds in parts.items():
            total[name] = total.get(name, 0.0) + seconds / draws
        lengths = rows.lengths[ids].tolist()
        tokens += sum(lengths) / draws
        micros += rounds / draws
        flops += model_flops(shape.flops(), lengths, frozen_weights=setup.rank > 0) / draws
    return Step(total, sum(total.values()), tokens, micros, flops)


def _round(
    shape: Shape, card: Card, setup: Setup, micros: list[list[int]], rows: Rows, found: Estimate
) -> dict[str, float]:
    """The slowest of the micro-batches that the ranks work on at the same time."""
    slowest: dict[str, float] = {}
    # Ranks were dealt alike ones, the costliest by the packing's own measure among the first.
    for ids in sorted(micros, key=lambda ids: -float(np.square(rows.lengths[ids].astype(float)).sum()))[:2]:
        documents = rows.lengths[ids].tolist()
        tokens = max(1, math.ceil(sum(documents) / setup.ulysses))
        work = Work(tokens, documents, tokens * rows.trained)
        parts = micro_seconds(shape, card, setup, work, found.memory.levels)
        if sum(parts.values()) > sum(slowest.values()):
            slowest = parts
    return slowest


def _run(config: JobConfig, shape: Shape, card: Card, found: Estimate, rows: Rows, step: Step) -> Run | None:
    trainer, setup = config.trainer, found.setup
    per_epoch = None if rows.total is None else math.ceil(rows.total / config.data.train_batch_size)
    steps = trainer.total_training_steps
    if steps is None:
        if per_epoch is None:
            return None
        steps = per_epoch * trainer.total_epochs
    stepping = steps * step.seconds
    # A forward alone, and nothing is computed again.
    rate = step.tokens / max(1e-9, (step.seconds - step.parts.get("optimizer", 0.0)) / 3)
    mean = float(rows.lengths.mean())
    validations = 0.0
    if rows.validation:
        freq = trainer.test_freq
        validations = 1.0 + (steps / freq if isinstance(freq, int) and freq > 0 else 0.0)
        if freq == "after_each_epoch" and per_epoch:
            validations = max(1.0, steps / per_epoch)
    trained = setup.adapter_parameters(shape.layers) if setup.rank else shape.parameters
    state = 3.0 * setup.storage * trained / setup.shards
    saves = steps / trainer.save_freq if trainer.save_freq > 0 else 0.0
    if trainer.recovery_minutes > 0:
        saves += stepping / 60 / trainer.recovery_minutes
    stall = state / (card.host * 1e9) + 0.5 if STATE_COPY in found.memory.host else state / _DISK
    last = state / _DISK + setup.storage * shape.parameters / _DISK
    return Run(steps, stepping, validations * rows.validation * mean / rate, saves * stall + last, _START_SECONDS)
