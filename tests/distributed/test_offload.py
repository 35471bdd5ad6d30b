"""``model.recompute=offload`` at every layout: the bits of full recomputation; a clear end where the host is small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sft_job
from sft_job.config.load import load_config
from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.model.blocks import offload_plan
from sft_job.model.recompute import Recompute
from tests.distributed.runs import Watched, run_job, run_jobs, seed_config
from tests.distributed.test_fast_path import LORA, config_of
from tests.tiny import save_model

OFFLOAD, FULL = "model.recompute=offload", "model.recompute=full"
UNEVEN = ["data.micro_batch_size_per_gpu=2"]


@pytest.fixture(scope="module")
def deep(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, so that inputs come and go."""
    folder = tmp_path_factory.mktemp("deep")
    save_model(folder / "qwen3", num_hidden_layers=4)
    for name in ("train.parquet", "val.parquet"):
        (folder / name).symlink_to(inputs / name)
    return folder


def _twins(full: Any, offload: Any) -> list[Watched]:
    pages: list[int] = []

    def look(job: Any) -> None:
        pages.append(job.module.blocks.store.pages)

    first, second = run_jobs([(full, {"gradients": True}), (offload, {"gradients": True, "prepared": look})])
    assert pages[0].held == 0, "freed at the end"
    return [first, second]


def assert_bits(found: Watched, wanted: Watched) -> None:
    assert found.losses == wanted.losses
    assert found.weights_sha256 == wanted.weights_sha256
    assert len(found.gradients) == len(wanted.gradients) > 0
    for mine, reference in zip(found.gradients, wanted.gradients, strict=True):
        assert [name for name, gradient in reference.items() if not torch.equal(mine[name], gradient)] == []


@pytest.mark.parametrize(("world", "ulysses", "more"), [
    (1, 1, UNEVEN), (2, 1, UNEVEN), (2, 2, UNEVEN), (2, 2, [*LORA, "model.fsdp_config.shard_frozen=false"]),
    (2, 1, ["model.fsdp_config.cpu_offload=true", "data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=60"]),
])  # fmt: skip
def test_the_bits_of_full_recomputation(deep, tmp_path, ranks, world, ulysses, more) -> None:
    """One rank, FSDP, Ulysses (its padding too), adapters, micro-batches of unlike lengths; validated on the way."""
    full, offload = (
        config_of(deep, tmp_path / kind.partition("=")[2], kind, *more, ulysses=ulysses, val=True)
        for kind in (FULL, OFFLOAD)
    )
    for wanted, found in ranks(world, _twins, full, offload):
        assert_bits(found, wanted)


def _kept_alone(config: Any) -> Watched:
    def prepare(job: Any) -> None:
        blocks = job.module.blocks
        assert blocks.plan == tuple(offload_plan(4, 3))
        blocks.set_plan([Recompute.NONE] * 4)

    return run_job(config, gradients=True, prepared=prepare)


def test_the_bits_of_no_recomputation(deep, tmp_path, ranks) -> None:
    none, offload = (config_of(deep, tmp_path / name, OFFLOAD, *UNEVEN) for name in ("a", "b"))
    wanted = ranks(2, _kept_alone, none)[0]
    assert_bits(ranks(2, run_job_with_gradients, offload)[0], wanted)


def run_job_with_gradients(config: Any, pieces: bool = False) -> Watched:
    """A run; ``pieces``: with MLPs in pieces of 256 tokens."""

    def prepare(job: Any) -> None:
        blocks = job.module.blocks
        blocks._tiles = [256] * len(blocks._tiles)
        blocks.set_plan(blocks.plan)

    return run_job(config, gradients=True, prepared=prepare if pieces else None)


@pytest.mark.parametrize(("world", "ulysses"), [(1, 1), (2, 1), (2, 2)])
def test_mlps_in_pieces(deep, tmp_path, ranks, world, ulysses) -> None:
    """Sharded weights, one document of 1,100 tokens: gradients within rounding."""
    long = _long_rows(tmp_path)
    configs = [
        seed_config(
            deep / "qwen3", long, None, tmp_path / name, kind, "data.max_length=1500", "data.train_batch_size=2",
            "trainer.total_training_steps=1", "data.micro_batch_size_per_gpu=1", "optim.clip_grad=0",
            f"ulysses_sequence_parallel_size={ulysses}",
        )
        for name, kind in (("full", FULL), ("offload", OFFLOAD))
    ]  # fmt: skip
    wanted, found = (
        ranks(world, run_job_with_gradients, configs[0])[0],
        ranks(world, run_job_with_gradients, configs[1], True)[0],
    )
    assert found.losses == pytest.approx(wanted.losses, rel=1e-13)
    for name, gradient in wanted.gradients[0].items():
        assert torch.allclose(found.gradients[0][name], gradient, rtol=1e-9, atol=1e-13), name
    assert any(not torch.equal(found.gradients[0][name], gradient) for name, gradient in wanted.gradients[0].items())


def _long_rows(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "long.parquet"
    rows = [("alpha " * 550, "beta " * 540), ("one", "two gamma")]
    pq.write_table(pa.table({"prompt": [p for p, _ in rows], "response": [r for _, r in rows]}), path)
    return path


def _on_a_small_host(config: Any) -> str:
    from sft_job import job

    real = job.host_room
    job.host_room = lambda *_: 60 * 2**20
    try:
        with pytest.raises(JobError) as caught:
            run_job(config)
    finally:
        job.host_room = real
    assert caught.value.code is ExitCode.OUT_OF_MEMORY
    return str(caught.value)


def test_a_host_that_is_too_small_is_said_before_the_first_step(deep, tmp_path, ranks) -> None:
    for text in ranks(2, _on_a_small_host, config_of(deep, tmp_path / "run", OFFLOAD, ulysses=2)):
        assert "the inputs of 3 blocks" in text
        assert "0.1 GiB left" in text
        assert "model.recompute=auto" in text


def test_the_recipe_for_long_documents_trains(deep, tmp_path, ranks) -> None:
    """As it stands, but for paths, steps, and inputs in host memory as a GPU would choose."""
    recipe = Path(sft_job.__file__).parent / "recipes" / "long-context.yaml"
    overrides = [
        f"data.train_files={deep / 'train.parquet'}", f"model.partial_pretrain={deep / 'qwen3'}", "trainer.logger=[]",
        f"trainer.default_local_dir={tmp_path / 'run'}", "trainer.total_training_steps=2", OFFLOAD,
    ]  # fmt: skip
    loaded = load_config(str(recipe), overrides, {})
    assert not loaded.problems
    losses = [found.losses for found in ranks(2, run_job, loaded.config)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert all(loss > 0 for loss in losses[0])
