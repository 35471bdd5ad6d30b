"""Bytes that a decoder block keeps for its backward, for each token of a rank, by what is computed again.

Compiled blocks keep the inputs of their matrix products, what attention needs, and the two residual sums; the rest of
the element-wise work is computed again inside fused kernels. With fp8 the inputs of the MLP's products are made anew
as well. Uncompiled ones keep the result of nearly every operation, and norms work on copies in fp32. Both were checked:
the first against peaks on an H200 (within 2 %), the second against what autograd saves on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_job.plan.setup import Setup
from sft_job.plan.shape import Linear, Shape

FULL, OFFLOAD, ATTENTION, NONE = "full", "offload", "attention", "none"
LEVELS = (OFFLOAD, FULL, ATTENTION, NONE)
"""What is computed again in a block's backward, those that keep least on the device first. OFFLOAD is FULL with the
block's input in host memory."""
_TILE_ELEMENTS = 2**30
"""Elements of the MLP's widest tensor in a piece, in plans with OFFLOAD."""
_IN_A_PIECE = 7
"""So many such tensors are there at once: gate, up, their activation and product, and gradients of three of them."""
_STATISTIC = 4
"""Bytes of a log-sum-exp, or of a norm's reciprocal: fp32."""


@dataclass(frozen=True)
class Kept:
    """What a block keeps for each token of a rank, in bytes: on the device, and in page-locked host memory."""

    device: float
    host: float = 0.0


def kept(shape: Shape, setup: Setup, level: str) -> Kept:
    """What a block keeps at a level.

    Args:
        shape: of the model.
        setup: of the run.
        level: one of ``LEVELS``.
    """
    given = setup.compute * shape.hidden  # the block's input
    if level == OFFLOAD:
        return Kept(0.0, given)
    if level == FULL:
        return Kept(given)
    if level == ATTENTION:
        return Kept(given + _attended(shape, setup))
    return Kept(_compiled(shape, setup) if setup.compiled else _uncompiled(shape, setup))


def _attended(shape: Shape, setup: Setup) -> float:
    """Attention's output and log-sum-exps: as many with Ulysses, all tokens of fewer heads."""
    return setup.compute * shape.queries + _STATISTIC * shape.heads


def _key_width(shape: Shape, setup: Setup) -> int:
    """Keys that attention works on for each token: key/value heads are repeated up to the Ulysses size, or to all."""
    if setup.attention == "torch_varlen":
        return shape.queries
    return max(shape.kv_heads, setup.ulysses) * shape.head_dim


def scores(shape: Shape, setup: Setup, longest: int) -> float:
    """Bytes of the scores that the plain formula keeps of a block's longest document; other backends keep none."""
    if setup.attention != "eager":
        return 0.0
    return shape.heads / setup.ulysses * float(longest) ** 2 * (_STATISTIC + setup.compute)


def _attention(shape: Shape, setup: Setup) -> float:
    """What attention keeps: q, k, v, output, log-sum-exps; with Ulysses the input of the output projection too."""
    size = setup.compute
    total = size * (shape.queries + 2 * _key_width(shape, setup)) + _attended(shape, setup)
    if setup.ulysses > 1:
        total += size * shape.queries
    return total


def _compiled(shape: Shape, setup: Setup) -> float:
    return _compiled_around(shape, setup) + _compiled_mlp(shape, setup)


def _compiled_around(shape: Shape, setup: Setup) -> float:
    """What a compiled block keeps besides its MLP."""
    size = setup.compute
    total = 2.0 * size * shape.hidden  # the residual stream before attention and before the MLP
    total += shape.norms * _STATISTIC
    total += max(0, shape.norms - 2) * size * shape.hidden  # norms behind attention and MLP keep their inputs
    total += _attention(shape, setup)
    if shape.qk_norm:
        total += size * (shape.queries + shape.keys) + _STATISTIC * (shape.heads + shape.kv_heads)
    reads = {linear.reads for linear in shape.linears if not _in_mlp(linear) and _read(setup, linear)}
    return total + size * shape.hidden * ("normed" in reads) + _adapters(setup, in_mlp=False)


def _compiled_mlp(shape: Shape, setup: Setup) -> float:
    size = setup.compute
    reads = {linear.reads for linear in shape.linears if _in_mlp(linear) and _read(setup, linear)}
    total = 2 * size * shape.intermediate  # gate and up
    total += size * (shape.hidden * ("normed" in reads) + shape.intermediate * ("activated" in reads))
    return total + _adapters(setup, in_mlp=True)


def _in_mlp(linear: Linear) -> bool:
    return linear.name.startswith("mlp.")


def _adapters(setup: Setup, *, in_mlp: bool) -> float:
    """Results of the adapters' first products."""
    return float(setup.compute * setup.rank * sum(_in_mlp(linear) == in_mlp for linear in setup.adapters))


