"""Which architectures this job trains right: proved on the meta device, before any weight is read.

Packing and Ulysses reach a model through its attention layers only. A model that mixes tokens elsewhere (convolutions,
recurrences, linear attention) or does not call transformers' attention interface would let documents see one another.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sft_job.config.schema import ModelConfig
from sft_job.contract import ExitCode
from sft_job.errors import JobError, shorten
from sft_job.model.attention.call import AttentionCall, Backend, Documents, Packed
from sft_job.model.attention.packed import PACKED, register_packed_attention

_TOKENS = 8
# Modules with weights that work on each token alone.
_TOKEN_WISE = ("Norm", "Conv1D", "Activation")


def read_config(config: ModelConfig) -> PretrainedConfig:
    """The model's config through transformers, after ``external_lib`` was imported: it may register architectures.

    Raises:
        JobError: transformers cannot read it, or not without code that is not trusted (66); the library cannot be
            imported (2).
    """
    if config.external_lib is not None:
        try:
            importlib.import_module(config.external_lib)
        except Exception as error:  # it is the user's code
            raise JobError(
                ExitCode.CONFIG, f"model.external_lib = {config.external_lib!r}: {type(error).__name__}: {error}"
            ) from error
    try:
        return AutoConfig.from_pretrained(
            Path(config.partial_pretrain or ""), trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # a config is checked by each model's own code
        text = shorten(" ".join(str(error).split()), 300)
        raise JobError(
            ExitCode.MODEL, f"model.partial_pretrain = {config.partial_pretrain!r}: config.json: {text}"
        ) from error


def decoder_blocks(lm: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder blocks, first to last: the one list of modules that is as long as the config says.

    Raises:
        JobError: there is none (exit code 2).
    """
    count = getattr(lm.config, "num_hidden_layers", None)
    for module in lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise _refusal(lm.config, f"found no list of {count} decoder blocks")


def check_architecture(config: ModelConfig) -> PretrainedConfig:
    """Run the model's skeleton on the meta device and see that every block attends through our function.

    Returns:
        The model's config.

    Raises:
        JobError: 66 where the config cannot be read, 2 where the architecture would be trained wrong.
    """
    hf_config = read_config(config)
    register_packed_attention()
    calls: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        calls.append(q.shape[2])
        return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])

    try:
        with torch.device("meta"), torch.no_grad():
            lm = AutoModelForCausalLM.from_config(
                hf_config, attn_implementation=PACKED, trust_remote_code=config.trust_remote_code
            )
            ids = torch.zeros(1, _TOKENS, dtype=torch.long)
            documents = Documents((_TOKENS,), torch.zeros(2, dtype=torch.int32), _TOKENS)
            packed = Packed(documents, Backend("probe", attend, lambda needs: None), None)
            blocks = decoder_blocks(lm)
            lm.base_model(input_ids=ids, position_ids=ids, use_cache=False, packed=packed)
    except JobError:
        raise
    except Exception as error:  # whatever a model does with what it does not expect
        text = f"{type(error).__name__}: {shorten(' '.join(str(error).split()), 200)}"
        raise _refusal(hf_config, f"it does not take packed documents ({text})") from error
    odd = sorted({type(part).__name__ for part in blocks.modules() if _mixes(part)})
    if odd:
        raise _refusal(
            hf_config, f"its blocks hold {', '.join(odd)}, through which packed documents would see each other"
        )
    if len(calls) != len(blocks):
        raise _refusal(
            hf_config, f"{len(calls)} of its {len(blocks)} blocks attend through transformers' attention interface"
        )
    return hf_config


def _mixes(part: nn.Module) -> bool:
    """Has weights of its own and is not known to work on each token alone."""
    if not any(True for _ in part.parameters(recurse=False)) or isinstance(part, nn.Linear):
        return False
    return not any(word in type(part).__name__ for word in _TOKEN_WISE)


def _refusal(config: Any, reason: str) -> JobError:
    return JobError(
        ExitCode.CONFIG,
        f"model.partial_pretrain: {config.model_type} is not supported: {reason}\n    fix: a decoder whose blocks are "
        "attention and MLP (Llama, Qwen, Gemma, Mistral, Phi, OLMo, Granite, ...)",
    )
