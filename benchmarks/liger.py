"""Is Liger faster than what is there? ``python benchmarks/liger.py`` on a GPU with liger-kernel installed.

A training step (forward, backward, AdamW) of some blocks of Qwen2.5-7B's shape with its full head, on packed
documents: as the job runs it, the same with Liger's RMSNorm, SwiGLU and RoPE kernels in it, and the two losses alone
(the job's chunks against Liger's fused linear cross-entropy).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers

from sft_job.config.schema import FsdpConfig, ModelConfig
from sft_job.data.batches import PackedBatch, pack_rows
from sft_job.data.cache import TokenRow
from sft_job.model.build import build_model
from sft_job.model.loss import LogitRule, chunked_cross_entropy, row_losses
from sft_job.model.precision import precision_of
from sft_job.parallel.mesh import build_mesh

VOCABULARY, HIDDEN = 152_064, 3584


def batch_of(documents: int, length: int) -> PackedBatch:
    """Random documents, all of them trained."""
    random = np.random.default_rng(0)
    ids = [random.integers(0, VOCABULARY, length).astype(np.int32) for _ in range(documents)]
    return pack_rows([TokenRow(row, np.ones(length, dtype=np.bool_)) for row in ids], 1, 0, 0)


def write_config(folder: Path, blocks: int) -> None:
    """A folder with the config of Qwen2.5-7B, of fewer blocks."""
    transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=18_944,
        num_hidden_layers=blocks,
        num_attention_heads=28,
        num_key_value_heads=4,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)


def seconds(step: Callable[[], Any], warm: int, repeats: int) -> float:
    """Median time of a step on the GPU."""
    times: list[float] = []
    for index in range(warm + repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if index >= warm:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measured(step: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Time and peak memory."""
    torch.cuda.reset_peak_memory_stats()
    took = seconds(step, 3, repeats)
    return {"ms": 1e3 * took, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def blocks_step(folder: Path, batch: PackedBatch, liger: bool) -> Callable[[], float]:
    """A whole training step of the job's own module."""
    device = torch.device("cuda", 0)
    bf16 = FsdpConfig(model_dtype="bf16")
    # Compiled, Liger's own kernels would only be in the compiler's way.
    config = ModelConfig(partial_pretrain=str(folder), init="random", compile=not liger, fsdp_config=bf16)
    mesh = build_mesh("cuda", 1, -1)
    precision = precision_of(config.fsdp_config, "cuda")
    module, _ = build_model(config, mesh, device, precision, 1, load=True, accumulates=False)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2  # noqa: PLC0415  an optional package

        apply_liger_kernel_to_qwen2(
            rope=True,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
            rms_norm=True,
            swiglu=True,
            model=module.lm,
        )
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    on_device = batch.to(device)
    fused = liger_loss() if liger else None

    def loss_of() -> torch.Tensor:
        if fused is None:
            return module(on_device, batch.num_tokens)
        rows, targets = on_device.target_rows, on_device.targets[0]
        head: Any = module.lm.get_output_embeddings()
        return fused(head.weight, module.hidden(on_device)[0][rows], targets[rows]) / batch.num_tokens

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def liger_loss() -> Any:
    """Liger's fused head and cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # noqa: PLC0415  an optional package

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")


def loss_steps(rows: int) -> dict[str, Callable[[], Any]]:
    """The two losses, forward and backward over hidden states."""
    bf16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    hidden, head = torch.randn(rows, HIDDEN, **bf16), torch.randn(VOCABULARY, HIDDEN, **bf16)
    targets = torch.randint(0, VOCABULARY, (rows,), device="cuda")
    fused, compiled = liger_loss(), torch.compile(row_losses)

    def own() -> torch.Tensor:
        return chunked_cross_entropy(hidden, head, None, targets, LogitRule(), each=compiled)

    def run(loss: Callable[[], Any]) -> None:
        hidden.grad = head.grad = None
        loss().backward()

    return {
        "loss alone, chunks": lambda: run(own),
        "loss alone, Liger": lambda: run(lambda: fused(head, hidden, targets)),
    }


def main() -> int:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29511")):
        os.environ.setdefault(name, value)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", 0))
    results: dict[str, dict[str, float]] = {}
    for name, step in loss_steps(arguments.documents * arguments.length).items():
        results[name] = measured(step, arguments.repeats)
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as work:
        write_config(Path(work), arguments.blocks)
        batch = batch_of(arguments.documents, arguments.length)
        # Liger's RoPE replaces a function of the transformers module for good: the job's own way comes first.
        for name, liger in (("blocks and loss, as the job runs", False), ("the same with Liger's kernels", True)):
            results[name] = measured(blocks_step(Path(work), batch, liger), arguments.repeats)
            torch.cuda.empty_cache()
    versions = {name: version(name) for name in ("torch", "transformers", "liger-kernel")}
    record = {"gpu": torch.cuda.get_device_name(), **versions, "settings": {**vars(arguments), "out": None}}
    for name, result in results.items():
        sys.stdout.write(f"{name:36} {result['ms']:9.2f} ms  peak {result['peak_gib']:6.2f} GiB\n")
    if arguments.out:
        arguments.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
