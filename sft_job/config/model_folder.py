"""What the base model's folder says about itself, read from its JSON files without torch or transformers."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sft_job.contract import ExitCode
from sft_job.errors import Problem

_KEY = "model.partial_pretrain"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZER_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("vocab.txt",),
    ("tekken.json",),
)
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


@dataclass(frozen=True)
class ModelFacts:
    """Facts from ``config.json`` and the file list; counts that the config does not state are None.

    Attributes:
        rope_type: type of RoPE scaling (default, yarn, linear, ...); None where the config names no RoPE.
        rope_positions: positions that RoPE scaling stretches to, where it states a factor.
        rope_original: positions before that stretching, where the config states them.
        tie_word_embeddings: None where the config leaves it to the architecture's default.
        has_weights: safetensors files are there.
        is_moe: the config counts experts.
        parameters: elements of all tensors in the safetensors files; 0 where they were not read.
        has_auto_map: the config names Python code that only trust_remote_code runs.
    """

    path: Path
    model_type: str
    architectures: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    hidden_size: int
    head_dim: int
    vocab_size: int | None
    max_position_embeddings: int | None
    rope_type: str | None
    rope_positions: int | None
    rope_original: int | None
    tie_word_embeddings: bool | None
    has_weights: bool
    is_moe: bool
    parameters: int
    has_auto_map: bool


def read_model_folder(path: str, key_origin: str, need_weights: bool) -> tuple[ModelFacts | None, list[Problem]]:
    """Read and check a Hugging Face causal language model folder.

    Args:
        path: value of ``model.partial_pretrain``.
        key_origin: where that value came from, for the messages.
        need_weights: False where the weights are drawn at random and only ``config.json`` and tokenizer are used.

    Returns:
        The facts (None where ``config.json`` does not give them) and problems, all with exit code 66.
    """
    reader = _FolderReader(Path(path), path, key_origin)
    if not reader.folder_is_there():
        return None, reader.problems
    config = reader.config()
    weights = reader.weights() if need_weights else []
    reader.check_tokenizer()
    facts = reader.facts(config, weights) if config is not None else None
    return facts, reader.problems


class _FolderReader:
    """Reads one folder and collects problems."""

    def __init__(self, folder: Path, given: str, origin: str) -> None:
        self.folder = folder
        self.given = given
        self.origin = origin
        self.problems: list[Problem] = []
        self.elements: list[int] = []
        """Elements of the tensors in each file of weights."""

    def problem(self, rule: str, fix: str) -> None:
        self.problems.append(Problem(ExitCode.MODEL, _KEY, rule, fix, self.given, self.origin))

    def folder_is_there(self) -> bool:
        try:
            if self.folder.is_dir():
                next(self.folder.iterdir(), None)
                return True
            exists = self.folder.exists()
        except (OSError, ValueError) as error:
            self.problem(f"the folder cannot be read: {_reason(error)}", "check the path and its permissions")
            return False
        if exists:
            self.problem("must be a folder; this is a file", "name the folder that holds config.json")
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", self.given) and not self.given.startswith("."):
            self.problem(
                "there is no such folder; it looks like a name on the Hugging Face Hub, but this job reads local ones",
                f"download it first: hf download {self.given} --local-dir FOLDER, then name FOLDER here",
            )
        else:
            self.problem("there is no such folder", "correct the path, or mount the folder into the container")
        return False

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file of the folder, or None and a problem."""
        try:
            data = json.loads((self.folder / name).read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            self.problem(f"the folder holds no {name}", "name the folder of a Hugging Face model")
        except (OSError, ValueError, RecursionError) as error:
            self.problem(f"{name} cannot be read: {_reason(error)}", "copy the file again")
        else:
            if isinstance(data, dict):
                return cast("dict[str, Any]", data)
            self.problem(f"{name} must hold a JSON object", "copy the file again")
        return None

    def config(self) -> dict[str, Any] | None:
        return self.read_json("config.json")

    def check_tokenizer(self) -> None:
        if not any(all((self.folder / name).is_file() for name in names) for names in _TOKENIZER_FILES):
            wanted = ", ".join(" + ".join(names) for names in _TOKENIZER_FILES[:3])
            self.problem(f"the folder holds no tokenizer ({wanted}, ...)", "copy the tokenizer's files into the folder")

    def weights(self) -> list[Path]:
        """The safetensors files, checked for missing, truncated and never downloaded ones."""
        if (self.folder / _INDEX).is_file():
            files = self._indexed()
        elif (self.folder / _SINGLE).is_file():
            files = [self.folder / _SINGLE]
        else:
            self._no_safetensors()
            return []
        for file in files:
            try:
                self.elements.append(_elements(file))
            except _DamagedFileError as fault:
                self.problem(f"{file.name}: {fault}", "copy or download the file again")
        return files

    def _indexed(self) -> list[Path]:
        index = self.read_json(_INDEX)
        if index is None:
            return []
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            self.problem(f"{_INDEX} holds no weight_map", "copy the file again")
            return []
        names = sorted({str(name) for name in cast("dict[str, Any]", weight_map).values()})
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            self.problem(
                f"{_INDEX} names {len(names)} files of weights, {len(missing)} of them missing: {shown}",
                "copy or download the missing files",
            )
        return [self.folder / name for name in names if name not in missing]

    def _no_safetensors(self) -> None:
        if list(self.folder.glob("pytorch_model*.bin")):
            self.problem(
                "the weights are in pytorch_model.bin; only safetensors are read",
                "convert them once: python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('"
                f"{self.given}', dtype='auto').save_pretrained('NEW_FOLDER')\", and copy the tokenizer's files there",
            )
        else:
            self.problem(
                f"the folder holds no weights ({_SINGLE}, or {_INDEX} and its files)",
                "copy the weights there, or set model.init: random to start from random weights",
            )

    def facts(self, config: dict[str, Any], weights: list[Path]) -> ModelFacts | None:
        """Facts from the config, or None and problems where it is no causal language model."""
        # A model for text and images nests the sizes of its language part.
        nested = config.get("text_config")
        sizes = (
            cast("dict[str, Any]", nested) if isinstance(nested, dict) and "num_attention_heads" in nested else config
        )
        before = len(self.problems)
        architectures = self._architectures(config)
        heads = self._count(sizes, "num_attention_heads", "n_head", "num_heads")
        layers = self._count(sizes, "num_hidden_layers", "n_layer", "num_layers")
        hidden = self._count(sizes, "hidden_size", "n_embd", "d_model")
        if config.get("quantization_config"):
            self.problem(
                "its weights are quantized (quantization_config in config.json); training needs plain weights",
                "name the folder of the model before quantization",
            )
        if len(self.problems) > before:
            return None
        rope_type, rope_positions, rope_original = _rope(sizes)
        tied = config.get("tie_word_embeddings", sizes.get("tie_word_embeddings"))
        return ModelFacts(
            path=self.folder,
            model_type=str(config.get("model_type", "")),
            architectures=architectures,
            num_attention_heads=heads,
            num_key_value_heads=_whole(sizes, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads,
            num_hidden_layers=layers,
            hidden_size=hidden,
            head_dim=_whole(sizes, "head_dim") or hidden // heads,
            vocab_size=_whole(sizes, "vocab_size") or _whole(config, "vocab_size"),
            max_position_embeddings=_whole(sizes, "max_position_embeddings", "n_positions"),
            rope_type=rope_type,
            rope_positions=rope_positions,
            rope_original=rope_original,
            tie_word_embeddings=tied if isinstance(tied, bool) else None,
            has_weights=bool(weights),
            is_moe=any((_whole(sizes, name) or 0) > 1 for name in _EXPERT_COUNTS),
            parameters=sum(self.elements),
            has_auto_map=bool(config.get("auto_map")),
        )

    def _architectures(self, config: dict[str, Any]) -> tuple[str, ...]:
        named = config.get("architectures")
        architectures = tuple(map(str, cast("list[Any]", named))) if isinstance(named, list) else ()
        auto_map = config.get("auto_map")
        by_code = isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
        causal = not architectures or any(name.endswith(_CAUSAL) for name in architectures) or by_code
        if config.get("is_encoder_decoder") is True or not causal:
            named_here = ", ".join(architectures) or config.get("model_type")
            self.problem(
                f"is no causal language model: config.json names {named_here}",
                "name the folder of a ...ForCausalLM model",
            )
        return architectures

    def _count(self, sizes: dict[str, Any], *names: str) -> int:
        count = _whole(sizes, *names)
        if count is not None and count > 0:
            return count
        found = next((f"{name} = {sizes[name]!r}" for name in names if name in sizes), f"no {names[0]}")
        self.problem(
            f"config.json does not describe a causal language model: {found} (a whole number from 1 is needed)",
            "name the folder of a Hugging Face causal language model",
        )
        return 0


def _whole(config: dict[str, Any], *names: str) -> int | None:
    """The first of these keys that holds a whole number."""
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _rope(config: dict[str, Any]) -> tuple[str | None, int | None, int | None]:
    """Type of RoPE scaling, the positions it stretches to where it states a factor, and those it starts from."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return ("default" if "rope_theta" in config else None), None, None
    flat = cast("dict[str, Any]", scaling)
    # Gemma 3 and others keep one set of parameters per kind of layer; the stretched one is what matters.
    groups = [cast("dict[str, Any]", each) for each in flat.values() if isinstance(each, dict)] or [flat]
    kinds = [str(group.get("rope_type") or group.get("type") or "default") for group in groups]
    chosen = next((index for index, kind in enumerate(kinds) if kind != "default"), 0)
    factor = groups[chosen].get("factor")
    name = "original_max_position_embeddings"
    original = _whole(groups[chosen], name) or _whole(config, name)
    trained = original or _whole(config, "max_position_embeddings")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or trained is None or not 0 < factor < 1e6:
        return kinds[chosen], None, original
    return kinds[chosen], int(factor * trained), original


class _DamagedFileError(Exception):
    """What is wrong with a safetensors file, as far as its header and size tell."""


def _elements(file: Path) -> int:
    """Elements of all tensors in a safetensors file, by its header.

    Raises:
        _DamagedFileError: it cannot be whole.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(max(8, len(_LFS_POINTER)))
            if start == _LFS_POINTER:
                raise _DamagedFileError("only a git-lfs pointer, the weights were never downloaded")
            if len(start) < 8:
                raise _DamagedFileError(f"only {size} bytes long")
            header_bytes: int = struct.unpack("<Q", start[:8])[0]
            if header_bytes > min(_MAX_HEADER_BYTES, size - 8):
                raise _DamagedFileError("truncated, or not a safetensors file")
            stream.seek(8)
            header = json.loads(stream.read(header_bytes))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
        elements = sum(math.prod(entry["shape"]) for entry in tensors)
    except (OSError, ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _DamagedFileError(f"cannot be read: {_reason(error)}") from error
    expected = 8 + header_bytes + end
    if size != expected:
        raise _DamagedFileError(f"{size:,} bytes long, but its header describes {expected:,}")
    return elements


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
