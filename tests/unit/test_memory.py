"""What is said where device memory ran out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sft_job.config.schema import JobConfig
from sft_job.data.batches import PackedBatch, pack_rows
from sft_job.data.cache import TokenRow
from sft_job.memory import is_out_of_memory, memory_by_kind, memory_table, out_of_memory_text, remedies, shapes_text


def batch(*lengths: int, ulysses: int = 1) -> PackedBatch:
    import numpy as np

    rows = [TokenRow(np.arange(n, dtype=np.int32), np.ones(n, dtype=np.bool_)) for n in lengths]
    return pack_rows(rows, ulysses, 0, 0)


def test_bytes_by_kind():
    module = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False)
    device = torch.device("cpu")
    assert memory_by_kind(module, optimizer, device) == {"weights": 128, "gradients": 0, "optimizer states": 0}
    module(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    kinds = memory_by_kind(module, optimizer, device)
    assert kinds == {"weights": 128, "gradients": 128, "optimizer states": 2 * 128 + 4}
    assert "optimizer states" in memory_table(kinds)


def test_shapes():
    assert "20 tokens: 2 documents, the longest 13" in shapes_text(batch(7, 13), 1)
    text = shapes_text(batch(7, 14, ulysses=2), 2)
    assert "21 tokens: 2 documents, the longest 14; 11 tokens on each of 2 ranks" in text  # padding is no document


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({}, ["recompute=full", "micro_batch_size_per_gpu below 4", "ulysses_sequence_parallel_size above 1"], []),
        ({"model.recompute": "full"}, ["micro_batch_size_per_gpu below 4", "recompute=offload"], ["recompute=full"]),
        ({"model.recompute": "offload"}, ["micro_batch_size_per_gpu below 4"], ["recompute"]),
        ({"data.micro_batch_size_per_gpu": 1}, ["cpu_offload=true"], ["micro_batch_size_per_gpu"]),
        ({"data.use_dynamic_bsz": True}, ["max_token_len_per_gpu below 8,192"], ["micro_batch_size_per_gpu"]),
        ({"data.use_dynamic_bsz": True, "data.max_token_len_per_gpu": 100}, [], ["max_token_len_per_gpu"]),
        ({"ulysses_sequence_parallel_size": 2}, [], ["ulysses"]),
        ({"model.fsdp_config.offload_params": True}, ["model_dtype=bf16"], ["cpu_offload"]),
        ({"model.lora_rank": 8, "model.fsdp_config.model_dtype": "bf16"}, [], ["lora_rank", "model_dtype"]),
        ({"model.fsdp_config.fsdp_size": 1}, ["fsdp_size=-1"], []),
    ],
)
def test_only_what_is_left_to_change_is_advised(changes: dict, said: list[str], unsaid: list[str]):
    config = JobConfig()
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
    text = "\n".join(remedies(config, longest=128, world=2))
    assert all(each in text for each in said)
    assert not any(each in text for each in unsaid)
    assert "data.max_length below 1,024" in text


def test_message_has_place_table_and_advice():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated ...")
    text = out_of_memory_text(error, "at step 3", {"weights": 2**30}, ["less"])
    assert text.splitlines() == [
        "out of device memory at step 3",
        "    CUDA out of memory. Tried to allocate 2.00 GiB",
        "    where this rank's memory is:",
        "      weights      1.00 GiB",
        "    fix, any of:",
        "      less",
    ]


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_what_the_plan_says_comes_first():
    lines = remedies(JobConfig(), 100, 1, "model.recompute=full is the smallest change")
    assert lines[0] == "model.recompute=full is the smallest change"
    assert len(lines) == 1 + len(remedies(JobConfig(), 100, 1))


def test_gradients_of_all_parameters_are_advised_against_where_they_are_kept():
    config, setting = JobConfig(), "shard_accumulated=true"
    for world, whole, advised in ((2, True, True), (2, False, False), (1, True, False)):
        lines = remedies(config, 100, world, whole_gradients=whole)
        assert any(setting in line for line in lines) is advised


def test_sums_over_micro_batches_are_gradients():
    module = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False)
    kinds = memory_by_kind(module, optimizer, torch.device("cpu"), [torch.zeros(4, 8)])
    assert kinds["gradients"] == 128
