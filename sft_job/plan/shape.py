"""A decoder's sizes from its ``config.json``: parameters by part, and the linear layers that take the time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from sft_job.config.schema import ModelConfig
from sft_job.metrics.flops import FlopsShape

_BIASED_QKV = ("qwen2",)
_QK_NORMED = ("qwen3", "gemma3_text", "gemma3")
_FOUR_NORMS = ("gemma2", "gemma3_text", "gemma3")
_TIED = ("gemma", "gemma2", "gemma3_text", "gemma3")
_FUSED = ("phi3",)
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
"""``model_type`` whose parameters are counted to the last one; others as a llama, with a note."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of every decoder block.

    Attributes:
        name: within the block, as in the model.
        wide_in: features that go in.
        wide_out: features that come out.
        bias: it has one.
        reads: what it multiplies: ``normed`` (the block's or the MLP's normed input), ``attended`` or ``activated``.
    """

    name: str
    wide_in: int
    wide_out: int
    bias: bool
    reads: str

    @property
    def weights(self) -> int:
        """Elements of its matrix."""
        return self.wide_in * self.wide_out

    @property
    def parameters(self) -> int:
        """With the bias."""
        return self.weights + (self.wide_out if self.bias else 0)


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder.

    Attributes:
        kind: ``model_type``.
        hidden: width of the residual stream.
        layers: decoder blocks.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        intermediate: inner width of the MLP.
        vocab: rows of embedding and head.
        tied: the head is the embedding.
        norms: norms over the residual stream in a block.
        qk_norm: queries and keys are normed head by head.
        linears: of one block.
        window: tokens that a sliding-window layer looks back.
        sliding_layers: blocks with such a window.
        other: further parameters of a block, where more are known to be there than are counted.
    """

    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    norms: int
    qk_norm: bool
    linears: tuple[Linear, ...]
    window: int = 0
    sliding_layers: int = 0
    other: int = 0

    @property
    def queries(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys together."""
        return self.kv_heads * self.head_dim

    @property
    def block(self) -> int:
        """Parameters of a decoder block."""
        norms = self.norms * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return sum(linear.parameters for linear in self.linears) + norms + self.other

    @property
    def block_products(self) -> int:
        """Weights of a block that each token is multiplied with."""
        return sum(linear.weights for linear in self.linears)

    @property
    def table(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def root(self) -> int:
        """Parameters outside the blocks: embedding, final norm, head."""
        return self.table * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All of them, a tied head once."""
        return self.layers * self.block + self.root

    def flops(self) -> FlopsShape:
        """The sizes that decide the model's FLOPs."""
        return FlopsShape(
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            vocab=self.vocab,
            sliding_window=self.window,
            sliding_layers=self.sliding_layers,
        )


def read_shape(config: Mapping[str, Any], parameters: int = 0) -> Shape:
    """The sizes that a ``config.json`` states.

    Args:
        config: the file's object; of a model for text and images its ``text_config`` counts.
        parameters: of the files of weights, where they were counted; 0 = unknown.

    Raises:
        KeyError: a size is missing that has no default.
    """
    nested = config.get("text_config")
    sizes = cast("Mapping[str, Any]", nested) if isinstance(nested, Mapping) else config
    kind = str(sizes.get("model_type") or config.get("model_type", ""))
    hidden, layers, heads = (int(sizes[name]) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    head_dim = sizes.get("head_dim") or (256 if kind.startswith("gemma") else hidden // heads)
    tied = config.get("tie_word_embeddings", sizes.get("tie_word_embeddings"))
    window = sizes.get("sliding_window") or 0
    kinds = sizes.get("layer_types")
    sliding = layers if not kinds else list(kinds).count("sliding_attention")
    if kind.startswith("gemma2") and not kinds:
        sliding = (layers + 1) // 2
    if sizes.get("use_sliding_window") is False or (kind.startswith("qwen") and not sizes.get("use_sliding_window")):
        window = 0
    shape = Shape(
        kind=kind,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=int(sizes.get("num_key_value_heads") or heads),
        head_dim=int(head_dim),
        intermediate=int(sizes.get("intermediate_size") or 4 * hidden),
        vocab=int(sizes.get("vocab_size") or config["vocab_size"]),
        tied=kind in _TIED if tied is None else bool(tied),
        norms=4 if kind in _FOUR_NORMS else 2,
        qk_norm=kind in _QK_NORMED,
        linears=(),
        window=window,
        sliding_layers=sliding if window else 0,
    )
    shape = Shape(**{**shape.__dict__, "linears": _linears(shape, sizes)})
    # An architecture with parts that are not known here: what its files hold more is somewhere in the blocks.
    missing = parameters - shape.parameters if kind not in KNOWN else 0
    return Shape(**{**shape.__dict__, "other": missing // layers}) if missing > 0 else shape


def _linears(shape: Shape, sizes: Mapping[str, Any]) -> tuple[Linear, ...]:
    hidden, queries, keys, inner = shape.hidden, shape.queries, shape.keys, shape.intermediate
    biased = bool(sizes.get("attention_bias", False))
    qkv, out = biased or shape.kind in _BIASED_QKV, biased and shape.kind not in _BIASED_QKV
    mlp = bool(sizes.get("mlp_bias", False))
    if shape.kind in _FUSED:
        return (
            Linear("self_attn.qkv_proj", hidden, queries + 2 * keys, qkv, "normed"),
            Linear("self_attn.o_proj", queries, hidden, out, "attended"),
            Linear("mlp.gate_up_proj", hidden, 2 * inner, mlp, "normed"),
            Linear("mlp.down_proj", inner, hidden, mlp, "activated"),
        )
    return (
        Linear("self_attn.q_proj", hidden, queries, qkv, "normed"),
        Linear("self_attn.k_proj", hidden, keys, qkv, "normed"),
        Linear("self_attn.v_proj", hidden, keys, qkv, "normed"),
        Linear("self_attn.o_proj", queries, hidden, out, "attended"),
        Linear("mlp.gate_proj", hidden, inner, mlp, "normed"),
        Linear("mlp.up_proj", hidden, inner, mlp, "normed"),
        Linear("mlp.down_proj", inner, hidden, mlp, "activated"),
    )


def adapted(shape: Shape, config: ModelConfig) -> tuple[Linear, ...]:
    """Linear layers of a block that get LoRA adapters, as PEFT picks them by name."""

    def named(linear: Linear, names: Any) -> bool:
        if names is None:
            return False
        if isinstance(names, str):
            return names == "all-linear" or re.fullmatch(names, f"model.layers.0.{linear.name}") is not None
        leaf = linear.name.rpartition(".")[2]
        return any(leaf == name or linear.name.endswith(f".{name}") for name in cast("list[str]", names))

    return tuple(
        linear
        for linear in shape.linears
        if named(linear, config.target_modules) and not named(linear, config.exclude_modules)
    )
