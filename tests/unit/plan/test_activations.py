"""What a block keeps, against what autograd saves in a run on the CPU.

The GPU's path differs: compiled blocks keep less, and flash attention's output needs no copy. It is held against the
peaks of real runs (``test_footprint``).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sft_job.config.schema import ModelConfig
from sft_job.model.attention.call import Documents, Packed
from sft_job.model.attention.choose import BACKENDS
from sft_job.model.blocks import Blocks
from sft_job.model.build import empty_model
from sft_job.model.recompute import Recompute
from sft_job.model.supported import decoder_blocks
from sft_job.plan.activations import ATTENTION, FULL, LEVELS, NONE, OFFLOAD, in_backward, kept, rebuilt
from sft_job.plan.setup import RECOMPUTE_VALUES
from sft_job.plan.shape import read_shape
from tests.tiny import model_config
from tests.unit.plan.cases import LORA, case

TOKENS = 64


def saved(kind: str, dtype: torch.dtype, recompute: Recompute, layers: int) -> float:
    """Bytes for each token that the blocks' forwards leave for the backward; parameters and buffers are none."""
    lm = empty_model(model_config(kind, 320, num_hidden_layers=layers), ModelConfig(), dtype)
    lm.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_(std=0.02)
    backend = next(each for each in BACKENDS if each.name == "sdpa")
    blocks = Blocks(decoder_blocks(lm), backend, compiled=False)
    blocks.set_plan([recompute] * layers)
    documents = Documents((TOKENS,), torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*lm.parameters(), *lm.buffers())}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other takes its place
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        ids, positions = torch.zeros(1, TOKENS, dtype=torch.long), torch.arange(TOKENS)[None]
        lm.base_model(input_ids=ids, position_ids=positions, use_cache=False, packed=Packed(documents, backend, None))
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()) / TOKENS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("level", [NONE, FULL])
def test_uncompiled_blocks(kind: str, dtype: torch.dtype, level: str) -> None:
    """Between two and three blocks lies what one keeps."""
    one = saved(kind, dtype, Recompute(level), 3) - saved(kind, dtype, Recompute(level), 2)
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    config = {"model.compile": False, "model.attention": "sdpa", "model.fsdp_config.dtype": name}
    setup = case(**config).estimate(timed=False).setup
    assert kept(read_shape(model_config(kind, 320).to_dict()), setup, level).device == one


def test_attention_is_kept_beside_the_input() -> None:
    """Selective checkpoints save inside; what they hold is the ops' results, counted by their shapes."""
    shape = read_shape(model_config("qwen3", 320).to_dict())
    setup = case().estimate(timed=False).setup
    more = kept(shape, setup, ATTENTION).device - kept(shape, setup, FULL).device
    assert more == 2 * shape.heads * shape.head_dim + 4 * shape.heads


@pytest.mark.parametrize("changes", [
    {}, {"model.compile": False}, {"model.fp8": "tensorwise"}, {"model.lora_rank": 8},
    {"model.lora_rank": 8, "model.target_modules": ["q_proj"]}, {"model.fsdp_config.dtype": "fp32"},
])  # fmt: skip
@pytest.mark.parametrize("model", ["qwen2.5-7b", "qwen3-4b", "llama-3-8b"])
def test_the_more_is_computed_again_the_less_is_kept(model: str, changes: dict) -> None:
    one = case(model, **changes)
    setup = one.estimate(timed=False).setup
    sizes = [kept(one.shape, setup, level).device for level in LEVELS]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(LEVELS)


def test_offloaded_inputs_are_in_host_memory() -> None:
    one = case()
    setup = one.estimate(timed=False).setup
    off, full = kept(one.shape, setup, OFFLOAD), kept(one.shape, setup, FULL)
    assert (off.device, off.host) == (0.0, full.device)
    assert full.host == 0.0


def test_every_value_of_the_setting_is_planned_for() -> None:
    assert set(RECOMPUTE_VALUES) == {str(level) for level in Recompute}
    assert set(RECOMPUTE_VALUES) <= set(LEVELS)