def _read(setup: Setup, linear: Linear) -> bool:
    """Whether a layer's input is kept for the gradient of its weight: adapters read it in the wide dtype."""
    if setup.rank:
        return linear in setup.adapters
    return not setup.in_fp8(linear)


def _uncompiled(shape: Shape, setup: Setup) -> float:
    mlp = 4 * setup.compute * shape.intermediate  # gate, its activation, up, their product
    return _uncompiled_around(shape, setup) + mlp + _adapters(setup, in_mlp=True)


def _uncompiled_around(shape: Shape, setup: Setup) -> float:
    """What a block that is not compiled keeps besides its MLP; the MLP's input among it."""
    size = setup.compute
    # A norm keeps its input in fp32, the normed one before its weight, and its output, which linear layers read.
    total = shape.norms * ((_STATISTIC + 2 * size) * shape.hidden + _STATISTIC)
    if shape.qk_norm:
        total += (_STATISTIC + size) * (shape.queries + shape.keys) + _STATISTIC * (shape.heads + shape.kv_heads)
    total += _attention(shape, setup)
    if setup.ulysses == 1 and setup.attention in ("sdpa", "cudnn", "eager"):
        total += size * shape.queries  # documents are joined behind attention
    return total + _adapters(setup, in_mlp=False)


def rebuilt(shape: Shape, setup: Setup, tokens: int, *, pieces: bool) -> float:
    """Bytes of a block of which everything is there, when its backward begins.

    Args:
        shape: of the model.
        setup: of the run.
        tokens: of the rank.
        pieces: its MLP works on pieces of a long sequence, as it does in plans with OFFLOAD.
    """
    if not _cut(shape, tokens, pieces=pieces):
        return (kept(shape, setup, NONE).device + _unsummed(shape, setup, pieces=pieces)) * tokens
    around = _uncompiled_around(shape, setup)
    if setup.compiled:
        # Pieces read the MLP's input again, whatever else does.
        around = _compiled_around(shape, setup) + setup.compute * shape.hidden
    inner = setup.compute * shape.intermediate
    return around * tokens + (_IN_A_PIECE * inner + _adapters(setup, in_mlp=True)) * _tile(shape)


def _unsummed(shape: Shape, setup: Setup, *, pieces: bool) -> float:
    """What adapters of an MLP add where recomputation is compiled into the backward (not so in plans with OFFLOAD).

    A kernel that reads gate and up then adds up the base layer's result and the adapter's itself, so both are there,
    as are both parts of the gradient of down's input. Counted in what torch.compile allocates.
    """
    if pieces or not setup.compiled:
        return 0.0
    return float(setup.compute * shape.intermediate * sum(_in_mlp(linear) for linear in setup.adapters))


def _tile(shape: Shape) -> int:
    """Tokens of a piece at most."""
    return _TILE_ELEMENTS // shape.intermediate


def _cut(shape: Shape, tokens: int, *, pieces: bool) -> bool:
    return pieces and tokens > _tile(shape)


def _summed(shape: Shape, setup: Setup) -> float:
    """Bytes in which the gradients of an MLP's weights add up over pieces, in fp32 at least."""
    mlp = [linear for linear in (setup.adapters if setup.rank else shape.linears) if _in_mlp(linear)]
    weights = sum(setup.rank * (each.wide_in + each.wide_out) if setup.rank else each.parameters for each in mlp)
    return float(max(4, setup.compute) * weights)


def in_backward(shape: Shape, setup: Setup, tokens: int, *, pieces: bool) -> float:
    """Bytes that a block's backward needs besides what is kept or rebuilt: gradients on their way.

    Args:
        shape: of the model.
        setup: of the run.
        tokens: of the rank.
        pieces: as ``rebuilt`` has it.
    """
    size = setup.compute
    mlp = (3 if setup.compiled else 5) * size * shape.intermediate
    attention = 4 * shape.queries + size * (shape.queries + 2 * _key_width(shape, setup))  # dq is summed in fp32
    if setup.attention == "flash4" and _key_width(shape, setup) < shape.queries:
        attention += 2 * 4 * _key_width(shape, setup)  # dk and dv too, where heads share keys
    if setup.ulysses > 1:
        attention += 2 * size * (shape.queries + 2 * _key_width(shape, setup))  # sent and received
    stream = (2 if setup.compiled else 8) * size * shape.hidden
    if setup.fp8 != "none":
        mlp += shape.intermediate + shape.hidden  # casts
    if _cut(shape, tokens, pieces=pieces):
        # The MLP's own are counted with the piece, but for the sums over pieces; attention's come when it is gone.
        piece = _IN_A_PIECE * size * shape.intermediate * _tile(shape)
        return max(0.0, attention * tokens - piece) + stream * tokens + _summed(shape, setup)
    return (max(mlp, attention) + stream) * tokens
