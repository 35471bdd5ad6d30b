"""What fp8 does to the losses of a training that learns: ``python -m benchmarks.fp8_demo``; README.md explains.

The demo's graph problems, a model whose sizes a GPU likes, 200 steps in bf16 and in both forms of fp8, from the same
weights on the same rows in the same order. Everything is put together by the job's own ``build_job``, in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.ours_side import EnoughStepsError, MarkedLoader, checked_config, nested
from benchmarks.outcome import say
from benchmarks.stamps import StepClock
from benchmarks.throughput import machine
from sft_job.checkpoint.start import Start
from sft_job.config.load import run_folder
from sft_job.config.schema import JobConfig
from sft_job.demo.graphs import draw_problems, write_parquet
from sft_job.demo.tokenizer import train_tokenizer
from sft_job.errors import JobError
from sft_job.job import build_job
from sft_job.runtime import Runtime, StopWish, start_runtime

TOLERANCE = 0.05
"""Mean relative difference from bf16 over a window of steps that counts as the same training."""
OF_ROUNDING = 1.25
"""Also the same: no farther from bf16 than so many times what rounding alone does to bf16 in this window."""
SEED = 1
SHOWN_EVERY = 20


@dataclass(frozen=True)
class Shape:
    """How large everything is.

    Attributes:
        model: config.json, but for the vocabulary.
        rows: training problems; a step has ``batch`` of them.
        batch: rows of a step.
        steps: of each run.
        window: steps over which losses are compared, one window after the other.
        lr: after the warm-up.
    """

    model: Mapping[str, Any]
    rows: int
    batch: int
    steps: int
    window: int
    lr: float


_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
SHAPES: Mapping[str, Shape] = {
    "real": Shape(
        {
            **_QWEN3,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        rows=14_400,
        batch=64,
        steps=200,
        window=50,
        lr=3e-4,
    ),
    "tiny": Shape(
        {
            **_QWEN3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
        rows=64,
        batch=8,
        steps=4,
        window=2,
        lr=1e-2,
    ),
}
BF16, ROUNDED = "bf16", "bf16, not compiled"
RUNS: Mapping[str, Mapping[str, Any]] = {
    BF16: {},
    ROUNDED: {"model.compile": False},
    "fp8 tensorwise": {"model.fp8": "tensorwise"},
    "fp8 rowwise": {"model.fp8": "rowwise"},
}
"""The second one differs from the first by rounding alone: what a difference means is seen from it."""


def write_input(folder: Path, shape: Shape) -> None:
    """Rows, tokenizer and config, as the demo makes them."""
    problems, _ = draw_problems(shape.rows, 0, SEED)
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(problems, folder / "train.parquet")
    tokenizer = train_tokenizer(problems, folder / "model")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = {**shape.model, "vocab_size": -(-len(tokenizer) // 16) * 16, "bos_token_id": None, **ids}
    (folder / "model" / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def settings_of(folder: Path, out: Path, shape: Shape, more: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, as nested mappings."""
    return nested(
        {
            "data.train_files": str(folder / "train.parquet"),
            "data.val_files": None,
            "data.prompt_key": "prompt",
            "data.response_key": "response",
            "data.cache_dir": str(folder / "cache"),
            "data.train_batch_size": shape.batch,
            "data.micro_batch_size_per_gpu": shape.batch,
            "data.max_length": 256,
            "model.partial_pretrain": str(folder / "model"),
            "model.init": "random",
            "model.recompute": "none",
            "model.fsdp_config.model_dtype": "fp32",
            "optim.lr": shape.lr,
            "optim.lr_scheduler": "constant",
            "optim.warmup_steps": shape.steps // 10,
            "optim.clip_grad": 1.0,
            "trainer.default_local_dir": str(out / "run"),
            "trainer.total_training_steps": shape.steps + 1,
            "trainer.total_epochs": 1,
            "trainer.logger": ["console"],
            "trainer.seed": SEED,
            "trainer.async_save": False,
            "trainer.recovery_minutes": 0,
            "trainer.rehearsal": False,
            **more,
        }
    )


def train(runtime: Runtime, config: JobConfig, steps: int) -> dict[str, Any]:
    """One run: its losses, and the time that it took.

    Returns:
        ``state``: done, or why the job refused it (fp8 on a device without).
    """
    began = time.perf_counter()
    try:
        job = build_job(config, runtime, StopWish(), Start())
    except JobError as error:
        return {"state": str(error).splitlines()[0], "losses": []}
    clock = StepClock(runtime.device, None, 0)
    loader = MarkedLoader(job.loader, clock, steps)
    try:
        replace(job, loader=loader).run()  # pyright: ignore[reportArgumentType]  the loop asks for steps() alone
    except EnoughStepsError:
        pass
    finally:
        job.close()
    lines = run_folder(config).metrics.read_text(encoding="utf-8").splitlines()
    return {
        "state": "done",
        "losses": [json.loads(line)["train/loss"] for line in lines],
        "tokens_of_step": statistics.mean(loader.tokens),
        "step_seconds": statistics.median(clock.seconds()),
        "seconds": time.perf_counter() - began,
    }


