"""The trained module: a Hugging Face causal language model whose forward returns the loss sum of a packed batch.

One FSDP root around backbone and head, so that the head's weight is gathered once for all chunks of the loss.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sft_job.contract import ExitCode
from sft_job.data.batches import PackedBatch
from sft_job.errors import JobError
from sft_job.model.attention.call import Backend, Documents, Packed
from sft_job.model.blocks import Blocks
from sft_job.model.loss import LogitRule, RowLosses, chunked_cross_entropy, row_losses
from sft_job.model.tail import pick_rows


def logit_rule(config: PretrainedConfig) -> LogitRule:
    """What the model does to its logits, by its config.

    Raises:
        JobError: the loss would miss a part of the model's own loss (exit code 2).
    """
    if getattr(config, "output_router_logits", False):
        raise JobError(ExitCode.CONFIG, "output_router_logits: the router's auxiliary loss is not supported")
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitRule(scale, getattr(config, "final_logit_softcapping", None))


class CausalLMLoss(nn.Module):
    """Loss sum of a packed batch.

    Args:
        lm: the Hugging Face model, built with the packed attention implementation.
        backend: attention backend.
        group: Ulysses group, None without sequence parallelism.
        blocks: how the model's decoder blocks run.
        each: losses of a chunk of rows; a compiled form where blocks are compiled.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        backend: Backend,
        group: dist.ProcessGroup | None,
        blocks: Blocks,
        each: RowLosses = row_losses,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.lm = lm
        self._backend = backend
        self._group = group
        self._rule = logit_rule(lm.config)
        self._each = each

    def forward(self, batch: PackedBatch, divisor: int = 1) -> Tensor:
        """Sum of the cross-entropies of this rank's supervised tokens over ``divisor``; [] in fp32 or wider."""
        hidden = self.hidden(batch)[0]  # [T/u, E]
        head: Any = self.lm.get_output_embeddings()
        rows = pick_rows(hidden, batch.target_rows)  # [n, E]
        targets = batch.targets[0].index_select(0, batch.target_rows)  # [n]
        return chunked_cross_entropy(rows, head.weight, head.bias, targets, self._rule, 1.0 / divisor, each=self._each)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The backbone's last hidden state of this rank's tokens, [1, T/u, E]."""
        # Recomputed blocks get all of it as arguments: torch.compile (seen with 2.11) would guard how many there are.
        lengths = () if self._backend.traced else batch.document_lengths
        documents = Documents(lengths, batch.cu_seqlens, batch.max_seqlen)
        packed = Packed(documents, self._backend, self._group)
        out = self.lm.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, packed=packed
        )
        return out.last_hidden_state
