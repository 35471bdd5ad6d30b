"""Blocks' inputs in host memory: the bits of full recomputation, nothing left on the device or lost on an error."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef

from sft_job.contract import ExitCode
from sft_job.data.batches import PackedBatch, pack_rows
from sft_job.data.cache import TokenRow
from sft_job.errors import JobError
from sft_job.model.attention.call import Backend
from sft_job.model.attention.choose import BACKENDS
from sft_job.model.attention.packed import PACKED, register_packed_attention
from sft_job.model.blocks import Blocks, maybe_compiled, offload_plan
from sft_job.model.causal_lm import CausalLMLoss
from sft_job.model.loss import row_losses
from sft_job.model.offload import PAGE_BYTES, HostPages, InputStore, host_bytes
from sft_job.model.recompute import Recompute, recomputing
from sft_job.model.supported import decoder_blocks
from tests.tiny import model_config
from tests.traced import TRACED

FULL, OFFLOAD = Recompute.FULL, Recompute.OFFLOAD
SDPA = next(b for b in BACKENDS if b.name == "sdpa")
LAYERS = 5
CPU = torch.device("cpu")


@dataclass
class Late:
    """A lane whose copies are made only when somebody waits for them, as late as a busy stream would."""

    waiting: deque[tuple[int, Callable[[], None]]] = field(default_factory=deque)
    begun: int = 0

    def run(self, copy: Callable[[], None]) -> Any:
        self.begun += 1
        number = self.begun
        self.waiting.append((number, copy))
        lane = self

        class Mark:
            def wait(self) -> None:
                while lane.waiting and lane.waiting[0][0] <= number:
                    lane.waiting.popleft()[1]()

        return Mark()


def late_store(page: int = 512) -> InputStore:
    return InputStore(CPU, HostPages(None, page), Late(), Late())


def model(
    plan: Sequence[Recompute],
    store: InputStore | None = None,
    *,
    backend: Backend = SDPA,
    compiled: bool = False,
    tile_elements: int = 2**30,
    **more: Any,
) -> CausalLMLoss:
    from transformers import AutoModelForCausalLM

    register_packed_attention()
    torch.manual_seed(0)
    config = model_config(more.pop("kind", "qwen3"), 300, num_hidden_layers=LAYERS, **more)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=PACKED)
    blocks = Blocks(
        decoder_blocks(lm), backend, compiled=compiled, compiler="aot_eager", store=store, tile_elements=tile_elements
    )
    blocks.set_plan(plan)
    return CausalLMLoss(lm, backend, None, blocks, maybe_compiled(row_losses, compiled, "aot_eager")).train()


def pack(*lengths: int) -> PackedBatch:
    random = np.random.default_rng(lengths)
    rows = [TokenRow(random.integers(3, 290, n).astype(np.int32), np.ones(n, bool)) for n in lengths]
    return pack_rows(rows, 1, 0, 0)


def gradients(module: CausalLMLoss, *batches: PackedBatch) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and added-up gradients of several micro-batches."""
    torch.manual_seed(1)
    losses = []
    for batch in batches:
        loss = module(batch, 7)
        loss.backward()
        losses.append(loss.item())
    grads = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad()
    return losses, grads


def assert_bits(found: Any, wanted: Any) -> None:
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()
    assert [name for name, grad in wanted[1].items() if not torch.equal(found[1][name], grad)] == []


BATCHES = (pack(9, 1, 4), pack(30), pack(3, 3), pack(300, 2))


@pytest.mark.parametrize("moved", [1, 2, LAYERS - 1, LAYERS])
def test_the_bits_of_full_recomputation(moved) -> None:
    """Micro-batches of other lengths one after the other, with copies as late as may be; the pages serve them all."""
    store = late_store()
    found = gradients(model(offload_plan(LAYERS, moved), store), *BATCHES)
    assert_bits(found, gradients(model([FULL] * LAYERS), *BATCHES))
    assert_bits(found, gradients(model([Recompute.NONE] * LAYERS), *BATCHES))
    longest = max(batch.input_ids.numel() for batch in BATCHES) * 32 * 8
    assert store.pages.held == moved * host_bytes(longest, 512), "once for each input of the longest, and no more"
    assert store.pages.in_use == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_with_dropout_and_with_a_frozen_start(frozen) -> None:
    """The same draws again; and where the first block's input has no gradient, as under LoRA."""

    def prepared(module: CausalLMLoss) -> CausalLMLoss:
        if frozen:
            module.requires_grad_(False)
            for block in decoder_blocks(module.lm):
                block.self_attn.q_proj.weight.requires_grad_(True)
        return module

    dropout = {"attention_dropout": 0.3}
    wanted = gradients(prepared(model([FULL] * LAYERS, **dropout)), *BATCHES)
    assert_bits(gradients(prepared(model(offload_plan(LAYERS, LAYERS - 1), late_store(), **dropout)), *BATCHES), wanted)
    assert len(wanted[1]) == LAYERS if frozen else len(wanted[1]) > LAYERS


