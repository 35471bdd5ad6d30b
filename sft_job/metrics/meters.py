"""What a step cost: the fields of one line of ``metrics.jsonl``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

GIB = 2**30
Record = dict[str, Any]


@dataclass
class _Interval:
    """Sums since the last record."""

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    padding: float = 0.0
    imbalance: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0


class StepMeter:
    """Collects steps and makes a record of those since the last one; its rates are means over them.

    Only the time between ``begin_step`` and ``end_step`` counts, so validation and checkpoints do not slow the
    rates down. ``end_step`` must come when the device has finished the step: after its loss was read.

    Args:
        world_size: ranks that the step's tokens and FLOPs are shared between.
        peak_flops: peak of one device in FLOP/s; None where it is unknown: then ``perf/mfu`` is null.
        tokens: real tokens trained on before, when the run goes on.
        supervised_tokens: the same for tokens with a loss.
        clock: seconds, only ever going up.
    """

    def __init__(
        self,
        *,
        world_size: int,
        peak_flops: float | None,
        tokens: int = 0,
        supervised_tokens: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size = {world_size}: a run has at least one rank")
        self.tokens = tokens
        self.supervised_tokens = supervised_tokens
        self._world_size = world_size
        self._peak_flops = peak_flops
        self._clock = clock
        self._interval = _Interval()
        self._began: float | None = None
        self._waited = 0.0

    def begin_step(self) -> None:
        """A step starts now. A step that was begun and not ended (a stop) is forgotten."""
        self._began = self._clock()
        self._waited = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent inside is the current step's waiting for its batch."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def end_step(
        self, *, tokens: int, supervised_tokens: int, flops: float, padding: float = 0.0, imbalance: float = 0.0
    ) -> None:
        """The step is over.

        Args:
            tokens: real tokens of the global batch, prompts included, padding not.
            supervised_tokens: tokens with a loss in the global batch.
            flops: model FLOPs of the global batch, see ``flops.model_flops``.
            padding: share of padding in the tokens computed on.
            imbalance: share of time that ranks wait for one another, by the rows' estimated costs.

        Raises:
            RuntimeError: no step was begun.
        """
        if self._began is None:
            raise RuntimeError("end_step without begin_step")
        self._interval.seconds += self._clock() - self._began
        self._began = None
        self._interval.waited += self._waited
        self._interval.steps += 1
        self._interval.tokens += tokens
        self._interval.flops += flops
        self._interval.padding += padding
        self._interval.imbalance += imbalance
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens

    def record(
        self,
        *,
        step: int,
        epoch: float,
        loss: float | None,
        lr: float,
        grad_norm: float | None,
        peak_bytes: int | None,
    ) -> Record:
        """One line of ``metrics.jsonl``; the next record's interval starts here.

        Args:
            step: optimizer steps done.
            epoch: passes over the data done, as a fraction.
            loss: mean loss of a supervised token of this step; None where it was not finite.
            lr: learning rate that the step was taken with.
            grad_norm: global gradient norm before clipping; None likewise.
            peak_bytes: most device memory in use so far; None where there is no such figure.

        Raises:
            RuntimeError: no step has ended since the last record.
        """
        interval, self._interval = self._interval, _Interval()
        if interval.steps == 0:
            raise RuntimeError("record without a step since the last one")
        seconds = max(interval.seconds, 1e-9)  # a clock too coarse to see the step
        flops_per_second = interval.flops / seconds / self._world_size
        return {
            "step": step,
            "epoch": epoch,
            "train/loss": loss,
            "train/lr": lr,
            "train/grad_norm": grad_norm,
            "train/tokens": self.tokens,
            "train/supervised_tokens": self.supervised_tokens,
            "perf/tokens_per_second_per_gpu": interval.tokens / seconds / self._world_size,
            "perf/model_tflops_per_gpu": flops_per_second / 1e12,
            "perf/mfu": flops_per_second / self._peak_flops if self._peak_flops else None,
            "perf/step_seconds": interval.seconds / interval.steps,
            "perf/data_wait_seconds": interval.waited / interval.steps,
            "data/padding_fraction": interval.padding / interval.steps,
            "data/cost_imbalance": interval.imbalance / interval.steps,
            "memory/peak_gib": None if peak_bytes is None else peak_bytes / GIB,
        }


def source_record(sources: Mapping[str, tuple[int, int, float]]) -> Record:
    """What a run has seen of its named data sets so far.

    Args:
        sources: name -> real tokens, tokens with a loss, passes over the set's rows.
    """
    record: Record = {}
    for name, (tokens, supervised_tokens, epoch) in sources.items():
        record[f"data/{name}/tokens"] = tokens
        record[f"data/{name}/supervised_tokens"] = supervised_tokens
        record[f"data/{name}/epoch"] = epoch
    return record


def validation_record(step: int, loss: float, by_name: Mapping[str, float] | None = None) -> Record:
    """A validation line: ``val/loss`` over all rows, and ``val/<name>/loss`` where there are named sets."""
    named = {f"val/{name}/loss": value for name, value in (by_name or {}).items()}
    return {"step": step, "val/loss": loss, **named}
