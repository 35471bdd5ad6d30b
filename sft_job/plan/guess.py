"""What the plan says to a run that has begun: can everything be kept, and what would fit where memory ran out?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sft_job.config.schema import JobConfig
from sft_job.plan.activations import ATTENTION, FULL, NONE, OFFLOAD
from sft_job.plan.cards import CARDS
from sft_job.plan.estimate import Rows, largest_micro
from sft_job.plan.footprint import PROCESS, footprint, levels_of
from sft_job.plan.prices import SUMS, Case, change_words, smallest_change, with_changes
from sft_job.plan.setup import GIB, Ranks
from sft_job.plan.shape import KNOWN, read_shape

_SURE = 0.12
"""Share of the memory that must stay free by the plan before the first rehearsal keeps everything."""


def _case(
    config: JobConfig,
    model: Mapping[str, Any],
    ranks: Ranks,
    documents: Sequence[int],
    usable: float,
    *,
    accumulates: bool = False,
) -> Case:
    lengths = np.array(documents, dtype=np.int32)
    rows = Rows(lengths, None, True, int(lengths.max()), 1.0, "the batch", several=accumulates)
    card = replace(CARDS["h200"], memory=usable / GIB)
    return Case(config, read_shape(model), card, ranks, rows)


def keeps_everything(
    config: JobConfig,
    model: Mapping[str, Any],
    ranks: Ranks,
    documents: Sequence[int],
    usable: float,
    *,
    accumulates: bool,
) -> bool:
    """Whether the largest micro-batch surely fits with nothing computed again.

    Of several ranks none recovers from a rehearsal that ran out of memory, and plans for them were not measured: False.

    Args:
        config: the run's settings.
        model: its ``config.json``.
        ranks: of the run.
        documents: tokens of each document of the largest micro-batch.
        usable: bytes of device memory that tensors can have.
        accumulates: a step may have several micro-batches.
    """
    if ranks.world > 1 or not documents or model.get("model_type") not in KNOWN:
        return False
    if model.get("attn_logit_softcapping"):  # perhaps by the plain formula, which keeps all scores
        return False
    case = _case(config, model, ranks, documents, usable, accumulates=accumulates)
    micro, _ = largest_micro(config, case.rows)
    levels = (NONE,) * case.shape.layers
    return footprint(case.shape, case.setup(), micro, levels).peak <= usable * (1 - _SURE)


def planned_remedy(
    config: JobConfig,
    model: Mapping[str, Any],
    ranks: Ranks,
    documents: Sequence[int],
    usable: float,
    *,
    accumulates: bool,
    sums_shards: bool,
    host: int | None = None,
) -> str:
    """A line on the smallest change that fits, by the plan; empty where it knows none.

    Args:
        config: settings of a run that did not fit.
        model: its ``config.json``.
        ranks: of the run.
        documents: tokens of each document of the micro-batch that did not fit.
        usable: bytes of device memory that tensors can have.
        accumulates: a step may have several micro-batches.
        sums_shards: their gradients add up in each rank's shard alone.
        host: bytes that this node's memory has left beside the run's processes; None = unknown.
    """
    if not documents or model.get("model_type") not in KNOWN:
        return ""
    if host is not None:
        ranks = replace(ranks, host=host + PROCESS * ranks.gpus)  # those are running
    config = with_changes(config, {SUMS: sums_shards})  # what auto chose, whatever memory is assumed below
    case = _case(config, model, ranks, documents, usable, accumulates=accumulates)
    # It did not fit, whatever the plan says of it: what is advised must need clearly less.
    least = case.estimate(timed=False).least
    case = _case(config, model, ranks, documents, min(usable, least), accumulates=accumulates)
    remedy = smallest_change(case)
    if remedy is None:
        return ""
    words = change_words(remedy.changes)
    if remedy.ranks is not None:
        words = f"{remedy.ranks.world} GPUs instead of {ranks.world}{' with ' if words else ''}{words}"
    memory = remedy.found.memory
    costs = [f"about {memory.peak / GIB:.0f} GiB", f"{memory.host_bytes / GIB:.0f} GiB of host memory on a node"]
    note = remedy.note.removeprefix("more GPUs").removeprefix("; ")
    text = "; ".join(filter(None, (", ".join(costs), note)))
    return f"{words} is the smallest change that fits by `sft-job plan` ({text})"


def needs_above_offload(
    config: JobConfig,
    model: Mapping[str, Any],
    ranks: Ranks,
    documents: Sequence[int],
    usable: float,
    *,
    accumulates: bool,
) -> tuple[int, int] | None:
    """Bytes of device memory that other plans need above one with inputs in host memory; None where that is not known.

    Of full recomputation, and of the plan that measures (the last two blocks keep more). Not a sum of what is held, for
    not all of it is there at the same time. The arguments are those of ``keeps_everything``.
    """
    if not documents or model.get("model_type") not in KNOWN:
        return None
    case = _case(config, model, ranks, documents, usable, accumulates=accumulates)
    micro, _ = largest_micro(config, case.rows)
    layers, setup = case.shape.layers, case.setup()
    if layers < 2:
        return None
    plans = levels_of(OFFLOAD, layers), levels_of(FULL, layers), (FULL,) * (layers - 2) + (ATTENTION, NONE)
    moved, full, probe = (footprint(case.shape, setup, micro, levels).peak for levels in plans)
    return int(full - moved), int(probe - moved)