@pytest.mark.parametrize("backend", [SDPA, TRACED])
def test_compiled_blocks(backend) -> None:
    """Recomputation stands outside of the graphs, whether attention is inside or not."""
    torch._dynamo.reset()
    store = late_store()
    found = gradients(model(offload_plan(LAYERS, 4), store, backend=backend, compiled=True), *BATCHES[:2])
    wanted = gradients(model([FULL] * LAYERS, backend=backend), *BATCHES[:2])
    assert found[0] == pytest.approx(wanted[0], rel=1e-13)
    for name, grad in wanted[1].items():
        assert torch.allclose(found[1][name], grad, rtol=1e-9, atol=1e-12), name
    assert store.pages.in_use == 0
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_blocks_with_mlps_in_pieces() -> None:
    torch._dynamo.reset()
    module = model(offload_plan(LAYERS, 4), late_store(), compiled=True, tile_elements=1)
    wanted = gradients(model([FULL] * LAYERS), pack(20), pack(600))
    graphs = []
    for _ in range(3):
        counters.clear()
        found = gradients(module, pack(20), pack(600))
        graphs.append(counters["stats"]["unique_graphs"])
        assert found[0] == pytest.approx(wanted[0], rel=1e-13)
        for name, grad in wanted[1].items():
            assert torch.allclose(found[1][name], grad, rtol=1e-9, atol=1e-12), name
    assert graphs[0] > 0
    assert graphs[2] == 0, graphs
    torch._dynamo.reset()


def alive_inputs(module: CausalLMLoss) -> tuple[list[StorageWeakRef], list[Any]]:
    inputs: list[StorageWeakRef] = []

    def note(block: Any, arguments: tuple[Any, ...]) -> None:
        inputs.append(StorageWeakRef(arguments[0].untyped_storage()))

    return inputs, [block.register_forward_pre_hook(note) for block in decoder_blocks(module.lm)]


@pytest.mark.parametrize(("plan", "alive"), [(offload_plan(LAYERS, 4), 1), (offload_plan(LAYERS, 2), 3)])
def test_inputs_leave_the_device(plan, alive) -> None:
    """After the forward only those of blocks that are not moved are there; before, one is on its way out."""
    module = model(plan, late_store())
    inputs, _ = alive_inputs(module)
    present: list[int] = []
    for block in decoder_blocks(module.lm):
        block.register_forward_hook(lambda *_: present.append(sum(not each.expired() for each in inputs)))
    loss = module(BATCHES[0], 7)
    moved = plan.count(OFFLOAD)
    assert sum(not each.expired() for each in inputs) == alive
    assert max(present[:moved]) <= 2, "the one that is used and the one that is on its way"
    loss.backward()
    del loss
    assert all(each.expired() for each in inputs)


def test_full_recomputation_would_keep_them() -> None:
    """So the test above can fail."""
    module = model([FULL] * LAYERS)
    inputs, _ = alive_inputs(module)
    loss = module(BATCHES[0], 7)
    assert sum(not each.expired() for each in inputs) == LAYERS
    del loss


def test_inputs_come_back_one_block_ahead() -> None:
    """When a block is computed again, the input of the block before it is on its way."""
    store = late_store()
    module = model(offload_plan(LAYERS, 4), store)
    back: Any = store._back
    begun: list[int] = []
    loss = module(BATCHES[0], 7)
    for block in decoder_blocks(module.lm):
        block.register_forward_hook(lambda *_: begun.append(back.begun))
        block.input_layernorm.register_forward_pre_hook(lambda *_: begun.append(back.begun))
    loss.backward()
    assert begun == [1, 2, 3, 4, 4]


