"""LoRA through PEFT: adapters injected into the skeleton before it is sharded; their files as PEFT reads them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from sft_job.config.schema import ModelConfig
from sft_job.contract import ExitCode
from sft_job.errors import JobError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NAME = "default"
_PREFIX = "base_model.model."


class NarrowScaled(lora.Linear):
    """PEFT's linear layer, but for the place where an adapter is scaled: behind A, where it is ``r`` numbers wide.

    PEFT scales behind B. Compiled, the gradient then exists twice in the layer's whole width, once scaled: two such
    tensors of an MLP in each block's backward, written and read again.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.disable_adapters or self.merged or self.lora_variant or any(self.lora_bias.values()) or kwargs:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args)
        dtype = result.dtype
        for name in self.active_adapters:
            narrow: Any = self.lora_A[name]
            widen = self.lora_B[name]
            read = self.lora_dropout[name](self._cast_input_dtype(x, narrow.weight.dtype))
            result = result + widen(narrow(read) * self.scaling[name])
        return result.to(dtype)


def uses_lora(config: ModelConfig) -> bool:
    """Adapters are trained and the base model is frozen."""
    return config.lora_rank > 0 or config.lora_adapter_path is not None


def lora_config(config: ModelConfig) -> LoraConfig:
    """PEFT's config of the adapters: that of ``lora_adapter_path`` where one is given, else by the settings.

    Raises:
        JobError: the adapter's config cannot be used (exit code 66).
    """
    if config.lora_adapter_path is None:
        return LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  PEFT takes any number
            target_modules=config.target_modules,
            exclude_modules=config.exclude_modules,
            base_model_name_or_path=config.partial_pretrain,
            task_type="CAUSAL_LM",
        )
    folder = Path(config.lora_adapter_path)
    try:
        found = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise JobError(ExitCode.MODEL, f"model.lora_adapter_path {folder}: {error}") from error
    assert isinstance(found, LoraConfig)
    odd = [
        name for name in ("use_dora", "modules_to_save", "bias") if getattr(found, name) not in (None, False, "none")
    ]
    if odd:
        raise JobError(
            ExitCode.MODEL,
            f"model.lora_adapter_path {folder}: its adapter_config.json sets {', '.join(odd)}: plain LoRA only",
        )
    found.inference_mode = False
    found.base_model_name_or_path = config.partial_pretrain
    return found


def add_adapters(lm: PreTrainedModel, config: LoraConfig, dtype: torch.dtype) -> None:
    """Freeze the model and put adapters beside its linear layers, on the meta device.

    Args:
        lm: on the meta device.
        config: which layers, and how large.
        dtype: of the adapters' weights and optimizer states.

    Raises:
        JobError: no layer is named, or the head or the embedding is (exit code 2).
    """
    config._register_custom_module({nn.Linear: NarrowScaled})  # PEFT's documented way to choose a layer's class
    try:
        inject_adapter_in_model(config, lm, _NAME, low_cpu_mem_usage=True)
    except ValueError as error:
        raise JobError(ExitCode.CONFIG, f"model.target_modules = {config.target_modules!r}: {error}") from error
    outside = (lm.get_output_embeddings(), lm.get_input_embeddings())
    if any(hasattr(layer, "lora_A") or hasattr(layer, "lora_embedding_A") for layer in outside):
        raise JobError(
            ExitCode.CONFIG,
            f"model.target_modules = {config.target_modules!r} names the head or the embedding: the loss works on the "
            "head's weight itself\n    fix: all-linear, or names of layers inside the decoder blocks",
        )
    for name, parameter in adapter_parameters(lm).items():
        parent, _, leaf = name.rpartition(".")
        setattr(lm.get_submodule(parent), leaf, nn.Parameter(parameter.to(dtype)))


def adapter_parameters(lm: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' weights by their names in the model."""
    return {name: p for name, p in lm.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def file_name(name: str) -> str:
    """The name of an adapter's weight in PEFT's file, from its name in the model's state dict."""
    return _PREFIX + name.replace(f".{_NAME}.", ".")


def base_name(name: str) -> str:
    """The name of a frozen weight in the base model's files, from its name in the model with adapters."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def draw_adapters(lm: nn.Module, seed: int) -> None:
    """Draw the A matrices as PEFT does, the same at every layout; B starts at zero, so the model starts unchanged."""
    for name, parameter in _named(lm).items():
        whole = torch.zeros(parameter.shape, dtype=parameter.dtype)
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        _fill(parameter, whole)


@torch.no_grad()
def load_adapters(lm: nn.Module, folder: Path) -> None:
    """Read an adapter's weights into the sharded model; every rank reads the file and keeps its slices.

    Raises:
        JobError: the file is missing, or holds other weights than the model has adapters (exit code 66).
    """
    wanted = {file_name(name): parameter for name, parameter in _named(lm).items()}
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            found = set(file.keys())
            if found != set(wanted):
                odd = sorted(found ^ set(wanted))[:3]
                raise JobError(
                    ExitCode.MODEL, f"{folder / ADAPTER_WEIGHTS} does not fit this model: {', '.join(odd)} ..."
                )
            for name, parameter in wanted.items():
                _fill(parameter, file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise JobError(ExitCode.MODEL, f"{folder / ADAPTER_WEIGHTS}: {error}") from error


def _named(lm: nn.Module) -> dict[str, nn.Parameter]:
    """Adapters by their names in a state dict, which know nothing of recomputation's wrappers."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in adapter_parameters(lm).items()}


def _fill(parameter: Tensor, whole: Tensor) -> None:
    whole = whole.to(parameter.dtype)
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    # No communication: every rank has the whole and cuts out its own part.
    shards = distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
    parameter.to_local().copy_(shards.to_local())


def write_adapter_config(folder: Path, config: LoraConfig) -> None:
    """Write ``adapter_config.json`` as inference wants it."""
    written = LoraConfig(**{name: value for name, value in config.to_dict().items() if name in _FIELDS})
    written.inference_mode = True
    written.save_pretrained(str(folder))


_FIELDS = ("r", "lora_alpha", "target_modules", "exclude_modules", "base_model_name_or_path", "task_type", "use_rslora")


def merged(
    base: Iterator[tuple[str, Tensor]], adapters: Mapping[str, Tensor], scaling: float
) -> Iterator[tuple[str, Tensor]]:
    """Base weights with their adapters added: W + scaling * B A, in fp32 or wider.

    Args:
        base: names as in the base model's files.
        adapters: A and B by PEFT's names.
        scaling: of ``scaling_of``.
    """
    for name, weight in base:
        stem = _PREFIX + name.removesuffix(".weight")
        a, b = adapters.get(f"{stem}.lora_A.weight"), adapters.get(f"{stem}.lora_B.weight")
        if a is None or b is None:
            yield name, weight
            continue
        wide = torch.promote_types(weight.dtype, torch.float32)
        yield name, (weight.to(wide) + scaling * (b.to(wide) @ a.to(wide))).to(weight.dtype)


def scaling_of(config: LoraConfig) -> float:
    """The factor on B A: alpha / r, or alpha / sqrt(r) for rank-stabilised adapters."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
