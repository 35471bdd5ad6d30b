"""What makes a run faster changes nothing of it: compiled blocks, plans of recomputation, weights held whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.distributed.runs import Watched, run_job, run_jobs, seed_config

WHOLE = "model.fsdp_config.shard_frozen=false"
ACCUMULATES = "data.micro_batch_size_per_gpu=1"
ONE_MICRO_BATCH = "data.micro_batch_size_per_gpu=5"


def config_of(inputs: Path, run: Path, *overrides: str, ulysses: int = 1, val: bool = False):
    steps = ["trainer.total_training_steps=3", "data.train_batch_size=5", "optim.clip_grad=0", "optim.lr=1e-2"]
    return seed_config(
        inputs / "qwen3",
        inputs / "train.parquet",
        inputs / "val.parquet" if val else None,
        run,
        f"ulysses_sequence_parallel_size={ulysses}",
        *steps,
        *overrides,
    )


def _with_gradients(config: Any, **options: Any) -> Watched:
    return run_job(config, gradients=True, **options)


def assert_same(found: Watched, wanted: Watched, tolerance: float = 1e-12) -> None:
    assert found.losses == pytest.approx(wanted.losses, rel=tolerance)
    assert len(found.gradients) == len(wanted.gradients)
    for mine, reference in zip(found.gradients, wanted.gradients, strict=True):
        assert mine.keys() == reference.keys()
        scale = max(gradient.abs().max().item() for gradient in reference.values())
        for name, gradient in reference.items():
            assert (mine[name] - gradient).abs().max().item() <= tolerance * scale, name


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory, ranks) -> Watched:
    """Two ranks, so that FSDP shards everything."""
    config = config_of(inputs, tmp_path_factory.mktemp("reference"), "model.recompute=none")
    return ranks(2, _with_gradients, config)[0]


@pytest.mark.parametrize("plan", ["none", "attention", "full"])
def test_plans_of_recomputation(inputs, tmp_path, ranks, reference, plan) -> None:
    """With Ulysses: what is computed again is exchanged again."""
    config = config_of(inputs, tmp_path / "run", f"model.recompute={plan}", ulysses=2)
    for found in ranks(2, _with_gradients, config):
        assert_same(found, reference)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the C++ compiler, two dozen times
def test_compiled_run(inputs, tmp_path, ranks) -> None:
    """Inductor's own kernels on the CPU; the exchanges are one op each in its graphs."""
    dtype, kernels = "model.fsdp_config.model_dtype=fp32", {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    plain, compiled = (
        ranks(
            2,
            _with_gradients,
            config_of(inputs, tmp_path / name, dtype, f"model.compile={name}", ulysses=2, val=True),
            timeout=1000,
            environment=kernels,
        )[0]
        for name in ("false", "true")
    )
    assert_same(compiled, plain, 1e-4)
    assert validation(tmp_path / "true") == pytest.approx(validation(tmp_path / "false"), rel=1e-5)
    assert any((tmp_path / "kernels").rglob("*.so")), "nothing was compiled"


def validation(run: Path) -> float:
    return json.loads((run / "logs" / "metrics.jsonl").read_text().splitlines()[-1])["val/loss"]


@pytest.mark.parametrize(("world", "more"), [(1, [ONE_MICRO_BATCH]), (1, [ACCUMULATES]), (2, [ACCUMULATES])])
def test_gathered_weights_that_are_kept(inputs, tmp_path, ranks, reference, world, more) -> None:
    """For the backward and from one micro-batch to the next; with one rank and one micro-batch FSDP manages nothing."""
    config = config_of(inputs, tmp_path / "run", "model.fsdp_config.reshard_after_forward=false", *more)
    assert_same(ranks(world, _with_gradients, config)[0], reference)


def _kinds(config: Any) -> set[str]:
    """Of the weights that are trained, with one rank and one micro-batch a step."""
    kinds: set[str] = set()

    def look(job: Any) -> None:
        kinds.update(type(p).__name__ for p in job.module.parameters() if p.requires_grad)

    run_job(config, prepared=look)
    return kinds


def test_one_rank_needs_no_fsdp(inputs, tmp_path, ranks, reference) -> None:
    """Its weights are plain tensors, and the gradients those of two ranks."""
    alone = config_of(inputs, tmp_path / "run", ONE_MICRO_BATCH)
    assert_same(ranks(1, _with_gradients, alone)[0], reference)
    assert ranks(1, _kinds, config_of(inputs, tmp_path / "b", ONE_MICRO_BATCH))[0] == {"Parameter"}
    assert ranks(1, _kinds, config_of(inputs, tmp_path / "c", ACCUMULATES))[0] == {"DTensor"}


def _stopped_after_one(config: Any) -> Watched:
    return run_job(config, stop_after=1)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1)])