def compared(
    losses: Sequence[float], reference: Sequence[float], window: int, rounded: Sequence[float] = ()
) -> dict[str, Any]:
    """Losses beside bf16's, window by window.

    Once a training is far down, runs that differ by rounding alone part from step to step; so what counts there is how
    far these are from each other.

    Args:
        losses: of a run.
        reference: bf16's.
        window: steps of a window.
        rounded: of a run that differs from bf16 by rounding alone.

    Returns:
        ``distances``: mean of the relative differences' sizes in each window; ``allowed``: how far each may be;
        ``mean_loss``: that of the last window over bf16's, less 1; ``same``: within what is allowed, None where one of
        the runs has not come to its end or nothing was learned; ``learned``: bf16's loss at the end over that at the
        beginning.
    """
    if not losses or len(losses) != len(reference):
        return {"same": None}
    distances = _distances(losses, reference, window)
    allowed = [TOLERANCE] * len(distances)
    if len(rounded) == len(reference):
        allowed = [max(TOLERANCE, OF_ROUNDING * each) for each in _distances(rounded, reference, window)]
    last = statistics.mean(reference[-window:])
    learned = last / reference[0]
    same = all(mine <= most for mine, most in zip(distances, allowed, strict=True)) if learned < 0.5 else None
    return {
        "distances": distances,
        "allowed": allowed,
        "mean_loss": statistics.mean(losses[-window:]) / last - 1,
        "learned": learned,
        "same": same,
    }


def _distances(losses: Sequence[float], reference: Sequence[float], window: int) -> list[float]:
    apart = [abs(mine - right) / right for mine, right in zip(losses, reference, strict=True)]
    return [statistics.mean(apart[start : start + window]) for start in range(0, len(apart), window)]


def markdown(record: Mapping[str, Any]) -> str:
    """The verdicts, then the curves."""
    here, runs = record["machine"], record["runs"]
    lines = [
        f"{here['gpu'] or 'CPU'}, torch {here['versions'].get('torch')}, torchao {here['versions'].get('torchao')}, "
        f"{record['started']}, commit {here['commit']}; mean relative difference from bf16 by windows of "
        f"{record['window']} steps; wanted: at most {TOLERANCE:.0%}, or {OF_ROUNDING} times what rounding alone does",
        "",
        "| run | steps | differences, window by window | mean loss of the last one | same | s/step | s in all |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        if run["state"] != "done":
            lines.append(f"| {name} | - | - | - | {run['state']} | - | - |")
            continue
        found = record["compared"].get(name)
        shown = "| - | - | reference"
        if found and "distances" in found:
            verdict = {True: "yes", False: "NO", None: "nothing proved: bf16 has not learned"}[found["same"]]
            verdict = "what rounding does" if name == ROUNDED else verdict
            distances = ", ".join(f"{each:.1%}" for each in found["distances"])
            shown = f"| {distances} | {found['mean_loss']:+.2%} | {verdict}"
        lines.append(f"| {name} | {len(run['losses'])} {shown} | {run['step_seconds']:.4f} | {run['seconds']:.0f} |")
    done = {name: run["losses"] for name, run in runs.items() if run["state"] == "done"}
    steps = len(next(iter(done.values()), []))
    shown_steps = sorted({0, *range(SHOWN_EVERY - 1, steps, SHOWN_EVERY), max(0, steps - 1)}) if steps else []
    lines += ["", f"| step | {' | '.join(done)} |", f"|---|{'---|' * len(done)}"]
    lines += [f"| {step + 1} | {' | '.join(f'{each[step]:.4f}' for each in done.values())} |" for step in shown_steps]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--shape", choices=tuple(SHAPES), default="real", help="tiny: everything small, for a CPU")
    asked.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    asked.add_argument("--seconds-limit", type=float, default=150, help="no run is begun after it")
    asked.add_argument("--out", type=Path, default=None, help="folder of the results; $OUT, or benchmarks/results")
    return asked


def main(words: Sequence[str] | None = None) -> int:
    """Train, compare, write ``fp8_demo.json`` and ``fp8_demo.md``; 1 where fp8 is another training."""
    arguments, began = parser().parse_args(words), time.monotonic()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    shape = SHAPES[arguments.shape]
    out: Path = arguments.out or Path(os.environ.get("OUT") or "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Any] = {}
    record: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(arguments.device == "cuda"),
        "model": dict(shape.model),
        "tolerance": TOLERANCE,
        "window": shape.window,
        "runs": runs,
        "compared": {},
    }
    with tempfile.TemporaryDirectory(prefix="fp8_demo_") as temporary:
        folder = Path(temporary)
        write_input(folder / "input", shape)
        configs = {
            name: checked_config(
                settings_of(folder / "input", folder / str(place), shape, more), folder / f"{place}.yaml", 1
            )
            for place, (name, more) in enumerate(RUNS.items())
        }
        runtime = start_runtime(600)
        for name, config in configs.items():
            if time.monotonic() - began > arguments.seconds_limit:
                runs[name] = {"state": "not begun: no time left", "losses": []}
                continue
            runs[name] = train(runtime, config, shape.steps)
            if name != BF16:
                reference, rounded = runs[BF16]["losses"], runs[ROUNDED]["losses"]
                record["compared"][name] = compared(runs[name]["losses"], reference, shape.window, rounded)
            say(f"{name}: {runs[name]['state']}, {time.monotonic() - began:.0f} s")
            (out / "fp8_demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = markdown(record)
    (out / "fp8_demo.md").write_text(table, encoding="utf-8")
    say("\n" + table)
    return 1 if any(each["same"] is False for each in record["compared"].values()) else 0


if __name__ == "__main__":
    code = main()
    # As the job's own ranks do: a teardown of the process group may hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
