"""One run, put together: what is where it stands, what it needs, and the loop that trains it."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sft_job import __version__
from sft_job.announce import tell_start
from sft_job.capacity import Capacity
from sft_job.checkpoint.checkpointer import ADAPTER, HUGGINGFACE, Checkpointer
from sft_job.checkpoint.distributed import on_every_rank, on_first_rank
from sft_job.checkpoint.files import Files
from sft_job.checkpoint.folder import published
from sft_job.checkpoint.policy import SavePolicy
from sft_job.checkpoint.remote import RemoteStore
from sft_job.checkpoint.start import (
    START_FILE,
    Start,
    fetch_remote,
    find_start,
    model_fingerprint,
    refuse_other_data,
    start_at,
)
from sft_job.checkpoint.state import RunState, SourceState, flat_config, total_steps
from sft_job.config.load import run_folder
from sft_job.config.schema import JobConfig
from sft_job.contract import Env, ExitCode, RunFolder
from sft_job.costs import packing_of
from sft_job.data.batches import BatchLoader
from sft_job.data.mixture import Mixture, Rows, named_caches, training_order
from sft_job.data.order import FileOrder, StepRows
from sft_job.data.places import open_places
from sft_job.data.prepare import prepare
from sft_job.deadline import REASON as DEADLINE
from sft_job.errors import JobError
from sft_job.evaluate import EvaluationRows, ValidationLoss, validation_loss
from sft_job.export import export_live
from sft_job.forensics import BadSteps, decoder
from sft_job.host import host_need
from sft_job.lock import confirm_lock
from sft_job.metrics.flops import FlopsShape, model_flops, peak_flops
from sft_job.metrics.loggers import Loggers, make_loggers
from sft_job.metrics.meters import StepMeter
from sft_job.model.build import build_model
from sft_job.model.causal_lm import CausalLMLoss
from sft_job.model.fp8 import token_multiple
from sft_job.model.lora import uses_lora
from sft_job.model.precision import precision_of
from sft_job.optimizer import build_optimizer
from sft_job.parallel.accumulation import build_accumulation
from sft_job.parallel.mesh import Mesh, build_mesh
from sft_job.processes import host_room
from sft_job.pulse import FINISHING, LOADING, TRAINING
from sft_job.rehearsal import longest_batches, longest_tokens, step_accumulates
from sft_job.runtime import Runtime, StopWish, agree
from sft_job.trainer import Ending, Schedule, Trainer

log = logging.getLogger(__name__)
_STOP_UPLOAD_SECONDS = 20.0
_FIRST_SAVE_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """A run that is ready to train.

    Attributes:
        config: its settings.
        runtime: this rank.
        module: sharded, filled, in training mode.
        optimizer: over its parameters, with its states where the run goes on.
        trainer: the loop.
        loader: this rank's batches.
        loggers: on rank 0, None elsewhere.
        store: a second place for checkpoints, on rank 0 where one is set.
        checkpointer: saves.
        capacity: sees that the longest batch fits.
    """

    config: JobConfig
    runtime: Runtime
    module: CausalLMLoss
    optimizer: torch.optim.Optimizer
    trainer: Trainer
    loader: BatchLoader
    loggers: Loggers | None
    store: RemoteStore | None
    checkpointer: Checkpointer
    capacity: Capacity

    def run(self) -> Ending:
        """Train to the end or to a stop (a collective call).

        Raises:
            JobError: with the exit code of what went wrong; 88 where device memory ran out.
        """
        first, last = self.trainer.state.step, self.trainer.schedule.total_steps
        with self.capacity.explained("in the rehearsal of the longest batch, before step"):
            self.capacity.rehearse()
        self.runtime.pulse.enter(TRAINING)
        with self.capacity.explained("at step"), contextlib.closing(self.loader.steps(first, last)) as batches:
            ending = self.trainer.run(batches)
        self.runtime.pulse.enter(FINISHING)
        if self.store is not None:
            # A scheduler that asked for a stop will not wait for an upload; the end of a run does.
            self.store.close(_STOP_UPLOAD_SECONDS if ending.stopped else 0.8 * self.config.trainer.timeout_seconds)
        return ending

    def close(self) -> None:
        """Close what is still open, also after an error; one that cannot be closed leaves none of the others open.

        Raises:
            JobError: ``metrics.jsonl`` cannot be written (73).
        """
        with contextlib.ExitStack() as closing:  # the last one first
            if self.loggers is not None:
                closing.callback(self.loggers.close)
            if self.store is not None:
                closing.callback(self.store.close, _STOP_UPLOAD_SECONDS)
            closing.callback(self.checkpointer.close)
            if self.module.blocks.store is not None:
                closing.callback(self.module.blocks.store.clear)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close; after an error that one is what the run ends with, whatever cannot be closed."""
        try:
            self.close()
        except Exception as late:
            if error is None:
                raise
            log.warning("after that error: %s", late)


