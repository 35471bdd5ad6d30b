"""Gradients added up in each rank's shard alone are those that are added up whole, and fp32 sums under bf16 weights."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.runs import Watched, join_ranks, run_job, run_jobs, whole
from tests.distributed.test_fast_path import ACCUMULATES, LORA, assert_same, config_of
from tests.tiny import save_model

SHARD, WHOLE = "model.fsdp_config.shard_accumulated=true", "model.fsdp_config.shard_accumulated=false"
BF16 = ("model.fsdp_config.model_dtype=bf16", "model.fsdp_config.dtype=fp32")
HSDP, OFFLOAD = "model.fsdp_config.fsdp_size=2", "model.fsdp_config.cpu_offload=true"
LAYOUTS = {
    "FSDP": (2, 1, []),
    "Ulysses": (2, 2, ["model.recompute=offload"]),
    "HSDP": (4, 1, [HSDP]),
    "offload": (2, 1, [OFFLOAD, "model.fsdp_config.reshard_after_forward=false"]),
}


def _run(config: Any, **options: Any) -> Watched:
    """A run with the gradients of each step; between steps, and in bf16 between micro-batches, none wait elsewhere."""

    def prepare(job: Any) -> None:
        assert len(job.capacity.longest) == 2, "steps have several micro-batches"
        narrow = [p for p in job.module.parameters() if p.requires_grad and p.dtype == torch.bfloat16]

        def between_steps(*_: Any) -> None:
            assert job.trainer.accumulation.sums == []

        def between_micro_batches(*_: Any) -> None:
            assert all(parameter.grad is None for parameter in narrow)

        job.optimizer.register_step_pre_hook(between_steps)
        job.module.register_forward_pre_hook(between_micro_batches)

    return run_job(config, gradients=True, prepared=prepare, **options)


def _runs(configs: list[Any]) -> list[Watched]:
    return [_run(config) for config in configs]


def _two_dtypes(inputs: Path, folder: Path, *more: str, ulysses: int = 1) -> list[Any]:
    """The same run in fp64, and with weights in bf16."""
    return [
        config_of(inputs, folder / str(len(dtype)), ACCUMULATES, *dtype, *more, ulysses=ulysses) for dtype in ((), BF16)
    ]


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory, ranks) -> list[Watched]:
    return ranks(2, _runs, _two_dtypes(inputs, tmp_path_factory.mktemp("reference"), WHOLE))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_gradients_at_every_layout(inputs, tmp_path, ranks, reference, layout) -> None:
    """In bf16 within its rounding; of later steps only the losses, as AdamW makes a sign of a gradient near zero."""
    world, ulysses, more = LAYOUTS[layout]
    found, narrow = ranks(world, _runs, _two_dtypes(inputs, tmp_path, SHARD, *more, ulysses=ulysses))[0]
    assert_same(found, reference[0])
    assert found.norms == pytest.approx(reference[0].norms, rel=1e-12)
    assert_same(_first(narrow), _first(reference[1]), 2**-7)
    assert narrow.losses == pytest.approx(reference[1].losses, rel=0.02)
    assert all(gradient.dtype == torch.bfloat16 for gradient in narrow.gradients[0].values())


def _first(watched: Watched) -> Watched:
    return replace(watched, losses=watched.losses[:1], gradients=watched.gradients[:1])


def _both_ways(inputs: Path, folder: Path, ranks: Any, *more: str) -> list[Watched]:
    return ranks(2, _runs, _two_ways(inputs, folder, *more))[0]


def _two_ways(inputs: Path, folder: Path, *more: str) -> list[Any]:
    return [config_of(inputs, folder / key[-5:], ACCUMULATES, *more, key) for key in (WHOLE, SHARD)]


def _runs_heard(configs: list[Any]) -> tuple[list[Watched], str]:
    """The runs, and what this rank's console said: a rank prints where its server began to, not where a test looks."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = _runs(configs)
    return found, " ".join(said.getvalue().split())