def test_evaluation_moves_nothing() -> None:
    store = late_store()
    module = model(offload_plan(LAYERS, 4), store).eval()
    with torch.no_grad():
        loss = module(BATCHES[0], 7)
    assert store.pages.held == 0
    assert loss.item() == model([FULL] * LAYERS)(BATCHES[0], 7).item()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_breaks_off_leaks_nothing(where) -> None:
    """The pages are free, no copy is left, and another plan, or the same, goes on as if nothing had been."""
    store = late_store()
    module = model(offload_plan(LAYERS, 4), store)
    block = decoder_blocks(module.lm)[2]

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("the card is full")

    hook = block.mlp.register_forward_hook(fail) if where == "forward" else None
    try:
        loss = module(BATCHES[0], 7)
        hook = block.mlp.register_forward_pre_hook(fail)
        loss.backward()
    except torch.OutOfMemoryError:
        loss = None
    else:
        raise AssertionError("it did not break off")
    assert hook is not None
    hook.remove()
    module.zero_grad()
    gc.collect()
    assert store.pages.in_use == 0
    assert not store._back.waiting, "no copy still writes memory that is free now"  # type: ignore[attr-defined]
    assert_bits(gradients(module, *BATCHES), gradients(model([FULL] * LAYERS), *BATCHES))
    store.clear()
    assert store.pages.held == 0
    assert not store._leaving
    assert not store._back.waiting  # type: ignore[attr-defined]


@pytest.mark.parametrize("plan", [offload_plan(LAYERS, 4), offload_plan(LAYERS, 2)])
@pytest.mark.parametrize("tile_elements", [1, 2**30])
def test_a_loss_that_is_held_holds_nothing_else(plan, tile_elements) -> None:
    """Also where MLPs work in pieces: pages and inputs are let go of in the backward, not with the graph."""
    store = late_store()
    module = model(plan, store, tile_elements=tile_elements)
    inputs, _ = alive_inputs(module)
    loss = module(pack(600), 7)
    held = store.pages.held
    assert store.pages.in_use == held > 0
    loss.backward()
    assert store.pages.in_use == 0
    assert all(each.expired() for each in inputs)
    again = module(pack(600), 7)
    assert store.pages.held == held, "the second micro-batch takes the pages of the first"
    del loss, again


def test_a_loss_that_nobody_derives_gives_its_pages_back() -> None:
    store = late_store()
    module = model(offload_plan(LAYERS, 4), store)
    loss = module(BATCHES[0], 7)
    assert store.pages.in_use == store.pages.held > 0
    del loss
    assert store.pages.in_use == 0


def test_plans_change_on_the_way() -> None:
    store = late_store()
    module = model([FULL] * LAYERS, store, tile_elements=1)
    wanted = gradients(model([FULL] * LAYERS), pack(600))
    assert_bits(gradients(module, pack(600)), wanted)
    module.blocks.set_plan(offload_plan(LAYERS, 3))
    apart = gradients(module, pack(600))
    assert apart[0] == pytest.approx(wanted[0], rel=1e-13)
    module.blocks.set_plan([Recompute.ATTENTION] * LAYERS)
    before = store.pages.held
    assert_bits(gradients(module, pack(600)), wanted)
    assert store.pages.held == before


@dataclass
class Cudart:
    """Locks so many pages."""

    room: int = 100
    locked: set[int] = field(default_factory=set)

    def cudaHostRegister(self, start: int, size: int, flags: int, /) -> int:
        if len(self.locked) == self.room:
            return 2
        self.locked.add(start)
        return 0

    def cudaHostUnregister(self, start: int, /) -> int:
        self.locked.remove(start)
        return 0


def test_pages_are_locked_once_and_given_back() -> None:
    cuda = Cudart()
    store = InputStore(CPU, HostPages(cuda, 4096), Late(), Late())
    module = model(offload_plan(LAYERS, 4), store)
    first = gradients(module, pack(30))
    locked = set(cuda.locked)
    assert len(locked) * 4096 == store.pages.held == 4 * host_bytes(30 * 32 * 8, 4096)
    assert all(start % 4096 == 0 for start in locked)
    assert_bits(gradients(module, pack(30)), first)
    assert cuda.locked == locked
    store.clear()
    assert not cuda.locked


