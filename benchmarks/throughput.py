"""How fast the job trains, beside its peers: ``python -m benchmarks.throughput --rows NAME,...``; README.md explains.

Each row is measured A-B-A: the job, its partners, the job again, on the same machine, tokens and weights, each in
processes of its own. What is known is written after every run, so a time limit loses nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from benchmarks.gpu_watch import under_load, watching
from benchmarks.outcome import versions
from benchmarks.plan import Run, RunSpec, data_steps, runs_of
from benchmarks.report import figures, markdown, verdict
from benchmarks.rows import REFERENCE, ROWS, Row, rows_named, sittings
from benchmarks.shapes import SHAPES, write_model_folder
from benchmarks.stamps import host_seconds
from benchmarks.tokens import write_tokens
from sft_job.config.keys import KEYS
from sft_job.contract import RunFolder
from sft_job.metrics.flops import FlopsShape, model_flops
from sft_job.tuning import tuned

_LAST_SECONDS = 15.0
"""Kept for ending a run and writing down what it left."""
_WORTH_STARTING = 30.0
"""A run that has less time than this is not begun."""
_QUOTED = 1500
_LOGGED = 200_000
_SAID = 40


@dataclass
class Bench:
    """A benchmark under way.

    Attributes:
        work: folder for models, tokens and runs.
        out: folder for results and logs.
        on_gpu: False on a CPU.
        deadline: by the monotonic clock.
        record: everything known, as it is written.
    """

    work: Path
    out: Path
    on_gpu: bool
    deadline: float
    record: dict[str, Any] = field(default_factory=dict[str, Any])

    def time_left(self) -> float:
        """Seconds that a run may take."""
        return self.deadline - time.monotonic() - _LAST_SECONDS

    def write(self, rows: Sequence[Row]) -> None:
        """Results and table as they stand."""
        runs = self.record["runs"]
        ceilings = [each for run in runs for each in run["figures"].get("ceilings_tflops") or ()]
        # The highest rate seen: the strictest measure of what the card can do here.
        self.record["ceiling_tflops"] = max(ceilings, default=None)
        warm = [each for run in runs for each in run["figures"].get("warm_ceilings_tflops") or ()]
        self.record["warm_ceiling_tflops"] = max(warm, default=None)
        begun = {run["row"] for run in runs}
        rates = (self.record["ceiling_tflops"], self.record["warm_ceiling_tflops"])
        self.record["verdicts"] = [verdict(row, runs, *rates) for row in rows if row.name in begun]
        (self.out / "throughput.json").write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        (self.out / "throughput.md").write_text(markdown(self.record), encoding="utf-8")


def run_sitting(bench: Bench, rows: Sequence[Row], runs: Sequence[Run], steps: int) -> None:
    """Run a sitting, one run after the other, and note each."""
    shape = rows[0].shape
    model = write_model_folder(bench.work / shape, shape)
    vocabulary = SHAPES[shape]["vocab_size"]
    for run in runs:
        if bench.time_left() < _WORTH_STARTING:
            _note(bench, run, shape, {"state": "not begun: no time left", "ranks": []})
            continue
        tokens = run.side.tokens
        name = f"{shape}_{tokens.rows}x{tokens.length}_{tokens.total}_{steps}"
        token_file = write_tokens(bench.work / name / "rows.parquet", tokens, vocabulary, steps)
        _note(bench, run, shape, _one_run(bench, run, model, token_file))
        bench.write(rows)


def _note(bench: Bench, run: Run, shape: str, found: Mapping[str, Any]) -> None:
    record = {**asdict(run), "side": asdict(run.side), "shape": shape, **found}
    record["figures"] = figures(record)
    record.pop("ranks")
    bench.record["runs"].append(record)
    rate = record["figures"].get("tokens_per_second_per_gpu")
    shown = f"{rate['median']:,.0f} tok/s per GPU" if rate else ""
    took = f"{found['wall_seconds']:.0f} s" if "wall_seconds" in found else ""
    _say(f"{run.row} {run.part} {run.side.name}: {found['state']} {shown} {took}")


def _one_run(bench: Bench, run: Run, model: Path, token_file: Path) -> dict[str, Any]:
    """Start a run's processes, wait for them within the time that is left, and gather what they wrote."""
    out = Path(tempfile.mkdtemp(prefix="run_", dir=bench.work))
    settings = dict(run.side.settings)
    if run.part == "R":
        settings = {name: value for name, value in settings.items() if name not in REFERENCE or name in KEYS}
    spec = RunSpec(
        settings=settings,
        tokens=run.side.tokens,
        token_file=str(token_file),
        model=str(model),
        out=str(out),
        steps=run.steps,
        warmup=run.warmup,
        ranks=run.side.ranks,
        on_gpu=bench.on_gpu,
    )
    spec.write(out / "spec.json")
    began = time.monotonic()
    log = out / "log"
    with watching(out / "gpu.csv"):
        code = _processes(run, out / "spec.json", log, bench.time_left(), bench.on_gpu, bench.work)
    text = log.read_text(encoding="utf-8", errors="replace")
    _keep_log(bench.out / "throughput.log", f"{run.row} {run.part} {run.side.name}", text)
    ranks = [
        json.loads(path.read_text(encoding="utf-8"))
        for rank in range(spec.ranks)
        if (path := out / f"rank_{rank}.json").is_file()
    ]
    found: dict[str, Any] = {
        "state": state_of(code, text),
        "wall_seconds": time.monotonic() - began,
        "ranks": ranks,
        "gpu": under_load(out / "gpu.csv"),
        "step_seconds": host_seconds(out / "steps.jsonl"),
    }
    if run.side.program == "ours":
        found["said"] = [line for line in text.splitlines() if not line.startswith("step ")][:_SAID]
    if code != 0:
        found["error"] = text[-_QUOTED:]
        found["losses"], found["grad_norms"] = _logged(out / "run" / "logs" / "metrics.jsonl")
        if not run.side.settings.get("packing"):
            lengths = run.side.tokens.lengths(spec.all_steps)
            shape = FlopsShape.from_config(AutoConfig.from_pretrained(model))
            frozen = any("lora_rank" in name for name in settings)
            found["tokens"] = [sum(each) for each in lengths]
            found["flops"] = [model_flops(shape, each, frozen_weights=frozen) for each in lengths]
    shutil.rmtree(out, ignore_errors=True)
    return found


