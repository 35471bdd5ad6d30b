"""What the distributed tests run in each rank: a real job on real files, watched through torch's public hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sft_job.config.load import load_config
from sft_job.config.schema import JobConfig

SEED_YAML = Path(__file__).parents[1] / "golden" / "seed_sft_trainer.yaml"


@dataclass
class Watched:
    """What one rank saw of a run; plain data, so that it can cross processes."""

    stopped: bool = False
    done_before: bool = False
    step: int = 0
    weights_sha256: str = ""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    rows: list[tuple[int, ...]] = field(default_factory=list)
    """The rows of each step's global batch."""
    documents: list[list[tuple[int, ...]]] = field(default_factory=list)
    """The token ids of each document that this rank's group computed on, step by step."""


def seed_config(model: Path, train: Path, val: Path | None, run: Path, *overrides: str) -> JobConfig:
    """The seed's YAML with only paths, sizes and dtype overridden, and what a test asks for."""
    small = [
        f"data.train_files={train}",
        f"data.val_files={val if val else 'null'}",
        f"model.partial_pretrain={model}",
        f"trainer.default_local_dir={run}",
        "data.max_length=256",
        "trainer.logger=[]",
        "model.fsdp_config.model_dtype=fp64",
    ]
    loaded = load_config(str(SEED_YAML), [*small, *overrides], {})
    assert not loaded.problems, [problem.text() for problem in loaded.problems]
    return loaded.config


def run_job(
    config: JobConfig,
    *,
    stop_after: int | None = None,
    gradients: bool = False,
    files: Any = None,
    prepared: Callable[[Any], None] | None = None,
) -> Watched:
    """Train ``config`` in this rank, from where its run folder stands.

    Args:
        config: the settings.
        stop_after: ask for a stop in this step.
        gradients: keep those of every step.
        files: does the file operations of saving.
        prepared: takes the job before it runs.
    """
    from sft_job.checkpoint.start import find_start
    from sft_job.config.load import run_folder
    from sft_job.job import build_job
    from sft_job.runtime import StopWish

    runtime = join_ranks()
    start = find_start(config, run_folder(config))
    if start.finished:
        return Watched(done_before=True, step=start.step)
    stop = StopWish()
    job = build_job(config, runtime, stop, start, files)
    watched = Watched()
    _watch_batches(job, watched)
    watch_steps(job, watched, stop, stop_after, gradients)
    if prepared is not None:
        prepared(job)
    with job:
        ending = job.run()
    watched.stopped = ending.stopped
    watched.step = ending.state.step
    watched.weights_sha256 = ending.state.weights_sha256
    return watched


def run_jobs(configs: list[tuple[JobConfig, dict[str, Any]]]) -> list[Watched]:
    """Several runs one after the other, in one set of ranks."""
    return [run_job(config, **options) for config, options in configs]


def join_ranks() -> Any:
    """This rank; its process group is made by the first run that needs it."""
    import torch.distributed as dist

    from sft_job.runtime import Runtime, start_runtime

    if dist.is_initialized():
        return Runtime(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return start_runtime(60)


def _watch_batches(job: Any, watched: Watched) -> None:
    steps = job.loader.steps

    def watching(first: int, last: int) -> Any:
        for batch in steps(first, last):
            watched.rows.append(tuple(int(row) for row in batch.row_ids))
            watched.documents.append([])
            yield batch

    job.loader.steps = watching

    def note(module: Any, arguments: tuple[Any, ...]) -> None:
        batch = arguments[0]
        if module.training and watched.documents:
            watched.documents[-1].append(tuple(batch.input_ids[0].tolist()))

    job.module.register_forward_pre_hook(note)


def watch_steps(job: Any, watched: Watched, stop: Any, stop_after: int | None, gradients: bool) -> None:
    """Note what each step gave; ask for a stop in the one that ``stop_after`` names."""
    trainer = job.trainer
    train_step = trainer.train_step

    def stepping(batch: Any) -> Any:
        if stop_after is not None and batch.step + 1 == stop_after:
            stop.signal = 15
        result = train_step(batch)
        watched.losses.append(result.loss)
        watched.norms.append(result.grad_norm)
        watched.rates.append(result.lr)
        return result

    trainer.train_step = stepping
    if gradients:

        def keep(optimizer: Any, arguments: Any, options: Any) -> None:
            grads = {name: p.grad for name, p in job.module.lm.named_parameters() if p.requires_grad}
            # Recomputation wraps blocks, which shows in these names (not in those of a state dict).
            watched.gradients.append(
                {name.replace("_checkpoint_wrapped_module.", ""): whole(grad) for name, grad in grads.items()}
            )

        job.optimizer.register_step_pre_hook(keep)


def whole(tensor: Any) -> torch.Tensor:
    """A sharded tensor, gathered; one that no FSDP manages, as it was (the optimizer frees it)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
