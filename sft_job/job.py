"""One run, put together: what is where it stands, what it needs, and the loop that trains it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sft_job import __version__
from sft_job.checkpoint.checkpointer import Checkpointer
from sft_job.checkpoint.distributed import load_tensors, on_first_rank
from sft_job.checkpoint.huggingface import whole_tensors, write_companions, write_weights
from sft_job.checkpoint.start import Start, find_start, model_fingerprint, refuse_other_data
from sft_job.checkpoint.state import RunState, flat_config
from sft_job.config.load import run_folder
from sft_job.config.schema import JobConfig
from sft_job.contract import Env, RunFolder
from sft_job.data.batches import BatchLoader
from sft_job.data.cache import TokenCache, open_cache
from sft_job.data.order import FileOrder, RowOrder, StepRows
from sft_job.data.packing import pack_settings
from sft_job.data.places import open_places
from sft_job.data.prepare import prepare, write_report
from sft_job.data.render import PromptResponseRenderer
from sft_job.data.tokenizer import load_tokenizer, template_text
from sft_job.evaluate import validation_loss
from sft_job.metrics.flops import FlopsShape, model_flops, peak_flops
from sft_job.metrics.loggers import Loggers, make_loggers
from sft_job.metrics.meters import StepMeter
from sft_job.model.build import build_model
from sft_job.model.causal_lm import CausalLMLoss
from sft_job.model.precision import precision_of
from sft_job.optimizer import build_optimizer, learning_rate
from sft_job.parallel.fsdp import tied_once
from sft_job.parallel.mesh import Mesh, build_mesh
from sft_job.runtime import Runtime, StopWish
from sft_job.trainer import Ending, Schedule, Trainer


@dataclass(frozen=True)
class Job:
    """A run that is ready to train.

    Attributes:
        module: sharded, filled, in training mode.
        optimizer: over its parameters, with its states where the run goes on.
        trainer: the loop.
        loader: this rank's batches.
        loggers: on rank 0, None elsewhere.
    """

    module: CausalLMLoss
    optimizer: torch.optim.Optimizer
    trainer: Trainer
    loader: BatchLoader
    loggers: Loggers | None

    def run(self) -> Ending:
        """Train to the end or to a stop (a collective call)."""
        first, last = self.trainer.state.step, self.trainer.schedule.total_steps
        with contextlib.closing(self.loader.steps(first, last)) as batches:
            return self.trainer.run(batches)

    def close(self) -> None:
        """Close the loggers."""
        if self.loggers is not None:
            self.loggers.close()


def train(config: JobConfig, runtime: Runtime, stop: StopWish) -> Ending | None:
    """Train one run from where it stands (a collective call); None where it is done already.

    Raises:
        JobError: with the exit code of what went wrong.
    """
    start: Start = on_first_rank(find_start, config, run_folder(config))
    if start.finished:
        return None
    with contextlib.closing(build_job(config, runtime, stop, start)) as job:
        return job.run()


def build_job(config: JobConfig, runtime: Runtime, stop: StopWish, start: Start) -> Job:
    """Put a run together at its start (a collective call).

    Raises:
        JobError: with the exit code of what went wrong.
    """
    run = run_folder(config)
    torch.manual_seed(config.trainer.seed)
    mesh = build_mesh(runtime.device.type, config.ulysses_sequence_parallel_size)
    rows, validation = _open_rows(config, run)
    refuse_other_data(start, rows.fingerprint, config)

    precision = precision_of(config.model.fsdp_config, runtime.device.type)
    fresh = start.checkpoint is None
    module, attention = build_model(config.model, mesh, runtime.device, precision, config.trainer.seed, load=fresh)
    optimizer = build_optimizer(module.parameters(), config.optim, runtime.device.type)
    checkpointer = Checkpointer(
        run,
        module,
        optimizer,
        config.trainer.checkpoint.save_contents,
        config.trainer.max_ckpt_to_keep,
        _exporter(config, module, runtime),
    )
    checkpointer.prepare()
    if start.checkpoint is not None:
        load_tensors(start.checkpoint, module, optimizer)
        checkpointer.newest = start.checkpoint

    order = RowOrder(config.trainer.seed, rows.num_rows, config.data.train_batch_size)
    schedule = make_schedule(config, order.steps_per_epoch)
    state = _begin_state(config, start, schedule, rows, mesh)
    shape = FlopsShape.from_config(module.lm.config)
    loggers = _loggers(config, run, state) if runtime.is_first else None
    if loggers is not None:
        _tell_start(loggers, config, attention, schedule, rows, validation, state)
    trainer = Trainer(
        config,
        runtime,
        module,
        optimizer,
        schedule,
        state,
        checkpointer,
        _evaluator(config, module, validation, mesh, runtime),
        StepMeter(
            world_size=runtime.world,
            peak_flops=_device_peak(runtime, precision.compute),
            tokens=state.tokens,
            supervised_tokens=state.supervised_tokens,
        ),
        lambda batch: model_flops(shape, rows.lengths[batch.row_ids].tolist()),
        loggers,
        stop,
    )
    loader = _loader(config, rows, order, mesh)
    return Job(module, optimizer, trainer, loader, loggers)


def make_schedule(config: JobConfig, steps_per_epoch: int) -> Schedule:
    """When things happen; ``total_training_steps`` may be less or more than the epochs give."""
    trainer = config.trainer
    total = trainer.total_training_steps or trainer.total_epochs * steps_per_epoch
    return Schedule(total, steps_per_epoch, trainer.save_freq, trainer.test_freq)


def _loggers(config: JobConfig, run: RunFolder, state: RunState) -> Loggers:
    trainer = config.trainer
    return make_loggers(
        trainer.logger,
        run,
        total_steps=state.total_steps,
        resume_step=state.step,
        project=trainer.project_name,
        experiment=trainer.experiment_name,
        config=state.config,
    )


def _tell_start(
    logger: Loggers,
    config: JobConfig,
    attention: str,
    schedule: Schedule,
    rows: TokenCache,
    validation: TokenCache | None,
    state: RunState,
) -> None:
    for line in (*rows.report["notes"], *rows.report["warnings"]):
        logger.message(line)
    tokens = int(rows.lengths.sum(dtype="int64"))
    logger.message(
        f"{rows.num_rows:,} training rows, {tokens:,} tokens; validation rows: "
        f"{validation.num_rows if validation else 0:,}; {attention}"
    )
    last = learning_rate(config.optim, schedule.total_steps - 1, schedule.total_steps)
    logger.message(
        f"steps {state.step} to {schedule.total_steps}, {schedule.steps_per_epoch} an epoch; learning rate "
        f"{config.optim.lr_scheduler}, {config.optim.lr:g} at most, {last:.3g} at the last step"
    )


def _begin_state(config: JobConfig, start: Start, schedule: Schedule, rows: TokenCache, mesh: Mesh) -> RunState:
    """The state that the first step of this start builds on."""
    old = start.state
    return RunState(
        step=start.step,
        total_steps=schedule.total_steps,
        epoch=old.epoch if old else 0,
        rows_done=old.rows_done if old else 0,
        tokens=old.tokens if old else 0,
        supervised_tokens=old.supervised_tokens if old else 0,
        loss=old.loss if old else None,
        world=mesh.layout.world,
        ulysses=mesh.layout.ulysses_size,
        data=rows.fingerprint,
        model=model_fingerprint(Path(config.model.partial_pretrain or "")),
        config=flat_config(config),
        kept=True,
        version=__version__,
    )


def _exporter(config: JobConfig, module: CausalLMLoss, runtime: Runtime) -> Callable[[Path], str]:
    """What writes the Hugging Face folder of the model as it stands (a collective call)."""

    def export(folder: Path) -> str:
        lm = module.lm
        weights = tied_once(lm, set())
        digest = write_weights(folder, whole_tensors(weights), write=runtime.is_first)
        if runtime.is_first:
            base = Path(config.model.partial_pretrain or "")
            tokenizer = load_tokenizer(base, config.model.trust_remote_code)
            renderer = PromptResponseRenderer(
                tokenizer,
                chat_template=template_text(config.data.chat_template),
                template_kwargs=config.data.apply_chat_template_kwargs,
            )
            dtype = next(iter(weights.values())).dtype
            write_companions(folder, lm.config, dtype, type(lm).__name__, base, tokenizer, renderer.end_of_turn_id)
        return digest

    return export


def _open_rows(config: JobConfig, run: RunFolder) -> tuple[TokenCache, TokenCache | None]:
    """The caches that were made before the ranks started; without a supervisor rank 0 makes them now."""
    reports = os.environ.get(Env.REPORT_DIR)
    if reports is not None:
        return open_places(Path(reports))
    rows, validation = on_first_rank(_prepared_folders, config, run)
    return open_cache(rows), open_cache(validation) if validation else None


def _prepared_folders(config: JobConfig, run: RunFolder) -> tuple[Path, Path | None]:
    rows, validation = prepare(config, run)
    write_report(run, rows, validation)
    return rows.folder, validation.folder if validation else None


def _loader(config: JobConfig, rows: TokenCache, order: StepRows, mesh: Mesh) -> BatchLoader:
    place = mesh.layout
    return BatchLoader(
        rows,
        order,
        pack_settings(config),
        dp_rank=place.dp_rank,
        dp_size=place.dp_size,
        ulysses_rank=place.ulysses_rank,
        ulysses_size=place.ulysses_size,
        pad_id=0,
    )


def _evaluator(
    config: JobConfig, module: CausalLMLoss, rows: TokenCache | None, mesh: Mesh, runtime: Runtime
) -> Callable[[], float] | None:
    if rows is None:
        return None
    order = FileOrder(rows.num_rows, config.data.train_batch_size)
    loader = _loader(config, rows, order, mesh)
    return lambda: validation_loss(module, loader, order.steps_per_epoch, runtime.device)


def _device_peak(runtime: Runtime, dtype: torch.dtype) -> float | None:
    if runtime.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(runtime.device), dtype)