def test_in_pieces_an_mlp_needs_no_more_for_longer_rows() -> None:
    one = case()
    setup = one.estimate(timed=False).setup
    short, long = 32_768, 524_288
    for tokens, gains in ((short, False), (long, True)):
        whole = rebuilt(one.shape, setup, tokens, pieces=False) + in_backward(one.shape, setup, tokens, pieces=False)
        cut = rebuilt(one.shape, setup, tokens, pieces=True) + in_backward(one.shape, setup, tokens, pieces=True)
        assert (cut < 0.6 * whole) == gains
        assert (cut == whole) != gains


def test_adapters_read_only_what_they_adapt() -> None:
    """Of a frozen layer without an adapter no input is kept."""
    by_targets = []
    for targets in (["q_proj"], ["q_proj", "gate_proj"], ["q_proj", "gate_proj", "down_proj"]):
        one = case(**{"model.lora_rank": 8, "model.target_modules": targets})
        by_targets.append(kept(one.shape, one.estimate(timed=False).setup, NONE).device)
    shape = case().shape
    assert by_targets[1] - by_targets[0] == 2 * shape.hidden + 2 * 8
    assert by_targets[2] - by_targets[1] == 2 * shape.intermediate + 2 * 8


@pytest.mark.parametrize(
    "changes", [{}, {"model.fp8": "tensorwise"}, LORA, {**LORA, "model.target_modules": ["q_proj"]}]
)
@pytest.mark.parametrize("compiled", [True, False])
def test_pieces_spare_the_mlp_alone(changes: dict, compiled: bool) -> None:
    """Whatever fp8 and adapters keep of the MLP: what is around it, and its input, is there for every token."""
    one, tokens = case(**{"model.compile": compiled, **changes}), 524_288
    setup, shape = one.estimate(timed=False).setup, one.shape
    # Norms' inputs, MLP's input, q, k, v and attention's output in bf16.
    least = 2 * (3 * shape.hidden + 2 * shape.queries + 2 * shape.keys) * tokens
    cut = rebuilt(shape, setup, tokens, pieces=True)
    piece = 7 * 2 * 2**30
    assert cut > least + 0.99 * piece
    assert cut < (1.25 if compiled else 3) * (least + piece)
    more = rebuilt(shape, setup, 2 * tokens, pieces=True) - cut
    assert more > least


def test_fp8_in_pieces_spares_only_inputs_of_products() -> None:
    """What is around the MLP, and its input, stays: at 524,288 tokens no drop of 22 GiB."""
    one, tokens = case(), 524_288
    fp8 = case(**{"model.fp8": "tensorwise"})
    sizes = [rebuilt(one.shape, each.estimate(timed=False).setup, tokens, pieces=True) for each in (one, fp8)]
    assert 0 <= sizes[0] - sizes[1] <= 2 * one.shape.hidden * tokens


def test_sums_in_fp32_at_extreme_lengths() -> None:
    """dk and dv where heads share keys, and the gradients of the MLP's weights over pieces."""
    one, tokens = case(), 1_048_576  # long enough for attention's buffers to outgrow a piece of the MLP
    setup, shape = one.estimate(timed=False).setup, one.shape
    assert setup.attention == "flash4"
    flash = in_backward(shape, setup, tokens, pieces=True)
    plain = in_backward(shape, replace(setup, attention="cudnn"), tokens, pieces=True)
    assert flash - plain == 2 * 4 * shape.keys * tokens
    grouped = replace(shape, kv_heads=shape.heads)
    whole = [in_backward(grouped, replace(setup, attention=name), tokens, pieces=True) for name in ("flash4", "cudnn")]
    assert whole[0] == whole[1]
    adapters = case(**{**LORA, "model.target_modules": ["q_proj"]}).estimate(timed=False).setup
    frozen = in_backward(shape, adapters, tokens, pieces=True)
    assert flash - frozen == 4 * 3 * shape.hidden * shape.intermediate