def test_fp32(inputs, tmp_path, ranks) -> None:
    """Losses, norms, gradients; the log says which way it is."""
    more = ("model.fsdp_config.model_dtype=fp32", "trainer.logger=[console]")
    (heard, others) = ranks(2, _runs_heard, _two_ways(inputs, tmp_path, *more))
    (old, new), said = heard
    assert_same(new, old, 1e-5)
    assert new.norms == pytest.approx(old.norms, rel=1e-5)
    for way in ("add up whole on every rank", "add up in each rank's shard"):
        assert said.count(f"gradients of micro-batches {way}") == 1, "rank 0 says it once"
    assert "gradients of micro-batches" not in others[1]


def test_adapters_over_a_base_in_bf16(inputs, tmp_path, ranks) -> None:
    """They are fp32, so FSDP2's own sums are."""
    old, new = _both_ways(inputs, tmp_path, ranks, *BF16, *LORA)
    assert_same(new, old, 1e-5)


def _stop_then_go_on(straight: Any, stopped: Any) -> list[Watched]:
    return run_jobs([(straight, {}), (stopped, {"stop_after": 1}), (stopped, {})])


def test_resume_gives_the_same_bits(inputs, tmp_path, ranks) -> None:
    configs = [config_of(inputs, tmp_path / name, ACCUMULATES, *BF16, SHARD) for name in ("straight", "stopped")]
    straight, first, second = ranks(2, _stop_then_go_on, *configs)[0]
    assert first.losses + second.losses == straight.losses
    assert second.weights_sha256 == straight.weights_sha256


def _errors(folder: Path, count: int) -> dict[str, float]:
    """RMS errors of many small micro-batches' gradient, over the gradient's RMS, by how it was added up."""
    from sft_job.config.schema import FsdpConfig, ModelConfig
    from sft_job.data.batches import pack_rows
    from sft_job.model.build import build_model
    from sft_job.model.precision import precision_of
    from sft_job.parallel.accumulation import Accumulation
    from sft_job.parallel.mesh import build_mesh
    from tests.distributed.test_model import _documents

    runtime = join_ranks()
    mesh = build_mesh("cpu", 1)
    rows = _documents([9] * count * 2)[runtime.rank :: 2]

    def gradients(fsdp: FsdpConfig, kind: str) -> torch.Tensor:
        config = ModelConfig(partial_pretrain=str(folder), fsdp_config=fsdp)
        module = build_model(config, mesh, runtime.device, precision_of(fsdp, "cpu"), 1, load=True)[0]
        own = kind == "FSDP2's own sum"
        accumulation = Accumulation(module, shard_alone=kind == "shards", offloaded=False)
        for index, row in enumerate(rows):
            with accumulation.micro_batch(last=own or index == count - 1, reshard=True):
                module(pack_rows([row], 1, 0, 0), 8 * 2 * count).backward()
        return torch.cat([whole(p.grad).double().flatten() for p in module.parameters()])

    exact = gradients(FsdpConfig(model_dtype="fp64"), "whole")
    narrow = FsdpConfig(model_dtype="bf16", dtype="fp32")
    return {
        kind: ((gradients(narrow, kind) - exact).square().mean() / exact.square().mean()).sqrt().item()
        for kind in ("whole", "shards", "FSDP2's own sum")
    }