def train(config: JobConfig, runtime: Runtime, stop: StopWish) -> Ending | None:
    """Train one run from where it stands (a collective call); None where it is done already.

    Raises:
        JobError: with the exit code of what went wrong.
    """
    _leave_if_asked(runtime, stop)
    runtime.pulse.enter(LOADING)
    start: Start = on_first_rank(_find_start, config, run_folder(config))
    if start.finished:
        return None
    began = time.monotonic()
    with build_job(config, runtime, stop, start) as job:
        if stop.deadline is not None:
            # A save writes what was loaded and reads it for its checksums; a base model comes without its AdamW states.
            times = 2 if start.checkpoint is not None else 4
            stop.deadline.expect_save(_FIRST_SAVE_SECONDS + times * (time.monotonic() - began))
        _leave_if_asked(runtime, stop)
        return job.run()


def _leave_if_asked(runtime: Runtime, stop: StopWish) -> None:
    if agree(stop.wished, runtime.device):
        why = f"{DEADLINE}: it came" if stop.deadline is not None and not stop.signal else "stopped"
        raise JobError(ExitCode.STOPPED, f"{why} before a new step: nothing to save")


def _find_start(config: JobConfig, run: RunFolder) -> Start:
    """Where the run begins; under a supervisor at the checkpoint that it has verified already."""
    reports = os.environ.get(Env.REPORT_DIR)
    if reports is None:
        fetch_remote(config, run, log.warning)
        return find_start(config, run)
    found = (Path(reports) / START_FILE).read_text(encoding="utf-8")
    return start_at(Path(found), config, run) if found else Start()


def build_job(config: JobConfig, runtime: Runtime, stop: StopWish, start: Start, files: Files | None = None) -> Job:
    """Put a run together at its start (a collective call).

    Args:
        config: the settings.
        runtime: this rank.
        stop: this rank's wish to stop.
        start: where the run begins.
        files: does the file operations of saving, for tests that watch them.

    Raises:
        JobError: with the exit code of what went wrong.
    """
    run = run_folder(config)
    torch.manual_seed(config.trainer.seed)
    fsdp = config.model.fsdp_config
    mesh = build_mesh(runtime.device.type, config.ulysses_sequence_parallel_size, fsdp.fsdp_size)
    rows, validation = _open_rows(config, run)
    mixed = {each.name: each.fingerprint for each in rows.sets} if isinstance(rows, Mixture) else {}
    refuse_other_data(start, rows.fingerprint, config, mixed)
    order = training_order(rows, config.trainer.seed, config.data.train_batch_size)
    schedule = make_schedule(config, order.steps_per_epoch)
    state = _begin_state(config, start, schedule, rows, mesh)
    loggers = _loggers(config, run, state) if runtime.is_first else None
    store = _store(config, run, loggers)

    precision = precision_of(fsdp, runtime.device.type)
    fresh = start.checkpoint is None
    accumulates = step_accumulates(config, rows, mesh.layout.dp_size)
    module, attention = build_model(
        config.model,
        mesh,
        runtime.device,
        precision,
        config.trainer.seed,
        load=fresh,
        longest=config.data.max_length,
        accumulates=accumulates,
    )
    optimizer = build_optimizer(module, config.optim, runtime.device.type, None if loggers is None else loggers.warning)
    accumulation, summed = build_accumulation(module, fsdp, mesh.fsdp, precision.reduce, runtime.device)
    checkpointer = Checkpointer(
        run,
        module,
        optimizer,
        runtime.device,
        SavePolicy.of(config.trainer),
        ADAPTER if uses_lora(config.model) else HUGGINGFACE,
        lambda folder, meet: export_live(folder, module.lm, config, runtime.device, write=runtime.is_first, meet=meet),
        None if store is None else store.upload,
        confirm=confirm_lock(run, os.environ),
        warn=None if loggers is None else loggers.warning,
        files=files,
        token=os.environ.get(Env.LOCK),
    )
    host = host_need(config, module.lm.config, precision.compute, longest_tokens(config, rows))
    if asked := config.model.recompute == "offload":
        on_every_rank(host.check, host_room())
    checkpointer.prepare(host_taken=host.node_bytes if asked else 0)
    if start.checkpoint is not None:
        checkpointer.load(start.checkpoint)

    shape = FlopsShape.from_config(module.lm.config)
    if loggers is not None:
        tell_start(loggers, config, attention, rows, validation, state, summed if accumulates else "")
    trainer = Trainer(
        config,
        runtime,
        module,
        optimizer,
        mesh.shard_group,
        accumulation,
        schedule,
        state,
        checkpointer,
        _evaluator(config, module, validation, mesh, runtime, stop),
        StepMeter(
            world_size=runtime.world,
            peak_flops=_device_peak(runtime, precision.compute),
            tokens=state.tokens,
            supervised_tokens=state.supervised_tokens,
        ),
        lambda batch: model_flops(shape, rows.lengths[batch.row_ids].tolist(), frozen_weights=uses_lora(config.model)),
        BadSteps(run, rows, decoder(config), runtime.is_first),
        loggers,
        stop,
    )
    loader = _loader(config, rows, order, mesh)
    longest = longest_batches(config, rows, loader, accumulates=accumulates)
    capacity = Capacity(config, runtime, module, optimizer, trainer, checkpointer, longest, host, loggers)
    return Job(config, runtime, module, optimizer, trainer, loader, loggers, store, checkpointer, capacity)


