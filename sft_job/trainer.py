"""The loop: steps, validation, checkpoints, and an end at a step's boundary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sft_job.checkpoint.checkpointer import Checkpointer
from sft_job.checkpoint.policy import Purpose, SaveTiming
from sft_job.checkpoint.state import RunState, SourceState
from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode
from sft_job.data.batches import PackedBatch, StepBatch
from sft_job.data.mixture import SourceCounts
from sft_job.errors import JobError
from sft_job.evaluate import ValidationLoss
from sft_job.forensics import BadStep, BadSteps
from sft_job.metrics.loggers import Loggers
from sft_job.metrics.meters import StepMeter, source_record, validation_record
from sft_job.model.compilations import compilations, given_up
from sft_job.optimizer import ClippingAdamW, gradient_norm, learning_rate, scale_gradients, set_learning_rate
from sft_job.parallel.accumulation import Accumulation
from sft_job.pulse import SAVING, VALIDATING
from sft_job.runtime import HostCopy, Runtime, StopWish, peak_memory, seed_step

AFTER_EACH_EPOCH = "after_each_epoch"


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, the same on every rank.

    Attributes:
        loss: mean cross-entropy over the supervised tokens of the global batch.
        grad_norm: before clipping.
        lr: the step's learning rate.
        stop: some rank was asked to stop.
        recovery_due: it is time for a recovery checkpoint.
        saves_over: ranks whose save in flight is over.
        bad: loss or gradient norm is not finite, and the weights were left as they were.
    """

    loss: float
    grad_norm: float
    lr: float
    stop: bool
    recovery_due: bool
    saves_over: float
    bad: BadStep | None = None


@dataclass(frozen=True)
class Ending:
    """How a run ended: done, or stopped at a step's boundary with a checkpoint saved."""

    stopped: bool
    state: RunState


@dataclass(frozen=True)
class Schedule:
    """When things happen, in optimizer steps done."""

    total_steps: int
    steps_per_epoch: int
    save_freq: int
    test_freq: int | str

    def saves_at(self, step: int) -> bool:
        """A kept checkpoint is due; the last step's is the trainer's own matter."""
        return self.save_freq > 0 and step % self.save_freq == 0

    def tests_at(self, step: int) -> bool:
        """Validation is due; that of the last step is the trainer's own matter."""
        if self.test_freq == AFTER_EACH_EPOCH:
            return step % self.steps_per_epoch == 0
        return isinstance(self.test_freq, int) and self.test_freq > 0 and step % self.test_freq == 0


