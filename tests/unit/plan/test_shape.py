"""Parameters counted from config.json, against the models that transformers and PEFT build."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_job.config.schema import ModelConfig
from sft_job.metrics.flops import FlopsShape
from sft_job.model.lora import adapter_parameters, add_adapters, lora_config
from sft_job.plan.setup import Ranks
from sft_job.plan.shape import KNOWN, Shape, adapted, read_shape
from tests.tiny import model_config
from tests.unit.plan.cases import MODELS, case

TINY = ("qwen2", "qwen3", "llama", "gemma", "gemma2", "mistral")


def built(config: Any) -> Any:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lm.tie_weights()
    return lm


def assert_counts(shape: Shape, lm: Any) -> None:
    blocks = lm.base_model.layers
    assert sum(p.numel() for p in blocks[0].parameters()) == shape.block
    assert len(blocks) == shape.layers
    assert sum(p.numel() for p in lm.parameters()) == shape.parameters
    linears = {name: part for name, part in blocks[0].named_modules() if isinstance(part, torch.nn.Linear)}
    assert {n: (part.in_features, part.out_features, part.bias is not None) for n, part in linears.items()} == {
        linear.name: (linear.wide_in, linear.wide_out, linear.bias) for linear in shape.linears
    }


@pytest.mark.parametrize("kind", TINY)
def test_families(kind: str) -> None:
    config = model_config(kind, 320)
    assert_counts(read_shape(config.to_dict()), built(config))


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}])
def test_options_of_llama(changes: dict[str, Any]) -> None:
    config = model_config("llama", 320, **changes)
    assert_counts(read_shape(config.to_dict()), built(config))


@pytest.mark.parametrize(("model", "parameters"), [
    ("qwen2.5-7b", 7_615_616_512), ("qwen3-4b", 4_022_468_096), ("llama-3-8b", 8_030_261_248),
])  # fmt: skip
def test_real_sizes(model: str, parameters: int) -> None:
    written = MODELS[model]
    shape = read_shape(written)
    assert shape.parameters == parameters
    sizes = {name: value for name, value in written.items() if name not in ("model_type", "architectures")}
    assert_counts(shape, built(AutoConfig.for_model(written["model_type"], **sizes)))
    assert shape.flops() == FlopsShape.from_config(AutoConfig.for_model(written["model_type"], **sizes))


def test_a_fused_family() -> None:
    config = AutoConfig.for_model(
        "phi3", vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    assert_counts(read_shape(config.to_dict()), built(config))


@pytest.mark.parametrize(("targets", "excluded"), [
    ("all-linear", None), (["q_proj", "v_proj"], None), (r".*\.(gate|up)_proj", None), ("all-linear", ["down_proj"]),
])  # fmt: skip
def test_adapters(targets: Any, excluded: Any) -> None:
    config = ModelConfig(lora_rank=4, target_modules=targets, exclude_modules=excluded, partial_pretrain="x")
    shape = read_shape(model_config("qwen3", 320).to_dict())
    lm = built(model_config("qwen3", 320))
    add_adapters(lm, lora_config(config), torch.float32)
    counted = sum(parameter.numel() for parameter in adapter_parameters(lm).values())
    linears = adapted(shape, config)
    assert counted == shape.layers * 4 * sum(linear.wide_in + linear.wide_out for linear in linears)
    setup = case(**{"model.lora_rank": 4, "model.target_modules": targets}).estimate(timed=False).setup
    assert setup.adapter_parameters(2) == 2 * 4 * sum(each.wide_in + each.wide_out for each in setup.adapters)


def test_what_is_not_known_is_put_into_the_blocks() -> None:
    """Of another architecture the files say how much there is."""
    config = {**model_config("llama", 320).to_dict(), "model_type": "novel"}
    plain = read_shape(config)
    assert read_shape(config, plain.parameters + 2 * 100).block == plain.block + 100
    assert read_shape(config, plain.parameters).parameters == plain.parameters
    assert "novel" not in KNOWN


def test_windows_and_the_text_part() -> None:
    gemma = read_shape(model_config("gemma2", 320).to_dict())
    assert (gemma.window, gemma.sliding_layers) == (16, 1)
    assert read_shape({"model_type": "outer", "text_config": model_config("llama", 320).to_dict()}).kind == "llama"
    with pytest.raises(KeyError):
        read_shape({"model_type": "gpt2", "n_embd": 12})


def test_ranks() -> None:
    assert Ranks(8, 4).world == 32