def make_schedule(config: JobConfig, steps_per_epoch: int) -> Schedule:
    """When things happen."""
    trainer = config.trainer
    return Schedule(total_steps(config, steps_per_epoch), steps_per_epoch, trainer.save_freq, trainer.test_freq)


def _loggers(config: JobConfig, run: RunFolder, state: RunState) -> Loggers:
    trainer = config.trainer
    return make_loggers(
        trainer.logger,
        run,
        total_steps=state.total_steps,
        resume_step=state.step,
        project=state.config["trainer.project_name"],  # without secrets of the environment
        experiment=state.config["trainer.experiment_name"],
        config=state.config,
    )


def _store(config: JobConfig, run: RunFolder, loggers: Loggers | None) -> RemoteStore | None:
    url = config.trainer.default_hdfs_dir
    if url is None or loggers is None:
        return None
    store = RemoteStore(url, loggers.warning, config.trainer.max_ckpt_to_keep)
    for folder in published(run):
        store.upload(folder)  # what an earlier start had no time for; what is there costs a look
    return store


def _sources(old: RunState | None, rows: Rows) -> dict[str, SourceState]:
    """The ledger of named data sets at a start; of sets that are no more, what was seen stays in it."""
    before = old.sources if old else {}
    sources = {name: replace(source, data="") for name, source in before.items()}
    for each in rows.sets if isinstance(rows, Mixture) else ():
        seen = before.get(each.name, SourceState(0, 0, 0, 0, ""))
        sources[each.name] = replace(seen, size=each.cache.num_rows, data=each.fingerprint)
    return sources


def _begin_state(config: JobConfig, start: Start, schedule: Schedule, rows: Rows, mesh: Mesh) -> RunState:
    """The state that the first step of this start builds on."""
    old = start.state
    return RunState(
        step=start.step,
        total_steps=schedule.total_steps,
        steps_per_epoch=schedule.steps_per_epoch,
        epoch=old.epoch if old else 0,
        rows_done=old.rows_done if old else 0,
        tokens=old.tokens if old else 0,
        skipped_steps=old.skipped_steps if old else 0,
        supervised_tokens=old.supervised_tokens if old else 0,
        loss=old.loss if old else None,
        world=mesh.layout.world,
        ulysses=mesh.layout.ulysses_size,
        data=rows.fingerprint,
        model=model_fingerprint(Path(config.model.partial_pretrain or "")),
        config=flat_config(config),
        kept=True,
        version=__version__,
        sources=_sources(old, rows),
    )


def _open_rows(config: JobConfig, run: RunFolder) -> tuple[Rows, Rows | None]:
    """The caches that were made before the ranks started; without a supervisor the first rank to come makes them."""
    reports = os.environ.get(Env.REPORT_DIR)
    return open_places(Path(reports)) if reports is not None else prepare(config, run)


def _loader(config: JobConfig, rows: Rows, order: StepRows, mesh: Mesh) -> BatchLoader:
    place = mesh.layout
    return BatchLoader(
        rows,
        order,
        packing_of(config),
        dp_rank=place.dp_rank,
        dp_size=place.dp_size,
        ulysses_rank=place.ulysses_rank,
        ulysses_size=place.ulysses_size,
        pad_id=0,
        multiple=token_multiple(config.model.fp8),
    )


def _evaluator(
    config: JobConfig, module: CausalLMLoss, rows: Rows | None, mesh: Mesh, runtime: Runtime, stop: StopWish
) -> Callable[[], ValidationLoss | None] | None:
    if rows is None:
        return None
    sets: dict[str, EvaluationRows] = {}
    for name, cache in named_caches(rows).items():
        order = FileOrder(cache.num_rows, config.data.train_batch_size)
        sets[name] = EvaluationRows(_loader(config, cache, order, mesh), order.steps_per_epoch)
    return lambda: validation_loss(module, sets, runtime.device, stop, runtime.pulse)


def _device_peak(runtime: Runtime, dtype: torch.dtype) -> float | None:
    if runtime.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(runtime.device), dtype)
