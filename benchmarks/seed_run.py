"""The seed's own run: ``python -m benchmarks.seed_run --config SEED.yaml``; README.md explains the numbers.

The config that users bring, unmodified but for paths and ``trainer.total_training_steps``, by the real command, on
documents as long as chains of thought are. Beside it the same on two ranks (the losses must be the same), with LoRA,
with eight heads' worth of Ulysses, and once with a rank killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.ceiling import matmul_ceiling
from benchmarks.outcome import Outcome, say, versions
from benchmarks.shapes import SHAPES
from benchmarks.texts import prose, train_tokenizer, write_rows
from sft_job.contract import ExitCode, RunFolder

MEDIAN, SPREAD = 10_000, 1.0
"""Tokens of a document, and the spread of their logarithm: of 200 documents the longest has about 128,000."""
_SMALLER = 64
_SEED = 1
_KILLED_AT = 7
_STOP_SECONDS = 80.0
_ENV = ("PET_", "SLURM_")


@dataclass(frozen=True)
class Case:
    """One run of the command.

    Attributes:
        name: on the command line and in the table.
        shape: of the model.
        ranks: how many, or 0 for all that there are.
        settings: on top of the config.
        steps: of optimisation; 0 = as many as asked for.
        compared_with: case whose first losses must be these.
        killed_at: step at which a rank is killed; 0 = never.
    """

    name: str
    shape: str = "qwen2.5-7b"
    ranks: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    steps: int = 0
    compared_with: str = ""
    killed_at: int = 0


CASES = (
    Case("seed"),
    Case("two", ranks=2, settings={"ulysses_sequence_parallel_size": 2}, steps=3, compared_with="seed"),
    Case("killed", settings={"trainer.save_freq": 5}, steps=10, compared_with="seed", killed_at=_KILLED_AT),
    Case("lora", settings={"model.lora_rank": 16, "optim.lr": 1e-4}, steps=10),
    Case("ulysses8", shape="llama3-8b", settings={"ulysses_sequence_parallel_size": 8}, steps=10),
)


@dataclass(frozen=True)
class Bench:
    """What all runs share.

    Attributes:
        config: the seed's YAML.
        work: models, rows and run folders.
        out: result, table and logs.
        ranks: GPUs, or processes on a CPU.
        on_gpu: False on a CPU.
        tiny: a small model, and documents of a 64th of the length.
        steps: of the seed's run.
        deadline: by the monotonic clock.
    """

    config: Path
    work: Path
    out: Path
    ranks: int
    on_gpu: bool
    tiny: bool
    steps: int
    deadline: float

    def model(self, shape: str) -> Path:
        """A folder with random weights; kept where it is there."""
        name = "tiny8" if self.tiny and shape == "llama3-8b" else "tiny" if self.tiny else shape
        folder = self.work / name
        if not (folder / "config.json").is_file():
            vocabulary = train_tokenizer(folder, prose()[:20_000], _SEED)
            settings = {**SHAPES[name], "eos_token_id": 2}
            settings["vocab_size"] = max(settings["vocab_size"], vocabulary)
            with torch.device("cuda" if self.on_gpu else "cpu"):
                torch.manual_seed(_SEED)
                config = AutoConfig.for_model(**settings)
                AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
            if self.on_gpu:
                torch.cuda.empty_cache()
        return folder

    def rows(self, batch: int) -> tuple[Path, Path]:
        """Files to train on and to validate with."""
        median = MEDIAN // (_SMALLER if self.tiny else 1)
        mean = int(median * 2.718281828 ** (SPREAD**2 / 2))
        for name, rows, seed in (("train", batch * self.steps, _SEED), ("val", 2, _SEED + 1)):
            if not (self.work / name).is_dir():
                write_rows(self.work / name, prose(), rows=rows, files=1, tokens=mean, seed=seed, spread=SPREAD)
        return self.work / "train" / "00000.parquet", self.work / "val" / "00000.parquet"


def run_case(bench: Bench, case: Case) -> dict[str, Any]:
    """Run one case to its end, or to the deadline; what it left."""
    batch = int(yaml.safe_load(bench.config.read_text(encoding="utf-8"))["data"]["train_batch_size"])
    train, val = bench.rows(batch)
    root = bench.work / "runs" / case.name
    shutil.rmtree(root, ignore_errors=True)
    ranks = min(case.ranks or bench.ranks, bench.ranks)
    settings = {
        "data.train_files": train,
        "data.val_files": val,
        "model.partial_pretrain": bench.model(case.shape),
        "trainer.total_training_steps": bench.steps,
        **({} if bench.on_gpu else {"trainer.logger": "[]"}),  # a CPU try needs no account
        **({"ulysses_sequence_parallel_size": ranks} if ranks < 4 else {}),
        **case.settings,
    }
    command = [sys.executable, "-m", "sft_job.cli", "train", str(bench.config)]
    command += [f"{name}={value}" for name, value in settings.items()]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(_ENV)}
    environ |= {"CHECKPOINT_DIR": str(root), "NPROC_PER_NODE": str(ranks), "WANDB_MODE": "offline"}
    run = RunFolder(root / "sft")
    begun = time.monotonic()
    codes: list[int] = []
    steps = case.steps if case.steps < bench.steps else 0  # a run that ends by itself is not stopped
    with (bench.out / f"{case.name}.log").open("w", encoding="utf-8") as log:
        for killed_at in [case.killed_at, 0] if case.killed_at else [0]:
            codes.append(_start(command, environ, run, ranks, log, killed_at, steps, bench.deadline))
    lines = _lines(run)
    return {
        **asdict(case),
        "ranks": ranks,
        "command": command,
        "exit_codes": codes,
        "wall_seconds": time.monotonic() - begun,
        "losses": {line["step"]: line["train/loss"] for line in lines},
        "metrics": lines,
    }


def _start(
    command: Sequence[str],
    environ: Mapping[str, str],
    run: RunFolder,
    ranks: int,
    log: Any,
    killed_at: int,
    steps: int,
    deadline: float,
) -> int:
    """One start of the command; stopped after so many steps, or when the time is over."""
    process = subprocess.Popen(command, env=dict(environ), stdout=log, stderr=log, start_new_session=True)
    asked, last = False, deadline + _STOP_SECONDS
    while process.poll() is None:
        time.sleep(0.1)
        step = max((line["step"] for line in _lines(run)), default=0)
        if killed_at and step >= killed_at - 1:
            os.kill(_rank_process(process.pid, ranks - 1), signal.SIGKILL)
            killed_at = 0
        elif not asked and ((steps and step >= steps) or time.monotonic() > deadline):
            process.send_signal(signal.SIGTERM)
            asked = True
        elif time.monotonic() > last:  # the supervisor ends its ranks when it is told to; here nobody waits any more
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode


def _rank_process(supervisor: int, rank: int) -> int:
    """The process of a rank that this supervisor started."""
    wanted = f"RANK={rank}".encode()
    for path in Path("/proc").iterdir():
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == supervisor and wanted in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except (OSError, ValueError, IndexError):
            continue
    raise RuntimeError(f"no process of rank {rank} below {supervisor}")


def _lines(run: RunFolder) -> list[dict[str, Any]]:
    """Training lines of the metrics, those that are whole."""
    found: list[dict[str, Any]] = []
    for line in run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in record:
            found.append(record)
    return found


def figures(result: Mapping[str, Any], ceiling: float) -> dict[str, Any]:
    """What the table shows of a case: medians over its steps but for the first two, of which one compiles.

    Args:
        result: of ``run_case``.
        ceiling: TFLOP/s of a matrix product.
    """
    lines = result["metrics"]
    late = lines[2:] or lines
    if not late:
        return {}
    tflops = statistics.median(line["perf/model_tflops_per_gpu"] for line in late)
    seconds = [line["perf/step_seconds"] for line in late]
    return {
        "steps": len(lines),
        "tokens_per_second_per_gpu": statistics.median(line["perf/tokens_per_second_per_gpu"] for line in late),
        "share_of_ceiling": tflops / ceiling,
        "step_seconds": statistics.median(seconds),
        "longest_step_seconds": max(seconds),
        "peak_gib": max((line["memory/peak_gib"] or 0.0 for line in lines), default=0.0),
        "exit_codes": result["exit_codes"],
    }


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Largest relative difference of the losses of steps that both made; None where there are none."""
    both = [(one["losses"][step], other["losses"][step]) for step in one["losses"] if step in other["losses"]]
    return max((abs(a - b) / abs(b) for a, b in both), default=None)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of all cases."""
    names = ("steps", "tokens_per_second_per_gpu", "share_of_ceiling", "step_seconds", "longest_step_seconds")
    heads = ("case", "ranks", *names, "peak_gib", "exit_codes", "loss_difference")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, result in results.items():
        cells = [name, result["ranks"], *(result["figures"].get(each) for each in heads[2:-1]), result["difference"]]
        shown = [f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in cells]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the cases that are named; 1 where one did not end as it should."""
    parser = argparse.ArgumentParser(description="The seed's own run, on the GPUs of this machine.")
    parser.add_argument("--config", type=Path, required=True, help="the seed's sft_trainer.yaml")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, required=True, help="folder for weights (16 GB a shape), rows and runs")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "benchmarks/results/seed_run"))
    parser.add_argument("--seconds-limit", type=float, default=1e9)
    parser.add_argument("--tiny", action="store_true", help="a small model and short documents, for a CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    deadline = time.monotonic() + options.seconds_limit - 90.0
    bench = Bench(
        options.config, options.work, options.out, options.ranks, on_gpu, options.tiny, options.steps, deadline
    )
    outcome = Outcome(options.out / "seed_run.json")
    ceiling = matmul_ceiling(torch.device("cuda" if on_gpu else "cpu"))
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    outcome.add(versions=versions(), ceiling=ceiling, device=device, commit=os.environ.get("SFT_JOB_COMMIT", ""))
    results: dict[str, dict[str, Any]] = {}
    wanted = options.cases.split(",")
    good = True
    for case in (each for each in CASES if each.name in wanted):
        result = run_case(bench, case)
        result["figures"] = figures(result, ceiling["tflops"])
        result["difference"] = (
            difference(result, results[case.compared_with]) if case.compared_with in results else None
        )
        results[case.name] = result
        expected = {ExitCode.DONE, ExitCode.STOPPED} | ({ExitCode.LOST} if case.killed_at else set())
        good = good and set(result["exit_codes"]) <= expected
        outcome.add(cases=results)
        (options.out / "seed_run.md").write_text(table(results), encoding="utf-8")
        say(table({case.name: result}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