def test_many_small_micro_batches_are_added_up_in_fp32(tmp_path, ranks) -> None:
    """As exact as whole gradients in fp32, but for the rounding of each one's shard; FSDP2's sum in bf16 is not."""
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model", "qwen2")
    weights = {name: tensor.bfloat16().float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    errors = ranks(2, _errors, folder, 64)[0]
    assert errors["shards"] < 2 * errors["whole"] < 2**-8
    assert errors["FSDP2's own sum"] > 2.5 * errors["shards"]


class _Branches(nn.Module):
    """Weights that only some micro-batches use, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(5, 3, generator=generator))
                for name in ("always", "first", "last", "never")
            }
        )

    def forward(self, x: torch.Tensor, names: tuple[str, ...], *, broken: bool = False) -> torch.Tensor:
        if broken:
            raise torch.OutOfMemoryError("the card is full")
        return torch.stack([((x @ self.weights[name]) ** 2).sum() for name in names]).sum()


STEP = (("always", "first"), ("always",), ("always", "last"))


def _branches(offloaded: bool) -> None:
    """Some gradients missing in some micro-batches; a step that broke off; one that is not finite."""
    from sft_job.config.schema import FsdpConfig
    from sft_job.parallel.accumulation import build_accumulation
    from sft_job.parallel.fsdp import Sharding, forget_broken_step, shard_module, sum_gradients
    from sft_job.parallel.mesh import build_mesh

    runtime = join_ranks()
    mesh = build_mesh("cpu", 1)
    module, plain = _Branches().bfloat16(), _Branches().bfloat16().float()
    sharding = Sharding(mesh.fsdp, torch.float32, torch.float32, offload=offloaded)
    shard_module(module, sharding)
    sum_gradients(module.modules(), sharding)
    config = FsdpConfig(shard_accumulated=True, cpu_offload=offloaded)
    accumulation, text = build_accumulation(module, config, mesh.fsdp, torch.float32, runtime.device)
    assert "in each rank's shard" in text
    inputs = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))

    def step(scale: float = 1.0, broken: bool = False) -> None:
        for index, names in enumerate(STEP):
            x = inputs[2 * index + runtime.rank]
            with accumulation.micro_batch(last=index == 2, reshard=True):
                (module(x, names, broken=broken and index == 1) * scale).backward()
            if index < 2:
                assert all(p.grad is None for p in module.parameters())
                assert {sum_.dtype for sum_ in accumulation.sums} == {torch.float32}
                rows = 3 if runtime.rank == 0 else 2
                assert [sum_.shape for sum_ in accumulation.sums] == [(rows, 3)] * 2

    for index, names in enumerate(STEP):
        for x in inputs[2 * index : 2 * index + 2]:
            plain(x, names).backward()

    def check() -> None:
        assert accumulation.sums == []
        for name, parameter in plain.named_parameters():
            found = module.get_parameter(name).grad
            if parameter.grad is None:
                assert found is None, name
            else:
                assert torch.allclose(whole(found).float(), parameter.grad, rtol=2**-7, atol=0.05), name
        module.zero_grad(set_to_none=True)

    step()
    check()
    step(float("inf"))
    assert accumulation.sums == []
    module.zero_grad(set_to_none=True)
    step()
    check()
    with pytest.raises(torch.OutOfMemoryError):
        step(broken=True)
    assert len(accumulation.sums) == 2
    module.zero_grad(set_to_none=True)
    accumulation.forget()
    forget_broken_step(module)
    step()
    check()


@pytest.mark.parametrize("offloaded", [False, True])
def test_missing_gradients_and_broken_steps(ranks, offloaded) -> None:
    ranks(2, _branches, offloaded)


def _chosen() -> list[tuple[bool, str]]:
    """On GPUs of one size, of another, and on none; then on a GPU whose memory would do, told otherwise."""
    from types import SimpleNamespace

    from sft_job.config.schema import FsdpConfig
    from sft_job.parallel.accumulation import build_accumulation
    from sft_job.parallel.fsdp import Sharding, shard_module
    from sft_job.parallel.mesh import build_mesh

    join_ranks()
    mesh = build_mesh("cpu", 1)
    module = _Branches()
    shard_module(module, Sharding(mesh.fsdp, torch.float32, torch.float32))
    found = []
    # 60 parameters: 240 bytes in fp32.
    for memory, setting in ((959, "auto"), (961, "auto"), (0, "auto"), (961, True), (1, False)):
        torch.cuda.get_device_properties = lambda *_, size=memory: SimpleNamespace(total_memory=size)
        device = torch.device("cuda" if memory else "cpu")
        config = FsdpConfig(shard_accumulated=setting)
        accumulation, text = build_accumulation(module, config, mesh.fsdp, torch.float32, device)
        found.append((accumulation.shard_alone, text))
    return found


def test_the_choice_by_the_gpus_memory(ranks) -> None:
    found = ranks(2, _chosen)[0]
    assert [alone for alone, _ in found] == [True, False, False, True, False]
    for alone, text in found:
        assert ("in each rank's shard" if alone else "whole on every rank") in text
    assert ranks(1, _chosen)[0] == [(False, "")] * 5