class Trainer:
    """Trains from a state to the end of the schedule. It knows nothing of LoRA, attention backends or launchers.

    Args:
        config: the run's settings.
        runtime: this rank.
        module: sharded; its forward gives the loss sum of a packed batch over a divisor.
        optimizer: over the module's parameters.
        shard_group: the ranks that together hold one copy of them.
        accumulation: how their gradients add up over micro-batches.
        schedule: when things happen.
        state: where the run stands.
        checkpointer: saves.
        evaluate: validation losses, None from it where a stop cut it short (a collective call); None where there is
            no validation data.
        meter: token counts and speed.
        flops: model FLOPs of a global batch.
        bad_steps: keeps what is known of a step that cannot be taken.
        logger: takes records on rank 0, None elsewhere.
        stop: this rank's wish to stop.
    """

    def __init__(
        self,
        config: JobConfig,
        runtime: Runtime,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        shard_group: dist.ProcessGroup,
        accumulation: Accumulation,
        schedule: Schedule,
        state: RunState,
        checkpointer: Checkpointer,
        evaluate: Callable[[], ValidationLoss | None] | None,
        meter: StepMeter,
        flops: Callable[[StepBatch], float],
        bad_steps: BadSteps,
        logger: Loggers | None,
        stop: StopWish,
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._module = module
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = optimizer
        self._shard_group = shard_group
        self.accumulation = accumulation
        """How gradients add up over micro-batches."""
        self._reshard = config.model.fsdp_config.reshard_after_forward
        self.schedule = schedule
        """When things happen."""
        self._state = state
        self._checkpointer = checkpointer
        self._evaluate = evaluate
        self._meter = meter
        self._flops = flops
        self._bad_steps = bad_steps
        self._logger = logger
        self._stop = stop
        self._step_began = time.monotonic()
        self._last_save: SaveTiming | None = None
        self._told_uncompiled = False
        self.working_on: PackedBatch | None = None
        """The micro-batch that is, or was last, computed on: what a message on memory names."""

    @property
    def state(self) -> RunState:
        """Where the run stands."""
        return self._state

    def run(self, batches: Iterable[StepBatch]) -> Ending:
        """Go through the batches, one optimizer step each; they start at the state's step."""
        begun_at = self._state.step
        if begun_at:
            # A save before the next step says the rate of the last one, as if the run had not been interrupted.
            self._set_rate(begun_at - 1)
        if 0 < begun_at < self.schedule.total_steps:
            # A stop may have left the kept checkpoint or the validation of the step that it saved at.
            if self.schedule.saves_at(begun_at) and self._checkpointer.owes_kept(begun_at):
                self._save(Purpose.KEPT)
            if self.schedule.tests_at(begun_at) and not self._validate():
                return self._stopped()
        for batch in self._timed(batches):
            result = self.train_step(batch)
            self._advance(batch, result)
            self._log_step(result)
            step = self._state.step
            if result.stop:
                return self._stopped()  # what is due at this step can wait for the next start, a scheduler cannot
            if step == self.schedule.total_steps:
                break
            self._checkpointer.collect(result.saves_over)
            # Saved before it is validated: a validation may take longer than a scheduler waits.
            if self.schedule.saves_at(step):
                self._save(Purpose.KEPT)
            elif result.recovery_due:
                self._save(Purpose.RECOVERY)
            if self.schedule.tests_at(step) and not self._validate():
                return self._stopped()
        return self._finish()

    def _finish(self) -> Ending:
        """After the last step: the export first, then validation; a stop in it leaves only that to the next start."""
        self._save(Purpose.LAST)
        if not self._validate():
            return self._stopped()
        self._checkpointer.finish(self._state.step)
        return Ending(False, self._state)

    def _stopped(self) -> Ending:
        with self._runtime.pulse.phase(SAVING):
            self._state = self._checkpointer.stop(self._state, due=self.schedule.saves_at(self._state.step))
        return Ending(True, self._state)

    def _timed(self, batches: Iterable[StepBatch]) -> Iterator[StepBatch]:
        """The batches, each step's clock started before its batch is waited for."""
        iterator = iter(batches)
        while True:
            self._meter.begin_step()
            self._step_began = time.monotonic()
            with self._meter.waiting_for_data():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def train_step(self, batch: StepBatch) -> StepResult:
        """One optimizer step over a global batch (a collective call).

        Raises:
            JobError: loss or gradients are not finite, and ``trainer.non_finite`` or its cap says stop (87). The
                weights are then as before the step.
        """
        seed_step(self._config.trainer.seed, batch.step, self._runtime.rank)
        lr = self._set_rate(batch.step)
        loss = self.accumulate(batch.micro_batches, batch.num_targets)
        norm = gradient_norm(self._parameters, self._shard_group)
        # From page-locked memory: a copy that the host need not wait for.
        flags = torch.tensor(
            [float(self._stop.wished), *self._checkpointer.flags()], dtype=loss.dtype, pin_memory=loss.is_cuda
        )
        flags = torch.cat([loss[None], flags.to(loss.device, non_blocking=True)])
        dist.all_reduce(flags)
        seen = HostCopy(torch.cat([flags, norm.to(flags)[None]]))
        clip = self._config.optim.clip_grad
        queued = self._optimizer if isinstance(self._optimizer, ClippingAdamW) else None
        if queued is not None:
            # Decided on the device, which so has work while the host waits and prepares the next step.
            queued.step(loss=flags[0], norm=norm, clip=clip)
        # The step's only wait for the device.
        total, stops, recovery, saves_over, grad_norm = seen.tolist()
        bad: BadStep | None = None
        if not (math.isfinite(total) and math.isfinite(grad_norm)):
            if queued is not None:
                queued.take_back()
            bad = self._not_taken(batch, total, grad_norm)
        elif queued is None:
            if 0.0 < clip < grad_norm:
                scale_gradients(self._parameters, clip / grad_norm)
            self._optimizer.step()
        self._optimizer.zero_grad()
        return StepResult(total, grad_norm, lr, stops > 0, recovery > 0, saves_over, bad)

    def _set_rate(self, step: int) -> float:
        lr = learning_rate(self._config.optim, step, self.schedule.total_steps)
        set_learning_rate(self._optimizer, lr)
        return lr

    def accumulate(self, micro_batches: list[PackedBatch], num_targets: int) -> Tensor:
        """Add up the gradients of a global batch (a collective call).

        Args:
            micro_batches: this rank's, as many as every other rank's.
            num_targets: supervised tokens of the whole global batch, over all ranks.

        Returns:
            This rank's part of the global mean loss, scalar.
        """
        total = torch.zeros((), device=self._runtime.device)
        for index, micro in enumerate(micro_batches):
            self.working_on = micro
            self._runtime.pulse.beat()
            last = index == len(micro_batches) - 1
            with self.accumulation.micro_batch(last=last, reshard=last or self._reshard):
                loss = self._module(micro.to(self._runtime.device), num_targets)
                loss.backward()
            total = total + loss.detach()
            del loss  # with what its graph still holds, before the next forward
        return total

    def _advance(self, batch: StepBatch, result: StepResult) -> None:
        done = batch.step + 1
        per_epoch = self.schedule.steps_per_epoch
        self._state = replace(
            self._state,
            step=done,
            epoch=batch.epoch,
            rows_done=(batch.step % per_epoch) * self._config.data.train_batch_size + len(batch.row_ids),
            tokens=self._state.tokens + batch.num_tokens,
            supervised_tokens=self._state.supervised_tokens + batch.num_targets,
            loss=self._state.loss if result.bad else result.loss,
            skipped_steps=self._state.skipped_steps + (result.bad is not None),
            sources=_counted(self._state.sources, batch.sources),
        )
        self._runtime.pulse.beat(step=done)
        self._teach_deadline()
        self._meter.end_step(
            tokens=batch.num_tokens,
            supervised_tokens=batch.num_targets,
            flops=self._flops(batch),
            padding=batch.padding,
            imbalance=batch.imbalance,
        )

    def _teach_deadline(self) -> None:
        deadline, timing = self._stop.deadline, self._checkpointer.timing
        if deadline is None:
            return
        deadline.step_took(time.monotonic() - self._step_began)
        if timing is not None and timing is not self._last_save:
            self._last_save = timing
            deadline.save_took(timing.total)

    def _log_step(self, result: StepResult) -> None:
        step = self._state.step
        if self._logger is None or (step % self._config.trainer.log_freq and step != self.schedule.total_steps):
            return
        record = self._meter.record(
            step=step,
            epoch=step / self.schedule.steps_per_epoch,
            loss=None if result.bad else result.loss,
            lr=result.lr,
            grad_norm=None if result.bad else result.grad_norm,
            peak_bytes=peak_memory(self._runtime.device),
        )
        record["perf/compilations"] = compilations()
        if (lost := given_up()) and not self._told_uncompiled:
            self._told_uncompiled = True
            self._logger.warning(lost)
        if self._state.skipped_steps:
            record["train/skipped_steps"] = self._state.skipped_steps
        present = {name: source for name, source in self._state.sources.items() if source.data}
        sources = source_record({name: (s.tokens, s.supervised_tokens, s.epoch) for name, s in present.items()})
        self._logger.log(record | sources)

    def _validate(self) -> bool:
        """Validate and log; False where a stop cut it short, on every rank alike."""
        if self._evaluate is None:
            return True
        with self._runtime.pulse.phase(VALIDATING):
            losses = self._evaluate()
        if losses is not None and self._logger is not None:
            self._logger.log(validation_record(self._state.step, losses.loss, losses.by_name))
        return losses is not None

    def _save(self, purpose: Purpose) -> None:
        with self._runtime.pulse.phase(SAVING):
            self._state = self._checkpointer.save(self._state, purpose)

    def _not_taken(self, batch: StepBatch, loss: float, norm: float) -> BadStep:
        """Give up a step that is not finite: end the run, or go on without it where that is allowed."""
        bad = self._bad_steps.note(batch, loss, norm)
        trainer, skipped = self._config.trainer, self._state.skipped_steps
        if trainer.non_finite == "skip" and skipped < trainer.max_skipped_steps:
            if self._logger is not None:
                self._logger.warning(f"{bad.text()}\n    skipped, {skipped + 1} of {trainer.max_skipped_steps} allowed")
            return bad
        newest = self._checkpointer.newest
        spent = f"; {skipped} steps were skipped before" if skipped else ""
        raise JobError(
            ExitCode.NON_FINITE,
            f"{bad.text()}{spent}\n    fix: a lower optim.lr, a longer warm-up, or look at these rows; "
            f"trainer.non_finite=skip goes on without such steps; the run can go on from "
            f"{newest or 'its last checkpoint'}",
        )


def _counted(sources: Mapping[str, SourceState], batch: Mapping[str, SourceCounts]) -> dict[str, SourceState]:
    """The ledger of named data sets after one more batch."""
    counted = dict(sources)
    for name, counts in batch.items():
        old = counted[name]
        counted[name] = replace(
            old,
            rows=old.rows + counts.rows,
            tokens=old.tokens + counts.tokens,
            supervised_tokens=old.supervised_tokens + counts.targets,
        )
    return counted
