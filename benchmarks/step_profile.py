"""Where a step's time goes: ``python -m benchmarks.step_profile --row NAME``; ``--trace`` reads a trace that is there.

One steady step of a row under torch.profiler, and the table of its parts: ``step_profile.json`` and ``.md``. One GPU.
The trace itself goes to ``--keep`` alone: it is large, and nothing of it is needed once its parts are known.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from benchmarks import parts
from benchmarks.ceiling import matmul_ceiling
from benchmarks.ours_side import EnoughStepsError, MarkedLoader, job_config
from benchmarks.outcome import say
from benchmarks.plan import RunSpec
from benchmarks.rows import ROWS, Row, rows_named
from benchmarks.shapes import SHAPES, write_model_folder
from benchmarks.stamps import StepClock
from benchmarks.throughput import machine
from benchmarks.tokens import write_tokens
from sft_job.checkpoint.start import Start
from sft_job.contract import RunFolder
from sft_job.data.batches import StepBatch
from sft_job.job import Job, build_job
from sft_job.metrics.flops import FlopsShape, model_flops
from sft_job.runtime import StopWish, start_runtime
from sft_job.tuning import tuned

WARMUP = 5


class _ProfiledLoader(MarkedLoader):
    """Ends the run after the warm-up and one step more, which is profiled."""

    def __init__(self, job: Job, clock: StepClock, trace: Path) -> None:
        super().__init__(job.loader, clock, WARMUP + 1)
        self._trace, self._device = trace, job.runtime.device

    def steps(self, start_step: int, end_step: int) -> Generator[StepBatch, None, None]:
        """Batches; the last one's step is profiled to its end."""
        on_gpu = self._device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        under_way: profile | None = None
        try:
            for index, batch in enumerate(super().steps(start_step, end_step)):
                if index == WARMUP:
                    _wait(self._device)
                    under_way = profile(activities=kinds)
                    under_way.start()
                yield batch
        finally:
            if under_way is not None:
                _wait(self._device)
                under_way.stop()
                under_way.export_chrome_trace(str(self._trace))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def work_of(model: Path, lengths: Sequence[int], *, frozen: bool) -> parts.Work:
    """What a step of these documents has to do."""
    config: Any = AutoConfig.from_pretrained(model)
    shape = FlopsShape.from_config(config)
    gemm = (4.0 if frozen else 6.0) * sum(lengths) * shape.matmul_parameters
    whole = model_flops(shape, list(lengths), frozen_weights=frozen)
    head = config.vocab_size * config.hidden_size
    trained = 0.0 if frozen else shape.matmul_parameters + (0 if config.tie_word_embeddings else head)
    return parts.Work(
        gemm_flops=gemm,
        attention_flops=whole - gemm,
        tokens=sum(lengths),
        supervised=sum(lengths),
        parameters=trained,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
    )


def profiled(row: Row, work: Path, trace: Path, *, on_gpu: bool) -> dict[str, Any]:
    """Train to a steady step, profile it; the matmul rate and the time of the step before it."""
    side = row.subject
    tokens = write_tokens(work / "rows.parquet", side.tokens, SHAPES[row.shape]["vocab_size"], WARMUP + 2)
    model = write_model_folder(work / row.shape, row.shape)
    settings = {**side.settings, "trainer.rehearsal": False}
    if "model.recompute" not in settings and row.shape != "tiny":
        settings.pop("trainer.rehearsal")  # what is recomputed is chosen there
    spec = RunSpec(settings, side.tokens, str(tokens), str(model), str(work), 1, WARMUP, 1, on_gpu)
    os.environ.update(tuned(os.environ, RunFolder(work), len(os.sched_getaffinity(0))))
    config = job_config(spec, work / "settings.yaml")
    runtime = start_runtime(config.trainer.timeout_seconds)
    ceiling = matmul_ceiling(runtime.device)
    clock = StepClock(runtime.device, None, WARMUP)
    job = build_job(config, runtime, StopWish(), Start())
    try:
        replace(job, loader=_ProfiledLoader(job, clock, trace)).run()  # pyright: ignore[reportArgumentType]
    except EnoughStepsError:
        pass
    finally:
        job.close()
    return {"ceiling": ceiling, "step_seconds": clock.seconds()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--row", default=ROWS[0].name, help="of benchmarks.throughput, on one GPU")
    asked.add_argument("--trace", type=Path, default=None, help="no run: read this trace of the row's step")
    asked.add_argument("--ceiling", type=float, default=None, help="TFLOP/s, for a trace that is there")
    asked.add_argument("--keep", type=Path, default=None, help="where the trace stays")
    asked.add_argument("--shape", choices=("real", "tiny"), default="real", help="tiny: everything small, for a CPU")
    asked.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    asked.add_argument("--out", type=Path, default=None, help="folder of the results; $OUT, or benchmarks/results")
    return asked


def main(words: Sequence[str] | None = None) -> int:
    """Profile or read, then write the table."""
    arguments = parser().parse_args(words)
    if arguments.trace and not arguments.ceiling:
        raise SystemExit("--trace needs --ceiling: the rate that the card had then")
    row = rows_named([arguments.row])[0]
    row = row.tiny() if arguments.shape == "tiny" else row
    if row.subject.ranks > 1:
        raise SystemExit(f"{row.name} needs {row.subject.ranks} GPUs: one alone is profiled")
    out: Path = arguments.out or Path(os.environ.get("OUT") or "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"row": row.name, "started": datetime.now(UTC).isoformat(timespec="seconds")}
    with tempfile.TemporaryDirectory(prefix="step_profile_") as place:
        folder = Path(place)
        trace: Path = arguments.trace or arguments.keep or folder / "trace.json"
        if arguments.trace is None:
            on_gpu = arguments.device == "cuda"
            record |= {"machine": machine(on_gpu), **profiled(row, folder, trace, on_gpu=on_gpu)}
        warm = record["ceiling"]["warm"]["tflops"] if "ceiling" in record else arguments.ceiling
        model = write_model_folder(folder / row.shape, row.shape)
        lengths = row.subject.tokens.lengths(WARMUP + 1)[WARMUP]
        work = work_of(model, lengths, frozen="model.lora_rank" in row.subject.settings)
        kernels = parts.kernels_of(trace)
    found, least = parts.totals(kernels), parts.floors(work, warm * 1e12)
    if row.subject.settings.get("model.fp8"):
        del least[parts.GEMM]  # that of products in bf16
    record |= {"parts": found, "floors_ms": least, "span_ms": parts.span(kernels), "top": parts.top(kernels)}
    (out / "step_profile.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = parts.table(found, work, least) if found else "nothing ran on a GPU: a CPU's trace has no kernels\n"
    (out / "step_profile.md").write_text(
        f"{row.name}; products in bf16 at {warm:.1f} TFLOP/s\n\n{text}", encoding="utf-8"
    )
    say(text)
    return 0


if __name__ == "__main__":
    code = main()
    # As the job's own ranks do: a teardown of the process group may hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
