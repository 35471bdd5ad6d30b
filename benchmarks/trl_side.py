"""One rank of the peer in a benchmark: ``python -m benchmarks.trl_side SPEC.json``, where TRL is.

TRL's own ``SFTTrainer`` with its own options, on the rows that the job trains on, in the same order, from the same
weights (drawn as the job draws them; with adapters only the distribution is the same). Settings of a side are
arguments of ``SFTConfig`` and these:

- ``lora_rank``, ``lora_alpha``: adapters on all linear layers through PEFT;
- ``attention``: an ``attn_implementation`` instead of flash-attention 4;
- ``liger``: False = without Liger's kernels;
- ``ring``: ranks that share a sequence (context parallelism under FSDP2, with SDPA).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks import trl_attention
from benchmarks.ceiling import matmul_ceiling
from benchmarks.outcome import Outcome, say, versions
from benchmarks.plan import LEARNING_RATE, RunSpec
from benchmarks.stamps import StepClock
from benchmarks.tokens import SEED, read_in_step_order
from sft_job.metrics.flops import FlopsShape, model_flops
from sft_job.model.supported import decoder_blocks
from sft_job.model.weights import draw, unit_seed

OWN_SETTINGS = ("lora_rank", "lora_alpha", "attention", "liger", "ring")


def sft_arguments(spec: RunSpec) -> dict[str, Any]:
    """Arguments of ``SFTConfig``: what the job does too, then the side's own."""
    ring = spec.settings.get("ring", 1)
    packing = spec.settings.get("packing", False)
    arguments: dict[str, Any] = {
        "output_dir": str(Path(spec.out) / "trl"),
        "max_steps": spec.all_steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused" if spec.on_gpu else "adamw_torch",
        "seed": SEED,
        "bf16": False,  # weights, gradients and states are bf16 themselves: no autocast
        "use_cpu": not spec.on_gpu,
        "use_liger_kernel": spec.on_gpu and spec.settings.get("liger", True),
        "padding_free": ring == 1,
        "max_length": spec.tokens.length if packing else None,
        "dataloader_num_workers": 2 if spec.on_gpu else 0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if ring > 1:
        arguments |= {"pad_to_multiple_of": 2 * ring, **_ring_arguments(ring)}
    return arguments | {name: value for name, value in spec.settings.items() if name not in OWN_SETTINGS}


def _ring_arguments(ring: int) -> dict[str, Any]:
    from accelerate.parallelism_config import ParallelismConfig  # noqa: PLC0415  this kind of run alone needs it

    return {
        "parallelism_config": ParallelismConfig(cp_size=ring),
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"fsdp_version": 2, "reshard_after_forward": True},
    }


def drawn_model(folder: str, attention: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with the weights that the job draws from the same seed."""
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    lm.tie_weights()
    buffers = {name: buffer.clone() for name, buffer in lm.named_buffers()}
    blocks = decoder_blocks(lm)
    for index, block in enumerate(blocks):
        draw(block.modules(), lm, device, unit_seed(SEED, f"block {index}"))
    inside = {id(part) for block in blocks for part in block.modules()}
    draw((part for part in lm.modules() if id(part) not in inside), lm, device, unit_seed(SEED, "root"))
    lm.tie_weights()
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        parent = lm.get_submodule(owner)
        parent.register_buffer(leaf, buffer.to(device), persistent=leaf not in parent._non_persistent_buffers_set)
    return lm


def step_lengths(rows: list[list[int]], steps: int, micro_batches: int, batch: int, groups: int) -> list[list[int]]:
    """Tokens of the documents of each step.

    Args:
        rows: tokens of the documents of each row of TRL's data set (several where it packs).
        steps: of the run; the rows begin anew where they end.
        micro_batches: ``gradient_accumulation_steps``.
        batch: ``per_device_train_batch_size``.
        groups: ranks that each have rows of their own.
    """
    per_step = micro_batches * batch * groups
    per_epoch = len(rows) // per_step or 1
    steps_rows = [rows[step % per_epoch * per_step :][:per_step] for step in range(steps)]
    return [[length for row in each for length in row] for each in steps_rows]


def main() -> int:
    """Train so many steps and write down what they took."""
    began = time.perf_counter()
    # TRL is imported here, after a spec was read: the rest of this file serves tests that have no TRL.
    from datasets import Dataset  # noqa: PLC0415  # pyright: ignore
    from transformers import TrainerCallback  # noqa: PLC0415
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415  # pyright: ignore

    spec = RunSpec.read(Path(sys.argv[1]))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if spec.on_gpu else torch.device("cpu")
    if spec.on_gpu:
        torch.cuda.set_device(device)
    out = Path(spec.out)
    outcome = Outcome(out / f"rank_{rank}.json")
    arguments = sft_arguments(spec)
    shown = {name: str(value) if name == "parallelism_config" else value for name, value in arguments.items()}
    outcome.add(versions=versions(), device=str(device), config={**spec.settings, **shown})
    outcome.add(ceiling_before=matmul_ceiling(device))
    clock = StepClock(device, out / "steps.jsonl" if rank == 0 else None, spec.warmup)
    losses: list[float] = []
    norms: list[float] = []

    class Marks(TrainerCallback):
        """Ends of steps, losses and norms."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 0:
                clock.mark()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            clock.mark()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))
                norms.append(float(logs.get("grad_norm", float("nan"))))

    class InOrder(SFTTrainer):
        """Rows as they stand in the data set."""

        def _get_train_sampler(self, *more: Any, **others: Any) -> Any:
            return torch.utils.data.SequentialSampler(cast("Any", self.train_dataset))

    config = SFTConfig(**arguments)
    ring = spec.settings.get("ring", 1)
    attention = spec.settings.get("attention") or ("sdpa" if ring > 1 else trl_attention.register())
    model = drawn_model(spec.model, attention, device, torch.bfloat16 if spec.on_gpu else torch.float32)
    shape = FlopsShape.from_config(model.config)
    trainer = InOrder(
        model,
        args=config,
        train_dataset=Dataset(read_in_step_order(Path(spec.token_file), spec.tokens.rows)),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
        peft_config=_adapters(spec.settings),
        callbacks=[Marks()],
    )
    packed: Any = trainer.train_dataset
    if config.packing:
        # Packing puts the longest rows first; TRL would draw packs at random.
        packed = trainer.train_dataset = packed.shuffle(SEED)
    outcome.add(seconds_to_build=time.perf_counter() - began)
    try:
        trainer.train()
    finally:
        outcome.add(memory=clock.memory(), step_seconds=clock.seconds(), seconds_to_first_step=clock.began - began)
        outcome.add(losses=losses, grad_norms=norms)
    rows = (
        packed["seq_lengths"] if "seq_lengths" in packed.column_names else [[len(ids)] for ids in packed["input_ids"]]
    )
    documents = step_lengths(
        [list(row) for row in rows],
        clock.steps,
        config.gradient_accumulation_steps,
        config.per_device_train_batch_size,
        spec.ranks // ring,
    )
    frozen = "lora_rank" in spec.settings
    outcome.add(
        tokens=[sum(each) for each in documents],
        flops=[model_flops(shape, each, frozen_weights=frozen) for each in documents],
        seconds_all=time.perf_counter() - began,
    )
    outcome.add(ceiling_after=matmul_ceiling(device))
    say(f"rank {rank}: {clock.steps} steps")
    return 0


def _adapters(settings: dict[str, Any]) -> Any:
    if "lora_rank" not in settings:
        return None
    from peft import LoraConfig  # noqa: PLC0415  this kind of run alone needs it

    return LoraConfig(
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
