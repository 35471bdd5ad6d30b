"""Model FLOPs of training, and what devices can do at most: the two sides of MFU.

Counted are the multiplications that the model's definition asks for, so that the figure can be compared between
settings: no recomputation, no padding, no embedding look-up, no element-wise work; attention is causal and ends
at document borders. With ``s_i`` the lengths of the documents and ``T`` their sum::

    forward  = 2 * T * P  +  sum over layers of 4 * heads * head_dim * pairs
    pairs    = sum of s_i^2 / 2           (sliding window w < s_i: s_i * w - w^2 / 2)
    training = 3 * forward                (backward: one product for the input's gradient, one for the weight's)

``P`` counts the weights of the matrix products that one token passes: query, key, value and output projections,
the MLP (of a mixture of experts: router, shared experts and the experts a token is sent to) and the head, which is
counted for every token. Frozen weights (LoRA) need no weight gradient: their factor is 2 instead of 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Dense bf16 TFLOP/s with fp32 accumulation, from the vendors' data sheets. The first name found in the device's name
# counts, so that longer names stand before the names they contain.
_PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("H800 PCIe", 756.0),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("RTX A6000", 154.8),
    ("A40", 149.7),
    ("A30", 165.0),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L20", 119.5),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.2),
    ("MI300X", 1307.4),
)
# Architectures whose MLP is two matrices, without a gate.
_PLAIN_MLP = ("gpt2", "gpt_neox", "phi", "starcoder2", "opt", "falcon", "nemotron")
_HALF_DTYPES = ("bf16", "bfloat16", "fp16", "float16")


@dataclass(frozen=True)
class FlopsShape:
    """Sizes of a decoder that decide its FLOPs.

    Attributes:
        hidden: width of the residual stream.
        layers: decoder blocks.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        intermediate: inner width of a dense MLP.
        vocab: rows of the head.
        mlp_matrices: 3 for a gated MLP (gate, up, down), 2 for a plain one.
        experts: routed experts of a mixture-of-experts layer; 0 = every layer is dense.
        active_experts: routed experts that one token passes.
        expert_intermediate: inner width of one routed expert.
        shared_intermediate: inner width of all shared experts of a layer together.
        dense_layers: blocks with a dense MLP in a mixture-of-experts model.
        sliding_window: tokens that a sliding-window layer looks back; unused without such layers.
        sliding_layers: blocks with sliding-window attention.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    mlp_matrices: int = 3
    experts: int = 0
    active_experts: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    dense_layers: int = 0
    sliding_window: int = 0
    sliding_layers: int = 0

    @classmethod
    def from_config(cls, config: Any) -> FlopsShape:
        """Read the sizes from a Hugging Face config (of a composite model: from its text part)."""
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        heads = config.num_attention_heads
        layers = config.num_hidden_layers
        layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
        window = getattr(config, "sliding_window", None) or 0
        return cls(
            hidden=config.hidden_size,
            layers=layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            vocab=config.vocab_size,
            mlp_matrices=2 if config.model_type in _PLAIN_MLP else 3,
            sliding_window=window,
            sliding_layers=list(layer_types).count("sliding_attention") if window else 0,
            **_expert_sizes(config, layers),
        )

    @property
    def matmul_parameters(self) -> int:
        """Weights that one token is multiplied with in a forward pass: ``P`` of the module's formula."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        dense = self.mlp_matrices * self.hidden * self.intermediate
        passed = self.active_experts * self.expert_intermediate + self.shared_intermediate
        sparse = self.mlp_matrices * self.hidden * passed + self.hidden * self.experts
        sparse_layers = self.layers - self.dense_layers if self.experts else 0
        dense_layers = self.layers - sparse_layers
        return self.layers * attention + dense_layers * dense + sparse_layers * sparse + self.hidden * self.vocab


def model_flops(shape: FlopsShape, document_lengths: Iterable[int], *, frozen_weights: bool = False) -> float:
    """Training FLOPs (forward and backward) of these documents.

    Args:
        shape: the model's sizes.
        document_lengths: real tokens of each document, without padding.
        frozen_weights: the base weights get no gradient (LoRA; the adapters' own FLOPs are not counted).
    """
    tokens, full_pairs, sliding_pairs = 0, 0.0, 0.0
    for length in document_lengths:
        tokens += length
        full_pairs += length * length / 2
        window = min(length, shape.sliding_window)
        sliding_pairs += length * window - window * window / 2
    full_layers = shape.layers - shape.sliding_layers
    pairs = full_layers * full_pairs + shape.sliding_layers * sliding_pairs
    attention = 4.0 * shape.heads * shape.head_dim * pairs
    matmul = 2.0 * tokens * shape.matmul_parameters
    return (2 if frozen_weights else 3) * matmul + 3 * attention


def peak_flops(device_name: str, dtype: Any) -> float | None:
    """Dense peak of a device in FLOP/s at this compute dtype, None where it is not known (CPU, fp32, other cards).

    Args:
        device_name: as the driver says it: ``NVIDIA H100 80GB HBM3``.
        dtype: ``bf16``, ``torch.bfloat16``, ...
    """
    if str(dtype).removeprefix("torch.") not in _HALF_DTYPES:
        return None
    # "L4" must not be found in "L40", nor "H20" in "H200": a name ends where the next character is no letter or digit.
    padded = f"{device_name} ".upper().replace("-", " ")
    for name, tflops in _PEAK_TFLOPS:
        if f" {name.upper()} " in f" {padded}":
            return tflops * 1e12
    return None


def _expert_sizes(config: Any, layers: int) -> dict[str, int]:
    """The fields of a mixture of experts, empty for a dense model."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((value for name in names if (value := getattr(config, name, None))), 0)
    if not experts:
        return {}
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    shared += (getattr(config, "n_shared_experts", None) or 0) * width
    every = getattr(config, "decoder_sparse_step", None) or 1
    plain = set(getattr(config, "mlp_only_layers", None) or [])
    first_dense = getattr(config, "first_k_dense_replace", None) or 0
    dense = sum(1 for i in range(layers) if i in plain or i < first_dense or (i + 1) % every)
    return {
        "experts": experts,
        "active_experts": getattr(config, "num_experts_per_tok", None) or 1,
        "expert_intermediate": width,
        "shared_intermediate": shared,
        "dense_layers": dense,
    }
