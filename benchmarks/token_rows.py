"""The data set class (``data.custom_cls``) through which the job reads the benchmarks' pre-tokenised rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq


class TokenRows:
    """Rows of token ids from parquet, every token trained."""

    def __init__(self, parquet_files: list[str], tokenizer: Any, config: Any) -> None:
        del tokenizer, config
        self._ids = pq.read_table(parquet_files, columns=["input_ids"]).column("input_ids").combine_chunks()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self._ids[index].values.to_numpy()
        return {"input_ids": ids, "loss_mask": np.ones(len(ids), dtype=np.int8)}