def state_of(code: int | None, text: str) -> str:
    """How a run ended, by its exit code (None = the time was over) and its output."""
    if code == 0:
        return "done"
    if code is None:
        return "cut off by the time limit"
    return "out of memory" if "out of memory" in text.lower() else f"failed with {code}"


def _keep_log(path: Path, title: str, text: str) -> None:
    """All runs' output in one file, the end of each: the lent machine gives back few files."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"===== {title}\n{text[-_LOGGED:]}\n")


def _logged(metrics: Path) -> tuple[list[float], list[float]]:
    """Losses and gradient norms that the job wrote before it was cut off."""
    records: list[dict[str, Any]] = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return [each["train/loss"] for each in records], [each["train/grad_norm"] for each in records]


def _processes(run: Run, spec: Path, log: Path, seconds: float, on_gpu: bool, kernels: Path) -> int | None:
    """Run the side's program on its ranks; the exit code, None where the time was over."""
    module = {"ours": "benchmarks.ours_side", "trl": "benchmarks.trl_side"}[run.side.program]
    command = [sys.executable, "-m"]
    if run.side.ranks > 1:
        # Not for one rank: under a launcher TRL's accelerate would wrap a lone model in DDP.
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={run.side.ranks}", "-m"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    threads = max(1, len(os.sched_getaffinity(0)) // run.side.ranks)
    environ = {**os.environ, **offline, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environ.setdefault("OMP_NUM_THREADS", str(threads))
    environ |= tuned(environ, RunFolder(kernels), threads)  # as the job's supervisor has it; the peer gets it too
    if not on_gpu:
        environ["CUDA_VISIBLE_DEVICES"] = ""
    if run.side.ranks == 1 and on_gpu:
        environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, module, str(spec)],
            env=environ,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a run: torchrun passes the first signal on to the ranks."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def machine(on_gpu: bool) -> dict[str, Any]:
    """Hardware, versions and commit."""
    gpu = driver = None
    if on_gpu and shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        lines = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip().splitlines()
        if lines:
            name, driver, _ = (part.strip() for part in lines[0].split(","))
            gpu = f"{len(lines)} x {name}"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": gpu,
        "driver": driver,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "versions": versions(),
        # What is told goes first: a lent machine's copy of the repository may stand at another commit than its files.
        "commit": os.environ.get("SFT_JOB_COMMIT") or git.stdout.strip() or "unknown",
    }


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _chosen(arguments: argparse.Namespace) -> list[Row]:
    rows = rows_named(arguments.rows.split(","))
    if arguments.shape == "tiny":
        rows = [row.tiny() for row in rows]
    extra: dict[str, Any] = {}
    for each in arguments.ours:
        name, _, value = each.partition("=")
        extra[name] = yaml.safe_load(value)
    peers = {f"TRL, {name}" for name in arguments.peers.split(";")} if arguments.peers else None

    def changed(row: Row) -> Row:
        partners = tuple(
            replace(side, settings={**side.settings, **extra}) if side.program == "ours" else side
            for side in row.partners
            if side.program == "ours" or peers is None or side.name in peers
        )
        return replace(
            row,
            subject=replace(row.subject, settings={**row.subject.settings, **extra}),
            partners=partners,
        )

    return [changed(row) for row in rows]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rows", default=ROWS[0].name, help=f"of {', '.join(row.name for row in ROWS)}")
    asked.add_argument("--steps", type=int, default=20, help="measured steps")
    asked.add_argument("--warmup", type=int, default=8, help="steps before them")
    asked.add_argument("--seconds-limit", type=float, default=570, help="for everything together")
    asked.add_argument("--out", type=Path, default=None, help="folder of the results; $OUT, or benchmarks/results")
    asked.add_argument("--work", type=Path, default=None, help="folder for models and tokens; kept where it is named")
    asked.add_argument("--shape", choices=("real", "tiny"), default="real", help="tiny: everything small, for a CPU")
    asked.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    asked.add_argument("--no-partners", action="store_true", help="the job alone, once")
    asked.add_argument("--no-reference", action="store_true", help="without the losses' reference")
    asked.add_argument("--peers", metavar="NAME[;NAME]", help="TRL's variants to run, such as recomputation; all")
    asked.add_argument("--ours", action="append", default=[], metavar="KEY=VALUE", help="a setting of the job")
    return asked


def main() -> int:
    """Measure the rows that were asked for."""
    arguments = parser().parse_args()
    began = time.monotonic()
    rows = _chosen(arguments)
    out = arguments.out or Path(os.environ.get("OUT") or "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="throughput_"))
    work.mkdir(parents=True, exist_ok=True)
    on_gpu = arguments.device == "cuda"
    bench = Bench(work, out, on_gpu, began + arguments.seconds_limit)
    bench.record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(on_gpu),
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "runs": [],
    }
    try:
        for sitting in sittings(rows):
            asked = {"partners": not arguments.no_partners, "reference": not arguments.no_reference}
            runs = runs_of(sitting, arguments.steps, arguments.warmup, **asked)
            run_sitting(bench, sitting, runs, data_steps(sitting, arguments.steps, arguments.warmup))
    finally:
        bench.write(rows)
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    _say("\n" + markdown(bench.record))
    return 0 if all(run["state"] == "done" for run in bench.record["runs"] if run["part"] != "B") else 1


if __name__ == "__main__":
    sys.exit(main())
