from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from sft_job.checkpoint.huggingface import WeightsHash, write_companions, write_weights
from sft_job.data.template_check import saved_stops
from tests.tiny import model_config, save_tokenizer


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


@pytest.mark.parametrize(
    ("generation", "expected", "note"),
    [
        ([0, 1], [2, 0, 1], "'<|im_end|>' (id 2), which ends a turn, added to [0, 1]"),
        (0, [2, 0], "'<|im_end|>' (id 2), which ends a turn, added to 0"),
        ([0, 2], [2, 0], ""),
        (2, 2, ""),
        (None, [2, 0], "added to 0"),  # no generation_config.json: the model's config counts
    ],
)
def test_generation_of_the_export_stops_at_the_trained_token(tmp_path, generation, expected, note) -> None:
    base, folder = tmp_path / "base", tmp_path / "out"
    folder.mkdir()
    tokenizer = save_tokenizer(base)
    config = model_config("qwen3", len(tokenizer))
    config.eos_token_id = 0
    config.save_pretrained(base)
    if generation is not None:
        settings = {"eos_token_id": generation, "temperature": 0.6}
        (base / "generation_config.json").write_text(json.dumps(settings))
    said = write_companions(folder, config, torch.float32, "Qwen3ForCausalLM", base, tokenizer, 2)
    assert note in said
    assert bool(said) == bool(note)
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["eos_token_id"] == expected
    assert saved.get("temperature") == (0.6 if generation is not None else None)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [2, 0]
    assert config.eos_token_id == 0
    assert saved_stops(folder)[1] == (expected if isinstance(expected, list) else [expected])
