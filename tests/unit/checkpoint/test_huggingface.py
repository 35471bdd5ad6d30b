from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from sft_job.checkpoint.huggingface import WeightsHash, write_weights


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (4, 5), "b": (30,), "c": (3, 3), "d": (2,)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def test_one_file(tmp_path) -> None:
    digest = write_weights(tmp_path, iter(tensors().items()), write=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())
    assert len(digest) == 64


def test_several_files_and_their_index(tmp_path, monkeypatch) -> None:
    from sft_job.checkpoint.huggingface import WeightsWriter

    writer = WeightsWriter(tmp_path, file_bytes=130)
    for name, tensor in tensors().items():
        writer.add(name, tensor)
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors()[name])
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_ranks_that_do_not_write_take_part_and_leave_nothing(tmp_path) -> None:
    drawn = []
    assert write_weights(tmp_path, (drawn.append(n) or (n, t) for n, t in tensors().items()), write=False) == ""
    assert drawn == list(tensors())
    assert list(tmp_path.iterdir()) == []


def test_the_hash_sees_every_bit_name_shape_and_dtype() -> None:
    def digest(changed: dict[str, torch.Tensor]) -> str:
        weights = WeightsHash()
        for name in sorted(changed):
            weights.add(name, changed[name])
        return weights.hexdigest()

    plain = tensors()
    bit = {**plain, "b": plain["b"].clone()}
    bit["b"].view(torch.uint8)[3] ^= 1
    renamed = {("e" if name == "d" else name): tensor for name, tensor in plain.items()}
    reshaped = {**plain, "a": plain["a"].reshape(5, 4)}
    other = {**plain, "d": plain["d"].view(torch.int32)}
    assert len({digest(each) for each in (plain, bit, renamed, reshaped, other)}) == 5
    assert digest(tensors()) == digest(plain)
    assert digest({"x": torch.ones(3, dtype=torch.bfloat16)}) != digest({"x": torch.zeros(3, dtype=torch.bfloat16)})
