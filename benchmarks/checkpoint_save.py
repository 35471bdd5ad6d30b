"""Measures what a save costs the training: ``python benchmarks/checkpoint_save.py``; README.md explains the numbers."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from sft_job.checkpoint.checkpointer import HUGGINGFACE, Checkpointer
from sft_job.checkpoint.policy import Purpose, SavePolicy
from sft_job.checkpoint.state import RunState
from sft_job.config.schema import JobConfig
from sft_job.contract import RunFolder
from sft_job.model.build import build_model
from sft_job.model.precision import precision_of
from sft_job.optimizer import build_optimizer
from sft_job.parallel.mesh import build_mesh
from sft_job.processes import host_room
from sft_job.runtime import Runtime, start_runtime

# Of Qwen2.5-7B, and of a model that a laptop saves in a second.
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064},
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 8192},
}
_HEADS = {"7b": (28, 4), "small": (4, 2)}


def write_config(folder: Path, shape: str) -> Path:
    """A model folder with nothing but its config.json."""
    heads, kv_heads = _HEADS[shape]
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **SHAPES[shape],
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


class Bench:
    """A trained module whose steps are matrix products of a chosen length and the real optimizer step.

    Args:
        shape: of the model.
        dtype: of weights and optimizer states.
        step_seconds: length of a step's computation.
        work: for the model's config.
        runtime: this rank.
    """

    def __init__(self, shape: str, dtype: str, step_seconds: float, work: Path, runtime: Runtime) -> None:
        config = JobConfig()
        config.model.partial_pretrain = str(write_config(work / "model", shape))
        config.model.init = "random"
        config.model.fsdp_config.model_dtype = dtype
        self._runtime = runtime
        mesh = build_mesh(runtime.device.type, 1)
        precision = precision_of(config.model.fsdp_config, runtime.device.type)
        # Filled on the device right here: the job's own random weights do not depend on the layout, which takes longer.
        self.module: nn.Module = build_model(config.model, mesh, runtime.device, precision, 1, load=False)[0]
        self.optimizer = build_optimizer(self.module, config.optim, runtime.device.type)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.to_local().normal_(std=0.02)  # type: ignore[operator]
        self._matrix = torch.randn(4096 if runtime.device.type == "cuda" else 512, device=runtime.device).outer(
            torch.randn(4096 if runtime.device.type == "cuda" else 512, device=runtime.device)
        )
        self._products = 1
        self._products = max(1, round(step_seconds / max(1e-6, self._timed(self._compute))))
        self.step()  # makes the optimizer's states

    def _compute(self) -> None:
        product = self._matrix
        for _ in range(self._products):
            product = torch.mm(self._matrix, product).clamp_(-1, 1)

    def _sync(self) -> None:
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)

    def _timed(self, action: Callable[[], Any]) -> float:
        self._sync()
        begin = time.perf_counter()
        action()
        self._sync()
        return time.perf_counter() - begin

    def _train(self) -> None:
        self._compute()
        for parameter in self.module.parameters():
            parameter.grad = parameter.detach()  # no memory of its own: what is learned does not matter here
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> float:
        """Seconds of one step."""
        return self._timed(self._train)


def _state(step: int) -> RunState:
    return RunState(step, 9, 9, 0, 0, 0, 0, None, 1, 1, "", "", {}, True, "")


def measure(bench: Bench, folder: Path, device: torch.device, *, asynchronous: bool, saves: int) -> dict[str, Any]:
    """Save some times, each into an empty folder; what each cost."""
    run = RunFolder(folder / ("async" if asynchronous else "sync"))
    policy = SavePolicy(frozenset({"model", "optimizer"}), asynchronous=asynchronous)
    said: list[str] = []
    checkpointer = Checkpointer(
        run, bench.module, bench.optimizer, device, policy, HUGGINGFACE, lambda folder, meet: "", warn=said.append
    )
    begin = time.perf_counter()
    checkpointer.prepare()
    locking: list[float] = []
    while asynchronous and not checkpointer.ready:
        locking.append(bench.step())
    locked = time.perf_counter() - begin
    plain = sorted(bench.step() for _ in range(5))[2]
    results: list[dict[str, Any]] = []
    for step in range(1, saves + 1):
        begin = time.perf_counter()
        checkpointer.save(_state(step), Purpose.KEPT)
        asked = time.perf_counter() - begin
        steps: list[float] = []
        while checkpointer.flags()[1] == 0.0 and asynchronous:
            steps.append(bench.step())
        checkpointer.collect(float(dist.get_world_size()))
        timing = checkpointer.timing
        assert timing is not None, said
        results.append(
            {
                "save_call_seconds": asked,
                "slowest_step_beside_it_seconds": max(steps, default=0.0),
                "steps_beside_it": len(steps),
                "stall_seconds": asked + sum(max(0.0, each - plain) for each in steps[:1]),
                "all_steps_excess_seconds": asked + sum(each - plain for each in steps),
                "total_seconds": timing.total,
                "gib": timing.bytes / 2**30,
            }
        )
        shutil.rmtree(run.step(step))
    checkpointer.close()
    return {
        "asynchronous": asynchronous,
        "step_seconds": plain,
        "memory_locked_seconds": locked if asynchronous else 0.0,
        "slowest_step_while_locking_seconds": max(locking, default=0.0),
        "saves": results,
        "said": said,
    }


def _show(results: list[dict[str, Any]]) -> None:
    table = Table(title="What a save costs")
    for column in ("async_save", "save", "call s", "stall s", "lost in all s", "written after s", "GiB", "step s"):
        table.add_column(column)
    for result in results:
        for number, save in enumerate(result["saves"], start=1):
            table.add_row(
                str(result["asynchronous"]),
                str(number),
                *(
                    f"{value:.3f}"
                    for value in (
                        save["save_call_seconds"],
                        save["stall_seconds"],
                        save["all_steps_excess_seconds"],
                        save["total_seconds"],
                        save["gib"],
                        result["step_seconds"],
                    )
                ),
            )
    Console(width=120).print(table)


def _machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = host_room()
    return {
        "gpu": gpu,
        "cores": len(os.sched_getaffinity(0)),
        "free_memory_gib": None if memory is None else round(memory / 2**30, 1),
        "torch": version("torch"),
        "commit": commit.stdout.strip(),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="model whose full state is saved")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of weights and optimizer states")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints go")
    parser.add_argument("--saves", type=int, default=1, help="saves of each kind")
    parser.add_argument("--step-seconds", type=float, default=0.5, help="computation of a step, about")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    return parser.parse_args()


def main() -> int:
    """Measure, show, write."""
    arguments = _arguments()
    runtime = start_runtime(600)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sft-job-save-", dir=arguments.folder) as work:
        bench = Bench(arguments.shape, arguments.dtype, arguments.step_seconds, Path(work), runtime)
        built = time.perf_counter() - begin
        results = [
            measure(bench, Path(work), runtime.device, asynchronous=asynchronous, saves=arguments.saves)
            for asynchronous in (True, False)
        ]
    _show(results)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "build_seconds": built,
        "seconds": time.perf_counter() - begin,
        "results": results,
    }
    sys.stdout.write(json.dumps(record) + "\n")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
