"""The loss and the gradients mean the same at every layout: ranks, Ulysses sizes, micro-batches, packing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.runs import Watched, run_job, seed_config
from tests.tiny import save_model

LAYOUTS = [(2, 2), (4, 4), (4, 2), (2, 1)]
SETTINGS = {
    "one row a group": [],
    "three rows a group": ["data.micro_batch_size_per_gpu=3"],
    "tokens": ["data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=60"],
    "not packed": ["use_remove_padding=false", "data.micro_batch_size_per_gpu=3"],
}


def config_of(inputs: Path, run: Path, ulysses: int, *overrides: str, kind: str = "qwen3"):
    steps = ["trainer.total_training_steps=3", "data.train_batch_size=5", "optim.clip_grad=0", "optim.lr=1e-2"]
    # A rate that moves the weights: the later steps' gradients then depend on the earlier ones'.
    return seed_config(
        inputs / kind,
        inputs / "train.parquet",
        None,
        run,
        f"ulysses_sequence_parallel_size={ulysses}",
        *steps,
        *overrides,
    )


def assert_same(found: Watched, expected: Watched, tolerance: float) -> None:
    assert found.rows == expected.rows
    for mine, reference in zip(found.losses, expected.losses, strict=True):
        assert mine == pytest.approx(reference, rel=tolerance)
    for mine, reference in zip(found.norms, expected.norms, strict=True):
        assert mine == pytest.approx(reference, rel=tolerance)
    assert len(found.gradients) == len(expected.gradients) == 3
    for step, (mine, reference) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        assert mine.keys() == reference.keys()
        for name, gradient in reference.items():
            scale = gradient.abs().max().item()
            assert scale > 0, name
            error = (mine[name] - gradient).abs().max().item() / scale
            assert error < tolerance, f"step {step}, {name}: {error}"


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory, ranks) -> Watched:
    config = config_of(inputs, tmp_path_factory.mktemp("alone"), 1)
    return ranks(1, _with_gradients, config)[0]


def _with_gradients(config) -> Watched:
    return run_job(config, gradients=True)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("world", "ulysses"), LAYOUTS)
def test_fp64_gradients_equal_one_rank(inputs, tmp_path, ranks, reference, world, ulysses, setting) -> None:
    config = config_of(inputs, tmp_path / "run", ulysses, *SETTINGS[setting])
    for found in ranks(world, _with_gradients, config):
        assert_same(found, reference, 1e-12)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral", "gemma", "gemma2"])
def test_other_families(inputs, tmp_path, ranks, kind) -> None:
    save_model(tmp_path / kind, kind)
    (tmp_path / "train.parquet").symlink_to(inputs / "train.parquet")
    alone = ranks(1, _with_gradients, config_of(tmp_path, tmp_path / "a", 1, kind=kind))[0]
    both = ranks(2, _with_gradients, config_of(tmp_path, tmp_path / "b", 2, kind=kind))[0]
    # Gemma's norms compute in fp32 whatever the weights are: its gradients cannot be closer than that.
    assert_same(both, alone, 1e-12 if not kind.startswith("gemma") else 1e-5)


def test_kv_heads_fewer_than_the_group(inputs, tmp_path, ranks) -> None:
    """One key/value head (gemma) over four ranks: every rank gets a copy, the copies' gradients add up."""
    save_model(tmp_path / "gemma", "gemma")
    (tmp_path / "train.parquet").symlink_to(inputs / "train.parquet")
    alone = ranks(1, _with_gradients, config_of(tmp_path, tmp_path / "a", 1, kind="gemma"))[0]
    four = ranks(4, _with_gradients, config_of(tmp_path, tmp_path / "b", 4, kind="gemma"))[0]
    assert_same(four, alone, 1e-5)


def test_fp32(inputs, tmp_path, ranks) -> None:
    dtype = "model.fsdp_config.model_dtype=fp32"
    alone = ranks(1, _with_gradients, config_of(inputs, tmp_path / "a", 1, dtype))[0]
    four = ranks(4, _with_gradients, config_of(inputs, tmp_path / "b", 2, dtype))[0]
    assert four.gradients[0]["model.embed_tokens.weight"].dtype == torch.float32
    assert_same(four, alone, 1e-5)


def test_without_recomputation(inputs, tmp_path, ranks, reference) -> None:
    config = config_of(inputs, tmp_path / "run", 2, "model.enable_gradient_checkpointing=false")
    assert_same(ranks(2, _with_gradients, config)[0], reference, 1e-12)


def test_clipped_gradients(inputs, tmp_path, ranks) -> None:
    """The norm is that of all ranks' shards together, and what AdamW gets is the same at every layout."""
    clip = "optim.clip_grad=0.5"
    alone = ranks(1, _with_gradients, config_of(inputs, tmp_path / "a", 1, clip))[0]
    assert all(norm > 0.5 for norm in alone.norms)
    squares = sum(g.square().sum().item() for g in alone.gradients[0].values())
    assert squares**0.5 == pytest.approx(0.5, rel=1e-12)
    for world, ulysses in ((2, 1), (4, 2)):
        found = ranks(world, _with_gradients, config_of(inputs, tmp_path / f"{world}", ulysses, clip))[0]
        assert_same(found, alone, 1e-12)


@pytest.mark.parametrize("ulysses", [1, 2])
def test_hsdp(inputs, tmp_path, ranks, reference, ulysses) -> None:
    """Two copies of the weights, each over two ranks."""
    config = config_of(inputs, tmp_path / "run", ulysses, "model.fsdp_config.fsdp_size=2")
    for found in ranks(4, _with_gradients, config):
        assert_same(found, reference, 1e-12)


@pytest.mark.parametrize("name", ["cpu_offload", "offload_params"])
def test_offload(inputs, tmp_path, ranks, reference, name) -> None:
    """Either name keeps the shards in host memory; on CPU ranks that changes nothing."""
    config = config_of(inputs, tmp_path / "run", 2, f"model.fsdp_config.{name}=true")
    assert_same(ranks(2, _with_gradients, config)[0], reference, 1e-12)


def test_more_ranks_than_rows(inputs, tmp_path, ranks) -> None:
    """Two rows over four data-parallel ranks: two ranks have nothing to train on and add exactly 0."""
    two = ["data.train_batch_size=2", "trainer.total_training_steps=3"]
    alone = ranks(1, _with_gradients, config_of(inputs, tmp_path / "a", 1, *two))[0]
    four = ranks(4, _with_gradients, config_of(inputs, tmp_path / "b", 1, *two))[0]
    assert_same(four, alone, 1e-12)
