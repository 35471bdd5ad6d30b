from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config, Qwen3MoeConfig

from sft_job.metrics.flops import FlopsShape, model_flops, peak_flops

TINY = FlopsShape(hidden=8, layers=2, heads=4, kv_heads=2, head_dim=3, intermediate=10, vocab=16)


def matmul_parameters(config) -> int:
    """Weights of all two-dimensional parameters of the real model, without the embedding; a tied head counts once."""
    model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    others = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p is not head and p is not embedding)
    return others + head.numel()


def test_hand_counted_model() -> None:
    # A block: q 8x12, k and v 8x6 each, o 12x8, MLP 3 of 8x10.
    block = 96 + 2 * 48 + 96 + 240
    assert TINY.matmul_parameters == 2 * block + 8 * 16
    # Two documents of 3 and 5 tokens: scores and values, 2 FLOPs each, 12 wide, half of the square, two layers.
    attention = 2 * (2 + 2) * 12 * (9 + 25) / 2
    assert model_flops(TINY, [3, 5]) == 3 * (2 * 8 * (2 * block + 128) + attention)


def test_documents_do_not_see_each_other() -> None:
    assert model_flops(TINY, [64, 64]) < model_flops(TINY, [128])
    assert model_flops(TINY, [64, 64]) == 2 * model_flops(TINY, [64])
    assert model_flops(TINY, []) == 0


def test_six_times_parameters_times_tokens() -> None:
    """For short documents attention is small, and 6NT with N = all weights but the embedding is the answer."""
    shape = FlopsShape(hidden=2048, layers=24, heads=16, kv_heads=8, head_dim=128, intermediate=6144, vocab=32000)
    lengths = [128] * 10
    assert model_flops(shape, lengths) == pytest.approx(6 * shape.matmul_parameters * 1280, rel=0.02)
    assert model_flops(shape, lengths) > 6 * shape.matmul_parameters * 1280


def test_frozen_weights_need_no_weight_gradient() -> None:
    matmul = 2 * 8 * TINY.matmul_parameters
    assert model_flops(TINY, [3, 5]) - model_flops(TINY, [3, 5], frozen_weights=True) == pytest.approx(matmul)


def test_sliding_window() -> None:
    window = FlopsShape(
        hidden=8,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=3,
        intermediate=10,
        vocab=16,
        sliding_window=4,
        sliding_layers=1,
    )
    assert model_flops(window, [4]) == model_flops(TINY, [4])
    # A long document: 100*4 - 4*4/2 pairs instead of 100*100/2, in one of the two layers.
    assert model_flops(TINY, [100]) - model_flops(window, [100]) == 3 * 4 * 12 * (5000 - 392)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SMALL, intermediate_size=48, head_dim=16, tie_word_embeddings=True),
        LlamaConfig(**SMALL, intermediate_size=48, tie_word_embeddings=False),
        MistralConfig(**SMALL, intermediate_size=48, head_dim=8),
        Gemma3TextConfig(**SMALL, intermediate_size=48, head_dim=8),
    ],
    ids=lambda config: config.model_type,
)
def test_shape_of_real_configs(config) -> None:
    assert FlopsShape.from_config(config).matmul_parameters == matmul_parameters(config)


def test_shape_of_mixture_of_experts() -> None:
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**SMALL, **sizes, head_dim=8, mlp_only_layers=[0], tie_word_embeddings=False)
    block = 2 * 32 * 32 + 2 * 32 * 16
    dense, sparse = 3 * 32 * 48, 2 * 3 * 32 * 20 + 32 * 6
    assert FlopsShape.from_config(config).matmul_parameters == 3 * block + dense + 2 * sparse + 32 * 64


def test_sliding_layers_of_real_configs() -> None:
    gemma = Gemma3TextConfig(**SMALL, intermediate_size=48, head_dim=8, sliding_window=7)
    assert FlopsShape.from_config(gemma).sliding_layers == gemma.layer_types.count("sliding_attention") > 0
    mistral = MistralConfig(**SMALL, intermediate_size=48, sliding_window=7)
    assert FlopsShape.from_config(mistral).sliding_layers == 3
    qwen = Qwen3Config(**SMALL, intermediate_size=48)
    assert FlopsShape.from_config(qwen).sliding_layers == 0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250.0),
    ],
)
def test_peaks(name: str, tflops: float) -> None:
    import torch

    assert peak_flops(name, "bf16") == pytest.approx(tflops * 1e12)
    assert peak_flops(name, torch.bfloat16) == pytest.approx(tflops * 1e12)


def test_unknown_peaks() -> None:
    assert peak_flops("Intel(R) Xeon(R) Platinum 8481C", "bf16") is None
    assert peak_flops("NVIDIA A1000", "bf16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
