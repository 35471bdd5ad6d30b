"""LoRA: the same at every layout, a checkpoint of adapters only, an adapter that PEFT loads, a merge that is equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.distributed.runs import Watched, run_job, run_jobs, seed_config
from tests.tiny import save_model

LORA = ("model.lora_rank=4", "model.lora_alpha=8")


def config_of(inputs: Path, run: Path, *overrides: str, ulysses: int = 1, kind: str = "qwen3"):
    return seed_config(
        inputs / kind,
        inputs / "train.parquet",
        inputs / "val.parquet",
        run,
        f"ulysses_sequence_parallel_size={ulysses}",
        "trainer.total_training_steps=3",
        "data.train_batch_size=5",
        "optim.lr=1e-2",
        *LORA,
        *overrides,
    )


def _with_gradients(config) -> Watched:
    return run_job(config, gradients=True)


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory, ranks) -> tuple[Watched, Path]:
    run = tmp_path_factory.mktemp("lora") / "run"
    return ranks(1, _with_gradients, config_of(inputs, run, "optim.clip_grad=0"))[0], run


@pytest.mark.parametrize(("world", "ulysses", "more"), [
    (2, 2, []), (4, 2, ["model.fsdp_config.fsdp_size=2"]), (2, 1, ["data.micro_batch_size_per_gpu=3"]),
    (2, 1, ["model.fsdp_config.cpu_offload=true"]),
])  # fmt: skip
def test_layouts(inputs, tmp_path, ranks, alone, world, ulysses, more) -> None:
    reference, _ = alone
    found = ranks(
        world, _with_gradients, config_of(inputs, tmp_path / "run", "optim.clip_grad=0", *more, ulysses=ulysses)
    )[0]
    assert found.losses == pytest.approx(reference.losses, rel=1e-12)
    for mine, wanted in zip(found.gradients, reference.gradients, strict=True):
        assert mine.keys() == wanted.keys()
        assert all(".lora_" in name for name in mine)
        scale = max(gradient.abs().max().item() for gradient in wanted.values())
        for name, gradient in wanted.items():
            assert (mine[name] - gradient).abs().max().item() <= 1e-12 * scale, name


def test_the_model_starts_unchanged(inputs, tmp_path, ranks, alone) -> None:
    full = ranks(1, run_job, config_of(inputs, tmp_path / "run", "model.lora_rank=0"))[0]
    assert alone[0].losses[0] == pytest.approx(full.losses[0], rel=1e-12)


def test_the_checkpoint_holds_adapters_only(alone) -> None:
    final = (alone[1] / "checkpoints" / "final").resolve()
    assert {path.name for path in (final / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (final / "huggingface").exists()
    stored = FileSystemReader(final).read_metadata().state_dict_metadata
    tensors = [name for name, entry in stored.items() if hasattr(entry, "size")]
    assert len([name for name in tensors if name.startswith("model.")]) == 28
    # AdamW's two moments and its step count of each; the rest are the settings of its parameter groups.
    assert len([name for name in tensors if name.startswith("optimizer.state.")]) == 28 * 3
    assert all(".lora_" in name for name in tensors if not name.startswith("optimizer.param_groups"))


def _logits(model) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model(ids).logits


def test_peft_loads_the_adapter(inputs, alone) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = alone[1] / "checkpoints" / "final" / "adapter"
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2  # A and B, seven projections, two blocks
    assert all(tensor.any() for tensor in weights.values()), "an adapter that no gradient reached"
    base = AutoModelForCausalLM.from_pretrained(inputs / "qwen3", dtype=torch.float64)
    plain = _logits(base)
    model = PeftModel.from_pretrained(base, folder)
    loaded = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(loaded) == len(weights)
    adapted = _logits(model)
    assert (adapted - plain).abs().max() > 1e-3
    assert torch.allclose(_logits(model.merge_and_unload()), adapted, rtol=1e-9, atol=1e-9)


def test_export_and_merge(inputs, alone, tmp_path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    def export(*words: str) -> None:
        command = [sys.executable, "-m", "sft_job.cli", "export", str(alone[1]), *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    export(str(tmp_path / "adapter"))
    export(str(tmp_path / "merged"), "--merge")
    live = load_file(alone[1] / "checkpoints" / "final" / "adapter" / "adapter_model.safetensors")
    mine = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert mine.keys() == live.keys()
    assert all(torch.equal(mine[name], live[name]) for name in live)
    base = AutoModelForCausalLM.from_pretrained(inputs / "qwen3", dtype=torch.float64)
    adapted = _logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert torch.allclose(_logits(merged), adapted, rtol=1e-9, atol=1e-9)


def test_resume_is_exact(inputs, tmp_path, ranks) -> None:
    straight = ranks(2, run_job, config_of(inputs, tmp_path / "straight"))[0]
    config = config_of(inputs, tmp_path / "run")
    first, second = ranks(2, run_jobs, [(config, {"stop_after": 1}), (config, {})])[0]
    assert (first.step, second.step) == (1, 3)
    assert first.losses + second.losses == straight.losses
    assert second.weights_sha256 == straight.weights_sha256


def _stopped_after_one(config) -> Watched:
    return run_job(config, stop_after=1)


def test_resume_at_another_layout(inputs, tmp_path, ranks, alone) -> None:
    config = config_of(inputs, tmp_path / "run", "optim.clip_grad=0")
    ranks(1, _stopped_after_one, config)
    ulysses = config_of(inputs, tmp_path / "run", "optim.clip_grad=0", ulysses=2)
    assert ranks(2, run_job, ulysses)[0].losses == pytest.approx(alone[0].losses[1:], rel=1e-12)


def _validation(run: Path) -> float:
    lines = (run / "logs" / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["val/loss"]


def test_going_on_from_an_adapter(inputs, tmp_path, ranks, alone) -> None:
    """The adapter's own rank and modules hold, and the model begins as the one that it makes."""
    adapter = alone[1] / "checkpoints" / "final" / "adapter"
    still = ("optim.lr=1e-300", "trainer.total_training_steps=1", "model.lora_rank=0")
    config = config_of(inputs, tmp_path / "run", *still, f"model.lora_adapter_path={adapter}")
    found = ranks(2, _with_gradients, config)[0]
    assert found.gradients[0].keys() == alone[0].gradients[0].keys()
    assert _validation(tmp_path / "run") == pytest.approx(_validation(alone[1]), rel=1e-12)


