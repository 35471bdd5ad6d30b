"""One rank of the job in a benchmark: ``python -m benchmarks.ours_side SPEC.json``; several under torchrun.

The job is put together by its own ``build_job`` and trained by its own loop; what is changed is the loader, which
marks the ends of steps and ends the run before its last step, so that no checkpoint is written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ceiling import matmul_ceiling
from benchmarks.outcome import Outcome, say, versions
from benchmarks.plan import LEARNING_RATE, RunSpec
from benchmarks.stamps import GIB, StepClock
from benchmarks.tokens import SEED
from sft_job.checkpoint.start import Start
from sft_job.checkpoint.state import flat_config
from sft_job.config.load import run_folder
from sft_job.config.resolve import resolve
from sft_job.config.schema import JobConfig
from sft_job.config.topology import count_gpus
from sft_job.data.batches import BatchLoader, StepBatch
from sft_job.errors import raise_problems
from sft_job.job import build_job
from sft_job.metrics.flops import FlopsShape, model_flops
from sft_job.runtime import StopWish, start_runtime


class EnoughStepsError(Exception):
    """The benchmark has what it wants."""


class MarkedLoader:
    """The job's loader; each request for a batch marks the end of the step before it.

    Attributes:
        tokens: real tokens of each step, over all ranks.
        computed: tokens that this rank computed on in each step, padding included.
    """

    def __init__(self, loader: BatchLoader, clock: StepClock, steps: int) -> None:
        self._loader, self._clock, self._steps = loader, clock, steps
        self.tokens: list[int] = []
        self.computed: list[int] = []

    def steps(self, start_step: int, end_step: int) -> Generator[StepBatch, None, None]:
        """Batches of some steps.

        Raises:
            EnoughStepsError: after so many.
        """
        for batch in self._loader.steps(start_step, end_step):
            self._clock.mark()
            if self._clock.steps == self._steps:
                raise EnoughStepsError
            self.tokens.append(batch.num_tokens)
            self.computed.append(sum(sum(micro.document_lengths) for micro in batch.micro_batches))
            yield batch


def job_settings(spec: RunSpec) -> dict[str, Any]:
    """The settings of a run, as nested mappings: those of every benchmark, then the side's own."""
    settings: dict[str, Any] = {
        "data.train_files": spec.token_file,
        "data.val_files": None,
        "data.custom_cls.path": str(Path(__file__).with_name("token_rows.py")),
        "data.custom_cls.name": "TokenRows",
        "data.cache_dir": str(Path(spec.token_file).parent / "cache"),
        "data.train_batch_size": spec.tokens.rows,
        "data.max_length": spec.tokens.length,
        "data.max_token_len_per_gpu": spec.tokens.length,
        "model.partial_pretrain": spec.model,
        "model.init": "random",
        "model.fsdp_config.model_dtype": "bf16" if spec.on_gpu else "fp32",
        "optim.lr": LEARNING_RATE,
        "optim.lr_scheduler": "constant",
        "optim.warmup_steps": 0,
        "optim.no_decay_on_norms_and_biases": True,  # as transformers' Trainer does it
        "trainer.default_local_dir": str(Path(spec.out) / "run"),
        "trainer.total_training_steps": spec.all_steps + 1,
        "trainer.total_epochs": 1,
        "trainer.logger": ["console"],
        "trainer.seed": SEED,
        "trainer.async_save": False,
        "trainer.recovery_minutes": 0,
        **spec.settings,
    }
    return nested(settings)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their full names as nested mappings."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        *parents, leaf = name.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return found


def job_config(spec: RunSpec, path: Path) -> JobConfig:
    """Load and check them as the job does.

    Raises:
        ProblemsError: all that is wrong with them.
    """
    return checked_config(job_settings(spec), path, spec.ranks)


def checked_config(settings: Mapping[str, Any], path: Path, ranks: int) -> JobConfig:
    """Settings as the job reads them from a file.

    Args:
        settings: as nested mappings.
        path: of the file, which is written here.
        ranks: of this node.

    Raises:
        ProblemsError: all that is wrong with them.
    """
    path.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    environ = {**os.environ, "NPROC_PER_NODE": str(ranks)}
    resolution = resolve(str(path), [], environ, count_gpus(environ))
    raise_problems(resolution.problems)
    return resolution.loaded.config


def main() -> int:
    """Train so many steps and write down what they took."""
    began = time.perf_counter()
    spec = RunSpec.read(Path(sys.argv[1]))
    out = Path(spec.out)
    rank = int(os.environ.get("RANK", "0"))
    config = job_config(spec, out / f"settings_{rank}.yaml")
    runtime = start_runtime(config.trainer.timeout_seconds)
    outcome = Outcome(out / f"rank_{rank}.json")
    outcome.add(versions=versions(), device=str(runtime.device), config=flat_config(config))
    outcome.add(ceiling_before=matmul_ceiling(runtime.device))
    clock = StepClock(runtime.device, out / "steps.jsonl" if runtime.is_first else None, spec.warmup)
    job = build_job(config, runtime, StopWish(), Start())
    loader = MarkedLoader(job.loader, clock, spec.all_steps)
    built = time.perf_counter()
    outcome.add(seconds_to_build=built - began)

    def cut_off(*_: object) -> None:
        """The call's time is over: what is known of memory is written down, without waiting for the device."""
        kept = job.module.blocks.store
        outcome.add(cut_off=True, memory={**clock.memory(), "host_inputs_gib": kept.pages.held / GIB if kept else 0.0})
        os._exit(143)

    signal.signal(signal.SIGTERM, cut_off)
    try:
        replace(job, loader=loader).run()  # pyright: ignore[reportArgumentType]  the loop asks for steps() alone
    except EnoughStepsError:
        pass
    finally:
        store = job.module.blocks.store
        pages = {"host_inputs_gib": store.pages.held / 2**30} if store is not None and store.pages.held else {}
        outcome.add(
            memory={**clock.memory(), **pages}, step_seconds=clock.seconds(), seconds_to_first_step=clock.began - began
        )
        job.close()
    shape = FlopsShape.from_config(job.module.lm.config)
    lengths = spec.tokens.lengths(spec.all_steps)
    if [sum(each) for each in lengths] != loader.tokens:
        raise RuntimeError("the job trained on other rows than the benchmark drew for each step")
    frozen = bool(config.model.lora_rank)
    outcome.add(
        tokens=loader.tokens,
        computed_tokens=loader.computed,
        flops=[model_flops(shape, each, frozen_weights=frozen) for each in lengths],
        seconds_all=time.perf_counter() - began,
    )
    if runtime.is_first:
        lines = run_folder(config).metrics.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        outcome.add(
            losses=[record["train/loss"] for record in records],
            grad_norms=[record["train/grad_norm"] for record in records],
            data_wait_seconds=[record["perf/data_wait_seconds"] for record in records],
        )
    outcome.add(ceiling_after=matmul_ceiling(runtime.device))
    say(f"rank {rank}: {clock.steps} steps")
    return 0


if __name__ == "__main__":
    code = main()
    # As the job's own ranks do: a teardown of the process group may hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
