from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from sft_job.config.model_folder import ModelFacts, read_model_folder
from sft_job.contract import ExitCode

QWEN: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}


def safetensors(data_bytes: int = 8) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [data_bytes // 4], "data_offsets": [0, data_bytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(data_bytes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "base"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(safetensors())
    write(model, QWEN)
    return model


def write(folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def facts_of(folder: Path, **changes: Any) -> ModelFacts:
    write(folder, {key: value for key, value in {**QWEN, **changes}.items() if value is not ...})
    facts, problems = read_model_folder(str(folder), "here:1", need_weights=True)
    assert problems == []
    assert facts is not None
    return facts


def messages(path: Path | str, need_weights: bool = True) -> list[str]:
    _, problems = read_model_folder(str(path), "sft_trainer.yaml:26", need_weights)
    assert all(problem.code is ExitCode.MODEL for problem in problems)
    assert all(problem.subject == "model.partial_pretrain" for problem in problems)
    assert all(problem.origin == "sft_trainer.yaml:26" for problem in problems)
    return [problem.text() for problem in problems]


def test_facts_of_a_plain_model(folder: Path):
    assert facts_of(folder) == ModelFacts(
        path=folder,
        model_type="qwen3",
        architectures=("Qwen3ForCausalLM",),
        num_attention_heads=16,
        num_key_value_heads=8,
        num_hidden_layers=28,
        hidden_size=1024,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_type="default",
        rope_positions=None,
        rope_original=None,
        tie_word_embeddings=True,
        has_weights=True,
        is_moe=False,
        parameters=2,
        has_auto_map=False,
    )


def test_what_the_config_leaves_out(folder: Path):
    facts = facts_of(folder, num_key_value_heads=..., head_dim=..., tie_word_embeddings=..., rope_theta=...)
    assert (facts.num_key_value_heads, facts.head_dim) == (16, 64)
    assert (facts.tie_word_embeddings, facts.rope_type) == (None, None)


@pytest.mark.parametrize(
    ("rope", "kind", "positions"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear", 81920),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            "yarn",
            131072,
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "default", None),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {"rope_type": "linear", "factor": 8},
                }
            },
            "linear",
            8 * 40960,
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]}}, "longrope", None),
    ],
)
def test_rope_scaling(folder: Path, rope: dict[str, Any], kind: str, positions: int | None):
    facts = facts_of(folder, **rope)
    assert (facts.rope_type, facts.rope_positions) == (kind, positions)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_experts_make_a_moe(folder: Path, key: str):
    assert facts_of(folder, **{key: 8}).is_moe
    assert not facts_of(folder, **{key: 1}).is_moe
    assert not facts_of(folder, **{key: None}).is_moe


def test_sizes_of_a_nested_text_model(folder: Path):
    nested = {**QWEN, "num_attention_heads": 8, "num_key_value_heads": 4}
    write(
        folder,
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": nested},
    )
    facts, problems = read_model_folder(str(folder), "", need_weights=True)
    assert problems == []
    assert facts is not None
    assert (facts.model_type, facts.num_attention_heads, facts.num_key_value_heads) == ("gemma3", 8, 4)


def test_gpt2_names_of_sizes(folder: Path):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_head": 12, "n_layer": 6, "n_embd": 768}
    write(folder, {**config, "n_positions": 1024})
    facts, problems = read_model_folder(str(folder), "", need_weights=True)
    assert problems == []
    assert facts is not None
    assert (facts.num_attention_heads, facts.num_hidden_layers, facts.head_dim) == (12, 6, 64)
    assert (facts.max_position_embeddings, facts.rope_type) == (1024, None)


def test_python_code_in_the_folder_is_a_fact(folder: Path):
    assert facts_of(
        folder, auto_map={"AutoModelForCausalLM": "modeling.Model"}, architectures=["ChatModel"]
    ).has_auto_map


def test_random_weights_need_no_files(folder: Path):
    (folder / "model.safetensors").unlink()
    facts, problems = read_model_folder(str(folder), "", need_weights=False)
    assert problems == []
    assert facts is not None
    assert (facts.has_weights, facts.parameters) == (False, 0)


def test_weights_in_several_files(folder: Path):
    (folder / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(safetensors())
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert facts_of(folder).parameters == 4
    (folder / "b.safetensors").unlink()
    (text,) = messages(folder)
    assert "names 2 files of weights, 1 of them missing: b.safetensors" in text


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_a_damaged_index(folder: Path, index: str):
    (folder / "model.safetensors.index.json").write_text(index)
    (text,) = messages(folder)
    assert "model.safetensors.index.json" in text


def test_paths_that_are_no_model_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no such folder\n" in messages(tmp_path / "nowhere")[0]
    assert "must be a folder; this is a file" in messages(folder / "config.json")[0]
    assert "hf download Qwen/Qwen3-0.6B --local-dir FOLDER" in messages("Qwen/Qwen3-0.6B")[0]
    assert len(messages("nul\0byte")) == 1
    assert len(messages("x" * 5000)) == 1
    (tmp_path / "empty").mkdir()
    assert len(messages(tmp_path / "empty")) == 3  # config, weights, tokenizer: all at once


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1' * 3, "\udcff"])
def test_a_damaged_config(folder: Path, text: str):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (message,) = messages(folder)
    assert "config.json" in message


def test_a_missing_config(folder: Path):
    (folder / "config.json").unlink()
    (text,) = messages(folder)
    assert "the folder holds no config.json" in text


def test_a_missing_tokenizer(folder: Path):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").touch()  # of no use without merges.txt
    (text,) = messages(folder)
    assert "holds no tokenizer" in text
    (folder / "merges.txt").touch()
    assert messages(folder) == []


def test_pickled_weights_are_to_be_converted(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (text,) = messages(folder)
    assert "only safetensors are read" in text
    assert "save_pretrained" in text
    (folder / "pytorch_model.bin").unlink()
    (text,) = messages(folder)
    assert "model.init: random" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "only 0 bytes long"),
        (safetensors()[:-1], "its header describes"),
        (safetensors() + b"x", "its header describes"),
        (safetensors()[:20], "truncated, or not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (struct.pack("<Q", 4) + b"[][]" + bytes(40), "cannot be read"),
    ],
)
def test_damaged_weights(folder: Path, content: bytes, said: str):
    (folder / "model.safetensors").write_bytes(content)
    (text,) = messages(folder)
    assert said in text
    assert "model.safetensors" in text
    assert messages(folder, need_weights=False) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "no causal language model: config.json names BertForMaskedLM"),
        ({"is_encoder_decoder": True}, "no causal language model"),
        ({"num_attention_heads": None}, "num_attention_heads = None"),
        ({"num_attention_heads": [8, 4]}, "num_attention_heads = [8, 4]"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"hidden_size": "big"}, "hidden_size = 'big'"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantized"),
    ],
)
def test_models_that_cannot_be_trained(folder: Path, changes: dict[str, Any], said: str):
    write(folder, {**QWEN, **changes})
    facts, _ = read_model_folder(str(folder), "", need_weights=True)
    assert facts is None
    (text,) = messages(folder)
    assert said in text