class Mapped(Cudart):
    """Memory that is unlocked must still be there."""

    def cudaHostUnregister(self, start: int, /) -> int:
        spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        assert any(int(begin, 16) <= start < int(end, 16) for begin, end in spans)
        return super().cudaHostUnregister(start)


@pytest.mark.parametrize("in_use", [0, 3])
def test_a_store_that_nobody_cleared_unlocks_its_pages(in_use) -> None:
    """Else memory at the same addresses could not be locked any more (CUDA error 712)."""
    cuda = Mapped()
    pages = HostPages(cuda, 4096)
    taken = pages.take(3)
    pages.give_back(taken[in_use:])
    assert len(cuda.locked) == 3
    pages.clear()
    assert len(cuda.locked) == in_use
    del taken, pages
    gc.collect()
    assert not cuda.locked


@pytest.mark.parametrize(("pages", "why"), [
    (HostPages(Cudart(room=1), 4096), "CUDA error 2"), (HostPages(None, 2**62), "allocate"),
])  # fmt: skip
def test_the_host_gives_no_more(pages, why) -> None:
    with pytest.raises(JobError, match=rf"recompute=offload.*no more: .*{why}") as caught:
        pages.take(2)
    assert caught.value.code is ExitCode.OUT_OF_MEMORY


def test_room_is_made_in_advance_as_far_as_the_host_gives_it() -> None:
    """Nothing breaks off: how many inputs have room is known before a step."""
    cuda = Cudart(room=7)
    store = InputStore(CPU, HostPages(cuda, 4096), Late(), Late())
    assert store.reserve(4, 2 * 4096) == 3
    assert len(cuda.locked) == 7
    store.keep(2, 2 * 4096)
    assert len(cuda.locked) * 4096 == store.pages.held == 4 * 4096
    assert store.reserve(2, 2 * 4096) == 2
    store.keep(0, 2 * 4096)
    assert not cuda.locked


def test_reserved_room_serves_the_step() -> None:
    cuda = Cudart()
    store = InputStore(CPU, HostPages(cuda, 4096), Late(), Late())
    assert store.reserve(4, 30 * 32 * 8) == 4
    held = store.pages.held
    gradients(model(offload_plan(LAYERS, 4), store), pack(30))
    assert store.pages.held == held


def test_what_could_not_go_is_counted() -> None:
    """An input that comes by name, or not in one piece, stays; the others are known to have gone."""
    store = late_store()
    seen: list[torch.Tensor] = []

    def block(_: Any, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden * 2

    around = store.around(recomputing(block, FULL, (), False), moves=True)
    given = torch.ones(4, 6, requires_grad=True)
    module: Any = torch.nn.Module()
    around(module, given).sum().backward()
    assert (store.sent, store.stayed) == (1, 0)
    around(module, hidden=given).sum().backward()
    assert (store.sent, store.stayed) == (1, 1)
    around(module, given.t()).sum().backward()
    assert (store.sent, store.stayed) == (1, 2)
    with torch.no_grad():
        around(module, hidden=given)
    assert (store.sent, store.stayed) == (1, 2)
    whole = model(offload_plan(LAYERS, 3), other := late_store())
    gradients(whole, *BATCHES)
    assert (other.sent, other.stayed) == (3 * len(BATCHES), 0)
    whole.blocks.set_plan([FULL] * LAYERS)
    assert other.sent == 0


def test_what_an_input_takes() -> None:
    assert host_bytes(1) == PAGE_BYTES
    assert host_bytes(PAGE_BYTES) == PAGE_BYTES
    assert host_bytes(524_288 * 3584 * 2) == 112 * PAGE_BYTES == 3.5 * 2**30


def test_blocks_share_their_graphs() -> None:
    """Neither a block more nor the hooks around each, nor a third number of tokens, compiles anything."""
    torch._dynamo.reset()
    module = model(offload_plan(LAYERS, 4), late_store(), backend=TRACED, compiled=True)
    graphs = []
    for batch in (pack(9, 1, 4), pack(30), pack(3, 3), pack(41)):
        counters.clear()
        gradients(module, batch)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] <= 2, "the block, and the loss"
    assert graphs[2:] == [0, 0]
    torch._dynamo.reset()