def test_resuming_with_and_without_fsdp(inputs, tmp_path, ranks, reference, before, after) -> None:
    """A checkpoint knows nothing of how its weights were held."""
    run = tmp_path / "run"
    config = config_of(inputs, run, ONE_MICRO_BATCH)
    first = ranks(before, _stopped_after_one, config)[0]
    second = ranks(after, run_job, config)[0]
    assert first.losses + second.losses == pytest.approx(reference.losses, rel=1e-12)
    from safetensors.torch import load_file

    weights = load_file(run / "checkpoints" / "final" / "huggingface" / "model.safetensors")
    base = load_file(inputs / "qwen3" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: tensor.shape for n, tensor in base.items()}
    assert all((weights[name] != tensor).any() for name, tensor in base.items())


LORA = ("model.lora_rank=4", "model.lora_alpha=8")


@pytest.fixture(scope="module")
def sharded(inputs: Path, tmp_path_factory: pytest.TempPathFactory, ranks) -> tuple[Watched, Path]:
    run = tmp_path_factory.mktemp("sharded") / "run"
    config = config_of(inputs, run, *LORA, "model.fsdp_config.shard_frozen=true", val=True)
    return ranks(2, _with_gradients, config)[0], run


@pytest.mark.parametrize(("world", "ulysses", "more"), [(2, 1, []), (2, 2, [ACCUMULATES]), (1, 1, [ONE_MICRO_BATCH])])
def test_lora_over_a_whole_base(inputs, tmp_path, ranks, sharded, world, ulysses, more) -> None:
    run = tmp_path / "run"
    found = ranks(world, _with_gradients, config_of(inputs, run, *LORA, WHOLE, *more, ulysses=ulysses, val=True))[0]
    assert_same(found, sharded[0])
    assert validation(run) == pytest.approx(validation(sharded[1]), rel=1e-12)


def _stop_then_go_on(config: Any) -> list[Watched]:
    return run_jobs([(config, {"stop_after": 1}), (config, {})])


def test_lora_over_a_whole_base_resumes_and_exports(inputs, tmp_path, ranks, sharded) -> None:
    """The adapter is the sharded run's; a checkpoint of either goes on as the other."""
    from safetensors.torch import load_file

    run = tmp_path / "run"
    first, second = ranks(2, _stop_then_go_on, config_of(inputs, run, *LORA, WHOLE))[0]
    assert first.losses + second.losses == pytest.approx(sharded[0].losses, rel=1e-12)
    name = "checkpoints/final/adapter/adapter_model.safetensors"
    mine, wanted = load_file(run / name), load_file(sharded[1] / name)
    assert mine.keys() == wanted.keys()
    assert all(torch.allclose(mine[key], wanted[key], rtol=1e-9, atol=1e-12) for key in wanted)
    other = tmp_path / "other"
    ranks(2, _stopped_after_one, config_of(inputs, other, *LORA, WHOLE))
    rest = ranks(2, run_job, config_of(inputs, other, *LORA, "model.fsdp_config.shard_frozen=true"))[0]
    assert rest.losses == pytest.approx(sharded[0].losses[1:], rel=1e-12)


def _broken_then_whole(config: Any, backward: bool, resets: bool = True) -> tuple[Watched, int]:
    """A run whose first rehearsal runs out of memory in the middle, and which goes on, also without FSDP's reset."""
    broken = 0

    def break_one(job: Any) -> None:
        nonlocal broken
        block = job.module.lm.model.layers[0]
        real = block.forward

        def fails(*args: Any, **kwargs: Any) -> Any:
            out = real(*args, **kwargs)
            if not backward:
                raise torch.OutOfMemoryError("the card is full")
            out.register_hook(full)
            return out

        def full(grad: Any) -> None:
            raise torch.OutOfMemoryError("the card is full")

        block.forward = fails
        try:
            job.capacity.rehearse()
        except torch.OutOfMemoryError:
            broken += 1
        block.forward = real
        if resets:
            assert job.capacity.recover()
        else:  # as a torch that has none would leave it
            assert not any(isinstance(parameter, DTensor) for parameter in job.module.parameters())
            job.optimizer.zero_grad()
            job.trainer.accumulation.forget()

    return run_job(config, gradients=True, prepared=break_one), broken


@pytest.mark.parametrize("more", [ONE_MICRO_BATCH, ACCUMULATES])
@pytest.mark.parametrize("backward", [False, True])
def test_a_run_goes_on_after_a_rehearsal_that_broke_off(inputs, tmp_path, ranks, reference, backward, more) -> None:
    """Neither left-over gradients nor a half-way FSDP: as fitting needs it when a plan does not fit."""
    found, broken = ranks(1, _broken_then_whole, config_of(inputs, tmp_path / "run", more), backward)[0]
    assert broken == 1
    assert_same(found, reference)


@pytest.mark.parametrize("backward", [False, True])
def test_where_fsdp_holds_nothing_there_is_nothing_to_reset(inputs, tmp_path, ranks, reference, backward) -> None:
    """One rank whose micro-batch is its step: torch 2.11 can go on too."""
    config = config_of(inputs, tmp_path / "run", ONE_MICRO_BATCH)
    found, broken = ranks(1, _broken_then_whole, config, backward, False)[0]
    assert broken == 1
    assert_same(found, reference)
