"""A Hugging Face folder from sharded weights, one parameter at a time: no process holds more than one file of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_BYTES = 5 * 10**9


def whole_tensors(
    state: dict[str, Tensor], device: torch.device, meet: Callable[[], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor whole, in the order of the names (a collective call: every rank must go through all of them).

    Args:
        state: shards, on the device or offloaded to host memory.
        device: where the ranks' process groups communicate.
        meet: waits for all ranks, before each tensor: the rank that writes may be waiting for its disk for longer
            than a collective may take.
    """
    for name in sorted(state):
        if meet is not None:
            meet()
        tensor = state[name].to(device)
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass
class WeightsHash:
    """SHA-256 over all weights, sorted by name: equal if and only if two runs ended with the same bits."""

    _sum: Any = field(default_factory=hashlib.sha256)

    def add(self, name: str, tensor: Tensor) -> None:
        """Names must come sorted."""
        self._sum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        self._sum.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

    def hexdigest(self) -> str:
        """The sum of what was added so far."""
        return self._sum.hexdigest()


class WeightsWriter:
    """Writes safetensors files of at most ``file_bytes`` and the index over them; one file is called ``single``."""

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES, single: str = WEIGHTS) -> None:
        self._folder = folder
        self._single = single
        self._file_bytes = file_bytes
        self._waiting: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; writes a file when enough have come together."""
        size = tensor.numel() * tensor.element_size()
        if (
            self._waiting
            and sum(t.numel() * t.element_size() for t in self._waiting.values()) + size > self._file_bytes
        ):
            self._flush()
        self._waiting[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._total += size

    def _flush(self) -> None:
        save_file(self._waiting, self._folder / self._part(len(self._files) + 1), metadata={"format": "pt"})
        self._files.append(list(self._waiting))
        self._waiting = {}

    @staticmethod
    def _part(number: int) -> str:
        return f"model-{number:05d}.safetensors"

    def close(self) -> None:
        """Write what is left; one file gets the plain name, several get an index."""
        self._flush()
        count = len(self._files)
        if count == 1:
            (self._folder / self._part(1)).rename(self._folder / self._single)
            return
        names: dict[str, str] = {}
        for number, keys in enumerate(self._files, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._folder / self._part(number)).rename(self._folder / final)
            names.update(dict.fromkeys(keys, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(names.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, write: bool, writer: WeightsWriter | None = None
) -> str:
    """Go through all weights once: hash them and, on the writing rank, put them into files.

    Args:
        folder: exists already.
        tensors: whole tensors, sorted by name; drawn on every rank, because making them whole is a collective.
        write: this rank writes and hashes; the others only take part.
        writer: in place of one with the usual file names.

    Returns:
        The weights' SHA-256, '' on ranks that do not write.

    Raises:
        Exception: a file could not be written; raised when all weights were drawn, so that no other rank waits.
    """
    writer, weights = writer or WeightsWriter(folder), WeightsHash()
    failure: Exception | None = None
    for name, tensor in tensors:
        if write and failure is None:
            try:
                writer.add(name, tensor)
                weights.add(name, tensor)
            except Exception as error:
                failure = error
    if failure is not None:
        raise failure
    if not write:
        return ""
    writer.close()
    return weights.hexdigest()


def write_companions(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    architecture: str,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    stop_id: int,
) -> None:
    """Everything beside the weights that Transformers needs: configs, tokenizer, the base folder's own code.

    Args:
        folder: where the weights are.
        config: the model's config.
        dtype: of the written weights.
        architecture: class name of the model.
        base: the base model's folder.
        tokenizer: saved as it was used.
        stop_id: id of the token that ends a turn in training; generation must stop at it.
    """
    config = type(config).from_dict(config.to_dict())
    config.dtype = dtype
    config.architectures = [architecture]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = _base_generation(base)
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    stops = [stop_id, *(stop for stop in stops if stop is not None and stop != stop_id)]
    generation.eos_token_id = stops if len(stops) > 1 else stop_id
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_id
    # Written as JSON: save_pretrained refuses combinations that base models do ship (temperature without sampling).
    generation.to_json_file(folder / "generation_config.json", use_diff=True)
    for code in base.glob("*.py"):
        shutil.copy2(code, folder / code.name)


def _base_generation(base: Path) -> GenerationConfig:
    if (base / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(base)
    return GenerationConfig.from_model_config(_plain_config(base))


def _plain_config(base: Path) -> PretrainedConfig:
    return PretrainedConfig.from_dict(json.loads((base / "config.json").read_text(encoding="utf-8")))