@pytest.mark.parametrize(("target", "count"), [("[q_proj, v_proj]", 8), ("all-linear", 28)])
def test_target_modules(inputs, tmp_path, ranks, target, count) -> None:
    config = config_of(inputs, tmp_path / "run", f"model.target_modules={target}", "trainer.total_training_steps=1")
    assert len(ranks(1, _with_gradients, config)[0].gradients[0]) == count


def _error(config) -> str:
    from sft_job.errors import JobError

    try:
        run_job(config)
    except JobError as error:
        return f"exit {error.code}: {error}"
    return ""


@pytest.mark.parametrize(("target", "shown"), [("[lm_head]", "names the head"), ("[nonesuch]", "nonesuch")])
def test_targets_that_cannot_be(tmp_path, inputs, ranks, target, shown) -> None:
    save_model(tmp_path / "llama", "llama")
    for name in ("train.parquet", "val.parquet"):
        (tmp_path / name).symlink_to(inputs / name)
    config = config_of(tmp_path, tmp_path / "run", f"model.target_modules={target}", kind="llama")
    message = ranks(1, _error, config)[0]
    assert message.startswith("exit 2: ")
    assert shown in message


def test_bf16_base_with_fp32_adapters(inputs, tmp_path, ranks, alone) -> None:
    config = config_of(inputs, tmp_path / "run", "model.fsdp_config.model_dtype=bf16", ulysses=2)
    found = ranks(2, _with_gradients, config)[0]
    assert {gradient.dtype for gradient in found.gradients[0].values()} == {torch.float32}
    assert found.losses == pytest.approx(alone[0].losses, rel=0.01)
